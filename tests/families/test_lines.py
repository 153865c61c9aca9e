"""Audio: every mechanism on a line in time, masks of the models' own, and what a line can't have."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hand_masks import TOLERANCE, HandReference, by_hand, error, under_masks
from models import BUILDERS, Tiny, text_mask
from releases import built
from torch import Tensor

import diffattn
from diffattn import TokenGrid
from diffattn.mechanisms import Mechanism
from diffattn.mechanisms.token_merge import TokenMergeAttention

AUDIO = ["Stable-Audio", "Stable-Audio-3", "Stable-Audio-3-patches", "ACE-Step", "LongCat-Audio", "MiniMax-Music3"]
MECHANISMS: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {"proportional": True, "train_tokens": 64}),
    ("clear", {"radius": 4}),
    ("clear", {"radius": 3, "pool": 4}),
    ("agent", {"num_agents": 6}),
    ("agent", {"agents": "merge", "sx": 4, "sy": 1, "use_rand": False}),
    ("halo", {}),
    ("halo", {"tile": 16, "halo": 0, "pool": 4}),
    ("linear", {}),
    ("neighborhood", {"kernel_size": 5}),
    ("neighborhood", {"kernel_size": (1, 4), "dilation": (1, 3)}),
    ("routing", {"top_k": 1, "tile": 8, "pool": 4}),
    ("routing", {"top_k": 1, "tile": (1, 8), "pool": (1, 2), "order": "content"}),
    ("token_merge", {}),
    ("token_merge", {"stride": (1, 4), "ratio": 0.7, "proportional": True}),
    ("window_state", {"radius": 4}),
    ("multi_axis", {"window": 5, "pool": 4}),
    ("multi_axis", {"window": (1, 6), "by": "layers"}),
    ("shifted_window", {"window": 6}),
    ("global_context", {"window": 6, "size": (1, 4)}),
    ("global_context", {"window": 6, "by": "queries"}),
    ("channel", {"groups": 2}),
    ("per_head", {"mechanisms": "clear(radius=3),linear"}),
    ("routing", {"top_k": 1, "tile": 8, "pool": 4, "order": "centroids", "means": "weighted"}),
    ("hybrid", {"base": "clear(radius=3,pool=4)"}),
    ("sla", {"top_share": 0.4, "tile": 6, "query_tile": 9}),
    ("vsa", {"top_share": 0.4, "tile": 4}),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stable_audio() -> Tiny:
    return BUILDERS["Stable-Audio"]()


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), MECHANISMS, ids=str)
def test_every_mechanism_along_time(
    stable_audio: Tiny, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call against the mechanism's own reference; where that needs no block input, the whole model too."""
    tiny, mechanism = stable_audio, diffattn.config.create(name, **options)
    own, grids = type(mechanism).attend, []

    def checked(self: Any, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, **given: Any) -> Tensor:
        out = own(self, q, k, v, grid, **given)
        context, scale, chosen = given["context"], given.get("scale"), {}
        if hasattr(self, "choose"):
            chosen["chosen"] = self.choose(q, k, v, grid, scale, context)
        wide = (tensor.double() for tensor in (q, k, v))
        assert (out - self.reference(*wide, grid, scale=scale, context=context, **chosen)).abs().max() < 2e-5
        grids.append(grid)
        return out

    want = None
    if not mechanism.needs & {"features", "call_index"}:
        want = under_masks(tiny.run, (tiny.model, tiny.spatial), mode=HandReference, mechanism=mechanism)
    own_output = tiny.run()
    monkeypatch.setattr(type(mechanism), "attend", checked)
    with diffattn.apply(tiny.model, mechanism):
        got = tiny.run()
    assert grids == [TokenGrid(1, 37, before=1)] * 2
    assert error(got, own_output) > 1e-3
    assert want is None or error(got, want) < TOLERANCE


def test_every_mechanism_is_looked_at() -> None:
    """One joins by registering."""
    ours = {n for n, cls in diffattn.config.registered().items() if cls.__module__.startswith("diffattn.")}
    assert ours == {name for name, _ in MECHANISMS} | {"dual_scope", "criss_cross"}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("dual_scope", {}, "within which dual_scope changes nothing"),
        ("criss_cross", {}, "of which criss_cross sees everything"),
        ("clear", {"radius": 2, "down_factor": 2}, "down_factor=2 does not divide the grid of 1 rows"),
        ("agent", {"agent_size": (7, 7)}, "more agents along an axis than the grid 1x4096 has cells"),
        ("agent", {"agents": "merge"}, "a block of sy=4 rows and sx=4 columns does not fit the grid 1x4096"),
        ("token_merge", {"stride": (2, 1)}, "a block of stride (2, 1) is a single cell of the grid 1x4096"),
        ("routing", {"share": 0.05}, "above share=0.05"),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", built(AUDIO))
def test_what_a_line_cannot_have_is_refused(family: str, name: str, options: dict[str, Any], reason: str) -> None:
    model = BUILDERS[family]().model
    with pytest.raises(ValueError) as refusal:
        diffattn.apply(model, name, **options)
    assert reason in str(refusal.value)
    assert not hasattr(model, "_diffattn")


def test_tiles_of_a_line_have_as_many_tokens_as_those_of_an_image() -> None:
    routing, line = diffattn.RoutingAttention(top_share=0.1), TokenGrid(1, 1000, before=1)
    assert routing.sides(line) == ((1, 1, 64), (1, 1, 64), (1, 1, 16))
    assert routing.sides(TokenGrid(32, 32)) == ((1, 8, 8), (1, 8, 8), (1, 4, 4))
    assert diffattn.RoutingAttention(top_share=0.1, blocks=256).sides(line).block == (1, 1, 4)
    assert 0.15 < routing.share_on(line) < 0.2  # a sixteenth for the means


