"""What the recorded cases of CLEAR have in common: mechanism, grid and positions."""

import torch
from golden_record import Record
from torch import Tensor

from diffattn import ClearAttention, SoftmaxAttention, TokenGrid
from diffattn.mechanisms import Mechanism
from diffattn.mechanisms.softmax import OFFICIAL_TRAIN_TOKENS


def mechanism_of(config: Record) -> Mechanism:
    """Of any case; where keys are pooled, and at the released L0, with the constants of the released code."""
    radius, factor = config["window_size"], config.get("down_factor")
    shared = {"proportional": config.get("proportional_attention", False), "ntk_factor": config.get("ntk_factor", 1.0)}
    trained = config.get("train_seq_len", OFFICIAL_TRAIN_TOKENS)
    if radius is None:
        assert factor is None, "pooled keys without a window: a kind this test does not understand"
        return SoftmaxAttention(train_tokens=trained, **shared)
    official = trained == OFFICIAL_TRAIN_TOKENS
    assert official or factor is None, "the released code knows one L0 where it pools keys"
    return ClearAttention(radius=radius, down_factor=factor, train_tokens=trained, official=official, **shared)


def grid_of(config: Record) -> TokenGrid:
    return TokenGrid(config["height"], config["width"], before=config["text_length"])


def ids_of(grid: TokenGrid) -> Tensor:
    """(0, row, column) of every token, text at the origin."""
    ids = torch.zeros(grid.tokens, 3)
    ids[grid.cell_slice] = torch.stack(grid.positions(), dim=1).float()
    return ids
