"""Lets the tests of this folder import `golden_portrait` and `tiny_portrait`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
