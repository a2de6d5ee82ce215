#!/usr/bin/env bash
# Creates a TPU VM, a pod slice or several slices, and waits until they are ready. What exists already is left as it is.
#
#   create.sh --name mine --zone us-west4-a --type v5e-8
#   create.sh --name mine --zone us-west4-a --type 2xv5e-16 --spot --valid-until 12h
#
#   --type TYPE               needed
#   --spot                    cheaper, and may be taken away at any time (see keep_running.sh)
#   --queued                  ask through a queued resource, which waits for capacity; several slices always do
#   --reserved                from a reservation of the project
#   --valid-until DURATION    give up where a queued resource has not been granted by then, such as 6h
#   --wait SECONDS            how long to wait for a queued resource; default 86400, 0 does not wait
#   --runtime-version NAME    default: the one that Google names for the kind
#   --network, --subnetwork, --service-account NAME; --internal-ips gives the VMs no public address

# shellcheck source=tpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

opt_spot='' opt_queued='' opt_reserved='' opt_valid_until='' opt_wait=86400 opt_runtime_version='' opt_network=''
opt_subnetwork='' opt_service_account='' opt_internal_ips=''
tpu_parse "$FLAGS valid-until wait runtime-version network subnetwork service-account" \
  "$SWITCHES spot queued reserved internal-ips" "" "$@"
[ "${#REST[@]}" -eq 0 ] || tpu_wrong "create.sh takes nothing after --"
[ -n "$opt_type" ] || tpu_wrong "--type: which slice, such as v5e-8 or 2xv5e-16?"
tpu_check
tpu_matches "$opt_wait" '[0-9]{1,7}' wait "seconds"
[ -z "$opt_valid_until" ] || tpu_matches "$opt_valid_until" '([0-9]+[smhdw])+' valid-until "a duration, such as 6h"
[ -z "$opt_spot" ] || [ -z "$opt_reserved" ] || tpu_wrong "--spot and --reserved: give one of them"
[ "$SLICES" -eq 1 ] || opt_queued=1
[ -z "$opt_valid_until" ] || [ -n "$opt_queued" ] || tpu_wrong "--valid-until: only queued resources have it; add --queued"
tpu_name_nodes
tpu_say "$opt_name: $SLICES slice(s) of $ACCELERATOR, $TOPOLOGY: $CHIPS chips on $HOSTS worker(s) each"

OPTIONS=("--accelerator-type=$ACCELERATOR" "--labels=jaxft=$opt_name,jaxft_owner=$OWNER,jaxft_slices=$SLICES" "${WHERE[@]}")
[ -z "$opt_spot" ] || OPTIONS+=(--spot)
[ -z "$opt_reserved" ] || OPTIONS+=(--reserved)
[ -z "$opt_internal_ips" ] || OPTIONS+=(--internal-ips)
[ -z "$opt_network" ] || OPTIONS+=("--network=$opt_network")
[ -z "$opt_subnetwork" ] || OPTIONS+=("--subnetwork=$opt_subnetwork")
[ -z "$opt_service_account" ] || OPTIONS+=("--service-account=$opt_service_account")
VERSION=${opt_runtime_version:-$RUNTIME}

if [ -n "$opt_queued" ]; then
  KIND_OF_THING=queue
  REQUEST=(gcloud compute tpus queued-resources create "$opt_name" "--runtime-version=$VERSION" "${OPTIONS[@]}")
  if [ "$SLICES" -gt 1 ]; then
    REQUEST+=("--node-count=$SLICES" "--node-prefix=$opt_name")
  else
    REQUEST+=("--node-id=$opt_name")
  fi
  [ -z "$opt_valid_until" ] || REQUEST+=("--valid-until-duration=$opt_valid_until")
else
  KIND_OF_THING=vm
  REQUEST=(gcloud compute tpus tpu-vm create "$opt_name" "--version=$VERSION" "${OPTIONS[@]}")
fi
REQUEST+=(--quiet)

