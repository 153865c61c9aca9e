"""What X-Portrait costs by the released call pattern and by ours: FLOPs of full size, calls, and a measured tiny run.

python scripts/portrait_cost.py
python scripts/portrait_cost.py --frames 100 --rounds 0
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from diffattn.pipelines.portrait_animation import Sizes, XPortraitPipeline
from diffattn.pipelines.portrait_animation.networks.components import build_networks, official_scheduler
from diffattn.pipelines.portrait_animation.networks.reference import ReferenceBank
from diffattn.pipelines.portrait_animation.sampling.denoiser import Condition, Denoiser, Networks
from diffattn.pipelines.portrait_animation.sampling.features import EncodedWhenRead, Frames
from diffattn.pipelines.portrait_animation.sampling.start import set_timesteps
from diffattn.pipelines.portrait_animation.sampling.windows import Windows, plain_windows
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

GOLDEN = Sizes(
    channels=(32, 32, 32, 64),
    heads=4,
    text_tokens=5,
    text_width=24,
    latent_side=16,
    vae_channels=(32, 32, 32, 64),
    vae_layers=1,
)
"""Of the recorded cases, tests/golden/xportrait/tiny_config.json."""
WINDOW, OVERLAP = 16, 4
PATTERNS = ("released pattern", "this library")
app = typer.Typer(rich_markup_mode=None)


class ReleasedDenoiser(Denoiser):
    """The appearance network runs for every frame of every window, as in the released code."""

    def _write(self, timestep: Tensor, text: Tensor) -> ReferenceBank:
        return ReferenceBank([])  # of no window yet

    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        places: Sequence[Sequence[int]],
        bank: ReferenceBank,
        other: ReferenceBank,
    ) -> tuple[Tensor, ...]:
        references = self.condition.references[0].expand(sum(map(len, places)), -1, -1, -1)
        bank = ReferenceBank.write(self.networks.reference_unet, references, timestep, self.condition.text)
        return super()._predict(latents, timestep, places, bank, bank)


class Run:
    """A whole animation of random images with untrained networks, without files."""

    def __init__(self, sizes: Sizes, frames: int, steps: int, device: str = "cpu", rows: int | None = None) -> None:
        """`rows` pixels a side; None: what the sizes were trained on."""
        torch.manual_seed(0)
        with torch.device(device):
            networks = build_networks(sizes)
            for net in networks["controlnet"].nets:
                for parameter in (*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters()):
                    torch.nn.init.normal_(parameter, std=0.02)  # zero before training
            side = 8 * sizes.latent_side if rows is None else rows
            self.picture = torch.rand(1, 3, side, side) * 2 - 1
            self.controls = tuple(torch.rand(frames, 3, side, side) * 2 - 1 for _ in range(2))
        self.pipe = XPortraitPipeline(**networks, scheduler=official_scheduler())
        for part in networks.values():
            part.eval()
        self.frames, self.steps, self.device = frames, steps, device

    def generator(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(1)

    def __call__(self, pattern: str) -> Tensor:
        """Frames (frames, 3, rows, columns), of the same start and the same sample of the reference."""
        released, pipe = pattern == PATTERNS[0], self.pipe
        set_timesteps(pipe.scheduler, self.steps, self.device)
        encodes = 2 * self.frames if released else 1
        reference = [self.encode() for _ in range(encodes)][-1]
        text = pipe.null_text()
        denoiser = (ReleasedDenoiser if released else Denoiser)(
            Networks(pipe.unet, pipe.reference_unet, pipe.controlnet),
            Condition(reference[:, None], self.features(released), text, text),
            guidance_scale=5.0,
        )
        latents = torch.randn(self.frames, *reference.shape[1:], generator=self.generator()).to(self.device)
        windows: list[Windows] = [plain_windows(self.frames, WINDOW, OVERLAP)] * len(pipe.scheduler.timesteps)
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            noise = denoiser(latents, timestep, windows[step])
            latents = pipe.scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return pipe.decode(latents, WINDOW)

    def features(self, released: bool) -> tuple[Frames, Frames]:
        """Of the control images: encoded at every step and window, or once."""
        if not released:
            return self.pipe.encode_controls(*self.controls, WINDOW)
        pose, local = (
            EncodedWhenRead(net.controlnet_cond_embedding, pictures, self.pipe.device, self.pipe.unet.dtype)
            for net, pictures in zip(self.pipe.controlnet.nets, self.controls, strict=True)
        )
        return pose, local

    def encode(self) -> Tensor:
        """The reference's latents, the same ones at every call."""
        return self.pipe.encode(self.picture, self.generator())


def count_calls(run: Run, pattern: str) -> dict[str, int]:
    """Images that go through the appearance network and through the VAE's encoder in a whole run."""
    counted: Counter[str] = Counter()

    def counter(name: str) -> Callable[..., None]:
        def add(module: Any, args: tuple[Any, ...]) -> None:
            counted[name] += len(args[0])

        return add

    hooks = [
        run.pipe.reference_unet.register_forward_pre_hook(counter("appearance network")),
        run.pipe.vae.encoder.register_forward_pre_hook(counter("VAE encoder")),
        *(
            net.controlnet_cond_embedding.register_forward_pre_hook(counter("condition encoders"))
            for net in run.pipe.controlnet.nets
        ),
    ]
    try:
        run(pattern)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(counted)


