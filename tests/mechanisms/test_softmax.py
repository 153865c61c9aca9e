"""Full attention, as the model computes it and with CLEAR's changes for larger images."""

import math

import pytest
import torch
from models import Tiny, flux

import diffattn
from diffattn import ClearAttention, SoftmaxAttention, TokenGrid

GRID = TokenGrid(5, 7, before=3, after=1)


@pytest.fixture
def tiny() -> Tiny:
    return flux()


def test_it_is_the_models_own_attention_unless_it_changes_something(tiny: Tiny) -> None:
    plain = tiny.run()
    for options in ({}, {"train_tokens": 9}):
        assert SoftmaxAttention(**options).exact
        with diffattn.apply(tiny.model, "softmax", **options):
            assert torch.equal(tiny.run(), plain)
    for options in ({"proportional": True}, {"ntk_factor": 2.0}):
        assert not SoftmaxAttention(**options).exact
        with diffattn.apply(tiny.model, "softmax", **options):
            assert not torch.allclose(tiny.run(), plain, atol=1e-4)
    assert torch.equal(tiny.run(), plain)


@pytest.mark.parametrize("given", [None, 0.3])
def test_the_logits_grow_with_the_tokens(given: float | None) -> None:
    q, k, v = torch.randn(3, 2, 3, GRID.tokens, 16, dtype=torch.float64)
    scale = (given or 0.25) * math.sqrt(math.log(39) / math.log(20))
    want = (scale * q @ k.transpose(-1, -2)).softmax(-1) @ v
    mechanism = SoftmaxAttention(proportional=True, train_tokens=20)
    for attend in (mechanism.attend, mechanism.reference):
        torch.testing.assert_close(attend(q, k, v, GRID, scale=given), want, atol=1e-12, rtol=0)


def test_at_the_tokens_of_training_nothing_changes() -> None:
    q, k, v = torch.randn(3, 1, 2, GRID.tokens, 8, dtype=torch.float64)
    same = SoftmaxAttention(proportional=True, train_tokens=GRID.tokens)
    torch.testing.assert_close(same.attend(q, k, v, GRID), SoftmaxAttention().attend(q, k, v, GRID))


@pytest.mark.parametrize("options", [{"proportional": True}, {"proportional": True, "ntk_factor": 10.0}])
def test_in_a_model_it_is_a_window_over_everything(tiny: Tiny, options: dict[str, float]) -> None:
    with diffattn.apply(tiny.model, ClearAttention(radius=100, **options)):
        want = tiny.run()
    theta = tiny.model.pos_embed.theta
    with diffattn.apply(tiny.model, "softmax", **options) as handle:
        assert tiny.model.pos_embed.theta == theta * options.get("ntk_factor", 1)
        torch.testing.assert_close(tiny.run(), want, atol=1e-5, rtol=0)
        assert handle.layers and all(layer.grid is not None for layer in handle.layers)
    assert tiny.model.pos_embed.theta == theta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ntk_factor": 0}, "softmax: ntk_factor must be a positive number, got 0"),
        ({"ntk_factor": float("inf")}, "softmax: ntk_factor must be a positive number, got inf"),
        ({"train_tokens": 1}, "softmax: train_tokens must be at least 2, got 1"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftmaxAttention(**options)
