"""Files of weights: what is read, what is refused, and that a model is filled whole or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffattn.files.weights import cast, check_keys, load_strictly, read_weights

ONE, TWO = {"a": torch.ones(2)}, {"b": torch.zeros(3, 1)}


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.pt", "x.bin"])
def test_reads_a_file(tmp_path, name):
    save = save_file if name.endswith("safetensors") else torch.save
    save(ONE, tmp_path / name)
    assert torch.equal(read_weights(tmp_path / name)["a"], ONE["a"])


def test_unwraps_a_training_checkpoint(tmp_path):
    torch.save({"state_dict": ONE, "epoch": 3}, tmp_path / "x.ckpt")
    assert read_weights(tmp_path / "x.ckpt").keys() == {"a"}


def test_reads_a_folder_of_shards(tmp_path):
    stem = "diffusion_pytorch_model"
    save_file(ONE, tmp_path / f"{stem}-00001-of-00002.safetensors")
    save_file(TWO, tmp_path / f"{stem}-00002-of-00002.safetensors")
    files = {"a": f"{stem}-00001-of-00002.safetensors", "b": f"{stem}-00002-of-00002.safetensors"}
    (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert read_weights(tmp_path).keys() == {"a", "b"}


def test_prefers_safetensors_to_a_pickle(tmp_path):
    save_file(ONE, tmp_path / "diffusion_pytorch_model.safetensors")
    torch.save(TWO, tmp_path / "diffusion_pytorch_model.bin")
    assert read_weights(tmp_path).keys() == {"a"}


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_runs_no_code_in_a_pickle(tmp_path):
    torch.save({"a": Trap(str(tmp_path / "sprung"))}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="not a whole file of weights alone"):
        read_weights(tmp_path / "x.ckpt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_refuses_broken_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a whole"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_refuses_a_file_cut_anywhere(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)({"a": torch.ones(40)}, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for length in range(1, len(content), 7):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{name} is not a whole") as error:
            read_weights(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64, torch.float8_e5m2])
def test_refuses_numbers_that_are_no_weights(tmp_path, name, dtype):
    tensors = {"a": torch.ones(2), "b": torch.ones(2).to(dtype), "positions": torch.arange(3)}
    (save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    with pytest.raises(ValueError, match=rf"float32 or float64 in .*{name}; got {dtype} in b; take the file before"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}']
)
def test_refuses_a_broken_index(tmp_path, text):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        read_weights(tmp_path)


def test_an_index_leads_nowhere_else(tmp_path):
    (tmp_path / "own").mkdir()
    save_file(ONE, tmp_path / "secret.safetensors")
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "own" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected names of files beside it"):
        read_weights(tmp_path / "own")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.tensor([0, float("nan"), 0]), "finite weights in x; got NaN or infinity in bias"),
        (torch.tensor([0, 0, -float("inf")]), "finite weights in x; got NaN or infinity in bias"),
        (torch.arange(3), "expected torch.float32 for bias in x; got torch.int64"),
    ],
)
def test_a_model_is_not_filled_with_what_no_weights_are(assign, wrong, message):
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=message):
        load_strictly(model, {"weight": torch.ones(3, 2), "bias": wrong}, "x", assign=assign)
    assert torch.equal(model.weight, before)


def test_buffers_may_be_infinite():
    model = nn.BatchNorm1d(3)
    model.register_buffer("mask", torch.zeros(2))
    load_strictly(model, {**model.state_dict(), "mask": torch.tensor([0, -float("inf")])}, "x")
    assert model.mask.isinf().any()


def test_precision_is_changed_of_weights_alone():
    assert cast(torch.ones(2), torch.bfloat16).dtype == torch.bfloat16
    assert cast(torch.arange(2), torch.bfloat16).dtype == torch.int64


def test_refuses_what_is_not_weights(tmp_path):
    torch.save({"a": 3}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="expected named tensors"):
        read_weights(tmp_path / "x.pt")
    torch.save([1], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="expected named tensors"):
        read_weights(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="does not exist"):
        read_weights(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="found none"):
        read_weights(tmp_path)


@pytest.mark.parametrize("assign", [False, True])
def test_fills_a_model_exactly(assign):
    with torch.device("meta" if assign else "cpu"):
        model = nn.Linear(2, 3)
    weights = {"weight": torch.randn(3, 2), "bias": torch.randn(3)}
    load_strictly(model, weights, "x", assign=assign)
    assert torch.equal(model.weight, weights["weight"]) and torch.equal(model.bias, weights["bias"])
    assert (model.weight.data_ptr() == weights["weight"].data_ptr()) == assign


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": torch.zeros(3, 2)}, "1 missing: bias$"),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "c": torch.zeros(1), "b": torch.zeros(1)},
            "2 unex.*b, c",
        ),
        ({"weight": torch.zeros(2, 2), "bias": torch.zeros(3)}, r"weight is \(2, 2\), expected \(3, 2\)"),
    ],
)
def test_names_what_does_not_fit_and_changes_nothing(weights, message):
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=message):
        load_strictly(model, weights, "x")
    assert torch.equal(model.weight, before)


def test_names_every_key():
    keys = [f"layers.{i}" for i in range(40)]
    with pytest.raises(ValueError) as error:
        check_keys(keys, [], "x")
    assert all(key in str(error.value) for key in keys)
