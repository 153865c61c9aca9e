"""What the condition encoders make of control images is the same whenever it is made, and is taken as it is."""

import pytest
import tiny_portrait
import torch
from diffattn.pipelines.portrait_animation.sampling.features import EncodedWhenRead, encode_once, features_given

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def controlnet():
    return tiny_portrait.networks(seed=6)["controlnet"].requires_grad_(False)


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(5, 3, 64, 72, generator=tiny_portrait.generator(2)) * 2 - 1


def encode(encoder, pictures, chunk=2):
    return encode_once(encoder, pictures, CPU, torch.float32, chunk)


def call(controlnet, given, frames):
    sample = torch.randn(frames, 4, 8, 9, generator=tiny_portrait.generator())
    text = torch.randn(frames, 3, 8, generator=tiny_portrait.generator(1))
    down, mid = controlnet(sample, torch.tensor(300), text, given, [1.0, 1.0], return_dict=False)
    return [*down, mid]


def test_features_of_pictures_give_what_the_pictures_give(controlnet, pictures):
    want = call(controlnet, [pictures, pictures.flip(-1)], 5)
    given = zip(controlnet.nets, (pictures, pictures.flip(-1)), strict=True)
    features = [encode(net.controlnet_cond_embedding, one) for net, one in given]
    assert features[0].shape == (5, 32, 8, 9)
    with features_given(controlnet):
        got = call(controlnet, features, 5)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_read_one_by_one_or_encoded_once(controlnet, pictures):
    encoder, read = controlnet.nets[0].controlnet_cond_embedding, []

    class Stored:
        def __getitem__(self, frames):
            read.append(frames)
            return pictures[frames]

    when_read = EncodedWhenRead(encoder, Stored(), CPU, torch.float32)
    torch.testing.assert_close(when_read[[3, 0]], encode(encoder, pictures)[[3, 0]], atol=1e-5, rtol=1e-5)
    assert read == [[3, 0]]


def test_the_encoders_come_back_after_an_error(controlnet):
    before = [net.controlnet_cond_embedding for net in controlnet.nets]
    with pytest.raises(RuntimeError), features_given(controlnet):
        call(controlnet, [torch.zeros(1, 3, 5, 5)] * 2, 1)
    assert [net.controlnet_cond_embedding for net in controlnet.nets] == before
