"""Every pipeline of diffusers whose denoiser has a row: the call that its source makes is swapped on the right grid.

What each passes is read from its source. A pipeline that passes what no tiny model here is called with fails by name.
"""

import functools
import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from calls import IMPOSSIBLE, PLAIN, VALUES, VARIANTS
from hand_masks import RADIUS, TOLERANCE, error, under_masks
from models import BUILDERS, Tiny
from releases import needs
from torch import Tensor

import diffattn
from diffattn.families import FAMILIES
from diffattn.swap.unsupported import UNSUPPORTED
from scripts.class_tables import families_page
from scripts.class_tables.pipeline_calls import Call, Pipeline, pipelines

pytestmark = [
    needs("diffusers", "0.42", "pipelines of the table"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ROWS = {name for family in FAMILIES for name in family.models}
REFUSED_BY_NAME = {entry.name for entry in UNSUPPORTED if entry.option is None}
KEPT = {"SanaTransformer2DModel"}
"""Models with a row of which no layer can be swapped: `apply` refuses them with the reason."""


@functools.cache
def parameters(model: str) -> dict[str, bool]:
    """Every argument of a model's forward: must it be passed?"""
    _, *own = inspect.signature(getattr(diffusers, model).forward).parameters.values()
    return {parameter.name: parameter.default is inspect.Parameter.empty for parameter in own}


def may_take(model: str, names: frozenset[str]) -> bool:
    """Can a model's forward be called with these?"""
    must = {name for name, needed in parameters(model).items() if needed}
    return must <= names <= parameters(model).keys()


def arguments_of(call: Call, model: str) -> frozenset[str]:
    """Names of what a call passes; those without a name by their places in the model's forward."""
    return (call.named | set([*parameters(model)][: call.positional])) - {"return_dict"}


def calls_with_rows() -> Iterator[tuple[Pipeline, Call, str]]:
    """Each pipeline that is not refused by name, each of its calls, and each class with a row that it may go to.

    Of several classes that a pipeline takes, those whose forward has what the call passes.
    """
    for pipe in pipelines().values():
        if pipe.name not in REFUSED_BY_NAME:
            for call in pipe.calls:
                for model in (ROWS - KEPT).intersection(pipe.models_of(call)):
                    if may_take(model, arguments_of(call, model)):
                        yield pipe, call, model


@functools.cache
def combinations() -> dict[str, dict[frozenset[str], list[str]]]:
    """Class of a model -> names of arguments -> the pipelines that pass these."""
    found: dict[str, dict[frozenset[str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for pipe, call, model in calls_with_rows():
        names = found[model][arguments_of(call, model)]
        names += [] if pipe.name in names else [pipe.name]
    return found


@functools.cache
def tinies() -> dict[str, Tiny]:
    return {name: build() for name, build in {**BUILDERS, **VARIANTS}.items()}


def fitting(model: str, names: frozenset[str]) -> list[str]:
    """The tiny models of this class whose inputs a call passes all, those with the most."""
    own = [name for name, tiny in tinies().items() if type(tiny.model).__name__ == model]
    fit = [name for name in own if tinies()[name].inputs.keys() <= names and IMPOSSIBLE.get(name) not in names]
    most = max((len(tinies()[name].inputs) for name in fit), default=0)
    return [name for name in fit if len(tinies()[name].inputs) == most]


def known(model: str) -> dict[str, Any]:
    """Argument -> how its value is made, where the tiny model's inputs leave it out."""
    return {**PLAIN, **VALUES.get(model, {})}


def called(tiny: Tiny, model: str, names: frozenset[str]) -> Tensor:
    """One call with what the tiny model's inputs leave out, made anew: some models take their lists to pieces."""
    return tiny.run(**{key: known(model)[key](tiny) for key in sorted(names - tiny.inputs.keys())})


def test_the_source_tells_the_calls_of_every_pipeline() -> None:
    """A model with a row that no call goes to, or a call whose arguments the source hides."""
    for pipe in pipelines().values():
        called = {call.part for call in pipe.calls}
        for part, models in pipe.parts.items():
            others_do = pipe.inner or pipe.name in REFUSED_BY_NAME
            assert others_do or part in called or ROWS.isdisjoint(models), f"{pipe.name}: no call of its {part}"
        for call in pipe.calls:
            assert not any("*" in name for name in call.named), f"{pipe.name} at {call.where} hides arguments"
    assert len(pipelines()) > 300


def test_every_call_has_a_tiny_model() -> None:
    missing = []
    for model, calls in combinations().items():
        for names, pipes in calls.items():
            fit = fitting(model, names)
            if not fit:
                missing.append(f"{', '.join(pipes)}: no tiny {model} whose inputs are among {sorted(names)}")
                continue
            unknown = sorted(names - known(model).keys() - tinies()[fit[0]].inputs.keys())
            if unknown:
                missing.append(f"{', '.join(pipes)}: no value of {', '.join(unknown)} for {model}")
    assert not missing, "\n".join(missing)


@torch.no_grad()
@pytest.mark.parametrize("model", sorted(ROWS - KEPT))
def test_the_calls_of_the_source(model: str) -> None:
    """Exact attention changes nothing; a window is the model under a mask made by hand; each layer is reached."""
    for names, pipes in combinations()[model].items():
        for name in fitting(model, names):
            tiny, about = tinies()[name], f"{name}, called by {', '.join(pipes)}"
            run = functools.partial(called, tiny, model, names)
            own, want = run(), under_masks(run, (tiny.model, tiny.spatial))
            assert error(want, own) > 1e-3, f"{about}: the mask changes nothing"
            with diffattn.apply(tiny.model, "softmax"):
                assert torch.equal(run(), own), about
            with diffattn.apply(tiny.model, "clear", radius=RADIUS) as handle:
                assert error(run(), want) < TOLERANCE, about
                assert all(layer.reached for layer in handle.layers), about
                assert set(diffattn.summary(tiny.model).calls) == {"swapped"}, about
            assert torch.equal(run(), own), about


def test_the_page_says_what_the_script_finds() -> None:
    written = families_page.PAGE.read_text()
    assert written == families_page.page(), "run PYTHONPATH=.:tests python scripts/class_tables/families_page.py"
