#!/usr/bin/env bash
# Submits one llmos command to Slurm: one process a node, which saves and goes back to the queue at the time limit.
#
#   slurm.sh --nodes N --gpus-per-node G [options] -- llmos train configs/x.py --workdir /shared/run
#
#   --time LIMIT        the job's time limit, as Slurm writes it; default: the partition's
#   --cpus C            CPUs a node; default: 8 for each GPU
#   --name NAME         the job's name; default: llmos
#   --grace SECONDS     how long before the time limit the run is told to save; default: 180
#   --port PORT         of the coordinator on the first node; default: 8476
#   --venv DIR          a virtual environment to use on the nodes
#   --sbatch OPTION     any other option of sbatch, such as --sbatch --partition=h200; may be repeated
#   --dry-run           print the batch script and submit nothing
#
# The workdir must be on storage that all nodes share. Nothing is resumed by name: the same command goes on from the
# last checkpoint in its workdir. Exit status 75 means stopped after saving.
set -euo pipefail

die() {
  echo "slurm.sh: $1" >&2
  exit 2
}

nodes='' gpus='' limit='' cpus='' name=llmos grace=180 port=8476 venv='' extra=() dry_run=no
while (($#)); do
  case $1 in
    --nodes | --gpus-per-node | --time | --cpus | --name | --grace | --port | --venv | --sbatch)
      (($# > 1)) || die "$1 needs a value; see the head of this script"
      [[ $2 != *[[:space:]]* ]] || die "$1 '$2' has a space in it, which Slurm does not take; give one without"
      case $1 in
        --nodes) nodes=$2 ;;
        --gpus-per-node) gpus=$2 ;;
        --time) limit=$2 ;;
        --cpus) cpus=$2 ;;
        --name) name=$2 ;;
        --grace) grace=$2 ;;
        --port) port=$2 ;;
        --venv) venv=$2 ;;
        --sbatch) extra+=("$2") ;;
      esac
      shift
      ;;
    --dry-run) dry_run=yes ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) die "$1 is not an option; options come first, then --, then the command" ;;
  esac
  shift
done

whole_number() { # OPTION VALUE
  [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 ${2:-is missing}${2:+ is not a number}; give a whole number of at least 1"
}
whole_number --nodes "$nodes"
whole_number --gpus-per-node "$gpus"
whole_number --grace "$grace"
whole_number --port "$port"
: "${cpus:=$((8 * gpus))}"
whole_number --cpus "$cpus"
(($#)) || die "there is no command to run; put it after --, as in -- llmos train configs/x.py"

batch_script() {
  printf '#!/usr/bin/env bash\n'
  local options=("--job-name=$name" "--nodes=$nodes" --ntasks-per-node=1)
  options+=("--gpus-per-node=$gpus" "--cpus-per-task=$cpus")
  [[ -z $limit ]] || options+=("--time=$limit")
  # Without "B:" the signal goes to the processes of the job step, which is where it is heard.
  options+=("--signal=TERM@$grace" --requeue --open-mode=append "--output=%x-%j.log")
  printf '#SBATCH %s\n' "${options[@]}" ${extra[@]+"${extra[@]}"} # older shells call an empty list unset
  echo 'set -u'
  # shellcheck disable=SC2016 # the line is for the node, not for here
  [[ -z $venv ]] || printf 'export PATH=%q/bin:"$PATH"\n' "$venv"
  printf 'command=('
  printf ' %q' "$@"
  printf ' )\nport=%s\n' "$port"
  cat <<'SCRIPT'
LLMOS_COORDINATOR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$port"
LLMOS_NUM_PROCESSES="$SLURM_JOB_NUM_NODES"
export LLMOS_COORDINATOR LLMOS_NUM_PROCESSES LLMOS_STOPPED_EXIT_CODE=75

trap : TERM # a signal for the job must not end this shell before the processes have saved
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  bash -c 'export LLMOS_PROCESS_ID="$SLURM_PROCID"; exec "$@"' llmos "${command[@]}"
status=$?

# 75: stopped after saving. A job that is being cancelled or preempted is not RUNNING any more and is left alone.
if [ "$status" -eq 75 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
SCRIPT
}

if [[ $dry_run == yes ]]; then
  batch_script "$@"
else
  batch_script "$@" | sbatch
fi
