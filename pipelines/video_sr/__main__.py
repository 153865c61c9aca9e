"""`python -m diffattn.pipelines.video_sr ...`: the same as `diffattn video-upscale ...`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "video-upscale")
    runpy.run_module("diffattn", run_name="__main__", alter_sys=True)
