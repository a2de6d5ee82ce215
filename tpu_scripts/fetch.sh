#!/usr/bin/env bash
# Fetches a run folder from worker 0 or from Cloud Storage. What is here already is not fetched again; a file that is newer
# here than there is kept, and said.
#
#   fetch.sh --name mine --zone us-west4-a --run-dir runs/gemma2_9b
#   fetch.sh --run-dir gs://bucket/run --only adapter --to adapters/mine
#
#   --run-dir FOLDER    as --run.dir was: on the VM from where the run started, or gs://…
#   --only PART         adapter, tensorboard, or logs (those of every worker)
#   --to FOLDER         default: runs/NAME-OF-THE-RUN
#   --overwrite         also files that are newer here

# shellcheck source=tpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

opt_run_dir='' opt_only='' opt_to='' opt_overwrite=''
tpu_parse "$FLAGS run-dir only to" "$SWITCHES overwrite" "" "$@"
[ "${#REST[@]}" -eq 0 ] || tpu_wrong "fetch.sh takes nothing after --"
case $opt_only in '' | adapter | tensorboard | logs) ;; *) tpu_wrong "--only: $(printf %q "$opt_only"): expected adapter, tensorboard or logs" ;; esac
[ -n "$opt_run_dir" ] || [ "$opt_only" = logs ] || tpu_wrong "--run-dir: which run folder, such as runs/gemma2_9b or gs://bucket/run?"
RUN=${opt_run_dir%/}
TO=${opt_to:-runs/${RUN##*/}}
if [ "$opt_only" = logs ]; then TO=${opt_to:-runs/$opt_name-logs}; elif [ -n "$opt_only" ]; then RUN=$RUN/$opt_only TO=$TO/$opt_only; fi

if [[ $RUN == gs://* ]]; then
  command=(gcloud storage rsync "$RUN" "$TO" --recursive)
  [ -n "$opt_overwrite" ] || command+=(--skip-if-dest-has-newer-mtime)
  [ -z "$opt_project" ] || command+=("--project=$opt_project")
  tpu_do mkdir -p -- "$TO"
  tpu_do "${command[@]}" || tpu_stop 1 "$RUN: gcloud could not copy all of it (exit $?); the same command fetches the rest"
  [ -n "$opt_overwrite$opt_dry_run" ] || tpu_say "files that are newer in $TO were kept; --overwrite takes those too"
  exit 0
fi

tpu_check
tpu_find
tpu_do mkdir -p -- "$TO"
if [ "$opt_only" = logs ]; then
  for slice in "${!NODES[@]}"; do
    for ((worker = 0; worker < WORKERS[slice]; worker++)); do
      file=$TO/${NODES[slice]}-worker-$worker.log
      if [ -n "$opt_dry_run" ]; then
        printf '%s >%s\n' "$(tpu_ssh "${NODES[slice]}" "$worker" 'bash jaxft/worker.sh log')" "$(tpu_line "$file")"
      else
        tpu_ssh "${NODES[slice]}" "$worker" 'bash jaxft/worker.sh log' >"$file.part" || tpu_stop 1 "${NODES[slice]}: worker $worker's log did not come"
        mv "$file.part" "$file"
      fi
    done
  done
  exit 0
fi

LIST=$(tpu_remote bash jaxft/worker.sh list "$RUN") PACK=$(tpu_remote bash jaxft/worker.sh pack "$RUN")
part=$TO/.fetching
if [ -n "$opt_dry_run" ]; then
  tpu_say "# of the files that the first command lists, those that are missing or older here are named to the second"
  tpu_do mkdir -p -- "$part"
  printf '%s >%s\n' "$(tpu_ssh "${NODES[0]}" 0 "$LIST")" "$(tpu_line "$part.list")"
  printf "cut -z -d' ' -f3- <%s | %s | tar -x -C %s\n" "$(tpu_line "$part.list")" "$(tpu_ssh "${NODES[0]}" 0 "$PACK")" "$(tpu_line "$part")"
  exit 0
fi
rm -rf "$part"
mkdir -p -- "$part"
trap 'rm -rf "$part" "$part.list" "$part.names" "$part.time"' EXIT
tpu_ssh "${NODES[0]}" 0 "$LIST" >"$part.list" || tpu_stop "$([ $? -eq 2 ] && echo 2 || echo 1)" "$RUN: worker 0 does not list it (above)"

# Whether the file there is wanted: missing here, older here, or as old but of another size.
wanted() { # SIZE TIME PATH
  local file=$TO/$3
  [ -e "$file" ] || return 0
  touch -d "${2%.*}Z" "$part.time"
  if [ "$file" -nt "$part.time" ]; then
    [ -z "$opt_overwrite" ] || return 0
    [ "$(wc -c <"$file")" -eq "$1" ] || { tpu_say "kept, it is newer here: $(printf %q "$file")" && kept=$((kept + 1)); }
    return 1
  fi
  [ "$file" -ot "$part.time" ] || [ "$(wc -c <"$file")" -ne "$1" ]
}
fetched=0 kept=0 same=0 sizes=()
: >"$part.names"
while IFS= read -r -d '' line; do
  size=${line%% *} line=${line#* }
  time=${line%% *} name=${line#* }
  [[ /$name/ != */../* && $name != /* ]] || tpu_stop 1 "worker 0 names a file outside of its folder: $(printf %q "$name")"
  before=$kept
  if wanted "$size" "$time" "$name"; then
    printf '%s\0' "$name" >>"$part.names"
    sizes[fetched]=$size
    fetched=$((fetched + 1))
  elif [ "$kept" -eq "$before" ]; then
    same=$((same + 1))
  fi
done <"$part.list"
if [ "$fetched" -gt 0 ]; then
  status=0
  "${GCLOUD[@]}" ssh "${NODES[0]}" --worker=0 "--command=$PACK" "${WHERE[@]}" "${VIA[@]}" <"$part.names" | tar -x -C "$part" || status=$?
  arrived=0 number=0
  while IFS= read -r -d '' name; do
    size=${sizes[number]}
    number=$((number + 1))
    [ -f "$part/$name" ] || continue
    # Where the copying stopped, the last file may have been cut off.
    [ "$status" -eq 0 ] || [ "$(wc -c <"$part/$name")" -eq "$size" ] || continue
    mkdir -p -- "$(dirname "$TO/$name")"
    mv -f -- "$part/$name" "$TO/$name"
    arrived=$((arrived + 1))
  done <"$part.names"
  [ "$status" -eq 0 ] && [ "$arrived" -eq "$fetched" ] \
    || tpu_stop 1 "$RUN: $arrived of $fetched files came; the same command fetches the rest"
fi
tpu_say "$TO: $fetched file(s) fetched, $same there already, $kept kept"
