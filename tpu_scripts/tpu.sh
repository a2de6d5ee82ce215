# shellcheck shell=bash
# shellcheck disable=SC2034  # most of what is set here is read by the scripts that source it
# What all of tpu_scripts share: flags, the names of slices, quoting, and asking gcloud what exists and whose it is.
# Sourced, never run. Kept to bash 3.2, which is what macOS has.

set -euo pipefail

# shellcheck source=slice.sh
. "${BASH_SOURCE[0]%/*}/slice.sh"

FLAGS="name zone project type slices owner"
SWITCHES="dry-run internal-ip iap"
SHARED_HELP="
Flags of every script (in the environment: JAXFT_TPU_NAME, _ZONE, _PROJECT, _TYPE, _OWNER):
  --name NAME      the TPU's name; with several slices the VMs are NAME-0, NAME-1, …
  --zone ZONE      such as us-west4-a
  --project ID     default: gcloud's own
  --type TYPE      v5e-8, v6e-1, v5p-8, v4-16; 2xv5e-16 is two slices (v5p and v4 count TensorCores, two a chip)
  --slices N       the same as N x in front of the type
  --owner ID       who made it, a label; default: your login's name
  --internal-ip    SSH to the internal addresses; --iap goes through Identity-Aware Proxy (gcloud alpha)
  --dry-run        print every command, quoted so that it can be pasted into bash, and run none
Exit codes: 0 done, 1 a gcloud command failed, 2 a mistake of yours, 75 preempted or not there yet: run it again."

opt_name=${JAXFT_TPU_NAME-} opt_zone=${JAXFT_TPU_ZONE-} opt_project=${JAXFT_TPU_PROJECT-}
opt_type=${JAXFT_TPU_TYPE-} opt_owner=${JAXFT_TPU_OWNER-} opt_slices='' opt_dry_run='' opt_internal_ip='' opt_iap=''
REST=() REPEATED=()

tpu_say() { printf '%s\n' "$*" >&2; }
tpu_stop() { # CODE MESSAGE…
  local code=$1
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$code"
}
tpu_wrong() { tpu_stop 2 "$@"; }

# A word as bash reads it back, whatever is in it, as QUOTED.
tpu_quote() {
  local quote="'\\''"
  case $1 in
    '' | *[!A-Za-z0-9_./:=,@%+-]*) QUOTED="'${1//\'/$quote}'" ;;
    *) QUOTED=$1 ;;
  esac
}

# A command as one line for bash. The address that only gcloud knows is "$coordinator", set by an earlier line of a dry run.
tpu_line() {
  local word line='' mark=@coordinator@ variable="'\"\$coordinator\"'"
  for word in "$@"; do
    tpu_quote "$word"
    line="$line $QUOTED"
  done
  printf '%s\n' "${line//$mark/$variable}" | sed '1s/^ //'
}

# Runs a command, or prints it in a dry run. Standard input is never the terminal's: ssh would eat it.
tpu_do() {
  if [ -n "$opt_dry_run" ]; then
    tpu_line "$@"
  else
    "$@" </dev/null
  fi
}

# Arguments for the shell of a worker, each quoted.
tpu_remote() {
  local word line=''
  for word in "$@"; do line="$line $(printf %q "$word")"; done
  printf %s "${line:1}"
}

tpu_help() { # the comment that the script begins with
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  printf '%s\n' "${SHARED_HELP#?}"
}

