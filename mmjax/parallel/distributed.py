"""Several processes as one run: joining them, checking that they agree, ending together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import mmjax
from mmjax.parallel import coordinator
from mmjax.parallel.cluster import find_cluster
from mmjax.types import MMJaxError, system_fault

HEARTBEAT_SECONDS = 60  # without a sign of life, after which a process counts as dead
_SHUTDOWN_SECONDS = 60
_PAUSE, _ROUNDS = 0.5, 120  # seconds between looks at what others do; looks after one has failed
_SHOWN = 64  # longer values are compared, and shown, by their hash

# What a collective, the checkpoint's barrier or the coordinator say when another process is gone.
_LOST = ("Gloo", "gloo", "NCCL", "heartbeat", "UNAVAILABLE", "coordination service", "Connection")


@contextlib.contextmanager
def joined(env: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Join the processes of this run for the time of a block; with one process do nothing.

    What the launcher gave is printed: SLURM, Open MPI, or JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. An error ends this process at once, so that those that
    wait for it notice: Python's own exit would wait for them.
    """
    cluster = find_cluster(env)
    if cluster is None:
        yield
        return
    print(cluster, flush=True)
    try:
        if cluster.index == 0:
            coordinator.check_free(cluster.coordinator)
        else:
            coordinator.wait_for(cluster.coordinator)
        with coordinator.all_expected(cluster.index, cluster.count):
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.count,
                cluster.index,
                cluster.devices,
                initialization_timeout=2 * coordinator.JOIN_SECONDS,
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
        yield
        jax.distributed.shutdown()
    except BaseException as error:
        leave(error, f"process {cluster.index} of {cluster.count}")


def leave(error: BaseException, who: str) -> None:
    """End this process at once, saying why as ``mmjax.cli.run_guarded`` does, by its exit codes."""
    code, told = _ending(error, who)
    # On a full disk, or where the reader of a pipe has gone: it has to end nevertheless.
    for print_it in (lambda: sys.stderr.write(told), sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(OSError):
            print_it()
    os._exit(code)


def _ending(error: BaseException, who: str) -> tuple[int, str]:
    """Return a process's exit code, and what it prints."""
    fault = system_fault(error) if isinstance(error, OSError) else None
    if isinstance(error, MMJaxError) or fault is not None:
        return 2, f"error: {who}: {fault or error}\n"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"\n{who}: stopped by the keyboard\n"
    if isinstance(error, BrokenPipeError):
        return 141, ""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, RuntimeError | ValueError) and any(w in str(error) for w in _LOST):
        return 3, (
            f"{trace}error: {who}: another process has ended, and the run cannot go on without it. "
            "Its own output says why. Start all processes again: the run continues from the last "
            "checkpoint in its workdir\n"
        )
    return 1, trace


def check_same(facts: Mapping[str, Any]) -> None:
    """Raise MMJaxError, in every process, unless all processes have the same facts.

    facts: name -> JSON-able value. Two small collectives; the error names the facts that differ,
    their values and the processes that have them.
    """
    if jax.process_count() == 1:
        return
    mine = json.dumps({name: _short(value) for name, value in facts.items()}).encode()
    longest = int(multihost_utils.process_allgather(np.array([len(mine)]), tiled=False).max())
    told = multihost_utils.process_allgather(
        np.frombuffer(mine.ljust(longest), np.uint8), tiled=False
    )
    if differences := compare([json.loads(bytes(row)) for row in np.asarray(told)]):
        raise MMJaxError(
            "the processes of this run do not agree: "
            + "; ".join(differences)
            + ". Start all of them with the same command, the same code and the same files"
        )


