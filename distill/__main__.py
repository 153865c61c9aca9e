"""`python -m diffattn.distill run ...`, for `accelerate launch -m`: the same as `diffattn distill run ...`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "distill")
    runpy.run_module("diffattn", run_name="__main__", alter_sys=True)
