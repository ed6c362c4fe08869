# What the scripts of the examples have alike: tools, launches, and steps whose result is kept. To be sourced; `root` is
# the folder of the repository.
python=${PYTHON:-python}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=true HF_HUB_DISABLE_PROGRESS_BARS=1

tool() { local name=$1; shift; "$python" "$root/tools/$name.py" "$@"; }

# train PROCESSES RUN.yaml [key=value ...]
train() { local n=$1; shift; PYTHON=$python NPROC_PER_NODE=$n MASTER_ADDR="" "$root/launch/torchrun.sh" "$@"; }

# step NAME RESULT COMMAND...: run COMMAND unless RESULT is there already
step() {
  local name=$1 result=$2 begin=$SECONDS
  shift 2
  if [ -e "$result" ]; then
    echo "== $name: done before ($result)"
  else
    echo "== $name"
    "$@"
    echo "   $name took $((SECONDS - begin)) s"
  fi
}

# one_source FOLDER SOURCE: results in FOLDER are of one corpus alone
one_source() {
  mkdir -p "$1"
  if [ -s "$1/source" ] && [ "$(cat "$1/source")" != "$2" ]; then
    echo "error: $1 holds results for another corpus ($(cat "$1/source")); move it away first" >&2
    exit 2
  fi
  echo "$2" > "$1/source"
}

# share_of_steps FOLDER SHARE VARIABLE: percent of the steps to train. SHARE is what VARIABLE of the environment has;
# empty, it is measured. Kept, so that what is started again goes on with the same number
share_of_steps() {
  if [ ! -s "$1/share" ]; then
    local share=${2:-$("$python" "$root/examples/quickstart/measure.py")}
    case $share in
      100 | 75 | 50 | 25) ;;
      *) echo "error: $3 = $share: must be 100, 75, 50 or 25 (percent of the steps)" >&2; exit 2 ;;
    esac
    echo "$share" > "$1/share"
  fi
  cat "$1/share"
}

iteration() { printf 'iter_%07d' "$1"; }
