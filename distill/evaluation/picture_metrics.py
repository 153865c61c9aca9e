"""Comparisons of images by trained networks, from weights that lie on this machine: nothing is downloaded.

- `lpips`, a distance to the teacher's images (Zhang et al., https://arxiv.org/abs/1801.03924, AlexNet, version 0.1):
  needs torchmetrics, which brings the linear layers, and the weights of torchvision's AlexNet in a file. torchvision
  itself, which torchmetrics would ask for and let download them, is not needed.
- `clip_text`, 100 times the cosine of image and prompt, at least 0 (Hessel et al., https://arxiv.org/abs/2104.08718),
  and `clip_picture`, the same of image and teacher's image: a folder with a CLIP model of transformers.
- `frechet`, the Frechet distance of the features of all images to those of the teacher's, as FID, but by the features
  of a model of transformers such as DINOv2 or CLIP: needs torchmetrics. It is biased for less images than features.

The Inception network of the original FID is not offered: its weights come as TorchScript or pickle, which may run code
when they are read. Models are read from safetensors, LPIPS's weights without code.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffattn.files.weights import load_strictly, read_weights

Pictures = Sequence[np.ndarray]
"""uint8 (height, width, 3) each."""
Metric = Callable[[Pictures, Pictures, Sequence[str]], float]
"""Images, the teacher's images, prompts -> one number."""
Place = str | os.PathLike[str]

TITLES = {
    "lpips": "LPIPS to the teacher's",
    "clip_text": "CLIP score to the prompt",
    "clip_picture": "CLIP score to the teacher's",
    "frechet": "Frechet distance to the teacher's",
}


def open_metrics(
    *,
    lpips: Place | None = None,
    clip: Place | None = None,
    frechet: Place | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Metric]:
    """The metrics whose weights are given: a file of AlexNet's, a folder with a CLIP model, one with an image model.

    Raises `ValueError` or `ImportError` with what is needed where they can't be read.
    """
    found: dict[str, Metric] = {}
    if lpips is not None:
        found["lpips"] = Lpips(lpips, device)
    if clip is not None:
        model = Clip(clip, device)
        found |= {"clip_text": model.text, "clip_picture": model.picture}
    if frechet is not None:
        found["frechet"] = Frechet(frechet, device)
    return found


