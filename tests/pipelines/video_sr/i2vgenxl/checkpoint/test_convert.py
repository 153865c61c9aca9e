"""The official checkpoint becomes a folder of diffusers, one to one; whatever is wrong in it is named."""

import logging
import re
from pathlib import Path

import pytest
import tiny_star
import torch
from diffattn.pipelines.video_sr.i2vgenxl.checkpoint.convert import (
    convert,
    load_networks,
    load_official,
    official_places,
)
from diffattn.pipelines.video_sr.i2vgenxl.checkpoint.names import official_names
from diffattn.pipelines.video_sr.i2vgenxl.networks.components import STARSizes, build_networks
from diffattn.pipelines.video_sr.i2vgenxl.pipeline import STARPipeline
from safetensors.torch import save_file

SIZES = STARSizes(channels=(8, 8, 16, 16), layers=1, head_width=4, first_heads=3, text_width=tiny_star.TEXT, groups=4)


@pytest.fixture(scope="module")
def made():
    return {"unet": tiny_star.unet(), "controlnet": tiny_star.controlnet()}


@pytest.fixture(scope="module")
def weights(made):
    return tiny_star.official_weights(**made)


@pytest.fixture(scope="module")
def parts():
    return {
        "vae": tiny_star.vae(),
        "text_encoder": tiny_star.text_encoder(),
        "tokenizer": tiny_star.tokenizer(),
    }


def load(weights, **options):
    return load_networks(weights, "light_deg.pt", SIZES, **options)


def test_weights_go_over_one_to_one(made, weights):
    loaded = load(weights)
    assert loaded.keys() == made.keys()
    for name, network in made.items():
        want, got = network.state_dict(), loaded[name].state_dict()
        assert got.keys() == want.keys() and not loaded[name].training
        settings = network.config.keys() - {"_use_default_values"}
        assert {key: loaded[name].config[key] for key in settings} == {key: network.config[key] for key in settings}
        assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("attention", [(True, False), (True, True), (False, True)])
def test_every_weight_is_read_from_a_place_of_its_own(layers, attention):
    sizes = STARSizes(channels=(32, 64), attention=attention, layers=layers, head_width=16, text_width=8)
    with torch.device("meta"):
        networks = build_networks(sizes)
    places = official_places(networks)
    assert len(places) == sum(len(network.state_dict()) for network in networks.values())
    assert len({(place.network, place.key) for place in places.values()}) == len(places)
    upsample = 3 if attention[1] else 1
    assert f"output_blocks.{layers}.{upsample}.conv.weight" in places and f"input_blocks.{layers + 1}.op.bias" in places
    assert f"VideoControlNet.zero_convs.{2 * layers + 1}.0.weight" in places
    assert f"VideoControlNet.zero_convs.{2 * layers + 2}.0.weight" not in places
    assert places["input_blocks.0.1.proj_in.weight"].shape == (128, 32, 1)


def test_other_networks_have_no_official_names():
    with pytest.raises(ValueError, match=r"expected the name of a weight of STAR's networks; got add_embedding\.bias"):
        official_names(["conv_in.weight", "add_embedding.bias"])


def test_levels_and_their_attention_must_agree():
    with pytest.raises(ValueError, match="expected attention yes or no for 2 levels"):
        STARSizes(channels=(8, 16))


UNET_KEY = "output_blocks.3.2.proj_out.weight"
KEYS = (
    UNET_KEY,
    "input_blocks.1.0.temopral_conv.conv1.2.weight",
    "middle_block.1.transformer_blocks.0.local1.conv1.weight",
    "VideoControlNet.input_hint_block.bias",
    "VideoControlNet.zero_convs.7.0.weight",
)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_weight_is_named(weights, key):
    without = {name: tensor for name, tensor in weights.items() if name != key}
    for strict in (True, False):
        with pytest.raises(ValueError, match=f"light_deg.pt .*: 1 missing: {re.escape(key)}$"):
            load(without, strict=strict)


def test_an_unexpected_weight_is_named(weights, caplog):
    more = {**weights, "hint_time_zero_linear.weight": torch.zeros(2), "VideoControlNet.extra": torch.zeros(2)}
    with pytest.raises(ValueError, match="2 unexpected: VideoControlNet.extra, hint_time_zero_linear.weight$"):
        load(more)
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        load(more, strict=False)
    assert "left 2 weights of light_deg.pt behind: VideoControlNet.extra, hint_time" in caplog.text


