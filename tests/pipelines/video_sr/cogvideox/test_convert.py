"""The official CogVideoX checkpoint becomes a folder of diffusers."""

import logging

import numpy as np
import pytest
import torch
from diffattn.pipelines.video_sr.cogvideox.convert import convert, load_official, load_transformer, read_official
from diffattn.pipelines.video_sr.cogvideox.names import official_place
from diffattn.pipelines.video_sr.cogvideox.pipeline import CogVideoXSTARPipeline
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import save_file
from text_pipelines import t5, tokenizer
from tiny_cogvideox import SIZES, TEXT_WIDTH, clip, official_weights, pipeline, transformer, vae


@pytest.fixture(scope="module")
def made():
    return transformer(seed=4)


@pytest.fixture(scope="module")
def weights(made):
    return official_weights(made, prefix="")


def parts():
    return {"vae": vae(), "text_encoder": t5(TEXT_WIDTH), "tokenizer": tokenizer("t5")}


def load(weights, **options):
    return load_transformer(weights, "states.pt", SIZES, **options)


def check_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(
            got[key], tensor, **{"atol": 0, "rtol": 0, **tolerance}, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_lora_is_merged_into_each_share_of_the_rows(made, weights):
    """Pairs split off with the released scale, alpha 1 over the rank."""
    check_same(load(weights).state_dict(), made.state_dict(), atol=1e-6)
    plain = {name: tensor for name, tensor in weights.items() if ".matrix_" not in name}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items() if ".matrix_" in name}
    far = load({**plain, **zeros}).state_dict()
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        key = f"transformer_blocks.1.attn1.{name}.weight"
        assert (far[key] - made.state_dict()[key]).abs().max() > 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 1, 8])
def test_weights_without_lora_are_the_same_bit_for_bit(made, rank, dtype):
    model = transformer(seed=4).to(dtype)
    own = official_weights(model, rank, lora=0.0, prefix="")
    loaded = load({name: tensor.to(dtype) for name, tensor in own.items()}, dtype=dtype)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype} and not loaded.training
    check_same(loaded.state_dict(), model.state_dict())


def test_every_row_is_read_from_a_place_of_its_own(made):
    places = [official_place(key) for key in made.state_dict()]
    rows = [(place.name, chunk) for place in places for chunk in place.chunks]
    assert len(set(rows)) == len(rows)
    for place in places:
        assert {chunk for name, chunk in rows if name == place.name} == set(range(place.parts))


def test_a_converted_checkpoint_makes_the_same_frames(made, tmp_path):
    states = tmp_path / "star" / "1" / "mp_rank_00_model_states.pt"
    states.parent.mkdir(parents=True)
    torch.save({"module": official_weights(made, rank=4, lora=0.0), "iteration": 10, "args": None}, states)
    own, folders = parts(), {}
    for name, part in own.items():
        folders[name] = tmp_path / name
        part.save_pretrained(folders[name])
    folder = convert(tmp_path / "star", tmp_path / "new" / "pipe", sizes=SIZES, **folders)
    assert [entry.name for entry in folder.parent.iterdir()] == ["pipe"]
    loaded = CogVideoXSTARPipeline.from_pretrained(folder)
    want = pipeline()
    want.register_modules(transformer=made)
    check_same(loaded.transformer.state_dict(), made.state_dict())
    for part in (loaded.transformer, loaded.vae, loaded.text_encoder):
        assert not part.training
        for parameter in part.parameters():  # unaligned in a mapped file, which changes rounding
            parameter.data = parameter.data.clone()
    call = {"num_inference_steps": 2, "upscale": 2, "output_type": "np"}
    got = [pipe(clip(3), "a cat", generator=torch.Generator().manual_seed(1), **call).frames for pipe in (loaded, want)]
    assert np.array_equal(*got) and got[0].std() > 0.01


