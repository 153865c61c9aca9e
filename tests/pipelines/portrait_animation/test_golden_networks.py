"""X-Portrait's networks, conversion, sampling and selection of frames against recorded numbers."""

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.pipelines.portrait_animation import Sizes, select_frames
from diffattn.pipelines.portrait_animation.checkpoint.convert import UNUSED, load_networks, official_names, same_shape
from diffattn.pipelines.portrait_animation.checkpoint.names import motion_name
from diffattn.pipelines.portrait_animation.networks.components import (
    PREFIXES,
    build_networks,
    build_text_encoder,
    official_scheduler,
)
from diffattn.pipelines.portrait_animation.networks.reference import Reader, ReferenceBank, Writer
from diffattn.pipelines.portrait_animation.networks.unet import FrameGroupNorm
from diffattn.pipelines.portrait_animation.sampling.denoiser import Condition, Denoiser, Networks
from diffattn.pipelines.portrait_animation.sampling.features import encode_once
from diffattn.pipelines.portrait_animation.sampling.start import set_timesteps
from diffattn.pipelines.portrait_animation.sampling.windows import circular_windows, plain_windows
from diffusers import Transformer2DModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from golden_portrait import (
    BOOKKEEPING,
    PortraitCase,
    full_size,
    portrait_cases,
    read_json,
    read_tensors,
    tiny_frames,
    tiny_sizes,
    tiny_weights,
)
from golden_record import Record
from golden_vectors import OWN_SET, run_golden
from safetensors.torch import save_file
from torch import Tensor

from diffattn.media.windows import blend_windows

Tensors = dict[str, Tensor]
TEXT = "cond_stage_model.transformer."
CHECKED: dict[str, Callable[[PortraitCase], None]] = {}


def checks(kind: str) -> Callable[[Callable[[PortraitCase], None]], Callable[[PortraitCase], None]]:
    def register(check: Callable[[PortraitCase], None]) -> Callable[[PortraitCase], None]:
        CHECKED[kind] = check
        return check

    return register


@pytest.mark.golden
@pytest.mark.parametrize("case", portrait_cases())
@pytest.mark.slow
def test_networks(case):
    with torch.no_grad():
        check_of(case.kind)(case)


def check_of(kind: str) -> Callable[[PortraitCase], None]:
    """A JSON file's kind is its name, which may say more: `frame_selection_long`."""
    known = sorted((name for name in CHECKED if kind.startswith(name)), key=len)
    assert known, f"a kind of case that no test knows: {kind}"
    return CHECKED[known[-1]]


def test_a_further_set_is_listed_whole_and_a_new_kind_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFATTN_GOLDEN", str(tmp_path))
    (absent,) = portrait_cases()
    assert absent.id == "xportrait/absent" and absent.marks[0].name == "skip"
    files = {
        "gaze.safetensors": {"kind": "gaze"},
        "fusion.safetensors": {"kind": "fusion", "cases": {"a": {}, "b": {}}},
        "tiny_weights_unet_0.safetensors": {"kind": "weights"},
    }
    (tmp_path / "xportrait").mkdir()
    (tmp_path / "xportrait" / "index.json").write_text(json.dumps({"files": files}))
    gaze, *fusion = portrait_cases()
    assert [case.id for case in fusion] == [f"xportrait/fusion.safetensors::{name}" for name in "ab"]
    assert gaze.id == "xportrait/gaze.safetensors::all"
    with pytest.raises(AssertionError, match="no test knows: gaze"):
        test_networks(*gaze.values)


@functools.cache
def tiny_networks(folder: Path) -> dict[str, Any]:
    sizes = tiny_sizes(folder)
    return load_networks(
        tiny_weights(folder), folder, sizes, null_text=torch.zeros(1, sizes.text_tokens, sizes.text_width)
    )


def networks(case: PortraitCase) -> Networks:
    made = tiny_networks(case.file.parent)
    return Networks(made["unet"], made["reference_unet"], made["controlnet"])


