"""One forward of an untouched model, and the attention calls that it makes.

Hooks on all modules tell which one is running, and a torch function mode sees every call of softmax attention, that of
`dispatch_attention_fn` too. Who asked for it is read from the call stack: a swap reaches what the `__call__` of a
layer's own processor asks for, and nothing else.
"""

import contextlib
import copy
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..families import Arguments, arguments
from ..swap.intercept import has_exit
from ..swap.unsupported import check_processor

_NAMES = "query", "key", "value", "attn_mask", "dropout_p", "is_causal"
_OWN = torch.softmax, F.softmax, Tensor.softmax, F.multi_head_attention_forward
_BETWEEN = "diffusers.models.attention_dispatch", "torch.", __name__
"""Modules whose functions stand between who asks for attention and who computes it."""


@dataclass(frozen=True)
class Call:
    """One call of softmax attention."""

    layer: str
    """Dotted name of the attention module, or of the innermost module that was running."""
    processor: str
    """Class name of its processor; empty where it has none."""
    unreachable: str
    """Why a swap cannot reach it; empty where it can."""
    query: tuple[int, ...]
    """(b, h, n, d)"""
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: str = ""
    """dtype and shape; empty for none."""
    causal: bool = False
    dropout: float = 0.0

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What tells one kind of call from another."""
        return self.query, self.key, self.value, self.mask, self.causal, self.dropout


class Forward:
    """The model's forward with the inputs given, without gradients: the same numbers whenever it is made."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model = model
        self.inputs = inputs
        takes = inspect.signature(type(model).forward).parameters
        self._plain = {"return_dict": False} if "return_dict" in takes else {}

    @property
    def given(self) -> Arguments:
        """The arguments by name, those left out with their defaults."""
        return arguments(self.model, (), self.inputs)

    def __call__(self, **changes: Any) -> Tensor:
        """All outputs in one flat tensor."""
        given = {name: copied(value) for name, value in {**self.inputs, **changes, **self._plain}.items()}
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)
            return flat(self.model(**given))

    def check_repeats(self, output: Tensor) -> None:
        """Raise `ValueError` unless a second forward gives the same: there is nothing to measure else."""
        name = type(self.model).__name__
        if not output.isfinite().all():
            raise ValueError(
                f"expected a finite output of {name}, got infinity or NaN: give it other weights or inputs, such as "
                "torch.randn makes"
            )
        if not torch.equal(self(), output):
            raise ValueError(
                f"expected the same output of {name} from the same inputs, got another from a second forward: it keeps "
                "something from call to call, or draws random numbers by other means than torch's; switch that off"
            )


def copied(value: Any) -> Any:
    """The same for a forward that may write into it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if type(value) is dict:
        return {name: copied(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(part) for part in value)
    try:
        return value if isinstance(value, nn.Module) else copy.deepcopy(value)
    except Exception:  # what cannot be copied is given as it is
        return value


def flat(output: Any) -> Tensor:
    """Every tensor inside nested lists, tuples, dicts and dataclasses, one after the other."""
    parts = [part.flatten() for part in _tensors_in(output)]
    if not parts:
        raise ValueError(f"expected a forward that gives tensors, got {type(output).__name__}")
    joined = torch.cat(parts)
    return joined if joined.is_floating_point() else joined.float()


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    parts: Any = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (list, tuple)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = vars(output).values()
    for part in parts:
        yield from _tensors_in(part)


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Watch(TorchFunctionMode):
    """Notes every attention call of a model's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules = dict(model.named_modules())
        self._running: list[str] = []
        self._hooks: list[Any] = []
        self.calls: list[Call] = []
        self.ran: list[str] = []
        """Names of attention modules whose forward was made."""
        self.own_softmax: set[str] = set()
        """Those of them that take a softmax by themselves."""

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._enterer(name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _enterer(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(name)
            if name and is_attention(module):
                self.ran.append(name)
            self.enter(name, module, args, kwargs)

        return enter

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def module(self, name: str) -> Any:
        """A module by its name."""
        return self._modules[name]

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module's forward begins."""

    def answer(self, call: Call, given: dict[str, Any], compute: Callable[..., Tensor]) -> Tensor:
        """What the call gives; `given` are its arguments by name."""
        return compute(**given)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self._running:
            given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
            call = self._call(given, _asker())
            self.calls.append(call)
            return self.answer(call, given, func)
        if func in _OWN:
            self._note_softmax()
        return func(*args, **kwargs)

    def _note_softmax(self) -> None:
        for name in reversed(self._running):
            if is_attention(self._modules[name]):
                self.own_softmax.add(name)
                return

    def _call(self, given: dict[str, Any], asker: FrameType | None) -> Call:
        asking = None if asker is None else asker.f_locals.get("self")
        layer, processor = self._layer(asking)
        query, key, value = (tuple(given[name].shape) for name in ("query", "key", "value"))
        mask = given.get("attn_mask")
        return Call(
            layer,
            "" if processor is None else type(processor).__name__,
            _why_not(processor, asker),
            query,
            key,
            value,
            mask="" if mask is None else f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}",
            causal=bool(given.get("is_causal", False)),
            dropout=float(given.get("dropout_p", 0.0)),
        )

    def _layer(self, asking: Any) -> tuple[str, Any]:
        """The running module that has the asking processor, or else the innermost with one, or without."""
        having = [(name, self._modules[name].processor) for name in self._running if has_processor(self._modules[name])]
        for name, processor in reversed(having):
            if processor is asking:
                return name, processor
        return having[-1] if having else (self._running[-1], None)


def has_processor(module: nn.Module) -> bool:
    """Does the module compute by a processor?"""
    return callable(getattr(module, "processor", None))


def is_attention(module: nn.Module) -> bool:
    """By its processor, or by the name of its class."""
    return has_processor(module) or bool(re.search(r"(attention|attn)(\dd)?$", type(module).__name__.lower()))


def _asker() -> FrameType | None:
    """The function that asks for the attention being computed."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith(_BETWEEN):
        frame = frame.f_back
    return frame


def _why_not(processor: Any, asker: FrameType | None) -> str:
    """Why a swap cannot reach the call; empty where it can."""
    if processor is None:
        return "it asks for attention without a processor"
    code = getattr(type(processor).__call__, "__code__", None)
    if asker is None or asker.f_code is not code:
        name = "a function outside" if asker is None else f"{asker.f_code.co_qualname}()"
        return f"{name} asks for attention, not {type(processor).__name__}.__call__ itself"
    if not has_exit(processor):
        return f"{type(processor).__name__} asks for attention by a name that cannot be bound anew"
    try:
        check_processor(processor)
    except ValueError as error:
        return str(error)
    return ""