# Flags into opt_NAME; --flag value and --flag=value; a flag in the third list may be repeated and goes to REPEATED as
# flag and value; what follows -- goes to REST unread.
tpu_parse() { # "FLAGS" "SWITCHES" "REPEATABLE" ARGUMENTS…
  local valued=" $1 " switches=" $2 " repeatable=" $3 " word flag value
  shift 3
  while [ $# -gt 0 ]; do
    word=$1
    shift
    case $word in
      --) REST=(${1+"$@"}) && return ;;
      --help | -h) tpu_help && exit 0 ;;
      --*) ;;
      *) tpu_wrong "$(printf %q "$word"): not a flag; see ${0##*/} --help" ;;
    esac
    flag=${word%%=*}
    flag=${flag#--}
    if [[ $switches == *" $flag "* && $word != *=* ]]; then
      printf -v "opt_${flag//-/_}" 1
    elif [[ $valued$repeatable == *" $flag "* ]]; then
      if [[ $word == *=* ]]; then
        value=${word#*=}
      else
        [ $# -gt 0 ] || tpu_wrong "--$flag: expected a value; see ${0##*/} --help"
        value=$1
        shift
      fi
      [ -n "$value" ] || tpu_wrong "--$flag: expected a value, got an empty one"
      if [[ $repeatable == *" $flag "* ]]; then
        REPEATED+=("$flag" "$value")
      else
        printf -v "opt_${flag//-/_}" %s "$value"
      fi
    else
      tpu_wrong "$(printf %q "$word"): unknown flag; see ${0##*/} --help"
    fi
  done
}

tpu_matches() { # VALUE PATTERN FLAG EXPECTED
  local pattern="^($2)\$"
  [[ $1 =~ $pattern ]] || tpu_wrong "--$3: $(printf %q "$1"): expected $4"
}
tpu_is_count() { tpu_matches "$1" '[1-9][0-9]{0,6}' "$2" "a whole number from 1"; }

# Checks the shared flags; sets OWNER, SLICES (empty: not said), SHARED (the same flags, to pass on), WHERE, GCLOUD, VIA.
tpu_check() {
  [ -n "$opt_name" ] || tpu_wrong "--name: which TPU? (or JAXFT_TPU_NAME)"
  [ -n "$opt_zone" ] || tpu_wrong "--zone: in which zone, such as us-west4-a? (or JAXFT_TPU_ZONE)"
  tpu_matches "$opt_name" '[a-z]([-a-z0-9]{0,53}[a-z0-9])?' name "small letters, digits and hyphens, at most 55, from a letter"
  tpu_matches "$opt_zone" '[a-z]+(-[a-z0-9]+)+' zone "a zone, such as us-west4-a"
  [ -z "$opt_project" ] || tpu_matches "$opt_project" '[a-z][-a-z0-9.:]*' project "a project's id"
  OWNER=$opt_owner
  [ -n "$OWNER" ] || OWNER=$(id -un | tr '[:upper:]' '[:lower:]' | LC_ALL=C tr -c 'a-z0-9_\n-' - | cut -c1-63)
  tpu_matches "$OWNER" '[a-z0-9_-]{1,63}' owner "small letters, digits, _ and -, at most 63"
  [ -z "$opt_internal_ip" ] || [ -z "$opt_iap" ] || tpu_wrong "--iap and --internal-ip: give one of them"
  SLICES=''
  [ -z "$opt_type" ] || tpu_read_type "$opt_type"
  if [ -n "$opt_slices" ]; then
    tpu_is_count "$opt_slices" slices
    [ -z "$opt_type" ] || [ "$SLICES" = 1 ] || [ "$SLICES" = "$opt_slices" ] \
      || tpu_wrong "--slices: $opt_slices, but --type $opt_type says $SLICES"
    SLICES=$opt_slices
  fi
  WHERE=("--zone=$opt_zone")
  SHARED=(--name "$opt_name" --zone "$opt_zone")
  local flag value
  for flag in project type slices owner; do
    value=opt_$flag
    [ -z "${!value}" ] || SHARED+=("--$flag" "${!value}")
  done
  [ -z "$opt_project" ] || WHERE+=("--project=$opt_project")
  GCLOUD=(gcloud compute tpus tpu-vm) VIA=(--quiet)
  [ -z "$opt_internal_ip" ] || { VIA+=(--internal-ip) && SHARED+=(--internal-ip); }
  [ -z "$opt_iap" ] || { GCLOUD=(gcloud alpha compute tpus tpu-vm) && VIA+=(--tunnel-through-iap) && SHARED+=(--iap); }
}

# The question that tpu_look asks, as the array ASK.
tpu_ask() { # vm|queue NAME
  local node='' state=state
  ASK=(gcloud compute tpus tpu-vm describe)
  [ "$1" = vm ] || ASK=(gcloud compute tpus queued-resources describe) node='tpu.nodeSpec[0].node.' state=state.state
  local format="${node}labels.jaxft,${node}labels.jaxft_owner,${node}labels.jaxft_slices,$state,${node}acceleratorType.basename()"
  [ "$1" = queue ] || format="$format,networkEndpoints.len(),networkEndpoints[0].ipAddress"
  ASK+=("$2" "${WHERE[@]}" "--format=value[separator=\"|\"]($format)")
}

# What gcloud says of a VM or a queued resource: LOOK_LABEL, _OWNER, _SLICES, _STATE, _TYPE, _WORKERS, _ADDRESS. Returns 1
# where there is none; every other failure ends the script, so that nothing is done to what cannot be seen, unless
# LOOK_SOFTLY is set: then it returns 2.
tpu_look() { # vm|queue NAME
  local answer errors status=0
  tpu_ask "$1" "$2"
  if [ -n "$opt_dry_run" ]; then
    if [ "$2" = "$opt_name-0" ]; then echo "coordinator=\$($(tpu_line "${ASK[@]}") | cut -d'|' -f7)"; else tpu_do "${ASK[@]}"; fi
    LOOK_LABEL=$opt_name LOOK_OWNER=$OWNER LOOK_SLICES=${SLICES:-1} LOOK_STATE=READY LOOK_TYPE=${ACCELERATOR-}
    LOOK_WORKERS=${HOSTS-1} LOOK_ADDRESS=@coordinator@
    return 0
  fi
  errors=$(mktemp)
  answer=$("${ASK[@]}" 2>"$errors" </dev/null) || status=$?
  if [ "$status" -ne 0 ]; then
    local said
    said=$(grep -m1 ERROR "$errors" || tail -n 1 "$errors")
    rm -f "$errors"
    [[ $said != *NOT_FOUND* ]] || return 1
    [ -z "${LOOK_SOFTLY-}" ] || return 2
    tpu_stop 1 "$2: gcloud cannot say what it is, so it is left alone: ${said:-exit $status}"
  fi
  rm -f "$errors"
  IFS='|' read -r LOOK_LABEL LOOK_OWNER LOOK_SLICES LOOK_STATE LOOK_TYPE LOOK_WORKERS LOOK_ADDRESS <<<"$answer"
}

# Stops unless what was looked at carries the labels that create.sh gives.
tpu_ours() { # NAME
  [ "$LOOK_LABEL" = "$opt_name" ] \
    || tpu_wrong "$1: not made by tpu_scripts/create.sh (it has no label jaxft=$opt_name); left alone"
  [ "$LOOK_OWNER" = "$OWNER" ] \
    || tpu_wrong "$1: made by ${LOOK_OWNER:-nobody known}, and you are $OWNER; left alone (--owner ${LOOK_OWNER:-ID} if that is you)"
}

tpu_dead() { # STATE: it will not come back by itself
  case $1 in PREEMPTED | TERMINATED | SUSPENDED | SUSPENDING | FAILED | DELETING | NOT_FOUND) return 0 ;; *) return 1 ;; esac
}

