"""Time the attention kernels on this machine: `diffattn bench` from a checkout. Takes its options."""

import sys

from diffattn.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
