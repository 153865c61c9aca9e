"""One call with a mechanism for each glob of layers: each does what it does alone, and all go back together."""

from typing import Any

import pytest
import torch
from models import flux, unet3d

import diffattn
from diffattn import ClearAttention, DualScopeAttention, NeighborhoodAttention, SoftmaxAttention
from diffattn.swap.model_swap import current

SPATIAL, TEMPORAL = "*.attentions.*", "*temp_attentions*"
LOCAL, WHOLE = NeighborhoodAttention(kernel_size=3), NeighborhoodAttention(kernel_size=63)
SCOPES = DualScopeAttention(padding=1, top_k=0)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return unet3d()


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-3)


def alone(tiny: Any, mechanism: Any, layers: str) -> torch.Tensor:
    with diffattn.apply(tiny.model, mechanism, layers=layers):
        return tiny.run()


@torch.no_grad()
def test_each_acts_on_its_own_layers(tiny: Any) -> None:
    plain = tiny.run()
    with diffattn.apply(tiny.model, {SPATIAL: LOCAL, TEMPORAL: SCOPES}) as handle:
        both = tiny.run()
        kinds = {("temp_" in layer.name, type(layer.mechanism).__name__) for layer in handle.layers}
        assert kinds == {(False, "NeighborhoodAttention"), (True, "DualScopeAttention")}
        assert all(layer.reached for layer in handle.layers)
        assert "neighborhood" in repr(handle) and "dual_scope" in repr(handle)
        text = str(diffattn.summary(tiny.model))
        assert "neighborhood(kernel_size=3)" in text and "dual_scope(padding=1, top_k=0)" in text
        with handle.paused():
            assert torch.equal(tiny.run(), plain)
    assert torch.equal(tiny.run(), plain) and current(tiny.model) is None
    for mechanism, layers in ((LOCAL, SPATIAL), (SCOPES, TEMPORAL)):
        assert differ(both, alone(tiny, mechanism, layers)) and differ(plain, alone(tiny, mechanism, layers))


@torch.no_grad()
def test_one_that_changes_nothing_leaves_the_other(tiny: Any) -> None:
    for other in (WHOLE, SoftmaxAttention()):
        with diffattn.apply(tiny.model, {TEMPORAL: SCOPES, SPATIAL: other}):
            torch.testing.assert_close(tiny.run(), alone_again(tiny), atol=1e-4, rtol=1e-4)


def alone_again(tiny: Any) -> torch.Tensor:
    """Dual scope alone, on a model of its own with the same weights."""
    other = unet3d()
    other.model.load_state_dict(tiny.model.state_dict())
    return alone(other, SCOPES, TEMPORAL)


@torch.no_grad()
def test_two_settings_of_one_mechanism() -> None:
    tiny = flux()
    first, second = "transformer_blocks.*", "single_transformer_blocks.*"
    with diffattn.apply(tiny.model, {first: ClearAttention(radius=1), second: ClearAttention(radius=2)}) as handle:
        radii = {layer.name.split(".")[0]: layer.module.processor.mechanism.radius for layer in handle.layers}
        both = tiny.run()
    assert radii == {"transformer_blocks": 1, "single_transformer_blocks": 2}
    with diffattn.apply(tiny.model, ClearAttention(radius=1)):
        assert differ(both, tiny.run())


@pytest.mark.parametrize(
    ("mechanism", "options", "message"),
    [
        ({}, {}, "expected globs of layers with a config each"),
        ({SPATIAL: LOCAL}, {"layers": SPATIAL}, "expected globs of layers with a config each"),
        ({SPATIAL: LOCAL}, {"kernel_size": 3}, "expected globs of layers with a config each"),
        ({SPATIAL: LOCAL, "*": SCOPES}, {}, r"pick no layer twice; got .*, \d+ layers such as .* by two"),
        ({SPATIAL: LOCAL, "typo": SCOPES}, {}, "layers='typo' matches none"),
        ({SPATIAL: "neighborhood"}, {}, "neighborhood needs kernel_size"),
    ],
)
def test_what_does_not_fit_is_refused(tiny: Any, mechanism: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffattn.apply(tiny.model, mechanism, **options)
    assert current(tiny.model) is None


def test_a_rotary_embedding_is_scaled_by_one_mechanism_alone() -> None:
    tiny = flux()
    scaling = ClearAttention(radius=1, ntk_factor=2.0)
    with pytest.raises(ValueError, match="leave the model's rotary embedding alone"):
        diffattn.apply(
            tiny.model, {"transformer_blocks.*": scaling, "single_transformer_blocks.*": ClearAttention(radius=1)}
        )


def test_several_are_not_saved(tiny: Any, tmp_path: Any) -> None:
    with (
        diffattn.apply(tiny.model, {SPATIAL: LOCAL, TEMPORAL: SCOPES}),
        pytest.raises(ValueError, match="expected one mechanism to save; got neighborhood"),
    ):
        diffattn.save(tiny.model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
