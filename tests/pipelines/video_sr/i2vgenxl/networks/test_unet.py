"""The U-Net: legal sizes, LIEMs in all blocks, the names of weights, batches, copies, folders, dtypes and swaps."""

import copy
import itertools
import re

import pytest
import tiny_star
import torch
from diffattn.pipelines.video_sr.i2vgenxl.networks.unet import STARUNet3DConditionModel, legal_size
from diffattn.pipelines.video_sr.liem import LIEMSpatial, LIEMTemporal
from diffusers import UNet3DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

import diffattn


@pytest.fixture(scope="module")
def unet() -> STARUNet3DConditionModel:
    return tiny_star.unet()


@torch.no_grad()
def run(unet: STARUNet3DConditionModel, x: Tensor | None = None, **options: object) -> Tensor:
    x = tiny_star.latents() if x is None else x
    return unet(x, 500, tiny_star.text(len(x)), **options).sample


@pytest.mark.parametrize("downsamplings", [0, 1, 2, 3, 4])
def test_legal_sizes_are_those_that_come_back(downsamplings: int) -> None:
    """By the arithmetic of the samplers; and no size between is."""

    def comes_back(rows: int, columns: int) -> bool:
        sizes = [(rows, columns)]
        for _ in range(downsamplings):
            r, c = sizes[-1]
            sizes.append(((r + 1) // 2 + 1, (c - 1) // 2 + 1))
        return all((2 * r - 2, 2 * c) == size for size, (r, c) in itertools.pairwise(sizes))

    legal = {(r, c) for r, c in itertools.product(range(2, 70), range(1, 70)) if comes_back(r, c)}
    rows, columns = sorted({r for r, _ in legal}), sorted({c for _, c in legal})
    for height, width in itertools.product(range(1, 50), (1, 5, 16, 17, 33)):
        want = next(r for r in rows if r >= height), next(c for c in columns if c >= width)
        assert legal_size(height, width, downsamplings) == want


def test_the_released_sizes_are_legal() -> None:
    assert legal_size(90, 160) == (90, 160) and legal_size(91, 161) == (98, 168) and legal_size(1, 1) == (2, 8)
    for size in ((0, 8), (10, -1)):
        with pytest.raises(ValueError, match="at least one row and one column"):
            legal_size(*size)


@pytest.mark.parametrize(("rows", "columns", "frames"), [(10, 8, 1), (2, 24, 2), (26, 16, 3)])
def test_the_velocity_has_the_shape_of_the_latents(unet, rows: int, columns: int, frames: int) -> None:
    x = tiny_star.latents(frames, rows, columns)
    velocity = run(unet, x)
    assert velocity.shape == x.shape and 0.05 < velocity.std() < 20


def test_the_number_of_levels_decides_what_is_legal() -> None:
    two = tiny_star.unet(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    assert run(two, tiny_star.latents(2, 6, 4)).shape == (1, 4, 2, 6, 4)
    with pytest.raises(ValueError, match=re.escape("got 7 x 4; pad or crop to 6 x 4 or 8 x 4")):
        run(two, tiny_star.latents(2, 7, 4))


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (12, 16, "got 12 x 16; pad or crop to 10 x 16 or 18 x 16"),
        (10, 17, "got 10 x 17; pad or crop to 10 x 16 or 10 x 24"),
        (16, 12, "got 16 x 12; pad or crop to 10 x 8 or 10 x 16 or 18 x 8 or 18 x 16"),
        (1, 3, "got 1 x 3; pad or crop to 2 x 8"),
    ],
)
def test_other_sizes_are_refused(unet, rows: int, columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"2 more than a multiple of 8 .*{message}$"):
        run(unet, tiny_star.latents(2, rows, columns))


@pytest.mark.parametrize("shape", [(1, 4, 10, 8), (1, 8, 3, 10, 8), (4, 3, 10, 8)])
def test_other_shapes_are_refused(unet, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shape (b, 4, frames, rows, columns); got {shape}")):
        run(unet, torch.zeros(shape))


def test_residuals_are_added_or_refused(unet) -> None:
    down, mid = tiny_star.controlnet()(
        tiny_star.latents(), 500, tiny_star.text(), tiny_star.latents(seed=1), return_dict=False
    )
    both = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert not torch.allclose(run(unet, **both), run(unet), atol=1e-2)
    for changes in (
        {"down_block_additional_residuals": down[:-1]},
        {"mid_block_additional_residual": None},
        {"down_block_additional_residuals": None},
    ):
        with pytest.raises(ValueError, match="expected 8 residuals and the one of the middle"):
            run(unet, **{**both, **changes})


def test_every_block_has_its_gates(unet) -> None:
    blocks = {name: m for name, m in unet.named_modules() if isinstance(m, BasicTransformerBlock)}
    for name, block in blocks.items():
        spatial = "temp_attentions" not in name and "transformer_in" not in name
        assert isinstance(block.local1, LIEMSpatial if spatial else LIEMTemporal), name
        assert hasattr(block, "local2") != spatial
    gates = [name for name in unet.state_dict() if ".local" in name]
    temporal = [name for name in gates if "local2" in name]
    assert len(gates) == len(blocks) + len(temporal) and len(blocks) == 2 * len(temporal) - 1


def test_the_other_weights_are_the_stock_models(unet) -> None:
    stock = UNet3DConditionModel(**{k: v for k, v in tiny_star.ENCODER.items() if k != "transformer_in_heads"})
    own = {name: tensor.shape for name, tensor in unet.state_dict().items() if ".local" not in name}
    assert list(own) == list(stock.state_dict())
    plain = STARUNet3DConditionModel(**{**tiny_star.ENCODER, "transformer_in_heads": 8}, liem=False)
    assert {n: t.shape for n, t in plain.state_dict().items()} == {n: t.shape for n, t in stock.state_dict().items()}


def test_every_gate_counts(unet) -> None:
    """With weights of deviation 1, each changes the velocity when it is replaced by 1."""
    want = run(unet)
    for name, module in unet.named_modules():
        if isinstance(module, LIEMSpatial | LIEMTemporal):
            hook = module.register_forward_hook(lambda module, args, output: args[0])
            assert not torch.equal(run(unet), want), name
            hook.remove()
    assert torch.equal(run(unet), want)


def test_samples_of_a_batch_do_not_meet(unet) -> None:
    x, text, times = tiny_star.latents(batch=3), tiny_star.text(3), torch.tensor([3, 500, 999])
    with torch.no_grad():
        together = unet(x, times, text).sample
        apart = [unet(x[i : i + 1], times[i], text[i : i + 1], return_dict=False)[0] for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-4)


def test_calls_of_other_sizes_leave_nothing_behind(unet) -> None:
    wide, tall = tiny_star.latents(2, 10, 16), tiny_star.latents(1, 26, 8)
    want = run(unet, wide)
    run(unet, tall)
    assert torch.equal(run(unet, wide), want)


def test_a_copy_is_another_network(unet) -> None:
    want, other = run(unet), copy.deepcopy(unet)
    assert torch.equal(run(other), want)
    for name, parameter in other.named_parameters():
        if ".local" in name:
            parameter.data.zero_()
    assert torch.equal(run(unet), want) and not torch.allclose(run(other), want, atol=1e-3)


@pytest.mark.slow
def test_a_folder_gives_the_same_network(unet, tmp_path, caplog) -> None:
    unet.save_pretrained(tmp_path)
    loaded = STARUNet3DConditionModel.from_pretrained(tmp_path)
    assert (loaded.config.liem, loaded.config.transformer_in_heads) == (True, 3)
    assert loaded.downsamplings == 3 and tuple(loaded.config.downsample_padding) == (2, 1)
    for name, tensor in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.testing.assert_close(run(loaded), run(unet), atol=1e-6, rtol=1e-5)
    plain = STARUNet3DConditionModel.from_config(unet.config, liem=False)
    assert not any(".local" in name for name in plain.state_dict()) and plain.config.liem is False
    assert "not expected" not in caplog.text


def test_a_stock_configuration_is_taken_with_stars_padding() -> None:
    stock = UNet3DConditionModel(**{k: v for k, v in tiny_star.ENCODER.items() if k != "transformer_in_heads"})
    made = STARUNet3DConditionModel.from_config(stock.config)
    assert made.config.liem and made.down_blocks[0].downsamplers[0].conv.padding == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(unet, dtype: torch.dtype) -> None:
    want = run(unet)
    half = copy.deepcopy(unet).to(dtype)
    got = half(tiny_star.latents().to(dtype), 500, tiny_star.text().to(dtype)).sample
    assert got.dtype == dtype and (got.float() - want).norm() < 0.2 * want.norm()


def test_a_window_over_everything_is_full_attention(unet) -> None:
    want, layers = run(unet), len(list(unet.attn_processors))
    with diffattn.apply(unet, "neighborhood", kernel_size=31) as handle:
        names = {layer.name for layer in handle.layers}
        torch.testing.assert_close(run(unet), want, atol=1e-4, rtol=1e-4)
        assert all(layer.reached for layer in handle.layers)
    spatial = {
        name.removesuffix(".processor")
        for name in unet.attn_processors
        if ".attentions." in f".{name}" and name.endswith("attn1.processor")
    }
    assert names == spatial and len(names) == 3 + 1 + 6 and len(unet.attn_processors) == layers
    with diffattn.apply(unet, "neighborhood", kernel_size=3):
        assert not torch.allclose(run(unet), want, atol=1e-3)
    assert torch.equal(run(unet), want)
