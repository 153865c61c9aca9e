"""The untrained parts of the tiny pipelines, sized to train on a CPU within an hour."""

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet3DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from tiny_training.text import MAX_TOKENS

LATENT_CHANNELS = 4
LATENT_SIDE = 32
"""Side of the VAE's latent of a native image: 128 pixels / 4."""

VIDEO_LATENT_SIDE = 12
"""Side of the VAE's latent of a native frame: 48 pixels / 4."""

IMAGE_TOKENS = (LATENT_SIDE // 2) ** 2
"""Image tokens of a native image: the latent in patches of 2 x 2."""

HEAD_DIM = 40
ROPE_DIMS = (8, 16, 16)
CLIP_DIM = 64
T5_DIM = 96


def build_vae() -> AutoencoderKL:
    """Convolutional VAE, 3 x 128 x 128 pixels to 4 x 32 x 32 latents, without attention."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_transformer(num_layers: int = 2, num_single_layers: int = 4, heads: int = 4) -> FluxTransformer2DModel:
    """Flux with `num_layers` double and `num_single_layers` single blocks of `heads` heads x 40 channels."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=T5_DIM,
        pooled_projection_dim=CLIP_DIM,
        guidance_embeds=False,
        axes_dims_rope=ROPE_DIMS,
    )


def build_clip(tokenizer: PreTrainedTokenizerBase, num_layers: int = 1) -> CLIPTextModel:
    """CLIP text model of the tokenizer's vocabulary and length; its pooled output modulates the transformer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_DIM,
            intermediate_size=2 * CLIP_DIM,
            projection_dim=CLIP_DIM,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    """Two-layer T5 encoder whose tokens the transformer attends to."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_DIM,
            d_kv=24,
            d_ff=2 * T5_DIM,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=MAX_TOKENS,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow-matching Euler steps, crowded towards high noise, where places are decided."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False)


def build_unet() -> UNet3DConditionModel:
    """Video U-Net of three levels; the inner two, of 6 x 6 and 3 x 3 cells, attend to the text and to other frames."""
    return UNet3DConditionModel(
        sample_size=VIDEO_LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
        block_out_channels=(32, 48, 80),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=CLIP_DIM,
        attention_head_dim=8,
    )


def build_video_scheduler() -> DDIMScheduler:
    """Steps of DDIM from pure noise: without it the colours of the background would lean to the mean of all."""
    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.02,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
