"""The parts of the training that must agree with what the pipeline does later."""

import pytest
import torch
from diffusers import FluxPipeline
from tiny_training.components import CLIP_DIM, IMAGE_TOKENS, T5_DIM, build_transformer
from tiny_training.fast_flux import FastFlux
from tiny_training.fit import Plan, Trainer, load_averaged
from tiny_training.fit_flow import FlowPlan, object_tokens, pack
from tiny_training.text import MAX_TOKENS


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


def train(trainer: Trainer, until: int) -> None:
    """Pull the model's outputs for fixed inputs to one, a checkpoint every other step."""
    inputs = torch.linspace(-1, 1, 12).view(4, 3)
    while trainer.step < until:
        trainer.optimizer.zero_grad()
        (trainer.model(inputs) - 1.0).square().mean().backward()
        trainer.update()
        trainer.save()


def test_resumed_training_goes_on_as_if_never_stopped(tmp_path):
    plan = Plan(steps=6, batch_size=1, rate=0.1, warmup=1, caption_dropout=0.0, save_every=2)
    trainers = []
    for name, stops in (("whole", [6]), ("stopped", [2, 6])):
        for until in stops:
            torch.manual_seed(0)
            trainer = Trainer(torch.nn.Linear(3, 2), plan, tmp_path / name)
            trainer.resume()
            train(trainer, until)
        trainers.append(trainer)
    for parameter, other in zip(trainers[0].averaged, trainers[1].averaged, strict=True):
        assert torch.equal(parameter, other)
    averaged = torch.nn.Linear(3, 2)
    load_averaged(averaged, tmp_path / "stopped")
    assert torch.equal(averaged.weight, trainers[0].averaged[0])
    assert not torch.equal(averaged.weight, trainers[0].model.weight)
