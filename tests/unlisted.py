"""Models that have no row, and where their tokens lie, by hand."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from models import COLUMNS, ROWS, TEXT, TIME, Tiny, Tokens, _make, draw, picture_ids, randomize
from torch import Tensor, nn
from torch.nn import functional as F


def prx() -> Tiny:
    """Asks with the image alone, and answers by text and image."""
    model = _make(
        "PRXTransformer2DModel",
        in_channels=4,
        patch_size=2,
        context_in_dim=12,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    inputs = dict(
        hidden_states=draw(2, 4, 2 * ROWS, 2 * COLUMNS), timestep=TIME, encoder_hidden_states=draw(2, TEXT, 12)
    )
    return Tiny(model, inputs, {})


def prior() -> Tiny:
    """Tokens on no grid: embeddings of a text and of an image."""
    model = _make(
        "PriorTransformer",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=12,
        num_embeddings=TEXT,
        additional_embeddings=4,
    )
    inputs = dict(
        hidden_states=draw(2, 12),
        timestep=torch.tensor([7, 3]),
        proj_embedding=draw(2, 12),
        encoder_hidden_states=draw(2, TEXT, 12),
    )
    return Tiny(model, inputs, {})


class Toy(nn.Module):
    """One layer of attention over latents (b, c, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"patch_size": 1}
        self.enter = nn.Linear(4, 16)
        self.attn = Attention(16, heads=2, dim_head=8)
        self.leave = nn.Linear(16, 4)

    def order(self, tokens: Tensor) -> Tensor:
        """The cells (b, height x width, c) as the layer gets them."""
        return tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.enter(self.order(hidden_states.flatten(2).transpose(1, 2)))
        return self.leave(x + self.attn(x))


class ColumnByColumn(Toy):
    """Lists its cells column by column."""

    def order(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (ROWS, COLUMNS)).transpose(1, 2).flatten(1, 2)


class MixedBefore(Toy):
    """Has told every cell of all others before the layer sees them."""

    def order(self, tokens: Tensor) -> Tensor:
        return tokens + tokens.mean(dim=1, keepdim=True)


class PlainLayer(nn.Module):
    """Attention without a processor."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class Nothing(nn.Module):
    """Gives nothing."""

    def forward(self, x: Tensor) -> None:
        return None


class OnlyMatrices(Toy):
    """Has nothing but matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(16, 16)


class Beside(Toy):
    """Is told the size of an image that no layer sees: tokens alone come to its attention."""

    def forward(self, tokens: Tensor, style: Tensor) -> Tensor:
        x = self.enter(tokens)
        return self.leave(x + self.attn(x)) + style.mean()


def beside() -> Tiny:
    inputs = dict(tokens=draw(2, ROWS * COLUMNS, 4), style=draw(2, 4, ROWS, COLUMNS))
    return Tiny(randomize(Beside()), inputs, {})


class WithoutProcessor(Toy):
    """Its attention layer computes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = PlainLayer()


def in_a_helper(query: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, query, query, **options)


class HelpedProcessor:
    """Attends in a function beside it."""

    def __call__(self, attn: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        heads = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)
        return in_a_helper(heads).transpose(1, 2).flatten(2)


class CausalProcessor:
    """Attends to what came before, or to chosen tokens at random."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.options = dict(dropout_p=dropout, is_causal=not dropout)

    def __call__(self, attn: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        x = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x, **self.options).transpose(1, 2).flatten(2)


