"""Settings as texts."""

from pathlib import Path

import pytest
import tiny_pipelines

import diffattn
from diffattn import ClearAttention, RoutingAttention, SoftmaxAttention
from diffattn.comparison import Setting
from diffattn.swap.settings import quality
from diffattn.swap.settings.recipe import ModelRecipe, Recipe
from diffattn.swap.settings.schedule import Schedule


@pytest.mark.parametrize(
    ("text", "mechanism", "options"),
    [
        ("full", None, {}),
        ("clear radius=8 pool=4", ClearAttention(radius=8, pool=4), {}),
        ("clear radius=8 start=0.2 end=0.9", ClearAttention(radius=8), {"start": 0.2, "end": 0.9}),
        ("softmax reuse=2", SoftmaxAttention(), {"reuse": 2}),
        ("routing share=0.4 shares=0.5,0.4 backend=gather", RoutingAttention(share=0.4),
         {"shares": (0.5, 0.4), "backend": "gather"}),
        ("routing quality=fast reuse=1", "routing", {"quality": "fast", "reuse": 1}),
    ],
)  # fmt: skip
def test_a_text_says_mechanism_and_placement(text: str, mechanism: object, options: dict[str, object]) -> None:
    found = Setting.parse(text)
    assert (found.name, found.mechanism, found.options) == (text, mechanism, options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "got nothing"),
        ("cleer radius=8", "unknown mechanism 'cleer'"),
        ("clear radius", "NAME=VALUE"),
        ("clear radius=8 radius=9", "each once"),
        ("clear raduis=8", "no option 'raduis'"),
        ("clear radius=8 start=0.9 end=0.1", "start= before end="),
        ("clear radius=8 reuse=none", "reuse"),
        ("full reuse=2", "has no options"),
        ("recipe=/nowhere.json", "cannot read the recipe"),
    ],
)
def test_wrong_texts_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Setting.parse(text)


def test_it_is_in_place_inside_the_block_alone(tmp_path: Path) -> None:
    case = tiny_pipelines.flux(steps=2)
    name = "transformer_blocks.0.attn"
    own = ModelRecipe("FluxTransformer2DModel", (1, 4, 6), {name: Schedule.always(ClearAttention(radius=1))})
    path = Recipe({"transformer": own}).save(tmp_path / "r.json")
    for text, count in (("full", 0), ("clear radius=1", 4), ("routing quality=high", 4), (f"recipe={path}", 1)):
        with Setting.parse(text).on(case.pipe):
            assert sum(row.swapped for row in diffattn.summary(case.pipe).rows) == count
        assert not any(row.swapped for row in diffattn.summary(case.pipe).rows)


def test_a_name_that_means_another_thing_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.json"
    meant = []
    for radius in (2, 3):
        schedules = {"blocks.0.attn": Schedule.always(ClearAttention(radius=radius))}
        Recipe({"transformer": ModelRecipe("Model", (1, 8, 8), schedules)}).save(file)
        meant.append(Setting.parse(f"recipe={file}").meaning)
    assert meant[0] != meant[1]
    level = Setting.parse("routing quality=fast")
    before = level.meaning
    assert "'reuse': 3" in before and Setting.parse("routing quality=fast reuse=2").meaning != before
    other = {"routing": {**quality.LEVELS["routing"], "fast": quality.Level({"top_share": 0.01})}}
    monkeypatch.setattr(quality, "LEVELS", other)
    assert level.meaning != before
