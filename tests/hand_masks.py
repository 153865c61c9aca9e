"""Local windows without the library: masks written here, laid over the attention calls of an untouched model."""

import itertools
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from models import Tiny, Tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffattn import TokenGrid
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.sequences import reference_sequence

RADIUS = 2
TOLERANCE = 2e-5
"""Largest absolute error of outputs divided by their root mean square."""

Layouts = dict[str, tuple[Tokens, ...]]
"""Regular expression on layer names -> layout of the whole batch, or one per sample."""


def near(tokens: Tokens, radius: float) -> Tensor:
    """What each token of one sample may see: cells the cells nearer than `radius`, the others everything."""
    axes = (torch.arange(size) for size in (tokens.frames, tokens.rows, tokens.columns))
    cells = torch.cartesian_prod(*axes)
    mask = torch.ones(tokens.total, tokens.total, dtype=torch.bool)
    inside = slice(tokens.before, tokens.before + len(cells))
    mask[inside, inside] = ((cells[:, None] - cells[None]) ** 2).sum(-1) < radius**2
    for start, *sides in tokens.further:
        own = near(Tokens(0, *sides), radius)
        mask[start : start + len(own), start : start + len(own)] = own
    return mask[tokens.asking]


class HandMask(TorchFunctionMode):
    """Adds the hand-made masks to the attention of an unmodified model's layers.

    `prompts` says that after its own tokens a layer attends to images that are prompts: those calls stay as they are.
    """

    def __init__(self, model: nn.Module, layouts: Layouts, radius: float = RADIUS, prompts: bool = False) -> None:
        self.masked: set[str] = set()
        self._layer: str | None = None
        self._calls = 0
        self._layouts = {
            name: layout
            for (name, _), (pattern, layout) in itertools.product(model.named_modules(), layouts.items())
            if re.fullmatch(pattern, name)
        }
        self._radius = radius
        self._prompts = prompts
        self._hooks = []
        for name in self._layouts:
            module = model.get_submodule(name)
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter_layer(name)))
            self._hooks.append(module.register_forward_hook(lambda *_: self._enter_layer(None)))
        super().__init__()

    @property
    def missed(self) -> set[str]:
        """Layers that made no call."""
        return set(self._layouts) - self.masked

    def _enter_layer(self, name: str | None) -> None:
        self._layer, self._calls = name, 0

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self._layer is not None and not kwargs.get("is_causal"):
            query, key, value, *rest = (*args, *(kwargs.pop(n) for n in ("query", "key", "value") if n in kwargs))
            own = rest[0] if rest else kwargs.pop("attn_mask", None)
            first = self._layouts[self._layer][0]
            aside = query.shape[2] == key.shape[2] == first.aside or (first.apart and key.shape[2] < first.total)
            if not (self._prompts and self._calls) and not aside:
                return self._attend(self._tokens(query, key), query, key, value, own, *rest[1:], **kwargs)
            args = (query, key, value, own, *rest[1:])
        return func(*args, **kwargs)

    def _tokens(self, query: Tensor, key: Tensor) -> tuple[Tokens, ...]:
        """The layout of this call: of the whole batch, or one per sample."""
        layout = self._layouts[self._layer]
        if len(layout) > 1 and len(query) == 1:
            layout = (layout[self._calls],)
        self._calls += 1
        self.masked.add(self._layer)
        assert {key.shape[2]} == {tokens.total for tokens in layout}
        assert {query.shape[2]} == {tokens.total - sum(tokens.silent) for tokens in layout}
        return layout

    def _attend(
        self,
        layout: tuple[Tokens, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own: Tensor | None,
        *rest: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention under the window."""
        return F.scaled_dot_product_attention(query, key, value, self._combine(layout, query, own), *rest, **kwargs)

    def _combine(self, layout: tuple[Tokens, ...], query: Tensor, own: Tensor | None) -> Tensor:
        mask = torch.stack([near(tokens, self._radius) for tokens in layout])[:, None].to(query.device)
        if own is None:
            return mask
        return mask & own if own.dtype == torch.bool else own.masked_fill(~mask, -torch.inf)


class HandReference(HandMask):
    """Puts a mechanism's reference in float64 into the attention of an unmodified model's layers.

    What it chooses by content, it chooses in float32, as the swapped layer does.
    """

    def __init__(self, model: nn.Module, layouts: Layouts, mechanism: Any, padding_apart: bool = False) -> None:
        super().__init__(model, layouts)
        self._mechanism = mechanism
        self._padding_apart = padding_apart

    def _attend(
        self,
        layout: tuple[Tokens, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own: Tensor | None,
        *rest: Any,
        scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        layout = layout * len(query) if len(layout) == 1 else layout
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        outputs = []
        for i, tokens in enumerate(layout):
            grid = TokenGrid(tokens.rows, tokens.columns, tokens.frames, tokens.before, tokens.after, tokens.silent)
            qkv = [F.pad(query[i : i + 1], (0, 0, *tokens.silent)), *(tensor[i : i + 1] for tensor in (key, value))]
            wide = [tensor.double() for tensor in qkv]
            mask = None if own is None else own.expand(len(query), *own.shape[1:])[i : i + 1]
            if mask is not None and mask.shape[2] == query.shape[2] > 1:
                mask = F.pad(mask, (0, 0, *tokens.silent), value=mask.dtype == torch.bool)
            if mask is not None and self._padding_apart:
                mask = mask[:, :, grid.before : grid.before + 1]  # what a cell sees is what all see but padding
            if tokens.further and self._mechanism.joins_grids:  # frames of one
                before, frames = min(tokens.further[0][0], tokens.before), 1 + len(tokens.further)
                grid = replace(grid, frames=frames, before=before, after=tokens.total - before - frames * grid.cells)
            elif tokens.further:
                starts = [(at, TokenGrid(y, x, f)) for at, f, y, x in tokens.further]
                further = [replace(one, before=at, after=tokens.total - at - one.cells) for at, one in starts]
                context = Context(mask=mask)
                outputs.append(
                    reference_sequence(self._mechanism, *wide, [grid, *further], scale=scale, context=context)
                )
                continue
            context, chosen = Context(mask=mask), {}
            if hasattr(self._mechanism, "choose"):
                chosen["chosen"] = self._mechanism.choose(*qkv, grid, scale, context)
            out = self._mechanism.reference(*wide, grid, scale=scale, context=context, **chosen)
            outputs.append(out[:, :, tokens.asking])
        return torch.cat(outputs).to(query.dtype)


def under_masks(
    run: Callable[[], Tensor], *models: tuple[nn.Module, Layouts], mode: type[HandMask] = HandMask, **options: Any
) -> Tensor:
    """What `run` gives while all layers of these unmodified models carry the hand-made masks."""
    with ExitStack() as stack:
        modes = [stack.enter_context(mode(model, layouts, **options)) for model, layouts in models]
        output = run()
    assert modes and all(mode.masked and not mode.missed for mode in modes)
    return output


def by_hand(tiny: Tiny, layouts: Layouts, **changes: Any) -> Tensor:
    """Output of the unmodified model under the hand-made masks."""
    return under_masks(lambda: tiny.run(**changes), (tiny.model, layouts))


def error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference, in units of the wanted output's root mean square."""
    return float((got - want).abs().max() / want.square().mean().sqrt())


def gradients(model: nn.Module, output: Tensor) -> Tensor:
    """Gradients of all parameters but frozen ones in one flat tensor."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(output.square().mean(), parameters, materialize_grads=True)]
    )


def relative(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference, in units of the largest wanted value."""
    return float((got - want).abs().max() / want.abs().max())
