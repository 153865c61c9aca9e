"""A training that goes on on another machine: its averaged weights in half precision, small enough to be committed."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file

from tiny_training.export import forget_origin
from tiny_training.fit import Trainer, load_averaged
from tiny_training.fit_wan import TinyWan

PLACE = Path(__file__).parent / "wan_progress"


def keep(work_dir: Path, place: Path = PLACE) -> int:
    """Write the averaged weights of `work_dir`/wan.pt and the VAE to `place`; returns the step that they are of."""
    wan = TinyWan()
    load_averaged(wan, work_dir / "wan.pt")
    step = int(torch.load(work_dir / "wan.pt")["step"])
    AutoencoderKLWan.from_pretrained(work_dir / "vae").half().save_pretrained(place / "vae")
    forget_origin(place / "vae" / "config.json")
    weights = {name: value.half().contiguous() for name, value in wan.state_dict().items()}
    save_file(weights, place / "wan.safetensors", metadata={"step": str(step)})
    for file in place.rglob("*.safetensors"):
        file.chmod(0o644)
    return step


def take_up(trainer: Trainer, place: Path = PLACE) -> None:
    """Start a trainer at the weights and the step of `place`; its optimizer begins anew."""
    with safe_open(place / "wan.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        trainer.step = int(file.metadata()["step"])
    trainer.model.load_state_dict(weights)
    trainer.averaged = [parameter.detach().clone() for parameter in trainer.parameters]
