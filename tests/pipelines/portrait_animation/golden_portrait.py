"""The golden set of X-Portrait: files of many cases, which `index.json` describes.

@pytest.mark.golden
@pytest.mark.parametrize("case", portrait_cases())
def test_it(case):
    ...
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.pipelines.portrait_animation import Sizes
from golden_record import Path as Asked
from golden_record import Record
from golden_vectors import check_nothing_left, golden_root
from safetensors.torch import load_file
from torch import Tensor

SYSTEM = "xportrait"
NOT_CASES = ("tiny_inputs.safetensors", "tiny_config.json")
"""What cases are computed from; so are files of the kind "weights"."""

FACES = "face-prep"
"""The kind that is prepared before the networks, and tested apart."""


BOOKKEEPING = ("kind", "note", "bytes", "tensors", "sha256", "tolerance", "lib_versions", "source", "commit")
"""What index and JSON files say of the recording: not what was computed."""


@dataclass(frozen=True)
class PortraitCase:
    """One case of a file, or the whole file."""

    file: Path
    name: str
    """"all" for the whole file."""
    index: dict[str, Any]
    """What the index says about the file."""

    @functools.cached_property
    def asked(self) -> set[Asked]:
        """Paths of all that was asked for, of index, JSON and tensors."""
        return set()

    @functools.cached_property
    def entry(self) -> Record:
        """What the index says about the file, of its cases this one alone."""
        own = {"cases": {self.name: self.index["cases"][self.name]}} if "cases" in self.index else {}
        return Record({**self.index, **own}, self.asked)

    @property
    def kind(self) -> str:
        """For JSON files their name, for all others what the index says."""
        return self.file.stem if self.index["kind"] == "json" else str(self.index["kind"])

    @functools.cached_property
    def _spec(self) -> Record:
        return Record(read_json(self.file) if self.index["kind"] == "json" else {}, self.asked, ("file",))

    def spec(self) -> Record:
        """The whole of a JSON file."""
        return self._spec

    def config(self) -> Record:
        """What the index says about this case of a file of several."""
        return self.entry["cases"][self.name]

    @functools.cached_property
    def _tensors(self) -> Record:
        found = {} if self.index["kind"] == "json" else read_tensors(self.file)
        if "cases" in self.index:
            found = {
                key.removeprefix(f"{self.name}."): t for key, t in found.items() if key.startswith(f"{self.name}.")
            }
        elif self.index["kind"] == "model":
            found = {self.name: found[self.name]}
        return Record(found, self.asked, ("tensor",))

    def tensors(self) -> Record:
        """Those of the case, without its name; or all of the file."""
        return self._tensors

    def close(self, name: str, got: Tensor, want: Tensor) -> None:
        """Compare by the tolerance of the index: relative L2, of all tensors or of each, or `atol` and `rtol`."""
        tolerance = self.index["tolerance"]
        assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.shape}, expected {want.shape}"
        if "atol" in tolerance:
            torch.testing.assert_close(got, want, atol=tolerance["atol"], rtol=tolerance.get("rtol", 0.0))
            return
        allowed = tolerance["rel_l2"]
        allowed = allowed[name] if isinstance(allowed, dict) else allowed
        error = float((got.double() - want.double()).norm() / want.double().norm())
        assert error <= allowed, f"{name}: relative L2 {error:.2e}, allowed {allowed:.1e}"

    def check_used(self) -> None:
        """Fail for what index, JSON and tensors hold and nobody asked for."""
        self.entry.told(*BOOKKEEPING)
        self.spec().told(*BOOKKEEPING)
        check_nothing_left(f"{self.file.name}::{self.name}", self.entry, self.spec(), self.tensors())


def portrait_cases() -> list[Any]:
    """Parameters `xportrait/<file>::<case>` of all cases but those of faces."""
    folder = golden_root() / SYSTEM
    if not (folder / "index.json").is_file():
        reason = f"the golden set in {golden_root()} has no cases of {SYSTEM}"
        return [pytest.param(None, id=f"{SYSTEM}/absent", marks=pytest.mark.skip(reason=reason))]
    found = [
        pytest.param(PortraitCase(folder / file, name, entry), id=f"{SYSTEM}/{file}::{name}")
        for file, entry in read_json(folder / "index.json")["files"].items()
        if entry["kind"] not in ("weights", FACES) and file not in NOT_CASES
        for name in names_of(file, entry)
    ]
    assert found, f"no golden cases: {folder}/index.json lists none"
    return found


def names_of(file: str, entry: dict[str, Any]) -> list[str]:
    """Files of the whole model have one case for each tensor."""
    if "cases" in entry:
        return list(entry["cases"])
    return list(entry["tensors"]) if entry["kind"] == "model" else ["all"]


def tiny_sizes(folder: Path) -> Sizes:
    """Of the networks that the set was recorded from; fails for what the library's networks can't vary."""
    spec, inputs = Record(read_json(folder / "tiny_config.json")), read_tensors(folder / "tiny_inputs.safetensors")
    variant, told = spec["variant"], spec["ldm_params"]
    spec.told(*BOOKKEEPING)
    variant.told("seed", "video_length")
    check_diffusion(told)
    vae = check_vae(told["first_stage_config"]["params"])
    vae_channels, vae_layers = tuple(vae["ch"] * factor for factor in vae["ch_mult"]), vae["num_res_blocks"]
    assert vae["ch"] == variant["vae_ch"]
    for name in ("unet_config", "appearance_control_stage_config", "pose_control_stage_config"):
        check_network(told[name]["params"], variant)
    check_network(told["local_pose_control_stage_config"]["params"], variant)
    check_motion(told["unet_config"]["params"]["unet_additional_kwargs"], variant)
    check_nothing_left("tiny_config.json", spec)
    _, text_tokens, text_width = inputs["context"].shape
    assert text_width == variant["context_dim"]
    return Sizes(
        channels=tuple(variant["model_channels"] * factor for factor in variant["channel_mult"]),
        heads=variant["num_heads"],
        motion_heads=variant["mm_heads"],
        text_tokens=text_tokens,
        text_width=text_width,
        positions=variant["max_len"],
        latent_side=inputs["latents"].shape[-1],
        vae_channels=vae_channels,
        vae_layers=vae_layers,
    )


def expect(config: Record, **fixed: Any) -> None:
    """Settings that the library's networks have no other value of; absent is as good."""
    other = {name: config[name] for name in fixed if name in config and config[name] != fixed[name]}
    assert not other, f"networks that no test knows: {other}"


