"""The official checkpoint becomes a folder of diffusers, one to one."""

import logging
from pathlib import Path

import numpy as np
import pytest
import tiny_portrait
import torch
from diffattn.pipelines.portrait_animation import XPortraitPipeline, convert, load_official
from diffattn.pipelines.portrait_animation.checkpoint.convert import load_networks, official_names
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def made():
    return tiny_portrait.networks(seed=4)


@pytest.fixture(scope="module")
def text():
    return tiny_portrait.text_encoder()


@pytest.fixture(scope="module")
def weights(made, text):
    return tiny_portrait.official_weights(made, text)


def load(weights, **options):
    return load_networks(weights, "model_state.th", tiny_portrait.SIZES, **options)


@pytest.mark.slow
def test_a_converted_checkpoint_makes_the_same_frames(made, text, weights, tmp_path):
    file = tiny_portrait.write_official(tmp_path / "model_state-415001.th", weights)
    folder = convert(file, tmp_path / "new" / "x-portrait", sizes=tiny_portrait.SIZES)
    assert [entry.name for entry in folder.parent.iterdir()] == ["x-portrait"]
    loaded = XPortraitPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    with torch.no_grad():
        made["null_text"].embedding.copy_(text(torch.tensor([[9, 10, 10]])).last_hidden_state)
    own = tiny_portrait.pipeline(**made)
    assert torch.equal(loaded.null_text(), own.null_text()) and loaded.null_text().abs().max() > 0.1
    for name, network in made.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, getattr(loaded, name).state_dict()[key]), f"{name}.{key}"
    parts = loaded.unet, loaded.reference_unet, loaded.vae, *loaded.controlnet.nets
    assert not any(part.training for part in parts)
    for name in made:
        for parameter in getattr(loaded, name).parameters():  # unaligned in a mapped file, which changes rounding
            parameter.data = parameter.data.clone()
    want, got = (tiny_portrait.run(pipe, output_type="np") for pipe in (own, loaded))
    assert np.array_equal(got, want) and want.std() > 0.01


def test_every_weight_is_read_from_a_place_of_its_own(made, text):
    networks = {**made, "text_encoder": text}
    places = official_names(networks).values()
    count = sum(len(network.state_dict()) for name, network in networks.items() if name != "null_text")
    assert count == len(places) == len({(place.network, place.key) for place in places})


def test_dtypes_and_formats(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    pipe = load_official(tmp_path / "model.safetensors", sizes=tiny_portrait.SIZES, dtype=torch.bfloat16)
    parts = pipe.unet, pipe.reference_unet, pipe.controlnet, pipe.vae, pipe.null_text
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert {t.dtype for part in parts for t in part.state_dict().values()} == {torch.bfloat16}


KEY = "model.diffusion_model.input_blocks_motion_module.3.0.temporal_transformer.proj_in.weight"
TEXT_KEY = "cond_stage_model.transformer.text_model.final_layer_norm.bias"


OTHERS = "local_pose_control_model.zero_convs.7.0.bias", "first_stage_model.encoder.mid.attn_1.q.weight"


@pytest.mark.parametrize("key", [KEY, TEXT_KEY, *OTHERS])
def test_a_missing_weight_is_named(weights, key):
    with pytest.raises(ValueError, match=f"1 missing: {key}$"):
        load({name: tensor for name, tensor in weights.items() if name != key})


def test_an_unexpected_weight_is_named(weights, caplog):
    more = {**weights, "model.diffusion_model.extra.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"1 unexpected: model\.diffusion_model\.extra\.weight"):
        load(more)
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        load(more, strict=False)
    assert "left 1 weights" in caplog.text and "model.diffusion_model.extra.weight" in caplog.text


def test_missing_weights_are_refused_even_if_others_may_be_left(weights):
    with pytest.raises(ValueError, match=f"missing: {KEY}"):
        load({name: tensor for name, tensor in weights.items() if name != KEY}, strict=False)


@pytest.mark.parametrize("key", [KEY, TEXT_KEY])
def test_a_weight_of_another_shape_is_named(weights, key):
    with pytest.raises(ValueError, match=rf"{key} is \(3,\), expected \((32, 32|8,)\)"):
        load({**weights, key: torch.zeros(3)})


def test_a_transposed_weight_is_not_taken_for_the_right_one(weights):
    """Of as many numbers."""
    key = "model.diffusion_model.time_embed.0.weight"
    with pytest.raises(ValueError, match=rf"{key} is \(32, 128\), expected \(128, 32\)"):
        load({**weights, key: weights[key].T.contiguous()})


def test_second_positions_must_agree_with_the_first(weights):
    name = "model.diffusion_model.output_blocks_motion_module.4.0.temporal_transformer.transformer_blocks.0"
    key = f"{name}.attention_blocks.1.pos_encoder.pe"
    with pytest.raises(ValueError, match="differs from the positions"):
        load({**weights, key: weights[key] + 1})


def test_a_checkpoint_without_text_encoder_needs_the_embedding(weights):
    without = {name: tensor for name, tensor in weights.items() if not name.startswith("cond_stage_model.")}
    with pytest.raises(ValueError, match="expected the text encoder in .*as null_text"):
        load(without)
    given = torch.randn(1, 3, 8)
    assert torch.equal(load(without, null_text=given)["null_text"](), given)
    assert torch.equal(load(weights, null_text=given)["null_text"](), given)
    with pytest.raises(ValueError, match="embedding is"):
        load(without, null_text=torch.randn(1, 4, 8))


def test_nothing_is_written_over_and_nothing_half(weights, tmp_path, monkeypatch):
    file = tiny_portrait.write_official(tmp_path / "model.th", weights)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="expected the name of a new folder"):
        convert(file, tmp_path / "there", sizes=tiny_portrait.SIZES)

    def fail(self, folder):
        (Path(folder) / "half").write_text("")
        raise OSError("the disk is full")

    monkeypatch.setattr(XPortraitPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="the disk is full"):
        convert(file, tmp_path / "out", sizes=tiny_portrait.SIZES)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.th", "there"]


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": {"a": Path("x")}}, tmp_path / "evil.th")
    with pytest.raises(ValueError, match="not a whole file of weights"):
        load_official(tmp_path / "evil.th", sizes=tiny_portrait.SIZES)
