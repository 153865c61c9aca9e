"""Heads with mechanisms of their own."""

import json

import pytest
import torch
from tolerances import assert_close
from torch import nn

import diffattn
from diffattn import (
    AgentAttention,
    ClearAttention,
    DualScopeAttention,
    LinearAttention,
    PerHeadAttention,
    RoutingAttention,
    TokenGrid,
    config,
)
from diffattn.mechanisms import Context

GRID = TokenGrid(8, 6, before=3)


def _inputs(heads: int = 5) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, 2, heads, GRID.tokens, 8, dtype=torch.float64))


def test_every_head_is_what_its_mechanism_makes_of_it() -> None:
    parts = ClearAttention(radius=2), AgentAttention(num_agents=4), ClearAttention(radius=1, pool=2)
    q, k, v = _inputs()
    out = PerHeadAttention(mechanisms=parts, heads=(2, 0, 0, 1)).attend(q, k, v, GRID)
    for head, number in enumerate((2, 0, 0, 1, 2)):
        own = (x[:, head : head + 1] for x in (q, k, v))
        assert_close(out[:, head : head + 1], parts[number].attend(*own, GRID))


def test_the_cost_is_that_of_its_parts() -> None:
    grid = TokenGrid(32, 32, before=8)
    parts = ClearAttention(radius=4), RoutingAttention(share=0.4)
    whole = PerHeadAttention(mechanisms=parts, heads=(0, 0, 1)).flops(grid, 12, 64)
    assert whole == parts[0].flops(grid, 8, 64) + parts[1].flops(grid, 4, 64)


@pytest.mark.parametrize(
    "given",
    [
        "clear(radius=2, pool=2),linear",
        ["clear(radius=2,pool=2)", "linear()"],
        [{"type": "clear", "radius": 2, "pool": 2}, LinearAttention()],
    ],
)
def test_mechanisms_are_read_however_they_are_written(given: object) -> None:
    made = config.create("per_head", mechanisms=given)
    assert made == PerHeadAttention(mechanisms=(ClearAttention(radius=2, pool=2), LinearAttention()))
    assert config.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert config.create("per_head", mechanisms=str(made)[len("per_head(mechanisms=") : -1]) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mechanisms": "clear(radius=2)"}, "two or more mechanisms.*got 'clear"),
        ({"mechanisms": "clear(radius=2),warp"}, "unknown mechanism 'warp'"),
        ({"mechanisms": "clear(radius=two),linear"}, "radius must be"),
        ({"mechanisms": "clear(radius=2),lin ear"}, "two or more mechanisms"),
        ({"mechanisms": (3, 4)}, "two or more mechanisms"),
        ({"mechanisms": "clear(radius=2),linear", "heads": (0, 0)}, "each of the 2 mechanisms"),
        ({"mechanisms": "clear(radius=2),linear", "heads": (0, 2)}, r"numbers 0 to 1, got heads=\(0, 2\)"),
        ({"mechanisms": "clear(radius=2,ntk_factor=10),linear"}, "ntk_factor"),
    ],
)
def test_what_is_no_choice_of_mechanisms_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.create("per_head", **options)


def test_parts_keep_memories_and_weights_of_their_own() -> None:
    parts = RoutingAttention(top_k=1, tile=2, pool=2, order="content"), LinearAttention(feature_map="learned")
    mechanism = PerHeadAttention(mechanisms=parts, heads=(0, 0, 1))
    assert "memory" in mechanism.needs
    memory: dict[str, object] = {}
    weights = mechanism.weights(5, 8)
    assert isinstance(weights, nn.ModuleDict) and list(weights) == ["part_1"]
    for parameter in weights.double().parameters():
        nn.init.normal_(parameter)
    q, k, v = _inputs()
    out = mechanism.attend(q, k, v, GRID, context=Context(memory=memory, weights=weights))
    assert memory["part 0"] and not memory.get("part 1")
    own = (x[:, 2:3] for x in (q, k, v))
    assert_close(out[:, 2:3], parts[1].attend(*own, GRID, context=Context(weights=weights["part_1"])))


def test_it_takes_the_layers_that_all_parts_take() -> None:
    both = PerHeadAttention(mechanisms=(ClearAttention(radius=2), DualScopeAttention()))
    assert both.kinds == {"spatial"} and not both.across_frames
    assert PerHeadAttention(mechanisms="agent,softmax").one_mask == AgentAttention().one_mask


def test_a_part_that_counts_steps_needs_a_pipeline() -> None:
    turning = DualScopeAttention(top_k=2, rotation=1.0)
    assert turning.needs_steps and PerHeadAttention(mechanisms=(turning, ClearAttention(radius=2))).needs_steps
    assert not PerHeadAttention(mechanisms="softmax,linear").needs_steps


def test_nested_parts_count_their_own_heads() -> None:
    mechanism = PerHeadAttention(mechanisms="multi_axis(window=2),linear", heads=(1, 0, 0))
    q, k, v = _inputs(6)
    whole = mechanism.attend(q, k, v, GRID)
    part = mechanism.attend(q[:, 2:], k[:, 2:], v[:, 2:], GRID, context=Context(first_head=2))
    assert_close(part, whole[:, 2:])


def test_a_recipe_gives_every_layer_its_own_heads(tmp_path: object) -> None:
    from diffattn.swap.settings.recipe import ModelRecipe, Recipe
    from diffattn.swap.settings.schedule import Part, Schedule

    first, second = (PerHeadAttention(mechanisms=f"softmax,routing(share={share})") for share in (0.5, 0.7))
    layers = {name: Schedule((Part(own, 1, 1.0),)) for name, own in (("a", first), ("b", second))}
    recipe = Recipe({"transformer": ModelRecipe("Model", (1, 8, 8), layers)})
    read = diffattn.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert read.models["transformer"].layers["b"].mechanisms == (second,)
