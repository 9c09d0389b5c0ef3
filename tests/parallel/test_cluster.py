"""What a launcher's environment says, and what half of one is answered with."""

import contextlib
import errno
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from mmjax.parallel import distributed
from mmjax.parallel.cluster import Cluster, find_cluster
from mmjax.parallel.distributed import check_same, compare, facts_of, joined
from mmjax.types import MMJaxError

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "node1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-009,012]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
# The third of four tasks on one node.
SLURM_NODE = SLURM | {"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


def without(env, *names, **more):
    return {k: v for k, v in env.items() if k not in names} | more


@pytest.mark.parametrize(
    "env, expected",
    [
        (EXPLICIT, Cluster("environment", "node1:1234", 3, 4)),
        (
            without(EXPLICIT, "JAX_PROCESS_ID", JOB_COMPLETION_INDEX="2"),
            Cluster("Kubernetes indexed job", "node1:1234", 2, 4),
        ),
        (SLURM, Cluster("SLURM", "gpu007:61441", 2, 4)),
        (
            SLURM | {"SLURM_STEP_NODELIST": "login,gpu3", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            Cluster("SLURM", "login:61441", 2, 4, (0,)),
        ),
        (
            SLURM
            | {
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
                "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
            },
            Cluster("SLURM", "gpu007:61441", 2, 4, (4, 5, 6, 7)),
        ),
        (  # brackets may stand anywhere, and several times
            SLURM | {"SLURM_STEP_NODELIST": "r[02-04]n[1,3]-ib,login"},
            Cluster("SLURM", "r02n1-ib:61441", 2, 4),
        ),
        # srun --gpus-per-task=1 shows each task the one GPU that it has.
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "3"},
            Cluster("SLURM", "gpu007:61441", 2, 4),
        ),
        # srun --gpus-per-task=2: each task sees two of its own, whatever their numbers are.
        (
            SLURM_NODE | {"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "8"},
            Cluster("SLURM", "gpu007:61441", 2, 4),
        ),
        (
            SLURM_NODE | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"},
            Cluster("SLURM", "gpu007:61441", 2, 4, (2,)),
        ),
        # srun --gpu-bind=none names no GPU: all of the node are seen, and shared.
        (
            SLURM_NODE | {"SLURM_GPUS_ON_NODE": "8"},
            Cluster("SLURM", "gpu007:61441", 2, 4, (4, 5)),
        ),
        # Two tasks on one node and one on the other: all have as many GPUs as on the fuller node.
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x1),1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            Cluster("SLURM", "gpu007:61441", 2, 4, (0, 1)),
        ),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,2(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            Cluster("SLURM", "gpu007:61441", 2, 4, (0, 1)),
        ),
        # A CPU run has no GPU to share.
        (
            SLURM_NODE | {"JAX_PLATFORMS": "cpu,cuda"},
            Cluster("SLURM", "gpu007:61441", 2, 4),
        ),
        # A second step of a job has a port of its own beside the first.
        (
            SLURM | {"SLURM_STEP_ID": "1"},
            Cluster("SLURM", "gpu007:62042", 2, 4),
        ),
        (
            SLURM | {"SLURM_DISTRIBUTION": "arbitrary", "JAX_COORDINATOR_ADDRESS": "gpu9:1"},
            Cluster("SLURM", "gpu9:1", 2, 4),
        ),
        (MPI, Cluster("Open MPI", "10.96.0.1:62624", 5, 8, (1,))),
        (
            without(MPI, "OMPI_MCA_orte_hnp_uri", JAX_COORDINATOR_ADDRESS="node9:99"),
            Cluster("Open MPI", "node9:99", 5, 8, (1,)),
        ),
        (
            MPI | {"JAX_COORDINATOR_ADDRESS": "node9:99"},
            Cluster("Open MPI", "node9:99", 5, 8, (1,)),
        ),
        (
            MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp6://[fd00::1:2,fd00::3]:43370"},
            Cluster("Open MPI", "[fd00::1:2]:62624", 5, 8, (1,)),
        ),
        # mpirun in a batch script, and as SLURM starts its daemons on three other hosts.
        (
            MPI | {"SLURM_JOB_ID": "2", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
            Cluster("Open MPI", "10.96.0.1:62624", 5, 8, (1,)),
        ),
        (MPI | SLURM, Cluster("Open MPI", "10.96.0.1:62624", 5, 8, (1,))),
        # Where nobody says how many share the host, each takes one GPU.
        (
            without(MPI, "OMPI_COMM_WORLD_LOCAL_SIZE", CUDA_VISIBLE_DEVICES="0,1,2,3"),
            Cluster("Open MPI", "10.96.0.1:62624", 5, 8, (1,)),
        ),
        (
            without(SLURM_NODE, "SLURM_STEP_TASKS_PER_NODE", CUDA_VISIBLE_DEVICES="0,1,2,3"),
            Cluster("SLURM", "gpu007:61441", 2, 4, (2,)),
        ),
        (SLURM_NODE | {"JAX_LOCAL_DEVICE_IDS": "1"}, Cluster("SLURM", "gpu007:61441", 2, 4)),
        (
            SLURM | MPI | EXPLICIT | {"JOB_COMPLETION_INDEX": "1"},
            Cluster("environment", "node1:1234", 3, 4),
        ),
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({"JOB_COMPLETION_INDEX": "7"}, None),  # indexed jobs need not be one run
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        # The shell of salloc: tasks are allocated and none is started.
        ({"SLURM_JOB_ID": "2", "SLURM_NTASKS": "2", "SLURM_NODELIST": "node[1-2]"}, None),
        # The same where a cluster runs that shell as a step of one task on the first node.
        (
            SLURM
            | {
                "SLURM_STEP_ID": "4294967290",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NODELIST": "gpu007",
                "SLURM_STEP_TASKS_PER_NODE": "1",
            },
            None,
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_launchers_are_understood(env, expected):
    assert find_cluster(env) == expected


@pytest.mark.parametrize(
    "env, says",
    [
        (without(EXPLICIT, "JAX_PROCESS_ID"), "JAX_NUM_PROCESSES=4 is set and JAX_PROCESS_ID"),
        (without(EXPLICIT, "JAX_COORDINATOR_ADDRESS"), "and JAX_COORDINATOR_ADDRESS not"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (SLURM | {"JAX_PROCESS_ID": "3"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES not"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID is 4 and there are 4 processes"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; it must be a num"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "node1"}, "'node1'; it must be host:port"),
        # A batch script has the job's number of tasks and is itself none of them.
        (
            {"SLURM_JOB_ID": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            "not started by srun",
        ),
        (without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is ''"),
        (SLURM | {"SLURM_DISTRIBUTION": "arbitrary"}, "need not be on the first host"),
        (without(MPI, "OMPI_MCA_orte_hnp_uri"), "mpirun -x JAX_COORDINATOR_ADDRESS=host:port"),
    ],
)
def test_half_an_environment_is_explained(env, says):
    with pytest.raises(MMJaxError) as error:
        find_cluster(env)
    assert says in str(error.value)


def test_a_process_alone_joins_nobody(capsys):
    with joined({}):
        check_same({"anything": object()})
    assert capsys.readouterr().out == ""


def test_differences_name_processes_keys_and_values():
    told = [{"config.lr": "0.1", "records": "10"}, {"config.lr": "0.2", "records": "10"}]
    assert compare(told) == ["config.lr is 0.1 in process 0 and 0.2 in process 1"]
    told = [{"a": "1"}, {"a": "1"}, {}]
    assert compare(told) == ["a is 1 in processes 0, 1 and missing in process 2"]
    assert compare([{"a": "1"}] * 20) == []
    assert "and 12 more" in compare([{"a": "1"}] * 20 + [{"a": "2"}])[0]
    assert compare([{}, {"a": "1"}]) == ["a is missing in process 0 and 1 in process 1"]
    many = compare([{str(i): "1" for i in range(20)}, {}])
    assert many[7].startswith("7 is 1 ") and many[8:] == ["and 12 more"]


def test_facts_of_other_processes_are_compared_whatever_their_size(monkeypatch):
    """The other process has the same long list, a rate of its own, and more to say in all."""
    facts = {"lr": 0.1, "file": Path("a/b"), "long": ["x"] * 50}
    other = json.dumps(
        {"lr": "0.2", "file": '"a/b"', "long": distributed._short(["x"] * 50), "more": "1"}
    ).encode()

    def gather(mine, tiled):
        if mine.dtype != np.uint8:
            return np.stack([mine, [len(other)]])
        return np.stack([mine, np.frombuffer(other.ljust(len(mine)), np.uint8)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    assert re.fullmatch("[0-9a-f]{16}", distributed._short(["x"] * 50))
    with pytest.raises(MMJaxError) as error:
        check_same(facts)
    assert str(error.value).startswith(
        "the processes of this run do not agree: lr is 0.1 in process 0 and 0.2 in process 1; "
        "more is missing in process 0 and 1 in process 1. Start"
    )


def test_the_hash_of_the_code_is_of_every_file_by_its_name_and_content(monkeypatch, tmp_path):
    (tmp_path / "nn").mkdir()
    monkeypatch.setattr(distributed.mmjax, "__file__", str(tmp_path / "__init__.py"))
    found = {distributed.code_hash()}
    for name, text in (("a.py", "1"), ("nn/a.py", "1"), ("nn/a.py", "2"), ("nn/b.py", "2")):
        (tmp_path / name).write_text(text)
        found.add(distributed.code_hash())
    assert len(found) == 5


@pytest.mark.parametrize(
    "mine, others, told",
    [
        ([True], [1], [True, True]),
        ([True], [0, 0, 1], [True, True]),
        ([None, None, True], [1, 1, 1], [True, True]),
        ([False], [1], [False, True]),
        ([False], [0, 2], [False, False]),
        ([False], [0, 0, 0], [False, None]),  # what the other waits for does not come
        ([None] * 4, [0, 2, 2, 2], [None, False]),
        ([True], [0, 0, 0, 0, 0, 1], [True, True]),  # slow, and nothing has failed
    ],
)
def test_processes_hear_how_the_same_work_ended_in_each(monkeypatch, mine, others, told):
    """Codes of the other process, a round each; three rounds are waited after a failure."""
    mine, others = iter(mine), iter(others)
    monkeypatch.setattr(distributed, "_PAUSE", 0)
    monkeypatch.setattr(distributed, "_ROUNDS", 3)
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda x: np.stack([x, [next(others)]])
    )
    assert distributed.outcomes(lambda seconds: next(mine)) == told
    assert not list(mine) and not list(others)


def test_facts_are_config_code_versions_and_data():
    facts = facts_of({"optim": {"lr": 1e-3}, "lora": {}}, {"vqa": 12}, {"vqa": "3f"})
    assert facts["config.optim.lr"] == 1e-3 and facts["config.lora"] == {}
    assert facts["records of data.sources.vqa"] == 12
    assert facts["the hash of some records of vqa"] == "3f"
    assert {"the code of mmjax", "versions", "devices"} <= set(facts)


class Ended(BaseException):
    """Stands for the end of this process."""


def end_with(monkeypatch, error):
    """Leave as a process of several does on an error; returns its exit code."""

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended) as ended:
        distributed.leave(error, "process 1 of 3")
    return ended.value.args[0]


@pytest.mark.parametrize(
    "error, code, says",
    [
        (MMJaxError("no such mesh"), 2, "error: process 1 of 3: no such mesh\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            *(2, "error: process 1 of 3: /data/x: No space left on device; mend its path, rights"),
        ),
        (OSError(errno.EIO, "Input/output error"), 2, "error: process 1 of 3: Input/output error;"),
        (KeyboardInterrupt(), 130, "\nprocess 1 of 3: stopped by the keyboard\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
)
def test_what_a_user_can_mend_is_a_line_in_every_process(monkeypatch, capsys, error, code, says):
    assert end_with(monkeypatch, error) == code
    told = capsys.readouterr().err
    assert told.startswith(says) and "Traceback" not in told


def test_other_errors_keep_their_traceback_and_a_lost_process_is_explained(monkeypatch, capsys):
    try:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
    except FileNotFoundError as error:
        assert end_with(monkeypatch, error) == 1
    assert "Traceback" in capsys.readouterr().err
    for lost in (RuntimeError("Gloo: peer closed"), ValueError("UNAVAILABLE: gone")):
        assert end_with(monkeypatch, lost) == 3
        assert "another process has ended" in capsys.readouterr().err
    assert end_with(monkeypatch, KeyError("Connection")) == 1


def test_a_process_ends_where_nothing_can_be_printed_any_more(monkeypatch):
    with open("/dev/full", "w") as full, open("/dev/full", "w") as errors:
        monkeypatch.setattr("sys.stdout", full)
        monkeypatch.setattr("sys.stderr", errors)
        print("some words that wait in the buffer")
        assert end_with(monkeypatch, MMJaxError("no such mesh")) == 2
        monkeypatch.undo()
        for file in (full, errors):
            with contextlib.suppress(OSError):
                file.close()
