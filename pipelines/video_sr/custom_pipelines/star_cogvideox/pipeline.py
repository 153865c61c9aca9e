"""`DiffusionPipeline.from_pretrained(folder, custom_pipeline=<this folder>, trust_remote_code=True)`."""

from diffattn.pipelines.video_sr.cogvideox.pipeline import CogVideoXSTARPipeline

__all__ = ["CogVideoXSTARPipeline"]