@pytest.mark.parametrize("wrapped", ["module", "state_dict", None])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_wrappers_and_formats(made, weights, tmp_path, wrapped, prefix):
    given = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save({wrapped: given} if wrapped else given, tmp_path / "states.pt")
    save_file(given, tmp_path / "states.safetensors")
    for name in ("states.pt", "states.safetensors"):
        check_same(read_official(tmp_path / name), weights)
    pipe = load_official(tmp_path / "states.safetensors", sizes=SIZES, dtype=torch.bfloat16, **parts())
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert isinstance(pipe.vae, AutoencoderKLCogVideoX)


QKV = "transformer.layers.1.attention.query_key_value"
KEYS = (
    f"{QKV}.original.weight",
    f"{QKV}.matrix_A.2",
    "transformer.layers.0.attention.dense.matrix_B.0",
    "mixins.adaln_layer.adaLN_modulations.1.1.bias",
    "transformer.layers.0.temp_local.conv1.weight",
    "mixins.patch_embed.proj_sr.weight",
)


@pytest.mark.parametrize("key", KEYS)
def test_missing_and_misshapen_weights_are_named(weights, key):
    with pytest.raises(ValueError, match=f"1 missing: {key}$"):
        load({name: tensor for name, tensor in weights.items() if name != key}, strict=False)
    with pytest.raises(ValueError, match=rf"CogVideoX variant: {key} is \(3, 1\), expected \("):
        load({**weights, key: torch.zeros(3, 1)})


def test_unexpected_weights_are_named(weights, caplog):
    more = {**weights, f"{QKV}.matrix_A.3": torch.zeros(3, 32), "extra.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"2 unexpected: extra\.weight, {QKV}\.matrix_A\.3"):
        load(more)
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        load(more, strict=False)
    assert "left 2 weights" in caplog.text and "extra.weight" in caplog.text


def test_buffers_may_be_left_out(made, weights):
    buffers = {name for name in weights if "freqs" in name or "position_embeddings" in name}
    assert len(buffers) == 3
    loaded = load({name: tensor for name, tensor in weights.items() if name not in buffers})
    check_same(loaded.state_dict(), made.state_dict(), atol=1e-6)


@pytest.mark.parametrize("name", ["VideoControlNet.zero_convs.0.0.weight", "input_blocks.0.0.weight"])
def test_the_other_variant_is_refused_by_name(name):
    with pytest.raises(ValueError, match="states.pt is one of the I2VGen-XL variant"):
        load({name: torch.zeros(1)})


def test_nothing_is_left_of_a_failed_conversion(weights, tmp_path):
    save_file({name: tensor for name, tensor in weights.items() if name != KEYS[0]}, tmp_path / "states.safetensors")
    with pytest.raises(ValueError, match="1 missing"):
        convert(tmp_path / "states.safetensors", tmp_path / "new" / "pipe", sizes=SIZES, **parts())
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="name of a new folder"):
        convert(tmp_path / "missing.pt", tmp_path / "there", **parts())


def test_an_interrupted_save_leaves_nothing(weights, tmp_path, monkeypatch):
    save_file(weights, tmp_path / "states.safetensors")

    def fail(self, folder):
        (folder / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(CogVideoXSTARPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(tmp_path / "states.safetensors", tmp_path / "new" / "pipe", sizes=SIZES, **parts())
    assert not list((tmp_path / "new").iterdir())


class Evil:
    def __reduce__(self):
        return print, ("code of the file was run",)


@pytest.mark.parametrize("content", [Evil(), {"module": Evil()}, {"module": {"a": 3}}, [1]])
def test_other_files_are_refused_and_no_code_is_run(content, tmp_path, capsys):
    torch.save(content, tmp_path / "states.pt")
    with pytest.raises(ValueError, match="weights alone|named tensors"):
        read_official(tmp_path / "states.pt")
    assert not capsys.readouterr().out


def test_broken_and_missing_files_are_named(tmp_path):
    (tmp_path / "states.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not a whole file of weights"):
        read_official(tmp_path / "states.pt")
    with pytest.raises(ValueError, match="does not exist"):
        read_official(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"one mp_rank_00_model_states\.pt in .*found 0"):
        read_official(tmp_path)
