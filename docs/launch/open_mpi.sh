#!/bin/bash
# Two hosts of eight GPUs, one process a host: docs/launch/open_mpi.sh host1 host2
# Open MPI 5 does not tell its processes where the first one is, so the address is given.
set -euo pipefail
first=$1
hosts=$(IFS=,; echo "$*")
mpirun --host "$hosts" --map-by ppr:1:node -np $# \
  -x JAX_COORDINATOR_ADDRESS="$first:12345" \
  .venv/bin/python train.py \
  --config="${CONFIG:-configs/fuyu_8b.py}" \
  --workdir="${WORKDIR:?set WORKDIR to a folder that all hosts see}"
