"""The command `diffattn web`: a page on this machine to try settings on."""

from pathlib import Path
from typing import Annotated

import typer

from ..frame import Device, Dtype, Threads, app, cpu_threads, examples, opened, quiet

MODELS = ("tiny", "tiny:wan")
FOLDER = Path("outputs")


@app.command(
    epilog=examples(
        "diffattn web",
        "diffattn web --model black-forest-labs/FLUX.1-dev --device cuda",
        "diffattn web --model tiny --folder outputs --folder ../runs --port 8000",
    )
)
def web(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Hub id, folder, or tiny:NAME of a bundled one; repeatable. Default: tiny and tiny:wan."),
    ] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder whose comparisons, runs of distillation and clips the page may show; repeatable. Default: "
            "outputs, where it is there."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="A loopback address: nobody but this machine reaches the page.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the browser.")] = False,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a page on this machine: compare settings, see what a token sees, look at comparisons, clips and runs."""
    import webbrowser

    from diffattn.web.server import check_folders, check_gradio, check_place

    from ..checkpoints import check_pipeline, locate, native_call

    names = list(dict.fromkeys(model or MODELS))
    folders = folder if folder is not None else [FOLDER] if FOLDER.is_dir() else []
    check_gradio()
    check_place(host, port)
    check_folders(folders)
    for name in names:
        check_pipeline(locate(name))
    from diffattn.web import Model, serve

    models = [Model(name, opened(name, device, dtype), native_call(name)) for name in names]
    with quiet(), cpu_threads(threads), serve(models, folders, host, port) as server:
        typer.echo(f"diffattn is at {server.url}; Ctrl-C ends it")
        if browser:
            webbrowser.open(server.url)
        server.wait()
