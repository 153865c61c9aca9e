"""Metrics by trained networks, on tiny random ones: the right numbers, from files on this machine alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import text_pipelines
import torch
import transformers
from diffattn.distill.evaluation.evaluate import MODELS, compare
from diffattn.distill.evaluation.picture_metrics import TITLES, Clip, Frechet, Lpips, alexnet, open_metrics
from safetensors.torch import load_file, save_file
from torch import nn

SIDE = 48
PROMPTS = ("a red circle", "a blue ring", "a green square at the top left")


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet's weights, random, under torchvision's names."""
    path = tmp_path_factory.mktemp("alex") / "alexnet.safetensors"
    net = models.randomize(alexnet())
    save_file({f"features.{name}": value for name, value in net.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with its processor."""
    folder, words = tmp_path_factory.mktemp("clip"), text_pipelines.tokenizer("clip")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**vision, "vocab_size": len(words), "max_position_embeddings": 8}
    text |= {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    models.randomize(transformers.CLIPModel(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def pictures(seed: int, count: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8))


def test_lpips_is_torchmetrics_own(alex, monkeypatch):
    import torchmetrics.functional.image.lpips as theirs

    weights = {name.removeprefix("features."): value for name, value in load_file(alex).items()}

    def features(name: str, pretrained: bool) -> nn.Module:
        net = alexnet()
        net.load_state_dict(weights)
        return net

    monkeypatch.setattr(theirs, "_get_tv_model_features", features)
    wanted = theirs._LPIPS(net="alex", pretrained=False, pnet_rand=True)
    linear = Path(theirs.__file__).parent / "lpips_models/alex.pth"
    wanted.load_state_dict(torch.load(linear, weights_only=True, map_location="cpu"), strict=False)
    own, other = pictures(0), pictures(1)
    got = Lpips(alex, "cpu")(own, other, PROMPTS)
    first, second = (torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2) / 127.5 - 1 for group in (own, other))
    assert got == pytest.approx(float(wanted(first, second).mean()), rel=1e-4)
    assert got > 0.01 and Lpips(alex, "cpu")(own, own, PROMPTS) == 0


def test_clip_scores_are_cosines_of_the_models_embeddings(clip):
    own, other = pictures(0), pictures(1)
    model = transformers.CLIPModel.from_pretrained(clip)
    look = transformers.CLIPImageProcessor.from_pretrained(clip)
    words = text_pipelines.tokenizer("clip")(
        list(PROMPTS), padding=True, truncation=True, max_length=8, return_tensors="pt"
    )
    with torch.no_grad():
        first, second = (
            model(**words, pixel_values=look(images=group, return_tensors="pt")["pixel_values"])
            for group in (own, other)
        )
    opened = Clip(clip, "cpu")
    cosines = 100 * (first.image_embeds * first.text_embeds).sum(1)
    assert opened.text(own, other, PROMPTS) == pytest.approx(float(cosines.clamp(min=0).mean()), abs=1e-3)
    cosines = 100 * (first.image_embeds * second.image_embeds).sum(1)
    assert opened.picture(own, other, PROMPTS) == pytest.approx(float(cosines.clamp(min=0).mean()), abs=1e-3)
    assert opened.picture(own, own, PROMPTS) == pytest.approx(100, abs=1e-3)


def test_the_frechet_distance_is_that_of_two_gaussians(clip):
    distance = Frechet(clip, "cpu")
    own, other = pictures(0, 40), pictures(1, 40)
    first, second = (
        distance.features(torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2)).detach().numpy()
        for group in (own, other)
    )
    roots = np.linalg.eigvals(np.cov(first.T) @ np.cov(second.T)).astype(complex) ** 0.5
    wanted = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(np.cov(first.T) + np.cov(second.T))
    wanted -= 2 * roots.real.sum()
    assert distance(own, other, PROMPTS) == pytest.approx(float(wanted), rel=1e-3)
    assert abs(distance(own, own, PROMPTS)) < 1e-3 < distance(own, other, PROMPTS)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        distance(own[:1], other[:1], PROMPTS)


def test_all_metrics_of_all_models(alex, clip):
    metrics = open_metrics(lpips=alex, clip=clip, frechet=clip)
    assert set(metrics) == set(TITLES)
    drawn = {which: pictures(seed) for seed, which in enumerate(MODELS)}
    found = compare(drawn, PROMPTS, metrics).metrics
    assert {name: set(values) for name, values in found.items()} == {name: set(MODELS) for name in TITLES}
    assert found["lpips"]["teacher"] == 0 < found["lpips"]["student"]
    assert open_metrics() == {}


def broken(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "weights.pth").write_bytes(content)
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("content", [b"", b"none", None])
def test_weights_that_cannot_be_read_are_named(content, tmp_path):
    path = tmp_path / "alexnet.pth" if content is None else broken(tmp_path, content)
    with pytest.raises(ValueError, match=f"needs the weights of torchvision's AlexNet .*got {path}"):
        open_metrics(lpips=path)
    save_file({"features.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="needs the weights of torchvision's AlexNet"):
        open_metrics(lpips=tmp_path / "other.safetensors")


def test_weights_are_read_without_their_code(tmp_path):
    torch.save({"features.0.weight": SimpleNamespace()}, tmp_path / "alexnet.pth")
    with pytest.raises(ValueError, match="Weights only load failed"):
        open_metrics(lpips=tmp_path / "alexnet.pth")


@pytest.mark.parametrize("kind", ["clip", "frechet"])
def test_models_that_are_not_there_are_said(kind: Any, tmp_path):
    with pytest.raises(ValueError, match="expected a folder with .*got /no/such, which is none; download it first"):
        open_metrics(**{kind: "/no/such"})
    with pytest.raises(ValueError, match=f"expected .* model of transformers.* in {tmp_path}"):
        open_metrics(**{kind: tmp_path})


@pytest.mark.parametrize(
    ("kind", "module"), [("lpips", "torchmetrics.functional.image"), ("frechet", "torchmetrics.image.fid")]
)
def test_without_torchmetrics_the_extra_is_named(kind, module, alex, clip, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=r"diffattn\[metrics\]"):
        open_metrics(**{kind: alex if kind == "lpips" else clip})
