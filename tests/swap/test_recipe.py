"""Recipes: files, what they put in place, and where they are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch

import diffattn
from diffattn import ClearAttention, Recipe, RoutingAttention
from diffattn.swap.settings.recipe import ModelRecipe
from diffattn.swap.settings.schedule import FULL, Part, Schedule

LAYERS = "transformer_blocks.0.attn", "single_transformer_blocks.1.attn"
ROUTING = RoutingAttention(share=0.9, tile=2, pool=2)
SCHEDULE = Schedule((Part(ROUTING, 2, until=0.5), Part(FULL)))


def recipe(first: Schedule = SCHEDULE, name: str = "FluxTransformer2DModel", layers: Any = LAYERS) -> Recipe:
    own = ModelRecipe(name, (1, 4, 6), {layers[0]: first, layers[1]: Schedule.always(ROUTING)})
    return Recipe({"transformer": own}, {"share": 0.5})


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    path = recipe().save(tmp_path / "recipe.json")
    assert Recipe.load(path) == recipe()
    text = str(recipe())
    assert "made for 4x6 tokens" in text and "reuse 2 to 50%; full to 100%" in text


def test_every_layer_has_its_own_schedule() -> None:
    case = tiny_pipelines.flux(steps=4)
    own = case.run()
    with diffattn.apply(case.pipe, recipe()):
        got = case.run()
        rows = {row.layer: row for row in diffattn.summary(case.pipe).rows}
    assert rows[LAYERS[0]].calls == {
        "swapped": 1,
        "with the output of an earlier step": 1,
        "dense in the parts of the run that its schedule leaves full": 2,
    }
    assert rows[LAYERS[1]].calls == {"swapped": 4}
    assert sum(row.swapped for row in rows.values()) == 2
    assert not torch.equal(got, own) and torch.equal(case.run(), own)


def test_the_rest_of_apply_goes_with_it() -> None:
    case = tiny_pipelines.flux(steps=4)
    with diffattn.apply(case.pipe, recipe(), start=0.5):
        case.run()
        calls = diffattn.summary(case.pipe).calls
    assert calls == {
        "swapped": 2,
        "dense in steps before start= and from end= on": 4,
        "dense in the parts of the run that its schedule leaves full": 2,
    }


@pytest.mark.parametrize("options", [{"reuse": 2}, {"layers": "*"}, {"shares": (0.5,)}, {"components": "transformer"}])
def test_what_a_recipe_says_itself_is_not_said_again(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a recipe says layers, shares and reuse itself"):
        diffattn.apply(tiny_pipelines.flux(steps=2).pipe, recipe(), **options)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (recipe(name="SD3Transformer2DModel"), "for the transformer SD3Transformer2DModel"),
        (recipe(layers=("blocks.7.attn", LAYERS[1])), "1 layers that this FluxTransformer2DModel lacks"),
    ],
)
def test_a_recipe_of_another_model_is_refused(other: Recipe, words: str) -> None:
    case = tiny_pipelines.flux(steps=2)
    own = case.run()
    with pytest.raises(ValueError, match=words):
        diffattn.apply(case.pipe, other)
    assert torch.equal(case.run(), own)


def test_parts_of_a_run_need_a_pipeline() -> None:
    model = tiny_pipelines.flux(steps=2).pipe.transformer
    with pytest.raises(ValueError, match="counts the steps of a pipeline"):
        diffattn.apply(model, recipe())
    diffattn.apply(model, recipe(Schedule.always(ROUTING))).restore()


def test_shares_carry_over_to_other_sizes_and_radii_do_not() -> None:
    case = tiny_pipelines.flux(steps=2)
    fixed = recipe(Schedule.always(ClearAttention(radius=2)))
    with diffattn.apply(case.pipe, fixed):
        case.run()
    case.call["height"] *= 2
    with diffattn.apply(case.pipe, recipe()):
        case.run()
    with (
        diffattn.apply(case.pipe, fixed),
        pytest.raises(ValueError, match=r"made for 1x4x6 tokens and has clear\(radius=2\)"),
    ):
        case.run()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: own.update(type="something"), "expected a recipe"),
        (lambda own: own.update(version=7), "version 1"),
        (lambda own: own.pop("models"), "broken"),
        (lambda own: own["models"]["transformer"].pop("tokens"), "broken"),
        (lambda own: own["models"]["transformer"]["layers"][LAYERS[0]].pop(), "the last at 1.0"),
        (lambda own: own["models"]["transformer"]["layers"][LAYERS[0]][0].update(reuse=0), "reuse of at least 1"),
        (lambda own: own["models"]["transformer"]["layers"][LAYERS[0]][0]["mechanism"].update(share=2), "share"),
    ],
)
def test_broken_files_are_refused_by_name(change: Any, words: str, tmp_path: Path) -> None:
    values = recipe().to_dict()
    change(values)
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words) as found:
        Recipe.load(tmp_path / "recipe.json")
    assert "recipe.json" in str(found.value)


@pytest.mark.parametrize("text", ["", "[1", "[]", "null", "[" * 100_000])
def test_what_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        Recipe.load(tmp_path / "a.json")
