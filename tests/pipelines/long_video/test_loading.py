"""Models in the layouts that exist: a stock pipeline, and VideoCrafter2's UNet; strictly."""

import json
from pathlib import Path

import pytest
import tiny_video
import torch
from diffattn.pipelines.long_video import FpsUNet3D, open_parts
from diffattn.pipelines.long_video.loading import fingerprint, open_unet, sources
from diffusers import UNet3DConditionModel

CPU = torch.device("cpu")


def forward(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(1, 5, 12, generator=generator)
    with torch.no_grad():
        return unet(sample, 500, text, return_dict=False)[0]


def test_a_stock_pipeline_has_a_plain_unet(model: Path) -> None:
    parts = open_parts(str(model), None, torch.float32, CPU)
    assert type(parts.unet) is UNet3DConditionModel


def test_the_released_layout_loads_and_the_frame_rate_counts(model: Path, tmp_path: Path) -> None:
    want = tiny_video.write_fps_unet(tmp_path)
    unet = open_parts(str(model), str(tmp_path), torch.float32, CPU).unet
    assert type(unet) is FpsUNet3D and fingerprint(unet) == fingerprint(want)
    assert {name.split(".")[0] for name in unet.state_dict()} >= {"fps_embedding"}
    at_24 = forward(unet)
    assert torch.equal(at_24, forward(want))
    unet.fps = 8
    assert float((forward(unet) - at_24).abs().max()) > 1e-3


def test_the_frame_rate_is_added_to_the_time_embedding(tmp_path: Path) -> None:
    unet = tiny_video.write_fps_unet(tmp_path)
    time = torch.randn(2, tiny_video.UNET["block_out_channels"][0])
    plain = unet.time_embedding.linear_2(unet.time_embedding.act(unet.time_embedding.linear_1(time)))
    added = unet.fps_embedding(unet.fps_proj(torch.tensor([24.0])))
    torch.testing.assert_close(unet.time_embedding(time), plain + added)


@pytest.mark.parametrize(
    ("name", "instead", "message"),
    [
        ("fps_embedding.linear_1.weight", None, "1 missing: fps_embedding.linear_1.weight"),
        ("conv_in.bias", "conv_in.bogus", "1 missing: conv_in.bias; 1 unexpected: conv_in.bogus"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, name: str, instead: str | None, message: str) -> None:
    tiny_video.write_fps_unet(tmp_path)
    tiny_video.drop_weight(tmp_path, name, instead)
    with pytest.raises(ValueError, match=message):
        open_unet(str(tmp_path), torch.float32)


def test_other_families_are_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline", "transformer": ["diffusers", "Wan"]}')
    with pytest.raises(ValueError, match="is a WanPipeline, and a long video needs"):
        open_parts(str(tmp_path), None, torch.float32, CPU)
    other = tmp_path / "unet"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="is a UNet2DConditionModel, expected UNet3DConditionModel"):
        open_parts(str(model), str(other), torch.float32, CPU)


def test_names_of_models() -> None:
    assert sources("videocrafter2") == ("cerspense/zeroscope_v2_576w", "adamdad/videocrafterv2_diffusers")
    assert sources("owner/name", "owner/other") == ("owner/name", "owner/other")
    with pytest.raises(ValueError, match="no folder './nothing'"):
        sources("./nothing")
