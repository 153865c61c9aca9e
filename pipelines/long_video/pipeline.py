"""Long videos by clip parallelism: text to video with a UNet3D, every rank with its own frames.

    pipe = LongVideoPipeline(parts, FramePlan.split(config.frames, mesh))    # parts: a TextToVideoSDPipeline
    latents = pipe(config, Path("out.mp4"))                                  # on every rank; this rank's latents

Prompts, initial noise and the noise of a step are functions of the frame's number in the whole video, attention is
dual-scope attention, so the video does not depend on the number of ranks. Source: Tan et al., Video-Infinity,
https://arxiv.org/abs/2406.16260; see `docs/long-video.md` for the differences to the released code.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from diffattn.files.writing import remove_empty
from diffattn.measure.progress import bar_options
from diffattn.media.outputs import check_frames, trim_frames
from diffattn.parallel import FrameNoise, FramePlan, apply_on_clips, frame_prompts

from .checkpoints import Checkpoints, State
from .config import LongVideoConfig
from .fps_unet import FpsUNet3D
from .prompts import places
from .scheduling import draws_noise, make_scheduler, put_state, state_of
from .video import join_parts, write_part, write_pictures
from .work import WorkFolder

Report = Callable[[str], Any]
"""Called with where the run is, such as "step 3 of 20"."""


class LongVideoPipeline:
    """Composed of a stock pipeline's parts: tokenizer, text encoder, UNet, VAE and the scheduler's configuration."""

    def __init__(
        self, parts: Any, plan: FramePlan, *, progress: bool = False, report: Report = lambda place: None
    ) -> None:
        """`progress`: show bars on the first rank."""
        self.parts, self.unet, self.vae, self.plan, self.report = parts, parts.unet, parts.vae, plan, report
        self.bars = progress and plan.rank == 0

    @torch.no_grad()
    def __call__(
        self,
        config: LongVideoConfig,
        output: Path | None = None,
        *,
        work: Path | None = None,
        checkpoints: Checkpoints | None = None,
        resume: State | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Make the video and return this rank's latents, `(frames, channels, height, width)`.

        Args:
            output: a video file or a folder for images; None: neither.
            work: folder of the parts of a video file, the same for all ranks. None: beside `output`.
            checkpoints: where and when to save.
            resume: what a checkpoint gave, to go on from.
            overwrite: remove what a folder for images has of a longer video; without it that raises `ValueError`.
        """
        if output is not None and output.suffix == "":
            check_frames(output, config.frames, overwrite=overwrite, option="output")
        self.report("the prompts")
        text = self.encode_prompts(config)
        scheduler, state = self.start(config, resume)
        with apply_on_clips(self.unet, self.plan, config.attention(), mode=config.mode):
            latents = self.denoise(config, text, scheduler, state, checkpoints)
        if output is not None:
            self.write(latents, config, output, work or WorkFolder(output).path)
            if work is None and self.plan.rank == 0:
                remove_empty(WorkFolder(output).path)
        return latents

    def check(self, config: LongVideoConfig) -> None:
        """Raise `ValueError` where the parts can't make this video; before the first step."""
        factor = self.parts.vae_scale_factor
        if config.height % factor or config.width % factor:
            raise ValueError(f"height and width must be multiples of {factor}, got {config.height} x {config.width}")
        make_scheduler(self.parts.scheduler, config.scheduler)
        with apply_on_clips(self.unet, self.plan, config.attention(), mode=config.mode):
            pass

    def encode_prompts(self, config: LongVideoConfig) -> Tensor:
        """The text of this rank's frames, `(guided, frames, tokens, dim)`: without and with the prompt."""
        guided = config.guidance > 1

        def encode(prompt: str) -> Tensor:
            negative = config.negative_prompt if guided else None
            own, other = self.parts.encode_prompt(prompt, self.parts.device, 1, guided, negative)
            return torch.cat([other, own]) if guided else own

        texts = {prompt: encode(prompt) for prompt in dict.fromkeys(part.prompt for part in config.prompts)}
        by_frame = {frame: texts[prompt] for frame, prompt in places(config.prompts, config.blend).items()}
        return frame_prompts(by_frame, self.plan.own)

    def start(self, config: LongVideoConfig, resume: State | None) -> tuple[Any, State]:
        """The scheduler and the state of the beginning, or of a checkpoint."""
        scheduler = make_scheduler(self.parts.scheduler, config.scheduler)
        scheduler.set_timesteps(config.steps, device=self.parts.device)
        if resume is not None:
            put_state(scheduler, resume.tensors, resume.numbers)
            return scheduler, resume
        factor = self.parts.vae_scale_factor
        shape = (self.unet.config.in_channels, config.height // factor, config.width // factor)
        noise = FrameNoise(config.seed).draw(self.plan.own, shape, device=self.parts.device)
        return scheduler, State(0, noise * scheduler.init_noise_sigma, {}, {})

    def denoise(
        self, config: LongVideoConfig, text: Tensor, scheduler: Any, state: State, checkpoints: Checkpoints | None
    ) -> Tensor:
        """All steps from that of `state` on."""
        if isinstance(self.unet, FpsUNet3D):
            self.unet.fps = config.model_fps
        latents, steps = state.latents, len(scheduler.timesteps)
        shown = bar_options(self.bars, leave=True)
        bar = tqdm(range(state.step, steps), desc="denoising", initial=state.step, total=steps, **shown)
        for step in bar:
            self.report(f"step {step + 1} of {steps}")
            latents = self.step(config, text, scheduler, latents, step)
            if checkpoints is not None and checkpoints.due(step + 1, steps):
                checkpoints.write(State(step + 1, latents, *state_of(scheduler, latents)))
        return latents

    def step(self, config: LongVideoConfig, text: Tensor, scheduler: Any, latents: Tensor, step: int) -> Tensor:
        """One forward of the UNet, guidance, and one step of the scheduler in float32."""
        time = scheduler.timesteps[step]
        self.plan.clock.progress = step / len(scheduler.timesteps)
        noisy = scheduler.scale_model_input(latents, time)
        clip = noisy.transpose(0, 1)[None].expand(len(text), -1, -1, -1, -1)  # b c f h w
        predicted = self.unet(clip.to(self.unet.dtype), time, encoder_hidden_states=text, return_dict=False)[0]
        predicted = predicted.float().transpose(1, 2)
        if len(text) == 2:
            without, with_prompt = predicted
            predicted = torch.lerp(without, with_prompt, config.guidance)[None]
        noise = {}
        if draws_noise(scheduler):
            drawn = FrameNoise(config.seed).draw(self.plan.own, latents.shape[1:], step=step + 1, device=latents.device)
            noise["variance_noise"] = drawn
        stepped: Tensor = scheduler.step(predicted[0], time, latents, **noise, return_dict=False)[0]
        return stepped

    def write(self, latents: Tensor, config: LongVideoConfig, output: Path, work: Path) -> None:
        """Decode and write this rank's frames; the first rank joins the parts of a file."""
        frames = self.decode(latents)
        if output.suffix == "":
            write_pictures(frames, output, self.plan.own.start)
            self.plan.gather_objects(None)
            if self.plan.rank == 0:
                trim_frames(output, config.frames)
            return
        parts = [work / "parts" / f"part-{rank:04d}.mp4" for rank in range(self.plan.ranks)]
        write_part(frames, parts[self.plan.rank], config.fps)
        self.plan.gather_objects(None)
        if self.plan.rank == 0:
            self.report("joining the parts")
            join_parts(parts, self.plan.lengths, output, config.fps)
            for part in parts:
                part.unlink()
            remove_empty(parts[0].parent)
        self.plan.gather_objects(None)

    def decode(self, latents: Tensor) -> Iterator[NDArray[np.uint8]]:
        """This rank's frames, one at a time: `(height, width, 3)`, 0 ... 255."""
        scale = self.vae.config.scaling_factor
        for number, frame in enumerate(tqdm(latents, desc="decoding", **bar_options(self.bars, leave=True)), 1):
            self.report(f"decoding frame {number} of {len(latents)}")
            picture = self.vae.decode((frame[None] / scale).to(self.vae.dtype), return_dict=False)[0][0]
            levels = ((picture.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            yield levels.permute(1, 2, 0).cpu().numpy()