@pytest.mark.parametrize("key", KEYS)
def test_a_weight_of_another_shape_is_named(weights, key):
    shape = re.escape(str(tuple(weights[key].shape)))
    with pytest.raises(ValueError, match=rf"not those of STAR: {re.escape(key)} is \(3,\), expected {shape}$"):
        load({**weights, key: torch.zeros(3)})


def test_a_transposed_weight_is_not_taken_for_the_right_one(weights):
    """Of as many numbers."""
    key = "time_embed.0.weight"
    with pytest.raises(ValueError, match=rf"{key} is \(8, 32\), expected \(32, 8\)"):
        load({**weights, key: weights[key].T.contiguous()})


def test_several_faults_are_named_at_once(weights):
    changed = {name: tensor for name, tensor in weights.items() if name not in KEYS[:2]} | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"2 missing: {KEYS[1]}, {UNET_KEY}; 1 unexpected: extra"):
        load(changed)


@pytest.mark.parametrize("key", ["model.diffusion_model.time_embed.0.weight", "mixins.patch_embed.proj.weight"])
def test_the_other_variant_is_told_apart(weights, key):
    with pytest.raises(ValueError, match=r"got one of the CogVideoX variant in light_deg.pt; .*cogvideox_convert"):
        load({**weights, key: torch.zeros(2)}, strict=False)


def write(file: Path, weights, wrapped: bool = True) -> Path:
    torch.save({"state_dict": weights} if wrapped else weights, file)
    return file


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.slow
def test_a_converted_checkpoint_is_the_same_pipeline(made, parts, weights, tmp_path, wrapped):
    file = write(tmp_path / "heavy_deg.pt", weights, wrapped)
    folder = convert(file, tmp_path / "new" / "star", **parts, sizes=SIZES)
    assert [entry.name for entry in folder.parent.iterdir()] == ["star"]
    kept = {"vae", "text_encoder", "tokenizer", "unet", "controlnet", "scheduler", "model_index.json"}
    assert {entry.name for entry in folder.iterdir()} == kept
    loaded = STARPipeline.from_pretrained(folder)
    for name, network in {**made, "vae": parts["vae"], "text_encoder": parts["text_encoder"]}.items():
        got = getattr(loaded, name)
        assert type(got) is type(network) and not got.training
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, got.state_dict()[key]), f"{name}.{key}"
    x, text = tiny_star.latents(), tiny_star.text()
    with torch.no_grad():
        torch.testing.assert_close(loaded.unet(x, 5, text).sample, made["unet"](x, 5, text).sample)


def test_dtypes_formats_and_parts_from_folders(weights, parts, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in parts}
    pipe = load_official(tmp_path / "model.safetensors", **folders, sizes=SIZES, dtype=torch.bfloat16)
    assert {part.dtype for part in (pipe.unet, pipe.controlnet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert {t.dtype for part in (pipe.unet, pipe.controlnet) for t in part.state_dict().values()} == {torch.bfloat16}


def test_parts_that_do_not_belong_are_refused(weights, parts, tmp_path):
    file = write(tmp_path / "light_deg.pt", weights)
    with pytest.raises(ValueError, match="expected a text encoder 16 wide; got 12; take that of Stable Diffusion 2.1"):
        load_official(file, **parts, sizes=STARSizes(text_width=16))
    with pytest.raises(ValueError, match="expected a VAE of 8 latent channels; got 4"):
        load_official(file, **parts, sizes=STARSizes(text_width=tiny_star.TEXT, latent_channels=8))
    with pytest.raises(ValueError, match="expected the vae as a folder or as a loaded model; there is no folder .*nil"):
        load_official(file, **{**parts, "vae": tmp_path / "nil"}, sizes=SIZES)


def test_nothing_is_written_over_and_nothing_half(weights, parts, tmp_path, monkeypatch):
    file = write(tmp_path / "light_deg.pt", weights)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="expected the name of a new folder; .*there is there"):
        convert(file, tmp_path / "there", **parts, sizes=SIZES)

    def fail(self, folder):
        (Path(folder) / "half").write_text("")
        raise OSError("the disk is full")

    monkeypatch.setattr(STARPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="the disk is full"):
        convert(file, tmp_path / "out", **parts, sizes=SIZES)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["light_deg.pt", "there"]


def test_code_in_a_checkpoint_is_not_run(parts, tmp_path):
    torch.save({"state_dict": {"a": Path("x")}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a whole file of weights"):
        load_official(tmp_path / "evil.pt", **parts, sizes=SIZES)