def check_diffusion(told: Record) -> None:
    expect(told, linear_start=0.00085, linear_end=0.012, timesteps=1000, channels=4, scale_factor=0.18215)
    expect(told, only_mid_control=False, conditioning_key="crossattn", num_timesteps_cond=1)
    told.told("log_every_t", "first_stage_key", "cond_stage_key", "control_key", "image_size", "cond_stage_trainable")
    told.told("monitor", "use_ema", "cond_stage_config", "force_null_conditioning")  # of training and of its data
    for part in ("unet", "first_stage", "appearance_control_stage", "pose_control_stage", "local_pose_control_stage"):
        told[f"{part}_config"].told("target")


def check_network(config: Record, variant: Record) -> None:
    for name in ("model_channels", "channel_mult", "num_heads", "context_dim"):
        assert config[name] == variant[name], f"{name} of one network differs from the others'"
    expect(config, in_channels=4, out_channels=4, hint_channels=3, num_res_blocks=2, transformer_depth=1)
    expect(config, attention_resolutions=[4, 2, 1], use_spatial_transformer=True, legacy=False)
    config.told("image_size", "use_checkpoint")


def check_motion(config: Record, variant: Record) -> None:
    expect(config, use_motion_module=True, motion_module_resolutions=[1, 2, 4, 8], motion_module_type="Vanilla")
    expect(config, unet_use_cross_frame_attention=False, unet_use_temporal_attention=False)
    modules = config["motion_module_kwargs"]
    assert modules["num_attention_heads"] == variant["mm_heads"]
    assert modules["temporal_position_encoding_max_len"] == variant["max_len"]
    expect(modules, num_transformer_block=1, attention_block_types=["Temporal_Self"] * 2, temporal_attention_dim_div=1)
    expect(modules, temporal_position_encoding=True)
    modules.told("zero_initialize")


def check_vae(config: Record) -> Record:
    vae: Record = config["ddconfig"]
    expect(config, embed_dim=4)
    config.told("monitor", "lossconfig")
    expect(vae, double_z=True, z_channels=4, in_channels=3, out_ch=3, attn_resolutions=[])
    vae.told("resolution", "dropout")
    return vae


def tiny_frames(folder: Path) -> int:
    """Frames that the motion modules of the recorded networks see at once."""
    return int(read_json(folder / "tiny_config.json")["variant"]["video_length"])


def tiny_weights(folder: Path) -> dict[str, Tensor]:
    """All networks' weights under their official names; they are stored as float16, which they are exactly."""
    files = sorted(folder.glob("tiny_weights_*.safetensors"))
    return {key: tensor.float() for file in files for key, tensor in load_file(file).items()}


def full_size(stored: Tensor, latents: Tensor) -> Tensor:
    """A control image, of 8 times the size of the latents, from its stored part."""
    factor = 8 * latents.shape[-1] // stored.shape[-1]
    return stored.float().repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


@functools.cache
def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


@functools.cache
def read_tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file)
