"""Official folders, adapters, other bases; and what is refused."""

import json

import diffusers
import pytest
import tiny_pasd
import torch
from diffattn.pipelines.pixel_aware_sr import PASDPipeline, PASDXLPipeline, load_paca, load_pasd, save_paca
from diffattn.pipelines.pixel_aware_sr.checkpoint.bases import restyle
from diffattn.pipelines.pixel_aware_sr.networks.paca import is_pixel_aware
from safetensors.torch import load_file, save_file

from diffattn.files.weights import read_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("variant", "rrdb"), [("full", False), ("light", False), ("full", True), ("light", True)])
def test_variants_are_read_off_the_weights(tmp_path, variant, rrdb):
    folder = tiny_pasd.write_checkpoint(tmp_path / "runs" / "checkpoint-100", variant, rrdb)
    for place in (folder, folder.parent):
        found = load_pasd(place)
        assert same(found.unet, tiny_pasd.unet(pixel_attention=variant))
        assert same(found.controlnet, tiny_pasd.controlnet(use_rrdb=rrdb))
        assert found.variant == variant + (", rrdb" if rrdb else "") and found.scheduler is None
    assert load_pasd(folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_sdxl_brings_its_scheduler(tmp_path):
    pipe = tiny_pasd.xl_pipeline()
    pipe.unet.save_pretrained(tmp_path / "unet")
    pipe.controlnet.save_pretrained(tmp_path / "controlnet")
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    found = load_pasd(tmp_path)
    assert found.variant == "full, SDXL" and found.scheduler == tmp_path / "scheduler"
    assert same(found.unet, pipe.unet)


@pytest.mark.slow
def test_the_picture_survives_every_form(tmp_path):
    """Official folder -> pipeline -> save_pretrained -> from_pretrained, and the adapter on the base, bit for bit."""
    base = tiny_pasd.write_base(tmp_path / "base")
    stock = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    official = tiny_pasd.write_checkpoint(tmp_path / "official")
    restyle(unet := load_pasd(official).unet, stock)  # as released: the base's weights under the pixel-aware ones
    unet.save_pretrained(official / "unet")

    def picture(pipe: PASDPipeline) -> object:
        pipe.set_progress_bar_config(disable=True)
        return pipe(tiny_pasd.picture(), "boats", generator=tiny_pasd.generator(), **tiny_pasd.STEPS).images[0]

    pipe = PASDPipeline.from_checkpoint(official, base)
    assert isinstance(pipe.scheduler, diffusers.UniPCMultistepScheduler)
    want = picture(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    assert picture(PASDPipeline.from_pretrained(tmp_path / "saved")) == want
    assert picture(PASDPipeline.from_checkpoint(tmp_path / "saved", base)) == want
    save_paca(pipe.unet, tmp_path / "paca.safetensors")
    assert all(map(is_pixel_aware, read_weights(tmp_path / "paca.safetensors")))
    pipe.unet = load_paca(stock, tmp_path / "paca.safetensors")
    assert picture(pipe) == want


@pytest.mark.slow
def test_an_adapter_goes_on_any_base_of_its_sizes(tmp_path):
    own = tiny_pasd.unet(pixel_attention="light")
    file = save_paca(own, tmp_path / "light.safetensors")
    other = diffusers.UNet2DConditionModel(**tiny_pasd.UNET)
    model = load_paca(other, file)
    for name, weight in model.state_dict().items():
        source = own if is_pixel_aware(name) else other
        assert torch.equal(weight, source.state_dict()[name]), name
    assert not any(is_pixel_aware(name) for name in other.state_dict())
    small = diffusers.UNet2DConditionModel(**{**tiny_pasd.UNET, "block_out_channels": (8, 16, 16, 16)})
    with pytest.raises(ValueError, match="expected"):
        load_paca(small, file)
    with pytest.raises(ValueError, match="pixel-aware already"):
        load_paca(own, file)
    save_file({"to_q": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="written by save_paca"):
        load_paca(other, tmp_path / "other.safetensors")


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_another_base_is_blended_in(weight):
    unet, style = tiny_pasd.unet(), diffusers.UNet2DConditionModel(**tiny_pasd.UNET)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    restyle(unet, style, weight)
    for name, tensor in unet.state_dict().items():
        want = before[name]
        if not is_pixel_aware(name):
            want = weight * style.state_dict()[name] + (1 - weight) * want
        torch.testing.assert_close(tensor, want)
    with pytest.raises(ValueError, match=r"style_weight from 0.*got 1\.5"):
        restyle(unet, style, 1.5)


def test_a_style_of_other_sizes_is_refused_and_changes_nothing():
    unet = tiny_pasd.unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    narrow = diffusers.UNet2DConditionModel(**{**tiny_pasd.UNET, "cross_attention_dim": 20})
    with pytest.raises(ValueError, match="sizes of the base's"):
        restyle(unet, narrow)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.slow
def test_a_checkpoint_stylizes_under_another_base(tmp_path):
    checkpoint = tiny_pasd.write_checkpoint(tmp_path / "pasd")
    base = tiny_pasd.write_base(tmp_path / "base")
    style = tiny_pasd.write_base(tmp_path / "style", seed=6)
    pipe = PASDPipeline.from_checkpoint(checkpoint, base, stylize=style)
    want = diffusers.UNet2DConditionModel.from_pretrained(style / "unet").state_dict()
    assert all(torch.equal(pipe.unet.state_dict()[name], tensor) for name, tensor in want.items())
    assert same(pipe.controlnet, load_pasd(checkpoint).controlnet)
    with pytest.raises(ValueError, match="a pickle may run code"):
        (tmp_path / "style.ckpt").write_bytes(b"no")
        PASDPipeline.from_checkpoint(checkpoint, base, stylize=tmp_path / "style.ckpt")


def test_what_is_no_checkpoint_is_named(tmp_path):
    good = tiny_pasd.write_checkpoint(tmp_path / "good")
    with pytest.raises(ValueError, match="is not a folder"):
        load_pasd(tmp_path / "absent")
    with pytest.raises(ValueError, match="found no unet/"):
        load_pasd(good / "unet")
    half = tiny_pasd.copy(good, tmp_path / "half")
    (half / "controlnet").rename(half / "elsewhere")
    with pytest.raises(ValueError, match="controlnet/ is missing"):
        load_pasd(half)
    stock = tiny_pasd.copy(good, tmp_path / "stock")
    diffusers.UNet2DConditionModel(**tiny_pasd.UNET).save_pretrained(stock / "unet")
    with pytest.raises(ValueError, match="a stock U-Net"):
        load_pasd(stock)
    plain = tiny_pasd.copy(good, tmp_path / "plain")
    diffusers.ControlNetModel(**tiny_pasd.CONTROLNET).save_pretrained(plain / "controlnet")
    with pytest.raises(ValueError, match="a stock ControlNet"):
        load_pasd(plain)
    mixed = tiny_pasd.copy(good, tmp_path / "mixed")
    tiny_pasd.xl_pipeline().controlnet.save_pretrained(mixed / "controlnet")
    with pytest.raises(ValueError, match="of one base model"):
        load_pasd(mixed)


def test_every_missing_and_unexpected_weight_is_named(tmp_path):
    folder = tiny_pasd.write_checkpoint(tmp_path)
    weights = load_file(folder / "unet" / WEIGHTS)
    for name in ("conv_in.weight", "up_blocks.1.pixel_attentions.0.norm.bias"):
        del weights[name]
    weights["surplus"] = torch.zeros(1)
    save_file(weights, folder / "unet" / WEIGHTS)
    with pytest.raises(ValueError) as error:
        load_pasd(folder)
    assert "2 missing: conv_in.weight, up_blocks.1.pixel_attentions.0.norm.bias" in str(error.value)
    assert "1 unexpected: surplus" in str(error.value)
    weights = tiny_pasd.unet().state_dict()
    weights["conv_in.weight"] = torch.zeros(8, 9, 3, 3)
    save_file(weights, folder / "unet" / WEIGHTS)
    with pytest.raises(ValueError, match=r"conv_in.weight is \(8, 9, 3, 3\), expected \(8, 4, 3, 3\)"):
        load_pasd(folder)
    (folder / "unet" / WEIGHTS).write_bytes(b"short")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_pasd(folder)


def test_sdxl_and_sd15_do_not_mix(tmp_path):
    pipe = tiny_pasd.xl_pipeline()
    folder = tmp_path / "xl"
    pipe.unet.save_pretrained(folder / "unet")
    pipe.controlnet.save_pretrained(folder / "controlnet")
    with pytest.raises(
        ValueError, match="expected a base model with text of width 24, as the checkpoint's U-Net takes; .* has 12"
    ):
        PASDPipeline.from_checkpoint(folder, tiny_pasd.write_base(tmp_path / "base"))
    tiny_pasd.xl_pipeline().save_pretrained(tmp_path / "xl_base")
    with pytest.raises(ValueError, match="expected a base model of the kind of Stable Diffusion 1.5"):
        PASDPipeline.from_checkpoint(tiny_pasd.write_checkpoint(tmp_path / "pasd"), tmp_path / "xl_base")
    with pytest.raises(ValueError, match="expected a base model of the kind of SDXL"):
        PASDXLPipeline.from_checkpoint(folder, tmp_path / "base")
    assert json.loads((folder / "unet" / "config.json").read_text())["_class_name"] == "PASDUNet2DConditionModel"
