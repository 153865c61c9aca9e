"""Patch parallelism: one image on several ranks, each with some rows of its tokens.

    mesh = init_device_mesh("cuda", (ranks,))
    diffattn.apply(pipe, "clear", radius=16)        # or diffattn.load, with trained weights
    shard(pipe, mesh)
    image = pipe(prompt, generator=generator).images[0]     # the same call on every rank, the same image on each

Every rank runs the whole pipeline; within a forward of the transformer it works on its own rows, and the prediction is
put together at the end, a few numbers a token. All that is computed token by token stays local, attention exchanges
keys and values of the rows around a patch (`patches.py`). Mode "exact" is one rank's result up to rounding; "paper"
averages the text's attention over the ranks, as CLEAR describes (https://arxiv.org/abs/2412.16112, section 3.4).

`diffattn.restore(pipe)` undoes it together with the swap.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..families import find_layers, flux_ids
from ..swap.apply import Handle, swaps_of
from ..swap.model_swap import ModelSwap
from .hooks import named_call
from .operations.gather import gather_frames
from .operations.shares import FramePlan
from .patches import PatchAttention, Patches, TextMode

Call = dict[str, Any]
WHOLE = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states")
"""Arguments of a forward that hold a number for every token of the image, and are not cut."""


def shard(target: Any, mesh: DeviceMesh | None = None, *, mode: TextMode = "exact") -> Handle:
    """Split the rows of every image among the ranks of a one-dimensional `mesh` (None: this process alone).

    Every rank calls it, and later the pipeline, with the same arguments. Returns the handle of the swap.

    Args:
        target: a Flux or SD3 pipeline or transformer whose attention is swapped to `clear`.
        mode: how text attends to the image: "exact" (log-sum-exp merge) or "paper" (averaged).

    Raises `ValueError` or `TypeError`, with nothing changed, for a model that is not swapped, of another family, or
    with layers, steps or options that need the whole image.
    """
    swaps = swaps_of(target)
    if len(swaps) != 1:
        raise ValueError(f"shard needs one swapped model, found {len(swaps)}: call diffattn.apply(pipe, 'clear') first")
    [swap] = swaps
    family = patch_family_of(swap)
    check_whole_picture(swap)
    patches = Patches(mesh)
    mechanisms = {
        name: PatchAttention(mechanism=layer.mechanism, patches=patches, text=mode)  # type: ignore[arg-type]
        for name, layer in swap.layers.items()
    }
    for name, layer in swap.layers.items():
        layer.mechanism = mechanisms[name]
    stack = ExitStack()
    swap.on_undo(stack.close)
    family.attach(swap.model, patches, stack)
    return Handle(swaps)


def check_whole_picture(swap: ModelSwap) -> None:
    """Raise where some attention would see a patch in the picture's place."""
    if any(isinstance(layer.mechanism, PatchAttention) for layer in swap.layers.values()):
        raise ValueError("the model is sharded already: call diffattn.restore and apply anew")
    if any(layer.schedule.reuse > 1 for layer in swap.layers.values()):
        raise ValueError("reuse= keeps whole outputs, and each rank has some rows of them: leave it out")
    if swap.state.chosen is not None or any(layer.min_tokens for layer in swap.layers.values()):
        raise ValueError("steps= and min_tokens= leave some attention full, which no rank can compute: leave them out")
    layers = find_layers(swap.family, [*swap.layers, *swap.kept])
    left = [name for name in layers if name in swap.kept]
    if left:
        raise ValueError(f"{len(left)} attention layers keep full attention, first {left[0]}: {swap.kept[left[0]]}")


@dataclass(frozen=True)
class PatchFamily:
    """How a family's images are cut into rows, and put together."""

    model: str
    """Class name of the model, subclasses included."""
    cut: Callable[[nn.Module, Call, Patches], Call]
    """Shares out the rows of a forward (`Patches.begin`), and gives the call of this rank's own."""
    join: Callable[[nn.Module, Tensor, FramePlan], Tensor]
    """This rank's prediction -> the whole picture's."""

    def attach(self, model: nn.Module, patches: Patches, stack: ExitStack) -> None:
        """Cut before every forward and join after it, until `stack` closes."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[()], Call]:
            call = named_call(module, args, kwargs)
            given = [name for name in WHOLE if call.get(name) is not None]
            if given:
                raise ValueError(f"{given[0]} is not split over patches: use one rank for a ControlNet")
            return (), self.cut(module, call, patches)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            whole = self.join(module, output[0], patches.present)
            patches.plan = None
            return (whole, *output[1:]) if isinstance(output, tuple) else type(output)(sample=whole)

        # first of all: the readers of the swap must see the patch
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
        stack.callback(model.register_forward_hook(after).remove)


def _cut_flux(model: nn.Module, call: Call, patches: Patches) -> Call:
    """Tokens row by row; their rotary positions are given beside them."""
    [layout] = flux_ids(model, call)
    if layout.after:
        raise ValueError(f"{layout.after} tokens of reference images are not split over patches: use one rank")
    plan = patches.begin(layout.height)
    own = slice(plan.own.start * layout.width, plan.own.stop * layout.width)
    ids = call["img_ids"]
    return {**call, "hidden_states": call["hidden_states"][:, own], "img_ids": ids[..., own, :]}


def _join_flux(model: nn.Module, tokens: Tensor, plan: FramePlan) -> Tensor:
    rows = tokens.unflatten(1, (plan.length, -1))
    return gather_frames(rows, range(plan.frames), 1, plan, "join").flatten(1, 2)


def _cut_sd3(model: Any, call: Call, patches: Patches) -> Call:
    """Latents; the positions are added within, cut out of the whole picture's by `_RowsOfPositions`."""
    side, latents = model.config.patch_size, call["hidden_states"]
    plan = patches.begin(latents.shape[2] // side)
    return {**call, "hidden_states": latents[:, :, plan.own.start * side : plan.own.stop * side]}


def _join_sd3(model: Any, latents: Tensor, plan: FramePlan) -> Tensor:
    rows = latents.unflatten(2, (plan.length, model.config.patch_size))
    return gather_frames(rows, range(plan.frames), 2, plan, "join").flatten(2, 3)


class _SD3(PatchFamily):
    def attach(self, model: Any, patches: Patches, stack: ExitStack) -> None:
        """SD3 crops its table of positions to the picture's size around the middle: here to the whole picture's."""
        embed = model.pos_embed
        side = model.config.patch_size

        def cropped(height: int, width: int) -> Tensor:
            plan = patches.present
            whole: Tensor = type(embed).cropped_pos_embed(embed, plan.frames * side, width)
            return whole.unflatten(1, (plan.frames, -1))[:, plan.own.start : plan.own.stop].flatten(1, 2)

        embed.cropped_pos_embed = cropped
        stack.callback(delattr, embed, "cropped_pos_embed")
        super().attach(model, patches, stack)


PATCH_FAMILIES: list[PatchFamily] = [
    PatchFamily("FluxTransformer2DModel", _cut_flux, _join_flux),
    _SD3("SD3Transformer2DModel", _cut_sd3, _join_sd3),
]


def patch_family_of(swap: ModelSwap) -> PatchFamily:
    """The row of a swapped model; others raise `ValueError`."""
    names = {cls.__name__ for cls in type(swap.model).__mro__}
    for family in PATCH_FAMILIES:
        if family.model in names:
            return family
    known = ", ".join(family.model for family in PATCH_FAMILIES)
    raise ValueError(f"{swap.family.name} can't be cut into patches yet; models that can: {known}")
