"""Image transformers, and those of their ControlNets that are built alike."""

from .layout import Arguments, Family, Layers, TokenPath, transformer
from .packed import qwen_image21
from .readers import (
    bria_fibo2,
    flux2_ids,
    flux3,
    flux_ids,
    hidream,
    ideogram,
    image_or_video,
    last_ids,
    lumina,
    nucleus,
    picture,
    qwen_shapes,
    vector_ids,
    z_image,
)


def sd3(argument: str) -> tuple[Layers, ...]:
    """Text behind the image in `attn`, the image alone in `attn2`."""
    return (
        Layers(r"transformer_blocks\.\d+\.attn", "spatial", picture(argument, before=0, after=None)),
        Layers(r"transformer_blocks\.\d+\.attn2", "spatial", picture(argument, before=0)),
    )


PLAIN_ATTENTION_ARGUMENTS = {"scale", "ip_adapter_image_embeds", "ip_hidden_states", "temb"}
"""Of `joint_attention_kwargs` and the like: those that treat all tokens of the image alike."""


def own_arguments(call: Arguments) -> str | None:
    """Masks of image prompts, caches of keys, and what else goes to the processors and may tell tokens apart."""
    for name in ("joint_attention_kwargs", "attention_kwargs"):
        others = sorted((call.get(name) or {}).keys() - PLAIN_ATTENTION_ARGUMENTS)
        if others:
            return f"{name} has {', '.join(others)}, which may tell tokens apart"
    if call.get("kv_cache_mode") is not None or call.get("kv_cache") is not None:
        return "keys of references are kept"
    return None


def without_padded_text(call: Arguments) -> str | None:
    """A mask on text is one on all keys, and row-major."""
    mask = call.get("encoder_hidden_states_mask")
    return own_arguments(call) or (None if mask is None or bool(mask.all()) else "the text is padded")