def check_same_arrays(what: str, arrays: Iterable[np.ndarray]) -> None:
    """Raise MMJaxError, in every process, unless all of them have the same arrays.

    what: they are, for the message. A process hands over its own rows of a batch that all of them
    make: where a file is another one on one host, or missing, a row would be two halves of two.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array))
    check_same({f"the hash of {what}": digest.hexdigest()})


def check_shared(folder: Path, name: str) -> None:
    """Raise MMJaxError, in every process, unless all processes see the same files in a folder.

    name: of the folder, for the message. The first process leaves a mark there for this time; two
    small collectives.
    """
    if jax.process_count() == 1:
        return
    lead = jax.process_index() == 0
    # A name that nobody has asked for before: network file systems remember what was not there.
    number, name_of = os.urandom(4), "shared-{:08x}.part".format
    if lead:
        (folder / name_of(int.from_bytes(number, sys.byteorder))).touch()
    number = multihost_utils.broadcast_one_to_all(np.frombuffer(number, np.uint32))
    mark = folder / name_of(int(number[0]))  # known to the others once it is there
    try:
        seen = multihost_utils.process_allgather(np.array([mark.exists()]), tiled=False)
    finally:
        if lead:
            mark.unlink(missing_ok=True)
    if blind := [str(i) for i, sees in enumerate(np.asarray(seen).reshape(-1)) if not sees]:
        raise MMJaxError(
            f"{name} {folder} is not the same folder in process{'es' if len(blind) > 1 else ''} "
            f"{', '.join(blind[:8])}{f' and {len(blind) - 8} more' if len(blind) > 8 else ''} as "
            "in process 0: checkpoints could not be put together from their parts. Choose a folder "
            "on a file system that all hosts see"
        )


def outcomes(ended: Callable[[float], bool | None]) -> list[bool | None]:
    """Return how the same work ended in each process: True, False where it failed, None not yet.

    Returns once it has ended in all of them, or about a minute after it failed in one: what waits
    for that one would wait on. ended: given seconds to wait at most, tells it of this process; what
    it raises ends the process. A small collective every half a second, and one where all is done.
    """
    mine, pause, left = ended(0), _PAUSE, _ROUNDS
    while True:
        # The same numbers in every process, and no clock: all of them leave in the same round.
        code = 0 if mine is None else 1 if mine else 2
        told = np.asarray(multihost_utils.process_allgather(np.array([code]))).reshape(-1)
        left -= int((told == 2).any())
        if (told > 0).all() or not left:
            return [(None, True, False)[x] for x in told]
        if mine is None:
            mine = ended(pause)
        else:
            time.sleep(pause)


def compare(told: list[dict[str, str]]) -> list[str]:
    """Describe the facts in which processes differ; told: of every process, in order."""
    found = []
    for name in dict.fromkeys(name for facts in told for name in facts):
        values: dict[str, list[int]] = {}
        for process, facts in enumerate(told):
            values.setdefault(facts.get(name, "missing"), []).append(process)
        if len(values) > 1:
            each = (
                f"{value} in process{'es' if len(who) > 1 else ''} {', '.join(map(str, who[:8]))}"
                + (f" and {len(who) - 8} more" if len(who) > 8 else "")
                for value, who in values.items()
            )
            found.append(f"{name} is {' and '.join(each)}")
    return found if len(found) <= 8 else [*found[:8], f"and {len(found) - 8} more"]


def facts_of(
    config: Mapping[str, Any], lengths: Mapping[str, int], contents: Mapping[str, str]
) -> dict[str, Any]:
    """Return what the processes of a run must agree on: config, code, versions, data.

    config: nested; lengths: records of each source; contents: a hash of some of them.
    """
    return {
        **_flatten(config, "config"),
        **{f"records of data.sources.{name}": n for name, n in lengths.items()},
        **{f"the hash of some records of {name}": x for name, x in contents.items()},
        "the code of mmjax": code_hash(),
        "versions": f"mmjax {mmjax.__version__}, jax {jax.__version__}",
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
    }


def code_hash() -> str:
    """Return a hash of the source files of this package."""
    root = Path(mmjax.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else hashlib.sha256(text.encode()).hexdigest()[:16]


def _flatten(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{name}.{key}")
    return flat
