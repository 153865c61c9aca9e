"""What the builders of tiny random models have in common; `models` has those, and says what they are for."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """Where one sample's tokens lie in an attention call: other tokens, `frames x rows x columns` cells, others."""

    before: int
    frames: int
    rows: int
    columns: int
    after: int = 0
    silent: tuple[int, int] = (0, 0)
    """So many of the first and the last have no query."""
    aside: int = 0
    """So many tokens attend to each other in a call of their own."""
    apart: bool = False
    """Are calls with fewer keys those of the others among themselves?"""
    further: tuple[tuple[int, int, int, int], ...] = ()
    """Further grids among the others: their first token, frames, rows, columns."""

    @property
    def asking(self) -> slice:
        return slice(self.silent[0], self.total - self.silent[1])

    @property
    def total(self) -> int:
        return self.before + self.frames * self.rows * self.columns + self.after


def everything(output: Any, inputs: dict[str, Any]) -> Any:
    return output


@dataclass
class Tiny:
    """A model, the keyword arguments of one forward, and the layout of its layers."""

    model: nn.Module
    inputs: dict[str, Any]
    spatial: dict[str, tuple[Tokens, ...]]
    """Regular expression on layer names -> layout of the whole batch, or one per sample."""
    temporal: dict[str, tuple[Tokens, ...]] = field(default_factory=dict)
    """The same for layers that attend along the frames at one place."""
    select: Callable[[Any, dict[str, Any]], Any] = everything
    """What counts of the output of a call with these inputs: some models compute padding too."""
    padding_apart: bool = False
    """Do its masks let padding see padding, which concerns no cell?"""

    def run(self, model: nn.Module | None = None, **changes: Any) -> Tensor:
        """All outputs of one forward in one flat tensor."""
        model = self.model if model is None else model
        plain = {} if "return_dict" not in inspect.signature(type(model).forward).parameters else {"return_dict": False}
        inputs = {**self.inputs, **changes}
        return flat(self.select(model(**inputs, **plain), inputs))


def flat(output: Any) -> Tensor:
    """Every tensor inside nested lists, tuples, dicts and dataclasses, one after the other."""
    if isinstance(output, Tensor):
        return output.flatten()
    if not isinstance(output, (dict, list, tuple)):
        output = vars(output)
    if isinstance(output, dict):
        output = list(output.values())
    return torch.cat([flat(part) for part in output if isinstance(part, (Tensor, dict, list, tuple))])


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator(shape))


def _generator(shape: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(hash(shape) % 10_000)


def randomize(model: nn.Module) -> nn.Module:
    """Matrices with unit gain, vectors near where they start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(1.3 * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def _make(name: str, **config: Any) -> nn.Module:
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(0)
        # FluxControlNetModel imports a name that diffusers itself deprecates
        warnings.simplefilter("ignore", FutureWarning)
        return randomize(getattr(diffusers, name)(**config))


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


ROWS, COLUMNS = 6, 9
TEXT = 5
TIME = torch.tensor([0.7, 0.3])


def picture_ids(rows: int = ROWS, columns: int = COLUMNS, axes: int = 3) -> Tensor:
    """Image number, row, column (and 0) of every token."""
    ids = torch.zeros(rows, columns, axes)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.flatten(0, 1)


def text_mask(*lengths: int) -> Tensor:
    """True for the first tokens of each sample."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


_FLUX = dict(
    in_channels=4,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 6, 6),
)
_JOINT = r"(single_)?transformer_blocks\.\d+\.attn"


def _flux_inputs(cells: int = ROWS * COLUMNS) -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, cells, 4),
        encoder_hidden_states=draw(2, TEXT, 12),
        pooled_projections=draw(2, 8),
        timestep=TIME,
        img_ids=picture_ids(),
        txt_ids=torch.zeros(TEXT, 3),
    )


_WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=16,
    num_layers=2,
    rope_max_seq_len=32,
)


def _wan_inputs() -> dict[str, Any]:
    return dict(
        hidden_states=draw(2, 4, 3, 8, 10), timestep=torch.tensor([7, 3]), encoder_hidden_states=draw(2, TEXT, 8)
    )


_UNET = dict(norm_num_groups=4, layers_per_block=1, cross_attention_dim=12, block_out_channels=(8, 16))
_FINE, _COARSE = Tokens(0, 1, 8, 12), Tokens(0, 1, 4, 6)


def _unet_layouts(block: str = "transformer_blocks") -> dict[str, tuple[Tokens, ...]]:
    """Latents of 8 x 12, halved once: the second level down, the middle and the first level up are coarse."""
    layer = rf"\.attentions\.\d+\.{block}\.\d+\.attn1"
    return {
        rf"(down_blocks\.0|up_blocks\.1){layer}": (_FINE,),
        rf"(down_blocks\.1|mid_block|up_blocks\.0){layer}": (_COARSE,),
    }


def _two_levels(down: str, up: str) -> dict[str, Any]:
    return dict(down_block_types=(down, down), up_block_types=(up, up))


def _unet_inputs() -> dict[str, Any]:
    return dict(sample=draw(2, 4, 8, 12), timestep=torch.tensor([7, 3]), encoder_hidden_states=draw(2, TEXT, 12))
