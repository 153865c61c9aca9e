"""The gates by hand, their places in the blocks, and blocks that are copied, checkpointed and moved."""

import copy

import pytest
import torch
from diffattn.pipelines.video_sr.liem import LIEMSpatial, LIEMTemporal, add_liem
from diffusers import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel


def spatial_transformer() -> Transformer2DModel:
    made = Transformer2DModel(2, 4, in_channels=8, cross_attention_dim=6, norm_num_groups=4, use_linear_projection=True)
    add_liem(made)
    made.transformer_blocks[0].local1.conv1.weight.data.normal_(0, 1)
    return made.eval()


def temporal_transformer() -> TransformerTemporalModel:
    made = TransformerTemporalModel(2, 4, in_channels=8, norm_num_groups=4)
    add_liem(made)
    for parameter in (made.transformer_blocks[0].local1, made.transformer_blocks[0].local2):
        parameter.conv1.weight.data.normal_(0, 1)
    return made.eval()


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_spatial_gate_by_hand(kernel_size: int) -> None:
    module, x = LIEMSpatial(kernel_size), torch.randn(2, 5, 4, 9)
    with torch.no_grad():
        y = module(x)
    r, weight = kernel_size // 2, module.conv1.weight[0]
    for n, row, column in ((0, 0, 0), (1, 3, 8), (0, 2, 4), (1, 1, 7)):
        total = torch.zeros(())
        for i in range(-r, r + 1):
            for j in range(-r, r + 1):
                if 0 <= row + i < 4 and 0 <= column + j < 9:
                    place = x[n, :, row + i, column + j]
                    total = total + weight[0, i + r, j + r] * place.max() + weight[1, i + r, j + r] * place.mean()
        torch.testing.assert_close(y[n, :, row, column], x[n, :, row, column] * torch.sigmoid(total))


def test_temporal_gate_by_hand() -> None:
    module, x = LIEMTemporal(), torch.randn(3, 4, 6)
    weight = module.conv1.weight[0]
    want = x * torch.sigmoid(weight[0] * x.max(-1).values + weight[1] * x.mean(-1))[..., None]
    torch.testing.assert_close(module(x), want)
    torch.testing.assert_close(module(x[:, :1]), want[:, :1])  # a token sees itself alone


@pytest.mark.parametrize("kernel_size", [0, 4, -3])
def test_even_kernels_are_refused(kernel_size: int) -> None:
    with pytest.raises(ValueError, match=f"expected an odd kernel_size; got {kernel_size}"):
        LIEMSpatial(kernel_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    for module, x in ((LIEMSpatial(), torch.randn(2, 6, 5, 7)), (LIEMTemporal(), torch.randn(2, 5, 6))):
        want = module(x)
        got = module.to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_gates_come_before_the_norms_and_leave_the_residual() -> None:
    made, x, text = spatial_transformer(), torch.randn(2, 8, 3, 5), torch.randn(2, 4, 6)
    seen: dict[str, torch.Tensor] = {}
    block = made.transformer_blocks[0]
    for name in ("norm1", "norm2", "norm3"):
        block.get_submodule(name).register_forward_hook(lambda norm, args, out, name=name: seen.update({name: args[0]}))
    block.register_forward_pre_hook(lambda block, args: seen.update(block=args[0]))
    block.attn1.register_forward_hook(lambda layer, args, out: seen.update(attn1=out))
    made(x, encoder_hidden_states=text, return_dict=False)
    tokens = seen["block"]
    gated = block.local1(tokens.transpose(1, 2).unflatten(2, (3, 5))).flatten(2).transpose(1, 2)
    assert torch.equal(seen["norm1"], gated) and not torch.allclose(gated, tokens, atol=0.1)
    assert torch.equal(seen["norm2"], seen["attn1"] + tokens)


@torch.no_grad()
def test_temporal_blocks_have_a_gate_before_each_attention() -> None:
    made, x = temporal_transformer(), torch.randn(6, 8, 2, 3)
    seen: dict[str, torch.Tensor] = {}
    block = made.transformer_blocks[0]
    for name in ("norm1", "norm2"):
        block.get_submodule(name).register_forward_hook(lambda norm, args, out, name=name: seen.update({name: args[0]}))
    block.register_forward_pre_hook(lambda block, args: seen.update(block=args[0]))
    block.attn1.register_forward_hook(lambda layer, args, out: seen.update(attn1=out))
    made(x, num_frames=3)
    assert torch.equal(seen["norm1"], block.local1(seen["block"]))
    assert torch.equal(seen["norm2"], block.local2(seen["attn1"] + seen["block"]))


@torch.no_grad()
@pytest.mark.parametrize("by_name", [True, False])
def test_the_grid_is_that_of_the_call(by_name: bool) -> None:
    """Two images of as many tokens, in turn."""
    made, text = spatial_transformer(), torch.randn(1, 4, 6)
    alone = copy.deepcopy(made)
    wide, tall = torch.randn(1, 8, 3, 10), torch.randn(1, 8, 10, 3)

    def run(x: torch.Tensor) -> torch.Tensor:
        if by_name:
            return made(hidden_states=x, encoder_hidden_states=text, return_dict=False)[0]
        return made(x, text, return_dict=False)[0]

    first, second = run(wide), run(tall)
    assert torch.equal(run(wide), first) and torch.equal(run(tall), second)
    assert torch.equal(alone(tall, text, return_dict=False)[0], second)


@torch.no_grad()
def test_a_copy_has_gates_of_its_own() -> None:
    for made, call in (
        (spatial_transformer(), {"encoder_hidden_states": torch.randn(2, 4, 6)}),
        (temporal_transformer(), {"num_frames": 2}),
    ):
        x = torch.randn(2, 8, 3, 5)
        want, other = made(x, return_dict=False, **call)[0], copy.deepcopy(made)
        for parameter in other.transformer_blocks[0].local1.parameters():
            parameter.fill_(-20)
        assert torch.equal(made(x, return_dict=False, **call)[0], want)
        assert not torch.allclose(other(x, return_dict=False, **call)[0], want, atol=1e-2)


def test_a_block_alone_lacks_the_grid() -> None:
    with pytest.raises(ValueError, match="call the whole transformer"):
        spatial_transformer().transformer_blocks[0](torch.randn(1, 15, 8))


def test_gates_and_what_lies_before_them_learn() -> None:
    made = spatial_transformer()
    x = torch.randn(1, 8, 3, 5, requires_grad=True)
    made(x, torch.randn(1, 4, 6), return_dict=False)[0].square().sum().backward()
    assert made.transformer_blocks[0].local1.conv1.weight.grad.abs().max() > 0 and x.grad.abs().min() > 0