tpu_name_nodes() { # the VMs of SLICES slices, as NODES
  local slice
  NODES=("$opt_name")
  [ "$SLICES" -gt 1 ] || return 0
  NODES=()
  for ((slice = 0; slice < SLICES; slice++)); do NODES+=("$opt_name-$slice"); done
}

# How many slices there are, where no flag says so: one VM called NAME, or what NAME-0 was labelled with.
tpu_count_slices() {
  [ -z "$SLICES" ] || return 0
  if [ -n "$opt_dry_run" ]; then
    tpu_say "# taken for one slice with one worker; --type says otherwise"
    SLICES=1
  elif tpu_look vm "$opt_name-0"; then
    tpu_ours "$opt_name-0"
    SLICES=$LOOK_SLICES
    tpu_is_count "$SLICES" "slices (of the label)"
  else
    SLICES=1
  fi
}

# The VMs, all ours and READY: NODES, WORKERS (of each) and COORDINATOR. 75 where one is gone, 2 where there is none.
tpu_find() {
  local node looked=''
  WORKERS=() COORDINATOR=''
  if [ -z "$SLICES" ] && [ -z "$opt_dry_run" ] && tpu_look vm "$opt_name"; then SLICES=1 looked=$opt_name; fi
  tpu_count_slices
  tpu_name_nodes
  for node in "${NODES[@]}"; do
    [ "$looked" = "$node" ] || tpu_look vm "$node" \
      || tpu_wrong "$node: no such TPU VM in $opt_zone; make it with create.sh $(tpu_line "${SHARED[@]}")"
    tpu_ours "$node"
    ! tpu_dead "$LOOK_STATE" || tpu_stop 75 "$node is $LOOK_STATE; delete it and create it again (keep_running.sh does)"
    [ "$LOOK_STATE" = READY ] || tpu_stop 75 "$node is ${LOOK_STATE:-in an unknown state}, not READY yet; try again"
    WORKERS+=("${LOOK_WORKERS:-1}")
    [ -n "$COORDINATOR" ] || COORDINATOR=$LOOK_ADDRESS
  done
  [ "$SLICES" -gt 1 ] || COORDINATOR=-
}

