#!/usr/bin/env bash
# Creates, sets up and runs, and does so again when the TPU is preempted, until the run has ended. Takes the flags of
# create.sh, setup.sh and run.sh. The run resumes from its newest checkpoint if --run.dir is on gs://; a VM's disk goes with it.
#
#   keep_running.sh --name mine --zone us-west4-a --type v5e-8 --spot --config gemma2_9b.py -- --run.dir gs://bucket/run
#
#   --max-restarts N     default 50
#   --backoff SECONDS    before the first restart; doubles up to 600, and begins anew after ten minutes of running; default 30
#
# Ends with the run's exit code where that is final (0, 2, 3, 130, or a defect); 75 when the restarts are used up. Deletes only
# what create.sh made under this name, and only when it has been preempted; what runs in the end stays: delete.sh.

# shellcheck source=tpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
opt_max_restarts=50 opt_backoff=30 opt_config=''
CREATE_FLAGS="valid-until wait runtime-version network subnetwork service-account" CREATE_SWITCHES="spot queued reserved internal-ips"
SETUP_FLAGS="checkout git ref extras python" SETUP_SWITCHES="no-check" RUN_SWITCHES="no-token"
tpu_parse "$FLAGS $CREATE_FLAGS $SETUP_FLAGS config max-restarts backoff" \
  "$SWITCHES $CREATE_SWITCHES $SETUP_SWITCHES $RUN_SWITCHES" upload "$@"
tpu_check
[ -n "$opt_type" ] || tpu_wrong "--type: which slice, such as v5e-8 or 2xv5e-16?"
[ -n "$opt_config" ] || tpu_wrong "--config: which config, such as gemma2_9b.py?"
tpu_matches "$opt_max_restarts" '[0-9]{1,6}' max-restarts "a whole number"
tpu_matches "$opt_backoff" '[0-9]{1,6}' backoff "seconds"

pass_on() { # "FLAGS" "SWITCHES": those of them that were given, as PASSED
  local flag variable
  PASSED=("${SHARED[@]}")
  [ -z "$opt_dry_run" ] || PASSED+=(--dry-run)
  for flag in $1; do
    variable=opt_${flag//-/_}
    [ -z "${!variable-}" ] || PASSED+=("--$flag" "${!variable}")
  done
  for flag in $2; do
    variable=opt_${flag//-/_}
    [ -z "${!variable-}" ] || PASSED+=("--$flag")
  done
}
pass_on "$CREATE_FLAGS" "$CREATE_SWITCHES" && CREATE=("$here/create.sh" "${PASSED[@]}")
pass_on "$SETUP_FLAGS" "$SETUP_SWITCHES" && SETUP=("$here/setup.sh" "${PASSED[@]}")
pass_on config "$RUN_SWITCHES" && RUN=("$here/run.sh" "${PASSED[@]}")
for ((i = 1; i < ${#REPEATED[@]}; i += 2)); do RUN+=(--upload "${REPEATED[i]}"); done
RUN+=(-- ${REST[@]+"${REST[@]}"})
[[ " ${REST[*]-} " == *gs://* ]] || tpu_say "note: no gs:// among the run's arguments; on a VM's own disk the checkpoints go with a preempted VM"

if [ -n "$opt_dry_run" ]; then
  "${CREATE[@]}"
  "${SETUP[@]}"
  "${RUN[@]}"
  tpu_say "# when it is preempted: delete.sh --yes, then all of this again, at most $opt_max_restarts times"
  exit 0
fi

restarts=0 pause=$opt_backoff
while :; do
  PART=run began=$SECONDS code=0
  "${CREATE[@]}" || { code=$? PART=create; }
  [ "$code" -ne 0 ] || "${SETUP[@]}" || { code=$? PART=setup; }
  [ "$code" -ne 0 ] || "${RUN[@]}" || code=$?
  case $code in 0 | 2 | 3 | 130) exit "$code" ;; esac
  state=$("$here/status.sh" "${SHARED[@]}" --brief) || state=UNKNOWN
  # A run that fails on a TPU that is there would fail again; where the TPU is gone, that is why.
  [ "$code" -eq 75 ] || [ "$PART" != run ] || [ "$state" = UNKNOWN ] || tpu_dead "$state" \
    || tpu_stop "$code" "the run failed with $code on a TPU that is $state; it is left as it is (delete.sh)"
  [ "$restarts" -lt "$opt_max_restarts" ] || tpu_stop 75 "$opt_name: $PART ended with $code; all $opt_max_restarts restarts are used up"
  restarts=$((restarts + 1))
  [ $((SECONDS - began)) -lt 600 ] || pause=$opt_backoff
  tpu_say "$opt_name is $state after $PART ended with $code; restart $restarts of $opt_max_restarts in $pause s"
  sleep "$pause"
  pause=$((pause * 2 < 600 ? pause * 2 : 600))
  if tpu_dead "$state"; then "$here/delete.sh" "${SHARED[@]}" --yes || [ $? -ne 2 ] || exit 2; fi
done
