"""The log of a run: one row of numbers a step, in log.csv."""

import csv
from pathlib import Path

from diffattn.files.writing import written

LOG = "log.csv"


COLUMNS = (
    "step",
    "total",
    "target",
    "prediction",
    "attention",
    "features",
    "layers",
    "rate",
    "gradient_norm",
    "seconds",
)


class Log:
    """`log.csv` of a run: one row a step; rows beyond the step that a run goes on from are dropped."""

    def __init__(self, folder: Path, step: int, active: bool) -> None:
        self._path, self._step, self._active = folder / LOG, step, active

    def __enter__(self) -> "Log":
        if self._active:
            former = [row for row in read_log(self._path) if row["step"] <= self._step]
            with written(self._path) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="")
                writer.writeheader()
                writer.writerows(former)
            self._file = self._path.open("a", newline="")
            self._writer = csv.DictWriter(self._file, COLUMNS, restval="")
        return self

    def write(self, row: dict[str, float]) -> None:
        if self._active:
            try:
                self._writer.writerow(row)
                self._file.flush()
            except OSError as error:
                raise OSError(f"cannot write {self._path}: {error.strerror}; free space, and resume the run") from error

    def __exit__(self, *exception: object) -> None:
        if self._active:
            self._file.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a `log.csv`; none where there is no file."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        return [{**row, "step": int(row["step"])} for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} is not the log of a run ({error}); remove it, or use another folder") from error
