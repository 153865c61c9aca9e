"""UNets: attention within feature maps, and along the frames of motion modules."""

from .layout import Family, Layers
from .readers import MAP_THEN_TEXT, TEXT_THEN_MAP, feature_map, features_in, frames_of

_BLOCK = r"\.transformer_blocks\.\d+\."


_UNET_LAYERS = (
    Layers(rf".*motion_modules\.\d+{_BLOCK}attn[12]", "temporal", frames_of("num_frames"), rf"(.*){_BLOCK}.*"),
    Layers(
        rf"(?:.*\.)?(?:temp_attentions\.\d+|transformer_in){_BLOCK}attn[12]",
        "temporal",
        frames_of("num_frames"),
        rf"(.*){_BLOCK}.*",
    ),
    Layers(
        r".*attentions\.\d+\.temporal_transformer_blocks\.\d+\.attn1",
        "temporal",
        frames_of("image_only_indicator"),
        r"(.*)\.temporal_transformer_blocks\.\d+\..*",
    ),
    Layers(rf".*attentions\.\d+{_BLOCK}attn1", "spatial", feature_map, rf"(.*){_BLOCK}.*"),
    # PASD's attention to the ControlNet's residual, which has a token for each of the features' own
    Layers(
        rf".*(pixel_attentions\.\d+{_BLOCK}attn2|attentions\.\d+{_BLOCK}attn2_plus)",
        "spatial",
        feature_map,
        rf"(.*){_BLOCK}.*",
    ),
    # layers without blocks around them, which put keys of the text before their own
    Layers(r".*attentions\.\d+", "spatial", TEXT_THEN_MAP, r"(.*)", has_features=False, fewer_queries=True),
    # those of the upscaler, in blocks that get feature maps
    Layers(r".*attentions\.\d+\.attn1", "spatial", feature_map, r"(.*)\.attn1", has_features=False),
)


ROWS: tuple[Family, ...] = (
    Family(
        "Stable Diffusion UNet",
        (
            "UNet2DConditionModel",
            "ControlNetModel",
            "ControlNetUnionModel",
            "UNetControlNetXSModel",
            "AudioLDM2UNet2DConditionModel",
            "DreamLiteUNetModel",
        ),
        _UNET_LAYERS,
        latent="sample",
    ),
    # layers without blocks around them, which get the feature maps themselves
    Family(
        "UNet2D",
        ("UNet2DModel",),
        (Layers(r".*attentions\.\d+", "spatial", feature_map, r"(.*)", has_features=False),),
        latent="sample",
    ),
    Family(
        "Stable Cascade",
        ("StableCascadeUNet",),
        (
            Layers(
                r"(down|up)_blocks\.\d+\.\d+\.attention",
                "spatial",
                MAP_THEN_TEXT,
                r"((?:down|up)_blocks\..*)",
                has_features=False,
                fewer_queries=True,
            ),
        ),
        timestep="timestep_ratio",
        latent="sample",
    ),
    # the first of each level's layers sees the features, the others the text
    Family(
        "Kandinsky 3",
        ("Kandinsky3UNet",),
        (
            Layers(
                r"(down|up)_blocks\.\d+\.attentions\.0\.attention",
                "spatial",
                features_in("x"),
                r"(.*)\.attention",
                has_features=False,
            ),
        ),
        latent="sample",
    ),
    Family("AnimateDiff", ("UNetMotionModel", "SparseControlNetModel"), _UNET_LAYERS, latent="sample"),
    Family("SVD", ("UNetSpatioTemporalConditionModel",), _UNET_LAYERS, latent="sample"),
    Family("I2VGen-XL", ("I2VGenXLUNet",), _UNET_LAYERS, latent="sample"),
    Family("UNet3D", ("UNet3DConditionModel", "STARControlNetModel"), _UNET_LAYERS, latent="sample"),
)
