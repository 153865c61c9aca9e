"""Hidden states for mechanisms that see what the attention module is given: those that its queries are made of."""

from typing import Any

import pytest
import torch
from hand_masks import error, gradients, relative
from models import BUILDERS, Tiny
from torch import Tensor, nn

import diffattn
from diffattn import TokenMergeAttention, VideoSparseAttention
from diffattn.mechanisms.hybrids.vsa import VSAWeights, hidden_of_cells
from diffattn.swap.apply import swaps_of
from diffattn.swap.plan import plan
from diffattn.swap.settings.placement import Placement
from diffattn.swap.settings.schedule import Part, Schedule

VSA = VideoSparseAttention(top_share=0.5, tile=(1, 2, 2))


def trained(handle: Any) -> None:
    """Gates away from zero."""
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))


def noted(given: dict[int, list[Tensor]], own: int) -> Any:
    """A hook that keeps what a projection is given."""

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.setdefault(own, []).append(args[0])

    return keep


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("family", BUILDERS)
def test_the_gate_sees_what_the_queries_are_made_of(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the family is refused, with the reason."""
    tiny = BUILDERS[family]()
    try:
        handle = diffattn.apply(tiny.model, VSA)
    except ValueError as refusal:
        assert "can carry vsa" in str(refusal), refusal
        return
    given: dict[int, list[Tensor]] = {}
    seen: list[tuple[int, Tensor]] = []
    for layer in handle.layers:
        module: Any = layer.module
        query = getattr(module, "to_q", None) or module.to_query
        query.register_forward_pre_hook(noted(given, id(layer.weights)))
    own = VSAWeights.gates

    def gates(weights: VSAWeights, hidden: Tensor, heads: int) -> Tensor:
        seen.append((id(weights), hidden))
        return own(weights, hidden, heads)

    monkeypatch.setattr(VSAWeights, "gates", gates)
    tiny.run()
    assert seen
    for number, hidden in seen:
        candidates = [x for whole in given[number] for x in whole.split(hidden.shape[0])]
        assert any(_holds(x, hidden) for x in candidates), family


def _holds(whole: Tensor, part: Tensor) -> bool:
    """Are these cells a stretch of those tokens?"""
    return any(
        torch.equal(whole[:, first : first + part.shape[1]], part)
        for first in range(whole.shape[1] - part.shape[1] + 1)
    )


def test_wan_at_work_and_back() -> None:
    tiny = BUILDERS["Wan"]()
    with torch.no_grad():
        own = tiny.run()
        handle = diffattn.apply(tiny.model, VSA)
        fresh = tiny.run()
        trained(handle)
        out = tiny.run()
        assert error(out, fresh) > 1e-3 and error(fresh, own) > 1e-3
        assert not any(call.traced_features for call in handle.layers)
        handle.restore()
        assert torch.equal(tiny.run(), own)
        assert all(not module._forward_pre_hooks for module in tiny.model.modules())


def test_gradients_reach_the_hidden_states_through_the_gate_with_checkpointing_too() -> None:
    tiny = BUILDERS["Wan"]()
    trained(diffattn.apply(tiny.model, VSA))
    whole = gradients(tiny.model, tiny.run())
    zero = [layer.weights for layer in swaps_of(tiny.model)[0].layers.values()]
    tiny.model.enable_gradient_checkpointing()
    assert relative(gradients(tiny.model, tiny.run()), whole) < 1e-6
    for weights in zero:
        nn.init.zeros_(weights.to_gate_compress.weight)  # type: ignore[union-attr, arg-type]
    assert relative(gradients(tiny.model, tiny.run()), whole) > 1e-3


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_model_has_the_same_output_and_gradients() -> None:
    tiny = BUILDERS["Wan"]()
    handle = diffattn.apply(tiny.model, VSA)
    trained(handle)
    eager = tiny.run()
    weights = [*tiny.model.parameters(), *handle.parameters()]
    want = torch.autograd.grad(eager.square().mean(), weights, allow_unused=True)
    for block in tiny.model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    out = tiny.run()
    assert error(out.detach(), eager.detach()) < 2e-5
    got = torch.autograd.grad(out.square().mean(), weights, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).abs().max() < 1e-5 * max(1.0, float(other.abs().max()))


def test_what_cannot_be_seen_is_refused() -> None:
    """Two inputs at once, and hidden states of another width than the heads."""
    both = Schedule((Part(VSA, 1, 0.5), Part(TokenMergeAttention(), 1, 1.0)))
    with pytest.raises(ValueError, match="the input of the block or at that of the layer; got both"):
        plan(BUILDERS["Flux"]().model, both, Placement())
    tiny: Tiny = BUILDERS["MiniMax-H3"]()
    module: Any = next(m for m in tiny.model.modules() if hasattr(m, "to_q"))
    if module.to_q.in_features != module.to_q.out_features:
        with pytest.raises(ValueError, match=rf"give channels={module.to_q.in_features}"):
            diffattn.apply(tiny.model, VSA)
        diffattn.apply(tiny.model, "vsa", tile=2, channels=module.to_q.in_features)


def test_cells_among_hidden_states() -> None:
    grid = diffattn.TokenGrid(2, 3, before=2, after=1, silent=(1, 0))
    hidden = torch.arange(9.0)[None, :, None]
    want = hidden[:, 2:8]
    assert torch.equal(hidden_of_cells(hidden, grid), want)
    assert torch.equal(hidden_of_cells(hidden[:, 1:], grid), want)
    assert torch.equal(hidden_of_cells(want, grid), want)


@pytest.mark.parametrize(("before", "after", "given", "first"), [
    (17, 0, 66, 12), (17, 0, 71, 17), (0, 17, 66, 0), (3, 17, 66, 3), (17, 0, 54, 0)])  # fmt: skip
def test_cells_beside_references_without_the_text(before: int, after: int, given: int, first: int) -> None:
    """Text is missing among what lies on the side that has room for it."""
    grid = diffattn.TokenGrid(6, 9, before=before, after=after)
    hidden = torch.arange(float(given))[None, :, None]
    assert torch.equal(hidden_of_cells(hidden, grid), hidden[:, first : first + 54])


def test_cells_that_could_lie_in_two_places_are_refused() -> None:
    grid = diffattn.TokenGrid(6, 9, before=9, after=17)
    with pytest.raises(ValueError, match="expected hidden states of 54 cells"):
        hidden_of_cells(torch.zeros(1, 75, 4), grid)
