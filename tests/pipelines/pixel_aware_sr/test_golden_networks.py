"""Networks, whole steps and starts of PASD against recorded numbers; images are in `test_golden_pictures.py`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffattn.pipelines.pixel_aware_sr import PASDControlNetModel, PASDUNet2DConditionModel
from diffattn.pipelines.pixel_aware_sr.base_pipeline import plan_tiles
from diffattn.pipelines.pixel_aware_sr.checkpoint.loading import variant_of
from diffattn.pipelines.pixel_aware_sr.networks.controlnet import RRDB, DegradationRemoval
from diffattn.pipelines.pixel_aware_sr.networks.paca import PixelAttention, add_pixel_attention, as_tokens, hand_out
from diffattn.pipelines.pixel_aware_sr.sampling.denoiser import Denoiser, TextCondition
from diffattn.pipelines.pixel_aware_sr.sampling.starting import XL_SHARE, add_noise_twice, mix
from diffusers.models.unets import unet_2d_blocks
from golden_record import Record
from golden_vectors import GoldenCase, assert_golden, golden_cases, run_golden, with_a_key_more
from torch import Tensor, nn
from torch.nn import functional

Tensors = dict[str, Tensor]
CHECKED: dict[str, Callable[[GoldenCase], None]] = {}
PICTURES = {"color_fix", "tile_weights", "colorization_merge", "tiled_vae_split"}
PICTURES |= {"preprocess_pixels", "preprocess_size_rules"}


def checks(kind: str) -> Callable[[Callable[[GoldenCase], None]], Callable[[GoldenCase], None]]:
    def register(check: Callable[[GoldenCase], None]) -> Callable[[GoldenCase], None]:
        CHECKED[kind] = check
        return check

    return register


CASES = [case for case in golden_cases("pasd") if case.values[0] is None or case.values[0].kind not in PICTURES]


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_networks(case):
    assert case.kind in CHECKED, f"a kind of case that no test knows: {case.kind}"
    with torch.no_grad():
        CHECKED[case.kind](case)


def weights_of(tensors: Record, prefix: str) -> Tensors:
    """Stored as float16, which they are exactly."""
    return {name: tensor.float() for name, tensor in tensors.under(prefix).items()}


def loaded(model: nn.Module, tensors: Record, prefix: str = "weights.") -> nn.Module:
    model.load_state_dict(weights_of(tensors, prefix))
    return model.eval()


def network(cls: type, config: Record, weights: Tensors) -> Any:
    extra: dict[str, Any] = {}
    if cls is PASDUNet2DConditionModel:
        extra["pixel_attention"] = variant_of(list(weights))
    else:
        extra["use_rrdb"] = any("preprocesser" in key for key in weights)
    model = cls(**{**config.plain(), **extra})
    model.load_state_dict(weights)
    return model.eval()


@checks("state_dict_listing")
def check_names_and_shapes(case: GoldenCase) -> None:
    keys, config = case.spec["keys"].plain(), case.config.plain()
    if any(key.startswith("controlnet_cond_embedding") for key in keys):
        cls, extra = PASDControlNetModel, {"use_rrdb": any("preprocesser" in key for key in keys)}
    else:
        cls, extra = PASDUNet2DConditionModel, {"pixel_attention": variant_of(list(keys))}
    with torch.device("meta"):
        model = cls.from_config({**config, **extra})
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == keys
    assert len(keys) == case.spec["n_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == case.spec["n_params"]


@checks("paca_block")
def check_block(case: GoldenCase) -> None:
    config, tensors = case.config, case.tensors()
    heads, channels = config["heads"], config["channels"]
    layer = PixelAttention(
        heads,
        channels // heads,
        in_channels=channels,
        num_layers=config["num_layers"],
        cross_attention_dim=config["residual_channels"],
        norm_num_groups=config["norm_num_groups"],
        use_linear_projection=config["use_linear_projection"],
    )
    loaded(layer, tensors)
    out = layer(tensors["hidden_states"], as_tokens(tensors["pixel_residual"]), return_dict=False)[0]
    assert_golden("out", out, tensors["out"], case.tolerance)


@checks("up_block")
def check_up_block(case: GoldenCase) -> None:
    config, tensors = case.config.plain(), case.tensors()
    name, light = config.pop("cls"), config.pop("light", False)
    heads, depth = config.pop("num_attention_heads"), config.get("transformer_layers_per_block", 1)
    linear, groups = config.get("use_linear_projection", False), config["resnet_groups"]
    own = {"num_attention_heads": heads} if name == "CrossAttnUpBlock2D" else {}
    block = getattr(unet_2d_blocks, name)(**config, **own)
    variant = "light" if light else "full"
    layers = add_pixel_attention(block, variant, heads=heads, depth=depth, groups=groups, linear=linear)
    loaded(block, tensors)
    numbers = range(config["num_layers"])
    hand_out([layers], [tensors[f"pix.{i}"] for i in numbers])
    text = {"encoder_hidden_states": tensors["encoder_hidden_states"]} if own else {}
    out = block(tensors["hidden_states"], tuple(tensors[f"res.{i}"] for i in numbers), tensors["temb"], **text)
    assert_golden("out", out, tensors["out"], case.tolerance)


@checks("cond_embedding")
def check_condition_encoder(case: GoldenCase) -> None:
    config, tensors = case.config, case.tensors()
    widths, blocks = config["block_out_channels"], config["rrdb_blocks"] if config["use_rrdb"] else 0
    encoder = DegradationRemoval(
        config["conditioning_embedding_channels"],
        config["conditioning_channels"],
        widths,
        rrdb_blocks=blocks,
        rgbs=config["return_rgbs"],
    )
    if blocks:
        assert config["rrdb_num_feat"] == widths[0], "blocks of another width than the convolution before them"
        encoder.preprocesser = nn.Sequential(*(RRDB(widths[0], config["rrdb_grow"]) for _ in range(blocks)))
    config.told("rrdb_blocks", "rrdb_num_feat", "rrdb_grow")
    loaded(encoder, tensors)
    assert_golden("embedding", encoder(tensors["cond"]), tensors["embedding"], case.tolerance)
    if config["return_rgbs"]:
        for i, rgb in enumerate(encoder.rgbs(encoder.features(tensors["cond"]))):
            assert_golden(f"rgb.{i}", rgb, tensors[f"rgb.{i}"], case.tolerance)


@checks("unet_controlnet_step")
def check_step(case: GoldenCase) -> None:
    spec, tensors = case.spec, case.tensors()
    unet = network(PASDUNet2DConditionModel, spec["unet_config"], weights_of(tensors, "unet."))
    assert unet.config.pixel_attention == ("light" if spec["light"] else "full")
    control = network(PASDControlNetModel, spec["controlnet_config"], weights_of(tensors, "controlnet."))
    added = tensors.under("added.") or None
    assert ("fg_mask" in tensors) == bool(spec.get("fg_mask", "fg_mask" in tensors))
    call = tensors["latents"], tensors["timestep"], tensors["encoder_hidden_states"]
    down, mid = control(
        *call,
        tensors["cond"],
        spec["conditioning_scale"],
        guess_mode=spec["guess_mode"],
        added_cond_kwargs=added,
        fg_mask=tensors.get("fg_mask"),
        return_dict=False,
    )
    for i, residual in enumerate(down):
        assert_golden(f"down.{i}", residual, tensors[f"down.{i}"], case.tolerance)
    assert_golden("mid", mid, tensors["mid"], case.tolerance)
    for i, rgb in enumerate(control.clean_pictures(tensors["cond"])[1] if control.config.return_rgbs else []):
        assert_golden(f"rgb.{i}", rgb, tensors[f"rgb.{i}"], case.tolerance)
    noise = unet(
        *call,
        down_block_additional_residuals=tuple(down),
        mid_block_additional_residual=mid,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    assert_golden("noise_pred", noise, tensors["noise_pred"], case.tolerance)


class StubControlNet:
    """Stands for the ControlNet of the cases without networks: its residual is the picture's gray, scaled."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def encode_condition(self, picture: Tensor) -> Tensor:
        return functional.avg_pool2d(picture, 8).mean(1, keepdim=True)

    def __call__(self, sample: Tensor, t: Tensor, text: Tensor, condition: Tensor, scale: float, **options: Any) -> Any:
        self.calls.append([list(sample.shape), [len(condition), 3, 8 * condition.shape[2], 8 * condition.shape[3]]])
        return (condition * scale,), torch.zeros(())


