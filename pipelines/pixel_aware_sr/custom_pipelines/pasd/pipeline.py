"""`DiffusionPipeline.from_pretrained(folder, custom_pipeline=<this folder>, trust_remote_code=True)`."""

from diffattn.pipelines.pixel_aware_sr.pipeline import PASDPipeline

__all__ = ["PASDPipeline"]
