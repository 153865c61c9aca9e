"""The swapped layers of one model: their processors, the hooks that tell them what runs, and the way back.

A model's hooks and processors hold the swap, and the swap holds no strong reference to the model: so a swapped model
is freed with its last reference.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, arguments
from ..mechanisms.base import Mechanism
from . import intercept
from .calls.frames import Call, KeepsFrames, Ref, Scope
from .calls.records import DENSE_STEP, REUSED, SWAPPED, Done, add
from .calls.worth import LEAST, Worth, worth_of
from .entrance import Door, Entrance, Features, may_skip
from .layer import SwappedLayer
from .ordering import Ordering
from .state import State

logger = logging.getLogger("diffattn")
_too_small: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
"""Model -> numbers of tokens at which it was told that no swap pays."""

_ATTRIBUTE = "_diffattn"

TEXT_ARGUMENTS = ("encoder_hidden_states", "cap_feats", "pooled_projections", "class_labels")
"""Arguments of a model's forward that tell its prompt."""
Action = Callable[[], None]


class ModelSwap:
    """The swapped layers of one model, and what it takes to undo the swap."""

    def __init__(self, model: nn.Module, family: Family, mechanism: Mechanism) -> None:
        self.ref = Ref(model)
        self.name = type(model).__name__
        self.family = family
        self.mechanism = mechanism
        """That of all layers, or of the first ones after `join`."""
        self.state = State()
        self.layers: dict[str, SwappedLayer] = {}
        self.kept: dict[str, str] = {}
        """Attention layers left alone, and why."""
        self.root = Scope()
        """Stands for the model: the place of all its calls."""
        self.entrances: list[Entrance] = []
        self.replaced_parameters: frozenset[str] = frozenset()
        """The model's parameters that hold an adapter's values."""
        self.loaded = False
        """Did `diffattn.load` put weights in place with it?"""
        self.drawn: dict[str, Any] = {}
        """Options of the mechanism that those weights were trained for several values of."""
        self.done: Done = {}
        """What the layers did in the last run, see `diffattn.swap.calls.records`."""
        self.ordering: Ordering | None = None
        """Puts the tokens in the order of the kernel; None where no layer's kernel wants one."""
        self.worth: Worth | None = None
        """What a forward of the last size could gain."""
        self._weighed: set[Any] = set()
        self._hooks: list[Any] = []
        self._theta: float | None = None
        self._seen: set[str] = set()
        self._told: set[Any] = set()
        self._actions: list[tuple[Action, Action | None]] = []

    @property
    def model(self) -> Any:
        """The model; raises `ReferenceError` where it is gone."""
        model = self.ref()
        if model is None:
            raise ReferenceError(f"the {self.family.name} model of this swap is gone")
        return model

    @property
    def mechanisms(self) -> list[Mechanism]:
        """Those of the layers, each once."""
        found = (mechanism for layer in self.layers.values() for mechanism in layer.schedule.mechanisms)
        return list({id(mechanism): mechanism for mechanism in found}.values())

    def join(self, other: "ModelSwap") -> None:
        """Take the layers of another swap of the same model, which is not in place either."""
        for layer in other.layers.values():
            layer.state = self.state
            layer.index = len(self.layers)
            self.layers[layer.name] = layer
        self.kept = {name: self.kept[name] for name in self.kept.keys() & other.kept.keys()}
        self.state.needs |= other.state.needs

    def on_undo(self, action: Action, again: Action | None = None) -> None:
        """Run `action` when the swap is undone, and `again` when it is put back after that, without which it is not."""
        self._actions.append((action, again))

    def install(self) -> dict[str, Any]:
        """Replace an earlier swap and hang the hooks on the model; returns a processor for each layer, not yet set."""
        former = current(self.model)
        if former is not None and former is not self:
            if former.loaded and not self.loaded:
                logger.warning(
                    "the weights that were loaded for %s on %s are taken off with it; load them again, or apply in a "
                    "with block, which puts them back at its end",
                    former.mechanism,
                    former.name,
                )
            former.undo()
        processors = {}
        for layer in self.layers.values():
            layer.active = True
            processors[layer.name] = self._wrap(layer, layer.module.processor)
        self._install_hooks()
        self._scale_rope()
        setattr(self.model, _ATTRIBUTE, self)
        return processors

    def put_in_place(self, processors: dict[str, Any]) -> None:
        """Set the processors."""
        for name, processor in processors.items():
            self._module(name).processor = processor
            self._seen.add(name)

    @property
    def returns(self) -> bool:
        """Can it be put back after it was undone?"""
        return all(again is not None for _, again in self._actions)

    def put_back(self) -> None:
        """Put a swap that was undone in place again, with the weights it had."""
        self.put_in_place(self.install())
        for _, again in self._actions:
            if again is not None:
                again()

    def _module(self, name: str) -> Any:
        return self.layers[name].module

    def _wrap(self, layer: SwappedLayer, processor: Any) -> Any:
        prefix = type(layer.mechanism).__name__.removesuffix("Attention")
        return intercept.swapped_processor(intercept.original_of(processor), prefix, layer)

    def _install_hooks(self) -> None:
        for entrance in self.entrances:
            module = entrance.ref()
            if module is not None:
                self._hooks.append(Door(self, module, entrance))
        self.ordering = Ordering.of(self.family, self.root, self.model, self.layers.values())
        if self.ordering is not None and any(self.state.exact_frames):
            self.ordering.refuse("exact_frames= takes frames off the grid")
        self._hooks += [] if self.ordering is None else [self.ordering]
        own = dict(self.model.named_modules())
        for name, layer in self.layers.items():
            if "hidden" in layer.schedule.needs:
                self._hooks.append(Features(layer, layer.module))
            elif "features" in layer.schedule.needs:
                self._hooks.append(Features(layer, own[name.rpartition(".")[0]]))

    def _scale_rope(self) -> None:
        factor = getattr(self.mechanism, "ntk_factor", 1.0)
        if factor != 1.0:
            rope = self._rope()
            self._theta = rope.theta
            rope.theta = rope.theta * factor

    def _rope(self) -> Any:
        assert self.family.rope is not None
        return self.model.get_submodule(self.family.rope)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], family: Family) -> Call:
        """A forward begins, of the model or of another one that shares layers with it."""
        self._keep_swapped()
        self._keep_frames()
        state = self.state
        caller = state.runs.caller_of(module)
        call = Call(run=state.runs.enter(caller.pipeline))
        if not (family.latent or state.counts_steps or "timestep" in state.needs):
            return call
        given = arguments(module, args, kwargs)
        if family.latent:
            height, width = given[family.latent].shape[-2:]
            call.pixels = int(height * width)
        timestep = None if family.timestep is None else given[family.timestep]
        if timestep is not None and "timestep" in state.needs:
            call.timestep = largest(timestep)
        if timestep is not None and (state.chosen is not None or (state.counts_steps and call.run is not None)):
            call.moment = state.runs.moment(caller, lambda: largest(timestep), with_sigma="sigma" in state.needs)
        if state.chosen is not None and call.moment is not None:
            call.dense = not state.chosen(call.moment.step, call.moment.total, call.moment.skipped)
            self._warn_of_no_step(call)
        if "memory" in state.needs and call.run is not None:
            text = fingerprint(given)
            call.sample = text, call.run.occurrence(text)
        return call

    def _warn_of_no_step(self, call: Call) -> None:
        moment, run = call.moment, call.run
        assert moment is not None
        if run is None or ("steps", run.number) in self._told:
            return
        self._told = {("steps", run.number)} | {told for told in self._told if told[0] != "steps"}
        if not any(self.state.chosen(step, moment.total, moment.skipped) for step in range(moment.total)):
            logger.warning(
                "%s none of the %d steps of this run, and the attention of %s stays the model's own: choose among "
                "steps 0 to %d",
                "steps= picks" if self.state.left_out == DENSE_STEP else "start= and end= pick",
                moment.total,
                self.name,
                moment.total - 1,
            )

    def end(self, module: nn.Module, call: Call) -> None:
        """A forward of the model is over: what its layers did is noted, and looked through."""
        with self.state.runs.lock:
            if call.run is None:
                self.done = call.done
            else:
                self.done = call.run.done
                add(self.done, call.done)
        if module is self.ref():
            self._prove(module, call)

    def _prove(self, module: nn.Module, call: Call) -> None:
        """The probe: in every forward each swapped layer in place must have come by its exit."""
        reached = {key[0] for key in call.done}
        placed = [name for name in self._seen if self.in_place(name)]
        missed = sorted(n for n in placed if id(self.layers[n]) not in reached and not self.layers[n].traced)
        if not missed:
            self._warn_of_small_calls(call)
            self._warn_of_no_gain(module, call)
            return
        if may_skip(module):
            return
        if len(missed) == len(placed):
            raise RuntimeError(
                f"the model ran, but none of its {len(missed)} swapped layers came to an attention call (first: "
                f"{missed[0]}): this release of diffusers, or this way to call the model, computes attention "
                f"elsewhere; call diffattn.restore"
            )
        self._once(
            ("missed", *missed),
            "%d swapped layers were not used in this forward: %s",
            len(missed),
            ", ".join(missed[:3]),
        )

    def _warn_of_small_calls(self, call: Call) -> None:
        outcomes = {key[1] for key in call.done}
        if not outcomes & {SWAPPED, REUSED} and any("min_tokens" in outcome for outcome in outcomes):
            self._once(
                ("small",),
                "no attention of %s was swapped in this call: all of its layers have fewer tokens than min_tokens",
                self.name,
            )

    def _warn_of_no_gain(self, module: nn.Module, call: Call) -> None:
        """Say once for each model and size that attention is too little of the work for a swap to pay."""
        shapes = {record.query.shape for _, record in call.done.values()}
        if self.family.latent or torch.compiler.is_compiling() or shapes == self._weighed:
            return
        layers = {id(layer): layer for layer in self.layers.values()}
        found = worth_of(
            module, [(layers[k], o, n, record) for (k, o, _), (n, record) in call.done.items() if k in layers]
        )
        if found is not None:
            self.worth, self._weighed = found, shapes
            if found.bound < LEAST and found.tokens not in _too_small.setdefault(module, set()):
                _too_small[module].add(found.tokens)
                logger.warning("%s", found.told(self.name))

    def _once(self, key: Any, message: str, *values: Any) -> None:
        if key not in self._told:
            self._told.add(key)
            logger.warning(message, *values)

    def _keep_swapped(self) -> None:
        """Swap the processors too that something has put in place since: image prompts, fused projections, perturbed
        guidance, the user. `restore` takes a swap off.
        """
        self._seen |= {name for name in self.layers if self.in_place(name)}
        new = {name: self._module(name).processor for name in self._seen if not self._carried(name)}
        lost = []
        for name, found in new.items():
            processor = intercept.original_of(found)  # diffusers builds some anew by their class, and that may be ours
            if not intercept.has_exit(processor):
                lost.append(name)
                continue
            self._module(name).processor = self._wrap(self.layers[name], processor)
            kind = type(processor).__name__
            self._once(("kept", kind), "%s was set on layers of a swapped %s: it is swapped too", kind, self.name)
        if lost:
            self._warn_of_replaced(lost)

    def _warn_of_replaced(self, names: list[str]) -> None:
        kinds = sorted({type(intercept.without_swap(self._module(name).processor)).__name__ for name in names})
        self._once(
            ("replaced", *sorted(names)),
            "%d of %d swapped layers were replaced by %s and compute the model's own attention: call %s again",
            len(names),
            len(self.layers),
            ", ".join(kinds),
            "diffattn.load" if self.loaded else "diffattn.apply",
        )

    def _keep_frames(self) -> None:
        """Let diffusers' checkpointing compute again in the frames of the forward."""
        if not torch.is_grad_enabled():
            return
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                checkpoint = module.__dict__.get("_gradient_checkpointing_func")
                if checkpoint is not None and not isinstance(checkpoint, KeepsFrames):
                    module._gradient_checkpointing_func = KeepsFrames(checkpoint)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The model's own attention, and rotary base, inside the block; the swap stays in place."""
        token = self.state.pause()
        rope = None if self._theta is None else self._rope()
        scaled = None if rope is None else rope.theta
        if rope is not None:
            rope.theta = self._theta
        try:
            yield
        finally:
            self.state.go_on(token)
            if rope is not None:
                rope.theta = scaled

    def in_place(self, name: str) -> bool:
        """Does the layer still carry a processor of this swap?"""
        return intercept.layer_of(self._module(name).processor) is self.layers[name]

    def _carried(self, name: str) -> bool:
        """Is it there, or inside of a processor that somebody has put around it (X-Portrait's readers)?"""
        inside = vars(self._module(name).processor).values()
        return self.in_place(name) or any(intercept.layer_of(own) is self.layers[name] for own in inside)

    def undo(self) -> None:
        """Give the layers that still carry our processor their own back, and take the hooks away."""
        for name, layer in self.layers.items():
            processor = self._module(name).processor
            if self.in_place(name):
                original = intercept.original_of(processor)
                original.__dict__.update(intercept.settings_of(processor))
                self._module(name).processor = original
            elif intercept.is_ours(processor):
                self._module(name).processor = intercept.without_swap(processor)
            elif name in self._seen:
                logger.warning("%s carries %s now: left as it is", name, type(processor).__name__)
            # diffusers may hold our processor, to set it again later: from then on it is the model's own attention
            layer.active = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for action, _ in reversed(self._actions):
            action()
        if self._theta is not None:
            self._rope().theta, self._theta = self._theta, None
        for module in self.model.modules():
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(checkpoint, KeepsFrames):
                module._gradient_checkpointing_func = checkpoint.checkpoint
        self._seen.clear()
        if self.model.__dict__.get(_ATTRIBUTE) is self:
            delattr(self.model, _ATTRIBUTE)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return intercept.refuse_to_pickle(self, protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelSwap":
        new: ModelSwap = intercept.deep_copy(self, memo)
        new.done, new._told = {}, set()
        return new


def largest(timestep: Tensor | float) -> float:
    """The timestep of a model call; of several the largest counts. Waits for the device."""
    return float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)


def fingerprint(given: Mapping[str, Any]) -> tuple[Any, ...]:
    """Tells one prompt from another: shapes and sums of what the forward was given of it. Waits for the device."""
    found = []
    for name in TEXT_ARGUMENTS:
        value = given.get(name)
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor):
                flat = tensor.detach().double().flatten()
                weights = torch.arange(1, len(flat) + 1, device=flat.device, dtype=flat.dtype)
                found.append((tuple(tensor.shape), float(flat.sum()), float(flat @ weights)))
    return tuple(found)


def current(model: nn.Module) -> ModelSwap | None:
    """The swap in place on a model."""
    return getattr(model, _ATTRIBUTE, None)
