"""Video files as streams of frames: what a file holds, its frames as RGB the right way up, H.264 written with sound.

Nobody holds more than a few frames. PyAV, the extra `video`, is imported where a file is opened.
"""

from .colours import READ, WRITE
from .encoder import ENDINGS, LONGEST_SIDE, reproducible
from .opening import Pixels, pyav
from .reading import OnError, VideoInfo, probe, read_frames
from .writing import VideoWriter

__all__ = [
    "ENDINGS",
    "LONGEST_SIDE",
    "READ",
    "WRITE",
    "OnError",
    "Pixels",
    "VideoInfo",
    "VideoWriter",
    "probe",
    "pyav",
    "read_frames",
    "reproducible",
]
