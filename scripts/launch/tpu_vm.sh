#!/usr/bin/env bash
# Runs one llmos command on every host of a Cloud TPU slice and follows the log of the first host.
#
#   tpu_vm.sh NAME --zone ZONE --project PROJECT [options] -- llmos train configs/x.py --workdir gs://bucket/run
#
#   --create TYPE       first ask for the slice as a queued resource (v6e-16, v5p-8, ...) and wait until it is there
#   --runtime VERSION   with --create: the runtime image; default: the one for TYPE
#   --spot              with --create: a spot slice, cheaper, which can be taken away at any time
#   --repo DIR          the checkout that is copied to the hosts and installed; default: the one this script is in
#   --follow            show the log of the run in progress
#   --stop              ask the run in progress to save and stop, and wait until it has
#   --delete            give the slice back
#   --dry-run           print the commands and run none of them
#
# The command runs detached: closing this terminal does not end it. On a host the checkout is in ~/llmos, the log in
# ~/llmos.log. The exit status is that of the command on the first host; 75 means stopped after saving.
set -euo pipefail

die() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}

name='' zone='' project='' type='' runtime='' spot=no action=run dry_run=no
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
while (($#)); do
  case $1 in
    --zone | --project | --create | --runtime | --repo)
      (($# > 1)) || die "$1 needs a value; see the head of this script"
      case $1 in
        --zone) zone=$2 ;;
        --project) project=$2 ;;
        --create) type=$2 ;;
        --runtime) runtime=$2 ;;
        --repo) repo=$2 ;;
      esac
      shift
      ;;
    --spot) spot=yes ;;
    --follow | --stop | --delete) action=${1#--} ;;
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
[[ -n $name ]] || die "the name of the TPU VM is missing; give it first"
[[ -n $zone ]] || die "--zone is missing; give the zone of $name, such as us-east5-b"
[[ -n $project ]] || die "--project is missing; give the Google Cloud project of $name"
[[ $action != run || $# -gt 0 ]] || die "there is no command to run; put it after --, as in -- llmos train configs/x.py"
[[ $action != run || -f $repo/pyproject.toml ]] || die "--repo $repo has no pyproject.toml; give a checkout of llmos"
if [[ -n $type && -z $runtime ]]; then
  case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) die "--create $type: no runtime is known for it; use v4-, v5litepod-, v5p- or v6e-, or give --runtime" ;;
  esac
fi

where=("--zone=$zone" "--project=$project")

quoted() { # as the shell reads it, in single quotes where it needs any
  case $1 in
    *[!a-zA-Z0-9_./:=,@%+-]* | '') printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

run() {
  if [[ $dry_run == yes ]]; then
    printf '%s' "$1"
    local argument
    for argument in "${@:2}"; do printf ' %s' "$(quoted "$argument")"; done
    echo
  else
    "$@"
  fi
}

on_hosts() { # WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

create() {
  local request=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime")
  [[ $spot == no ]] || request+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${request[@]}"
  local describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state)")
  if [[ $dry_run == yes ]]; then
    run "${describe[@]}"
    echo "# ... every 30 seconds until it says ACTIVE"
    return
  fi
  local state
  while state=$("${describe[@]}") && [[ $state != ACTIVE ]]; do
    [[ $state != FAILED && $state != SUSPEND* ]] || die "the slice is $state; run again with --delete, then --create"
    echo "waiting for $type: $state" >&2
    sleep 30
  done
}

install() {
  local bundle="${TMPDIR:-/tmp}/llmos-$name.tar.gz"
  run tar -C "$repo" --exclude-vcs '--exclude=./.*' --exclude=__pycache__ --exclude=./runs -czf "$bundle" .
  run gcloud compute tpus tpu-vm scp "$bundle" "$name:llmos.tar.gz" "${where[@]}" --worker=all
  # The images' own Python can be older than llmos needs; uv brings one.
  on_hosts all "if kill -0 \"\$(cat ~/llmos.pid 2>/dev/null)\" 2>/dev/null; then \
echo 'a run is in progress on this slice; use --follow or --stop' >&2; exit 2; fi; \
mkdir -p ~/llmos && tar -xzf ~/llmos.tar.gz -C ~/llmos && cd ~/llmos \
&& python3 -m pip install --quiet --user uv \
&& python3 -m uv venv --quiet --allow-existing --python 3.12 .venv \
&& python3 -m uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[tpu]'"
}

start() {
  local command='' argument
  for argument in "$@"; do command+="$(quoted "$argument") "; done
  # The trap keeps the shell alive while a stopped command saves, so that its exit status is written down.
  command=$(quoted "trap : TERM; ${command% }; echo \$? > ~/llmos.exit")
  on_hosts all "cd ~/llmos && rm -f ~/llmos.exit && export LLMOS_DISTRIBUTED=1 LLMOS_STOPPED_EXIT_CODE=75 PATH=\"\$HOME/llmos/.venv/bin:\$PATH\" \
&& { setsid nohup bash -c $command > ~/llmos.log 2>&1 < /dev/null & echo \$! > ~/llmos.pid; }"
}

follow() {
  on_hosts 0 "tail -n +1 --pid=\"\$(cat ~/llmos.pid)\" -F ~/llmos.log; \
exit \"\$(cat ~/llmos.exit 2>/dev/null || echo 1)\""
}

case $action in
  run)
    [[ -z $type ]] || create
    install
    start "$@"
    follow
    ;;
  follow) follow ;;
  stop) on_hosts all "pid=\$(cat ~/llmos.pid) && pkill -TERM -P \"\$pid\" && tail --pid=\"\$pid\" -f /dev/null" ;;
  delete) run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
esac
