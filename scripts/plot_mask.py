"""Draw the pattern of a mechanism: `diffattn mask` from a checkout. Takes its arguments.

python scripts/plot_mask.py clear --grid 16x24 --before 4 --query 5,7 -o radius=3 --output mask.png
"""

import sys

from diffattn.cli import main

if __name__ == "__main__":
    main(["mask", *sys.argv[1:]])
