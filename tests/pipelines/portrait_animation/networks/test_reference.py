"""The bank of references, and who reads it."""

import pytest
import tiny_portrait
import torch
from diffattn.pipelines.portrait_animation.networks.reference import ReferenceBank, self_attentions
from diffattn.pipelines.portrait_animation.sampling.denoiser import Condition, Denoiser, Networks
from diffattn.pipelines.portrait_animation.sampling.windows import plain_windows

TEXT = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.fixture(scope="module")
def made():
    return {name: network.double() for name, network in tiny_portrait.networks().items()}


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def write(made, latents, timestep=500):
    with torch.no_grad():
        return ReferenceBank.write(made["reference_unet"], latents, timestep, TEXT)


def test_blocks_are_written_in_the_order_of_computation(made):
    """Down, middle and up: the sides of the features say where each comes from."""
    bank = write(made, draw(2, 4, 8, 16))
    cells = [entry.shape[1] for entry in bank.entries]
    assert cells == [128] * 2 + [32] * 2 + [8] * 2 + [2] + [8] * 3 + [32] * 3 + [128] * 3
    assert {entry.shape[0] for entry in bank.entries} == {2}


def test_the_bank_depends_on_the_timestep(made):
    latents = draw(1, 4, 8, 16)
    assert not torch.equal(write(made, latents, 1).entries[0], write(made, latents, 900).entries[0])


def test_references_are_joined_along_the_tokens(made):
    latents = draw(3, 4, 8, 16)
    joined = write(made, latents).joined(3)
    alone = [write(made, latents[k : k + 1]).entries for k in range(3)]
    for entry, *apart in zip(joined.entries, *alone, strict=True):
        torch.testing.assert_close(entry, torch.cat(apart, dim=1))


def test_a_part_of_the_batch_is_read_in_turn(made):
    """Two videos of three frames: entries of each frame serve both."""
    bank, sample = write(made, draw(3, 4, 8, 16)), draw(2, 4, 3, 8, 16)
    with torch.no_grad(), bank.read_by(made["unet"]):
        both = made["unet"](sample, 500, TEXT.expand(6, -1, -1)).sample
        alone = made["unet"](sample[1:], 500, TEXT.expand(3, -1, -1)).sample
    torch.testing.assert_close(both[1:], alone)


def test_processors_come_back_after_an_error(made):
    before = [layer.processor for layer in self_attentions(made["unet"])]
    bank = write(made, draw(1, 4, 8, 16))
    with pytest.raises(RuntimeError, match="stop"), bank.read_by(made["unet"]):
        raise RuntimeError("stop")
    assert all(a is b.processor for a, b in zip(before, self_attentions(made["unet"]), strict=True))
    with pytest.raises(Exception), torch.no_grad():  # noqa: B017
        write(made, draw(1, 3, 8, 16))
    assert all(type(layer.processor).__name__ != "Writer" for layer in self_attentions(made["reference_unet"]))


def test_a_bank_of_another_network_is_refused(made):
    bank = write(made, draw(1, 4, 8, 16))
    with (
        pytest.raises(ValueError, match="expected a U-Net with 15 transformer blocks"),
        ReferenceBank(bank.entries[:15]).read_by(made["unet"]),
    ):
        pass


def test_the_order_of_references_does_not_matter(made):
    parts = Networks(made["unet"], made["reference_unet"], made["controlnet"])
    references, latents = draw(2, 1, 4, 8, 16), draw(3, 4, 8, 16)
    features = draw(3, 32, 8, 16), draw(3, 32, 8, 16)
    got = []
    for given in (references, references.flip(0), references[:1]):
        denoiser = Denoiser(parts, Condition(given, features, TEXT, TEXT), guidance_scale=1.0)
        with torch.no_grad():
            got.append(denoiser(latents, torch.tensor(500), plain_windows(3, 16, 4)))
    torch.testing.assert_close(got[0], got[1])
    assert (got[0] - got[2]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["controlnet_important", "balance"])
def test_guidance_goes_from_the_other_half_to_this(made, mode):
    """u + s (c - u) is linear in s; at s = 1, where the other half is left out, it is c."""
    parts = Networks(made["unet"], made["reference_unet"], made["controlnet"])
    condition = Condition(draw(1, 1, 4, 8, 16), (draw(2, 32, 8, 16), draw(2, 32, 8, 16)), TEXT, TEXT)
    latents, c = draw(2, 4, 8, 16), []
    for scale in (1.0, 2.0, 4.0):
        with torch.no_grad():
            denoiser = Denoiser(parts, condition, guidance_scale=scale, mode=mode)
            c.append(denoiser(latents, torch.tensor(500), plain_windows(2, 16, 4)))
    torch.testing.assert_close(c[2] - c[1], 2 * (c[1] - c[0]))
    assert (c[1] - c[0]).abs().max() > 1e-3