def count_flops(call: Callable[[], Any]) -> int:
    """Multiplications and additions of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@torch.no_grad()
def full_size_flops(frames: int, steps: int, sizes: Sizes | None = None) -> dict[str, dict[str, float]]:
    """TFLOP of the parts of a whole run at full size, by pattern; nothing is computed, on the meta device.

    A part is counted once and multiplied by its calls.
    """
    sizes = sizes or Sizes()
    side, timesteps = sizes.latent_side, len(range(1, 1000, 1000 // steps))
    windows = plain_windows(frames, WINDOW, OVERLAP).places
    seen = sum(map(len, windows))
    with torch.device("meta"):
        nets = build_networks(sizes)
        networks = Networks(nets["unet"], nets["reference_unet"], nets["controlnet"])
        text = torch.zeros(1, sizes.text_tokens, sizes.text_width)
        latent, t = torch.zeros(1, 4, side, side), torch.tensor(1)
        pixels = torch.zeros(1, 3, 8 * side, 8 * side)
        bank = ReferenceBank.write(networks.reference_unet, latent, t, text)
        denoiser = Denoiser(networks, Condition(latent[:, None], (latent, latent), text, text), guidance_scale=5.0)
        sample = latent.expand(len(windows[0]), -1, -1, -1)[None]
        encoders = [net.controlnet_cond_embedding for net in nets["controlnet"].nets]
        given = [encoder(pixels).expand(sample.shape[1], -1, -1, -1) for encoder in encoders]
        features = sum(count_flops(lambda encoder=encoder: encoder(pixels)) for encoder in encoders)
        appearance = count_flops(lambda: networks.reference_unet(latent, t, text))
        guided = count_flops(lambda: denoiser.run(sample, t, text, given, bank))
        guided += count_flops(lambda: denoiser.run(sample, t, text, None, None))
        encode, decode = (
            count_flops(lambda: nets["vae"].encode(pixels)),
            count_flops(lambda: nets["vae"].decode(latent)),
        )
    shared = {
        "U-Net and ControlNets, both guidance branches": timesteps * len(windows) * guided,
        "VAE decoder": frames * decode,
    }
    parts = {
        PATTERNS[0]: {
            "appearance network": timesteps * seen * appearance,
            "VAE encoder": 2 * frames * encode,
            "condition encoders of the ControlNets": timesteps * seen * features,
            **shared,
        },
        PATTERNS[1]: {
            "appearance network": timesteps * appearance,
            "VAE encoder": encode,
            "condition encoders of the ControlNets": frames * features,
            **shared,
        },
    }
    return {pattern: {name: flops / 1e12 for name, flops in row.items()} for pattern, row in parts.items()}


@torch.no_grad()
def measure(run: Run, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of whole runs by pattern, interleaved after one of each, and their largest difference in -1..1."""
    frames = [run(pattern) for pattern in PATTERNS]
    spent: dict[str, list[float]] = {pattern: [] for pattern in PATTERNS}
    for _ in range(rounds):
        for pattern in PATTERNS:
            begin = time.perf_counter()
            run(pattern)
            spent[pattern].append(time.perf_counter() - begin)
    return spent, float((frames[0] - frames[1]).abs().max())


@app.command()
def main(
    frames: Annotated[int, typer.Option(min=WINDOW, help="Of the video.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Of the full-size table.")] = 30,
    tiny_steps: Annotated[int, typer.Option(min=1, help="Of the measured run.")] = 4,
    rounds: Annotated[int, typer.Option(min=0, help="Of the measurement; 0 leaves it out.")] = 5,
) -> None:
    """Print the tables in Markdown."""
    table = full_size_flops(frames, steps)
    typer.echo(f"| TFLOP of {frames} frames at 512 x 512, {steps} steps, guidance | {' | '.join(PATTERNS)} |")
    typer.echo("|---|---|---|")
    for name in table[PATTERNS[0]]:
        typer.echo(f"| {name} | {table[PATTERNS[0]][name]:.1f} | {table[PATTERNS[1]][name]:.1f} |")
    sums = [sum(table[pattern].values()) for pattern in PATTERNS]
    typer.echo(f"| all ({sums[0] / sums[1]:.3f}x) | {sums[0]:.1f} | {sums[1]:.1f} |\n")
    if not rounds:
        return
    run = Run(GOLDEN, frames, tiny_steps)
    with torch.no_grad():
        calls = [count_calls(run, pattern) for pattern in PATTERNS]
    spent, error = measure(run, rounds)
    medians = [statistics.median(spent[pattern]) for pattern in PATTERNS]
    ratios = [a / b for a, b in zip(*spent.values(), strict=True)]
    threads = torch.get_num_threads()
    typer.echo(
        f"| {frames} frames, {tiny_steps} steps, recorded tiny sizes, {threads} CPU threads | {' | '.join(PATTERNS)} |"
    )
    typer.echo("|---|---|---|")
    for name in calls[0]:
        typer.echo(f"| images through the {name} | {calls[0][name]} | {calls[1][name]} |")
    typer.echo(f"| seconds, median of {rounds} | {medians[0]:.2f} | {medians[1]:.2f} |")
    typer.echo(
        f"\n{statistics.median(ratios):.2f}x faster ({min(ratios):.2f} to {max(ratios):.2f} over rounds), largest "
        f"difference of the frames {error:.1e}, of values in -1..1"
    )


if __name__ == "__main__":
    app()