@checks("full_state_dict")
def check_all_names(case: PortraitCase) -> None:
    """Every weight of the full size is known and of its shape, but those that are named as unused."""
    spec = case.spec()
    keys = spec["keys"].plain()
    with torch.device("meta"):
        wanted = official_names({**build_networks(Sizes()), "text_encoder": build_text_encoder(Sizes())})
    left = keys.keys() - wanted.keys()
    assert not wanted.keys() - keys.keys() and all(any(rule.fullmatch(name) for rule in UNUSED) for name in left)
    assert {name for name in left if "text_model" in name} <= {f"{TEXT}text_model.embeddings.position_ids"}
    for name, place in wanted.items():
        assert same_shape(torch.Size(keys[name][0]), place.shape), name
    for prefix, count in spec["parameters"].items():
        own = {name: place.shape for name, place in wanted.items() if name.startswith(prefix)}
        hints = {name: torch.Size(keys[name][0]) for name in left if name.startswith(f"{prefix}input_hint_block.")}
        numbers = [shape.numel() for name, shape in {**own, **hints}.items() if not name.endswith("pos_encoder.pe")]
        assert sum(numbers) == count, prefix


@checks("tiny_state_dict")
def check_tiny_names(case: PortraitCase) -> None:
    keys, weights = case.spec().plain(), tiny_weights(case.file.parent)
    listed = {key: shape for key, (shape, _) in keys.items() if not UNUSED[0].fullmatch(key)}
    assert {key: list(tensor.shape) for key, tensor in weights.items()} == listed
    tiny_networks(case.file.parent)


SECTIONS = {
    "motion": "unet",
    "unet": "unet",
    "appearance": "reference_unet",
    "reference": "reference_unet",
    "pose": "controlnet.nets.0",
    "local": "controlnet.nets.1",
    "local_pose": "controlnet.nets.1",
    "vae": "vae",
}
"""Sections of a map of names, any of which may be absent, and the networks that they map."""


@checks("key_map")
def check_key_map(case: PortraitCase) -> None:
    with torch.device("meta"):
        wanted = official_names(build_networks(Sizes()))
    spec = case.spec()
    sections = spec.keys() - set(BOOKKEEPING)
    assert sections and sections <= SECTIONS.keys(), (
        f"sections that no test knows: {sorted(sections - SECTIONS.keys())}"
    )
    for section in sections:
        prefix, told = PREFIXES[SECTIONS[section]], spec[section].plain()
        assert told and all(name.startswith(prefix) for name in told)
        own = {name: re.sub(r"^nets\.\d\.", "", place.key) for name, place in wanted.items() if name.startswith(prefix)}
        assert {name: own[name] for name in told} == told
        if section == "motion":
            assert told.keys() == {name for name in own if "_motion_module." in name}


EPS: dict[str, dict[str, Any]] = {
    "eps_cond": {},
    "eps_uncond": {"plain": True},
    "eps_cond_two_refs": {"references": 2},
    "eps_cond_zero_pose": {"zero": (0,)},
    "eps_cond_zero_local": {"zero": (1,)},
    "eps_ref_only": {"nets": 0},
    "eps_ref_pose": {"nets": 1},
}
"""What each case changes about one prediction from everything, without guidance."""

GUIDED: dict[str, dict[str, Any]] = {
    "controlnet_important": {},
    "balance": {"mode": "balance"},
    "noised_reference": {"noised": True},
}
"""The same for cases `eps_cfg<scale>_<name>`."""


def options_of(case: PortraitCase) -> dict[str, Any]:
    entry, guided = case.entry, re.fullmatch(r"eps_cfg[\d.]+_(\w+)", case.name)
    if guided is None:
        entry.told("guidance")
        assert case.name in EPS, f"a prediction that no test knows: {case.name}"
        return {"guidance_scale": 1.0, **EPS[case.name]}
    assert guided[1] in GUIDED, f"a prediction that no test knows: {case.name}"
    return {"guidance_scale": entry["guidance"], **GUIDED[guided[1]]}


