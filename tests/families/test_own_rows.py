"""Families that are not in the table: one row of one's own is all they need, whatever their layers call their heads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from further.images import glm_image, krea2
from further.videos import joy_image, kandinsky5
from hand_masks import RADIUS, TOLERANCE, by_hand, error
from models import COLUMNS, ROWS, Tiny, flux
from releases import built
from torch import Tensor, nn

import diffattn
from diffattn.families import FAMILIES, Arguments, Family, Layers, Layout, picture, video

LEARNED = diffattn.config.create("linear", feature_map="learned")


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> list[Family]:
    """The rows but those of the models here, to add to for one test."""
    rows = [row for row in FAMILIES if row.name not in OWN]
    monkeypatch.setattr("diffattn.families.FAMILIES", rows)
    return rows


@dataclass(frozen=True)
class Own:
    """A model with the row that a user would write for it."""

    build: Callable[[], Tiny]
    name: str
    read: Any


def channels_last(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    frames, height, width = call["hidden_states"].shape[1:4]
    return (Layout(height // 2, width // 2, frames, before=0),)


def six_by_nine(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    return (Layout(ROWS, COLUMNS),)


OWN = {
    "JoyImage": Own(joy_image, r"double_blocks\.\d+\.attn", video(2, before=0, after=None, patch_t="patch_size")),
    "Kandinsky5": Own(kandinsky5, r"visual_transformer_blocks\.\d+\.self_attention", channels_last),
    "Krea2": Own(krea2, r"transformer_blocks\.\d+\.attn", six_by_nine),
    "GLM-Image": Own(glm_image, r"transformer_blocks\.\d+\.attn1", picture()),
}


@torch.no_grad()
@pytest.mark.parametrize("name", built(OWN))
def test_a_row_of_ones_own(name: str, families: list[Family]) -> None:
    own = OWN[name]
    tiny = own.build()
    families.append(Family(name, (type(tiny.model).__name__,), (Layers(own.name, "spatial", own.read),)))
    dense, want = tiny.run(), by_hand(tiny, tiny.spatial)
    assert error(want, dense) > 1e-3
    with diffattn.apply(tiny.model, "clear", radius=RADIUS) as handle:
        assert error(tiny.run(), want) < TOLERANCE
        assert not list(handle.parameters())
    with diffattn.apply(tiny.model, LEARNED) as handle:
        assert list(handle.parameters())
        assert tiny.run().isfinite().all()
    assert torch.equal(tiny.run(), dense)


@torch.no_grad()
def test_a_cache_of_keys_is_refused_at_its_first_call(families: list[Family]) -> None:
    """GLM-Image's edit: keys of the image that is edited come beside the queries' own tokens."""
    own, tiny = OWN["GLM-Image"], glm_image()
    families.append(Family("mine", ("GlmImageTransformer2DModel",), (Layers(own.name, "spatial", own.read),)))

    def edit() -> Tensor:
        cache = GlmImageKVCache(num_layers=2)
        cache.set_mode("write")
        tiny.run(kv_caches=cache)
        cache.set_mode("read")
        return tiny.run(kv_caches=cache)

    dense = edit()
    with diffattn.apply(tiny.model, "softmax"):
        assert torch.equal(edit(), dense)
    with diffattn.apply(tiny.model, "clear", radius=RADIUS) as handle:
        with pytest.raises(
            ValueError, match=r"transformer_blocks\.0\.attn1 attends from 59 queries to 118 keys, as with"
        ):
            edit()
        with handle.paused():
            assert torch.equal(edit(), dense)
    with diffattn.apply(tiny.model, "clear", radius=RADIUS, min_tokens=60):
        assert torch.equal(edit(), dense)


def test_sparse_kandinsky_is_refused(families: list[Family]) -> None:
    own = OWN["Kandinsky5"]
    families.append(Family("mine", ("Kandinsky5Transformer3DModel",), (Layers(own.name, "spatial", own.read),)))
    with pytest.raises(ValueError, match="Kandinsky5Transformer3DModel can't be swapped: .* by itself"):
        diffattn.apply(kandinsky5(attention_type="nabla").model, "clear", radius=RADIUS)


class Nameless(nn.Module):
    """A family whose attention tells its heads in no usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = flux().model.transformer_blocks[0].attn
        for name in ("heads", "inner_dim", "head_dim"):
            delattr(self.attn, name)


def test_heads_are_asked_for_weights_alone(families: list[Family]) -> None:
    families.append(Family("mine", ("Nameless",), (Layers("attn", "spatial", six_by_nine),)))
    model = Nameless()
    for mechanism in (diffattn.ClearAttention(radius=2), diffattn.SoftmaxAttention()):
        diffattn.apply(model, mechanism).restore()
    with pytest.raises(
        ValueError, match=r"linear\(.*\) has weights of its own .* FluxAttention \(attn\) tells neither"
    ):
        diffattn.apply(model, LEARNED)
    model.attn.num_heads, model.attn.head_dim = 2, 16
    assert list(diffattn.apply(model, LEARNED).parameters())
