"""Files of weights: what is read, what is refused, and that a model is filled whole or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffattn.weights import check_keys, load_strictly, read_weights

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
