"""Every model class of diffusers that attends has a row, or is refused with a reason."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import diffusers.models
import diffusers.models.controlnets
import diffusers.models.transformers
import diffusers.models.unets
import pytest
from attending import attends
from diffusers import ModelMixin
from releases import needs
from torch import nn

import diffattn
from diffattn.families import FAMILIES, REFUSED
from diffattn.families.refused import PART
from diffattn.swap.unsupported import UNSUPPORTED

FOLDERS = (diffusers.models.transformers, diffusers.models.unets, diffusers.models.controlnets)
"""Every model in them is a denoiser or belongs to one."""
NO_ATTENTION = {"MiniMaxMusic3ConditionEncoder"}
"""Classes with a softmax that is none of attention's: this one weighs the layers of a text encoder."""


def classes(folder: ModuleType) -> dict[str, type]:
    """The models that the modules of a folder and of those in it define, exported or not."""
    found = (info.name for info in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}."))
    names = [name for name in found if "flax" not in name]  # older releases have models for it beside
    modules = [importlib.import_module(name) for name in names]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == module.__name__
    }


def others() -> dict[str, type]:
    """The other models of diffusers that attend: autoencoders, decoders, and what makes conditions."""
    folders = tuple(f"{folder.__name__}." for folder in FOLDERS)
    found = {
        name: model
        for name, model in classes(diffusers.models).items()
        if not model.__module__.startswith(folders) and attends(model)
    }
    return {name: model for name, model in found.items() if name not in NO_ATTENTION}


def is_list(model: type) -> bool:
    """Does it stand for a list of ControlNets, which are swapped one by one?"""
    return "controlnets" in inspect.signature(model).parameters


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_class_has_a_row_or_a_reason() -> None:
    rows = {name for family in FAMILIES for name in family.models}
    lists = [rows, set(REFUSED), {entry.name for entry in UNSUPPORTED if entry.option is None}]
    unknown, found = [], 0
    for models in (*(classes(folder) for folder in FOLDERS), others()):
        for name, model in models.items():
            found += 1
            places = sum(name in names for names in lists) + is_list(model)
            assert places < 2, f"{name} is in {places} of the lists"
            unknown += [] if places else [name]
    assert found > 80
    assert not unknown, "give each a row in diffattn/families, or a reason in diffattn/families/refused.py"


@needs("diffusers", "0.42", "some of the classes")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_most_denoisers_are_swapped() -> None:
    """Of those whose attention is softmax over a grid four are not: three keep keys, one attends sparsely by itself.

    Lists and parts are swapped in the models that hold them.
    """
    rows = {name for family in FAMILIES for name in family.models} - {"SanaTransformer2DModel"}
    found = {name: model for folder in FOLDERS for name, model in classes(folder).items()}
    swapped = {name for name, model in found.items() if name in rows or is_list(model)}
    parts = {name for name in found if REFUSED.get(name, "").startswith(PART)}
    keeping = {"AnyFlowFARTransformer3DModel", "SanaWMLTX2RefinerTransformer3DModel", "WanAnimate2Transformer3DModel"}
    without = {name for name in found if REFUSED.get(name) and name not in parts} | {"SanaTransformer2DModel"}
    assert len(swapped | parts) >= 92
    assert found.keys() - swapped - parts - without == {*keeping, "Kandinsky6SRTransformer3DModel"}


@needs("diffusers", "0.42", "some of the classes")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_name_is_of_diffusers() -> None:
    """A class that is renamed would be told nothing."""
    known = {name for folder in FOLDERS for name in classes(folder)} | others().keys()
    assert not REFUSED.keys() - known


@needs("diffusers", "0.42", "some of the classes")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_attends_is_read_from_the_code() -> None:
    found = others()
    assert {"AutoencoderKL", "AutoencoderKLWan", "AutoencoderRAE", "LTX2VideoDiffusionDecoderModel"} <= found.keys()
    assert not {"AutoencoderTiny", "AutoencoderKLLTXVideo", "T2IAdapter", "MMAudioVocoder"} & found.keys()
    rows = {name for family in FAMILIES for name in family.models}
    models = {name: model for folder in FOLDERS for name, model in classes(folder).items() if name in rows}
    assert len(models) > 40 and all(attends(model) for model in models.values())


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_row_is_refused_with_the_reason(name: str) -> None:
    model = type(name, (nn.Module,), {})()
    for target in (model, type("Mine", (type(model),), {})()):
        with pytest.raises(ValueError) as refusal:
            diffattn.apply(target, "clear", radius=2)
        assert REFUSED[name] in str(refusal.value)
        assert not hasattr(target, "_diffattn")