def stub_unet(sample: Tensor, timestep: Tensor, text: Tensor, **options: Any) -> tuple[Tensor]:
    (residual,) = options["down_block_additional_residuals"]
    rows, columns = sample.shape[-2:]
    y, x = torch.linspace(-1, 1, rows)[:, None], torch.linspace(-1, 1, columns)
    mean = sample.mean((2, 3), keepdim=True)
    return (0.7 * sample + 0.5 * residual + y - 0.5 * x + 0.3 * mean + text.mean((1, 2)).view(-1, 1, 1, 1),)


FIRST_STEP = {"atol": 1e-4, "rtol": 1e-4}
"""Random networks magnify rounding from step to step, so the guided prediction is exact in the first alone."""


def run(case: GoldenCase, unet: Any, control: Any, pictures: Tensor, exact: Iterable[int]) -> None:
    """Denoise as the pipeline does, and compare the guided predictions of some steps, and the last latents."""
    config, tensors = case.config, case.tensors()
    scheduler = schedule(config)
    if "timesteps" in tensors:
        assert scheduler.timesteps.tolist() == tensors["timesteps"].tolist()
    guided = config["guidance_scale"] > 1
    negative, positive = tensors["negative_prompt_embeds"], tensors["prompt_embeds"]
    text = TextCondition(torch.cat([negative, positive]) if guided else positive, guided=guided)
    latents = tensors["latents"]
    denoiser = Denoiser(
        unet,
        control,
        pictures,
        text,
        plan_tiles(latents, config["tile"], config["overlap"], 1, official=True),
        guidance_scale=config["guidance_scale"],
        conditioning_scale=config["conditioning_scale"],
        guess_mode=config.get("guess_mode", False),
    )
    for step, timestep in enumerate(scheduler.timesteps):
        noise = denoiser(scheduler.scale_model_input(latents, timestep), timestep)
        if step in exact:
            assert_golden(f"step {step}", noise, tensors[f"guided_noise_pred_step{step}"], FIRST_STEP)
        else:
            tensors.told(f"guided_noise_pred_step{step}")  # no tolerance is told for it
        latents = scheduler.step(noise, timestep, latents).prev_sample
    assert_golden("final_latents", latents, tensors["final_latents"], case.tolerance)


