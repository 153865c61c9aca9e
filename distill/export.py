"""Sharing: a student as a folder that others load, with a model card.

adapter.safetensors, pytorch_lora_weights.safetensors, diffattn_config.json  as `diffattn.save` writes them
README.md                                                                    the card
sheet.png, loss.png                                                          of the run, where there are any
"""

import dataclasses
import inspect
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffattn.adapters as adapters
from diffattn.adapters.files import FILE_NAME, LORA_NAME
from diffattn.adapters.saving import base_model_of, is_hub_id
from diffattn.files.writing import write_text, written
from diffattn.mechanisms import Mechanism
from diffattn.mechanisms.base import changed_options

from .evaluation.evaluate import Evaluation
from .loading import bundled
from .setting import Setting
from .student import Student

CARD = "README.md"
FIGURES = {"sheet.png": "Teacher, student and swap alone", "loss.png": "Losses of the training"}
WHAT = {
    "projections": "queries, keys, values and outputs of these layers",
    "lora": "a LoRA on the projections of these layers",
    "mechanism": "the mechanism's own weights",
}


def export(
    source: Setting | Student,
    folder: Path,
    evaluation: Evaluation | Mapping[str, Any] | None = None,
    *,
    figures: Iterable[Path] = (),
    push_to_hub: bool = False,
    repo_id: str | None = None,
) -> Path:
    """Write a student as a folder that `diffattn.load` takes, with a card; returns the weights file.

    Args:
        evaluation: its figures, or what `evaluation.json` holds, for the table of the card.
        figures: images that are copied beside the card, those named in `FIGURES`.
        push_to_hub: upload the folder to `repo_id`, an owner/name that the card shows.

    Raises `ValueError`, with nothing written, for an evaluation of another mechanism and a repository without a name.
    """
    student = student_of(source)
    if push_to_hub and (repo_id is None or repo_id.count("/") != 1):
        raise ValueError(f"expected repo_id=owner/name, which the card shows, got {repo_id!r}; name the repository")
    values = dataclasses.asdict(evaluation) if isinstance(evaluation, Evaluation) else evaluation
    check_evaluation(values, student)
    base = base_of(source)
    part, drawn = (None, None) if isinstance(source, Student) else (source.part, source.config.drawn)
    files = adapters.write(
        student.model,
        folder,
        include=student.projections,
        base_model=base,
        component=part,
        drawn=drawn,
        slopes=None if student.slopes is None else student.slopes.by_name,
    )
    copies = [_copy(figure, folder) for figure in figures if figure.name in FIGURES]
    names = [path.name for path in (*files, *copies)]
    write_text(folder / CARD, card(source, base, repo_id or folder.resolve().name, names, values))
    if push_to_hub:
        adapters.push(folder, names, repo_id)
    return files[0]


def check_evaluation(values: Mapping[str, Any] | None, student: Student) -> None:
    """Raise where figures are those of another mechanism."""
    own = json.loads(json.dumps(mechanism_of(student).to_dict()))
    if values is not None and json.loads(json.dumps(values["mechanism"])) != own:
        raise ValueError(
            f"the evaluation is of {values['mechanism']}, and the student has {own}: evaluate the student again"
        )


def student_of(source: Setting | Student) -> Student:
    return source if isinstance(source, Student) else source.student


def mechanism_of(student: Student) -> Mechanism:
    return student.handle.layers[0].mechanism


def base_of(source: Setting | Student) -> str:
    """What the student was made from: a hub id, `tiny`, or "" where it was a folder of this disk."""
    if isinstance(source, Student):
        return base_model_of(source.model)
    named = source.config.model
    return named if bundled(named) or is_hub_id(named) else base_model_of(source.pipe, source.student.model)


def card(
    source: Setting | Student, base: str, name: str, files: Iterable[str], evaluation: Mapping[str, Any] | None
) -> str:
    """The model card of a folder with `files`, called `name` by those who load it."""
    from huggingface_hub import ModelCard, ModelCardData

    student, files = student_of(source), list(files)
    mechanism, layers = mechanism_of(student), student.handle.layers
    lora, own = LORA_NAME in files, bundled(base)
    data = ModelCardData(
        library_name="diffattn",
        base_model=base if base and not own else None,
        base_model_relation="adapter" if base and not own else None,
        license="apache-2.0" if own else None,
        tags=["diffattn", "diffusers", "attention", mechanism.type, *(["lora"] if lora else [])],
    )
    whose = "the pipeline that diffattn brings along" if own else base or "a model of its author's"
    part = None if isinstance(source, Student) else source.part
    which = "" if part is None else f"`{part}` of "
    parts = [
        f"# {mechanism.type} attention for {type(student.model).__name__}",
        f"`{mechanism}` in {len(layers)} attention layers of {which}{whose}, distilled from its own full attention. "
        f"Trained: {trained(student)}." + settings_of(source, name),
        f"`{mechanism.type}`: {(inspect.getdoc(type(mechanism)) or '').splitlines()[0]}",
        f"```python\n{snippet(source, base, name)}\n```",
    ]
    if lora and FILE_NAME not in files and not isinstance(source, Student) and source.part is None:
        two = f'pipe.load_lora_weights("{name}")\n{applied(mechanism, source.config.layers)}'
        parts += ["The same in two steps, as with any LoRA:", f"```python\n{two}\n```"]
    if evaluation is not None:
        parts += ["## Evaluation", *table(evaluation)]
    parts += [f"![{title}]({file})" for file, title in FIGURES.items() if file in files]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def trained(student: Student) -> str:
    """Which weights are others than the base model's, in words."""
    own = any(layer.weights is not None for layer in student.handle.layers)
    also = f", and {WHAT['mechanism']}" if own and student.trainable != "mechanism" else ""
    return WHAT[student.trainable] + also


