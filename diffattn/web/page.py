"""The page: its tabs, its colours, its fonts."""

from collections.abc import Sequence
from importlib import resources
from typing import Any

from .found import Folders
from .models import Model
from .tabs import compare, distill, frontier, token, video

TITLE = "diffattn"
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")


def build(models: Sequence[Model], folders: Folders) -> Any:
    """The page, as gradio's Blocks, which `look` dresses."""
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown("# diffattn\nCheaper attention for diffusers pipelines, to try on this machine.")
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                compare.build(models)
            with gr.Tab("What a token sees", id="token"):
                token.build(models)
            with gr.Tab("Speed and fidelity", id="frontier"):
                frontier.build(page, folders)
            with gr.Tab("Video", id="video"):
                video.build(models, folders)
            with gr.Tab("Distill", id="distill"):
                distill.build(page, folders)
    return page


def look() -> dict[str, Any]:
    """Arguments of `launch`: a theme with the system's own fonts, and the style sheet."""
    import gradio as gr

    theme = gr.themes.Default(primary_hue="blue", secondary_hue="blue", font=FONT, font_mono=MONO)
    theme = theme.set(button_primary_background_fill="#1f5f9f", button_primary_background_fill_hover="#174a7c")
    return {"theme": theme, "css": (resources.files("diffattn.web") / "page.css").read_text(encoding="utf-8")}
