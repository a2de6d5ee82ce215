#!/usr/bin/env bash
# Deletes what create.sh made under a name: the queued resource and every VM. Anything else of that name is refused, and
# nothing at all is deleted where gcloud cannot say whose it is. The VMs' disks go with them: fetch.sh first.
#
#   delete.sh --name mine --zone us-west4-a
#
#   --yes    do not ask

# shellcheck source=tpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

opt_yes=''
tpu_parse "$FLAGS" "$SWITCHES yes" "" "$@"
[ "${#REST[@]}" -eq 0 ] || tpu_wrong "delete.sh takes nothing after --"
tpu_check

# Deletes one thing when a last look says that it is there and ours.
remove() { # vm|queue NAME
  local command=(gcloud compute tpus tpu-vm delete "$2" "${WHERE[@]}" --quiet)
  [ "$1" = vm ] || command=(gcloud compute tpus queued-resources delete "$2" "${WHERE[@]}" --force --quiet)
  if [ -n "$opt_dry_run" ]; then
    tpu_ask "$1" "$2"
    printf "%s | grep -q '^%s|%s|' && " "$(tpu_line "${ASK[@]}")" "$opt_name" "$OWNER"
    tpu_line "${command[@]}"
  elif tpu_look "$1" "$2"; then
    tpu_ours "$2"
    tpu_do "${command[@]}" >&2 || tpu_stop 1 "$2: gcloud could not delete it (exit $?); it may still cost; the same command tries again"
    tpu_say "deleted $2"
  fi
}

found=()
if tpu_look queue "$opt_name"; then
  tpu_ours "$opt_name"
  found+=("queued resource $opt_name ($LOOK_STATE)")
  [ -n "$SLICES" ] || [ -n "$opt_dry_run" ] || SLICES=$LOOK_SLICES
fi
tpu_count_slices
tpu_is_count "$SLICES" "slices (of the label)"
tpu_name_nodes
for node in "${NODES[@]}"; do
  if tpu_look vm "$node"; then
    tpu_ours "$node"
    found+=("VM $node ($LOOK_STATE)")
  fi
done

if [ -z "$opt_dry_run" ]; then
  [ "${#found[@]}" -gt 0 ] || { tpu_say "$opt_name: nothing to delete in $opt_zone" && exit 0; }
  for thing in "${found[@]}"; do tpu_say "$thing"; done
  if [ -z "$opt_yes" ]; then
    printf 'Delete %s, with its disks? [y/N] ' "$opt_name" >&2
    answer=''
    read -r answer || true
    [ -t 0 ] || tpu_say ''
    [[ $answer == [yY] || $answer == yes ]] || tpu_wrong "nothing deleted: the answer was not y (--yes does not ask)"
  fi
fi
remove queue "$opt_name"
for node in "${NODES[@]}"; do remove vm "$node"; done