@checks("model")
def check_prediction(case: PortraitCase) -> None:
    given = read_tensors(case.file.parent / "tiny_inputs.safetensors")
    timestep, want = torch.tensor(case.entry["timestep"]), case.tensors()[case.name]
    frames, at_once = len(given["latents"]), tiny_frames(case.file.parent)
    assert case.entry["video_length"] in (frames, at_once) and frames % at_once == 0
    noised = add_noise(given["reference"], given["reference_noise"], timestep)
    if case.name == "reference_noisy":
        case.entry.told("guidance")
        case.close(case.name, noised, want)
        return
    options = options_of(case)
    first = noised if options.pop("noised", False) else given["reference"].expand(frames, -1, -1, -1)
    references = [first, given["reference_2"]][: options.pop("references", 1)]
    controls = [full_size(given[f"{name}_rgb_quarter"], given["latents"]) for name in ("pose", "local")]
    for i in options.pop("zero", ()):
        controls[i] = torch.zeros_like(controls[i])
    texts = given["context"], given["uncond_context"]
    parts, nets = networks(case), options.pop("nets", 2)
    condition = Condition(torch.stack(references), features_of(parts, *controls), *texts)
    windows = plain_windows(frames, at_once, 0)
    if options.pop("plain", False):
        got = unconditional(Denoiser(parts, condition, guidance_scale=1.0), given["latents"], timestep, windows)
        case.close(case.name, got, want)
        return
    if nets < 2:
        parts = dataclasses.replace(parts, controlnet=FirstControlNets(parts.controlnet, nets))
    case.close(case.name, Denoiser(parts, condition, **options)(given["latents"], timestep, windows), want)


def unconditional(denoiser: Denoiser, latents: Tensor, timestep: Tensor, windows: Any) -> Tensor:
    """From neither reference nor controls, window by window."""
    text = denoiser.condition.negative
    parts = [denoiser.run(latents[None, list(place)], timestep, text, None, None)[0] for place in windows.places]
    return torch.cat(parts)


def features_of(parts: Networks, *controls: Tensor) -> tuple[Tensor, Tensor]:
    pose, local = (
        encode_once(net.controlnet_cond_embedding, pictures, pictures.device, pictures.dtype, 7)
        for net, pictures in zip(parts.controlnet.nets, controls, strict=True)
    )
    return pose, local


class FirstControlNets:
    """The first of the ControlNets, or none of them."""

    def __init__(self, both: Any, count: int) -> None:
        self.nets, self.count = both.nets, count

    def __call__(
        self, sample: Tensor, t: Tensor, text: Tensor, pictures: list[Tensor], scales: list[float], return_dict: bool
    ) -> tuple[list[Tensor], Tensor]:
        down, mid = self.nets[0](sample, t, text, pictures[0], scales[0], return_dict=return_dict)
        return [self.count * residual for residual in down], self.count * mid


