#!/usr/bin/env bash
# Runs a program on all hosts of a slice of Cloud TPU VMs, by gcloud: see docs/pods.md.
# shellcheck disable=SC2016 # what is in single quotes expands on the hosts
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [FLAGS] [-- PROGRAM ARGUMENTS]

Commands, in the order of their use:
  create   asks for the slice: --type=v5litepod-32, --version=v2-alpha-tpuv5-lite
  copy     copies the files that git knows to every host, and installs there
  run      starts PROGRAM on every host, and returns: run ... -- scripts/train.py --gin_file=...
  tail     follows the log of one host: --worker=0
  stop     ends the program on every host
  delete   gives the slice back: until then it is paid for

Flags:
  --name, --zone     of the slice
  --type, --version  for create: the accelerator type and the image
  --worker           for tail: the host whose log is shown (default: 0)
  --python           for copy: Python 3.11 or newer (default: python3.11, installed if need be)
  --dry_run          prints the gcloud commands and runs none (DRY_RUN=1 does the same)
END
}

fail() {
  echo "error: $1 (--help shows the usage)" >&2
  exit 2
}

root=$(dirname "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)")
dry=${DRY_RUN:-0}
command=${1:-}
name='' zone='' type='' version='' worker=0 python=python3.11
case $command in
  create | copy | run | tail | stop | delete) shift ;;
  --help | -h | help) usage && exit 0 ;;
  '') usage >&2 && exit 2 ;;
  *) fail "'$command' is none of create, copy, run, tail, stop, delete" ;;
esac
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --dry_run) dry=1 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --) shift && break ;;
    *) fail "unknown argument '$1': a program and its flags go behind --" ;;
  esac
  shift
done
[[ -n $name && -n $zone ]] || fail "$command needs --name=NAME and --zone=ZONE"
[[ $command == run || $# -eq 0 ]] || fail "$command takes no program"

# gcloud's command for TPU VMs; printed instead in a dry run.
tpu_vm() {
  local verb=$1
  shift
  if [[ $dry == 0 ]]; then
    gcloud compute tpus tpu-vm "$verb" "$@" --zone="$zone"
  else
    local line="gcloud compute tpus tpu-vm $verb" argument
    for argument in "$@" --zone="$zone"; do
      [[ $argument =~ ^[A-Za-z0-9_./:=-]+$ ]] || argument="'${argument//\'/\'\\\'\'}'"
      line+=" $argument"
    done
    echo "$line"
  fi
}

# Runs a line of shell on a host, or on all at once, in the project's folder there.
on_hosts() {
  tpu_vm ssh "$name" --worker="$1" --command="set -e; mkdir -p t5x_lite/logs; cd t5x_lite; $2"
}

case $command in
  create)
    [[ -n $type && -n $version ]] || fail "create needs --type=TYPE and --version=IMAGE"
    tpu_vm create "$name" --accelerator-type="$type" --version="$version"
    ;;
  copy)
    files=$(mktemp -d)
    trap 'rm -rf "$files"' EXIT
    archive=$files/t5x_lite.tar.gz
    git -C "$root" ls-files -z | tar -C "$root" --null -T - -czf "$archive"
    if [[ $dry != 0 ]]; then archive=t5x_lite.tar.gz; fi
    tpu_vm scp "$archive" "$name:t5x_lite.tar.gz" --worker=all
    install="tar -xzf ../t5x_lite.tar.gz"
    install+=" && { command -v $python >/dev/null || { sudo apt-get -qq update"
    install+=" && sudo apt-get -qq install -y $python-venv make; }; }"
    install+=" && make install PYTHON=$python && .venv/bin/pip install --quiet 'jax[tpu]'"
    on_hosts all "$install"
    ;;
  run)
    [[ $# -gt 0 ]] || fail "run needs a program: run ... -- scripts/train.py --gin_file=FILE"
    program=$(printf ' %q' "$@")
    # In a session of its own, so that it outlives the connection and `stop` ends its workers too.
    start='if [ -e logs/pid ] && kill -0 "$(cat logs/pid)" 2>/dev/null; then'
    start+=' echo "error: a program is running here: stop it first" >&2; exit 1; fi;'
    start+=" setsid nohup .venv/bin/python$program >logs/log 2>&1 </dev/null &"
    start+=' echo $! >logs/pid'
    on_hosts all "$start"
    ;;
  tail) on_hosts "$worker" "tail -n 50 -F logs/log" ;;
  stop)
    end='if [ -e logs/pid ]; then kill -- "-$(cat logs/pid)" 2>/dev/null || true; rm -f logs/pid; fi'
    on_hosts all "$end"
    ;;
  delete) tpu_vm delete "$name" --quiet ;;
esac
