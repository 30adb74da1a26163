#!/usr/bin/env bash
# Runs one llmos command as a Kubernetes JobSet: on a TPU slice of GKE, or on nodes with GPUs.
#
#   kubernetes.sh NAME --image IMAGE --tpu tpu-v6e-slice --topology 4x4 [options] -- llmos train configs/x.py ...
#   kubernetes.sh NAME --image IMAGE --gpus-per-node 8 --nodes 2 [options] -- llmos train configs/x.py ...
#
#   --tpu LABEL            GKE's name of the TPU (label cloud.google.com/gke-tpu-accelerator)
#   --topology T           its topology, such as 2x4 or 4x4x4
#   --chips-per-host N     chips of one node; default: 4
#   --gpus-per-node N      GPUs of one node
#   --nodes N              nodes with GPUs; default: 1
#   --node-selector K=V    any other label that the nodes must have; may be repeated
#   --namespace NS         default: default
#   --service-account SA   the pods' service account, for access to the workdir; default: default
#   --grace SECONDS        from the stop signal until the pods are killed; default: 120
#   --max-restarts N       restarts after failures of the run itself; default: 3
#   --stop                 delete the JobSet; its pods save and stop
#   --dry-run              print what would be applied and apply nothing
#
# The cluster needs the JobSet controller, version 0.6 or newer. The image is built from the Dockerfile next to this.
set -euo pipefail

die() {
  echo "kubernetes.sh: $1" >&2
  exit 2
}

name='' image='' tpu='' topology='' chips=4 gpus='' nodes=1 namespace=default account=default grace=120 restarts=3
selectors=() action=apply dry_run=no
while (($#)); do
  case $1 in
    --image | --tpu | --topology | --chips-per-host | --gpus-per-node | --nodes | --node-selector | --namespace | \
      --service-account | --grace | --max-restarts)
      (($# > 1)) || die "$1 needs a value; see the head of this script"
      case $1 in
        --image) image=$2 ;;
        --tpu) tpu=$2 ;;
        --topology) topology=$2 ;;
        --chips-per-host) chips=$2 ;;
        --gpus-per-node) gpus=$2 ;;
        --nodes) nodes=$2 ;;
        --node-selector) selectors+=("$2") ;;
        --namespace) namespace=$2 ;;
        --service-account) account=$2 ;;
        --grace) grace=$2 ;;
        --max-restarts) restarts=$2 ;;
      esac
      shift
      ;;
    --stop) action=stop ;;
    --dry-run) dry_run=yes ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    -*) die "$1 is not an option; see the head of this script" ;;
    *)
      [[ -z $name ]] || die "there are two names, '$name' and '$1'; put the command after --"
      name=$1
      ;;
  esac
  shift
done

whole_number() { # OPTION VALUE
  [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 $2 is not a number; give a whole number of at least 1"
}

json_string() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

json_list() {
  local separator=''
  printf '['
  for item in "$@"; do
    printf '%s%s' "$separator" "$(json_string "$item")"
    separator=', '
  done
  printf ']'
}

json_mapping() { # KEY=VALUE...
  local separator=''
  printf '{'
  for pair in "$@"; do
    printf '%s%s: %s' "$separator" "$(json_string "${pair%%=*}")" "$(json_string "${pair#*=}")"
    separator=', '
  done
  printf '}'
}

value_of() { # WORD of the template
  case $1 in
    NAME) printf '%s' "$name" ;;
    NAMESPACE) json_string "$namespace" ;;
    SERVICE_ACCOUNT) json_string "$account" ;;
    IMAGE) json_string "$image" ;;
    COMMAND) json_list "${command[@]}" ;;
    NODE_SELECTOR) json_mapping ${selectors[@]+"${selectors[@]}"} ;; # older shells call an empty list unset
    HOSTS) printf '%s' "$hosts" ;;
    RESOURCE) printf '%s' "$resource" ;;
    DEVICES) printf '%s' "$devices" ;;
    GRACE) printf '%s' "$grace" ;;
    MAX_RESTARTS) printf '%s' "$restarts" ;;
    # Pod 0 of job 0, by the headless service that JobSet makes.
    COORDINATOR) printf '%s' "$name-worker-0-0.$name:8476" ;;
    *) die "jobset.yaml has an unknown word @$1@" ;;
  esac
}

render() { # the template on stdin
  local line done_part
  while IFS= read -r line; do
    case $line in
      '# '*) continue ;;
      *'  # tpu') [[ $kind == tpu ]] || continue ;;
      *'  # gpu') [[ $kind == gpu ]] || continue ;;
    esac
    line=${line%  # [tg]pu}
    done_part=''
    while [[ $line =~ ^([^@]*)@([A-Z_]+)@(.*)$ ]]; do # what is filled in is not looked at again
      line=${BASH_REMATCH[3]}
      done_part+=${BASH_REMATCH[1]}$(value_of "${BASH_REMATCH[2]}")
    done
    printf '%s\n' "$done_part$line"
  done
}

[[ -n $name ]] || die "the name of the run is missing; give it first"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] \
  || die "'$name' cannot name a JobSet; use up to 40 lower-case letters, digits and dashes, a letter first"
if [[ $action == stop ]]; then
  stop=(kubectl delete jobset "$name" "--namespace=$namespace")
  if [[ $dry_run == yes ]]; then echo "${stop[@]}"; else "${stop[@]}"; fi
  exit
fi
[[ -n $image ]] || die "--image is missing; build one with the Dockerfile next to this script and push it"
[[ -n $tpu || -n $gpus ]] || die "give --tpu and --topology, or --gpus-per-node"
[[ -z $tpu || -z $gpus ]] || die "--tpu and --gpus-per-node exclude each other; give one of them"
whole_number --grace "$grace"
whole_number --max-restarts "$restarts"
for pair in ${selectors[@]+"${selectors[@]}"}; do
  [[ $pair == ?*=* ]] || die "--node-selector '$pair' is not KEY=VALUE"
done
(($#)) || die "there is no command to run; put it after --, as in -- llmos train configs/x.py"

if [[ -n $tpu ]]; then
  kind=tpu resource=google.com/tpu
  [[ $topology =~ ^[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?$ ]] \
    || die "--topology '$topology' is not a topology; write it as 4x4 or 2x2x4"
  whole_number --chips-per-host "$chips"
  total=$((${topology//x/*}))
  ((chips < total)) || chips=$total
  ((total % chips == 0)) \
    || die "--chips-per-host $chips does not divide the $total chips of $topology; use one that does"
  hosts=$((total / chips)) devices=$chips
  selectors+=("cloud.google.com/gke-tpu-accelerator=$tpu" "cloud.google.com/gke-tpu-topology=$topology")
else
  kind=gpu resource=nvidia.com/gpu
  whole_number --gpus-per-node "$gpus"
  whole_number --nodes "$nodes"
  hosts=$nodes devices=$gpus
fi

command=("$@")
template=$(dirname "${BASH_SOURCE[0]}")/jobset.yaml
if [[ $dry_run == yes ]]; then
  render <"$template"
else
  render <"$template" | kubectl apply -f -
fi