def add_noise(latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    return official_scheduler().add_noise(latents.expand_as(noise), noise, timestep[None])


@checks("components")
def check_components(case: PortraitCase) -> None:
    given, want = read_tensors(case.file.parent / "tiny_inputs.safetensors"), case.tensors()
    parts, timestep = tiny_networks(case.file.parent), torch.tensor(case.entry["timestep"])
    count = len(want["pose_residual_0"])
    text = given["context"].expand(count, -1, -1)
    got: Tensors = {}
    for name, net in zip(("pose", "local"), parts["controlnet"].nets, strict=True):
        picture = full_size(given[f"{name}_rgb_quarter"][:count], given["latents"])
        down, mid = net(given["latents"][:count], timestep, text, picture, return_dict=False)
        got |= {f"{name}_residual_{i}": residual for i, residual in enumerate((*down, mid))}
    bank = ReferenceBank.write(parts["reference_unet"], given["reference_2"][:count], timestep, given["context"])
    got |= {f"bank_{i}": entry for i, entry in enumerate(bank.entries)}
    distribution = parts["vae"].encode(want["vae_image"]).latent_dist
    got |= {"vae_mean": distribution.mean, "vae_logvar": distribution.logvar}
    got["vae_decoded"] = parts["vae"].decode(want["vae_latent"]).sample
    assert got.keys() == want.keys() - {"vae_image", "vae_latent"}
    for name, tensor in got.items():
        case.close(name, tensor, want[name])


@checks("sampling")
def check_sampling(case: PortraitCase) -> None:
    """The whole loop from the first latents, and each step alone from the recorded latents before it."""
    given, entry, scheduler = case.tensors(), case.entry, official_scheduler()
    parts = networks(case)
    entry.told("python_random_seed")  # of the offsets, which are recorded
    assert entry["window"] == tiny_frames(case.file.parent)
    controls = [full_size(given[f"{name}_rgb_quarter"], given["x_T"]) for name in ("pose", "local")]
    features = features_of(parts, *controls)
    condition = Condition(given["reference"][None], features, given["context"], given["uncond_context"])
    denoiser = Denoiser(parts, condition, guidance_scale=entry["guidance"], window_batch=2)
    set_timesteps(scheduler, entry["ddim_steps"], "cpu")
    assert scheduler.timesteps.tolist() == entry["timesteps"] and entry["eta"] == 0
    latents = given["x_T"]
    for step, (timestep, windows) in enumerate(zip(scheduler.timesteps, official_windows(entry), strict=True)):
        out = scheduler.step(denoiser(latents, timestep, windows), timestep, latents)
        latents = out.prev_sample
        case.close(f"x_after_step_{step}", latents, given[f"x_after_step_{step}"])
        case.close(f"pred_x0_step_{step}", out.pred_original_sample, given[f"pred_x0_step_{step}"])
    case.close("final_latents", latents, given["final_latents"])


def official_windows(config: Record) -> Iterator[Any]:
    for offset in config["offsets"] or [0] * config["ddim_steps"]:
        yield circular_windows(config["num_frames"], config["window"], config["num_overlap"], offset)


@checks("fusion")
def check_fusion(case: PortraitCase) -> None:
    config, given, scheduler = case.config(), case.tensors(), official_scheduler()
    config.told("python_random_seed")  # of the offsets, which are recorded
    set_timesteps(scheduler, config["ddim_steps"], "cpu")
    assert scheduler.timesteps.tolist() == config["timesteps"]
    guidance, latents = config["guidance"], given["x_T"]
    u, c = given["window_eps_uncond"], given["window_eps_cond"]
    parts, places = iter(u + guidance * (c - u)), []
    for step, (timestep, windows) in enumerate(zip(scheduler.timesteps, official_windows(config), strict=True)):
        places += [list(place) for place in windows.places]
        step_parts = [next(parts) for _ in windows.places]
        eps = blend_windows(step_parts, windows.places, windows.weights, config["num_frames"], dim=0)
        latents = scheduler.step(eps, timestep, latents).prev_sample
        case.close("eps", eps, given[f"fused_eps_step_{step}"])
        if f"x_after_step_{step}" in given:
            case.close("x", latents, given[f"x_after_step_{step}"])
    assert places == config["windows"]
    case.close("final", latents, given["final"])


@checks("motion")
def check_motion_module(case: PortraitCase) -> None:
    config, given = case.config(), case.tensors()
    config.told("layout", "groupnorm")  # words: the layout and the norm of the released code
    module = AnimateDiffTransformer3D(
        num_attention_heads=config["heads"],
        attention_head_dim=config["channels"] // config["heads"],
        in_channels=config["channels"],
        positional_embeddings="sinusoidal",
        num_positional_embeddings=config["max_len"],
    )
    module.norm = FrameGroupNorm(32, config["channels"], eps=1e-6)
    names = {key: f"weights.temporal_transformer.{motion_name(key)}" for key in module.state_dict()}
    module.load_state_dict({key: given[name] for key, name in names.items()})
    for name in [name for name in given if name.endswith("pos_encoder.pe")]:  # one for both attentions here
        assert torch.equal(given[name], module.transformer_blocks[0].pos_embed.pe)
    assert len(given["input"]) == config["batch"] * config["frames"]
    case.close("output", module(given["input"], num_frames=config["frames"]), given["output"])


@checks("reference-attention")
def check_reference_attention(case: PortraitCase) -> None:
    config, given = case.config(), case.tensors()
    assert len(given["x"]) == config["batch"]
    writer, reader = (transformer(config, given, name) for name in ("writer", "reader"))
    writing, reading = (model.transformer_blocks[0].attn1 for model in (writer, reader))
    entries: list[Tensor] = []
    writing.processor = Writer(writing.processor, entries)
    for i in range(config["num_refs"]):
        written = writer(given[f"ref_{i}"], given["context"], return_dict=False)[0]
    case.close("last_write_out", written, given["last_write_out"])
    bank = ReferenceBank([torch.cat(entries)]).joined(config["num_refs"])
    case.close("bank", bank.entries[0], given["bank"])
    case.close("plain", reader(given["x"], given["context"], return_dict=False)[0], given["plain"])
    reading.processor = Reader(reading.processor, bank.entries[0])
    case.close("read", reader(given["x"], given["context"], return_dict=False)[0], given["read"])


def transformer(config: Record, given: Record, name: str) -> Transformer2DModel:
    model = Transformer2DModel(
        config["heads"],
        config["channels"] // config["heads"],
        in_channels=config["channels"],
        cross_attention_dim=config["context_dim"],
    )
    model.load_state_dict(given.under(f"{name}."))
    return model.eval()


@checks("ddim_schedule")
def check_schedule(case: PortraitCase) -> None:
    spec, scheduler = case.spec(), official_scheduler()
    kept = scheduler.alphas_cumprod
    close = functools.partial(pytest.approx, rel=spec["tolerance"], abs=max(1e-5, spec["tolerance"]))  # a float32 chain
    spec.told("beta")  # its formula
    first, last = float(kept[0]), float(kept[-1])
    assert first == close(spec["alphas_cumprod_0"]) and last == close(spec["alphas_cumprod_999"])
    assert last**0.5 == close(spec["sqrt_alphas_cumprod_999"])
    assert (1 - last) ** 0.5 == close(spec["sqrt_one_minus_alphas_cumprod_999"])
    for steps, want in spec["steps"].items():
        set_timesteps(scheduler, int(steps), "cpu")
        timesteps = scheduler.timesteps.tolist()
        assert timesteps == [timestep for timestep in want["timesteps"] if timestep < 1000], steps
        if "official_raises" in want:  # for the timestep 1000, which is left out here
            want.told(*want)
            continue
        for timestep, which in ((timesteps[0], "first"), (timesteps[-1], "last")):
            before = timestep - 1000 // int(steps)
            assert float(kept[timestep]) == close(want[f"alpha_{which}"])
            assert float(kept[max(before, 0)]) == close(want[f"alpha_prev_{which}"])
            step = scheduler.step(torch.zeros(1), timestep, torch.ones(1)).prev_sample  # sqrt(alpha_prev / alpha)
            assert float(step) == close((want[f"alpha_prev_{which}"] / want[f"alpha_{which}"]) ** 0.5)


@checks("frame_selection")
def check_frame_selection(case: PortraitCase) -> None:
    """Where the released code finds no frame it fails, and so does ours."""
    for asked in case.spec()["cases"]:
        options = {"start": asked["start_idx"], "count": asked["out_frames"], "skip": asked["skip"]}
        asked.told("fps_written", "note")  # the rate of the released writer, which skipping does not change
        failed = [key for key in asked if "raise" in key or "error" in key]
        asked.told(*failed)
        selected, shapes = asked.get("selected"), asked.get("shapes")
        if not selected:
            if shapes is not None:
                assert {shape[0] for shape in shapes.plain().values()} == {0}
            with pytest.raises(ValueError, match="which leaves no frame"):
                select_frames(asked["video_len"], **options, official=True)
            continue
        assert not any(asked[key] for key in failed)
        assert list(select_frames(asked["video_len"], **options, official=True)) == selected, options
        if shapes is not None:
            assert {shape[0] for shape in shapes.plain().values()} == {len(selected)}


@pytest.mark.parametrize(("start", "skip", "want"), [(0, 2, [0, 2, 4, 6, 8]), (1, 2, [1, 3, 5, 7, 9]), (1, 1, [])])
def test_a_selection_without_the_last_frames(tmp_path: Path, start: int, skip: int, want: list[int]) -> None:
    """Python's slices: a stop of start - skip, counted from the end where it is below 0."""
    asked = {"start_idx": start, "out_frames": -1, "skip": skip, "video_len": 11, "selected": want}
    (tmp_path / "frame_selection.json").write_text(json.dumps({"cases": [asked]}))
    run_golden(test_networks, PortraitCase(tmp_path / "frame_selection.json", "all", {"kind": "json"}))


# ---- cases of our own


def portrait_case(folder: Path, file: str, name: str, entry: dict[str, Any], tensors: Tensors) -> PortraitCase:
    folder.mkdir(exist_ok=True)
    if tensors:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file)
    return PortraitCase(folder / file, name, entry)


