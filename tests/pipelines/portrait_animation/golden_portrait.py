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
from golden_vectors import golden_root
from safetensors.torch import load_file
from torch import Tensor

SYSTEM = "xportrait"
NOT_CASES = ("tiny_inputs.safetensors", "tiny_config.json")
"""What cases are computed from; so are files of the kind "weights"."""

FACES = "face-prep"
"""The kind that is prepared before the networks, and tested apart."""


@dataclass(frozen=True)
class PortraitCase:
    """One case of a file, or the whole file."""

    file: Path
    name: str
    """"all" for the whole file."""
    entry: dict[str, Any]
    """What the index says about the file."""

    @property
    def kind(self) -> str:
        """For JSON files their name, for all others what the index says."""
        return self.file.stem if self.entry["kind"] == "json" else str(self.entry["kind"])

    def spec(self) -> Any:
        """The whole of a JSON file."""
        return read_json(self.file)

    def config(self) -> dict[str, Any]:
        """What the index says about this case of a file of several."""
        return dict(self.entry["cases"][self.name])

    def tensors(self) -> dict[str, Tensor]:
        """Those of the case, without its name; or all of the file."""
        found = read_tensors(self.file)
        if "cases" not in self.entry:
            return found
        return {key.removeprefix(f"{self.name}."): t for key, t in found.items() if key.startswith(f"{self.name}.")}

    def close(self, name: str, got: Tensor, want: Tensor) -> None:
        """Compare by the tolerance of the index: relative L2, of all tensors or of each, or `atol` and `rtol`."""
        tolerance = self.entry["tolerance"]
        assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.shape}, expected {want.shape}"
        if "atol" in tolerance:
            torch.testing.assert_close(got, want, atol=tolerance["atol"], rtol=tolerance.get("rtol", 0.0))
            return
        allowed = tolerance["rel_l2"]
        allowed = allowed[name] if isinstance(allowed, dict) else allowed
        error = float((got.double() - want.double()).norm() / want.double().norm())
        assert error <= allowed, f"{name}: relative L2 {error:.2e}, allowed {allowed:.1e}"


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
    """Of the networks that the set was recorded from."""
    spec = read_json(folder / "tiny_config.json")
    variant, vae = spec["variant"], spec["ldm_params"]["first_stage_config"]["params"]["ddconfig"]
    assert variant["mm_heads"] == variant["num_heads"] and variant["video_length"] == 16
    return Sizes(
        channels=tuple(variant["model_channels"] * factor for factor in variant["channel_mult"]),
        heads=variant["num_heads"],
        text_tokens=5,
        text_width=variant["context_dim"],
        positions=variant["max_len"],
        latent_side=16,
        vae_channels=tuple(vae["ch"] * factor for factor in vae["ch_mult"]),
        vae_layers=vae["num_res_blocks"],
    )


def tiny_weights(folder: Path) -> dict[str, Tensor]:
    """All networks' weights under their official names; they are stored as float16, which they are exactly."""
    files = sorted(folder.glob("tiny_weights_*.safetensors"))
    return {key: tensor.float() for file in files for key, tensor in load_file(file).items()}


def full_size(quarter: Tensor) -> Tensor:
    """A control picture from its stored quarter."""
    return quarter.float().repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)


@functools.cache
def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


@functools.cache
def read_tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file)
