"""The files around a release: workflows, templates, citation."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(file: Path) -> dict[str, Any]:
    """A workflow; YAML 1.1 takes the key `on` for true."""
    values = yaml.safe_load(file.read_text())
    return {"on" if key is True else key: value for key, value in values.items()}


def commands(job: dict[str, Any]) -> list[str]:
    """The shell lines of a job, for each value of its matrix."""
    lines = "\n".join(step["run"] for step in job["steps"] if "run" in step).splitlines()
    for name, values in job.get("strategy", {}).get("matrix", {}).items():
        lines = [line.replace(f"${{{{ matrix.{name} }}}}", value) for value in values for line in lines]
    return lines


def pythons(job: dict[str, Any]) -> set[str]:
    """The versions of Python that a job sets up."""
    asked = {step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})}
    matrix = job.get("strategy", {}).get("matrix", {}).get("python", [])
    return {version for each in asked for version in (matrix if "matrix.python" in each else [each])}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_may_do_as_little_as_they_need(file: Path) -> None:
    workflow = read(file)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["on"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] > 0
        assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {})
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.search(r"@(v\d+|release/v\d+)$", step.get("uses", "@v0")), "name the major version"
    assert "secrets." not in file.read_text()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_call_targets_that_exist(file: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    called = {
        match[1]
        for job in read(file)["jobs"].values()
        for line in commands(job)
        if (match := re.match(r"make (\S+)", line))
    }
    assert called
    assert called <= targets


def test_the_checks_run_what_a_release_asks_for() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "check.yml")["jobs"]
    called = {line for job in jobs.values() for line in commands(job)}
    assert called >= {f"make {name}" for name in ("check", "test-all", "test-lowest", "test-newest", "build", "docs")}


def test_versions_of_python_agree() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "check.yml")["jobs"]
    admitted = SpecifierSet(PROJECT["requires-python"])
    tested = pythons(jobs["test"])
    assert len(tested) == 2
    assert all(version in admitted for job in jobs.values() for version in pythons(job))
    lowest = next(iter(admitted)).version
    assert lowest in tested
    classified = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert lowest in classified
    assert classified <= tested, "a classifier is for a version that the workflow tests"


def test_only_a_tag_publishes() -> None:
    publishing = [file.name for file in WORKFLOWS if "pypi-publish" in file.read_text()]
    assert publishing == ["publish.yml"]
    workflow = read(ROOT / ".github" / "workflows" / "publish.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    assert workflow["jobs"]["publish"]["environment"] == "pypi"
    assert workflow["jobs"]["publish"]["needs"] == "build"


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.name)
def test_issue_forms_are_forms(file: Path) -> None:
    form = yaml.safe_load(file.read_text())
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)
    assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in fields)


@pytest.mark.parametrize("name", ["bug", "model"])
def test_reports_ask_for_the_environment(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    (field,) = [field for field in form["body"] if "`diffattn env`" in str(field["attributes"].get("label"))]
    assert field["validations"] == {"required": True}


def test_the_citation_is_that_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert {"title", "message", "authors"} <= citation.keys()
