"""Time of one attention call, in rounds with full attention's: `SDPA, mechanism, SDPA, mechanism, ...`, one thread."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffattn import Mechanism, PerHeadAttention
from diffattn.files.writing import write_json
from diffattn.measure import hardware, latency
from diffattn.mechanisms import Context, SoftmaxAttention

from .cells import Cell
from .measuring import FAILURES, file_of, line, opened, reason
from .settings import Setting
from .solving import contexts

ROUNDS = 9


def time_all(cell: Cell, settings: Sequence[Setting], runs: Path, rounds: int = ROUNDS) -> None:
    """Time every setting that this version has and that has no time yet."""
    for setting in settings:
        solved = setting.solve(cell)
        path = file_of(runs, cell, setting, "time")
        record = opened(path, solved.facts)
        mechanism = solved.found.mechanism
        if mechanism is not None and not isinstance(mechanism, SoftmaxAttention) and "seconds" not in record:
            record.pop("failed", None)
            try:
                record.update(_time(cell, mechanism, rounds))
            except FAILURES as error:
                record["failed"] = reason(error)
        write_json(path, record)
        tqdm.write(f"{cell.name}: {setting.name}: {record.get('seconds') or line(record)}")


def _parts(cell: Cell, mechanism: Mechanism, qkv: tuple[torch.Tensor, ...]) -> dict[str, Callable[[], None]]:
    """Calls of the parts of `per_head`, each with its heads alone."""
    if not isinstance(mechanism, PerHeadAttention):
        return {}

    def call(part: Mechanism, heads: list[int]) -> Callable[[], None]:
        q, k, v = (x[:, heads].contiguous() for x in qkv)

        def attend() -> None:
            part.attend(q, k, v, cell.grid, context=Context(memory={}))

        return attend

    groups = mechanism.groups(cell.heads, Context())
    return {f"part {number}": call(part, heads) for number, (part, heads, _) in enumerate(groups)}


@torch.no_grad()
def _time(cell: Cell, mechanism: Mechanism, rounds: int) -> dict[str, Any]:
    """Seconds of each round, of the mechanism and of full attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, cell.heads, cell.grid.tokens, cell.head_dim, generator=generator)
    features = torch.randn(1, cell.grid.tokens, cell.heads * cell.head_dim, generator=generator)
    indices = [context.call_index for context in contexts(mechanism)]

    def attend() -> None:
        """One call of each layer that differs, as in a first step: nothing is kept from one before."""
        for index in indices:
            given: dict[str, Any] = {
                "features": features,
                "progress": 0.5,
                "timestep": 500.0,
                "sigma": 0.5,
                "call_index": index,
            }
            known = {name: given[name] for name in mechanism.needs if name in given}
            mechanism.attend(q, k, v, cell.grid, context=Context(memory={}, **known))

    def full() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)

    functions: dict[str, Callable[[], None]] = {"full": full, "own": attend, **_parts(cell, mechanism, (q, k, v))}
    found = latency(functions, rounds, warmup=2)
    own = [seconds / len(indices) for seconds in found["own"].seconds]
    load = hardware()["load_average"]
    alone = [found[name].seconds for name in functions if name not in ("full", "own")]
    parts = {"parts_seconds": [round(sum(one), 7) for one in zip(*alone, strict=True)]} if alone else {}
    return {
        **parts,
        "threads": torch.get_num_threads(),
        "load": None if load is None else load[0],
        "seconds": [round(value, 7) for value in own],
        "full_seconds": [round(value, 7) for value in found["full"].seconds],
    }
