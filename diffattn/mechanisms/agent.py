"""Agent attention: a few agents gather from all tokens, then every token asks the agents.

    V_A     = softmax(scale * A K^T) V                     A: m agent queries; K, V: all n tokens, text included
    out_q   = softmax(scale^k_scale2 * q A^T) V_A + k_shortcut * v_q        for every cell q of the grid
    out_t   = softmax(scale * t K^T) V                                      for every other token t (text), exactly

So a picture's tokens learn of the text through their agents, which see it exactly, and text costs `others * n`. With
`others="agents"` the other tokens ask the agents as well, as the class token of the published image classifier does.

Where agents come from:
- `agents="pool"`: adaptive average pooling of the cells' queries, over one to three axes. Because queries are a linear
  projection, this equals projecting pooled tokens; where the model normalises or rotates its queries (most diffusion
  transformers) it is an approximation of that: the mean of the final queries.
- `agents="merge"`: token merging (`merging.py`) shortens the cells' q, k and v by `ratio` and leaves the agents by
  `agent_ratio`; outputs are copied back. Again exact where q, k and v are linear in the tokens, as in Stable Diffusion.
  It compares the block's input, or the keys where `Context.features` is None.

Agents save nothing unless they are few: m agents for n cells (after merging) are used only if 2 m < n, else the layer
is the exact softmax (of the merged tokens). `AgentAttention.plan` tells. A model's mask over the keys holds for the
agents and for the other tokens; a mask that differs between queries is refused.

The trained form (`bias`, `depthwise_conv`: `agent_weights.py`) adds B1 and B2 to the two logits and a depthwise
convolution of V to the cells. It always uses its agents.

Source: Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, agent attention and its use in
Stable Diffusion, https://arxiv.org/abs/2312.08874. Differences from the released code: any grid, number of frames and
number of agents; text; ratio 0; destinations seeded per layer and step, for any batch size. `official=True` brings back
draws from torch's global state (forked at each call, not once per model) and none for odd batches.

This file is long because one mechanism has three published forms and many options; its parts (merging, pooling, trained
weights) have files of their own.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import register
from ..grid import TokenGrid
from ..options import FINITE, Must, at_least
from .base import Context, Mechanism, default_scale, mask_as
from .parts import merging
from .parts.agent_formula import add_mask, agent_attention, key_mask
from .parts.agent_weights import AgentWeights
from .parts.merging import Stage
from .parts.pooling import averages_per_axis, pool, pool_groups
from .softmax import softmax_reference

DEFAULT_AGENTS = 256
CELLS_PER_DEFAULT_AGENT = 4
STAGE_OPTIONS = ("sx", "sy", "ratio", "agent_ratio")
MERGE_OPTIONS = (*STAGE_OPTIONS, "stages", "use_rand", "seed", "official")
POOL_OPTIONS = ("num_agents", "agent_size", "bias", "depthwise_conv", "window")


class Plan(NamedTuple):
    """What one call computes."""

    tokens: int
    """Cells after merging."""
    agents: int
    """Agents in use; 0 for the exact softmax."""


def worthwhile(agents: int, tokens: int) -> bool:
    """The published rule for using `agents` on `tokens` cells, strict."""
    return 2 * agents < tokens


SIZE = Must(
    "([frames,] rows, columns), ints of at least 1",
    lambda size: len(size) in (2, 3) and all(side >= 1 for side in size),
)


@register("agent")
@dataclass(frozen=True, kw_only=True)
class AgentAttention(Mechanism):
    """Agent attention, pooled (any model), merged (Stable Diffusion) or trained.

    Time O((m + others) n d), and for the matching O(n^2 / (sx sy) h d); memory O(n d).

    >>> AgentAttention(num_agents=256).plan(TokenGrid(64, 64, before=512))
    Plan(tokens=4096, agents=256)
    """

    one_mask: ClassVar[bool] = True

    agents: Literal["pool", "merge"] = "pool"
    """"pool": averages of the queries over the grid; "merge": similar tokens merged."""
    num_agents: Annotated[int | None, at_least(1)] = None
    """At most so many pooled agents, in proportion to the axes; None: 256, or one for 4 cells if that is fewer."""
    agent_size: Annotated[tuple[int, ...] | None, SIZE] = None
    """Instead, agents along (rows, columns) or (frames, rows, columns); two numbers pool over all frames."""
    k_scale2: Annotated[float, FINITE] = 0.3
    """Exponent of the second softmax's scale: 1 is the usual scale, smaller is sharper."""
    k_shortcut: Annotated[float, FINITE] = 0.075
    """Share of a token's own value added to its output."""
    others: Literal["exact", "agents"] = "exact"
    """How other tokens get their output: "exact" softmax over all tokens, or from the "agents"."""
    max_downsample: Annotated[int | None, at_least(1)] = None
    """Layers coarser than this, against the latent image, stay exact; None: no limit."""
    ratio: float = 0.4
    """Merging: share of the cells merged away."""
    agent_ratio: float = 0.95
    """Merging: share of the cells merged away to leave the agents."""
    sx: int = 4
    """Merging: columns of the block that gives one destination."""
    sy: int = 4
    """Merging: rows of that block."""
    stages: tuple[Stage, ...] = ()
    """Merging: (until, sx, sy, ratio, agent_ratio) by progress, instead of those four; unknown progress is 0."""
    use_rand: bool = True
    """Merging: draw each block's destination, anew for every layer and step, else take its first cell."""
    seed: Annotated[int, at_least(0)] = 0
    """Merging: what the draws depend on beside layer and step."""
    official: bool = False
    """Merging: draw as the released code does."""
    bias: bool = False
    """Trained form: position biases on both logits."""
    depthwise_conv: bool = False
    """Trained form: depthwise convolution of the values."""
    window: Annotated[int, at_least(1)] = 14
    """Trained form: side of the stored row and column biases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.agents == "pool":
            self._refuse(MERGE_OPTIONS, 'is an option of agents="merge"')
        else:
            self._refuse(POOL_OPTIONS, 'is an option of agents="pool"')
        if self.stages:
            self._refuse(STAGE_OPTIONS, "is given by stages")
        if self.agent_size is not None:
            self._refuse(("num_agents",), "is given by agent_size")
        elif self.trained:
            raise ValueError("agent: trained weights belong to fixed agents; give agent_size, such as (7, 7)")
        object.__setattr__(self, "stages", merging.checked_stages(self.stages))
        merging.checked_stages(self._stages)

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise ValueError(f"agent: {field.name} {why}; leave it out")

    @classmethod
    def stable_diffusion(cls) -> "AgentAttention":
        """The published schedule for Stable Diffusion 1.5: agents for 40% of the steps, then merging alone."""
        stages = (Stage(0.4, 4, 4, 0.4, 0.95), Stage(1.0, 2, 2, 0.4, 0.5))
        return cls(agents="merge", stages=stages, max_downsample=1)

    @classmethod
    def published(cls, agent_size: tuple[int, int] = (7, 7), window: int = 14) -> "AgentAttention":
        """The published trained form: all tokens ask the agents, both softmaxes scale by 1/sqrt(d)."""
        plain = cls(agent_size=agent_size, k_scale2=1.0, k_shortcut=0.0, others="agents")
        return replace(plain, bias=True, depthwise_conv=True, window=window)

    @property
    def needs(self) -> frozenset[str]:
        needs = {"downsample"} if self.max_downsample is not None else set()
        if self.agents == "merge":
            needs |= {"features"}
            needs |= {"call_index", "progress"} if self.use_rand and not self.official else set()
            needs |= {"progress"} if len(self.stages) > 1 else set()
        return frozenset(needs)

    @property
    def backends(self) -> tuple[str, ...]:
        """Both are `scaled_dot_product_attention`, once per softmax."""
        return "auto", "dense"

    @property
    def trained(self) -> bool:
        """Has it weights of its own?"""
        return self.bias or self.depthwise_conv

    @property
    def _stages(self) -> tuple[Stage, ...]:
        return self.stages or (Stage(1.0, self.sx, self.sy, self.ratio, self.agent_ratio),)

    def layout(self, grid: TokenGrid) -> tuple[int, int, int]:
        """Pooled agents along frames, rows and columns."""
        if self.agent_size is not None:
            frames, rows, columns = (1, *self.agent_size)[-3:]
            return frames, rows, columns
        default = max(1, min(DEFAULT_AGENTS, grid.cells // CELLS_PER_DEFAULT_AGENT))
        return averages_per_axis(grid.shape, self.num_agents or default)

    def plan(self, grid: TokenGrid, context: Context = Context()) -> Plan:
        """Cells and agents of one call, by the activity rule."""
        if self._too_coarse(context):
            return Plan(grid.cells, 0)
        if self.agents == "pool":
            tokens, agents = grid.cells, math.prod(self.layout(grid))
        else:
            stage = merging.stage_at(self._stages, context.progress)
            tokens, agents = (
                grid.cells - merging.count_merged(grid, stage.sx, stage.sy, ratio)
                for ratio in (stage.ratio, stage.agent_ratio)
            )
        return Plan(tokens, agents if self.trained or worthwhile(agents, tokens) else 0)

    def _too_coarse(self, context: Context) -> bool:
        return self.max_downsample is not None and context.downsample > self.max_downsample

    def check(self, grid: TokenGrid, context: Context = Context()) -> None:
        if self._too_coarse(context):
            return
        if self.agents == "merge":
            for stage in self._stages:
                stage.check(grid)
            return
        crowded = any(agents > cells for agents, cells in zip(self.layout(grid), grid.shape, strict=True))
        if crowded and not self.trained:
            raise ValueError(
                f"agent: agent_size={self.agent_size} has more agents along an axis than the grid {grid} has cells; "
                f"use a smaller agent_size, or num_agents, which adapts to the grid"
            )

    def weights(self, heads: int, head_dim: int) -> AgentWeights | None:
        if self.agent_size is None or not self.trained:
            return None
        return AgentWeights(
            heads,
            head_dim,
            math.prod(self.agent_size),
            bias=self.bias,
            depthwise_conv=self.depthwise_conv,
            window=self.window,
            others_ask=self.others == "agents",
        )

    def _weights(self, context: Context) -> AgentWeights | None:
        if not self.trained:
            return None
        if not isinstance(context.weights, AgentWeights):
            raise ValueError("agent: the trained form needs Context(weights=mechanism.weights(heads, head_dim))")
        return context.weights

    def generator(self, context: Context) -> torch.Generator:
        """What draws the destinations of one call."""
        if self.official:
            return torch.Generator().set_state(torch.get_rng_state())
        return merging.seeded_generator(self.seed, context)

    def destinations(self, grid: TokenGrid, batch: int, context: Context) -> Tensor:
        """Cells that others may be merged into, `(dst,)`; the same for all samples."""
        stage = merging.stage_at(self._stages, context.progress)
        random = self.use_rand and not (self.official and batch % 2)
        return merging.destinations(grid, stage.sx, stage.sy, self.generator(context) if random else None)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        backend: str = "auto",
        context: Context = Context(),
    ) -> Tensor:
        self.check_backend(backend)
        grid.check(q, k)
        self.check(grid, context)
        plan = self.plan(grid, context)
        if plan == (grid.cells, 0):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_as(context.mask, q), scale=scale)
        scale = default_scale(q) if scale is None else scale
        if self.agents == "merge":
            return self._attend_merged(q, k, v, grid, plan, scale, context)
        weights = self._weights(context)
        agents = pool(q[..., grid.cell_slice, :], grid, self.layout(grid))
        biases = weights.biases(grid, q.dtype) if weights else (None, None)
        out = agent_attention(
            q, k, v, agents, grid, mask=mask_as(context.mask, q), biases=biases, **self._options(scale)
        )
        return weights.add_convolved(out, v, grid) if weights else out

    def _options(self, scale: float) -> dict[str, Any]:
        """What `agent_attention` takes from this config."""
        scales = {"scale": scale, "scale2": scale**self.k_scale2}
        return {**scales, "shortcut": self.k_shortcut, "others_ask": self.others == "agents"}

    def _attend_merged(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, plan: Plan, scale: float, context: Context
    ) -> Tensor:
        merging.refuse_mask(context)
        features = merging.compared_features(k, grid, context)
        pairs = merging.match(features, self.destinations(grid, len(q), context))
        merged = pairs.first(grid.cells - plan.tokens)
        short = TokenGrid(1, plan.tokens, before=grid.before, after=grid.after, silent=grid.silent)
        parts = [grid.split(tokens) for tokens in (q, k, v)]
        short_q, short_k, short_v = (short.join(merged.merge(cells), others) for cells, others in parts)
        if plan.agents:
            agents = pairs.first(grid.cells - plan.agents).merge(parts[0][0])
            out = agent_attention(short_q, short_k, short_v, agents, short, **self._options(scale))
        else:
            out = F.scaled_dot_product_attention(short_q, short_k, short_v, scale=scale)
        cells, others = short.split(out)
        return grid.join(merged.unmerge(cells), others)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Tensor:
        """Lists of the cells that make each merged token and each agent, then explicit softmaxes, sample by sample."""
        self.check(grid, context)
        plan = self.plan(grid, context)
        scale = default_scale(q) if scale is None else scale
        if plan == (grid.cells, 0):
            return softmax_reference(q, k, v, scale=scale, mask=context.mask)
        weights, mask = self._weights(context), key_mask(context.mask)
        biases = weights.biases(grid, q.dtype) if weights else (None, None)
        outs = []
        for sample, (groups, agent_groups) in enumerate(self._reference_groups(k, grid, plan, context)):
            parts = [grid.split(tokens[sample : sample + 1]) for tokens in (q, k, v)]
            short = TokenGrid(1, plan.tokens, before=grid.before, after=grid.after)
            short_q, short_k, short_v = (short.join(_means(cells, groups), others) for cells, others in parts)
            seen = None if mask is None else mask.broadcast_to(len(q), q.shape[1], 1, grid.tokens)[sample : sample + 1]
            out = softmax_reference(short_q, short_k, short_v, scale=scale, mask=seen)
            if plan.agents:
                agents = _means(parts[0][0], agent_groups)
                gathered = softmax_reference(agents, short_k, short_v, scale=scale, mask=add_mask(biases[0], seen))
                asking = slice(None) if self.others == "agents" else short.cell_slice
                answer = softmax_reference(
                    short_q[..., asking, :], agents, gathered, scale=scale**self.k_scale2, mask=biases[1]
                )
                out[..., asking, :] = answer + self.k_shortcut * short_v[..., asking, :]
            cells, others = short.split(out)
            place = {cell: index for index, group in enumerate(groups) for cell in group}
            outs.append(grid.join(cells[..., [place[cell] for cell in range(grid.cells)], :], others))
        out = torch.cat(outs)
        return weights.add_convolved(out, v, grid) if weights else out

    def _reference_groups(
        self, k: Tensor, grid: TokenGrid, plan: Plan, context: Context
    ) -> list[tuple[list[list[int]], list[list[int]]]]:
        """For each sample, the cells that make each merged token, and those that make each agent."""
        if self.agents == "pool":
            return [([[cell] for cell in range(grid.cells)], pool_groups(grid, self.layout(grid)))] * len(k)
        merging.refuse_mask(context)
        dst = self.destinations(grid, len(k), context).tolist()
        tokens, agents = (grid.cells - count for count in plan)
        return [
            (merging.groups_reference(features, dst, tokens), merging.groups_reference(features, dst, agents))
            for features in merging.compared_features(k, grid, context).tolist()
        ]

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, context: Context = Context()) -> int:
        """Products of the softmaxes, of the matching (features as wide as all heads) and of the convolution."""
        plan = self.plan(grid, context)
        keys = plan.tokens + grid.others
        asking = (keys if self.others == "agents" else plan.tokens) if plan.agents else 0
        exact = 0 if keys == asking else keys - asking - sum(grid.silent)
        products = 4 * (plan.agents * (keys + asking) + exact * keys)
        if self.agents == "merge" and plan != (grid.cells, 0):
            stage = merging.stage_at(self._stages, context.progress)
            targets = merging.count_destinations(grid, stage.sx, stage.sy)
            products += 2 * (grid.cells - targets) * targets
        if self.depthwise_conv:
            products += 2 * 9 * grid.cells
        return products * heads * head_dim


def _means(cells: Tensor, groups: list[list[int]]) -> Tensor:
    """The mean of each group of `(b, h, cells, d)`, by a dense averaging matrix."""
    share = cells.new_zeros(len(groups), cells.shape[-2])
    for row, group in zip(share, groups, strict=True):
        row[group] = 1 / len(group)
    return share @ cells
