"""A scheduler of diffusers on clips: its noise, and its state as tensors by frame and numbers.

Schedulers work number by number, so each rank runs its own on its frames, `(frames, channels, height, width)`. What
they draw at random must not depend on who draws it: it comes from `FrameNoise`, where the scheduler takes it.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

QUIET = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverSinglestepScheduler")
"""They take a generator, and use none as they are called here."""


def make_scheduler(own: Any, kind: str) -> Any:
    """A fresh scheduler of the model's configuration: `own`'s class, or DPM-Solver++ of the `kind`."""
    from diffusers import DPMSolverMultistepScheduler

    if kind == "own":
        scheduler = type(own).from_config(own.config)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(own.config, algorithm_type=kind)
    parameters = inspect.signature(scheduler.step).parameters
    random = "generator" in parameters and "variance_noise" not in parameters
    stochastic = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    if random and (type(scheduler).__name__ not in QUIET or stochastic):
        raise ValueError(
            f"{type(scheduler).__name__} draws noise that would depend on the number of ranks; use --scheduler "
            f"sde-dpmsolver++, which takes it from outside"
        )
    return scheduler


def draws_noise(scheduler: Any) -> bool:
    """Whether a step wants `variance_noise`."""
    return str(scheduler.config.get("algorithm_type", "")).startswith("sde")


def state_of(scheduler: Any, like: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What changes from step to step: tensors in the shape of the latents `like`, and numbers as JSON has them."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.shape == like.shape:
            tensors[name] = value
        elif isinstance(value, (bool, int, float)) or value is None:
            numbers[name] = value
        elif isinstance(value, list) and all(_small(item, like) for item in value):
            held = {f"{name}.{i}": item for i, item in enumerate(value) if _is_latents(item, like)}
            tensors |= held
            numbers[name] = [_plain(item, f"{name}.{i}", held) for i, item in enumerate(value)]
    return tensors, numbers


def put_state(scheduler: Any, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Give a fresh scheduler, after `set_timesteps`, the state of a former one."""
    for name, value in numbers.items():
        if isinstance(value, list):
            value = [tensors[item] if isinstance(item, str) else item for item in value]
        setattr(scheduler, name, value)
    for name, tensor in tensors.items():
        if "." not in name:
            setattr(scheduler, name, tensor)


def _is_latents(item: Any, like: Tensor) -> bool:
    return isinstance(item, Tensor) and item.shape == like.shape


def _small(item: Any, like: Tensor) -> bool:
    one = isinstance(item, Tensor) and item.numel() == 1
    return item is None or isinstance(item, (bool, int, float)) or one or _is_latents(item, like)


def _plain(item: Any, key: str, held: dict[str, Tensor]) -> Any:
    if key in held:
        return key
    return item.item() if isinstance(item, torch.Tensor) else item