@torch.no_grad()
@pytest.mark.parametrize("name", ["clear", "routing"])
def test_own_windows_are_kept(name: str) -> None:
    """ACE-Step: half of the layers see two tokens to each side, less than the window that is put on."""
    tiny = BUILDERS["ACE-Step"]()
    mechanism = diffattn.config.create(name, **({"radius": 7} if name == "clear" else {"top_k": 2, "tile": 8}))
    if name == "clear":
        want = under_masks(tiny.run, (tiny.model, tiny.spatial), radius=7)
    else:
        want = under_masks(tiny.run, (tiny.model, tiny.spatial), mode=HandReference, mechanism=mechanism)
    with diffattn.apply(tiny.model, mechanism) as handle:
        assert error(tiny.run(), want) < TOLERANCE
        assert len(handle.layers) == 4
    full = {r"layers\.[13]\.self_attn": next(iter(tiny.spatial.values()))}
    if name == "clear":
        # where the own windows lie within the one that is put on, they alone count
        assert error(under_masks(tiny.run, (tiny.model, full), radius=7), want) < TOLERANCE


@torch.no_grad()
def test_a_window_asked_of_the_kernel_is_kept() -> None:
    """With flash attention ACE-Step makes no masks, and hands its window to the kernel."""
    tiny = BUILDERS["ACE-Step"]()
    want = by_hand(tiny, tiny.spatial)
    narrow = under_masks(tiny.run, (tiny.model, tiny.spatial), radius=30)
    for name, module in tiny.model.named_modules():
        if name.endswith("self_attn"):
            module.processor._attention_backend = "flash"
    for radius, wanted in ((2, want), (30, narrow)):
        with diffattn.apply(tiny.model, "clear", radius=radius):
            assert error(tiny.run(), wanted) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["agent", "linear", "token_merge"])
def test_layers_with_a_window_of_their_own_are_kept_from_one_mask(name: str) -> None:
    tiny = BUILDERS["ACE-Step"]()
    with diffattn.apply(tiny.model, name) as handle:
        assert [layer.name for layer in handle.layers] == ["layers.1.self_attn", "layers.3.self_attn"]
        assert "each query has a mask of its own" in str(diffattn.summary(tiny.model))
        assert tiny.run().isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["Stable-Audio", "LongCat-Audio"])
@pytest.mark.parametrize("name", ["clear", "routing", "agent", "linear"])
def test_padded_audio_is_not_seen(family: str, name: str) -> None:
    """The second sample is shorter."""
    tiny = BUILDERS[family]()
    mask = text_mask(37, 29)
    options: dict[str, Any] = {"clear": {"radius": 2}, "routing": {"top_k": 1, "tile": 8}}
    mechanism = diffattn.config.create(name, **options.get(name, {}))
    want = under_masks(
        lambda: tiny.run(attention_mask=mask), (tiny.model, tiny.spatial), mode=HandReference, mechanism=mechanism
    )
    with diffattn.apply(tiny.model, mechanism):
        got = tiny.run(attention_mask=mask)
        other = tiny.inputs["hidden_states"].clone()
        time = 2 if family == "Stable-Audio" else 1
        other[1].narrow(time - 1, 29, 8).add_(3)
        again = tiny.run(attention_mask=mask, hidden_states=other)
    assert error(got, want) < TOLERANCE
    if name == "agent":  # an agent is the mean of its queries, whoever sees their keys
        return
    shape = tiny.inputs["hidden_states"].shape
    difference = (again - got).view(shape).abs()
    assert difference.narrow(time, 0, 29).max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", built(["Stable-Audio-3"]))
def test_both_calls_of_a_layer_compare_the_input_of_its_block(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differential attention: what is merged in one call is merged in the other."""
    tiny, own = BUILDERS[family](), TokenMergeAttention.attend
    compared: list[Tensor | None] = []
    inputs: list[Tensor] = []

    def noted(self: Any, q: Tensor, *args: Any, **options: Any) -> Tensor:
        compared.append(options["context"].features)
        return own(self, q, *args, **options)

    monkeypatch.setattr(TokenMergeAttention, "attend", noted)
    for block in tiny.model.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with diffattn.apply(tiny.model, "token_merge") as handle:
        tiny.run()
    assert len(compared) == 4 and len(inputs) == 2
    for number, features in enumerate(compared):
        assert features is not None and torch.equal(features, inputs[number // 2])
    assert not any(call.traced_features for call in handle.layers)


def test_a_model_without_a_timestep_counts_no_steps() -> None:
    """UVit2D is told none; its layers are swapped in all steps or in none."""
    model = BUILDERS["UVit2D"]().model

    @dataclasses.dataclass
    class Pipeline:
        components: dict[str, Any]

    pipe = Pipeline({"transformer": model})
    cases: list[tuple[Any, str | Mechanism, dict[str, Any]]] = [
        (pipe, "clear", {"radius": 2, "steps": slice(2, None)}),
        (pipe, "clear", {"radius": 2, "reuse": 2}),
        (pipe, "routing", {"quality": "balanced"}),
        (pipe, "token_merge", {}),
        (model, "dual_scope", {}),
    ]
    for target, mechanism, options in cases:
        with pytest.raises(ValueError, match="it is not told its timestep"):
            diffattn.apply(target, mechanism, **options)
    with diffattn.apply(pipe, "clear", radius=2), torch.no_grad():
        BUILDERS["UVit2D"]().run(model)
    with diffattn.apply(model, "token_merge"), torch.no_grad():
        BUILDERS["UVit2D"]().run(model)
