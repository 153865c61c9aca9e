"""The exit of one processor: what the rebound call keeps of the family's own, and what it leaves alone."""

import copy
import inspect
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
)
from diffusers.models.transformers import transformer_flux, transformer_wan
from models import Tiny, flux, sd3, sd15, wan
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import diffattn
from diffattn.swap import intercept


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small spend nearly all their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recorder:
    """A layer that returns the mean of the values and notes its calls."""

    grouped_heads = False

    def __init__(self, wanted: bool = True) -> None:
        self.wanted = wanted
        self.parallel_configs: list[Any] = []
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]] = []

    def wants(self, query: Tensor, key: Tensor, parallel_config: Any = None, is_causal: bool = False) -> bool:
        self.parallel_configs.append(parallel_config)
        return self.wanted

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        parallel_config: Any = None,
    ) -> Tensor:
        self.parallel_configs.append(parallel_config)
        self.calls.append((query, key, value, mask, scale))
        return value.mean(2, keepdim=True).expand_as(query)


def dispatch_attention_fn(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The name that `DispatchProcessor` looks up in this module."""
    return query * 2


class DispatchProcessor:
    """Calls like diffusers' newer processors, with whatever the test wants."""

    def __init__(self) -> None:
        self.call: dict[str, Any] = {}

    def __call__(self, attn: Any, hidden_states: Tensor, *, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(hidden_states, key, value, **self.call)


class TorchProcessor:
    """Calls like diffusers' older processors; may call another processor first."""

    def __init__(self) -> None:
        self.call: dict[str, Any] = {}

    def __call__(self, attn: Any, hidden_states: Tensor, *, key: Tensor, value: Tensor, first: Any = None) -> Tensor:
        if first is not None:
            first(attn, hidden_states, key=key, value=value)
        return F.scaled_dot_product_attention(hidden_states, key, value, **self.call)


class ModuleProcessor(nn.Module):
    """A processor with weights, such as those of image prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))

    def __call__(self, attn: Any, hidden_states: Tensor, *, key: Tensor, value: Tensor) -> Tensor:
        return self.gain * F.scaled_dot_product_attention(hidden_states, key, value)


@pytest.fixture
def made() -> Any:
    """`processor_class` with a prefix of the tests."""

    def make(base: type, prefix: str = "Test") -> type:
        return intercept.processor_class(base, prefix)

    return make


def qkv(heads: int = 2, groups: int | None = None, tokens: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (b, h, n, d)."""
    return tuple(torch.randn(2, count, tokens, 4) for count in (heads, groups or heads, groups or heads))


BASES = [
    transformer_flux.FluxAttnProcessor,
    transformer_flux.FluxIPAdapterAttnProcessor,
    transformer_wan.WanAttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
]


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_the_class_passes_for_its_base(made: Any, base: type) -> None:
    cls = made(base, "Clear")
    assert cls is made(base, "Clear") and cls is not made(base, "Halo")  # one class for all models
    assert cls.__name__ == f"Clear{base.__name__}" and issubclass(cls, base)
    assert inspect.signature(cls.__call__) == inspect.signature(base.__call__)
    assert cls.__module__ == base.__module__
    assert cls in [base] and {base: "known"}[cls] == "known" and cls is not base
    assert cls != made(base, "Halo")


@torch.no_grad()
def test_diffusers_may_build_a_processor_anew(made: Any) -> None:
    """As its motion models do by `processor.__class__()`: without a layer it is the model's own attention."""
    tiny = sd3()
    want = tiny.run()
    for module in tiny.model.modules():
        if isinstance(module, Attention):
            module.set_processor(made(type(module.processor))())
    assert torch.equal(tiny.run(), want)


def test_a_swapped_class_is_built_without_arguments() -> None:
    tiny = wan()
    diffattn.apply(tiny.model, "clear", radius=2)
    processor = tiny.model.blocks[0].attn1.processor
    assert processor.mechanism == diffattn.ClearAttention(radius=2)
    fresh = processor.__class__()
    assert type(fresh) is type(processor) and fresh.layer is None and fresh.mechanism is None


def test_diffusers_finds_its_metadata() -> None:
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    tiny = flux()
    base = type(tiny.model.transformer_blocks[0].attn.processor)
    diffattn.apply(tiny.model, "clear", radius=2)
    processor = tiny.model.transformer_blocks[0].attn.processor
    assert AttentionProcessorRegistry.get(processor.__class__) is AttentionProcessorRegistry.get(base)


@torch.no_grad()
def test_keyword_arguments_reach_the_processor(made: Any) -> None:
    """Attention modules drop every keyword that the processor's signature does not name."""
    seen = []

    class Noting:
        def __call__(
            self,
            attn: Attention,
            hidden_states: Tensor,
            encoder_hidden_states: Any,
            attention_mask: Any,
            note: str = "lost",
        ) -> Tensor:
            seen.append(note)
            return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)

    tiny = sd3()
    attn = tiny.model.transformer_blocks[0].attn
    attn.processor = made(Noting)()
    attn(torch.randn(1, 6, 16), note="kept")
    assert seen == ["kept"]


@pytest.mark.parametrize("base", [DispatchProcessor, TorchProcessor], ids=lambda base: base.__name__)
def test_the_layer_gets_heads_before_tokens(made: Any, base: type) -> None:
    q, k, v = qkv()
    mask = torch.ones(2, 1, 1, 3, dtype=torch.bool)
    processor = made(base)()
    processor.layer, processor.call = Recorder(), {"attn_mask": mask, "scale": 0.5}
    swap = (lambda x: x.transpose(1, 2)) if base is DispatchProcessor else (lambda x: x)
    out = processor(None, swap(q), key=swap(k), value=swap(v))
    (got,) = processor.layer.calls
    assert all(torch.equal(one, other) for one, other in zip(got[:3], (q, k, v), strict=True))
    assert got[3] is mask and got[4] == 0.5
    assert torch.equal(swap(out), v.mean(2, keepdim=True).expand_as(q))


def test_calls_that_the_layer_leaves_go_to_the_name_of_the_model(made: Any) -> None:
    q, k, v = qkv()
    for layer in (None, Recorder(wanted=False)):
        own, torchs = made(DispatchProcessor)(), made(TorchProcessor)()
        own.layer = torchs.layer = layer
        assert torch.equal(own(None, q, key=k, value=v), 2 * q)
        assert torch.equal(torchs(None, q, key=k, value=v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("base", [DispatchProcessor, TorchProcessor], ids=lambda base: base.__name__)
def test_grouped_queries_are_given_their_keys(made: Any, base: type) -> None:
    q, k, v = qkv(heads=4, groups=2)
    processor = made(base)()
    processor.layer, processor.call = Recorder(), {"enable_gqa": True}
    swap = (lambda x: x.transpose(1, 2)) if base is DispatchProcessor else (lambda x: x)
    processor(None, swap(q), key=swap(k), value=swap(v))
    _, key, value, _, _ = processor.layer.calls[0]
    assert key.shape[1] == 4
    assert_close(
        F.scaled_dot_product_attention(q, key, value), F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    )


@pytest.mark.parametrize("base", [DispatchProcessor, TorchProcessor], ids=lambda base: base.__name__)
def test_a_layer_that_takes_grouped_heads_gets_no_copies(made: Any, base: type) -> None:
    q, k, v = qkv(heads=4, groups=2)
    processor = made(base)()
    processor.layer, processor.call = Recorder(), {"enable_gqa": True}
    processor.layer.grouped_heads = True
    processor.layer.attend = lambda query, *rest: (processor.layer.calls.append((query, *rest)), query)[1]
    swap = (lambda x: x.transpose(1, 2)) if base is DispatchProcessor else (lambda x: x)
    processor(None, swap(q), key=swap(k), value=swap(v))
    _, key, value, *_ = processor.layer.calls[0]
    assert key.data_ptr() == k.data_ptr()
    assert value.data_ptr() == v.data_ptr()


@pytest.mark.parametrize("base", [DispatchProcessor, TorchProcessor], ids=lambda base: base.__name__)
@pytest.mark.parametrize("call", [{"dropout_p": 0.1}, {"is_causal": True}], ids=str)
def test_dropout_and_causal_order_are_refused(made: Any, base: type, call: dict[str, Any]) -> None:
    q, k, v = qkv()
    processor = made(base)()
    processor.layer, processor.call = Recorder(), call
    with pytest.raises(NotImplementedError, match="neither dropout nor a causal order"):
        processor(None, q, key=k, value=v)


def test_context_parallelism_is_the_layers_or_the_models(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever computes a call is told that its tokens are those of one rank."""
    given = []

    def note(query: Tensor, *args: Any, parallel_config: Any, **kwargs: Any) -> Tensor:
        given.append(parallel_config)
        return query

    monkeypatch.setitem(DispatchProcessor.__call__.__globals__, "dispatch_attention_fn", note)
    q, k, v = qkv()
    config = object()
    for wanted in (True, False):
        processor = made(DispatchProcessor)()
        processor.layer, processor.call = Recorder(wanted), {"parallel_config": config}
        processor(None, q, key=k, value=v)
        assert processor.layer.parallel_configs == [config] * (2 if wanted else 1)
        assert given == ([] if wanted else [config])


def test_a_failing_call_leaves_no_layer_behind(made: Any) -> None:
    q, k, v = qkv()
    cls = made(TorchProcessor)
    failing, plain = cls(), cls()
    failing.layer, failing.call = Recorder(), {"is_causal": True}
    with pytest.raises(NotImplementedError):
        failing(None, q, key=k, value=v)
    assert torch.equal(plain(None, q, key=k, value=v), F.scaled_dot_product_attention(q, k, v))


def test_a_call_within_a_call_has_its_own_layer(made: Any) -> None:
    q, k, v = qkv()
    cls = made(TorchProcessor)
    outer, inner = cls(), cls()
    outer.layer = Recorder()
    out = outer(None, q, key=k, value=v, first=inner)
    assert len(outer.layer.calls) == 1
    assert torch.equal(out, v.mean(2, keepdim=True).expand_as(q))


def test_processors_that_are_modules(made: Any) -> None:
    q, k, v = qkv()
    processor = made(ModuleProcessor)()
    want = 3 * F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(processor(None, q, key=k, value=v), want)
    processor.layer = Recorder()
    assert torch.equal(processor(None, q, key=k, value=v), 3 * v.mean(2, keepdim=True).expand_as(q))
    assert list(processor.state_dict()) == ["gain"]


@torch.no_grad()
def test_picture_prompts_stay_with_the_model() -> None:
    """IP-Adapter's processor is a module and calls attention twice: the second time over other tokens."""
    tiny = flux()
    module = tiny.model.transformer_blocks[0].attn
    torch.manual_seed(1)
    adapter = transformer_flux.FluxIPAdapterAttnProcessor(32, 32, num_tokens=(3,), scale=1.0)
    module.processor = adapter
    tiny.inputs["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(2, 3, 32)], "ip_adapter_masks": None}
    want = tiny.run()
    keys = list(tiny.model.state_dict())
    handle = diffattn.apply(tiny.model, "clear", radius=100)
    assert type(module.processor).__name__ == "ClearFluxIPAdapterAttnProcessor"
    assert_close(tiny.run(), want)
    assert diffattn.summary(tiny.model).calls == {"swapped": len(handle.layers)}
    assert list(tiny.model.state_dict()) == keys
    handle.restore()
    assert module.processor is adapter and torch.equal(tiny.run(), want)


def test_has_exit() -> None:
    assert intercept.has_exit(AttnProcessor2_0())
    assert intercept.has_exit(transformer_flux.FluxAttnProcessor())
    assert not intercept.has_exit(AttnProcessor())
    assert not intercept.has_exit(SanaLinearAttnProcessor2_0())
    assert not intercept.has_exit(nn.Identity())


def test_a_processor_without_an_exit_is_named() -> None:
    tiny = sd15()
    tiny.model.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="AttnProcessor computes no softmax attention"):
        diffattn.apply(tiny.model, "clear", radius=2)


@torch.no_grad()
def test_no_name_of_torch_or_diffusers_is_replaced() -> None:
    def names() -> list[Any]:
        backends = attention_dispatch._AttentionBackendRegistry
        return [
            F.scaled_dot_product_attention,
            attention_dispatch.dispatch_attention_fn,
            transformer_flux.dispatch_attention_fn,
            transformer_flux.FluxAttnProcessor.__call__,
            diffusers.models.attention_processor.F,
            AttnProcessor2_0.__call__,
            backends._active_backend,
            len(backends._backends),
        ]

    before = names()
    for tiny in (flux(), sd15()):
        with diffattn.apply(tiny.model, "clear", radius=2):
            tiny.run()
            assert all(now is was for now, was in zip(names(), before, strict=True))
    assert all(now is was for now, was in zip(names(), before, strict=True))


def outputs(tiny: Tiny, radius: float) -> Tensor:
    with diffattn.apply(tiny.model, "clear", radius=radius):
        return tiny.run()


@torch.no_grad()
def test_two_models_keep_their_own_settings() -> None:
    small, large = flux(), flux()
    want = outputs(small, 2), outputs(large, 3)
    assert not torch.equal(*want)
    diffattn.apply(small.model, "clear", radius=2)
    diffattn.apply(large.model, "clear", radius=3)
    for _ in range(2):
        assert torch.equal(small.run(), want[0])
        assert torch.equal(large.run(), want[1])


def test_models_run_in_threads_of_their_own() -> None:
    tinies, radii = [flux(), flux(), sd15()], [2, 3, 2]
    with torch.no_grad():
        want = [outputs(tiny, radius) for tiny, radius in zip(tinies, radii, strict=True)]
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(10) if not torch.equal(tinies[i].run(), want[i]))

    for tiny, radius in zip(tinies, radii, strict=True):
        diffattn.apply(tiny.model, "clear", radius=radius)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
@pytest.mark.parametrize("build", [flux, sd15], ids=lambda build: build.__name__)
def test_a_copy_of_a_swapped_model_stands_alone(build: Any) -> None:
    tiny = build()
    own = tiny.run()
    diffattn.apply(tiny.model, "clear", radius=2)
    want = tiny.run()
    other = copy.deepcopy(tiny.model)
    assert torch.equal(tiny.run(other), want)
    diffattn.restore(other)
    assert torch.equal(tiny.run(other), own)
    assert torch.equal(tiny.run(), want)
    diffattn.apply(other, "clear", radius=3)
    diffattn.restore(tiny.model)
    assert not torch.equal(tiny.run(other), want)
    assert torch.equal(tiny.run(), own)


def test_the_state_dict_is_that_of_the_model() -> None:
    tiny = flux()
    before = tiny.model.state_dict()
    diffattn.apply(tiny.model, "clear", radius=2, down_factor=2)
    after = tiny.model.state_dict()
    assert list(after) == list(before)
    assert pickle.dumps(list(after)) == pickle.dumps(list(before))


@torch.no_grad()
def test_the_users_backend_governs_dense_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = []
    tiny = flux()

    def note(*args: Any, backend: Any = None, **kwargs: Any) -> Tensor:
        backends.append(backend)
        return attention_dispatch.dispatch_attention_fn(*args, backend=backend, **kwargs)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", note)
    handle = diffattn.apply(tiny.model, "clear", radius=2, layers="transformer_blocks.*")
    want = tiny.run()
    assert backends == [None, None]
    backends.clear()
    former = attention_dispatch._AttentionBackendRegistry._active_backend
    try:
        tiny.model.set_attention_backend("_native_math")
        assert_close(tiny.run(), want)
        assert [str(backend.value) for backend in backends] == ["_native_math"] * 2
        swapped = tiny.model.transformer_blocks[0].attn.processor
        assert swapped._attention_backend == "_native_math"
        with handle.paused():
            tiny.run()
        assert len(backends) == 2 + 4
        diffattn.restore(tiny.model)
        assert tiny.model.transformer_blocks[0].attn.processor._attention_backend == "_native_math"
    finally:
        attention_dispatch._AttentionBackendRegistry._active_backend = former
