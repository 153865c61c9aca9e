"""Audio transformers: a line in time, of a length that no tile divides."""

from typing import Any

from tiny_model import TEXT, TIME, Tiny, Tokens, _make, draw, text_mask

LENGTH = 37


def _line(pattern: str, before: int = 0) -> dict[str, tuple[Tokens, ...]]:
    return {pattern: (Tokens(before, 1, 1, LENGTH),)}


def stable_audio() -> Tiny:
    """A token of times and lengths comes first."""
    model = _make(
        "StableAudioDiTModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=6,
        cross_attention_input_dim=12,
    )
    angles = draw(1 + LENGTH, 4)
    inputs = dict(
        hidden_states=draw(2, 4, LENGTH),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        global_hidden_states=draw(2, 1, 6),
        rotary_embedding=(angles.cos(), angles.sin()),
    )
    return Tiny(model, inputs, _line(r"transformer_blocks\.\d+\.attn1", before=1))


def _stable_audio3(steps: int, **config: Any) -> Tiny:
    model = _make(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        cond_token_dim=12,
        global_cond_dim=6,
        local_add_cond_dim=5,
        timestep_features_dim=8,
        num_memory_tokens=3,
        **config,
    )
    inputs = dict(
        hidden_states=draw(2, 4, steps),
        timestep=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        global_hidden_states=draw(2, 6),
        encoder_attention_mask=text_mask(TEXT, 3),
    )
    return Tiny(model, inputs, _line(r"transformer_blocks\.\d+\.self_attn", before=3))


def stable_audio3() -> Tiny:
    """Differential attention: two calls a layer. Memory tokens come first."""
    tiny = _stable_audio3(LENGTH)
    tiny.inputs["local_add_cond"] = draw(2, 5, LENGTH)
    return tiny


def stable_audio3_patches() -> Tiny:
    return _stable_audio3(2 * LENGTH, patch_size=2, use_differential_attention=False)


def ace_step() -> Tiny:
    """Grouped heads; every other layer has a window of its own; the last patch is filled up."""
    model = _make(
        "AceStepTransformer1DModel",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        encoder_hidden_size=12,
        sliding_window=2,
    )
    inputs = dict(
        hidden_states=draw(2, 2 * LENGTH - 1, 4),
        timestep=TIME,
        timestep_r=TIME,
        encoder_hidden_states=draw(2, TEXT, 12),
        context_latents=draw(2, 2 * LENGTH - 1, 8),
    )
    return Tiny(model, inputs, _line(r"layers\.\d+\.self_attn"))


def longcat_audio() -> Tiny:
    model = _make("LongCatAudioDiTTransformer", dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=12, latent_dim=4)
    inputs = dict(
        hidden_states=draw(2, LENGTH, 4),
        encoder_hidden_states=draw(2, TEXT, 12),
        encoder_attention_mask=text_mask(TEXT, 3),
        timestep=TIME,
        attention_mask=text_mask(LENGTH, LENGTH),
        latent_cond=draw(2, LENGTH, 4),
    )
    return Tiny(model, inputs, _line(r"blocks\.\d+\.self_attn"))


def minimax_music3() -> Tiny:
    """The time of denoising is the first token."""
    model = _make(
        "MiniMaxMusic3Transformer1DModel",
        in_channels=4,
        condition_dim=6,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=16,
        rotary_dim=4,
        fourier_embedding_dim=8,
    )
    inputs = dict(hidden_states=draw(2, 4, LENGTH), timestep=TIME, encoder_hidden_states=draw(2, LENGTH, 6))
    return Tiny(model, inputs, _line(r"transformer_blocks\.\d+\.attn", before=1))
