"""Options read by their annotations: in Python, from files, as text; in mechanisms of ours and of others."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pytest
import tiny_pipelines
import torch
from models import flux, sd15

import diffattn
from diffattn import ClearAttention, config
from diffattn.mechanisms.base import Mechanism
from diffattn.options import Must, Text, at_least, check_fields, hints_of, read, read_fields, shown


def named(value: Any) -> str:
    """Without addresses, which differ between the processes that share the tests."""
    return re.sub(r" at 0x\w+", "", str(value))


class Pair(NamedTuple):
    first: float | None
    second: int = 2


@pytest.mark.parametrize(
    ("value", "hint", "plain"),
    [
        (True, bool, True),
        (np.bool_(False), bool, False),
        (np.int64(7), int, 7),
        (np.uint8(7), float, 7),
        (np.float32(0.5), float, 0.5),
        (np.array([3, 4]), tuple[int, ...], (3, 4)),
        (np.array(3), int, 3),
        ([3, 4], tuple[int, int], (3, 4)),
        ((1, np.int32(2)), Pair, Pair(1, 2)),
        ([None], Pair, Pair(None, 2)),
        ([[0.5, 1], [None, 3]], tuple[Pair, ...], (Pair(0.5, 1), Pair(None, 3))),
        (None, Annotated[int | None, at_least(1)], None),
        ("transformer", str | Iterable[str] | None, "transformer"),
        ({"a": 1}, Iterable[str], ("a",)),
        ((name for name in "ab"), Iterable[str], ("a", "b")),
        (slice(np.int64(4), None), slice, slice(4, None)),
        ("wandb", Literal["wandb", "trackio"], "wandb"),
        (object, object, object),
        ({"any": 1}, dict[str, int], {"any": 1}),
    ],
    ids=named,
)
def test_values_are_made_plain(value: Any, hint: Any, plain: Any) -> None:
    got = read("option", value, hint)
    assert got == plain and type(got) is type(plain)
    if isinstance(plain, tuple):
        assert [type(item) for item in got] == [type(item) for item in plain]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, bool), ("no", bool), (None, bool), (np.int64(1), bool),
        (True, int), ("5", int), (5.0, int), (None, int), (np.float64(5), int), (torch.tensor(5), int), ([5], int),
        (True, float), ("5", float), (None, float), (float("nan"), float), (np.float32("inf"), float),
        (10**400, float), (1j, float), (np.bool_(True), float), (np.datetime64("2020"), float),
        (3, str), (b"x", str), (None, str), (Path("x"), str),
        ("45", tuple[int, ...]), (4, tuple[int, ...]), ((4, True), tuple[int, ...]), ({4, 5}, tuple[int, ...]),
        ((0.9,), tuple[float, float]), ((1, 2, 3), tuple[float, float]), (np.ones((2, 2)), tuple[float, float]),
        ((), Pair), ((1, 2, 3), Pair), (("1", 2), Pair), (3, Pair),
        (torch.tensor(5), Iterable[str]), ([3], Iterable[str]), (b"ab", Iterable[str]), ("ab", Iterable[int]),
        ("other", Literal["wandb"]), (True, Literal[1, 2]),
        (0, Annotated[int, at_least(1)]), ((2, 3, 4), Annotated[tuple[int, ...], Must("two", lambda v: len(v) == 2)]),
        (3, Callable[[str], bool]), (slice("a"), slice), (slice(None, None, 0), slice), (4, slice),
        (3, str | Iterable[str] | None), (2.5, bool | tuple[bool, ...]),
    ],
    ids=named,
)  # fmt: skip
def test_values_of_another_type_are_refused_in_one_line(value: Any, hint: Any) -> None:
    with pytest.raises(ValueError, match=r"^mine: option must be .+, got .+") as error:
        read("mine: option", value, hint)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("text", "hint", "plain"),
    [
        *((text, bool, True) for text in ("true", "True", "yes", "1", "on", "ON")),
        *((text, bool, False) for text in ("false", "FALSE", "no", "0", "off", "Off")),
        ("7", int, 7), ("-7", int, -7),
        ("2.5", float, 2.5), ("3", float, 3), ("3.0", float, 3.0), ("1e-4", float, 1e-4),
        ("none", float | None, None), ("NULL", str | None, None), ("none", str, "none"), ("5", str, "5"),
        ("4,8", tuple[int, ...], (4, 8)), ("(4, 8)", tuple[int, ...], (4, 8)), ("[4,8]", tuple[int, int], (4, 8)),
        ("4", tuple[int, ...], (4,)), ("()", tuple[int, ...], ()), ("", tuple[int, ...], ()),
        ("yes,off", bool | tuple[bool, ...], (True, False)), ("8", int | tuple[int, ...], 8),
        ("0.5,none", tuple[float | None, ...], (0.5, None)),
        ("none,4", Pair, Pair(None, 4)), ("((1, 2), (None, 3))", tuple[Pair, ...], (Pair(1, 2), Pair(None, 3))),
        ("wandb, trackio", tuple[Literal["wandb", "trackio"], ...], ("wandb", "trackio")),
        ("a fox, running", tuple[str, ...], ("a fox, running",)), ("['a', 'b']", tuple[str, ...], ("a", "b")),
        ("2", Literal[1, 2], 2), ("{'a': 1}", dict[str, int], {"a": 1}), ("x y", Any, "x y"),
    ],
    ids=named,
)  # fmt: skip
def test_text_is_read_by_type(text: str, hint: Any, plain: Any) -> None:
    got = read("option", Text(text), hint)
    assert got == plain and type(got) is type(plain)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("2", bool), ("maybe", bool), ("", bool), ("none", bool), ("nope", bool),
        ("1.5", int), ("", int), ("true", int), ("9" * 5000, int),
        ("nan", float), ("inf", float), ("1e999", float), ("abc", float), ("1,5", float), ("true", float),
        ("none", float), ("a b", tuple[int, ...]), ("4,,x", tuple[int, ...]), ("4,8", tuple[int, int, int]),
        ("(" * 500, tuple[int, ...]), ("{}", tuple[int, ...]), ("0.9", tuple[float, float]), ("4;8", Pair),
        ("x", Literal["a", "b"]), ("x", int | float | None),
    ],
    ids=lambda value: named(value)[:30],
)  # fmt: skip
def test_text_of_another_type_is_refused_in_one_line(text: str, hint: Any) -> None:
    with pytest.raises(ValueError, match=r"^option must be .+, got .+") as error:
        read("option", Text(text), hint)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_what_is_shown_of_a_value_is_one_short_line() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown(torch.zeros(90, 90)).count("\n") == 0
    assert len(shown("x" * 9999)) == 120
    assert "Broken" in shown(Broken())


def wrong_values(name: str, cls: type) -> list[Any]:
    """An object that no option takes, for each option of a mechanism."""
    return [pytest.param(cls, field.name, id=f"{name}-{field.name}") for field in dataclasses.fields(cls) if field.init]


@pytest.mark.parametrize(
    ("cls", "option"), [case for name, cls in config.registered().items() for case in wrong_values(name, cls)]
)
def test_every_option_of_every_mechanism_has_a_type(cls: Any, option: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    needed: dict[str, Any] = {name: 4 for name, field in fields.items() if field.default is field.default_factory}
    needed |= {"mechanisms": "softmax,linear"} if "mechanisms" in needed else {}
    needed |= {"base": "softmax"} if "base" in needed else {}
    for wrong in (object(), Text("@"), float("nan"), [[[]]], {"a": {}}):
        for make in (cls, lambda **options: config.create(cls.type, **options)):
            with pytest.raises(ValueError, match=rf"^{cls.type}: {option} must be .*, got ") as error:
                make(**{**needed, option: wrong})
            assert "\n" not in str(error.value)


def test_numbers_of_numpy_become_plain() -> None:
    mechanism = ClearAttention(radius=np.float32(2.5), down_factor=np.int64(2), proportional=np.bool_(True))
    assert mechanism == ClearAttention(radius=2.5, down_factor=2, proportional=True)
    assert [type(value) for value in (mechanism.radius, mechanism.down_factor, mechanism.proportional)] == [
        float,
        int,
        bool,
    ]
    config.to_json(mechanism)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    config.registered()
    monkeypatch.setattr(config, "_registry", dict(config._registry))


def test_a_mechanism_of_others_is_checked_as_far_as_its_annotations_tell(own_registry: None) -> None:
    class Local:
        pass

    @config.register("foreign")
    @dataclass(frozen=True, kw_only=True)
    class Foreign(Mechanism):
        type: ClassVar[str]
        width: "int"
        loose: "Local | None" = None  # a name that no module holds
        sloppy: int = None  # type: ignore[assignment]
        free: Any = "x"
        limit: float = float("inf")

        def __post_init__(self) -> None:
            pass  # without the base's

    assert hints_of(Foreign)["loose"] is Any
    made = config.create("foreign", width=np.int64(3), loose=Local, free=Text("off"))
    assert (made.width, made.loose, made.sloppy, made.free) == (3, Local, None, "off")
    for options in ({"width": "3"}, {"width": 3, "sloppy": "x"}, {"width": 3, "limit": "x"}):
        with pytest.raises(ValueError, match="foreign: .* must be"):
            config.create("foreign", **options)
        with pytest.raises(ValueError, match="foreign: .* must be"):
            diffattn.apply(flux().model, Foreign(**options))


def test_fields_of_a_plain_dataclass_are_read() -> None:
    @dataclass(frozen=True)
    class Plain:
        rate: float
        names: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            check_fields(self)

    assert Plain(np.float64(2.0), ["a"]).names == ("a",)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^rate must be a number, got 'abc'"):
        Plain("abc")  # type: ignore[arg-type]
    assert read_fields(Plain, {"rate": Text("1e-3")}) == {"rate": 1e-3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": None}, "radius must be a positive number, got None"),
        ({"radius": True}, "radius must be a positive number, got True"),
        ({"radius": "5"}, "radius must be a positive number, got '5'"),
        ({"train_tokens": "x"}, "train_tokens must be a whole number, got 'x'"),
        ({"proportional": "false"}, "proportional must be true or false, got 'false'"),
        ({"min_tokens": None}, "min_tokens must be an int of at least 0, got None"),
        ({"min_tokens": "5"}, "min_tokens must be an int of at least 0, got '5'"),
        ({"min_tokens": -1}, "min_tokens must be an int of at least 0, got -1"),
        ({"min_tokens": float("nan")}, "min_tokens must be"),
        ({"layers": 3}, "layers must be a glob .* got 3"),
        ({"layers": ["*", 3]}, "layers must be a glob"),
        ({"layers": b"*"}, "layers must be a glob"),
        ({"components": 3}, "components must be a part's name, or several, .* got 3"),
        ({"components": [None]}, "components must be"),
        ({"components": "t"}, "has no model 't'; its models: .*transformer"),
        ({"backend": None}, "backend must be the name of a kernel or 'auto', got None"),
        ({"backend": ["dense"]}, "backend must be"),
        ({"steps": slice("4", None)}, "steps must be a slice of whole numbers"),
        ({"steps": slice(0, 4, 0)}, "steps must be a slice of whole numbers"),
    ],
)
def test_apply_refuses_values_of_another_type_and_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    pipe = tiny_pipelines.flux().pipe
    before = dict(pipe.transformer.attn_processors)
    with pytest.raises(ValueError, match=message) as error:
        diffattn.apply(pipe, "clear", **{"radius": 2, **arguments})
    assert "\n" not in str(error.value)
    assert dict(pipe.transformer.attn_processors) == before and not hasattr(pipe.transformer, "_diffattn")


def test_apply_takes_one_component_by_name_and_numbers_of_numpy() -> None:
    pipe = tiny_pipelines.flux().pipe
    names = (name for name in ["transformer_blocks.*"])
    with diffattn.apply(
        pipe, "clear", radius=np.int32(2), components="transformer", layers=names, min_tokens=np.int64(3)
    ) as handle:
        assert len(handle.layers) == 2
        assert type(handle.layers[0].min_tokens) is int and type(handle.layers[0].mechanism.radius) is int


def test_processors_are_checked_likewise() -> None:
    with pytest.raises(ValueError, match="min_tokens must be"):
        diffattn.attn_processors(sd15().model, "clear", radius=2, min_tokens="5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers must be"):
        diffattn.attn_processors(sd15().model, "clear", radius=2, layers=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clear", {"radius": 1e308}), ("clear", {"radius": 2**31}), ("clear", {"radius": 2, "ntk_factor": 1e300}),
        ("clear", {"radius": 2, "down_factor": 2**31 - 1}), ("agent", {"num_agents": 10**12}),
        ("neighborhood", {"kernel_size": (3, 10**15)}), ("dual_scope", {"padding": 10**10}),
    ],
)  # fmt: skip
def test_numbers_that_nothing_holds_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at most") as error:
        config.create(name, **options)
    assert "\n" not in str(error.value)
    config.create("agent", agents="merge", seed=2**40)
