"""Video files as streams of frames: what a file holds, its frames as RGB the right way up, H.264 written with sound.

Nobody holds more than a few frames. PyAV, the extra `video`, is imported where a file is opened.
"""

from .encoder import ENCODER, ENDINGS, LONGEST_SIDE
from .opening import Pixels, pyav
from .reading import OnError, VideoInfo, probe, read_frames
from .writing import VideoWriter

__all__ = [
    "ENCODER",
    "ENDINGS",
    "LONGEST_SIDE",
    "OnError",
    "Pixels",
    "VideoInfo",
    "VideoWriter",
    "probe",
    "pyav",
    "read_frames",
]
