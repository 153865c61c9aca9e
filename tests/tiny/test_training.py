"""The parts of the training that must agree with what the pipeline does later."""

import pytest
import torch
from diffusers import FluxPipeline

from diffattn.tiny.components import CLIP_DIM, IMAGE_TOKENS, T5_DIM, build_transformer
from diffattn.tiny.fast_flux import FastFlux
from diffattn.tiny.fit_flow import FlowPlan, object_tokens, pack
from diffattn.tiny.text import MAX_TOKENS


def test_fast_forward_agrees_with_the_transformer():
    torch.manual_seed(0)
    transformer = build_transformer(num_layers=1, num_single_layers=1)
    latents, text = torch.randn(2, IMAGE_TOKENS, 16), torch.randn(2, MAX_TOKENS, T5_DIM)
    pooled, sigma = torch.randn(2, CLIP_DIM), torch.tensor([0.3, 0.9])
    image_ids = FluxPipeline._prepare_latent_image_ids(2, 16, 16, "cpu", torch.float32)
    with torch.no_grad():
        expected = transformer(latents, text, pooled, sigma, image_ids, torch.zeros(MAX_TOKENS, 3)).sample
        got = FastFlux(transformer)(latents, sigma, text, pooled)
    assert (got - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_pack_agrees_with_the_pipeline():
    latents = torch.randn(2, 4, 32, 32)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 4, 32, 32))


def test_object_tokens_mark_what_departs_from_its_row():
    latents = torch.linspace(-1, 1, 32)[None, None, :, None].repeat(1, 4, 1, 32)
    latents[:, :, 8:12, 20:24] += 2.0
    marked = object_tokens(latents).view(16, 16).nonzero().tolist()
    assert marked == [[4, 10], [4, 11], [5, 10], [5, 11]]


def test_rate_warms_up_stays_and_decays():
    plan = FlowPlan(steps=1000, warmup=100, decay=0.2, rate=1.0)
    assert plan.rate_at(0) == pytest.approx(0.01)
    assert plan.rate_at(100) == plan.rate_at(800) == 1.0
    assert plan.rate_at(900) == pytest.approx(0.5)
