"""The own windows of LTX-2.5's decoder: the model's numbers, without a mask of tokens x tokens."""

import copy
import itertools
import pickle
import re
import subprocess
import sys
import warnings
from typing import Any

import diffusers
import pytest
import torch
from compiling import Graphs
from memory import largest_tensor
from models import flux
from releases import needs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import diffattn
from diffattn.swap.exact import ExactWindowProcessor

pytestmark = needs("diffusers", "0.42", "LTX-2.5's diffusion decoder")
NEAR = 1e-5

SIZES: dict[str, tuple[tuple[int, ...], tuple[int, int, int]]] = {
    # batch, frames, rows, columns; window
    "odd": ((2, 5, 7, 9), (3, 5, 5)),
    "one row of windows": ((1, 9, 7, 12), (3, 7, 7)),
    "even window": ((1, 6, 17, 12), (2, 4, 6)),
    "larger than the grid": ((2, 4, 6, 11), (11, 11, 11)),
    "one frame": ((1, 1, 24, 41), (3, 5, 5)),
}


def hand_mask(shape: tuple[int, ...], window: tuple[int, int, int]) -> Tensor:
    """Which cells a cell sees: along each axis a window that is moved inward at the edges, `(tokens, tokens)`."""
    widths = [min(width, size) for width, size in zip(window, shape, strict=True)]
    cells = list(itertools.product(*(range(size) for size in shape)))
    first = [
        [max(0, min(at - width // 2, size - width)) for at, size, width in zip(cell, shape, widths, strict=True)]
        for cell in cells
    ]
    behind = torch.tensor(cells) - torch.tensor(first)[:, None]
    return ((behind >= 0) & (behind < torch.tensor(widths))).all(2)


def module() -> Any:
    from diffusers.models.autoencoders import ltx2_diffusion_decoder

    return ltx2_diffusion_decoder


def layer(window: tuple[int, int, int], heads: int = 2) -> Any:
    return module().LTX2VideoVaeNeighborhoodAttention(8 * heads, window, head_dim=8).eval()


def decoder() -> Any:
    """Windows of other sizes in every stage."""
    return diffusers.LTX2VideoDiffusionDecoderModel(
        latent_channels=4,
        patch_size=2,
        decoder_head_dim=8,
        decoder_stage_channels=(64, 32, 16, 16, 16),
        decoder_stage_depths=(1, 1, 1, 1, 2),
        decoder_stage_kernels=((3, 3, 3), (3, 3, 3), (3, 3, 5), (3, 5, 3)),
        decoder_stage5_kernel=(1, 5, 7),
        decoder_upsample_strides=((1, 1, 2), (2, 1, 1), (1, 2, 1), (1, 1, 1)),
        decoder_upsample_channel_reductions=(2, 2, 1, 1),
        decoder_t_emb_dim=16,
        temporal_compression_ratio=2,
        spatial_compression_ratio=4,
    ).eval()


def pipeline() -> Any:
    return diffusers.LTX2VideoDiffusionDecodePipeline(decoder(), diffusers.FlowMatchEulerDiscreteScheduler())


def processors(model: Any) -> dict[str, Any]:
    return {name: part.processor for name, part in model.named_modules() if hasattr(part, "processor")}


def decode(model: Any, height: int = 3, width: int = 4) -> Tensor:
    latents = torch.randn(2, 4, 2, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention warns where it is not compiled
        decoded: Tensor = model.decode(latents, generator=torch.Generator().manual_seed(0)).sample
    return decoded


@pytest.mark.parametrize("name", SIZES)
def test_a_layer_has_the_numbers_of_its_own_processor(name: str) -> None:
    shape, window = SIZES[name]
    own = layer(window)
    hidden = torch.randn(*shape, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = own.processor(own, hidden)
        for backend in ("auto", "dense", "tiled"):
            with diffattn.apply_exact(own, backend=backend):
                torch.testing.assert_close(own.processor(own, hidden), want, atol=NEAR, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["odd", "even window"])
def test_half_precision_is_no_farther_off_than_the_layers_own_processor(name: str, dtype: torch.dtype) -> None:
    shape, window = SIZES[name]
    own = layer(window).to(dtype)
    hidden = torch.randn(*shape, 16, dtype=dtype)
    # the projections in half precision, attention in float32 by a mask, then the projection back
    q, k, v = (part.flatten(1, 3).transpose(1, 2).float() for part in own.project_qkv(hidden))
    inside = hand_mask(shape[1:], window)
    attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=inside, scale=1.0)
    want = copy.deepcopy(own).float().to_out[0](attended.transpose(1, 2).flatten(2).unflatten(1, shape[1:]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = (own.processor(own, hidden).float() - want).abs().max()
        for backend in ("auto", "dense", "tiled"):
            with diffattn.apply_exact(own, backend=backend):
                got = own.processor(own, hidden)
            assert got.dtype == dtype
            assert (got.float() - want).abs().max() <= 1.5 * stock + torch.finfo(dtype).eps


def test_a_decode_has_the_models_numbers_and_restore_is_bit_for_bit() -> None:
    model = decoder()
    before, want = processors(model), decode(model)
    assert want.shape == (2, 3, 3, 12, 16)
    handle = diffattn.apply_exact(model)
    assert handle.layers == [name for name in before] and len(before) == 6
    assert (decode(model) - want).abs().max() < NEAR
    handle.restore()
    assert all(model.get_submodule(name).processor is own for name, own in before.items())
    assert torch.equal(decode(model), want)


def test_a_tiled_decode_has_the_models_numbers() -> None:
    model = decoder()
    whole = decode(model, 6, 8)
    model.enable_tiling(16, 16, 8, 12, 12, 8)
    want = decode(model, 6, 8)
    assert (want - whole).abs().max() > 0.01
    with diffattn.apply_exact(model):
        assert (decode(model, 6, 8) - want).abs().max() < NEAR


def test_gradients() -> None:
    own = layer((3, 5, 5))
    hidden = torch.randn(1, 5, 8, 11, 16)
    found = []
    for backend in ("dense", "tiled"):
        given = hidden.clone().requires_grad_()
        with diffattn.apply_exact(own, backend=backend):
            own(given).square().sum().backward()
        found.append(given.grad)
    torch.testing.assert_close(found[0], found[1], atol=NEAR, rtol=0.0)


@pytest.mark.compile
def test_compiled_blocks_are_a_graph_for_each_stage_with_the_same_numbers() -> None:
    """With a generator, the whole decoder is no single graph: diffusers draws the noise in between."""
    model, graphs = decoder(), Graphs()
    diffattn.apply_exact(model)
    want = decode(model)
    for block in (model.decoder.det_stages[2][0], *model.decoder.diff_blocks):
        block.compile(fullgraph=True, backend=graphs)
    torch.testing.assert_close(decode(model), want, atol=NEAR, rtol=0.0)
    assert graphs.count == 2


def test_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*args: Any) -> None:
        raise AssertionError("a mask of tokens x tokens")

    model = decoder()
    monkeypatch.setattr(module(), "_neighborhood_block_mask", made)
    with pytest.raises(AssertionError):
        decode(model)
    with diffattn.apply_exact(model):
        decode(model)


BIG = """
import re, torch
from diffusers import LTX2VideoDiffusionDecoderModel
import diffattn
model = LTX2VideoDiffusionDecoderModel(
    latent_channels=4, decoder_head_dim=8, decoder_stage_channels=(64, 32, 16, 16, 8),
    decoder_stage_depths=(1, 1, 1, 1, 1), decoder_t_emb_dim=16,
).eval()
diffattn.apply_exact(model, backend="tiled")
with torch.no_grad():
    decoded = model.decode(torch.randn(1, 4, 3, 7, 9)).sample
assert decoded.shape == (1, 3, 17, 224, 288) and bool(decoded.isfinite().all())
# not `ru_maxrss`, which begins with the peak of the process that started this one
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def test_where_a_mask_takes_4_gigabytes_the_whole_process_stays_below_1() -> None:
    """68,544 tokens in the last stage, with windows of the real sizes."""
    with FakeTensorMode():
        mask = largest_tensor(lambda: module()._neighborhood_block_mask(17, 56, 72, (11, 11, 11), torch.device("cpu")))
    assert mask > 4e9
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1e9


def test_a_pipeline_and_its_summary() -> None:
    pipe = pipeline()
    before = processors(pipe.diffusion_decoder)
    assert diffattn.apply_exact(pipe).layers == [f"diffusion_decoder.{name}" for name in before]
    rows = diffattn.summary(pipe).rows
    assert [row.layer for row in rows] == [*before] and not any(row.swapped for row in rows)
    assert rows[0].note == "its own window, neighborhood(kernel_size=[3, 3, 3]), in bounded memory [auto]"
    assert diffattn.summary(pipe.diffusion_decoder).rows == rows
    diffattn.restore(pipe)
    assert processors(pipe.diffusion_decoder) == before
    with pytest.raises(ValueError, match="nothing to restore"):
        diffattn.restore(pipe)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, NEAR), (torch.bfloat16, 2e-2)])
def test_a_pipeline_makes_the_same_video(dtype: torch.dtype, near: float) -> None:
    """Moved to its dtype after the call, and before it."""
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 2, 3, 5)

    def video() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frames: Tensor = pipe(
                latents, denormalize=False, generator=torch.Generator().manual_seed(0), output_type="pt"
            ).frames
        return frames.float()

    handle = diffattn.apply_exact(pipe)
    pipe.to(dtype)
    got = video()
    handle.restore()
    want = video()
    assert got.shape == (1, 3, 3, 12, 20) and want.std() > 0.1
    assert not torch.equal(got, want) and (got - want).abs().max() < near
    with diffattn.apply_exact(pipe):
        assert torch.equal(video(), got)


def test_a_modular_pipeline() -> None:
    from diffusers.modular_pipelines.ltx2.decoders import LTX2DiffusionVaeDecoderStep

    pipe = LTX2DiffusionVaeDecoderStep().init_pipeline()
    with pytest.raises(ValueError, match="got LTX2ModularPipeline with no models"):
        diffattn.apply_exact(pipe)
    pipe.update_components(diffusion_decoder=decoder())
    before = processors(pipe.diffusion_decoder)
    assert len(diffattn.apply_exact(pipe).layers) == len(before)
    diffattn.restore(pipe)
    assert processors(pipe.diffusion_decoder) == before


def test_with_blocks_put_back_what_they_found() -> None:
    model = decoder()
    before = processors(model)
    outer = diffattn.apply_exact(model, backend="tiled")
    placed = processors(model)
    with diffattn.apply_exact(model, backend="dense"):
        assert {own.backend for own in processors(model).values()} == {"dense"}
        with pytest.raises(ValueError, match="no longer in place"):
            outer.restore()
    assert processors(model) == placed
    outer.restore()
    assert processors(model) == before


def test_layers_that_got_another_processor_since_are_left(caplog: pytest.LogCaptureFixture) -> None:
    model = decoder()
    handle = diffattn.apply_exact(model)
    name, own = handle.layers[0], module().LTX2VideoVaeNeighborhoodAttnProcessor()
    model.get_submodule(name).processor = own
    handle.restore()
    assert model.get_submodule(name).processor is own and f"{name} carries" in caplog.text
    assert not any(isinstance(processor, ExactWindowProcessor) for processor in processors(model).values())


def test_copies_have_it_too() -> None:
    model = decoder()
    diffattn.apply_exact(model)
    want = decode(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(decode(made), want)
        diffattn.restore(made)
        assert all(type(own).__name__ == "LTX2VideoVaeNeighborhoodAttnProcessor" for own in processors(made).values())
    assert all(isinstance(own, ExactWindowProcessor) for own in processors(model).values())


def test_what_cannot_be_served_is_refused_with_nothing_changed() -> None:
    model = decoder()
    before = processors(model)
    with pytest.raises(ValueError, match="neighborhood has no backend 'fast'; it has auto, dense"):
        diffattn.apply_exact(model, backend="fast")
    with pytest.raises(ValueError, match="LTX2VideoDiffusionDecoderModel, or a pipeline with one; got FluxTransf"):
        diffattn.apply_exact(flux().model)
    with pytest.raises(ValueError, match="got str with no models"):
        diffattn.apply_exact("decoder")
    unet = diffusers.UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=8
    )
    with pytest.raises(ValueError, match="got DDPMPipeline with unet UNet2DModel; diffattn.apply swaps the attention"):
        diffattn.apply_exact(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()))
    last = [*before][-1]
    model.get_submodule(last).processor = other = lambda attn, hidden, mask: hidden
    with pytest.raises(ValueError, match=f"expected {re.escape(last)} with a processor of its family.*got function"):
        diffattn.apply_exact(model)
    assert processors(model) == {**before, last: other}


def choose(model: Any, backend: str) -> None:
    """As `set_attention_backend` of the model, which sets diffusers' own default too."""
    for name in processors(model):
        model.get_submodule(name).set_attention_backend(backend)


def test_settings_of_diffusers_that_cannot_be_served_are_refused() -> None:
    model = decoder()
    choose(model, "native")
    with pytest.raises(ValueError, match="expected the attention backend of the decoder's own, flex;"):
        diffattn.apply_exact(model)
    choose(model, "flex")
    diffattn.apply_exact(model)
    decode(model)
    choose(model, "native")
    with pytest.raises(ValueError, match=re.escape("choose a kernel by diffattn.apply_exact(backend=)")):
        decode(model)
    choose(model, "flex")
    model.decoder.diff_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(ValueError, match="decode on one rank"):
        decode(model)


@pytest.mark.parametrize("mechanism", ["softmax", "routing"])
def test_apply_names_apply_exact(mechanism: str) -> None:
    pipe = pipeline()
    for target in (pipe, pipe.diffusion_decoder):
        with pytest.raises(ValueError, match="in windows already.*diffattn.apply_exact computes them in bounded mem"):
            diffattn.apply(target, mechanism)