@pytest.mark.slow
def test_motion_modules_of_other_heads_that_see_fewer_frames(tmp_path: Path) -> None:
    """The recorded weights as networks with 2 heads there, and 8 frames at once, against themselves in float64."""
    own, folder = OWN_SET / "xportrait", tmp_path / "xportrait"
    folder.mkdir()
    for file in (*own.glob("tiny_weights_*"), own / "tiny_inputs.safetensors"):
        (folder / file.name).symlink_to(file)
    spec = json.loads((own / "tiny_config.json").read_text())
    spec["variant"] |= {"mm_heads": 2, "video_length": 8}
    motion = spec["ldm_params"]["unet_config"]["params"]["unet_additional_kwargs"]["motion_module_kwargs"]
    motion["num_attention_heads"] = 2
    (folder / "tiny_config.json").write_text(json.dumps(spec))
    unet = tiny_networks(folder)["unet"]
    assert unet.config.motion_num_attention_heads == 2 and unet.config.num_attention_heads == 4

    given = read_tensors(own / "tiny_inputs.safetensors")
    text = given["uncond_context"].double().expand(8, -1, -1)
    with torch.no_grad():
        wide = copy.deepcopy(unet).double()
        parts = [wide(clip.double().movedim(0, 1)[None], torch.tensor(521), text).sample[0].movedim(1, 0)
                 for clip in given["latents"].split(8)]  # fmt: skip
    want = torch.cat(parts).float()
    recorded = read_tensors(own / "tiny_outputs.safetensors")["eps_uncond"]
    assert float((want - recorded).norm() / recorded.norm()) > 1e-2
    entry = {"kind": "model", "timestep": 521, "video_length": 8, "guidance": 5.0, "tolerance": {"rel_l2": 3e-5}}
    case = portrait_case(folder, "tiny_outputs.safetensors", "eps_uncond", entry, {"eps_uncond": want})
    run_golden(test_networks, case)


