"""Neighborhood attention: NATTEN's numbers, windows that shift inwards, dilation, causal axes, options by axis."""

import itertools
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn.attention import flex_attention

from diffattn import NeighborhoodAttention, TokenGrid, config
from diffattn.kernels import BACKENDS, dense_mask
from diffattn.kernels.flex import missing_compiler
from diffattn.kernels.tiled import best_windows
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.neighborhood import Line
from diffattn.mechanisms.softmax import softmax_reference

LINES = [
    Line(size, kernel, dilation, causal)
    for size in (1, 2, 5, 9, 12)
    for kernel in (1, 2, 3, 4, 20)
    for dilation in (1, 2, 3, 5, 15)
    for causal in (False, True)
]


def random(grid: TokenGrid, dtype: torch.dtype = torch.float64, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 2, grid.tokens, dim, dtype=dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize(
    ("line", "windows"),
    [
        (Line(5, 3, 1, False), ["012", "012", "123", "234", "234"]),
        (Line(5, 4, 1, False), ["0123", "0123", "0123", "1234", "1234"]),
        (Line(5, 2, 1, False), ["01", "01", "12", "23", "34"]),
        (Line(5, 3, 1, True), ["0", "01", "012", "123", "234"]),
        (Line(7, 2, 2, False), ["02", "13", "02", "13", "24", "35", "46"]),
        (Line(7, 2, 2, True), ["0", "1", "02", "13", "24", "35", "46"]),
        (Line(7, 9, 3, False), ["036", "14", "25", "036", "14", "25", "036"]),
        (Line(3, 9, 1, False), ["012", "012", "012"]),
        (Line(3, 2, 7, False), ["0", "1", "2"]),
    ],
    ids=str,
)
def test_windows_by_hand(line: Line, windows: list[str]) -> None:
    assert [[*line.window(cell)] for cell in range(line.size)] == [[*map(int, window)] for window in windows]


@pytest.mark.parametrize("grouped", [False, True], ids=["in order", "grouped"])
def test_every_form_of_the_rule_is_the_window(grouped: bool) -> None:
    for line in LINES:
        table = line.table()
        ordered = Line(line.size, line.kernel_size, line.dilation, line.is_causal, grouped)
        if grouped:
            order = line.group_order(torch.device("cpu"))
            table = table[order][:, order]
        assert torch.equal(ordered.table(), table), line
        cell = torch.arange(line.size)
        assert torch.equal(ordered.allowed(cell[:, None], cell).expand_as(table), table), line
        assert line.restricts == (not table.all()), line
        for low, high in itertools.combinations(range(line.size + 1), 2):
            seen = table[low:high].any(0).nonzero()
            assert ordered.span(low, high) == (int(seen.min()), int(seen.max()) + 1), (line, low, high)


def test_every_query_sees_as_many_keys() -> None:
    for line in LINES:
        if not line.is_causal and line.kernel_size * line.dilation <= line.size:
            assert line.table().sum(1).unique().tolist() == [line.kernel_size], line


NATTEN_CASES: list[tuple[tuple[int, ...], Any, Any, Any]] = [
    # cells, kernel_size, dilation, is_causal
    ((9,), (3,), (1,), (False,)),
    ((9,), (9,), (1,), (False,)),
    ((10,), (4,), (1,), (False,)),
    ((11,), (3,), (3,), (False,)),
    ((11,), (2,), (5,), (False,)),
    ((12,), (4,), (3,), (True,)),
    ((13,), (5,), (1,), (True,)),
    ((13,), (6,), (2,), (True,)),
    ((17,), (8,), (2,), (False,)),
    ((6, 9), (3, 3), (1, 1), (False, False)),
    ((6, 9), (5, 7), (1, 1), (False, False)),
    ((6, 9), (6, 9), (1, 1), (False, False)),
    ((6, 9), (6, 2), (1, 4), (False, False)),
    ((7, 11), (4, 6), (1, 1), (False, False)),
    ((7, 11), (3, 5), (2, 2), (False, False)),
    ((7, 11), (2, 3), (3, 3), (False, False)),
    ((7, 11), (3, 3), (1, 3), (True, False)),
    ((7, 11), (3, 4), (2, 1), (False, True)),
    ((7, 11), (3, 5), (2, 2), (True, True)),
    ((8, 5), (8, 5), (1, 1), (True, False)),
    ((8, 5), (8, 5), (1, 1), (True, True)),
    ((16, 2), (5, 2), (3, 1), (False, False)),
    ((3, 5, 7), (3, 3, 3), (1, 1, 1), (False, False, False)),
    ((3, 5, 7), (2, 5, 3), (1, 1, 2), (False, False, False)),
    ((4, 6, 5), (2, 3, 4), (2, 2, 1), (False, False, False)),
    ((4, 6, 5), (4, 3, 5), (1, 1, 1), (True, False, False)),
    ((5, 4, 6), (3, 2, 2), (1, 2, 3), (True, True, False)),
    ((5, 4, 6), (2, 2, 3), (2, 2, 2), (True, True, True)),
]


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention by plain operations, without a compilation for each case."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")
@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize(("shape", "kernel_size", "dilation", "is_causal"), NATTEN_CASES, ids=str)
def test_the_numbers_are_nattens(
    shape: tuple[int, ...], kernel_size: Any, dilation: Any, is_causal: Any, text: int, eager_flex: None
) -> None:
    natten = pytest.importorskip("natten", reason="compares with NATTEN: pip install natten")
    frames, height, width = (1, 1, *shape)[-3:]
    options = {"kernel_size": kernel_size, "dilation": dilation, "is_causal": is_causal}
    grid = TokenGrid(height, width, frames, after=text)
    q, k, v = (tensor.detach() for tensor in random(grid, torch.float32, dim=16))
    cells, other = zip(*(grid.split(tensor.transpose(1, 2), dim=1) for tensor in (q, k, v)), strict=True)
    want = (natten.na1d, natten.na2d, natten.na3d)[len(shape) - 1](
        *(tensor.unflatten(1, shape).contiguous() for tensor in cells),
        **options,
        backend="flex-fna",
        additional_keys=other[1] if text else None,
        additional_values=other[2] if text else None,
    )
    alone = {"kernel_size": 1, "dilation": 1, "is_causal": False}
    mechanism = NeighborhoodAttention(**{name: (alone[name], *value)[-3:] for name, value in options.items()})
    out = mechanism.attend(q, k, v, grid)
    assert_close(grid.split(out)[0], want.flatten(1, len(shape)).transpose(1, 2))


OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (5, 4)},
    {"kernel_size": 3, "dilation": 2},
    {"kernel_size": (3, 2), "dilation": (2, 5)},
    {"kernel_size": 4, "dilation": 3, "is_causal": (False, True)},
    {"kernel_size": 2, "dilation": 30, "is_causal": True},
]


@pytest.mark.parametrize("mask", [None, "keys", "bias", "pairs"])
@pytest.mark.parametrize("backend", ["auto", "dense", "tiled"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_kernel_gives_the_reference(options: dict[str, Any], backend: str, mask: str | None) -> None:
    if backend == "tiled" and mask == "pairs":
        pytest.skip("tiles take no mask that differs from query to query")
    mechanism, grid = NeighborhoodAttention(**options), TokenGrid(13, 18, before=3, after=2)
    q, k, v = random(grid)
    hidden = None
    if mask == "bias":
        hidden = torch.randn(2, 1, 1, grid.tokens, dtype=torch.float64)
    elif mask is not None:
        hidden = torch.rand(2, 1, grid.tokens if mask == "pairs" else 1, grid.tokens) > 0.3
    context = Context(mask=hidden)
    out = mechanism.attend(q, k, v, grid, backend=backend, context=context)
    want = mechanism.reference(q, k, v, grid, context=context)
    assert_close(out, want)
    weight = torch.randn_like(out)
    got, wanted = (torch.autograd.grad((result * weight).sum(), (q, k, v)) for result in (out, want))
    for left, right in zip(got, wanted, strict=True):
        assert_close(left, right)


@pytest.mark.parametrize("backend", ["auto", "dense", "tiled"])
def test_a_video_whose_frames_are_causal(backend: str) -> None:
    mechanism = NeighborhoodAttention(kernel_size=(2, 3, 5), dilation=(1, 2, 1), is_causal=(True, False, False))
    grid = TokenGrid(7, 10, frames=5, before=2)
    q, k, v = random(grid)
    out = mechanism.attend(q, k, v, grid, backend=backend)
    assert_close(out, mechanism.reference(q, k, v, grid))
    later = grid.before + 3 * grid.height * grid.width  # frames 3 and 4 change, frames 0 ... 2 do not see it
    other_k, other_v = k.detach().clone(), v.detach().clone()
    other_k[:, :, later:], other_v[:, :, later:] = 0, 1
    changed = mechanism.attend(q, other_k, other_v, grid, backend=backend)
    assert_close(changed[:, :, grid.before : later], out[:, :, grid.before : later])
    assert not torch.allclose(changed[:, :, later:], out[:, :, later:])


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_dilated_attention_is_attention_on_every_sub_grid(dilation: int) -> None:
    grid = TokenGrid(9, 14)
    q, k, v = random(grid)
    out = NeighborhoodAttention(kernel_size=3, dilation=dilation).attend(q, k, v, grid)
    pictures = [tensor.unflatten(2, (9, 14)) for tensor in (q, k, v, out)]
    for row, column in itertools.product(range(dilation), repeat=2):
        parts = [picture[:, :, row::dilation, column::dilation] for picture in pictures]
        part = TokenGrid(parts[0].shape[2], parts[0].shape[3])
        alone = NeighborhoodAttention(kernel_size=3).reference(*(x.flatten(2, 3) for x in parts[:3]), part)
        assert_close(parts[3].flatten(2, 3), alone)


@pytest.mark.parametrize("kernel_size", [18, 1000, (13, 18), (1, 13, 18)], ids=str)
def test_a_window_over_the_whole_grid_is_softmax(kernel_size: Any) -> None:
    mechanism, grid = NeighborhoodAttention(kernel_size=kernel_size), TokenGrid(13, 18, before=4)
    q, k, v = random(grid)
    assert mechanism.mask(grid).all()
    assert_close(mechanism.attend(q, k, v, grid), softmax_reference(q, k, v))


def test_text_sees_and_is_seen_by_all() -> None:
    grid = TokenGrid(6, 7, before=2, after=3)
    mask = NeighborhoodAttention(kernel_size=2, dilation=2, is_causal=True).mask(grid)
    others = [0, 1, *range(44, 47)]
    assert mask[others].all() and mask[:, others].all()
    assert int(mask[2:44, 2:44].sum()) < 42 * 5


@pytest.mark.parametrize("options", [*OPTIONS, {"kernel_size": (2, 3, 3), "dilation": (1, 2, 1)}], ids=str)
def test_the_mask_is_the_patterns(options: dict[str, Any]) -> None:
    mechanism, grid = NeighborhoodAttention(**options), TokenGrid(9, 8, before=1, after=2)
    pattern = mechanism.pattern(grid)
    assert torch.equal(dense_mask(pattern, grid), mechanism.mask(grid))
    assert pattern.pairs(grid) == int(mechanism.mask(grid)[1:73, 1:73].sum())


def test_dilation_costs_the_tiles_nothing() -> None:
    grid = TokenGrid(128, 128)
    plain, dilated = (NeighborhoodAttention(kernel_size=9, dilation=dilation) for dilation in (1, 4))
    q = torch.empty(1, 1, grid.tokens, 8, dtype=torch.float64)
    explained = [m.explain_backend(q, q, q, grid, "auto", Context()) for m in (plain, dilated)]
    assert explained[0] == explained[1] and explained[0].startswith("tiled")
    patterns = plain.pattern(grid), dilated.pattern(grid).grouped(), dilated.pattern(grid)
    keys = [torch.Size(best_windows(pattern, grid).window).numel() for pattern in patterns]
    assert keys[1] <= keys[0] < keys[2] / 2


def test_one_value_is_for_all_axes() -> None:
    picture, video = TokenGrid(9, 8), TokenGrid(9, 8, frames=4)
    one = NeighborhoodAttention(kernel_size=3, dilation=2, is_causal=True)
    each = NeighborhoodAttention(kernel_size=(3, 3), dilation=(2, 2), is_causal=(True, True))
    all_three = NeighborhoodAttention(kernel_size=(3, 3, 3), dilation=(2, 2, 2), is_causal=(True, True, True))
    assert one.pattern(picture) == each.pattern(picture) == all_three.pattern(picture)
    assert one.pattern(video) == all_three.pattern(video)


def test_two_values_do_not_fit_a_video() -> None:
    mechanism, grid = NeighborhoodAttention(kernel_size=3, dilation=(1, 2)), TokenGrid(4, 6, frames=2)
    message = r"dilation=\(1, 2\) is for rows and columns, and the grid 2x4x6 has 2 frames.*such as \(1, 1, 2\)"
    with pytest.raises(ValueError, match=message):
        mechanism.check(grid)
    with pytest.raises(ValueError, match=message):
        mechanism.attend(*random(grid), grid)
    mechanism.check(TokenGrid(4, 6))


def test_lists_become_tuples() -> None:
    mechanism = NeighborhoodAttention(kernel_size=[3, 5], is_causal=[True, False])  # type: ignore[arg-type]
    assert mechanism == NeighborhoodAttention(kernel_size=(3, 5), is_causal=(True, False))
    assert hash(mechanism) == hash(config.from_json(config.to_json(mechanism)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be an int of at least 1, or one for each axis .* got 0"),
        ({"kernel_size": 3.0}, "kernel_size must be an int .* got 3.0"),
        ({"kernel_size": True}, "kernel_size must be an int .* got True"),
        ({"kernel_size": (3, 0)}, r"kernel_size must be an int .* got \(3, 0\)"),
        ({"kernel_size": (3,)}, r"kernel_size must be an int .* got \(3,\)"),
        ({"kernel_size": (3, 3, 3, 3)}, "kernel_size must be an int"),
        ({"kernel_size": "3"}, "kernel_size must be an int .* got '3'"),
        ({"kernel_size": 3, "dilation": -1}, "dilation must be an int of at least 1"),
        ({"kernel_size": 3, "dilation": (1, None)}, "dilation must be an int of at least 1"),
        ({"kernel_size": 3, "is_causal": 1}, "is_causal must be a bool, or one for each axis"),
        ({"kernel_size": 3, "is_causal": (True, 0)}, "is_causal must be a bool"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(**options)


def test_its_backends_are_all_there_are() -> None:
    assert NeighborhoodAttention(kernel_size=3).backends == ("auto", *BACKENDS)


@pytest.mark.compile
@pytest.mark.slow
def test_the_models_compilation_takes_it_in() -> None:
    torch._dynamo.reset()
    mechanism, grid = NeighborhoodAttention(**OPTIONS[4]), TokenGrid(34, 33, before=2)
    q = torch.randn(1, 1, grid.tokens, 4)

    def block(x: Tensor) -> Tensor:
        return mechanism.attend(x * 2, x, x, grid) + 1

    traced = torch.compile(block, fullgraph=True, backend="eager")
    assert_close(traced(q), block(q))


@pytest.mark.compile
@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="FlexAttention needs a compiler and AVX2")
@pytest.mark.slow
def test_the_compiled_kernel_gives_the_reference() -> None:
    mechanism, grid = NeighborhoodAttention(**OPTIONS[4]), TokenGrid(21, 30, before=5)
    q, k, v = (tensor.detach() for tensor in random(grid, torch.float32, dim=16))
    out = mechanism.attend(q, k, v, grid, backend="flex")
    assert_close(out, mechanism.reference(q.double(), k.double(), v.double(), grid))
