"""The control branch: copied from a U-Net, zero at first, in batches, folders, dtypes and under checkpointing."""

import copy
import re

import pytest
import tiny_star
import torch
from diffattn.pipelines.video_sr.i2vgenxl.networks.controlnet import STARControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

import diffattn


@pytest.fixture(scope="module")
def branch() -> STARControlNetModel:
    return tiny_star.controlnet()


def run(branch: STARControlNetModel, x: Tensor | None = None, **options: object) -> list[Tensor]:
    x = tiny_star.latents() if x is None else x
    hint = tiny_star.latents(x.shape[2], *x.shape[3:], batch=len(x), seed=5).to(x.dtype)
    down, mid = branch(x, 500, tiny_star.text(len(x)).to(x.dtype), hint, return_dict=False, **options)
    return [*down, mid]


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_a_new_branch_changes_nothing(layers: int) -> None:
    unet = tiny_star.unet(layers_per_block=layers)
    branch = STARControlNetModel.from_unet(unet).eval()
    residuals = run(branch)
    assert len(residuals) == 4 * (layers + 1) + 1 and not any(residual.any() for residual in residuals)
    x, text = tiny_star.latents(), tiny_star.text()
    given = {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}
    assert torch.equal(unet(x, 500, text, **given).sample, unet(x, 500, text).sample)


@torch.no_grad()
def test_it_is_a_copy_of_the_encoder() -> None:
    """With a hint of 0 and unit zero convolutions the residuals are what the U-Net itself has there."""
    unet = tiny_star.unet().to(torch.float64)
    branch = STARControlNetModel.from_unet(unet).eval()
    assert branch.dtype == torch.float64
    for convolution in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
        convolution.weight.copy_(torch.eye(convolution.out_channels)[..., None, None])
    seen: dict[int | str, Tensor] = {}
    mid = unet.mid_block.register_forward_hook(lambda block, args, out: seen.update(mid=out))
    x = tiny_star.latents(batch=2).double()
    residuals = run(branch, x)
    first = unet.transformer_in.register_forward_hook(lambda block, args, out: seen.update({0: out[0]}))
    unet(x, 500, tiny_star.text(2).double())
    mid.remove(), first.remove()
    torch.testing.assert_close(residuals[-1], seen["mid"])
    torch.testing.assert_close(residuals[0], seen[0])
    unet.conv_in.weight.zero_()
    assert branch.conv_in.weight.any()


@torch.no_grad()
def test_the_hint_counts_and_the_scale_multiplies(branch) -> None:
    x, text = tiny_star.latents(), tiny_star.text()
    one = branch(x, 500, text, tiny_star.latents(seed=5))
    other = branch(x, 500, text, tiny_star.latents(seed=6))
    half = branch(x, 500, text, tiny_star.latents(seed=5), conditioning_scale=0.5)
    assert not torch.allclose(one.mid_block_res_sample, other.mid_block_res_sample, atol=0.1)
    for whole, part in zip(one.down_block_res_samples, half.down_block_res_samples, strict=True):
        torch.testing.assert_close(0.5 * whole, part)
    torch.testing.assert_close(0.5 * one.mid_block_res_sample, half.mid_block_res_sample)


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(branch) -> None:
    x, text, times = tiny_star.latents(batch=2, height=2, width=16), tiny_star.text(2), torch.tensor([3, 999])
    hint = tiny_star.latents(batch=2, height=2, width=16, seed=9)
    together = branch(x, times, text, hint)
    for i in range(2):
        one = branch(x[i : i + 1], times[i], text[i : i + 1], hint[i : i + 1])
        for many, alone in zip(together.down_block_res_samples, one.down_block_res_samples, strict=True):
            torch.testing.assert_close(many.unflatten(0, (2, 3))[i], alone, atol=1e-5, rtol=1e-4)
    assert branch(x, 3, text, hint).mid_block_res_sample.shape == (6, 16, 2, 2)
    torch.testing.assert_close(branch(x, 3.0, text, hint)[1], branch(x, torch.tensor([3, 3]), text, hint)[1])


def test_wrong_latents_and_hints_are_refused(branch) -> None:
    text = tiny_star.text()
    with pytest.raises(ValueError, match="pad or crop to 10 x 8 or 18 x 8"):
        branch(tiny_star.latents(2, 12, 8), 5, text, tiny_star.latents(2, 12, 8))
    for hint in (tiny_star.latents(2), tiny_star.latents(3, 10, 16), tiny_star.latents(batch=2), torch.zeros(4)):
        with pytest.raises(ValueError, match=re.escape(f"got {tuple(hint.shape)}; encode the clip")):
            branch(tiny_star.latents(3), 5, text, hint)
    with pytest.raises(ValueError, match="expected latents of the shape"):
        branch(torch.zeros(3, 4, 10), 5, text, torch.zeros(3, 4, 10))


def test_checkpointing_changes_no_gradient(branch) -> None:
    """Two sizes, one after the other, go back in the same order: each block is computed again on its own grid."""
    gradients = []
    for checkpointing in (False, True):
        made = copy.deepcopy(branch)
        if checkpointing:
            made.enable_gradient_checkpointing()
            assert made.is_gradient_checkpointing
        losses = [
            sum(r.square().mean() for r in run(made, tiny_star.latents(2, *size))) for size in ((10, 16), (18, 8))
        ]
        for loss in losses:
            loss.backward()
        gradients.append({name: parameter.grad for name, parameter in made.named_parameters()})
    plain, again = gradients
    assert all(gradient is not None and gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_a_folder_gives_the_same_branch(branch, tmp_path) -> None:
    branch.save_pretrained(tmp_path)
    loaded = STARControlNetModel.from_pretrained(tmp_path)
    assert loaded.config.liem and loaded.config.transformer_in_heads == 3
    own, read = branch.state_dict(), loaded.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[key], read[key]) for key in own)
    for got, want in zip(run(loaded), run(branch), strict=True):
        # the same weights at other addresses: some kernels sum what is not aligned in another order
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    half = STARControlNetModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for got, want in zip(run(half, tiny_star.latents().bfloat16()), run(branch), strict=True):
        assert got.dtype == torch.bfloat16 and (got.float() - want).norm() < 0.1 * want.norm()


@torch.no_grad()
def test_attention_processors_are_set_as_in_diffusers(branch) -> None:
    made, want = copy.deepcopy(branch), run(branch)
    count = 2 * (1 + 2 * 3 + 2)
    assert len(made.attn_processors) == count
    made.set_attn_processor(AttnProcessor())
    assert {type(processor) for processor in made.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(run(made), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_local_windows_on_the_spatial_layers(branch) -> None:
    want = run(branch)
    with diffattn.apply(branch, "neighborhood", kernel_size=31) as handle:
        assert len(handle.layers) == 3 + 1 and not any("temp" in layer.name for layer in handle.layers)
        for got, whole in zip(run(branch), want, strict=True):
            torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)
    with diffattn.apply(branch, "neighborhood", kernel_size=3):
        assert not torch.allclose(run(branch)[-1], want[-1], atol=1e-3)
    assert all(torch.equal(got, whole) for got, whole in zip(run(branch), want, strict=True))


def test_without_gates() -> None:
    plain = STARControlNetModel.from_unet(tiny_star.unet(liem=False))
    assert not any(".local" in name for name in plain.state_dict())
