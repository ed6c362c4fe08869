#!/usr/bin/env bash
{{mark}}; {{submit}} THIS_FILE queues it.
# PBS Professional. Not run on a real PBS by us: bash -n and the ranks' part are tested, the directives are not.
#PBS -N {{name}}
#PBS -l walltime={{time}}
#PBS -j oe
#PBS -o {{logs}}/
{{directives}}
set -euo pipefail
export MEGATRON_EXT_JOB_END=$(($(date +%s) + {{seconds}}))
cd {{place}}

{{prepare}}
{{environment}}

mapfile -t hosts < <(sort -u "$PBS_NODEFILE")
export NNODES=${#hosts[@]} NPROC_PER_NODE={{processes}} MAX_RESTARTS={{max_restarts}} PYTHON={{python}}
export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + ${PBS_JOBID%%[!0-9]*} % 20000))}
logs={{logs_quoted}}/{{name}}-$PBS_JOBID
mkdir -p "$logs"
echo "job $PBS_JOBID on $NNODES nodes (${hosts[*]}); log of each node: $logs/node-N.log"

{{mpirun.inc}}
{{outcome.inc}}
{{train.inc}}
case $code in
  0) echo "done" ;;
  138 | 142 | 143) # stopped and saved: a new job goes on, where PBS takes one from this node
    if [ "${MEGATRON_EXT_REQUEUES:-0}" -lt {{max_requeues}} ]; then
      qsub -v "MEGATRON_EXT_REQUEUES=$((${MEGATRON_EXT_REQUEUES:-0} + 1))" {{file}} ||
        echo "stopped and saved (exit code $code): queue {{file}} again to go on" >&2
    fi ;;
  *) echo "ended with exit code $code: $logs/node-0.log and the other nodes' say why" >&2 ;;
esac
exit "$code"
