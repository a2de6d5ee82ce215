#!/usr/bin/env bash
# Installs jaxft on every worker of a TPU, and counts the chips that JAX sees on each. Running it again renews what differs.
#
#   setup.sh --name mine --zone us-west4-a
#   setup.sh --name mine --zone us-west4-a --git https://github.com/ME/jaxft --ref main
#
#   --checkout FOLDER    the jaxft to install; default: the checkout of this script, as it stands
#   --git URL --ref REF  install from there instead
#   --extras LIST        default: tpu
#   --python VERSION     default: 3.12, through uv where the VM has no Python from 3.11
#   --no-check           do not count the chips

# shellcheck source=tpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
opt_checkout=${here%/*} opt_git='' opt_ref='' opt_extras=tpu opt_python=3.12 opt_no_check=''
tpu_parse "$FLAGS checkout git ref extras python" "$SWITCHES no-check" "" "$@"
[ "${#REST[@]}" -eq 0 ] || tpu_wrong "setup.sh takes nothing after --"
tpu_check
tpu_matches "$opt_extras" '[a-z]+(,[a-z]+)*' extras "names with commas between, such as tpu,eval"
tpu_matches "$opt_python" '3\.(1[1-9]|[2-9][0-9])' python "3.11 or newer"
[ -z "$opt_ref" ] || [ -n "$opt_git" ] || tpu_wrong "--ref: of which --git URL?"
if [ -n "$opt_git" ]; then
  SOURCE=git+$opt_git${opt_ref:+@$opt_ref}
else
  [ -f "$opt_checkout/pyproject.toml" ] || tpu_wrong "--checkout: $(printf %q "$opt_checkout"): no pyproject.toml in it"
  SOURCE=source.tar.gz
fi
tpu_find
if [ -z "${HOST_CHIPS-}" ] && [ -z "$opt_dry_run" ]; then # without --type: what gcloud says that it is
  slices=$SLICES
  tpu_read_type "$LOOK_TYPE"
  SLICES=$slices
fi

failed() { # NODE WHAT
  tpu_stop "$STATUS" "$1: $2; the TPU is up and costs: run setup.sh again, or ${BASH_SOURCE[0]%/*}/delete.sh $(tpu_line "${SHARED[@]}")"
}
step() { # NODE WHAT COMMAND…: a step with a few attempts
  local node=$1 what=$2
  shift 2
  STATUS=0
  tpu_try "$@" || STATUS=$?
  [ "$STATUS" -eq 0 ] || { [ "$STATUS" -eq 2 ] || STATUS=1; failed "$node" "$what"; }
}

FILES=("$here/worker.sh")
if [ "$SOURCE" = source.tar.gz ]; then
  tpu_make_outbox
  # What the wheel is built from, and nothing else that may lie in a checkout.
  tpu_do tar -czf "$OUTBOX/source.tar.gz" -C "$opt_checkout" --exclude=__pycache__ pyproject.toml README.md LICENSE configs jaxft
  FILES+=("$OUTBOX/source.tar.gz")
fi
for node in "${NODES[@]}"; do
  step "$node" "SSH did not get through" tpu_ssh "$node" all 'mkdir -p -m 700 jaxft'
  step "$node" "copying failed" tpu_copy "$node" jaxft/ "${FILES[@]}"
  step "$node" "installing failed" tpu_ssh "$node" all "$(tpu_remote bash jaxft/worker.sh install "$SOURCE" "$opt_extras" "$opt_python")"
done
[ -z "$opt_no_check" ] || exit 0

# JAX starts on all workers of all slices together or not at all, so the slices are asked at the same time.
pids=()
for slice in "${!NODES[@]}"; do
  command=$(tpu_remote bash jaxft/worker.sh devices "${HOST_CHIPS:-any}" "${CHIPS:-any}" "$slice" "$SLICES" "$COORDINATOR")
  if [ -n "$opt_dry_run" ]; then
    tpu_ssh "${NODES[slice]}" all "$command" | sed '$s/$/ \&/'
  else
    tpu_ssh "${NODES[slice]}" all "$command" &
    pids+=("$!")
  fi
done
if [ -n "$opt_dry_run" ]; then
  echo wait
else
  STATUS=0
  for pid in "${pids[@]}"; do wait "$pid" || STATUS=1; done
  [ "$STATUS" -eq 0 ] || failed "$opt_name" "JAX does not see the chips that there should be (above)"
  tpu_say "$opt_name: set up; next: ${BASH_SOURCE[0]%/*}/run.sh $(tpu_line "${SHARED[@]}") --config gemma2_9b.py -- --run.dir gs://BUCKET/RUN"
fi