# The state of all of it in one word: that of the first part that is not READY; NOT_FOUND where one is missing, UNKNOWN where
# gcloud cannot say.
tpu_state() {
  local node status
  STATE=READY
  for node in "${NODES[@]}"; do
    status=0
    LOOK_SOFTLY=1 tpu_look vm "$node" || status=$?
    case $status in 0) tpu_ours "$node" ;; 1) LOOK_STATE=NOT_FOUND ;; *) LOOK_STATE=UNKNOWN ;; esac
    [ "$LOOK_STATE" = READY ] || { STATE=$LOOK_STATE && return; }
  done
}

tpu_ssh() { # NODE WORKER COMMAND
  tpu_do "${GCLOUD[@]}" ssh "$1" "--worker=$2" "--command=$3" "${WHERE[@]}" "${VIA[@]}"
}
tpu_copy() { # NODE FOLDER FILE…: to all workers
  local node=$1 folder=$2
  shift 2
  tpu_do "${GCLOUD[@]}" scp "$@" "$node:$folder" --worker=all --recurse "${WHERE[@]}" "${VIA[@]}"
}

# Tries a command up to three times, unless it says that the mistake is the user's.
tpu_try() {
  local attempt=1 status
  while :; do
    status=0
    "$@" || status=$?
    [ "$status" -ne 0 ] && [ "$status" -ne 2 ] && [ "$attempt" -lt 3 ] || return "$status"
    tpu_say "attempt $attempt of 3 failed (exit $status); again in ${JAXFT_TPU_RETRY_SECONDS:-15} s"
    sleep "${JAXFT_TPU_RETRY_SECONDS:-15}"
    attempt=$((attempt + 1))
  done
}

# A folder of this machine that only you can read, for what is on its way to the workers.
tpu_make_outbox() {
  OUTBOX=${XDG_CACHE_HOME:-$HOME/.cache}/jaxft/tpu/$opt_name
  tpu_do mkdir -p -m 700 "$OUTBOX"
}
tpu_check_local() { # FLAG PATH
  [ -e "$2" ] || tpu_wrong "--$1: $(printf %q "$2"): no such file here"
  case $2 in *:* | -*) tpu_wrong "--$1: $(printf %q "$2"): scp cannot copy a path with : or a leading -; rename it" ;; esac
}
