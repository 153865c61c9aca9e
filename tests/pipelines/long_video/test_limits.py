"""Settings that no run can have are refused in one line before it."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffattn.pipelines.long_video.config import LongVideoConfig
from diffattn.pipelines.long_video.prompts import PromptRange, read_json


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 1001},
        {"guidance": 1e308},
        {"guidance": 10**400},
        {"attn_scale": 10**5000},
        {"padding": 2_000_000_000},
        {"top_k": 2_000_000_000},
        {"fps": 2_000_000_000},
        {"negative_prompt": "\ud800"},
        {"prompts": (PromptRange(0, 4, "a\udcff"),)},
        {"local_phase": (1, 10**400, 0)},
    ],
)
def test_what_no_run_can_have_is_refused(values: dict[str, Any]) -> None:
    basics = {"prompts": (PromptRange(0, 4, "x"),), "frames": 4, "height": 32, "width": 32}
    with pytest.raises(ValueError, match="must be") as refusal:
        LongVideoConfig(**{**basics, **values})
    assert len(str(refusal.value)) < 300 and str(refusal.value).encode()


def test_texts_of_too_many_digits_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"guidance": 0}).replace("0", "9" * 5000))
    with pytest.raises(ValueError, match="is no JSON file"):
        read_json(file)
