#!/usr/bin/env bash
# Trains on all workers of a TPU: starts the same command on each, follows worker 0's log, and ends with the run's exit code.
# The run goes on when the connection is lost or this is interrupted; the same command follows it again.
#
#   run.sh --name mine --zone us-west4-a --config gemma2_9b.py -- --run.dir gs://bucket/run --optim.epochs 2
#   run.sh --name mine --zone us-west4-a --config my.py --upload train.jsonl -- --data.files train.jsonl
#
#   --config FILE    a file here, which is copied there, or the name of one in jaxft's configs/
#   --upload PATH    copied into the folder where the run starts; may be repeated
#   -- …             given to jaxft.train as it stands
#   --attach         follow the run that is there
#   --stop           tell it to save and stop (it ends with 75)
#   --no-token       do not send HF_TOKEN. Otherwise it goes, where it is set, as a file that only you can read, which is gone
#                    again once the run has read it; no command line and no log has it
#
# Exit codes are jaxft's: 0 done, 2 a mistake of yours, 3 out of memory or disk, 75 preempted or connection lost: run the same
# command again, 130 interrupted.

# shellcheck source=tpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
opt_config='' opt_attach='' opt_stop='' opt_no_token=''
tpu_parse "$FLAGS config" "$SWITCHES attach stop no-token" upload "$@"
tpu_check
[ -n "$opt_config$opt_attach$opt_stop" ] || tpu_wrong "--config: which config, such as gemma2_9b.py?"
[ -z "$opt_attach$opt_stop" ] || [ -z "$opt_config" ] || tpu_wrong "--attach and --stop take no --config"
CONFIG=$opt_config FILES=("$here/worker.sh")
if [ -f "$opt_config" ]; then
  tpu_check_local config "$opt_config"
  CONFIG=./${opt_config##*/}
  FILES+=("$opt_config")
fi
for ((i = 1; i < ${#REPEATED[@]}; i += 2)); do
  tpu_check_local upload "${REPEATED[i]}"
  FILES+=("${REPEATED[i]}")
done
tpu_find

lost() { # MESSAGE: what to do after a command could not reach a VM depends on whether it is still there
  tpu_state
  ! tpu_dead "$STATE" || tpu_stop 75 "$opt_name is $STATE: preempted; keep_running.sh goes on, or create, set up and run again"
  tpu_stop 75 "$1; the TPU is $STATE and the run, if it was started, goes on: the same command follows it again"
}
on_all() { # COMMAND…: on every worker of every slice
  local node
  for node in "${NODES[@]}"; do tpu_ssh "$node" all "$(tpu_remote bash jaxft/worker.sh "$@")"; done
}

start_everywhere() {
  local slice node status
  for node in "${NODES[@]}"; do
    tpu_ssh "$node" all 'mkdir -p -m 700 jaxft jaxft/work' || lost "$node: SSH did not get through"
    tpu_copy "$node" jaxft/ "${FILES[0]}" || lost "$node: copying failed"
    [ "${#FILES[@]}" -eq 1 ] || tpu_copy "$node" jaxft/work/ "${FILES[@]:1}" || lost "$node: copying failed"
  done
  [ -n "$opt_no_token" ] || [ -z "${HF_TOKEN-}" ] || send_token
  for slice in "${!NODES[@]}"; do
    status=0
    tpu_ssh "${NODES[slice]}" all "$(tpu_remote bash jaxft/worker.sh start "$slice" "$SLICES" "$COORDINATOR" \
      --config "$CONFIG" ${REST[@]+"${REST[@]}"})" || status=$?
    [ "$status" -eq 0 ] && continue
    [ "$slice" -eq 0 ] || tpu_say "started on ${NODES[*]:0:slice}, not on ${NODES[slice]}: ${BASH_SOURCE[0]} $(tpu_line "${SHARED[@]}") --stop ends those"
    [ "$status" -ne 2 ] || tpu_stop 2 "${NODES[slice]}: not started (above)"
    lost "${NODES[slice]}: not started on every worker"
  done
}

send_token() {
  local node
  tpu_make_outbox
  if [ -n "$opt_dry_run" ]; then
    # shellcheck disable=SC2016  # the variable is for the shell that this is pasted into
    printf '(umask 077 && printf %%s "$HF_TOKEN" >%s)\n' "$(tpu_line "$OUTBOX/token")"
  else
    trap 'rm -f "$OUTBOX/token"' EXIT
    (umask 077 && rm -f "$OUTBOX/token" && printf %s "$HF_TOKEN" >"$OUTBOX/token")
  fi
  for node in "${NODES[@]}"; do tpu_copy "$node" jaxft/ "$OUTBOX/token" || lost "$node: copying failed"; done
  tpu_do rm -f "$OUTBOX/token"
}

follow() {
  local attempt=1 began
  while :; do
    began=$SECONDS
    tpu_ssh "${NODES[0]}" 0 'bash jaxft/worker.sh follow' && return
    [ $((SECONDS - began)) -lt 60 ] || attempt=1
    tpu_state
    [ "$STATE" = READY ] && [ "$attempt" -lt 5 ] || lost "the connection is lost"
    tpu_say "the connection is lost; following again in ${JAXFT_TPU_RETRY_SECONDS:-15} s (attempt $attempt of 5)"
    sleep "${JAXFT_TPU_RETRY_SECONDS:-15}"
    attempt=$((attempt + 1))
  done
}

# The exit code of the whole: what one worker's user, memory or disk is to blame for comes first, then "run it again".
combined() { # CODES…
  local wanted code
  for wanted in 2 3 130 75; do
    for code in "$@"; do [ "$code" != "$wanted" ] || { echo "$wanted" && return; }; done
  done
  for code in "$@"; do [ "$code" = 0 ] || { echo "$code" && return; }; done
  echo 0
}

finish() {
  local slice said word number state code rest codes=() seen
  for slice in "${!NODES[@]}"; do
    if [ -n "$opt_dry_run" ]; then
      tpu_ssh "${NODES[slice]}" all 'bash jaxft/worker.sh finish 120'
      continue
    fi
    said=$(tpu_ssh "${NODES[slice]}" all 'bash jaxft/worker.sh finish 120') || lost "${NODES[slice]}: not every worker says how it ended"
    seen=0
    while read -r word number state code rest; do
      [ "$word" = @jaxft ] || continue
      seen=$((seen + 1))
      tpu_say "${NODES[slice]} worker $number: $state${code:+ $code}"
      [ "$state" = ended ] || code=1
      codes+=("$code")
    done <<<"$said"
    [ "$seen" -ge "${WORKERS[slice]}" ] || lost "${NODES[slice]}: $seen of ${WORKERS[slice]} workers say how they ended"
  done
  [ -z "$opt_dry_run" ] || exit 0
  exit "$(combined "${codes[@]}")"
}

if [ -n "$opt_stop" ]; then
  on_all stop || lost "not every worker was told"
  exit 0
fi
[ -n "$opt_attach" ] || start_everywhere
trap 'tpu_say "the run goes on; follow it with ${BASH_SOURCE[0]} $(tpu_line "${SHARED[@]}") --attach, end it with --stop"; exit 130' INT
follow
finish
