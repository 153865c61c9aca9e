import copy

import pytest
import torch
from diffattn.pipelines.video_sr.cogvideox.attention import STARCogVideoXAttention
from diffattn.pipelines.video_sr.cogvideox.transformer import STARCogVideoXTransformer3DModel, rotary_embedding
from diffusers import CogVideoXPipeline, DDIMScheduler
from tiny_cogvideox import TEXT_WIDTH, draw, transformer, vae

import diffattn

T, H, W = 3, 6, 10


def inputs(batch=1, frames=T, height=H, width=W, dtype=torch.float32):
    timestep = torch.arange(1, batch + 1) * 300
    return draw(batch, frames, 8, height, width).to(dtype), draw(batch, 5, TEXT_WIDTH, seed=1).to(dtype), timestep


@torch.no_grad()
def run(model, *given):
    return model(*(given or inputs())).sample


def without_gates(model):
    """A copy that leaves the tokens as they are."""
    plain = copy.deepcopy(model)
    for block in plain.transformer_blocks:
        block.attn1.gate = lambda tokens, grid: tokens
    return plain


def test_gates_sit_on_the_pictures_tokens_before_the_projections():
    attention = transformer().transformer_blocks[0].attn1
    assert isinstance(attention, STARCogVideoXAttention)

    class Recorder:
        def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None):
            return hidden_states, encoder_hidden_states

    attention.set_processor(Recorder())
    tokens, text = draw(2, T * 3 * 5, 32), draw(2, 5, 32, seed=1)
    with torch.no_grad():
        got, got_text = attention(tokens, text, grid=(T, 3, 5))
    maps = tokens.reshape(2 * T, 3, 5, 32).permute(0, 3, 1, 2)
    pooled = torch.cat([maps.amax(1, keepdim=True), maps.mean(1, keepdim=True)], dim=1)
    spatial = torch.conv2d(pooled, attention.spa_local.conv1.weight, padding=3).sigmoid() * maps
    rows = spatial.permute(0, 2, 3, 1).reshape(2, -1, 32)
    pooled = torch.cat([rows.amax(2, keepdim=True), rows.mean(2, keepdim=True)], dim=2)
    want = rows * (pooled @ attention.temp_local.conv1.weight.T).sigmoid()
    torch.testing.assert_close(got, want)
    assert torch.equal(got_text, text)


def test_gates_matter_and_are_the_models_own_weights(tmp_path):
    model = transformer()
    want = run(model)
    assert (want - run(without_gates(model))).std() > 0.05 * want.std()
    keys = {key for key in model.state_dict() if "_local" in key}
    assert {
        "transformer_blocks.1.attn1.spa_local.conv1.weight",
        "transformer_blocks.0.attn1.temp_local.conv1.weight",
    } < keys
    model.save_pretrained(tmp_path)
    loaded = STARCogVideoXTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config.in_channels == 8 and loaded.config.text_embed_dim == TEXT_WIDTH
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(run(loaded), want)  # unaligned in a mapped file, which changes rounding
    assert torch.equal(run(copy.deepcopy(model)), want)


def test_a_window_over_everything_is_the_unmodified_model_with_its_gates():
    model = transformer()
    want, ungated = run(model), run(without_gates(model))
    handle = diffattn.apply(model, "neighborhood", kernel_size=(T, 9, 9))
    assert [layer.name for layer in handle.layers] == [f"transformer_blocks.{i}.attn1" for i in range(2)]
    torch.testing.assert_close(run(model), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(without_gates(model)), ungated, atol=1e-5, rtol=1e-5)
    handle.restore()
    assert torch.equal(run(model), want)
    with diffattn.apply(model, "neighborhood", kernel_size=(1, 1, 3)):
        assert (run(model) - want).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    want, got = run(transformer()), run(transformer().to(dtype), *inputs(dtype=dtype))
    assert got.dtype == dtype and (got.float() - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 2, 2), (1, 4, 10), (5, 2, 6)])
def test_samples_of_a_batch_do_not_see_each_other(frames, height, width):
    model, given = transformer(), inputs(2, frames, height, width)
    both = run(model, *given)
    assert both.shape == (2, frames, 4, height, width)
    alone = torch.cat([run(model, *(part[i : i + 1] for part in given)) for i in range(2)])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_gates_with_and_without_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = transformer().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        small, large = inputs(), inputs(height=8)
        outputs = [model(*given).sample.square().mean() for given in (small, large)]
        sum(outputs).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (8, 6), (6, 14)])
def test_rotary_embedding_of_any_size_is_diffusers(height, width):
    model = transformer()
    stock = CogVideoXPipeline(None, None, vae(), model, DDIMScheduler())
    want = stock._prepare_rotary_positional_embeddings(8 * height, 8 * width, 5, torch.device("cpu"))
    got = rotary_embedding(model, 5, height, width, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and len(got[0]) == 5 * height * width // 4
    given = inputs(1, 5, height, width)
    with torch.no_grad():
        assert torch.equal(model(*given, image_rotary_emb=want, return_dict=False)[0], run(model, *given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 4}, "twice as many as out_channels.*got 4 and 4"),
        ({"patch_size_t": 2}, "no patch_size_t.*got 2 and True"),
        ({"use_rotary_positional_embeddings": False}, "got None and False"),
    ],
)
def test_other_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        transformer(**changes)


def test_wrong_latents_are_refused():
    model = transformer()
    for channels, height in ((4, 6), (8, 5)):
        latents, text, timestep = inputs()
        with pytest.raises(ValueError, match="multiples of 2; got"):
            model(latents[:, :, :channels, :height], text, timestep)
    with pytest.raises(ValueError, match="grid of 3 x 2 x 5; got 15"):
        model.transformer_blocks[0].attn1(draw(1, 15, 32), draw(1, 5, 32), grid=(3, 2, 5))