FLUX_RESIDUALS = "controlnet_block_samples", "controlnet_single_block_samples"
ROWS: tuple[Family, ...] = (
    Family(
        "Flux",
        (
            "FluxTransformer2DModel",
            "FluxControlNetModel",
            "BriaTransformer2DModel",
            "BriaFiboTransformer2DModel",
            "OvisImageTransformer2DModel",
            "LongCatImageTransformer2DModel",
        ),
        transformer(r"(single_)?transformer_blocks\.\d+\.attn", flux_ids),
        rope="pos_embed",
        tokens=TokenPath(
            ("FluxTransformer2DModel",),
            "x_embedder",
            "proj_out",
            "pos_embed",
            others_behind=True,
            residuals=FLUX_RESIDUALS,
            refuses=own_arguments,
        ),
    ),
    Family(
        "Chroma",
        ("ChromaTransformer2DModel",),
        transformer(r"(single_)?transformer_blocks\.\d+\.attn", flux_ids, mask="padding"),
        rope="pos_embed",
    ),
    Family(
        "Fibo2",
        ("BriaFibo2Transformer2DModel",),
        (
            Layers(r"noise_refiner\.\d+\.attention", "spatial", bria_fibo2(joint=False)),
            Layers(r"layers\.\d+\.attention", "spatial", bria_fibo2(joint=True)),
        ),
    ),
    Family(
        "Flux2",
        ("Flux2Transformer2DModel",),
        transformer(
            r"(single_)?transformer_blocks\.\d+\.attn",
            flux2_ids,
            fewer_queries=True,
            helpers=("_flux2_kv_causal_attention",),
        ),
        rope="pos_embed",
        tokens=TokenPath(
            ("Flux2Transformer2DModel",),
            "x_embedder",
            "proj_out",
            "pos_embed",
            others_behind=True,
            refuses=own_arguments,
        ),
    ),
    Family(
        "Flux3",
        ("Flux3Transformer2DModel",),
        (
            Layers(r"mode_blocks\.image\.\d+\.attn", "spatial", flux3(joint=False)),
            Layers(r"single_transformer_blocks\.\d+\.attn", "spatial", flux3(joint=True)),
        ),
    ),
    Family(
        "SD3",
        ("SD3Transformer2DModel",),
        sd3("hidden_states"),
        tokens=TokenPath(
            ("SD3Transformer2DModel",),
            "pos_embed",
            "proj_out",
            residuals=("block_controlnet_hidden_states",),
            refuses=own_arguments,
        ),
    ),
    Family(
        "Qwen-Image",
        ("QwenImageTransformer2DModel", "QwenImageControlNetModel"),
        transformer(r"transformer_blocks\.\d+\.attn", qwen_shapes),
        tokens=TokenPath(
            ("QwenImageTransformer2DModel",),
            "img_in",
            "proj_out",
            "pos_embed",
            first_table=True,
            others_behind=True,
            residuals=("controlnet_block_samples",),
            refuses=without_padded_text,
        ),
    ),
    Family(
        "Z-Image",
        # the ControlNet shares the transformer's noise_refiner
        ("ZImageTransformer2DModel", "ZImageControlNetModel"),
        (
            Layers(r"(noise_refiner|layers)\.\d+\.attention", "spatial", z_image),
            # their blocks get the results of all blocks before in one tensor
            Layers(r"control_(noise_refiner|layers)\.\d+\.attention", "spatial", z_image, has_features=False),
        ),
        timestep="t",
    ),
    Family(
        "PixArt",
        ("PixArtTransformer2DModel", "DiTTransformer2DModel"),
        transformer(r"transformer_blocks\.\d+\.attn1", picture(before=0)),
    ),
    # the layers of its blocks before and behind see the text alone
    Family("UVit2D", ("UVit2DModel",), transformer(r"transformer_layers\.\d+\.attn1", vector_ids), timestep=None),
    # the times of denoising, text and an embedded image before
    Family(
        "UniDiffuser",
        ("UniDiffuserModel",),
        transformer(
            r"transformer\.transformer_(in_blocks\.\d+|mid_block|out_blocks\.\d+\.block)\.attn1",
            picture("latent_image_embeds"),
        ),
        timestep="timestep_img",
    ),
    Family("Sana", ("SanaTransformer2DModel",), transformer(r"transformer_blocks\.\d+\.attn1", picture(before=0))),
    Family(
        "Lumina2",
        ("Lumina2Transformer2DModel",),
        (
            Layers(r"noise_refiner\.\d+\.attn", "spatial", picture(before=0)),
            Layers(r"layers\.\d+\.attn", "spatial", lumina),
        ),
    ),
    Family(
        "HunyuanDiT",
        ("HunyuanDiT2DModel", "HunyuanDiT2DControlNetModel"),
        transformer(r"blocks\.\d+\.attn1", picture(before=0)),
    ),
    # registers and text before
    Family(
        "AuraFlow",
        ("AuraFlowTransformer2DModel",),
        transformer(r"(joint|single)_transformer_blocks\.\d+\.attn", picture()),
    ),
    Family(
        "CogView",
        ("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
        transformer(r"transformer_blocks\.\d+\.attn1", picture()),
    ),
    Family(
        "HunyuanImage",
        ("HunyuanImageTransformer2DModel",),
        transformer(r"(single_)?transformer_blocks\.\d+\.attn", image_or_video),
    ),
    Family("Krea2", ("Krea2Transformer2DModel",), transformer(r"transformer_blocks\.\d+\.attn", last_ids)),
    Family(
        "Ideogram4",
        ("Ideogram4Transformer2DModel",),
        transformer(r"layers\.\d+\.attention", ideogram, mask="padding"),
    ),
    # edits put the kept keys of their references first
    Family(
        "GLM-Image",
        ("GlmImageTransformer2DModel",),
        transformer(r"transformer_blocks\.\d+\.attn1", picture(), fewer_queries=True),
    ),
    Family(
        "LuminaNext", ("LuminaNextDiT2DModel",), transformer(r"layers\.\d+\.attn1", picture(before=0), mask="padding")
    ),
    Family(
        "Qwen-Image-2.1",
        ("QwenImage21Transformer2DModel",),
        transformer(r"transformer_blocks\.\d+\.attn", qwen_image21, fewer_queries=True),
    ),
    # older releases of diffusers make a mask over queries and keys of that on the text
    Family(
        "PRX",
        ("PRXTransformer2DModel",),
        transformer(r"blocks\.\d+\.attention", picture(), fewer_queries=True, mask="padding"),
    ),
    Family(
        "NucleusMoE",
        ("NucleusMoEImageTransformer2DModel",),
        transformer(r"transformer_blocks\.\d+\.attn", nucleus, fewer_queries=True),
    ),
    # text and images that are given before
    Family(
        "OmniGen", ("OmniGenTransformer2DModel",), transformer(r"layers\.\d+\.self_attn", picture(), mask="queries")
    ),
    # padding up to the largest size, then text
    Family(
        "HiDream",
        ("HiDreamImageTransformer2DModel",),
        transformer(r"(double|single)_stream_blocks\.\d+\.block\.attn1", hidream),
        timestep="timesteps",
    ),
    Family(
        "ERNIE-Image",
        ("ErnieImageTransformer2DModel",),
        # its blocks get their tokens before the samples
        (Layers(r"layers\.\d+\.self_attention", "spatial", picture(before=0, after=None), has_features=False),),
    ),
)
