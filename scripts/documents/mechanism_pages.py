"""Write docs/mechanisms/<name>.md, a page for each mechanism, from its docstrings, options and counted cost.

PYTHONPATH=. python scripts/documents/mechanism_pages.py             the pages
PYTHONPATH=. python scripts/documents/mechanism_pages.py --images    and their images, by the bundled pipelines
"""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import sys
import textwrap
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffattn import TokenGrid, config, options
from diffattn.mechanisms import Mechanism, SoftmaxAttention
from scripts.documents.mechanism_words import WORDS, Words

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "mechanisms"
OVERVIEW = ROOT / "docs" / "mechanisms.md"
CLIPS = {
    "Wan 2.1 1.3B, 81 frames of 832 x 480": (TokenGrid(30, 52, frames=21), 12, 128),
    "Wan 2.1 1.3B, 161 frames of 832 x 480": (TokenGrid(30, 52, frames=41), 12, 128),
}
SIZES = {
    "FLUX.1 at 1024 px": (TokenGrid(64, 64, before=512), 24, 128),
    "FLUX.1 at 2048 px": (TokenGrid(128, 128, before=512), 24, 128),
    "FLUX.1 at 4096 px": (TokenGrid(256, 256, before=512), 24, 128),
    **CLIPS,
}
"""Grid, heads and channels of a head: one attention call of a layer."""
PICTURE = 'pipe("a red circle in the center on a blue background", **call).images[0]'
CLIP = 'pipe("a red circle moving sideways on a blue background", **call).frames[0]'
PAGE = """\
# `{name}`: {title}

{when}

![Where the output of one query comes from, by full attention and by {name}]({name}.png)

{caption}

## Formula and source

{formula}

## Options

{options}

## Cost

{cost}

## Try it

{snippet}

More: [all mechanisms compared](../mechanisms.md){section}, [measured numbers](../numbers.md), [patterns at one
budget](../patterns.md), [`{cls}`](../reference/mechanisms.md#diffattn.{cls}) in the reference.
"""


def page(name: str) -> str:
    """The whole page."""
    cls, words = config.lookup(name), WORDS[name]
    title, formula = heading(inspect.getdoc(importlib.import_module(cls.__module__)) or "")
    return PAGE.format(
        name=name,
        cls=cls.__name__,
        title=title,
        when=wrapped(words.when),
        caption=wrapped(f"*{caption(name, words)}*"),
        formula=in_markdown(formula),
        options=table_of_options(cls),
        cost=cost(name, cls, words),
        snippet=snippet(name, words),
        section=f" ([more of this one](../mechanisms.md#{name}))" if f"### `{name}`\n" in OVERVIEW.read_text() else "",
    )


def heading(text: str) -> tuple[str, str]:
    """The first line of a module's docstring in words, and what follows it."""
    first, _, rest = text.partition("\n")
    name, _, said = first.rstrip(".").partition(": ")
    if "=" in said:  # a formula, which belongs to the rest
        said, rest = name, f"\n    {said}\n{rest}"
    said = said or name
    return said[0].lower() + said[1:], rest.strip("\n")


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def in_markdown(text: str) -> str:
    """A docstring's text with its links as links."""
    return re.sub(r"https://\S+?(?=[.,;:)]*(?:\s|$))", lambda match: f"<{match[0]}>", text)


def written(name: str, given: dict[str, Any]) -> str:
    """The mechanism as one writes it: `clear(radius=4)`."""
    return str(config.create(name, **given)) if given else f"{name}()"


def caption(name: str, words: Words) -> str:
    pipe = "`tiny:wan`, the frames of one clip" if words.video else "`tiny:flux` at 128 px"
    trained = " Untrained, as it is right after `apply`." if name in UNTRAINED else ""
    return (
        f"The query is framed in white. Bright is what its output is made of: by full attention, and by "
        f"`{written(name, words.shown)}`, in the same layer, head and step of {pipe} (log scale).{trained}"
    )


UNTRAINED = {"channel", "global_context", "hybrid", "linear", "sla", "vsa", "window_state"}


def table_of_options(cls: type) -> str:
    """Name, values, default and meaning of every option, each from the field and the text below it."""
    rows = ["| option | values | default | meaning |", "|---|---|---|---|"]
    hints, meanings = options.hints_of(cls), texts_of(cls)
    for field in dataclasses.fields(cls):
        default = "required" if field.default is dataclasses.MISSING else f"`{options.shown(field.default)}`"
        cells = (f"`{field.name}`", values_of(hints[field.name]), default, " ".join(meanings[field.name].split()))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else "It has none."


def values_of(hint: Any) -> str:
    """What an option may be, in the words of its error."""
    arms = typing.get_args(hint)
    said = next((extra.words for extra in arms if isinstance(extra, options.Must)), options.describe(hint))
    none = bool(arms) and type(None) in typing.get_args(arms[0]) and not said.startswith("None")
    return f"{said}, or none" if none else said


def texts_of(cls: type) -> dict[str, str]:
    """The string below each field of a class and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, below in pairwise(body.body):  # type: ignore[attr-defined]
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = ast.literal_eval(below.value)
    return found


def cost(name: str, cls: type[Mechanism], words: Words) -> str:
    """Operations of one call, over those of full attention."""
    time = re.search(
        r"Time [^.]*O\(.*?\)(?=[.,]|$)[^.]*", " ".join((inspect.getdoc(cls) or "").partition(">>>")[0].split())
    )
    rows = ["| one attention call | tokens | operations, of full attention's |", "|---|---:|---:|"]
    mechanism = config.create(name, **words.cost)
    for size, (grid, heads, width) in (CLIPS if words.video else SIZES).items():
        share = mechanism.flops(grid, heads, width) / SoftmaxAttention().flops(grid, heads, width)
        rows.append(f"| {size} | {grid.tokens:,} | {share:.1%} |")
    said = f"{time[0]}.\n\n" if time else ""
    return f"{said}Counted for `{written(name, words.cost)}`:\n\n" + "\n".join(rows)


def snippet(name: str, words: Words) -> str:
    """A block that the tests run, and the command that does the same."""
    pipeline, model = ("WanPipeline", "wan") if words.video else ("FluxPipeline", "flux")
    given = "".join(f", {key}={_literal(value)}" for key, value in words.shown.items())
    shell = "".join(f" -o {key}={_plain(value)}" for key, value in words.shown.items())
    prompt = "a red circle moving sideways" if words.video else "a red circle"
    return f"""\
```python
import diffattn
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained(diffattn.tiny.path("{model}"))
call = diffattn.tiny.defaults("{model}") | {{"num_inference_steps": 2}}
with diffattn.apply(pipe, "{name}"{given}):
    {"video" if words.video else "image"} = {CLIP if words.video else PICTURE}
    print(diffattn.summary(pipe))
```

```text
diffattn generate tiny:{model} --prompt "{prompt}" --mechanism {name}{shell} --compare
```"""


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _plain(value: Any) -> str:
    text = "none" if value is None else str(value)
    return f"'{text}'" if re.search(r"[(),]", text) else text


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in WORDS:
        (FOLDER / f"{name}.md").write_text(page(name))
    if "--images" in sys.argv:
        from scripts.documents.mechanism_images import draw_all

        draw_all(FOLDER)


if __name__ == "__main__":
    main()
