"""What is being written: a folder beside the name that the result takes when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mmjax.types import MMJaxError

MARKER = "INCOMPLETE"


def partial_of(target: Path) -> Path:
    """Return the folder in which this process writes what is to become ``target``."""
    return target.with_name(f"{target.name}.partial-{os.getpid()}")


def replaced_by(target: Path) -> Path:
    """Return where this process puts aside what stood in the target's place."""
    return target.with_name(f"{target.name}.replaced-{os.getpid()}")


def discard(folder: Path) -> None:
    """Delete a folder that was replaced; stopped halfway, the target's next writer does the rest.

    Until it is marked it may be the only whole one: a writer killed between its two renames.
    """
    (folder / MARKER).touch()
    for inside in folder.iterdir():
        if inside.is_dir() and not inside.is_symlink():
            shutil.rmtree(inside, ignore_errors=True)
        elif inside.name != MARKER:
            inside.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def begin(target: Path, held: contextlib.ExitStack) -> Path:
    """Make ``NAME.partial-PID`` with a locked marker inside, and return it.

    What killed writers of the same target left is removed: each is as large as the result, and
    nobody looks. held: closes the marker; the system drops its lock with the process, too.
    Raises OSError where nothing can be written.
    """
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    _remove_abandoned(target)
    partial.mkdir(parents=True)
    marker = held.enter_context((partial / MARKER).open("w", encoding="utf-8"))
    with contextlib.suppress(OSError):  # no locks here
        fcntl.lockf(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    marker.write("This folder is being written or its writer was killed.\n")
    marker.flush()
    return partial


def refuse_existing(target: Path) -> None:
    """Raise MMJaxError where a result would replace something."""
    if os.path.lexists(target):
        raise MMJaxError(f"{target}: exists already; remove it or choose another name")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill that becomes ``target`` when the block ends well, and else goes."""
    refuse_existing(target)
    with contextlib.ExitStack() as held:
        try:
            partial = begin(target, held)
            yield partial
            (partial / MARKER).unlink()
            os.replace(partial, target)
        except BaseException:
            held.close()  # on NFS a folder with an open file stays
            shutil.rmtree(partial_of(target), ignore_errors=True)
            raise


def _remove_abandoned(target: Path) -> None:
    """Remove marked folders that no process holds; without locks all stay."""
    name = glob.escape(target.name)
    both = (target.parent.glob(f"{name}.{kind}-*") for kind in ("partial", "replaced"))
    for left in itertools.chain(*both):
        with contextlib.suppress(OSError):
            with open(left / MARKER, "r+b") as marker:
                fcntl.lockf(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