@pytest.mark.slow
def test_a_map_of_some_networks_only(tmp_path: Path) -> None:
    with torch.device("meta"):
        wanted = official_names(build_networks(Sizes()))
    name = next(name for name in wanted if name.startswith(PREFIXES["controlnet.nets.1"]))
    key = wanted[name].key.removeprefix("nets.1.")
    (tmp_path / "key_map.json").write_text(json.dumps({"note": "words", "local": {name: key}}))
    case = PortraitCase(tmp_path / "key_map.json", "all", {"kind": "json"})
    run_golden(test_networks, case)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "key_map.json").write_text(json.dumps({"gaze": {name: key}}))
    with pytest.raises(AssertionError, match=r"sections that no test knows: \['gaze'\]"):
        test_networks(PortraitCase(tmp_path / "wrong" / "key_map.json", "all", {"kind": "json"}))


@pytest.mark.parametrize("place", ["entry", "case"])
def test_a_key_that_is_not_used_fails(tmp_path: Path, place: str) -> None:
    index = read_json(OWN_SET / "xportrait" / "index.json")["files"]["window_fusion_cases.safetensors"]
    entry = json.loads(json.dumps(index))
    (entry if place == "entry" else entry["cases"]["c"])["surprise"] = 1
    case = PortraitCase(OWN_SET / "xportrait" / "window_fusion_cases.safetensors", "c", entry)
    with pytest.raises(AssertionError, match="::c says what this test does not use: .*surprise"):
        run_golden(test_networks, case)
