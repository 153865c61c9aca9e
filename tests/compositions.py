"""Proof that a swap lives with another feature that can be switched on and off, whichever of the two comes first."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hand_masks import RADIUS, TOLERANCE, HandReference, Layouts, error, under_masks
from torch import Tensor, nn

import diffattn
from diffattn.mechanisms.base import Mechanism

VISIBLE = 1e-3
"""Least relative difference that counts as a change."""


@dataclass
class Composition:
    """A target with a feature that is off; `run` gives its output as it stands."""

    target: Any
    run: Callable[[], Tensor]
    layouts: tuple[tuple[nn.Module, Layouts], ...]
    on: Callable[[], None]
    off: Callable[[], None]
    used: Callable[[], int] | None = None
    """Counts the feature's work, where it leaves the output as it is."""
    exact: bool = True
    """Does switching off give the last bit back?"""
    prompts: bool = False
    components: tuple[str, ...] | None = None
    backend: str = "auto"
    mechanism: Mechanism | None = None
    """None: `clear`, by masks made by hand."""

    def by_hand(self) -> Tensor:
        """The output of the unswapped target under the masks made by hand, or with the mechanism's reference."""
        if self.mechanism is not None:
            return under_masks(self.run, *self.layouts, mode=HandReference, mechanism=self.mechanism)
        return under_masks(self.run, *self.layouts, prompts=self.prompts)

    def apply(self) -> diffattn.Handle:
        if self.mechanism is not None:
            return diffattn.apply(self.target, self.mechanism, components=self.components, backend=self.backend)
        return diffattn.apply(self.target, "clear", radius=RADIUS, components=self.components, backend=self.backend)


def prove(build: Callable[[], Composition], order: str, caplog: pytest.LogCaptureFixture) -> None:
    """Swapped before or after the feature is switched on; both undone; the feature switched off under a swap.

    Everything is compared with an unswapped target, built anew, under the masks made by hand.
    """
    reference = build()
    bare, bare_want = reference.run(), reference.by_hand()
    reference.on()
    own, want = worked(reference), reference.by_hand()
    assert error(want, own) > VISIBLE, "the mask changes nothing: the test proves nothing"
    if reference.used is None:
        assert error(own, bare) > VISIBLE and error(want, bare_want) > VISIBLE, "the feature changes nothing"

    case = build()
    if order == "before":
        case.on()
        case.apply()
    else:
        case.apply()
        assert error(case.run(), bare_want) < TOLERANCE
        case.on()
        goes_on(case, want, caplog)
    for _ in range(2):
        assert error(worked(case), want) < TOLERANCE
    diffattn.restore(case.target)
    assert torch.equal(worked(case), own)

    case.apply()
    assert error(worked(case), want) < TOLERANCE
    case.off()
    assert error(case.run(), bare_want) < TOLERANCE
    diffattn.restore(case.target)
    assert torch.equal(case.run(), bare) if case.exact else error(case.run(), bare) < TOLERANCE


def goes_on(case: Composition, want: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    """Where the feature replaces processors the swap goes on over the new ones, and says so once for each kind."""
    caplog.clear()
    for _ in range(2):
        assert error(worked(case), want) < TOLERANCE
    said = [record.getMessage() for record in caplog.records if record.name == "diffattn"]
    assert len(said) == len(set(said)) and all("it is swapped too" in message for message in said), said


def worked(case: Composition) -> Tensor:
    """One run, in which the feature must do its work."""
    before = case.used() if case.used else -1
    output = case.run()
    assert case.used is None or case.used() > before, "the feature did nothing in this run"
    return output


class Count:
    """Counts the forwards of modules."""

    def __init__(self) -> None:
        self.calls = 0

    def watch(self, *modules: nn.Module) -> None:
        for module in modules:
            module.register_forward_pre_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.calls += 1

    def __call__(self) -> int:
        return self.calls
