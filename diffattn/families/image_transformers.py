"""Image transformers, and those of their ControlNets that are built alike."""

from .layout import Family, Layers, transformer
from .readers import flux_ids, lumina, picture, qwen_shapes, z_image


def sd3(argument: str) -> tuple[Layers, ...]:
    """Text behind the image in `attn`, the image alone in `attn2`."""
    return (
        Layers(r"transformer_blocks\.\d+\.attn", "spatial", picture(argument, before=0, after=None)),
        Layers(r"transformer_blocks\.\d+\.attn2", "spatial", picture(argument, before=0)),
    )


ROWS: tuple[Family, ...] = (
    Family(
        "Flux",
        ("FluxTransformer2DModel", "FluxControlNetModel"),
        transformer(r"(single_)?transformer_blocks\.\d+\.attn", flux_ids),
        rope="pos_embed",
    ),
    Family(
        "Flux2",
        ("Flux2Transformer2DModel",),
        transformer(r"(single_)?transformer_blocks\.\d+\.attn", flux_ids),
        rope="pos_embed",
    ),
    Family("SD3", ("SD3Transformer2DModel",), sd3("hidden_states")),
    Family(
        "Qwen-Image",
        ("QwenImageTransformer2DModel", "QwenImageControlNetModel"),
        transformer(r"transformer_blocks\.\d+\.attn", qwen_shapes),
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
    Family("PixArt", ("PixArtTransformer2DModel",), transformer(r"transformer_blocks\.\d+\.attn1", picture(before=0))),
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
)
