#!/usr/bin/env bash
{{mark}}; {{submit}} THIS_FILE queues it.
# Altair (Univa, Sun) Grid Engine. Not run on a real one by us: bash -n is tested, the directives are not.
#$ -N {{name}}
#$ -cwd
#$ -l h_rt={{time}}
#$ -j y
#$ -o {{logs}}/
# It may be started again: exit code 99 asks for that.
#$ -r y
{{directives}}
set -euo pipefail
export MEGATRON_EXT_JOB_END=$(($(date +%s) + {{seconds}}))
cd {{place}}

{{prepare}}
{{environment}}

mapfile -t hosts < <(awk '{ print $1 }' "$PE_HOSTFILE" | sort -u)
export NNODES=${#hosts[@]} NPROC_PER_NODE={{processes}} MAX_RESTARTS={{max_restarts}} PYTHON={{python}}
export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + JOB_ID % 20000))}
logs={{logs_quoted}}/{{name}}-$JOB_ID
mkdir -p "$logs"
date >> "$logs/starts"
echo "job $JOB_ID on $NNODES nodes (${hosts[*]}); log of each node: $logs/node-N.log"

{{mpirun.inc}}
{{outcome.inc}}
{{train.inc}}
case $code in
  0) echo "done" ;;
  138 | 142 | 143) # stopped and saved: the same job is queued again
    starts=$(wc -l < "$logs/starts")
    [ "$starts" -gt {{max_requeues}} ] || code=99 ;;
  *) echo "ended with exit code $code: $logs/node-0.log and the other nodes' say why" >&2 ;;
esac
exit "$code"
