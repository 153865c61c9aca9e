"""`DiffusionPipeline.from_pretrained(folder, custom_pipeline=<this folder>, trust_remote_code=True)`."""

from diffattn.pipelines.video_sr.i2vgenxl.pipeline import STARPipeline

__all__ = ["STARPipeline"]
