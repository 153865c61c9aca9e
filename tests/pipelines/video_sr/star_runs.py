"""STAR's pipeline with tiny networks, and stand-ins for the networks whose results tell where they come from."""

from types import SimpleNamespace
from typing import Any

import tiny_star
import torch
from diffattn.pipelines.video_sr.i2vgenxl.pipeline import STARPipeline
from diffattn.pipelines.video_sr.i2vgenxl.scheduler import STARScheduler
from torch import Tensor, nn
from torch.nn import functional


def pipeline(**parts: Any) -> STARPipeline:
    own = {
        "vae": tiny_star.vae(),
        "text_encoder": tiny_star.text_encoder(),
        "tokenizer": tiny_star.tokenizer(),
        "unet": tiny_star.unet(),
        "controlnet": tiny_star.controlnet(),
        "scheduler": STARScheduler(),
    }
    pipe = STARPipeline(**{**own, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: STARPipeline, video: Any, seed: int = 0, **options: Any) -> Any:
    """The one clip that comes out, by default after one step without guidance, as latents' size allows."""
    quick = {"upscale": 2, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    return pipe(video, generator=torch.Generator().manual_seed(seed), **{**quick, **options}).frames[0]


class StubControl(nn.Module):
    """The hint itself in place of residuals."""

    device = torch.device("cpu")
    dtype = torch.float32

    def forward(
        self, sample: Tensor, timestep: Tensor, text: Tensor, hint: Tensor, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        return (), hint


class StubUNet(nn.Module):
    """Its velocity grows by `time` from frame to frame of what it sees, and by `rows` and `columns` likewise.

    So neighbouring windows and tiles disagree, by as much as they are apart. The hint is taken away, so that x0 has it.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    downsamplings = 3
    config = SimpleNamespace(in_channels=4)

    def __init__(self, time: float = 0.0, rows: float = 0.0, columns: float = 0.0) -> None:
        super().__init__()
        self.slopes = time, rows, columns
        self.seen: list[tuple[int, ...]] = []

    def forward(
        self, sample: Tensor, *args: Any, mid_block_additional_residual: Tensor, **kwargs: Any
    ) -> tuple[Tensor]:
        self.seen.append(tuple(sample.shape))
        axes = [torch.arange(size) * slope for size, slope in zip(sample.shape[-3:], self.slopes, strict=True)]
        steps = axes[0][:, None, None] + axes[1][:, None] + axes[2]
        return (steps - mid_block_additional_residual,)


class StubVAE(nn.Module):
    """Latents are the picture's colours, 8 x 8 pixels to a cell; the decoder adds the slopes of `StubUNet`."""

    device = torch.device("cpu")
    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=1.0, latent_channels=4, force_upcast=True)

    def __init__(self, time: float = 0.0, rows: float = 0.0, columns: float = 0.0) -> None:
        super().__init__()
        self.slopes = time, rows, columns
        self.decoded: list[tuple[int, ...]] = []
        self.deviation = 0.0

    def encode(self, pictures: Tensor) -> Any:
        small = functional.avg_pool2d(pictures, 8)
        mean = torch.cat([small, small.mean(1, keepdim=True)], 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, self.deviation)))

    def decode(self, z: Tensor, num_frames: int, return_dict: bool) -> tuple[Tensor]:
        assert len(z) == num_frames and not return_dict
        self.decoded.append(tuple(z.shape))
        pictures = functional.interpolate(z[:, :3], scale_factor=8.0, mode="nearest")
        frames, rows, columns = (
            torch.arange(size) * slope
            for size, slope in zip((num_frames, *pictures.shape[-2:]), self.slopes, strict=True)
        )
        return (pictures + frames[:, None, None, None] + rows[:, None] + columns,)


def stubbed(unet: StubUNet | None = None, vae: StubVAE | None = None) -> STARPipeline:
    """A pipeline with stand-ins for all networks but the text encoder."""
    pipe = pipeline()
    for name, stub in (("unet", unet or StubUNet()), ("controlnet", StubControl()), ("vae", vae or StubVAE())):
        setattr(pipe, name, stub)
    return pipe
