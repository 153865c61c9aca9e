"""`python -m diffattn.pipelines.portrait_animation ...`: the same as `diffattn animate ...`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "animate")
    runpy.run_module("diffattn", run_name="__main__", alter_sys=True)
