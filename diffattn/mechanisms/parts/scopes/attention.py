"""Softmax attention of some frames to sets of keys: their local window, the global frames, the tokens off the grid.

The frames may be a part of a video whose other parts are elsewhere; `frames.py` says who sees whom.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .frames import Scopes, visible, visible_by_sample
from .memory import Means, Memory

BLOCK_TOKENS = 64
"""Queries of one SDPA call, where frames have fewer tokens; larger frames are computed one by one."""

COPIED_BYTES = {"cpu": 2**20, "cuda": 2**26}
"""Keys and values that an SDPA call copies side by side, at most, where the batch can be parted and no gradient is
wanted; a megabyte fits a core's cache."""


class LocalKeys(Protocol):
    """Keys of neighbouring frames, in one tensor or several."""

    def frames(self, places: list[int], cells: int) -> Iterator["Keys"]:
        """The frames at `places` (ascending), as views of neighbouring ones."""
        ...


class Keys(NamedTuple):
    """Keys of some frames, or of the tokens off the grid."""

    k: Tensor
    """`(b, h, frames * cells, d)`"""
    v: Tensor
    """`(b, h, frames * cells, c)`"""
    mask: Tensor | None = None
    """The model's own mask of these keys, bool or additive, `(b|1, h|1, queries|1, frames * cells)`."""

    def frames(self, places: list[int], cells: int) -> Iterator["Keys"]:
        """The frames at `places` (ascending), as views of neighbouring ones."""
        runs: list[list[int]] = []
        for place in places:
            if runs and runs[-1][1] == place:
                runs[-1][1] += 1
            else:
                runs.append([place, place + 1])
        for first, last in runs:
            part = slice(first * cells, last * cells)
            yield Keys(self.k[:, :, part], self.v[:, :, part], None if self.mask is None else self.mask[..., part])

    def samples(self, part: slice) -> "Keys":
        """A part of the batch."""
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[part]
        return Keys(self.k[part], self.v[part], mask)

    def pick(self, places: tuple[int, ...], cells: int) -> "Keys":
        """A copy of the frames at `places`, in any order."""
        first = torch.tensor(places, dtype=torch.long, device=self.k.device)[:, None] * cells
        index = (first + torch.arange(cells, device=self.k.device)).flatten()
        mask = None if self.mask is None else self.mask.index_select(3, index)
        return Keys(self.k.index_select(2, index), self.v.index_select(2, index), mask)

    def pick_by_sample(self, places: Tensor, cells: int) -> "Keys":
        """A copy of the frames at `places` `(b, frames)` of each sample."""
        index = (places[..., None] * cells + torch.arange(cells, device=places.device)).flatten(1)[:, None, :, None]
        k, v = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[-1])) for x in (self.k, self.v))
        if self.mask is None:
            return Keys(k, v)
        mask = self.mask.expand(len(places), -1, -1, -1)
        return Keys(k, v, mask.gather(3, index.transpose(2, 3).expand(*mask.shape[:3], -1)))

    def pad(self, tokens: int) -> "Keys":
        """With `tokens` keys and values of zeros on either side, that may be seen."""
        k, v = (F.pad(x, (0, 0, tokens, tokens)) for x in (self.k, self.v))
        mask = None if self.mask is None else F.pad(self.mask, (tokens, tokens), value=self.mask.dtype == torch.bool)
        return Keys(k, v, mask)


class JoinedKeys(NamedTuple):
    """Keys of neighbouring frames whose parts lie in tensors of their own, and are not copied together."""

    parts: tuple[Keys, ...]

    def joined(self) -> Keys:
        """A copy in one tensor each."""
        k, v, masks = zip(*self.parts, strict=True)
        return Keys(torch.cat(k, 2), torch.cat(v, 2), None if masks[0] is None else torch.cat(masks, -1))

    def frames(self, places: list[int], cells: int) -> Iterator[Keys]:
        """The frames at `places` (ascending), as views of neighbouring ones."""
        first = 0
        for part in self.parts:
            last = first + part.k.shape[2] // cells
            yield from part.frames([place - first for place in places if first <= place < last], cells)
            first = last


