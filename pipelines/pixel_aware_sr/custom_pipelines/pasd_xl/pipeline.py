"""`DiffusionPipeline.from_pretrained(folder, custom_pipeline=<this folder>, trust_remote_code=True)`."""

from diffattn.pipelines.pixel_aware_sr.pipeline_xl import PASDXLPipeline

__all__ = ["PASDXLPipeline"]