def schedule(config: Record) -> Any:
    scheduler = getattr(diffusers, config["scheduler_class"]).from_config(config["scheduler"].plain())
    scheduler.set_timesteps(config["steps"])
    return scheduler


@checks("tiled_aggregation")
def check_tiles(case: GoldenCase) -> None:
    config, control = case.config, StubControlNet()
    assert config["tile_size_used"] == min(config["tile"], *case.tensors()["latents"].shape[-2:])
    pictures = functional.interpolate(case.tensors()["cond_avgpool8"], scale_factor=8, mode="nearest")
    run(case, stub_unet, control, pictures, exact=range(config["steps"]))
    calls = control.calls[: config["tiles_per_step"]]
    assert calls == config["controlnet_calls"]
    assert len(control.calls) == config["tiles_per_step"] * config["steps"]


@checks("pipeline_latent")
def check_pipeline(case: GoldenCase) -> None:
    spec, tensors = case.spec, case.tensors()
    unet = network(PASDUNet2DConditionModel, spec["unet_config"], weights_of(tensors, "unet."))
    assert unet.config.pixel_attention == ("light" if spec["light"] else "full")
    control = network(PASDControlNetModel, spec["controlnet_config"], weights_of(tensors, "controlnet."))
    pictures = functional.interpolate(tensors["cond_div8"], scale_factor=8, mode="nearest")
    run(case, unet, control, pictures, exact=[0])


@checks("added_noise_init")
def check_start(case: GoldenCase) -> None:
    config, tensors = case.config, case.tensors()
    scheduler = schedule(config)
    timesteps, level = scheduler.timesteps.tolist(), config["added_noise_level"]
    assert timesteps == tensors["timesteps"].tolist() and timesteps[0] == config["first_timestep"]
    assert (level in timesteps) == config["level_is_on_schedule"]
    z, noises = config["scaling_factor"] * tensors["z_sampled"], (tensors["noise_1"], tensors["noise_2"])
    for name, official in (("official_pinned_0_29_2", True), ("intended_alphas_cumprod", False)):
        out = add_noise_twice(z, noises, scheduler, level, official=official)
        assert_golden(name, out * scheduler.init_noise_sigma, tensors[name], case.tolerance)


@checks("added_noise_init_sdxl")
def check_xl_start(case: GoldenCase) -> None:
    config, tensors = case.config, case.tensors()
    sigma = schedule(config).init_noise_sigma
    assert config["alpha"] == XL_SHARE and sigma == pytest.approx(config["init_noise_sigma"])
    z, noise = config["scaling_factor"] * tensors["z_sampled"], tensors["noise"]
    assert_golden("picture", mix(z, noise) * sigma, tensors["out_with_image_branch"], case.tolerance)
    assert_golden("noise", noise * sigma, tensors["out_default_pure_noise"], case.tolerance)


def test_a_key_that_is_not_used_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\['config.surprise'\]"):
        run_golden(test_networks, with_a_key_more("pasd", "init_steps20_level900", tmp_path))
