"""`python -m diffattn.pipelines.long_video`, or `torchrun --nproc-per-node N -m diffattn.pipelines.long_video`."""

import os
import sys

from diffattn.cli.commands.long_video import main

if __name__ == "__main__":
    code = main()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of a broken group may keep the interpreter from ending
