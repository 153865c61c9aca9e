"""The two differences from AnimateDiff, and nothing else."""

import pytest
import tiny_portrait
import torch
from diffattn.pipelines.portrait_animation import XPortraitReferenceUNet, XPortraitUNet
from diffattn.pipelines.portrait_animation.networks.components import reference_unet_config, unet_config
from diffattn.pipelines.portrait_animation.networks.unet import FrameGroupNorm
from diffusers import UNet2DConditionModel, UNetMotionModel


@pytest.fixture(scope="module")
def unet():
    return tiny_portrait.networks()["unet"]


def predict(unet, sample):
    frames = sample.shape[0] * sample.shape[2]
    text = torch.randn(1, 3, 8, generator=tiny_portrait.generator(5)).expand(frames, -1, -1)
    with torch.no_grad():
        return unet(sample, 7, text).sample


def test_names_and_settings_are_the_stock_ones(unet, tmp_path):
    stock = UNetMotionModel(**unet_config(tiny_portrait.SIZES))
    own, theirs = ({name: t.shape for name, t in model.state_dict().items()} for model in (unet, stock))
    assert own == theirs
    assert {**unet.config} == {**stock.config}
    unet.save_pretrained(tmp_path)
    loaded = XPortraitUNet.from_pretrained(tmp_path)
    sample = torch.randn(2, 4, 3, 8, 16)
    assert torch.equal(predict(loaded, sample), predict(unet, sample))


def test_a_frame_is_normalized_by_itself():
    video = torch.randn(2, 6, 4, 3, 5) * torch.tensor([1.0, 10.0, 100.0, 0.1])[:, None, None]
    norm = FrameGroupNorm(2, 6)
    torch.nn.init.normal_(norm.weight)
    out = norm(video)
    for frame in range(4):
        want = torch.nn.functional.group_norm(video[:, :, frame], 2, norm.weight, norm.bias)
        torch.testing.assert_close(out[:, :, frame], want)


def test_motion_modules_follow_the_upsampler(unet):
    """And see twice the resolution there: 1 x 2, 2 x 4, 4 x 8 cells come before the upsamplers."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.__setitem__(name, tuple(args[0].shape[-2:])), with_kwargs=True
        )
        for name, module in unet.named_modules()
        if name.startswith("up_blocks") and ".motion_modules." in name and name.count(".") == 3
    ]
    predict(unet, torch.randn(1, 4, 2, 8, 16))
    for hook in hooks:
        hook.remove()
    sides = [[seen[f"up_blocks.{i}.motion_modules.{j}"][0] for j in range(3)] for i in range(4)]
    assert sides == [[1, 1, 2], [2, 2, 4], [4, 4, 8], [8, 8, 8]]


@pytest.mark.parametrize(("rows", "columns"), [(9, 17), (11, 8)])
def test_sides_that_do_not_halve(unet, rows, columns):
    assert predict(unet, torch.randn(1, 4, 2, rows, columns)).shape == (1, 4, 2, rows, columns)


def test_videos_of_a_batch_do_not_mix(unet):
    unet = unet.double()
    sample = torch.randn(3, 4, 2, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        together = unet(sample, 7, torch.ones(6, 3, 8, dtype=torch.float64)).sample
        for i in range(3):
            alone = unet(sample[i : i + 1], 7, torch.ones(2, 3, 8, dtype=torch.float64)).sample
            torch.testing.assert_close(together[i : i + 1], alone)
    unet.float()


def test_the_appearance_network_has_no_last_layers():
    stock = UNet2DConditionModel(**reference_unet_config(tiny_portrait.SIZES))
    own = XPortraitReferenceUNet(**reference_unet_config(tiny_portrait.SIZES))
    left = stock.state_dict().keys() - own.state_dict().keys()
    assert left == {f"{name}.{kind}" for name in ("conv_norm_out", "conv_out") for kind in ("weight", "bias")}
    assert not own.state_dict().keys() - stock.state_dict().keys()
