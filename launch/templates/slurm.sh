#!/usr/bin/env bash
{{mark}}; {{submit}} THIS_FILE queues it.
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node=1
#SBATCH --time={{time}}
# So long before its time is over the ranks get SIGTERM: they finish their step, save and end.
#SBATCH --signal=TERM@{{signal_seconds}}
# Preempted, or off a node that failed, Slurm queues it again itself.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={{logs}}/%x-%j.out
{{directives}}
set -euo pipefail
cd {{place}}

{{prepare}}
{{environment}}

export NNODES=$SLURM_NNODES NPROC_PER_NODE={{processes}} MAX_RESTARTS={{max_restarts}} PYTHON={{python}}
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
logs={{logs_quoted}}/$SLURM_JOB_NAME-$SLURM_JOB_ID
mkdir -p "$logs"
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $NNODES nodes ($SLURM_JOB_NODELIST); log of each node: $logs/node-N.log"

# One torchrun a node. NODE_RANK is known only inside each task; one that ends badly ends the others. Signals are for the
# ranks: the shell around them waits, and writes down how its node ended.
on_nodes() {
  code=0
  TOOL=$1 srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/node-%n.log" {{srun_options}} bash -c '
    trap : TERM INT HUP USR1
    code=0
    NODE_RANK=$SLURM_NODEID "$@" || code=$?
    echo $code > "$0/exit-$SLURM_NODEID"
    exit $code' "$logs" {{prefix}} {{torchrun}} {{run}} || code=$?
  outcome
}
{{outcome.inc}}
{{train.inc}}
case $code in
  0) echo "done" ;;
  138 | 142 | 143) # SIGUSR1, train.exit_at, SIGTERM: stopped and saved; the run goes on in the next job
    if [ "${SLURM_RESTART_COUNT:-0}" -lt {{max_requeues}} ]; then
      echo "stopped and saved (exit code $code): queued again to go on"
      # Slurm ends this script then. One that ended by itself just before could be taken for the end of the job.
      scontrol requeue "$SLURM_JOB_ID" && sleep 120
    fi ;;
  *) echo "ended with exit code $code: $logs/node-0.log and the other nodes' say why" >&2 ;;
esac
exit "$code"
