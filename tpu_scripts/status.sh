#!/usr/bin/env bash
# What there is under a name: the queued resource, the VMs, and on each worker the run and the last line of its log.
#
#   status.sh --name mine --zone us-west4-a
#
#   --brief    one word: READY, or the state of the first VM that is not; NOT_FOUND

# shellcheck source=tpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

opt_brief=''
tpu_parse "$FLAGS" "$SWITCHES brief" "" "$@"
[ "${#REST[@]}" -eq 0 ] || tpu_wrong "status.sh takes nothing after --"
tpu_check

queue=NOT_FOUND
if tpu_look queue "$opt_name"; then
  tpu_ours "$opt_name"
  queue=$LOOK_STATE
  [ -n "$SLICES" ] || [ -n "$opt_dry_run" ] || SLICES=$LOOK_SLICES
fi
tpu_count_slices
tpu_name_nodes
if [ -n "$opt_brief" ]; then
  tpu_state
  # A queued resource that has not been granted yet has no VM, and is not gone.
  [ "$STATE" != NOT_FOUND ] || tpu_dead "$queue" || [ "$queue" = ACTIVE ] || STATE=$queue
  [ -n "$opt_dry_run" ] || echo "$STATE"
  exit 0
fi

[ "$queue" = NOT_FOUND ] || [ -n "$opt_dry_run" ] || printf '%-24s queued resource %s\n' "$opt_name" "$queue"
there=''
for node in "${NODES[@]}"; do
  if ! tpu_look vm "$node"; then
    printf '%-24s NOT_FOUND\n' "$node"
    continue
  fi
  tpu_ours "$node"
  there=1
  [ -n "$opt_dry_run" ] || printf '%-24s %s, %s, %s worker(s)\n' "$node" "$LOOK_TYPE" "$LOOK_STATE" "$LOOK_WORKERS"
  [ "$LOOK_STATE" = READY ] || continue
  if [ -n "$opt_dry_run" ]; then
    tpu_ssh "$node" all 'bash jaxft/worker.sh status'
  else
    tpu_ssh "$node" all 'bash jaxft/worker.sh status' 2>/dev/null | sed -n "s/^@jaxft \([0-9]*\) /  worker \1: /p" | sort -t' ' -k4n \
      || printf '  its workers do not answer; setup.sh has perhaps not run\n'
  fi
done
[ -n "$there" ] || [ "$queue" != NOT_FOUND ] || tpu_wrong "$opt_name: nothing of that name in $opt_zone"
