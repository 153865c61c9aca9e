"""The CogVideoX variant against tensors recorded from the official implementation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffattn.pipelines.video_sr.cogvideox.convert import (
    PREFIX,
    CogVideoXSizes,
    load_transformer,
    lora_rank,
    official_shapes,
)
from diffattn.pipelines.video_sr.cogvideox.denoiser import Denoiser
from diffattn.pipelines.video_sr.cogvideox.names import UNUSED
from diffattn.pipelines.video_sr.cogvideox.scheduler import STARCogVideoXScheduler
from diffattn.pipelines.video_sr.cogvideox.transformer import STARCogVideoXTransformer3DModel
from golden_star import star_cases
from golden_vectors import GoldenCase, assert_golden, of_float32
from tiny_cogvideox import sizes_of
from torch import Tensor

Tensors = dict[str, Tensor]


@pytest.mark.golden
@pytest.mark.parametrize("case", star_cases("cogvideox"))
def test_cogvideox(case):
    kinds = [check for knows, check in CHECKS if knows(case.spec)]
    assert len(kinds) == 1, f"a kind of case that no test knows: {sorted(case.spec)}"
    with torch.no_grad():
        kinds[0](case)


def test_a_new_kind_fails(tmp_path):
    file = tmp_path / "cogvideox_new.json"
    file.write_text('{"what": "something new", "tensors": {}}')
    with pytest.raises(AssertionError, match="no test knows"):
        test_cogvideox(GoldenCase(file))


def check_network(case: GoldenCase) -> None:
    """One forward of the network, the gates of a layer, and a whole loop of the sampler."""
    given, config = case.tensors(), case.config
    weights = given.under("w/")
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    assert shapes == case.spec.get("state_dict", shapes)
    assert lora_rank(weights) == config["lora_r"] and config["hidden"] == config["heads"] * config["head_dim"]
    frames = 1 + (config["num_frames"] - 1) // 4
    assert given["in/x"].shape[1:] == (frames, 2 * config["in_channels"], config["latent_h"], config["latent_w"])
    model = load_transformer(weights, case.name, sizes_of(case))
    checked = check_forward(case, given, model) | check_gates(case, given, model) | check_sampler(case, given, model)
    assert checked == {name for name in given if name.startswith(("out/", "act/"))} | {"sampler/out"}


def check_forward(case: GoldenCase, given: Tensors, model: STARCogVideoXTransformer3DModel) -> set[str]:
    timestep = torch.full((len(given["in/x"]),), case.spec["timestep"])
    assert_golden("v", model(given["in/x"], given["in/context"], timestep).sample, given["out/v"], case.tolerance)
    return {"out/v"}


def check_gates(case: GoldenCase, given: Tensors, model: STARCogVideoXTransformer3DModel) -> set[str]:
    """`act/layer<i>.<spa|temp>_<in|out>`."""
    checked = set()
    for name in [name for name in given if name.startswith("act/") and name.endswith("_in")]:
        layer, gate = name.removeprefix("act/layer").removesuffix("_in").split(".")
        module = getattr(model.transformer_blocks[int(layer)].attn1, f"{gate}_local")
        out = name.replace("_in", "_out")
        assert_golden(out, module(given[name]), given[out], case.tolerance)
        checked |= {name, out}
    return checked


def check_sampler(case: GoldenCase, given: Tensors, model: STARCogVideoXTransformer3DModel) -> set[str]:
    """The whole loop."""
    assert_golden("sampler", sampled(case, given, model), given["sampler/out"], case.tolerance)
    return {"sampler/out"}


def sampled(case: GoldenCase, given: Tensors, model: STARCogVideoXTransformer3DModel) -> Tensor:
    told = case.spec["sampler"]
    scheduler = STARCogVideoXScheduler()
    scheduler.set_timesteps(told["steps"])
    assert scheduler.timesteps.tolist() == told["timesteps"][::-1]
    want = torch.tensor(told["alphas_cumprod_sqrt"], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(scheduler.signal, dtype=torch.float64), want, atol=1e-5, rtol=1e-5)
    denoiser = Denoiser(model, given["sampler/lq"], given["sampler/c"], given["sampler/uc"])
    x, before, draws, steps = given["sampler/init"], None, iter(given["sampler/noise"]), told["steps"]
    for step, timestep in enumerate(scheduler.timesteps):
        weight = scheduler.guidance(told["scale"], step, exponent=told["exp"], official=True)
        x0 = scheduler.predict_x0(x, denoiser(x, timestep, weight), step)
        noise = None
        for _ in range(0 if step == steps - 1 else 2 if step else 1):
            noise = next(draws)
        x, before = scheduler.update(x, x0, before, step, noise), x0
    assert next(draws, None) is None
    return x


def check_schedule(case: GoldenCase) -> None:
    """`<steps>/..`: with all the timesteps of training under "1000"."""
    scheduler = STARCogVideoXScheduler()
    for name, want in case.tensors().items():
        steps, what = name.split("/")
        scheduler.set_timesteps(int(steps))
        got = {
            "alphas_cumprod_sqrt": lambda: torch.tensor(scheduler.signal),
            "alphas_cumprod_sqrt_desc": lambda: torch.tensor(scheduler.signal),
            "timesteps": lambda: scheduler.timesteps.flip(0),
            "dynamic_cfg_by_step": lambda: weights(scheduler),
        }[what]()
        assert_golden(name, got, want, of_float32(case.tolerance))


def weights(scheduler: STARCogVideoXScheduler) -> Tensor:
    """As `timesteps`, the least noisy first; of scale 6 and exponent 5."""
    steps = range(len(scheduler.timesteps))
    return torch.tensor([scheduler.guidance(6.0, step, official=True) for step in reversed(steps)])


def check_state_dict(case: GoldenCase) -> None:
    """Every weight of the full size has its place and shape, but those that are named as unused."""
    shapes = {name.removeprefix(PREFIX): tuple(shape) for name, shape in case.spec["state_dict"].plain().items()}
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert (len(shapes), numbers) == (case.spec["num_keys"], case.spec["numel"])
    with torch.device("meta"):
        model = STARCogVideoXTransformer3DModel(**sizes_from(shapes).transformer())
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    wanted = official_shapes(model, lora_rank(weights))
    assert wanted.items() <= shapes.items()
    left = shapes.keys() - wanted.keys()
    assert all(UNUSED.fullmatch(name) for name in left)
    load_transformer(weights, case.name, sizes_from(shapes), dtype=torch.bfloat16)


def sizes_from(shapes: dict[str, tuple[int, ...]]) -> CogVideoXSizes:
    """Sizes of a network by the shapes of its weights."""
    width, channels = shapes["mixins.patch_embed.proj_sr.weight"][:2]
    head = shapes["mixins.adaln_layer.query_layernorm_list.0.weight"][0]
    return CogVideoXSizes(
        layers=sum(name.endswith(".input_layernorm.weight") for name in shapes),
        heads=width // head,
        head_width=head,
        text_width=shapes["mixins.patch_embed.text_proj.weight"][1],
        time_width=shapes["time_embed.0.weight"][0],
        latent_channels=channels // 2,
    )


CHECKS: list[tuple[Callable[[dict[str, Any]], bool], Callable[[GoldenCase], None]]] = [
    (lambda spec: "sampler" in spec and "timestep" in spec, check_network),
    (lambda spec: "num_keys" in spec, check_state_dict),
    (lambda spec: any(name.endswith("/timesteps") for name in spec.get("tensors", ())), check_schedule),
]
"""How a kind of case is told, and its check."""
