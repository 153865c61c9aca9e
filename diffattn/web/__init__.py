"""The page of `diffattn web`: try settings, see what a token sees, look at comparisons, clips and runs.

`jobs` runs what concerns a model one after the other, `models` draws, `found` looks through the named folders; these
know nothing of gradio. `html`, `charts` and `figures` write what is shown, `tabs` has a file for each tab, `page` puts
them together and `server` serves them on this machine alone.
"""

from .models import Model
from .server import Server, serve

__all__ = ["Model", "Server", "serve"]