def attend_scopes(
    q: Tensor,
    local: LocalKeys,
    shared: Keys,
    others: Keys,
    scopes: Scopes,
    *,
    queries: range,
    local_frames: range,
    shared_frames: tuple[int, ...] | Tensor,
    cells: int,
    scale: float,
    train_frames: int | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """Frames `queries` attend to the `local` ones in reach, the `shared` ones and the `others`; `(b, h, n, c)`.

    Numbers of frames are those in the whole video, so `q` may be a part of it: `local` then holds the part and the
    frames around it. `cells` is the number of tokens of a frame, `train_frames` the base of the scale by seen frames.
    `shared_frames` are those of all samples, or of each, `(b, top_k)`; `memory` has the means of what is out of sight.
    """
    step = block_frames(len(queries), cells)
    copied = torch.is_grad_enabled()  # autograd keeps all parts; without it they are written where they belong
    out = None if copied else q.new_empty(*q.shape[:3], others.v.shape[-1])
    parts = []
    for first in range(0, len(queries), step):
        block = queries[first : first + step]
        rows = slice(first * cells, (first + len(block)) * cells)
        if isinstance(shared_frames, Tensor):
            at_local, at_shared = scopes.all_keys(block, local_frames, shared_frames.shape[1])
        else:
            at_local, at_shared = scopes.keys(block, local_frames, shared_frames)
        pieces = [*local.frames(at_local, cells), *shared.frames(at_shared, cells)]
        means, means_mask = ([], None) if memory is None else memory.of_block(block, cells, scopes.global_bias)
        pieces += [*(_unmasked(mean, others.mask) for mean in means), others]
        seen_local = tuple(local_frames[place] for place in at_local)
        block_q = q[:, :, rows]
        for part in [slice(0, len(q))] if out is None else batch_parts(pieces, len(q)):
            if isinstance(shared_frames, Tensor):
                seen = visible_by_sample(scopes, block, seen_local, shared_frames[part])
            else:
                seen_shared = tuple(shared_frames[place] for place in at_shared)
                seen = visible(scopes, block, seen_local, seen_shared, q.device)
            mask = block_mask(scopes, seen, len(at_shared), cells, others.k.shape[-2], q, _of(means_mask, part))
            asking = block_q[part]
            if train_frames is not None:
                asking = asking * seen_scale(seen, cells, train_frames, q)
            done = attend_pieces(asking, [piece.samples(part) for piece in pieces], mask, rows, scale)
            if out is None:
                parts.append(done)
            else:
                out[part, :, rows] = done
    if out is not None:
        return out
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def attend_pieces(q: Tensor, pieces: list[Keys], mask: Tensor | None, rows: slice, scale: float) -> Tensor:
    """Attention of the queries `rows` to all `pieces`, with the additive `mask` and the model's own masks."""
    return F.scaled_dot_product_attention(
        q,
        torch.cat([piece.k for piece in pieces], dim=-2),
        torch.cat([piece.v for piece in pieces], dim=-2),
        attn_mask=add_model_mask(mask, [piece.mask for piece in pieces], rows),
        scale=scale,
    )


def batch_parts(pieces: list[Keys], batch: int) -> list[slice]:
    """Parts of the batch that copy no more than `COPIED_BYTES` of keys and values; under torch.compile the whole."""
    if torch.compiler.is_compiling():
        return [slice(0, batch)]
    copied = sum(x.numel() * x.element_size() for piece in pieces for x in (piece.k, piece.v)) // batch
    most = COPIED_BYTES.get(pieces[0].k.device.type, COPIED_BYTES["cuda"])
    step = max(1, most // max(copied, 1))
    return [slice(first, first + step) for first in range(0, batch, step)]


def block_frames(frames: int, cells: int) -> int:
    """Query frames of one SDPA call."""
    return min(frames, max(1, BLOCK_TOKENS // cells))


def _of(mask: Tensor | None, part: slice) -> Tensor | None:
    return mask if mask is None or len(mask) == 1 else mask[part]


def _unmasked(means: Means, like: Tensor | None) -> Keys:
    """Means as keys: what the model's mask hides is not in them, so where there is one theirs hides nothing."""
    if like is None:
        return Keys(means.k, means.v)
    free = like.new_full((*like.shape[:3], means.k.shape[2]), like.dtype == torch.bool)
    return Keys(means.k, means.v, free)


def block_mask(
    scopes: Scopes, seen: Tensor, shared: int, cells: int, others: int, q: Tensor, means: Tensor | None = None
) -> Tensor | None:
    """Additive `(b|1, h|1, query tokens or 1, key tokens)`, with zeros for other tokens; None where all are zeros.

    Args:
        seen: which frames the query frames see, `(queries, keys)` or `(b, queries, keys)`, the last `shared` global.
        means: mask of the memory's keys, `(b|1, h|1, query frames, means)`.
    """
    flat = scopes.local_bias == scopes.global_bias == 0 or (scopes.local_bias == 0 and not shared)
    one = seen.dim() == 2 and len(seen) == 1  # a query frame by itself sees all that is listed for it
    if flat and one and means is None:
        return None
    bias = q.new_full((seen.shape[-1],), scopes.local_bias)
    bias[len(bias) - shared :] = scopes.global_bias
    if not one:
        bias = torch.where(seen, bias, -torch.inf)
    bias = bias.view(len(bias) if bias.dim() == 3 else 1, 1, -1, bias.shape[-1]).repeat_interleave(cells, dim=-1)
    if means is not None:
        shape = torch.broadcast_shapes(bias.shape[:3], means.shape[:3])
        bias = torch.cat([bias.expand(*shape, -1), means.to(q.dtype).expand(*shape, -1)], dim=-1)
    if bias.shape[2] > 1:
        bias = bias.repeat_interleave(cells, dim=2)
    return F.pad(bias, (0, others))


def seen_scale(seen: Tensor, cells: int, train_frames: int, q: Tensor) -> Tensor:
    """log(frames seen) / log(train_frames) of every query token, `(b|1, 1, tokens, 1)`."""
    count = seen.view(-1, 1, *seen.shape[-2:]).sum(dim=3, keepdim=True)
    return (count.double().log() / math.log(train_frames)).to(q).repeat_interleave(cells, dim=2)


def add_model_mask(mask: Tensor | None, model: list[Tensor | None], rows: slice) -> Tensor | None:
    """The additive `mask` of a block together with the model's own, given for each piece of the keys."""
    own = [part for part in model if part is not None]
    if not own:
        return mask
    shape = torch.broadcast_shapes(*(part.shape[:3] for part in own))
    whole = torch.cat([part.expand(*shape, -1) for part in own], dim=-1)
    whole = whole[:, :, rows] if whole.shape[-2] > 1 else whole
    if mask is None:
        return whole
    return mask.masked_fill(~whole, -torch.inf) if whole.dtype == torch.bool else mask + whole


def four_axes(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The model's mask as `(b|1, h|1, n|1, n)`, additive ones in the dtype of `q`."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).expand(-1, -1, -1, q.shape[-2])
    return mask if mask.dtype == torch.bool else mask.to(q.dtype)
