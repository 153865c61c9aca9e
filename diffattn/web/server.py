"""Serve the page on this machine alone.

Whoever reaches the page can make the machine compute and look at what lies in the named folders, and there is no
password: so it listens on a loopback address, and nothing of it asks for anything outside.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .found import Folders
from .models import Model

HOST, PORT = "127.0.0.1", 7860
SESSIONS = 64
"""Visitors whose results are kept; of more, those of the longest idle one are dropped."""


class Server:
    """A page that runs, at `url`, until `close`."""

    def __init__(self, page: Any, models: Sequence[Model], url: str) -> None:
        self._page, self._models, self.url = page, models, url

    def wait(self) -> None:
        """Until Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            self._page.server.thread.join()

    def close(self) -> None:
        """Cancel what runs, and stop."""
        for model in self._models:
            model.queue.close()
        self._page.close(verbose=False)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def serve(models: Sequence[Model], folders: Sequence[Path] = (), host: str = HOST, port: int = PORT) -> Server:
    """Open the page; 0 for the port takes any that is free.

    Raises `ValueError` for a host that others can reach, a port that is taken, and a folder that is not there;
    `ImportError` where gradio is missing.
    """
    check_gradio()
    host, port = check_place(host, port)
    check_folders(folders)
    for model in models:
        if [other.name for other in models].count(model.name) > 1:
            raise ValueError(f"expected each model once, got {model.name} twice: leave one out")
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from . import page as pages

    # a page of another origin, whose name was made to lead here, is not this one
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"])
    page = pages.build(models, Folders(folders))
    with local_only():
        page.queue(default_concurrency_limit=None, api_open=False)
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            allowed_paths=[],
            max_file_size=1,
            state_session_capacity=SESSIONS,
            strict_cors=True,
            app_kwargs={"middleware": [hosts]},
            **pages.look(),
        )
    return Server(page, models, f"http://{host}:{port}")


def check_gradio() -> None:
    """Raise `ImportError` where gradio is missing."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError('the page needs gradio: pip install "diffattn[web]"') from error


def check_place(host: str, port: int) -> tuple[str, int]:
    """Address and port, found where it is 0; raises `ValueError` for those that the page cannot have."""
    try:
        address = ipaddress.IPv4Address(HOST if host == "localhost" else host)
    except ValueError:
        raise ValueError(
            f"expected an address of this machine alone, such as {HOST}, for --host; got {host!r}"
        ) from None
    if not address.is_loopback:
        raise ValueError(
            f"--host {host} can be reached by others, and the page has no password: keep {HOST}, and from another "
            f"machine use ssh -L {port}:{HOST}:{port} THIS_MACHINE"
        )
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((str(address), port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}, port {port} ({error.strerror}): give another --port") from error
        return str(address), int(place.getsockname()[1])


def check_folders(folders: Sequence[Path]) -> None:
    """Raise `ValueError` for one that is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"expected a folder of results, got {folder}, which is none; name one that is there")


@contextlib.contextmanager
def local_only() -> Iterator[None]:
    """No telemetry of gradio's, no setting of its environment that opens the page, no proxy to this machine."""
    closed = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ALLOWED_PATHS": "", "GRADIO_ROOT_PATH": ""}
    hosts = [part for part in os.environ.get("no_proxy", "").split(",") if part]
    closed["no_proxy"] = closed["NO_PROXY"] = ",".join([*hosts, "127.0.0.1", "localhost", "::1"])
    before = {name: os.environ.get(name) for name in closed}
    os.environ.update(closed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
