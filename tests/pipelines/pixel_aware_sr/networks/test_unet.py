"""PASD's networks beyond the recorded numbers: without residuals, from a stock U-Net, in training, under a swap."""

import copy

import diffusers
import pytest
import tiny_pasd
import torch
from diffattn.pipelines.pixel_aware_sr import PASDControlNetModel, PASDUNet2DConditionModel
from diffattn.pipelines.pixel_aware_sr.networks.paca import context_dims, is_pixel_aware
from torch import Tensor

import diffattn

ROWS, COLUMNS = 8, 16


def call(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    latents = torch.randn(batch, 4, ROWS, COLUMNS)
    return latents.to(dtype), torch.tensor(500), torch.randn(batch, 5, tiny_pasd.TEXT).to(dtype)


def residuals(control: PASDControlNetModel, batch: int = 2) -> dict[str, object]:
    picture = torch.rand(batch, 3, 8 * ROWS, 8 * COLUMNS, generator=torch.Generator().manual_seed(4))
    down, mid = control(*call(batch), picture, return_dict=False)
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}


@pytest.mark.parametrize("variant", ["full", "light"])
@torch.no_grad()
def test_without_residuals_it_is_the_stock_unet(variant):
    stock = diffusers.UNet2DConditionModel(**tiny_pasd.UNET).eval()
    model = PASDUNet2DConditionModel.from_unet(stock, variant).eval()
    control = tiny_pasd.controlnet()
    assert torch.equal(model(*call()).sample, stock(*call()).sample)
    assert not torch.equal(model(*call(), **residuals(control)).sample, stock(*call(), **residuals(control)).sample)
    assert torch.equal(model(*call()).sample, stock(*call()).sample)  # nothing stays behind


@torch.no_grad()
def test_from_unet_shares_the_base_weights():
    stock = diffusers.UNet2DConditionModel(**tiny_pasd.UNET)
    model = PASDUNet2DConditionModel.from_unet(stock)
    own = dict(model.named_parameters())
    assert all(own[name].data_ptr() == weight.data_ptr() for name, weight in stock.named_parameters())
    assert {name for name in own if is_pixel_aware(name)} == own.keys() - dict(stock.named_parameters()).keys()


@pytest.mark.parametrize("variant", ["full", "light"])
def test_each_residual_reaches_the_layer_of_its_level(variant):
    unet, given = tiny_pasd.unet(pixel_attention=variant), residuals(tiny_pasd.controlnet())
    unet(*call(), **given)
    layers = [layer for block in unet._pixel_layers for layer in block]
    plain = 3 if variant == "light" else 0  # the block without text attention has no light layer
    assert layers[:plain] == [None] * plain
    consumed = list(reversed(given["down_block_additional_residuals"]))
    assert all(layer.residual is want for layer, want in zip(layers[plain:], consumed[plain:], strict=True))


def test_contexts_have_the_width_of_the_skip_connections():
    with torch.device("meta"):
        unet = PASDUNet2DConditionModel(
            cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
    widths = [context_dims(block) for block in unet.up_blocks]
    assert widths == [[1280] * 3, [1280, 1280, 640], [640, 640, 320], [320] * 3]


def test_residuals_of_another_model_are_refused():
    unet, given = tiny_pasd.unet(), residuals(tiny_pasd.controlnet())
    short = {**given, "down_block_additional_residuals": given["down_block_additional_residuals"][1:]}
    with pytest.raises(ValueError, match="expected 12 residuals .* got 11"):
        unet(*call(), **short)
    with pytest.raises(ValueError, match="none of the middle"):
        unet(*call(), down_block_additional_residuals=given["down_block_additional_residuals"])
    with pytest.raises(ValueError, match='"full" or "light"; got \'half\''):
        PASDUNet2DConditionModel(**tiny_pasd.UNET, pixel_attention="half")


@pytest.mark.parametrize("variant", ["full", "light"])
def test_gradient_checkpointing_gives_the_same_gradients(variant):
    unet, given = tiny_pasd.unet(pixel_attention=variant), residuals(tiny_pasd.controlnet())
    given = {name: tuple(t.detach() for t in v) if isinstance(v, tuple) else v.detach() for name, v in given.items()}

    def gradients() -> dict[str, Tensor]:
        unet.zero_grad()
        unet(*call(), **given).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}

    plain = gradients()
    assert all(name in plain for name, _ in unet.named_parameters() if is_pixel_aware(name))
    unet.enable_gradient_checkpointing()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.mark.parametrize("variant", ["full", "light"])