class Tokens3D(Toy):
    """A video (b, frames, height, width, c), text behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"patch_size": (1, 1, 1)}

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, None]:
        x = self.enter(torch.cat([hidden_states.flatten(1, 3), encoder_hidden_states], dim=1))
        return self.leave(x + self.attn(x)), None


class Listed(Toy):
    """Tokens of an image, listed with those of the text by position ids."""

    def forward(self, img: Tensor, txt: Tensor, token_ids: Tensor) -> Tensor:
        x = torch.cat([txt, img], dim=1)
        x = self.enter(x + token_ids.sum(dim=-1, keepdim=True))
        return self.leave(x + self.attn(x))


@dataclass
class Output:
    """What `Numbered` gives."""

    sample: Tensor
    steps: int = 1


class Numbered(Toy):
    """Tokens of a video, with its size in numbers, and text behind."""

    def forward(self, img: Tensor, txt: Tensor, height: int, width: int, frames: int = 1) -> Output:
        assert img.shape[1] == frames * height * width
        x = self.enter(torch.cat([img, txt], dim=1))
        return Output(self.leave(x + self.attn(x)))


class Framed(Toy):
    """Tokens of a video (b, n, c) with their times, rows and columns."""

    def forward(self, latents: Tensor, coords: Tensor) -> dict[str, Tensor]:
        x = self.enter(latents + coords.sum(dim=-1, keepdim=True))
        return {"sample": self.leave(x + self.attn(x))}


class Between(Toy):
    """Text before the cells, and three tokens of its own behind them, or the other way round."""

    def __init__(self, text_first: bool = True) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(1, 3, 4))
        self.text_first = text_first

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        own = self.own.expand(len(hidden_states), -1, -1)
        first, last = (encoder_hidden_states, own) if self.text_first else (own, encoder_hidden_states)
        x = self.enter(torch.cat([first, hidden_states.flatten(2).mT, last], dim=1))
        return self.leave(x + self.attn(x))


class SpaceTime(nn.Module):
    """A layer within each frame and one along the frames, of a video (b, c, frames, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 16)
        self.space = Attention(16, heads=2, dim_head=8)
        self.time = Attention(16, heads=2, dim_head=8)
        self.leave = nn.Linear(16, 4)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        batch, _, frames, height, width = video.shape
        x = self.enter(video.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2))
        both = torch.cat([x, self.enter(text).repeat_interleave(frames, dim=0)], dim=1)
        x = x + self.space(both)[:, : height * width]
        x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
        return self.leave(x + self.time(x))


class Ignoring(Toy):
    """Makes nothing of its sample, and all of its condition."""

    def forward(self, sample: Tensor, control: Tensor) -> Tensor:
        return super().forward(control + 0 * sample)


class Patched(Toy):
    """Has patches of 4 x 4 cells of its latents, and no config that says so; its attention is named `mixer`."""

    def __init__(self) -> None:
        super().__init__()
        del self.config, self.attn
        self.enter = nn.Conv2d(4, 16, 4, stride=4)
        self.mixer = Attention(16, heads=2, dim_head=8)

    def forward(self, image: Tensor, **options: Any) -> Tensor:
        x = self.enter(image).flatten(2).mT
        return self.leave(x + self.mixer(x))


class Twice(Toy):
    """Its layer attends to the text first, then to the cells, four tokens of text among them."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text, x = self.enter(encoder_hidden_states), self.enter(hidden_states.flatten(2).mT)
        text = self.attn(text)
        x = torch.cat([x[:, :4], text[:, :4], x[:, 4:]], dim=1)
        return self.leave(x + self.attn(x))


class Rows(Toy):
    """Is given no grid: tokens alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.enter(hidden_states)
        return self.leave(x + self.attn(x))


class Masked(Toy):
    """Text before the cells, which the mask hides in part; `causal`: the text sees what came before."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, text_mask: Tensor) -> Tensor:
        x = self.enter(torch.cat([encoder_hidden_states, hidden_states.flatten(2).mT], dim=1))
        seen = F.pad(text_mask, (0, x.shape[1] - text_mask.shape[1]), value=True)
        mask = (seen[:, :, None] & seen[:, None]) | torch.eye(x.shape[1], dtype=torch.bool)
        if self.causal:
            mask = mask & torch.ones_like(mask).tril()
        x = x + self.attn(x, attention_mask=mask)
        return self.leave(x[:, -ROWS * COLUMNS :])


class Noisy(Toy):
    """Adds noise, with dropout on its output."""

    def __init__(self, source: Callable[[Tensor], Tensor] = torch.randn_like) -> None:
        super().__init__()
        self.source = source

    def forward(self, hidden_states: Tensor, generator: torch.Generator | None = None) -> Tensor:
        out = super().forward(hidden_states)
        if generator is not None:
            return out + torch.randn(out.shape, generator=generator)
        return F.dropout(out + self.source(out), 0.1, training=self.training)


def out_of_torch(x: Tensor) -> Tensor:
    return torch.full_like(x, random.random())


class Failing(Toy):
    """Fails behind its attention in one forward, by its number."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.until = which

    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        self.until -= 1
        if self.until == -1:
            raise RuntimeError("the model fails")
        return out


