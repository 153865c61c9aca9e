"""`DiffusionPipeline.from_pretrained(folder, custom_pipeline=<this folder>, trust_remote_code=True)`."""

from diffattn.pipelines.portrait_animation.pipeline import XPortraitPipeline

__all__ = ["XPortraitPipeline"]