@torch.no_grad()
def test_a_copy_is_independent(variant):
    unet, given = tiny_pasd.unet(pixel_attention=variant), residuals(tiny_pasd.controlnet())
    want, twin = unet(*call(), **given).sample, copy.deepcopy(unet)
    for name, parameter in unet.named_parameters():
        if is_pixel_aware(name):
            parameter.zero_()
    assert torch.equal(twin(*call(), **given).sample, want)
    assert not torch.equal(unet(*call(), **given).sample, want)


@pytest.mark.parametrize("variant", ["full", "light"])
@torch.no_grad()
def test_diffattn_reaches_the_pixel_aware_layers(variant):
    unet, given = tiny_pasd.unet(pixel_attention=variant), residuals(tiny_pasd.controlnet())
    want = unet(*call(), **given).sample
    with diffattn.apply(unet, "neighborhood", kernel_size=31) as handle:
        names = {layer.name for layer in handle.layers}
        wide = unet(*call(), **given).sample
        assert all(layer.reached for layer in handle.layers)
    pixel_aware = {name for name in names if is_pixel_aware(f"{name}.")}
    assert len(pixel_aware) == (24 if variant == "full" else 9)
    torch.testing.assert_close(wide, want)  # a window over everything
    with diffattn.apply(unet, "neighborhood", kernel_size=3, layers=sorted(pixel_aware)):
        assert not torch.allclose(unet(*call(), **given).sample, want, atol=1e-3)
    assert torch.equal(unet(*call(), **given).sample, want)


@torch.no_grad()
def test_an_encoded_condition_stands_for_the_picture():
    control = tiny_pasd.controlnet(use_rrdb=True)
    picture = torch.rand(2, 3, 8 * ROWS, 8 * COLUMNS)
    encoded = control.encode_condition(picture)
    assert encoded.shape == (2, 8, ROWS, COLUMNS)
    for given, want in zip(control(*call(), encoded)[0], control(*call(), picture)[0], strict=True):
        assert torch.equal(given, want)
    embedding, rgbs = control.clean_pictures(picture)
    assert torch.equal(embedding, encoded)
    assert [tuple(rgb.shape) for rgb in rgbs] == [(2, 3, 8 * ROWS // f, 8 * COLUMNS // f) for f in (2, 4, 8)]


@torch.no_grad()
def test_a_foreground_mask_takes_the_place_of_the_scale():
    control = tiny_pasd.controlnet()
    picture, mask = torch.rand(2, 3, 8 * ROWS, 8 * COLUMNS), torch.zeros(1, 1, 8 * ROWS, 8 * COLUMNS)
    mask[..., : 4 * COLUMNS] = 1.0
    plain = control(*call(), picture, return_dict=False)[0]
    masked = control(*call(), picture, 0.3, fg_mask=mask, return_dict=False)[0]
    half = COLUMNS // 2
    torch.testing.assert_close(masked[0][..., :half], 1.5 * plain[0][..., :half])
    torch.testing.assert_close(masked[0][..., half:], 0.6 * plain[0][..., half:])


@pytest.mark.parametrize("rrdb", [False, True])
def test_a_controlnet_starts_from_the_units_encoder(rrdb):
    unet = tiny_pasd.unet()
    control = PASDControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 8, 12), use_rrdb=rrdb)
    assert control.config.use_rrdb == rrdb == hasattr(control.controlnet_cond_embedding, "preprocesser")
    for name, weight in unet.down_blocks.state_dict().items():
        assert torch.equal(control.down_blocks.state_dict()[name], weight)
    assert not control.encode_condition(torch.rand(1, 3, 16, 16)).any()  # its last convolution starts at zero


def test_other_channel_orders_are_refused():
    with pytest.raises(ValueError, match="rgb"):
        PASDControlNetModel(**tiny_pasd.CONTROLNET, controlnet_conditioning_channel_order="bgr")
