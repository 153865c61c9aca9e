"""Lets the tests of this folder import `golden_star` and the tiny networks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
