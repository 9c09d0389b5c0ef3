"""Which processes a run is made of, read from what a launcher puts into the environment."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from mmjax.types import MMJaxError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
POD_INDEX = "JOB_COMPLETION_INDEX"  # set by Kubernetes in the pods of an indexed job
_PORTS = 2**12  # the last ports are picked from by job number, so that jobs on a host do not meet


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
    of an indexed job), then for srun, then for mpirun. Raises MMJaxError when what it finds is
    incomplete or contradicts itself.
    """
    if COUNT in env or INDEX in env:
        return _explicit(env)
    found = _slurm(env) or _open_mpi(env)
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
    if "SLURM_JOB_ID" not in env or _number(env, "SLURM_NTASKS", 1) == 1:
        return None
    wanted = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if missing := [name for name in wanted if name not in env]:
        # A batch script has the job's SLURM_NTASKS, and is itself none of the tasks.
        raise MMJaxError(
            f"SLURM_NTASKS is {env['SLURM_NTASKS']} and {', '.join(missing)} not set: this process "
            "was not started by srun; write `srun python train.py ...`, or unset SLURM_NTASKS to "
            "run in this process alone"
        )
    address = env.get(ADDRESS)
    if address is None:
        # node[003-007,009],login1 begins with node003.
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])
        if first is None:
            raise MMJaxError(
                f"SLURM_STEP_NODELIST is {env['SLURM_STEP_NODELIST']!r}, which begins with no "
                f"host's name; set {ADDRESS} to host:port of the first process"
            )
        address = f"{first[1]}{first[2] or ''}:{_port(_number(env, 'SLURM_JOB_ID'))}"
    here = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    devices = _devices(env, _number(env, "SLURM_LOCALID"), int(here[0]) if here else None)
    index, count = _number(env, "SLURM_PROCID"), _number(env, "SLURM_NTASKS")
    return _checked(Cluster("SLURM", address, index, count, devices), "SLURM_PROCID")


def _open_mpi(env: Mapping[str, str]) -> Cluster | None:
    if _number(env, "OMPI_COMM_WORLD_SIZE", 1) == 1:
        return None
    count, index = _number(env, "OMPI_COMM_WORLD_SIZE"), _number(env, "OMPI_COMM_WORLD_RANK")
    address = env.get(ADDRESS)
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    host = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    if address is None and host:
        address = f"{host[2] or host[3]}:{_port(int(host[1]) // 2**12)}"
    if address is None:
        raise MMJaxError(
            f"Open MPI started {count} processes and does not say where the first one is (version "
            f"5 does not); give its host and a free port: mpirun -x {ADDRESS}=host:port ..."
        )
    local = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
    devices = _devices(env, local, _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 0) or None)
    return _checked(Cluster("Open MPI", address, index, count, devices), "OMPI_COMM_WORLD_RANK")


def _devices(env: Mapping[str, str], local: int, here: int | None) -> tuple[int, ...] | None:
    """Share a host's GPUs between its ``here`` processes, of which this is number ``local``.

    A process that is alone on its host, or was given one GPU by its launcher, takes all it sees.
    """
    if here == 1 or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    visible = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if len(visible) == 1:
        return None
    each = len(visible) // here if here and visible else 1
    return tuple(range(local * each, (local + 1) * each))


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
