"""Tiny random models of further classes, in the form of `models`."""

from collections.abc import Callable

from tiny_model import Tiny

from . import flux_like, images, packed, unets, videos, wan_like

FURTHER: dict[str, Callable[[], Tiny]] = {
    "Chroma": flux_like.chroma,
    "Bria": flux_like.bria,
    "Bria-FIBO": flux_like.bria_fibo,
    "Fibo2": flux_like.bria_fibo2,
    "Fibo2-edit": flux_like.bria_fibo2_edit,
    "Flux3": flux_like.flux3,
    "Ovis-Image": flux_like.ovis_image,
    "LongCat-Image": flux_like.longcat_image,
    "ChronoEdit": wan_like.chrono_edit,
    "Wan-VACE": wan_like.wan_vace,
    "SkyReels-V2": wan_like.skyreels_v2,
    "Wan-Animate": wan_like.wan_animate,
    "AnyFlow": wan_like.any_flow,
    "HunyuanVideo-1.5": videos.hunyuan_video15,
    "Allegro": videos.allegro,
    "AuraFlow": images.aura_flow,
    "CogView3+": images.cogview3_plus,
    "CogView4": images.cogview4,
    "GLM-Image": images.glm_image,
    "Cosmos": videos.cosmos,
    "Cosmos-ControlNet": videos.cosmos_controlnet,
    "EasyAnimate": videos.easy_animate,
    "ERNIE-Image": images.ernie_image,
    "Latte": videos.latte,
    "DiT": images.dit,
    "HunyuanImage": images.hunyuan_image,
    "HunyuanImage-refiner": images.hunyuan_image_refiner,
    "Krea2": images.krea2,
    "LuminaNext": images.lumina_next,
    "OmniGen": images.omnigen,
    "HiDream": images.hidream,
    "Motif-Video": videos.motif_video,
    "JoyImage": videos.joy_image,
    "JoyImage-Plus": videos.joy_image_plus,
    "Ideogram4": images.ideogram4,
    "Kandinsky5": videos.kandinsky5,
    "Kandinsky6": videos.kandinsky6,
    "LTX-2": videos.ltx2,
    "ConsisID": videos.consisid,
    "Helios": wan_like.helios,
    "FramePack": videos.framepack,
    "MiniMax-H3": packed.minimax_h3,
    "MiniMax-H3-references": packed.minimax_h3_references,
    "SparseCtrl-ControlNet": unets.sparse_controlnet,
    "ControlNet-XS": unets.controlnet_xs,
    "AudioLDM2": unets.audio_ldm2,
    "DreamLite": unets.dream_lite,
    "UNet2D": unets.unet2d,
}
"""Name -> builder."""

NEWER = {
    "AnyFlow": "0.39",
    "DreamLite": "0.39",
    "Fibo2": "0.42",
    "Fibo2-edit": "0.42",
    "Flux3": "0.42",
    "Ideogram4": "0.39",
    "JoyImage": "0.39",
    "JoyImage-Plus": "0.40",
    "Kandinsky6": "0.42",
    "Krea2": "0.39",
    "MiniMax-H3": "0.40",
    "MiniMax-H3-references": "0.40",
    "Motif-Video": "0.39",
}
"""Those that the lowest diffusers does not have -> the first release that does."""