# Says what has been made and how to be rid of it; for every end but a good one.
tell_what_exists() {
  local thing exists='' things=()
  [ -z "$opt_queued" ] || things+=("queue:$opt_name")
  for thing in "${NODES[@]}"; do things+=("vm:$thing"); done
  for thing in "${things[@]}"; do
    if LOOK_SOFTLY=1 tpu_look "${thing%%:*}" "${thing#*:}"; then
      exists="$exists${exists:+, }${thing%%:*} ${thing#*:} ($LOOK_STATE)"
    elif [ $? -eq 2 ]; then
      exists="$exists${exists:+, }${thing%%:*} ${thing#*:} (perhaps; gcloud cannot say)"
    fi
  done
  if [ -n "$exists" ]; then
    tpu_say "exists now, and may cost: $exists; to delete: ${BASH_SOURCE[0]%/*}/delete.sh $(tpu_line "${SHARED[@]}")"
  else
    tpu_say "as far as gcloud says, nothing has been made"
  fi
  tpu_say "the same command goes on from here"
}

# What is there under the name is either what is asked for, or the end of it.
check_existing() {
  tpu_ours "$opt_name"
  [ -z "$LOOK_TYPE" ] || [ "$LOOK_TYPE" = "$ACCELERATOR" ] \
    || tpu_wrong "$opt_name: exists as $LOOK_TYPE, not $ACCELERATOR; delete it first, or take another name"
  [ "${LOOK_SLICES:-1}" = "$SLICES" ] \
    || tpu_wrong "$opt_name: exists with $LOOK_SLICES slice(s), not $SLICES; delete it first, or take another name"
  ! tpu_dead "$LOOK_STATE" || tpu_stop 75 "$opt_name is $LOOK_STATE; delete it and create it again (keep_running.sh does)"
}

wait_until_active() {
  local waited=0 unseen=0 status pause=${JAXFT_TPU_POLL_SECONDS:-30} before=''
  while :; do
    status=0
    LOOK_SOFTLY=1 tpu_look queue "$opt_name" || status=$?
    [ "$status" -ne 1 ] || tpu_stop 75 "$opt_name: its queued resource is gone"
    if [ "$status" -eq 2 ]; then # a network that is away for a moment does not end the wait of a night
      unseen=$((unseen + 1))
      [ "$unseen" -lt 5 ] || tpu_stop 1 "$opt_name: gcloud could not say five times in a row how it stands"
    else
      unseen=0
      ! tpu_dead "$LOOK_STATE" || tpu_stop 75 "$opt_name: its queued resource is $LOOK_STATE"
      [ "$LOOK_STATE" = "$before" ] || tpu_say "$opt_name: $LOOK_STATE"
      before=$LOOK_STATE
      [ "$LOOK_STATE" != ACTIVE ] || return 0
    fi
    [ "$waited" -lt "$opt_wait" ] || tpu_stop 75 "$opt_name: still ${before:-unseen} after $waited s"
    sleep "$pause"
    waited=$((waited + (pause > 0 ? pause : 1)))
  done
}

if [ -n "$opt_dry_run" ]; then
  tpu_ask "$KIND_OF_THING" "$opt_name"
  printf '%s || ' "$(tpu_line "${ASK[@]}")"
  tpu_line "${REQUEST[@]}"
  if [ -n "$opt_queued" ] && [ "$opt_wait" -gt 0 ]; then
    echo "# repeated until it says ACTIVE:"
    tpu_look queue "$opt_name"
  fi
  exit 0
fi

ended() {
  local code=$?
  trap - EXIT
  [ "$code" -eq 0 ] || tell_what_exists
  exit "$code"
}
trap 'exit 130' INT TERM
if tpu_look "$KIND_OF_THING" "$opt_name"; then
  check_existing
  tpu_say "$opt_name exists ($LOOK_STATE)"
  [ "$KIND_OF_THING" = queue ] || [ "$LOOK_STATE" = READY ] || tpu_stop 75 "$opt_name is $LOOK_STATE, not READY yet; try again"
  trap ended EXIT
else
  trap ended EXIT
  tpu_do "${REQUEST[@]}" >&2 || tpu_stop 1 "$opt_name: gcloud could not create it (exit $?)"
fi
[ -z "$opt_queued" ] || [ "$opt_wait" -eq 0 ] || wait_until_active
tpu_say "next: ${BASH_SOURCE[0]%/*}/setup.sh $(tpu_line "${SHARED[@]}")"
