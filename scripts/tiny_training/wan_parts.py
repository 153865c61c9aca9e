"""The untrained parts of the tiny Wan pipeline: 33 frames of 48 x 48 pixels, 9 x 12 x 12 latent cells, a token each."""

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

LATENT_CHANNELS = 8
TEXT_DIM = 64
FRAMES = 33
"""Frames of a native clip."""
LATENT_FRAMES = 9
"""The first frame by itself, then one for every four."""


def build_wan_vae() -> AutoencoderKLWan:
    """Causal VAE of Wan's class that halves sides twice and frames twice."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )


def build_wan(layers: int = 6) -> WanTransformer3DModel:
    """Wan with `layers` blocks of 4 heads x 32 channels."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=256,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=128,
    )


def build_umt5(tokenizer: PreTrainedTokenizerBase) -> UMT5EncoderModel:
    """Two-layer UMT5 encoder whose tokens the transformer attends to."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=2 * TEXT_DIM,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_wan_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow-matching Euler steps, crowded towards high noise, where places are decided."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False)
