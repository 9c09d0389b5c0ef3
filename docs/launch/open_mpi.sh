#!/bin/bash
# Two hosts of eight GPUs, one process a host: docs/launch/open_mpi.sh host1,host2 [--config.key=value]
# Open MPI 5 does not tell its processes where the first one is, so the address is given.
set -euo pipefail
hosts=${1:?give the names of the hosts: host1,host2}
shift
IFS=, read -ra names <<< "$hosts"
# To end a run early, send SIGTERM to a process of train.py: all save, and mpirun ends with 0. mpirun
# itself would give them a second between SIGTERM and SIGKILL.
mpirun --host "$hosts" --map-by ppr:1:node -np "${#names[@]}" \
  -x JAX_COORDINATOR_ADDRESS="${names[0]}:12345" \
  .venv/bin/python train.py \
  --config="${CONFIG:-configs/fuyu_8b.py}" \
  --workdir="${WORKDIR:?set WORKDIR to a folder that all hosts see}" \
  "$@"
