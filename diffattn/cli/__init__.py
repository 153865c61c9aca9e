"""The command line, `diffattn ...` or `python -m diffattn ...`."""

from collections.abc import Sequence

from . import animating as animating
from . import commands as commands
from . import distilling as distilling
from . import inspecting as inspecting
from . import long_videos as long_videos
from . import upscaling as upscaling
from . import video_upscaling as video_upscaling
from .frame import app as app


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script `diffattn`."""
    app(list(arguments) if arguments is not None else None, prog_name="diffattn")
