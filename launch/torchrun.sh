#!/usr/bin/env bash
# Start tools/train.py with torchrun, on one node or on several.
#
#   launch/torchrun.sh RUN.yaml [section.key=value ...] [--check]
#
# One node: every GPU of it (or NPROC_PER_NODE processes).
# Several: run the same command on every node with
#   NNODES=2 NODE_RANK=0..1 MASTER_ADDR=<host of node 0> [MASTER_PORT=29500] launch/torchrun.sh RUN.yaml
set -euo pipefail
fail() { echo "error: $1" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
[ $# -ge 1 ] || { sed -n '2,9p' "${BASH_SOURCE[0]}" >&2; exit 2; }

gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l) || gpus=0
per_node=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
# Megatron expects one hardware queue for the order of its communication on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((gpus > 0 ? 8 : 1))}

if [ -z "${MASTER_ADDR:-}" ]; then
  [ "${NNODES:-1}" = 1 ] || fail "NNODES=$NNODES: several nodes need MASTER_ADDR, the host of node 0"
  rendezvous=(--standalone)
else
  [ -n "${NNODES:-}" ] || fail "MASTER_ADDR=$MASTER_ADDR: set NNODES, the number of nodes"
  [ -n "${NODE_RANK:-}" ] || fail "MASTER_ADDR=$MASTER_ADDR: set NODE_RANK, 0 on the node of MASTER_ADDR"
  rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
for name in NPROC_PER_NODE NNODES; do
  [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: must be a whole number of at least 1"
done

# One process reads the run before many start: what is wrong with it is said once, with exit code 2.
check=("$python" "$root/tools/train.py" "$@" --check --world-size $((per_node * ${NNODES:-1})))
for argument in "$@"; do
  [ "$argument" != --check ] || exec "${check[@]}"
done
"${check[@]}" > /dev/null
exec "$python" -P -m megatron_ext.runtime.launch "${rendezvous[@]}" --nproc-per-node "$per_node" "$root/tools/train.py" "$@"
