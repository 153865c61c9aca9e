"""One swapped layer: takes the queries, keys and values of its attention call to the mechanism.

What is true of one call (grid, step, the block's input) is looked up when the call comes (`swap.calls.frames`), and put
into a `Situation`; nothing of it stays on the layer. Under `torch.compile` the lookup and the mechanism are one custom
operator (`swap.compiled`), so that a graph knows neither sizes nor steps.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Layers
from ..grid import TokenGrid
from ..mechanisms.base import Context, Mechanism
from ..mechanisms.sequences import attend_sequence, flops_of_sequence
from . import compiled, context_parallel, intercept
from .calls import keeping
from .calls.frames import Call, Frame, Given, Reading, Ref, Scope, find, in_backward, next_samples, pop
from .calls.inputs import Inputs, as_asked
from .calls.records import (
    ASIDE,
    DENSE_PART,
    EXACT,
    PAUSED,
    PERTURBED,
    REUSED,
    SWAPPED,
    TOO_FEW,
    Record,
    note,
    without_data,
)
from .calls.situation import Situation, downsample
from .settings.schedule import Part, Schedule
from .state import State


@dataclass(eq=False)
class SwappedLayer:
    """One attention module whose exit is ours."""

    name: str
    ref: Ref[nn.Module]
    kind: str
    schedule: Schedule
    backend: str
    scope: Scope
    state: State
    index: int
    min_tokens: int = 0
    weights: nn.Module | None = None
    row: Layers | None = None
    """What the family says of the layer; None: nothing."""
    active: bool = True
    """False after `restore`: diffusers may set the processor again, which is then the model's own attention."""
    reached: bool = False
    """Has a forward ever come to this layer's exit?"""
    traced: bool = False
    """Has torch.compile gone through this layer's own attention, where nobody counts calls?"""
    traced_features: Given = field(default=None, repr=False)
    """The block's input while torch.compile traces the block; the graph holds it, not the layer."""
    last: "Record | None" = field(default=None, repr=False)
    """What the last call was, for `diffattn.summary`."""
    key: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.key = compiled.enter(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SwappedLayer":
        new = object.__new__(SwappedLayer)
        memo[id(self)] = new
        own = {name: value for name, value in self.__dict__.items() if name not in ("key", "last")}
        new.__dict__.update(copy.deepcopy(own, memo), last=None)
        new.key = compiled.enter(new)
        return new

    @property
    def module(self) -> nn.Module:
        """The attention module."""
        module = self.ref()
        if module is None:
            raise ReferenceError(f"the model of layer {self.name} is gone")
        return module

    @property
    def mechanism(self) -> Mechanism:
        """That of the main part of the schedule."""
        return self.schedule.main.mechanism

    @mechanism.setter
    def mechanism(self, mechanism: Mechanism) -> None:
        self.schedule = Schedule.always(mechanism, self.schedule.reuse)

    @property
    def original(self) -> Any:
        """The family's own processor."""
        return intercept.original_of(self.module.processor)

    @property
    def grid(self) -> TokenGrid | None:
        """Grid of the last call."""
        return None if self.last is None else self.last.situation.grids[0]

    @property
    def grouped_heads(self) -> bool:
        """May several heads of queries share one of keys?"""
        whole = getattr(self.module.processor, "_parallel_config", None) is None
        return whole and all(mechanism.grouped_heads for mechanism in self.schedule.mechanisms)

    def wants(self, query: Tensor, key: Tensor, parallel_config: Any = None, is_causal: bool = False) -> bool:
        """Is this call the mechanism's, or the model's own attention for now?

        A call with other keys than the queries' own tokens stays dense where it would anyway, and is refused else;
        those of image prompts (IP-Adapter) follow the layer's own and do not come here. Under torch.compile the
        operator decides.
        """
        if not self.active:
            return False
        rectangular = self.row is not None and self.row.fewer_queries
        if rectangular and is_causal:  # a text's own
            return False
        if query.shape[2] != key.shape[2] and not rectangular:
            self._refuse_other_keys(query, key, parallel_config)
            return False
        if self.schedule.own:
            if torch.compiler.is_compiling():
                self.traced = self.reached = True
            else:
                self._count(EXACT, query, key, find(self.scope))
            return False
        if intercept.values_replace_attention():
            if not torch.compiler.is_compiling():
                self._count(PERTURBED, query, key, find(self.scope))
            return False
        return compiled.opaque() or self._outcome(query, key, parallel_config) == SWAPPED

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        parallel_config: Any = None,
    ) -> Tensor:
        """The layer's output for (b, h, n, d), where the tokens may be those of one rank among several."""
        if compiled.opaque():
            return compiled.attend(query, key, value, mask, self._take_traced_features(query), scale, self)
        return self._swapped(Inputs(query, key, value, mask, None, scale), parallel_config)[0]

    def compute(self, given: Inputs, situation: Situation | None = None) -> tuple[Tensor, Situation]:
        """As `wants` and `attend`, for the operator; `situation` is what an earlier pass found."""
        parallel_config = getattr(self.module.processor, "_parallel_config", None)
        dense = situation.dense if situation else self._outcome(given.query, given.key, parallel_config) != SWAPPED
        if dense:
            return self._own_attention(given), situation or Situation(dense=True)
        return self._swapped(given, parallel_config, situation)

    def _own_attention(self, given: Inputs) -> Tensor:
        """What the family's own processor would compute."""
        q, k, v = given.query, given.key, given.value
        return intercept.own_attention(self.module.processor, q, k, v, given.mask, given.scale)

    def _outcome(self, query: Tensor, key: Tensor, parallel_config: Any) -> str:
        """`SWAPPED`, or why the call stays dense; noted in the running call."""
        frame = self._frame(query.shape[2])
        outcome = self._outcome_in(frame, query, parallel_config)
        if outcome == SWAPPED and self._is_aside(frame, query, key):
            return ASIDE
        if outcome != SWAPPED:  # which is counted with its grid
            self._count(outcome, query, key, frame)
        return outcome

    def _outcome_in(self, frame: Frame | None, query: Tensor, parallel_config: Any) -> str:
        if self.state.paused:
            return PAUSED
        if frame is not None and frame.call.dense:
            return self.state.left_out
        if frame is not None and self._part(frame.call)[1].own:
            return DENSE_PART
        if self.min_tokens and context_parallel.count_tokens(parallel_config, query) < self.min_tokens:
            return TOO_FEW
        return SWAPPED

    def _is_aside(self, frame: Frame | None, query: Tensor, key: Tensor) -> bool:
        """Is this a call of other tokens among themselves, beside the layer's own?"""
        if self.row is None or not self.row.fewer_queries or frame is None:
            return False
        return frame.readings[self.scope].layouts[0].is_aside(query.shape[2], key.shape[2])

    def _refuse_other_keys(self, query: Tensor, key: Tensor, parallel_config: Any) -> None:
        """Raise for a call with other keys than the queries' own tokens, unless it is dense anyway."""
        if torch.compiler.is_compiling() and (self.mechanism.exact or intercept.values_replace_attention()):
            self.traced = self.reached = True
            return
        frame = None if compiled.opaque() else self._frame(query.shape[2])
        if self.mechanism.exact:
            outcome = EXACT
        elif intercept.values_replace_attention():
            outcome = PERTURBED
        else:
            outcome = SWAPPED if compiled.opaque() else self._outcome_in(frame, query, parallel_config)
        if outcome == SWAPPED:
            intercept.refuse_other_keys(self.name, query.shape[2], key.shape[2], self.mechanism)
        if frame is not None and not any(layer == id(self) for layer, *_ in frame.call.done):
            self._count(outcome, query, key, frame)  # what follows a call of the layer's own are image prompts

    def _frame(self, tokens: int) -> Frame | None:
        """The forward that a call with this many tokens belongs to."""
        frame = find(self.scope)
        if frame is None:
            return self.state.recall.find(self.scope, tokens) if in_backward() else None
        if torch.is_grad_enabled() and not in_backward():
            self.state.recall.note(self.scope, tokens, frame)
        return frame

    def _swapped(
        self, given: Inputs, parallel_config: Any, situation: Situation | None = None
    ) -> tuple[Tensor, Situation]:
        """The mechanism's output, over all ranks, and what the call was."""
        query = given.query
        given = replace(given, mask=intercept.as_four_axes(given.mask))
        ids = self._reading(query.shape[2]).ids if torch.compiler.is_exporting() else None
        if ids is not None and parallel_config is None and self.weights is None and not self.schedule.needs:
            self.traced = self.reached = True
            return compiled.attend_at(given, ids, self.mechanism, self.backend), Situation()
        if parallel_config is None:
            return self._attend_all(given, situation)
        if query.shape[2] != given.key.shape[2]:
            raise NotImplementedError(
                "under context parallelism a call must have as many queries as keys; call diffattn.restore first"
            )
        if situation is not None:
            raise NotImplementedError(
                "a compiled model has no backward pass under context parallelism with swapped attention; train it "
                "without torch.compile"
            )
        shards = context_parallel.shards(parallel_config, query, self._reading)
        for mechanism in self.schedule.mechanisms:
            context_parallel.check_mechanism(mechanism, self.weights, query, shards.heads[shards.rank])
        q, k, v = (shards.gather(tensor) for tensor in (query, given.key, given.value))
        whole = Inputs(q, k, v, shards.gather_mask(given.mask), given.features, given.scale, shards.first_head)
        out, found = self._attend_all(whole, situation)
        return shards.scatter(out), found

    def _reading(self, tokens: int) -> Reading:
        frame = self._frame(tokens)
        if frame is None:
            raise RuntimeError(
                f"the swapped layer {self.name} was called outside its model, so its token grid is unknown; call the "
                f"model or pipeline that was given to diffattn.apply, or diffattn.restore first"
            )
        return frame.readings[self.scope]

    def _attend_all(self, given: Inputs, situation: Situation | None) -> tuple[Tensor, Situation]:
        """The mechanism on all tokens; sample by sample where their grids differ."""
        query, call, found_now = given.query, Call(), situation is None
        if situation is None:
            situation, call = self._look_up(query, given.key)
            features = call.take_features(self.index, len(query)) if given.features is None else given.features
            given = replace(given, features=features)
        if self.row is not None and self.row.mask_of(self.module) == "padding":
            cells = [grid.before - grid.silent[0] for grid in situation.grids]
            given = replace(given, mask=intercept.mask_on_keys(given.mask, cells))
        mask = None if given.mask is None else without_data(given.mask)
        record = Record(situation, without_data(query), given.key.shape[2], mask)
        part = self.schedule.parts[situation.part]
        memories = keeping.memories(id(self), part, call, situation, query)
        kept = keeping.output(part.reuse, call, memories)
        if found_now:
            self.last = record
        if found_now and not in_backward():
            self.reached = True
            note(call.done, self, SWAPPED if kept is None else REUSED, record)
        if kept is not None:
            return kept, situation
        out = self._attend_samples(given, situation, memories)
        if part.reuse > 1:
            keeping.keep(call, memories, out)
        return out, situation

    def _attend_samples(self, given: Inputs, situation: Situation, memories: list[dict[str, Any]]) -> Tensor:
        """The mechanism on the whole batch, or on each sample by itself."""
        grids = situation.grids
        several: list[dict[str, Any] | None] = [*memories] or [None] * len(grids)
        if len(grids) == 1:
            return self._attend(given, situation, grids[0], several[0])
        parts = enumerate(zip(grids, several, strict=True))
        return torch.cat([self._attend(given.sample(i), situation, grid, memory) for i, (grid, memory) in parts])

    def _look_up(self, query: Tensor, key: Tensor) -> tuple[Situation, Call]:
        """The situation of a call of this thread, and its forward."""
        tokens = query.shape[2]
        reading, frame = self._reading(tokens), self._frame(tokens)
        assert frame is not None
        try:
            call, grids = frame.call, self.state.grids(reading, key.shape[2], tokens)
            also = reading.also(grids[0])
        except Exception:
            pop(frame.door)  # torch.export does not call the hook of a forward that fails
            raise
        moment, (number, part) = call.moment, self._part(call)
        needs = part.mechanism.needs
        return Situation(
            grids,
            also,
            part=number,
            downsample=downsample(call.pixels, grids[0]) if call.pixels and "downsample" in needs else 1,
            progress=moment.progress if moment and "progress" in needs else None,
            timestep=call.timestep if "timestep" in needs else None,
            sigma=moment.sigma if moment and "sigma" in needs else None,
            order=None if call.ordered is None else call.ordered.order,
        ), call

    def _part(self, call: Call) -> tuple[int, Part]:
        """The part of the schedule that a call belongs to, with its number."""
        number = self.schedule.number(None if call.moment is None else call.moment.progress)
        return number, self.schedule.parts[number]

    def keep_features(self, block_input: Tensor | None) -> None:
        """Note the input of the block, or of the layer itself, None at its end; dense steps need none."""
        kept = None if block_input is None else (block_input, 0)
        if compiled.opaque():
            self.traced_features = kept
            return
        frame = find(self.scope)
        if frame is not None and (kept is None or not (frame.call.dense or self.state.paused)):
            frame.call.features[self.index] = kept

    def _take_traced_features(self, query: Tensor) -> Tensor | None:
        features, self.traced_features = next_samples(self.traced_features, query.shape[0])
        return features

    def _attend(self, given: Inputs, situation: Situation, grid: TokenGrid, memory: dict[str, Any] | None) -> Tensor:
        context = replace(self._context(situation, given.mask, given.features, memory), first_head=given.first_head)
        mechanism = self.schedule.parts[situation.part].mechanism
        if mechanism.exact:
            return self._own_attention(given)
        return attend_sequence(
            mechanism,
            given.query,
            given.key,
            given.value,
            (grid, *situation.also),
            scale=given.scale,
            backend=self.backend,
            context=context,
        )

    def _context(
        self, situation: Situation, mask: Tensor | None, features: Tensor | None, memory: dict[str, Any] | None = None
    ) -> Context:
        needs = self.schedule.parts[situation.part].mechanism.needs
        return Context(
            mask=mask,
            weights=self.weights,
            **as_asked(features, needs),
            progress=situation.progress,
            timestep=situation.timestep,
            sigma=situation.sigma,
            order=situation.order,
            memory=memory if "memory" in needs else None,
            downsample=situation.downsample,
            call_index=self.index if "call_index" in needs else 0,
        )

    def _count(self, outcome: str, query: Tensor, key: Tensor, frame: Frame | None) -> None:
        if frame is not None and not in_backward():
            self.reached = True
            note(frame.call.done, self, outcome, Record(Situation(dense=True), without_data(query), key.shape[2], None))

    def assume(self, grid: TokenGrid, query: Tensor) -> None:
        """Take this for the last call, for a table of costs without any."""
        self.last = Record(Situation((grid,)), query, grid.tokens, None)

    def flops(self, mechanism: Mechanism | None = None) -> int:
        """What `mechanism`, or the layer's own, would compute in the last call, for one sample."""
        assert self.last is not None
        return self.flops_of(self.last, mechanism)

    def flops_of(self, record: "Record", mechanism: Mechanism | None = None) -> int:
        """What `mechanism`, or the one that computed it, would compute in a call, for one sample."""
        query, situation = record.query, record.situation
        if situation.dense:
            return 4 * query.shape[2] * record.keys * query.shape[1] * query.shape[3]
        context = self._context(situation, record.mask, None)
        own = mechanism or self.schedule.parts[situation.part].mechanism
        return flops_of_sequence(own, (situation.grids[0], *situation.also), query.shape[1], query.shape[3], context)

    def explain_backend(self) -> str:
        """The kernel of the last call, and why "auto" chose it."""
        if self.last is None:
            return self.backend
        query, situation = self.last.query, self.last.situation
        context, own = self._context(situation, self.last.mask, None), self.schedule.parts[situation.part].mechanism
        whole = query[:, :, :1].expand(-1, -1, situation.grids[0].tokens, -1)
        return own.explain_backend(whole, whole, whole, situation.grids[0], self.backend, context)
