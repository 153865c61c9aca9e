"""Colours, weights of tiles and preprocessing against numbers recorded from the official PASD."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffattn.pipelines.pixel_aware_sr.sampling.preprocess import prepare, restore_size, target_size
from diffattn.pipelines.pixel_aware_sr.sampling.vae_tiles import DECODER_MARGIN, ENCODER_MARGIN, padded_tiles
from golden_vectors import GoldenCase, assert_golden, golden_cases, run_golden, with_a_key_more, write_case
from PIL import Image
from torch import Tensor

from diffattn.media.color import adain_fix, blur, keep_luma, to_bytes, wavelet_fix, wavelet_split
from diffattn.media.windows import Tile, gaussian_weights


def color_fix(case: GoldenCase) -> None:
    t, levels, eps = case.tensors(), case.config["levels"], case.config["adain_eps"]
    assert case.config["unbiased_var"] is True, "a variance that is biased: another rule"
    content, style = t["content"], t["style"]
    got = {
        "wavelet": wavelet_fix(content, style, levels),
        "adain": adain_fix(content, style, eps),
        "content": content,
        "style": style,
    }
    got["content_high"], got["content_low"] = wavelet_split(content, levels)
    for name, want in t.items():
        if dilation := re.fullmatch(r"blur_r(\d+)", name):
            got[name] = blur(content, int(dilation[1]))
        elif name.endswith("_u8"):
            assert len(want) in (1, len(content))  # the released code makes an image of the first one alone
            got[name] = to_bytes(got[name.removesuffix("_u8")][: len(want)])
        assert_golden(name, got[name], want, case.tolerance)


def tile_weights(case: GoldenCase) -> None:
    config = case.config
    config.told("layout")
    assert (config["x_midpoint"], config["y_midpoint"]) == ("(n-1)/2", "n/2")
    for name, want in case.tensors().items():
        square, rectangle = re.fullmatch(r"weights_(\d+)", name), re.fullmatch(r"weights_rect_w(\d+)_h(\d+)", name)
        assert square or rectangle, f"unknown tensor {name}"
        width, height = (int(side) for side in (rectangle.groups() if rectangle else (square[1], square[1])))
        got = gaussian_weights(height, width, case.config["var"], official=True)
        assert_golden(name, got.expand_as(want), want, case.tolerance)


def tiled_vae_split(case: GoldenCase) -> None:
    assert case.spec["layout"] == "[x1,x2,y1,y2]"
    for asked in case.spec["cases"]:
        decoder = asked["is_decoder"]
        assert asked["pad"] == (DECODER_MARGIN if decoder else ENCODER_MARGIN)
        got = padded_tiles(asked["height"], asked["width"], asked["tile_size"], decoder=decoder)
        assert [box(tile.read) for tile in got] == asked["input_bboxes"]
        assert [box(tile.write.scaled(8 if decoder else 1 / 8)) for tile in got] == asked["output_bboxes"]


def box(tile: Tile) -> list[int]:
    return [tile.left, tile.left + tile.width, tile.top, tile.top + tile.height]


def preprocess_size_rules(case: GoldenCase) -> None:
    for asked in case.spec["cases"]:
        rules = {"upscale": asked["upscale"], "process_size": asked["process_size"], "task": asked["control_type"]}
        got = target_size(asked["width"], asked["height"], **rules)
        assert got == (asked["out_width"], asked["out_height"]), asked


def preprocess_pixels(case: GoldenCase) -> None:
    t, config = case.tensors(), case.config
    picture = Image.fromarray(t["input_u8_hwc"].numpy())
    rules = {"upscale": config["upscale"], "process_size": config["process_size"], "task": config["control_type"]}
    out = prepare(picture, **rules)
    assert out.size == target_size(*picture.size, **rules)
    assert_golden("out", as_tensor(out), t["out_u8_hwc"], case.tolerance)
    # gray images, whose upscale is ignored, come back at their own size
    back = t["back_u8_hwc"].shape[1] / picture.width
    assert back == config["upscale"] or (back == 1 and config["control_type"] == "grayscale")
    recorded = Image.fromarray(t["out_u8_hwc"].numpy())
    assert_golden("back", as_tensor(restore_size(recorded, *picture.size, back)), t["back_u8_hwc"], case.tolerance)


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture))


def colorization_merge(case: GoldenCase) -> None:
    t, config = case.tensors(), case.config
    assert (config["space"], config["resize"]) == ("YUV (OpenCV 8-bit)", "bilinear")
    gray, coloured = (t[name].permute(2, 0, 1)[None] / 255 for name in ("gray_rgb_u8_hwc", "colorized_rgb_u8_hwc"))
    got = to_bytes(keep_luma(gray, coloured), truncate=False)
    assert_golden("out", got[0].permute(1, 2, 0), t["out_rgb_u8_hwc"], case.tolerance)


CHECKS: dict[str, Any] = {
    check.__name__: check
    for check in (
        color_fix,
        tile_weights,
        tiled_vae_split,
        preprocess_size_rules,
        preprocess_pixels,
        colorization_merge,
    )
}
KINDS = set(CHECKS)
"""Kinds of PASD's cases that this file checks."""

CASES = [case for case in golden_cases("pasd") if case.values[0] is None or case.values[0].kind in KINDS]


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_pictures(case: GoldenCase) -> None:
    CHECKS[case.kind](case)


# ---- cases of our own


def test_a_key_that_is_not_used_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\['config.surprise'\]"):
        run_golden(test_pictures, with_a_key_more("pasd", "colorization_merge_111", tmp_path))
    with pytest.raises(AssertionError, match=r"\['cases.0.surprise'\]"):
        run_golden(test_pictures, with_a_key_more("pasd", "preprocess_sizes_public", tmp_path, "cases", 0))


def test_other_sizes(tmp_path: Path) -> None:
    """Three images, three levels, another eps: worked out in float64 tap by tap, bytes of the first image alone."""
    config = {"levels": 3, "adain_eps": 1e-3, "unbiased_var": True}
    content, style = torch.rand(2, 3, 3, 11, 7).unbind()

    def low(x: Tensor) -> Tensor:
        for apart in (1, 2, 4):
            x = taps(x, apart)
        return x

    wide, other = content.double(), style.double()
    mean, deviation = zip(*((x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + 1e-3).sqrt())
                            for x in (wide, other)), strict=True)  # fmt: skip
    results = {
        "content_low": low(wide),
        "content_high": wide - low(wide),
        "blur_r4": taps(wide, 4),
        "wavelet": wide - low(wide) + low(other),
        "adain": (wide - mean[0]) / deviation[0] * deviation[1] + mean[1],
    }
    tensors = {"content": content, "style": style} | {name: result.float() for name, result in results.items()}
    tensors["adain_u8"] = (results["adain"][:1].clamp(0, 1) * 255).to(torch.uint8)
    spec = {"kind": "color_fix", "config": config, "tolerance": {"atol": 1e-5, "rtol": 1e-5, "u8_atol": 1}}
    run_golden(test_pictures, write_case(tmp_path / "pasd", "own", spec, tensors))


def taps(x: Tensor, apart: int) -> Tensor:
    """The binomial filter of 3 x 3 taps, with the picture's edges repeated."""
    padded = torch.nn.functional.pad(x, (apart,) * 4, mode="replicate")
    rows, columns = x.shape[-2:]
    return sum(
        a * b / 16 * padded[..., i * apart : i * apart + rows, j * apart : j * apart + columns]
        for i, a in enumerate((1, 2, 1))
        for j, b in enumerate((1, 2, 1))
    )
