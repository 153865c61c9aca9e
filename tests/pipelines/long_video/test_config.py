"""The config of a run, prompt files, and the released code's configuration files."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_video
from diffattn.pipelines.long_video import LongVideoConfig, PromptRange, read_prompts
from diffattn.pipelines.long_video.official import from_official, read_settings
from diffattn.pipelines.long_video.prompts import even_ranges, places

from diffattn.mechanisms.parts.scopes.frames import Phase


def official(**attn: Any) -> dict[str, Any]:
    """As the released multi-prompt example has it, on four devices."""
    phase = {"t": 850, "local_biase": 10, "global_biase": 0}
    window = {"padding": 8, "top_k": 16, "top_k_chunk_size": 24, "attn_scale": 1.0, "token_num_scale": False}
    return {
        "dtype": "torch.float16",
        "devices": [0, 1, 2, 3],
        "seed": 123,
        "master_port": 29516,
        "base_path": "./exp",
        "pipe_configs": {
            "prompts": ["a", "b"],
            "steps": 30,
            "guidance_scale": 12,
            "fps": 24,
            "num_frames": 24,
            "height": 320,
            "width": 512,
            "export_fps": 8,
            "file_name": None,
        },
        "plugin_configs": {
            "attn": {
                **window,
                "dynamic_scale": True,
                "local_phase": phase,
                "global_phase": {"t": 850, "local_biase": 0, "global_biase": 10},
                **attn,
            },
            "conv_3d": {"padding": 1},
            "conv_layer": {},
        },
    }


def test_the_json_form_gives_the_config_back() -> None:
    config = tiny_video.config(lengths=(3, 4), local_phase=None)
    assert LongVideoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 8}, "end at frame 7 and the video has 8 frames"),
        ({"prompts": ()}, "at least one prompt"),
        ({"prompts": (PromptRange(0, 4, "a"), PromptRange(3, 7, "b"))}, "overlap: frame 3 has two prompts"),
        ({"prompts": (PromptRange(0, 3, "a"), PromptRange(5, 7, "b"))}, "leave a gap: frame 3 has none"),
        ({"prompts": (PromptRange(0, 0, "a"), PromptRange(0, 7, "b"))}, "which are none"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be an int"),
        ({"mode": "fast"}, "mode must be 'clean' or 'official'"),
        ({"scheduler": "euler"}, "scheduler must be one of"),
        ({"padding": -1}, "padding must be (an int|a whole number of at least 0)"),
        ({"guidance": float("nan")}, "guidance must be a number"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {**tiny_video.config().to_dict(), **changes}
    with pytest.raises(ValueError, match=message):
        LongVideoConfig.from_dict(values)


def test_unknown_and_missing_fields_are_named() -> None:
    values = tiny_video.config().to_dict()
    with pytest.raises(ValueError, match="unknown entries guidence; known are prompts, frames"):
        LongVideoConfig.from_dict({**values, "guidence": 3})
    del values["height"]
    with pytest.raises(ValueError, match="lacks height"):
        LongVideoConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON file"),
        ("{}", "expected a list of ranges"),
        ("[]", "at least one prompt is needed"),
        ('["a"]', 'entry 1: expected {"frames"'),
        ('[{"frames": [0, 4]}]', 'entry 1: expected {"frames"'),
        ('[{"frames": [0, "4"], "prompt": "a"}]', 'entry 1: expected {"frames"'),
    ],
)
def test_wrong_prompt_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "prompts.json")


def test_prompts_hold_in_their_ranges_and_blend_at_the_borders() -> None:
    ranges = [PromptRange(0, 10, "a"), PromptRange(10, 20, "b")]
    assert places(ranges, 0) == {0: "a", 9: "a", 10: "b", 19: "b"}
    assert places(ranges, 6) == {3: "a", 6: "a", 13: "b", 16: "b"}
    assert places([PromptRange(0, 1, "a")], 16) == {0: "a"}


def test_prompts_of_devices_follow_the_released_rule() -> None:
    assert even_ranges(["a"], 12, 3) == (PromptRange(0, 12, "a"),)
    by_clip = even_ranges([str(number) for number in range(22)], 44, 22)
    assert [part.prompt for part in by_clip] == [str(number) for number in range(22)]  # floats get 15 of 22 wrong
    assert even_ranges(["a", "b"], 9, 3) == (PromptRange(0, 6, "a"), PromptRange(6, 9, "b"))


def test_an_official_file_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "multi_promts.json").write_text(json.dumps(official()))
    with caplog.at_level(logging.WARNING, "diffattn.long_video"):
        config = LongVideoConfig.from_dict(read_settings(tmp_path / "multi_promts.json"))
    assert config.prompts == (PromptRange(0, 48, "a"), PromptRange(48, 96, "b"))
    assert (config.frames, config.seed, config.steps, config.guidance) == (96, 123, 30, 12)
    assert (config.fps, config.model_fps, config.blend, config.model) == (8, 24, 0, "videocrafter2")
    assert config.attention().local_phase == Phase(850, 10, 0)
    assert config.attention().global_phase == Phase(850, 0, 10)
    told = caplog.text
    for name in ("dtype", "master_port", "base_path", "attn.top_k_chunk_size", "conv_3d"):
        assert f"{name} has no effect here" in told
    assert "file_name" not in told and "conv_layer" not in told


def test_the_slips_of_the_readme_are_understood(caplog: pytest.LogCaptureFixture) -> None:
    values = official(topk=4, local_phase={"t": 700, "local_bias": 3, "global_bias": 1})
    del values["plugin_configs"]["attn"]["top_k"]
    with caplog.at_level(logging.WARNING, "diffattn.long_video"):
        found = from_official(values)
    assert found["top_k"] == 4 and found["local_phase"] == (700, 3, 1)
    assert "plugin_configs.attn.topk: read as top_k" in caplog.text


def test_without_dynamic_scale_there_are_no_phases() -> None:
    found = from_official(official(dynamic_scale=False))
    assert found["local_phase"] is found["global_phase"] is None


@pytest.mark.parametrize(
    ("attn", "message"),
    [
        ({"paddding": 3}, "plugin_configs.attn has unknown entries paddding"),
        ({"local_phase": None}, "dynamic_scale needs local_phase and global_phase"),
        ({"local_phase": {"local_biase": 1}}, "local_phase lacks t"),
    ],
)
def test_what_an_official_file_gets_wrong_is_named(attn: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_official(official(**attn))


RANGES = [{"frames": [0, 7], "prompt": "a"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [*RANGES, {"prompt": "a"}]}, 'prompts, entry 2: expected {"frames": '),
        ({"prompts": 5}, "prompts: expected a list of ranges, such as .*, got 5"),
        ({"prompts": ["a", "b"]}, "prompts, entry 1: expected"),
        ({"prompts": [{"frames": 7, "prompt": "a"}]}, "prompts, entry 1: expected"),
        ({"frames": "7"}, "frames must be a whole number"),
        ({"frames": 7.0}, "frames must be a whole number"),
        ({"guidance": "9"}, "guidance must be a number of at most 10000 in size, got '9'"),
        ({"guidance": True}, "guidance must be a number"),
        ({"attn_scale": None}, "attn_scale must be a number"),
        ({"model": 3}, "model must be a text, got 3"),
        ({"unet": 3}, "unet must be a text"),
        ({"negative_prompt": None}, "negative_prompt must be a text"),
        ({"lengths": 7}, "lengths must be a list of numbers of frames, got 7"),
        ({"lengths": ["7"]}, "each of lengths must be a whole number"),
        ({"local_phase": "abc"}, "local_phase must be .t, local_bias, global_bias. or null, got 'abc'"),
        ({"global_phase": [1, 2]}, "global_phase must be"),
        ({"global_phase": ["x", 1, 1]}, "the t of global_phase must be a number"),
        ({"mode": ["clean"]}, "mode must be"),
        ({"scheduler": {}}, "scheduler must be one of"),
        ({"token_num_scale": "no"}, "token_num_scale must be true or false"),
        ({"seed": "1"}, "seed must be an int"),
    ],
)
def test_an_entry_of_the_wrong_kind_is_named(changes: dict[str, Any], message: str) -> None:
    values = {"frames": 7, "height": 16, "width": 16, "prompts": RANGES, **changes}
    with pytest.raises(ValueError, match=message):
        LongVideoConfig.from_dict(json.loads(json.dumps(values)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipe_configs": 5}, "pipe_configs must be a JSON object"),
        ({"pipe_configs": {"prompts": ["a", 3]}}, "pipe_configs.prompts, entry 2: expected a text, got 3"),
        ({"devices": 4}, "devices must be a list"),
        ({"plugin_configs": None}, "plugin_configs must be a JSON object"),
        ({"plugin_configs": {"attn": 3}}, "plugin_configs.attn must be a JSON object"),
        ({"plugin_configs": {"attn": {"dynamic_scale": "yes"}}}, "dynamic_scale must be true or false"),
    ],
)
def test_an_entry_of_the_wrong_kind_in_an_official_file_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_official({**official(), **changes})
