"""`python -m diffattn.pipelines.pixel_aware_sr ...`: the same as `diffattn upscale ...`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "upscale")
    runpy.run_module("diffattn", run_name="__main__", alter_sys=True)