class Lpips:
    """Mean over the images of LPIPS to the teacher's; both have at least 32 pixels a side."""

    def __init__(self, weights: Place, device: torch.device | str) -> None:
        try:
            import torchmetrics.functional.image as images
        except ImportError as error:
            raise ImportError('LPIPS needs torchmetrics: pip install "diffattn[metrics]"') from error
        self.net = alexnet()
        _load_alexnet(self.net, Path(weights))
        linear = Path(str(images.__file__)).parent / "lpips_models" / "alex.pth"
        if not linear.is_file():
            raise ValueError(
                f"expected LPIPS's linear layers in torchmetrics, got no {linear}; install torchmetrics 1.6"
            )
        heads = read_weights(linear)
        self.heads = [heads[f"lin{number}.model.1.weight"].to(device) for number in range(5)]
        self.net.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: Pictures, teacher: Pictures, prompts: Sequence[str]) -> float:
        pairs = zip(pictures, teacher, strict=True)
        return float(np.mean([self._distance(*map(self._features, pair)) for pair in pairs]))

    def _features(self, picture: np.ndarray) -> list[Tensor]:
        """After every ReLU, of unit length along the channels."""
        pixels = torch.from_numpy(np.array(picture)).to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        shift, scale = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        hidden, found = (pixels - shift) / scale, []
        for layer in self.net:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU):
                found.append(hidden / (hidden.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found

    def _distance(self, own: list[Tensor], wanted: list[Tensor]) -> float:
        parts = zip(self.heads, own, wanted, strict=True)
        return sum(float(nn.functional.conv2d((a - b).square(), head).mean()) for head, a, b in parts)


# Of LPIPS's input in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def alexnet() -> nn.Sequential:
    """The convolutions of AlexNet as torchvision numbers them (Krizhevsky, https://arxiv.org/abs/1404.5997)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def _load_alexnet(net: nn.Sequential, path: Path) -> None:
    wanted = "the weights of torchvision's AlexNet (alexnet-owt-7be5be79.pth, or the same as .safetensors)"
    try:
        tensors = read_weights(path)
        own = {name.removeprefix("features."): value for name, value in tensors.items() if name.startswith("features.")}
        load_strictly(net, own, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"LPIPS needs {wanted}, got {path}: {_first_line(error)}") from error


class Clip:
    """Cosines of CLIP's embeddings, times 100 and at least 0, as means over the images."""

    def __init__(self, folder: Place, device: torch.device | str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model = _opened(CLIPModel, folder, "a CLIP model of transformers").to(device).eval()
        self.tokenizer = _opened(AutoTokenizer, folder, "the tokenizer of a CLIP model")
        self.look = Look(folder, device)
        self.length = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def text(self, pictures: Pictures, teacher: Pictures, prompts: Sequence[str]) -> float:
        """Of each image and its prompt, which is cut where it is too long."""
        words = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.look.device)
        found = self.model(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=self.look(pictures)
        )
        return _cosine(found.image_embeds, found.text_embeds)

    @torch.no_grad()
    def picture(self, pictures: Pictures, teacher: Pictures, prompts: Sequence[str]) -> float:
        """Of each image and the teacher's."""
        return _cosine(self._embedded(pictures), self._embedded(teacher))

    def _embedded(self, pictures: Pictures) -> Tensor:
        hidden = self.model.vision_model(pixel_values=self.look(pictures)).pooler_output
        projected: Tensor = self.model.visual_projection(hidden)
        return projected


class Frechet:
    """|mu - mu_t|^2 + trace(S + S_t - 2 (S S_t)^(1/2)) over the features of all images and of the teacher's."""

    def __init__(self, folder: Place, device: torch.device | str) -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise ImportError('the Frechet distance needs torchmetrics: pip install "diffattn[metrics]"') from error
        from transformers import AutoModel

        model = _opened(AutoModel, folder, "an image model of transformers, such as DINOv2 or CLIP")
        self.features = Features(getattr(model, "vision_model", model), Look(folder, device)).to(device).eval()
        self.distance = FrechetInceptionDistance(feature=self.features)

    @torch.no_grad()
    def __call__(self, pictures: Pictures, teacher: Pictures, prompts: Sequence[str]) -> float:
        if len(pictures) < 2:
            raise ValueError(f"the Frechet distance compares at least 2 images, got {len(pictures)}; give more prompts")
        self.distance.reset()
        for group, real in ((teacher, True), (pictures, False)):
            for picture in group:
                self.distance.update(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], real=real)
        return float(self.distance.compute())


class Features(nn.Module):
    """Pooled features of uint8 images (b, 3, height, width)."""

    def __init__(self, model: Any, look: "Look") -> None:
        super().__init__()
        self.model, self.look = model, look
        self.num_features = int(model.config.hidden_size)

    def forward(self, pictures: Tensor) -> Tensor:
        pixels = self.look([picture.permute(1, 2, 0).cpu().numpy() for picture in pictures])
        pooled: Tensor = self.model(pixel_values=pixels).pooler_output
        return pooled.double()


class Look:
    """Images as a model of transformers wants them."""

    def __init__(self, folder: Place, device: torch.device | str) -> None:
        from transformers import AutoImageProcessor

        self.processor = _opened(AutoImageProcessor, folder, "its preprocessor_config.json")
        self.device = torch.device(device)

    def __call__(self, pictures: Pictures) -> Tensor:
        pixels: Tensor = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return pixels.to(self.device)


def _opened(kind: Any, folder: Place, wanted: str) -> Any:
    """From a folder on this machine, and from safetensors."""
    if not Path(folder).is_dir():
        raise ValueError(f"expected a folder with {wanted}, got {folder}, which is none; download it first")
    safe = {"use_safetensors": True} if hasattr(kind, "save_pretrained") and "Model" in kind.__name__ else {}
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **safe)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"expected {wanted} in {folder}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((100 * nn.functional.cosine_similarity(a, b, dim=-1)).clamp(min=0).mean())
