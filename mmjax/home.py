"""The home folder in what people write: ``~/data`` on a command line, in a recipe, in a file.

A shell writes it out where a word begins and nowhere else. Taken as it stands, a run would make
itself a folder called ``~``.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

_HOME = re.compile(r"(^|,)(~[\w.-]*)(?=/)")  # a chain of files, a.pt,b.pt, has one in each


def in_home(value: Any) -> Any:
    """Return a value with ``~/`` and ``~name/`` at the beginning of its texts written out.

    Lists, tuples and mappings are followed; all else, and a user whom nobody knows, stays.
    """
    if isinstance(value, str):
        return _HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), value)
    if isinstance(value, list | tuple):
        return type(value)(map(in_home, value))
    if isinstance(value, Mapping):
        return {name: in_home(inner) for name, inner in value.items()}
    return value
