"""`model_index.json` files of saved pipelines name the modules of their components: those names are found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STORED = {
    "long_video.fps_unet": "FpsUNet3D",
    "pixel_aware_sr.controlnet": "PASDControlNetModel",
    "pixel_aware_sr.unet": "PASDUNet2DConditionModel",
    "portrait_animation.null_text": "NullText",
    "portrait_animation.reference_unet": "XPortraitReferenceUNet",
    "portrait_animation.unet": "XPortraitUNet",
    "video_sr.cogvideox_scheduler": "STARCogVideoXScheduler",
    "video_sr.cogvideox_transformer": "STARCogVideoXTransformer3DModel",
    "video_sr.controlnet": "STARControlNetModel",
    "video_sr.scheduler": "STARScheduler",
    "video_sr.unet": "STARUNet3DConditionModel",
}
"""Module below `diffattn.pipelines` -> class."""


@pytest.mark.slow
def test_each_name_leads_to_the_class_that_the_pipeline_has() -> None:
    """In a process of its own, which has imported nothing else yet."""
    program = f"""
import importlib, json
found = {{}}
for name, cls in json.loads({json.dumps(json.dumps(STORED))}).items():
    module = importlib.import_module("diffattn.pipelines." + name)
    package = importlib.import_module("diffattn.pipelines." + name.split(".")[0])
    found[name] = getattr(module, cls) is getattr(package, cls)
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(STORED, True)
