"""What is checked of a weights file before anything is changed."""

from torch import Tensor, nn

from ..swap.model_swap import ModelSwap
from .files import Adapter

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def check_class(adapter: Adapter, model: nn.Module) -> None:
    """Raise where the adapter names another model class."""
    wanted = adapter.metadata.get("model")
    if wanted is not None and wanted not in {cls.__name__ for cls in type(model).__mro__}:
        raise ValueError(f"{adapter.path.name} is an adapter of {wanted}, but the target is {type(model).__name__}")


def expected_parameters(swap: ModelSwap, names: list[str] | None) -> dict[str, Tensor]:
    """File name -> the model's parameter for everything the adapter must hold beside the mechanism's weights.

    `names` None is the official layout: weight and bias of q, k, v and the image's output of every swapped layer. The
    tensors are the model's own, of its shapes. Raises `ValueError` for a name that the model does not have.
    """
    parameters = dict(swap.model.named_parameters())
    if names is None:
        names = [
            f"{layer}.{projection}.{kind}"
            for layer in swap.layers
            for projection in PROJECTIONS
            for kind in ("weight", "bias")
            if stored_name(f"{layer}.{projection}.{kind}", parameters) in parameters
        ]
    stored = {name: stored_name(name, parameters) for name in names}
    missing = [name for name, key in stored.items() if key not in parameters]
    if missing:
        raise ValueError(f"the adapter replaces {missing[0]}, which {type(swap.model).__name__} does not have")
    return {name: parameters[key] for name, key in stored.items()}


def check_unfused(swap: ModelSwap) -> None:
    """Raise where q, k and v are one matrix, so that weights of the three would have no effect."""
    for name, layer in swap.layers.items():
        if getattr(layer.module, "fused_projections", False):
            raise ValueError(f"{name} has fused q, k and v: call unfuse_qkv_projections() first")


def check_writable(swap: ModelSwap, parameters: dict[str, Tensor]) -> None:
    """Raise where the parameters to be replaced are fused, quantized or not in memory."""
    if parameters:
        check_unfused(swap)
    all_parameters = dict(swap.model.named_parameters())
    for name, parameter in parameters.items():
        module = swap.model.get_submodule(stored_name(name, all_parameters).rpartition(".")[0])
        foreign = isinstance(module, nn.Linear) and type(module) is not nn.Linear
        if foreign or type(parameter.data) is not Tensor or not parameter.is_floating_point():
            raise ValueError(
                f"{name} is quantized ({type(module).__name__}, {parameter.dtype}): load the adapter before "
                f"quantizing, or use a LoRA adapter"
            )
        if parameter.is_meta:
            raise ValueError(f"{name} is not in memory (meta device): load the adapter before offloading")


def mechanism_weights(swap: ModelSwap) -> list[tuple[str, str, Tensor]]:
    """Layer, name and tensor of the mechanism's own weights, of the shapes that `Mechanism.weights` gives them."""
    return [
        (name, key, value)
        for name, layer in swap.layers.items()
        if layer.weights is not None
        for key, value in layer.weights.state_dict(keep_vars=True).items()
    ]


def check_names(adapter: Adapter, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` that names every missing, unexpected and misshapen tensor."""
    missing = [name for name in wanted if name not in adapter.shapes]
    unexpected = [name for name in adapter.shapes if name not in wanted]
    misshapen = [
        f"{name} is {list(shape)}, expected {list(wanted[name])}"
        for name, shape in adapter.shapes.items()
        if name in wanted and shape != wanted[name]
    ]
    problems = [
        f"{len(names)} {title}: {', '.join(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{adapter.path.name} does not fit this model. {'; '.join(problems)}")


def stored_name(name: str, parameters: dict[str, nn.Parameter]) -> str:
    """A parameter's name in the model: PEFT keeps the base weights under `base_layer`."""
    module, _, kind = name.rpartition(".")
    wrapped = f"{module}.base_layer.{kind}"
    return wrapped if wrapped in parameters else name