def settings_of(source: Setting | Student, name: str) -> str:
    """What else the weights were trained for, in words; nothing where it was one setting."""
    drawn = {} if isinstance(source, Student) else source.config.drawn
    if not drawn:
        return ""
    said = " and ".join(f"{option} {', '.join(map(str, values))}" for option, values in drawn.items())
    lean = "" if student_of(source).slopes is None else ", with which they lean"
    example = ", ".join(f"{option}={values[-1]!r}" for option, values in drawn.items())
    return f' One training for {said}{lean}: choose by `diffattn.load(pipe, "{name}", {example})`.'


def applied(mechanism: Mechanism, layers: str | None) -> str:
    """Python that applies a mechanism by its short name and the options that are not at their defaults."""
    options = {name: getattr(mechanism, name) for name in changed_options(mechanism)}
    options |= {"layers": layers} if layers is not None else {}
    said = [f"{name}={_literal(value)}" for name, value in options.items()]
    return f"diffattn.apply({', '.join(['pipe', repr(mechanism.type), *said])})"


def _literal(value: Any) -> str:
    """A value in Python that imports nothing: mechanisms within one as the text that they are read from."""
    several = value if isinstance(value, tuple) else (value,)
    if any(isinstance(own, Mechanism) for own in several):
        return json.dumps(",".join(map(str, several)))
    return repr(value)


def snippet(source: Setting | Student, base: str, name: str) -> str:
    """Python that loads the base model and the folder, and draws where the pipeline is known."""
    own = bundled(base)
    where = f'diffattn.tiny.path("{own}")' if own else f'"{base or "base-model"}"'
    lines = [
        "import diffattn",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({where})" + ("  # the base model's folder" if not base else ""),
        f'diffattn.load(pipe, "{name}")',
    ]
    if own:
        what = ("image", "images") if own == "flux" else ("frames", "frames")
        lines.append(f'{what[0]} = pipe("a red circle", **diffattn.tiny.defaults("{own}")).{what[1]}[0]')
    elif not isinstance(source, Student):
        is_video = hasattr(source.pipe, "video_processor")
        lines.append(f'{"video" if is_video else "image"} = pipe("a lighthouse at dawn").')
        lines[-1] += "frames[0]" if is_video else "images[0]"
    return "\n".join(lines)


def table(evaluation: Mapping[str, Any]) -> list[str]:
    """The main figures of an evaluation, and what they are."""
    both = ("student", "swap alone")
    rows = [
        [f"velocity error, noise {row['level']:.2f}", f"{row['student']:.4g}", f"{row['swap_alone']:.4g}"]
        for row in evaluation["velocity"]
    ]
    rows.append(["velocity error, all", *(f"{evaluation['velocity_error'][which]:.4g}" for which in both)])
    pictures = evaluation.get("pictures") or {}
    compared = {"PSNR, dB": pictures.get("psnr"), "SSIM": pictures.get("ssim"), **(pictures.get("metrics") or {})}
    for title, values in compared.items():
        if values:
            rows.append([title, *(f"{values[which]:.4g}" if which in values else "" for which in both)])
    text = f"Over {evaluation['samples']} held-out samples, velocity errors relative to the power of the base model's. "
    if pictures:
        what = "Images" if pictures.get("frames", 1) == 1 else "Clips"
        text += f"{what} of {evaluation['prompts']} prompts, beside the base model's. "
    text += (
        f"*Swap alone* is the same attention with the base model's weights. Attention computed: "
        f"{evaluation['attention_share']:.1%} of full attention."
    )
    lines = ["| | student | swap alone |", "|---|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
    return ["\n".join(lines), text]


def _copy(figure: Path, folder: Path) -> Path:
    if figure.resolve() != (folder / figure.name).resolve():
        with written(folder / figure.name) as temporary:
            shutil.copyfile(figure, temporary)
    return folder / figure.name
