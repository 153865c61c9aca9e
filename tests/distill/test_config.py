"""Configs: presets, files, overrides, and CLEAR's recipe as its authors give it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.distill.config import PRESETS, DistillConfig, from_dict, override, preset, read_config
from diffattn.distill.student import make_student
from diffattn.distill.training.capture import layers_at
from diffattn.distill.training.listening import attention_layers
from diffusers import FluxTransformer2DModel

from diffattn import AgentAttention, ClearAttention


def test_the_official_recipe() -> None:
    config = preset("clear_flux_official")
    assert config.optimizer == "prodigy" and config.rate == 1.0 and config.betas == (0.9, 0.999)
    assert config.weight_decay == 1e-4 and config.clip == 1.0 and config.warmup == 0 and config.decay == 0
    assert (config.batch_size, config.accumulation, config.steps, config.save_every) == (32, 4, 50_000, 5_000)
    assert (config.guidance, config.text_length, config.precision) == (3.5, 512, "bf16")
    assert config.gradient_checkpointing and config.ema == 0 and config.trainable == "projections"
    assert (config.loss.target, config.loss.prediction, config.loss.attention) == (1.0, 0.5, 0.5)


def test_the_official_recipe_on_the_whole_model() -> None:
    config = preset("clear_flux_official")
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    student = make_student(model, config.mechanism, trainable=config.trainable)
    assert sum(weight.numel() for weight in student.parameters.values()) == 190 * (3072 * 3072 + 3072)
    assert len(student.parameters) == 380
    assert attention_layers(config, student) == tuple(
        f"single_transformer_blocks.{block}.attn" for block in range(1, 38, 4)
    )
    whole = sum(weight.nbytes for weight in model.parameters())
    assert (whole + student.originals.bytes) / (2 * whole) < 0.6


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_through_json(name: str) -> None:
    config = preset(name)
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_files_and_overrides_go_over_a_preset(tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text("steps = 7\n[mechanism]\nradius = 2\n[loss]\nattention = 0\n")
    config = read_config(toml, preset("tiny"))
    assert (config.steps, config.mechanism, config.loss.attention) == (7, ClearAttention(radius=2), 0)
    assert config.loss.prediction == preset("tiny").loss.prediction
    text = tmp_path / "run.json"
    text.write_text(json.dumps({"mechanism": {"type": "agent", "num_agents": 8}}))
    assert read_config(text, config).mechanism == AgentAttention(num_agents=8)
    config = override(config, ["mechanism.radius=3", "betas=(0.8, 0.9)", "optimizer=prodigy", "loss.target=0.25"])
    assert (config.mechanism, config.betas, config.optimizer) == (ClearAttention(radius=3), (0.8, 0.9), "prodigy")
    assert config.loss.target == 0.25
    assert override(config, ["mechanism=linear"]).mechanism.type == "linear"


def test_the_rate_rises_stays_and_falls() -> None:
    config = override(preset("tiny"), ["steps=100", "warmup=10", "decay=0.2", "rate=1"])
    assert [config.rate_at(step) for step in (0, 9, 50, 79)] == pytest.approx([0.1, 1, 1, 1])
    assert [config.rate_at(step) for step in (80, 90, 99)] == pytest.approx([1, 0.5, 0.05])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stepz=3", "unknown field 'stepz'"),
        ("steps=0", "steps must be an integer of at least 1, got 0"),
        ("steps=ten", "steps must be an integer of at least 1, got 'ten'"),
        ("batch_size=6", None),
        ("accumulation=5", "batch_size=16 does not split into accumulation=5"),
        ("rate=-1", "rate must be positive"),
        ("ema=1", "ema must be in 0 ... 1, got 1"),
        ("optimizer=sgd", "optimizer must be one of adamw, prodigy, got 'sgd'"),
        ("mechanism.radios=2", "clear has no option 'radios'"),
        ("mechanism=softmax", "nothing is to be distilled"),
        ("loss.colour=1", "unknown loss 'colour'"),
        ("steps", "an override is NAME=VALUE"),
        ("seed=-1", "seed must be an integer of at least 0"),
        ("seed=99999999999999999999999", r"seed must be an integer of at least 0 and below 2\*\*32"),
        ("rate=abc", "rate must be positive, got 'abc'"),
        ("rate=nan", "rate must be positive, got 'nan'"),
        ("betas=(0.9,)", r"betas must be two numbers from 0 to below 1, .* got \(0.9,\)"),
        ("betas=0.9,1", "betas must be two numbers"),
        ("weight_decay=-1", "weight_decay must be 0 or more, got -1"),
        ("clip=x", "clip must be 0 or more, got 'x'"),
        ("gradient_checkpointing=maybe", "gradient_checkpointing must be true or false, got 'maybe'"),
        ("gradient_checkpointing=2", "gradient_checkpointing must be true or false"),
        ("mechanism.proportional=maybe", "clear: proportional must be true or false, got 'maybe'"),
        ("mechanism.radius=none", "clear: radius must be a positive number"),
        ("mechanism=5", "unknown mechanism '5'"),
        ("loss=5", "loss must be a config such as LossWeights"),
        ("loss.target=much", "the weight of the target loss must be 0 or more, got 'much'"),
        ("guidance=high", "guidance must be a number or none"),
        ("text_length=0", "text_length must be an integer of at least 1, got 0"),
        ("attention_depths=0,2", "attention_depths must be fractions from 0 to 1"),
        ("trackers=wandb,excel", "trackers must be among .* got 'wandb,excel'"),
        ("layers=", None),
        ("steps.more=3", "steps must be an integer"),
        ("backend=warp", "clear has no backend 'warp'"),
        ("model=", "model must be the hub id or folder"),
        ("precision=fp8", "precision must be one of no, bf16, fp16"),
    ],
)
def test_overrides_are_checked(change: str, message: str | None) -> None:
    if message is None:
        name, _, value = change.partition("=")
        assert str(getattr(override(preset("tiny"), [change]), name)) == value
        return
    with pytest.raises(ValueError, match=message) as error:
        override(preset("tiny"), [change])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["false", "False", "no", "0", "off"])
def test_what_is_switched_off_by_text_is_off(text: str) -> None:
    on = override(preset("clear_flux_official"), ["mechanism.proportional=yes", "sharded=on"])
    assert on.gradient_checkpointing and on.sharded and on.mechanism.to_dict()["proportional"] is True
    names = ("gradient_checkpointing", "sharded", "mechanism.proportional")
    off = override(on, [f"{name}={text}" for name in names])
    assert (off.gradient_checkpointing, off.sharded) == (False, False)
    assert off.mechanism.to_dict()["proportional"] is False


def test_texts_become_plain_values() -> None:
    chosen = override(
        preset("tiny"),
        ["trackers=wandb, trackio", "sheet_prompts=a fox, running", "guidance=none", "betas=0.5,0.6", "steps=7"],
    )
    assert (chosen.trackers, chosen.sheet_prompts) == (("wandb", "trackio"), ("a fox, running",))
    assert (chosen.guidance, chosen.betas, chosen.steps) == (None, (0.5, 0.6), 7)
    assert json.loads(json.dumps(chosen.to_dict()))["sheet_prompts"] == ["a fox, running"]
    assert type(chosen.sheet_prompts[0]) is str


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('rate = "abc"', "rate must be positive, got 'abc'"),
        ("steps = 7.0", "steps must be an integer of at least 1, got 7.0"),
        ("gradient_checkpointing = 0", "gradient_checkpointing must be true or false, got 0"),
        ("trackers = [3]", "trackers must be"),
        ("mechanism = 3", "mechanism must be a config such as ClearAttention"),
        ("mechanism = {radius = [2]}", "clear: radius must be a positive number, got"),
        ("loss = [1]", "loss must be a config such as LossWeights"),
        ("model = 2020-01-01", "model must be the hub id or folder"),
    ],
)
def test_values_of_files_are_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "run.toml", preset("tiny"))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    cases: list[tuple[str, str, str]] = [
        ("run.json", "{", "is not valid JSON"),
        ("run.toml", "steps = ", "is not valid TOML"),
        ("list.json", "[1]", "must hold one table"),
        ("bare.json", "{}", "needs model and mechanism"),
    ]
    for name, text, message in cases:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / name)
    with pytest.raises(ValueError, match="there is no config file"):
        read_config(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_config(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_config(tmp_path / "bytes.json")
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        preset("huge")


def test_depths() -> None:
    names = [str(number) for number in range(38)]
    assert layers_at(names, [block / 37 for block in range(1, 38, 4)]) == tuple(names[1::4])
    assert layers_at(["a"], [0, 0.5, 1]) == ("a",)
    with pytest.raises(ValueError, match="0 layers"):
        layers_at([], [0.5])


def build(**values: Any) -> DistillConfig:
    return DistillConfig(model="tiny", mechanism=ClearAttention(radius=2), **values)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        build().steps = 3  # type: ignore[misc]


def test_overrides_are_judged_together() -> None:
    chosen = override(preset("clear_flux_official"), ["batch_size=2", "accumulation=2"])
    assert (chosen.batch_size, chosen.accumulation) == (2, 2)
    chosen = override(
        preset("tiny"), ["mechanism=agent", "mechanism.num_agents=8", "loss.target=0", "loss.attention=1"]
    )
    assert chosen.mechanism == AgentAttention(num_agents=8)
    assert (chosen.loss.target, chosen.loss.prediction, chosen.loss.attention) == (0, 0.5, 1)
