"""Video files as streams of frames: the public names of `diffattn.media.video`."""

from .media.video import VideoInfo, VideoWriter, probe, read_frames

__all__ = ["VideoInfo", "VideoWriter", "probe", "read_frames"]
