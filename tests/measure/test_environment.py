"""The machine, for a report."""

import json
from typing import Any

import pytest

from diffattn.measure import environment as module
from diffattn.measure.environment import environment, extras, installed, variables, without_paths


def test_it_names_releases_processor_and_threads() -> None:
    found = environment()
    assert found["packages"]["torch"] == installed("torch") and found["packages"]["diffusers"]
    assert found["cpu"]["cores"] >= 1 and found["cpu"]["vectors"] and found["threads"]["compute"] >= 1
    assert json.loads(json.dumps(found)) == found


def test_variables_that_count_are_shown_and_folders_and_secrets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"DIFFATTN_DEBUG": "1", "DIFFATTN_THRESHOLDS": "/home/ada/limits.json", "HF_HUB_OFFLINE": "1"}
    for name, value in {**given, "HF_HUB_TOKEN": "hf_secret", "CXX": "/home/ada/bin/g++", "ADA": "ada"}.items():
        monkeypatch.setenv(name, value)
    found = variables()
    assert found["DIFFATTN_DEBUG"] == "1" and found["HF_HUB_OFFLINE"] == "1"
    assert found["DIFFATTN_THRESHOLDS"] == found["CXX"] == found["HF_HUB_TOKEN"] == "(set)"
    assert "ADA" not in found and "ada" not in json.dumps(found) and "secret" not in json.dumps(found)


def test_reasons_lose_their_paths() -> None:
    assert (
        without_paths("no C++ compiler found (/home/ada/bin/g++, clang++)") == "no C++ compiler found ((path) clang++)"
    )
    assert without_paths("it runs on cuda, and the tensors are on cpu").endswith("on cpu")


def test_extras_are_those_of_the_installed_library(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.8",
        "av>=18.1; extra == 'all'",
        "av>=18.1; extra == 'video'",
        'gone>=1; extra == "web"',
        "x; extra == 'dev'",
    ]
    monkeypatch.setattr(module, "requires", lambda name: lines)
    monkeypatch.setattr(module, "installed", {"av": "18.1", "gone": None}.__getitem__)
    assert extras() == [
        {"extra": "video", "package": "av", "version": "18.1"},
        {"extra": "web", "package": "gone", "version": None},
    ]


def test_devices_tell_their_names_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        name, total_memory, major, minor = "Card", 80 * 2**30, 9, 0

    def properties(number: int) -> Any:
        return Card

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", properties)
    assert module.devices()[0] == {"device": "cuda:0", "name": "Card", "memory_gib": 80.0, "capability": "9.0"}
