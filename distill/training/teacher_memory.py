"""What the teacher said to samples and noises that recur, kept on disk.

A pass of the teacher's takes about a quarter of a step. Where noises recur (`noises=`), what it said can be kept on
disk, sample by sample, and read again: `<run>/teacher/<number>-<content>.safetensors`, in the dtypes that it came in.
A file is named by the sample's number and by what the model was given, so nothing stale is ever read, and a resumed run
reads what the run before it wrote: it goes on bit for bit.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffattn.files.writing import remove_empty, remove_own, written

from ..data.samples import Batch
from ..objective import Noised
from .listening import Said

OWN = r"\d{7,}-[0-9a-f]{16}\.safetensors"
"""Names of the files."""


def named(said: Said) -> dict[str, Tensor]:
    """All tensors of it by name."""
    found = {} if said.prediction is None else {"prediction": said.prediction}
    found |= {f"attention.{number:03d}": tensor for number, tensor in enumerate(said.attention)}
    return found | {f"features.{number:03d}": tensor for number, tensor in enumerate(said.features)}


def unnamed(tensors: Mapping[str, Tensor]) -> Said:
    """Undo `named`."""

    def several(kind: str) -> tuple[Tensor, ...]:
        return tuple(tensors[name] for name in sorted(tensors) if name.startswith(f"{kind}."))

    return Said(tensors.get("prediction"), several("attention"), several("features"))


class TeacherMemory:
    """What the teacher said, kept sample by sample in `folder` as far as `gib` reach.

    Which samples have a place depends on their numbers alone, so it is the same in every order and after a resume. What
    was kept counts even where the rest of a batch must be asked for: a sum may differ in its last bit with the batch.
    """

    def __init__(self, folder: Path, gib: float, question: Sequence[str]) -> None:
        """`question`: what was asked of whom, in texts; another one has other files."""
        self._folder, self._room = folder, gib * 2**30
        self._question = "\n".join(question).encode()

    def ask(self, batch: Batch, noised: Noised, teacher: Callable[[], Said]) -> Said:
        """From disk what is there, and the rest of the teacher, who is asked for the batch as a whole."""
        files = [self._file(batch, noised, place) for place in range(len(batch.numbers))]
        kept = [_read(file) for file in files]
        said: dict[str, Tensor] = {} if all(kept) else named(teacher())
        parts = {name: tensor.chunk(len(files)) for name, tensor in said.items()}
        rows = [row or {name: part[place] for name, part in parts.items()} for place, row in enumerate(kept)]
        for number, file, before, row in zip(batch.numbers, files, kept, rows, strict=True):
            if before is None and (number + 1) * sum(tensor.nbytes for tensor in row.values()) <= self._room:
                with written(file) as path:
                    save_file({name: tensor.cpu().contiguous() for name, tensor in row.items()}, path)
        device = noised.latents.device
        return unnamed({name: torch.cat([row[name].to(device) for row in rows]) for name in rows[0]})

    def forget(self) -> None:
        """Remove what was kept."""
        remove_own(self._folder, (OWN,))
        remove_empty(self._folder)

    def _file(self, batch: Batch, noised: Noised, place: int) -> Path:
        given = {**batch.conditioning, "latents": noised.latents, "timestep": noised.timestep}
        content = hashlib.sha256(self._question)
        for name in sorted(given):
            content.update(name.encode())
            content.update(
                given[name][place].detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            )
        return self._folder / f"{batch.numbers[place]:07d}-{content.hexdigest()[:16]}.safetensors"


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(file) if file.is_file() else None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and the same command goes on") from error


def fingerprint(model: nn.Module) -> str:
    """Tells one model's weights from another's, by the first numbers of each."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        found.update(name.encode())
        found.update(weight.detach().reshape(-1)[:16].double().cpu().numpy().tobytes())
    return found.hexdigest()
