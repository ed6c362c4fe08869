#!/usr/bin/env bash
# Start tools/train.py with torchrun, on one node or on several.
#
#   launch/torchrun.sh RUN.yaml [section.key=value ...] [--check]
#
# One node: every GPU of it (or NPROC_PER_NODE processes).
# Several: run the same command on every node with
#   NNODES=2 NODE_RANK=0..1 MASTER_ADDR=<host of node 0> [MASTER_PORT=29500] launch/torchrun.sh RUN.yaml
# MAX_RESTARTS=3 starts all ranks again after one has failed, from the newest checkpoint. With NNODES=2:4 that many
# nodes will do: when one is lost (but that of MASTER_ADDR) or comes, the ranks start again on those there (RDZV_CONF: torchrun's
# --rdzv-conf, such as last_call_timeout=60; LOCAL_ADDR: this node's address, where its name leads nowhere).
# TOOL=tools/preflight.py tests the nodes instead of training.
set -euo pipefail
fail() { echo "error: $1" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
[ $# -ge 1 ] || { sed -n '2,13p' "${BASH_SOURCE[0]}" >&2; exit 2; }

gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l) || gpus=0
per_node=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
# Megatron expects one hardware queue for the order of its communication on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((gpus > 0 ? 8 : 1))}
# Dropless experts get another number of rows in each step: memory that can grow in place does not fragment by that.
[ "$gpus" = 0 ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
# A connection to a node that is gone is said by our own message, not by a page of torch's.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

for name in NPROC_PER_NODE NNODES MAX_RESTARTS; do
  shape='^[1-9][0-9]*$' what="a whole number of at least 1"
  [ $name != NNODES ] || shape='^[1-9][0-9]*(:[1-9][0-9]*)?$'
  [ $name != MAX_RESTARTS ] || { shape='^[0-9]+$'; what="a whole number"; }
  [[ ${!name:-1} =~ $shape ]] || fail "$name=${!name}: must be $what"
done
restarts=${MAX_RESTARTS:-0} nodes=${NNODES:-1} looks_first=1
least=${nodes%:*} most=${nodes#*:}
tool=${TOOL:-tools/train.py}
[ -f "$root/$tool" ] || fail "TOOL=$tool: $root has no such file"

if [ -z "${MASTER_ADDR:-}" ]; then
  [ "$nodes" = 1 ] || fail "NNODES=$NNODES: several nodes need MASTER_ADDR, the host of node 0"
  rendezvous=(--standalone --max-restarts "$restarts")
elif [ -z "${NNODES:-}" ]; then
  fail "MASTER_ADDR=$MASTER_ADDR: set NNODES, the number of nodes"
elif [ "$least" != "$most" ] || [ "$restarts" != 0 ]; then
  # Nodes that may come and go, and start again together, meet anew each time: no node has a number of its own.
  endpoint=$MASTER_ADDR:${MASTER_PORT:-29500}
  rendezvous=(--nnodes "$nodes" --max-restarts "$restarts" --rdzv-backend c10d --rdzv-endpoint "$endpoint")
  rendezvous+=(--rdzv-id "${SLURM_JOB_ID:-$endpoint}" ${RDZV_CONF:+--rdzv-conf "$RDZV_CONF"} ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"})
else
  [ -n "${NODE_RANK:-}" ] || fail "MASTER_ADDR=$MASTER_ADDR: set NODE_RANK, 0 on the node of MASTER_ADDR"
  # One that did not start would keep the others waiting: its ranks start, and tell them what is wrong with it.
  looks_first=
  rendezvous=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi

# One process reads the run before many start: what is wrong with it is said once, with exit code 2.
check=("$python" "$root/tools/train.py" "$@" --check)
for argument in "$@"; do
  [ "$argument" != --check ] || exec "${check[@]}" --world-size $((per_node * least))
done
[ "$tool" = tools/train.py ] || check+=(--config-only)
check+=(--alert)
[ -z "$looks_first" ] || "${check[@]}" --world-size $((per_node * least)) > /dev/null
[ "$least" = "$most" ] || "${check[@]}" --config-only --world-size $((per_node * most)) > /dev/null
exec "$python" -P -m megatron_ext.runtime.launch "${rendezvous[@]}" --nproc-per-node "$per_node" "$root/$tool" "$@"
