"""The golden set of STAR, one group of files for each test module.

@pytest.mark.golden
@pytest.mark.parametrize("case", star_cases("networks"))
def test_it(case):
    ...
"""

import fnmatch
from typing import Any

from golden_vectors import golden_cases

GROUPS = {
    "cogvideox": ("*cogvideox*",),
    "networks": ("*i2vgenxl*", "*unet*", "*liem*"),
    "official": ("*sched*", "*sampler*", "*chunk*", "*color*"),
    "losses": ("*loss*",),
}
"""Patterns of the files' names; a file belongs to the first group that fits."""


def group_of(name: str) -> str | None:
    """The group of a file by its name without the ending, None for a file that no test knows."""
    for group, patterns in GROUPS.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            return group
    return None


def star_cases(group: str) -> list[Any]:
    """Parameters `star/<file name>` of one group; "losses" also takes what belongs to none, and has to refuse it."""
    return [
        case
        for case in golden_cases("star")
        if case.values[0] is None or group_of(case.values[0].name) in ((group, None) if group == "losses" else (group,))
    ]
