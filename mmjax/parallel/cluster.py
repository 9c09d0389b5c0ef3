"""Which processes a run is made of, read from what a launcher puts into the environment."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from mmjax.types import MMJaxError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
POD_INDEX = "JOB_COMPLETION_INDEX"  # set by Kubernetes in the pods of an indexed job
_PORTS = 2**12  # the last ports are picked from by job number, so that jobs on a host do not meet
_STEPS_APART = 601  # ports between two steps of a job


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The place of this process among those of a run.

    launcher: who started them. coordinator: host:port of process 0. index of count.
    devices: which of the host's GPUs are this process's; None for all it can see.
    """

    launcher: str
    coordinator: str
    index: int
    count: int
    devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        devices = "" if self.devices is None else f", GPU {', '.join(map(str, self.devices))}"
        return (
            f"process {self.index} of {self.count} ({self.launcher}), coordinator "
            f"{self.coordinator}{devices}"
        )


def find_cluster(env: Mapping[str, str]) -> Cluster | None:
    """Return where the environment says that this process stands; None for a run of one process.

    Looks for JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or Kubernetes' index
    of an indexed job), then for mpirun, then for srun. Raises MMJaxError when what it finds is
    incomplete or contradicts itself.
    """
    if COUNT in env or INDEX in env:
        return _explicit(env)
    # Under mpirun, what SLURM has set is of the batch script or of mpirun's own daemons.
    found = _open_mpi(env) or _slurm(env)
    if found is None and ADDRESS in env:
        return _explicit(env)
    return found


def _explicit(env: Mapping[str, str]) -> Cluster | None:
    index = INDEX if INDEX in env else POD_INDEX
    missing = [name for name in (ADDRESS, COUNT) if name not in env]
    if index not in env:
        missing.append(f"{INDEX} (or {POD_INDEX}, which Kubernetes sets in an indexed job)")
    if missing and not (env.get(COUNT) == "1" and missing == [ADDRESS]):
        given = [f"{n}={env[n]}" for n in (ADDRESS, COUNT, INDEX, POD_INDEX) if n in env]
        raise MMJaxError(
            f"{', '.join(given)} is set and {' and '.join(missing)} not; set all three in every "
            "process, or none for a run of one process"
        )
    if _number(env, COUNT) == 1:
        return None
    launcher = "environment" if index == INDEX else "Kubernetes indexed job"
    return _checked(
        Cluster(launcher, env[ADDRESS], _number(env, index), _number(env, COUNT)), index
    )


def _slurm(env: Mapping[str, str]) -> Cluster | None:
    if "SLURM_JOB_ID" not in env:
        return None
    # What SLURM_NTASKS counts may be allocated and not started: only srun's step has its own count.
    if "SLURM_STEP_NUM_TASKS" not in env:
        if "SLURM_PROCID" in env and _number(env, "SLURM_NTASKS", 1) > 1:
            raise MMJaxError(
                f"SLURM_NTASKS is {env['SLURM_NTASKS']} and this process was not started by srun, "
                "so that the others do not run: write `srun python train.py ...` in the batch "
                "script, or unset SLURM_NTASKS to run in this process alone"
            )
        return None  # a shell of salloc
    count = _number(env, "SLURM_STEP_NUM_TASKS")
    if count == 1:
        return None
    devices = None
    tasks = re.findall(r"(\d+)(?:\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    visible, on_node = _visible(env), _number(env, "SLURM_GPUS_ON_NODE", 0)
    if not visible or len(visible) >= on_node:  # or SLURM has shared them itself
        # All processes must have as many: where nodes differ, as many as on the fullest.
        here = max(map(int, tasks), default=None)
        devices = _devices(env, _number(env, "SLURM_LOCALID"), here, len(visible) or on_node)
    index = _number(env, "SLURM_PROCID")
    return _checked(Cluster("SLURM", _slurm_address(env), index, count, devices), "SLURM_PROCID")


def _slurm_address(env: Mapping[str, str]) -> str:
    if address := env.get(ADDRESS):
        return address
    if env.get("SLURM_DISTRIBUTION") == "arbitrary":
        raise MMJaxError(
            "SLURM_DISTRIBUTION is arbitrary: the first task need not be on the first host; set "
            f"{ADDRESS} to host:port of its host, or leave --distribution=arbitrary away"
        )
    # node[003-007,009],login1 begins with node003.
    nodes = env.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"(?:[^,\[]|\[\d[^\]]*\])+", nodes)
    if first is None:
        raise MMJaxError(
            f"SLURM_STEP_NODELIST is {nodes!r}, which begins with no host's name; set {ADDRESS} to "
            "host:port of the first process"
        )
    # Steps of a job may run beside each other, and jobs with numbers next to each other.
    place = _number(env, "SLURM_JOB_ID") + _STEPS_APART * _number(env, "SLURM_STEP_ID", 0)
    host = re.sub(r"\[(\d+)[^]]*]", r"\1", first[0])
    return f"{host}:{_port(place)}"


def _open_mpi(env: Mapping[str, str]) -> Cluster | None:
    if _number(env, "OMPI_COMM_WORLD_SIZE", 1) == 1:
        return None
    count, index = _number(env, "OMPI_COMM_WORLD_SIZE"), _number(env, "OMPI_COMM_WORLD_RANK")
    address = env.get(ADDRESS)
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    host = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    if address is None and host:
        name = host[2] or f"[{host[3]}]"  # brackets, or its last number would be the port
        address = f"{name}:{_port(int(host[1]) // 2**12)}"
    if address is None:
        raise MMJaxError(
            f"Open MPI started {count} processes and does not say where the first one is (version "
            f"5 does not); give its host and a free port: mpirun -x {ADDRESS}=host:port ..."
        )
    local = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
    seen = len(_visible(env))
    devices = _devices(env, local, _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 0) or None, seen)
    return _checked(Cluster("Open MPI", address, index, count, devices), "OMPI_COMM_WORLD_RANK")


def _devices(
    env: Mapping[str, str], local: int, here: int | None, seen: int
) -> tuple[int, ...] | None:
    """Share the ``seen`` GPUs of a host between its ``here`` processes; this is number ``local``.

    A process that is alone on its host, or was given one GPU by its launcher, takes all it sees.
    """
    if here == 1 or seen == 1 or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    if env.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return None
    each = max(1, seen // here) if here else 1
    return tuple(range(local * each, (local + 1) * each))


def _visible(env: Mapping[str, str]) -> list[str]:
    """The GPUs that this process is shown by name; none where it is not told."""
    return [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]


def _checked(found: Cluster, name: str) -> Cluster:
    if not 0 <= found.index < found.count:
        raise MMJaxError(
            f"{name} is {found.index} and there are {found.count} processes; they are counted "
            f"from 0 to {found.count - 1}"
        )
    if not re.fullmatch(r".+:\d+", found.coordinator):
        raise MMJaxError(
            f"{ADDRESS} is {found.coordinator!r}; it must be host:port of process 0, such as "
            "node1:12345"
        )
    return found


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.strip().isdigit():
        raise MMJaxError(f"{name} is {text!r}; it must be a number, 0 or more")
    return int(text)


def _port(job: int) -> int:
    return 2**16 - _PORTS + job % _PORTS
