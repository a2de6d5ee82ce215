#!/usr/bin/env bash
# What the other scripts ask of one worker of a TPU; setup.sh and run.sh copy it there. It keeps to ~/jaxft:
# venv, source, work (where runs start and --upload lands), job (the run: arguments, log, pid, exit), jobs (those before).
#
#   worker.sh install SOURCE EXTRAS PYTHON
#   worker.sh devices CHIPS_HERE CHIPS_OF_A_SLICE SLICE SLICES COORDINATOR
#   worker.sh start SLICE SLICES COORDINATOR [ARGUMENT …]
#   worker.sh follow | finish SECONDS | status | stop | log
#   worker.sh list FOLDER | pack FOLDER

set -euo pipefail
umask 077
cd "$HOME/jaxft"
PAUSE=${JAXFT_POLL_SECONDS:-1}

metadata() { # KEY: an attribute of this VM
  curl -sf -m 5 -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
worker_number() { metadata agent-worker-number || { hostname | sed -n 's/.*-w-\([0-9]*\)$/\1/p' | grep . || echo 0; }; }
tell() { printf '@jaxft %s %s\n' "$(worker_number)" "$*"; } # one short line: those of many workers come mixed
stop() {
  local code=$1
  shift
  printf 'error: worker %s: %s\n' "$(worker_number)" "$*" >&2
  exit "$code"
}

running() { # is there a run that has not ended, in a process that is really it?
  [ -f job/pid ] && [ ! -f job/exit ] && kill -0 "$(cat job/pid)" 2>/dev/null \
    && { [ ! -r "/proc/$(cat job/pid)/cmdline" ] || tr '\0' ' ' <"/proc/$(cat job/pid)/cmdline" | grep -q 'worker\.sh job'; }
}

make_venv() { # VERSION
  local candidate
  for candidate in "python$1" python3; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$candidate" -m venv --clear venv
      return
    fi
  done
  # Google's images have Ubuntu 22.04's Python 3.10, which JAX no longer takes.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv
  python3 -m uv venv --quiet --clear --seed --python "$1" venv
}

install() { # SOURCE EXTRAS PYTHON
  local what=$1 stamp
  ! running || stop 2 "a run is going on here; its packages are left as they are (run.sh --attach, or --stop)"
  if [ "$1" = source.tar.gz ]; then
    rm -rf source
    mkdir source
    tar -xzf source.tar.gz -C source
    what=./source
    stamp=$(cd source && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
  fi
  stamp="$* ${stamp-}"
  if [ "$what" = ./source ] && [ -f venv/stamp ] && [ "$(cat venv/stamp)" = "$stamp" ]; then
    tell installed already
    return
  fi
  [ -x venv/bin/python ] || make_venv "$3"
  rm -f venv/stamp
  if [ "$what" = ./source ]; then what="./source[$2]"; else what="jaxft[$2] @ $1"; fi
  venv/bin/python -m pip install --quiet --upgrade "$what"
  mkdir -p work
  printf %s "$stamp" >venv/stamp
  tell installed
}

# A multi-slice queued resource tells each VM of the others in its metadata (tpu-env), which JAX and libtpu read. Where
# it does not, the environment has to.
join_slices() { # SLICE SLICES COORDINATOR
  [ "$2" -gt 1 ] || return 0
  if metadata tpu-env 2>/dev/null | grep -q '^ *MEGASCALE_NUM_SLICES'; then return 0; fi
  export MEGASCALE_SLICE_ID=$1 MEGASCALE_NUM_SLICES=$2 MEGASCALE_COORDINATOR_ADDRESS=$3:8081 MEGASCALE_PORT=8081
}

devices() { # CHIPS_HERE CHIPS_OF_A_SLICE SLICE SLICES COORDINATOR; "any" where nobody said
  local here all answer wanted=any
  join_slices "$3" "$4" "$5"
  [ "$2" = any ] || wanted=$(($2 * $4))
  # A v4 or v5p chip is one device: its two TensorCores work as one.
  answer=$(timeout 300 venv/bin/python -c 'import sys, jax
if sys.argv[1] == "True": jax.distributed.initialize()
assert jax.default_backend() == "tpu", f"JAX runs on {jax.default_backend()}"
print(jax.local_device_count(), jax.device_count())' "$([ "$1" = "$wanted" ] && echo False || echo True)" | tail -n 1) \
    || stop 1 "JAX found no TPU (above)"
  read -r here all <<<"$answer"
  tell "$here chips here, $all in all"
  [ "$1" = any ] || [ "$1" = "$here" ] || stop 1 "JAX sees $here chips here; expected $1"
  [ "$wanted" = any ] || [ "$wanted" = "$all" ] || stop 1 "JAX sees $all chips in all; expected $wanted"
}

start() { # SLICE SLICES COORDINATOR ARGUMENTS…
  mkdir -p work jobs
  printf '%s\0' "$@" >arguments.new
  if running; then
    rm -f token
    cmp -s arguments.new job/arguments || stop 2 "another run is going on here; run.sh --attach follows it, --stop ends it"
    tell running already
    return
  fi
  [ -x venv/bin/python ] || { rm -f token && stop 2 "jaxft is not installed here; setup.sh first"; }
  [ ! -d job ] || mv job "jobs/$(date +%Y%m%d-%H%M%S)-$$"
  mkdir job
  mv arguments.new job/arguments
  : >job/log
  setsid nohup bash "$HOME/jaxft/worker.sh" job "$@" >>job/log 2>&1 </dev/null &
  echo $! >job/pid
  tell started
}

job() { # as start; runs without a terminal until it ends, and keeps its exit code
  local status=0
  join_slices "$1" "$2" "$3"
  shift 3
  if [ -f token ]; then
    HF_TOKEN=$(cat token)
    rm -f token
    export HF_TOKEN
  fi
  trap : TERM # jaxft gets it too, saves, and says 75
  cd work
  ../venv/bin/python -u -m jaxft.train "$@" || status=$?
  echo "$status" >../job/exit.new
  mv ../job/exit.new ../job/exit
}

follow() {
  [ -d job ] || stop 2 "no run has been started here"
  local pid
  pid=$(cat job/pid)
  while [ ! -f job/exit ] && kill -0 "$pid" 2>/dev/null && kill -0 $$ 2>/dev/null; do sleep "$PAUSE"; done &
  tail -n 200 -s "$PAUSE" --pid=$! -f job/log
}

state() { # as STATE and CODE
  STATE=running CODE=-
  if [ ! -d job ]; then
    STATE=idle
  elif [ -f job/exit ]; then
    STATE=ended CODE=$(cat job/exit)
  elif ! running; then
    sleep "$PAUSE" # it may be between its last breath and its exit code, or between fork and exec
    if [ -f job/exit ]; then
      STATE=ended CODE=$(cat job/exit)
    elif ! running; then
      STATE=killed CODE=137
    fi
  fi
}

finish() { # SECONDS: what became of the run, waiting so long for it
  local until=$((SECONDS + $1))
  state
  while [ "$STATE" = running ] && [ "$SECONDS" -lt "$until" ]; do
    sleep "$PAUSE"
    state
  done
  tell "$STATE $CODE"
}

status() {
  state
  tell "$STATE $CODE $(tail -n 20 job/log 2>/dev/null | tr '\r' '\n' | tr -cd '[:print:]\n' | grep . | tail -n 1 | cut -c1-200)"
}

end() {
  running || { tell "no run" && return; }
  kill -TERM -- "-$(cat job/pid)"
  tell "told to save and stop"
}

folder() { # of a run, as typed: from work, or from /
  cd work
  [ -d "$1" ] || stop 2 "$1: no such folder in ~/jaxft/work; there are: $(find . -maxdepth 2 -mindepth 1 -type d | sort | head -n 20 | tr '\n' ' ')"
  cd "$1"
}

case ${1-} in
  install | devices | start | job | follow | finish | status) "$@" ;;
  stop) end ;;
  log) cat job/log ;;
  list) # size, time in UTC, path; each ends with NUL, because a file's name may have anything else in it
    folder "$2"
    TZ=UTC0 find . -type f -printf '%s %TY-%Tm-%TdT%TH:%TM:%TS %P\0'
    ;;
  pack) # the files named on stdin, as tar; one that grows meanwhile (a log) is no failure
    folder "$2"
    tar -c --null --verbatim-files-from -T - || [ $? -eq 1 ]
    ;;
  *) stop 2 "${1-}: unknown" ;;
esac && exit # here, so that nothing more is read of a file that run.sh may have replaced meanwhile
