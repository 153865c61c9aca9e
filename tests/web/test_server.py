"""Where the page may be, and what it needs before anything is opened."""

import builtins
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffattn.cli import app
from diffattn.web import server
from diffattn.web.server import check_place, local_only


def test_the_page_listens_on_this_machine_alone() -> None:
    for host in ("127.0.0.1", "localhost"):
        address, port = check_place(host, 0)
        assert address == "127.0.0.1" and port > 0
    for host in ("0.0.0.0", "192.168.0.7"):
        with pytest.raises(ValueError, match="can be reached by others.*ssh -L"):
            check_place(host, 7860)
    for host in ("my-machine", "::", "127.0.0.1:80", ""):
        with pytest.raises(ValueError, match="expected an address of this machine alone"):
            check_place(host, 7860)


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ValueError, match="give another --port"):
            check_place("127.0.0.1", other.getsockname()[1])


def test_gradios_environment_is_closed_meanwhile_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    with local_only():
        assert os.environ["GRADIO_ALLOWED_PATHS"] == ""
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert os.environ["GRADIO_ALLOWED_PATHS"] == "/"
    assert "GRADIO_ANALYTICS_ENABLED" not in os.environ


def test_a_missing_gradio_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *rest: Any, **options: Any) -> Any:
        if name == "gradio":
            raise ImportError(name)
        return found(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r'pip install "diffattn\[web\]"'):
        server.check_gradio()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "can be reached by others"),
        (["--folder", "nowhere"], "expected a folder of results, got nowhere"),
        (["--model", "nowhere"], "no folder 'nowhere'"),
        (["--port", "70000"], "Invalid value for '--port'"),
    ],
)
def test_the_command_refuses_before_a_model_is_opened(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffattn.cli.commands.web.opened", lambda *_: pytest.fail("a model was opened"))
    monkeypatch.setattr(server, "check_gradio", lambda: None)
    result = CliRunner().invoke(app, ["web", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_help_has_examples() -> None:
    text = CliRunner().invoke(app, ["web", "--help"], env={"COLUMNS": "200"}).stdout
    assert "$ diffattn web" in text and "--folder" in text