class Writing(Toy):
    """Writes into what it is given."""

    def forward(self, hidden_states: Tensor) -> list[Tensor]:
        hidden_states.mul_(0.5)
        return [super().forward(hidden_states)]


def channels_last() -> Tiny:
    inputs = dict(hidden_states=draw(2, 3, 4, 5, 4), encoder_hidden_states=draw(2, TEXT, 4))
    return Tiny(randomize(Tokens3D()), inputs, {"attn": (Tokens(0, 3, 4, 5, TEXT),)})


def listed() -> Tiny:
    inputs = dict(
        img=draw(2, ROWS * COLUMNS, 4),
        txt=draw(2, TEXT, 4),
        token_ids=torch.cat([torch.zeros(TEXT, 3), picture_ids()]),
    )
    return Tiny(randomize(Listed()), inputs, {"attn": (Tokens(TEXT, 1, ROWS, COLUMNS),)})


def numbered(text: int = TEXT) -> Tiny:
    inputs = dict(img=draw(2, 60, 4), txt=draw(2, text, 4), height=4, width=5, frames=3)
    return Tiny(randomize(Numbered()), inputs, {"attn": (Tokens(0, 3, 4, 5, text),)})


def framed() -> Tiny:
    coords = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0), torch.arange(5.0))
    return Tiny(randomize(Framed()), dict(latents=draw(2, 60, 4), coords=coords), {"attn": (Tokens(0, 3, 4, 5),)})


def patched() -> Tiny:
    layouts = {"mixer": (Tokens(0, 1, ROWS, COLUMNS),)}
    return Tiny(randomize(Patched()), dict(image=draw(2, 4, 4 * ROWS, 4 * COLUMNS), unused=None), layouts)


def twice() -> Tiny:
    inputs = dict(hidden_states=draw(2, 4, ROWS, COLUMNS), encoder_hidden_states=draw(2, TEXT, 4))
    return Tiny(randomize(Twice()), inputs, {})


def ignoring() -> Tiny:
    inputs = dict(sample=draw(2, 4, ROWS, COLUMNS), control=-draw(2, 4, ROWS, COLUMNS))
    return Tiny(randomize(Ignoring()), inputs, {"attn": (Tokens(0, 1, ROWS, COLUMNS),)})


def between(text_first: bool = True) -> Tiny:
    inputs = dict(hidden_states=draw(2, 4, ROWS, COLUMNS), encoder_hidden_states=draw(2, TEXT, 4))
    sides = (TEXT, 3) if text_first else (3, TEXT)
    layout = Tokens(sides[0], 1, ROWS, COLUMNS, sides[1])
    return Tiny(randomize(Between(text_first)), inputs, {"attn": (layout,)})


def space_time() -> Tiny:
    inputs = dict(video=draw(2, 4, 5, ROWS, COLUMNS), text=draw(2, 3, 4))
    return Tiny(
        randomize(SpaceTime()), inputs, {"space": (Tokens(0, 1, ROWS, COLUMNS, 3),)}, {"time": (Tokens(0, 5, 1, 1),)}
    )


def masked(causal: bool = False) -> Tiny:
    inputs = dict(
        hidden_states=draw(2, 4, ROWS, COLUMNS),
        encoder_hidden_states=draw(2, TEXT, 4),
        text_mask=torch.arange(TEXT) < torch.tensor([[TEXT], [3]]),
    )
    return Tiny(randomize(Masked(causal)), inputs, {"attn": (Tokens(TEXT, 1, ROWS, COLUMNS),)})


def toy(kind: type[nn.Module] = Toy, *options: Any, processor: Any = None) -> Tiny:
    model = randomize(kind(*options))
    if processor is not None:
        model.attn.set_processor(processor)
    inputs = dict(hidden_states=draw(2, ROWS * COLUMNS, 4) if kind is Rows else draw(2, 4, ROWS, COLUMNS))
    return Tiny(model, inputs, {"attn": (Tokens(0, 1, ROWS, COLUMNS),)})
