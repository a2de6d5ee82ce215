#!/usr/bin/env bash
# Plans the five published runs on six slices, how the largest grows from 4 to 256 chips, what fits one v5e chip with a quantised
# base, and what training every weight takes, on this machine and without a TPU:
#
#   tpu_scripts/plan_matrix.sh [runs|growth|quantized|full] [FOLDER]
#
# Prints tables in Markdown. What is planned already with the same settings and versions is read from FOLDER (default: runs/plans),
# so that the same command goes on where it was stopped. Needs `pip install 'jaxft[plan]'`. A program takes one to two minutes
# on two cores: runs compiles 30 to 60, growth and quantized about 20, full 12 to 20. In the environment PYTHON names the
# interpreter; PLACES and CONFIGS choose others.
set -euo pipefail

what=${1-runs} folder=${2-runs/plans} python=${PYTHON-python}
places=${PLACES-v5e-1,v5e-4,v5e-8,v6e-1,v6e-8,v5p-8}
configs=${CONFIGS-openelm_3b llama32_3b qwen2_1_5b gemma2_9b gemma_2b}
export JAX_PLATFORMS=cpu

# NAME CONFIG PLACES BATCH [OVERRIDE…]: one file. A plan in which nothing fits is a row like others.
plan() {
  local file=$folder/$1.json config=$2.py where=$3 batch=$4 code=0
  shift 4
  "$python" -m jaxft.plan --config "$config" --topology "$where" --batch "$batch" --json "$file" --resume "$@" >/dev/null || code=$?
  [ -f "$file" ] || exit "$code"
  files+=("$file")
}

mkdir -p "$folder"
files=()
case $what in
  runs)
    for config in $configs; do
      plan "$config" "$config" "$places" auto
    done
    "$python" -m jaxft.plans.pages runs "${files[@]}"
    printf '\n'
    "$python" -m jaxft.plans.pages lines "${files[@]}"
    ;;
  growth)
    printf 'Weak scaling: two rows of 1,024 tokens a chip, the default mesh; last, copies of 16 chips.\n\n'
    for chips in 4 8 16 32 64 128 256; do
      plan "weak-$chips" gemma2_9b "v5e-$chips" $((2 * chips))
    done
    plan weak-256-copies gemma2_9b v5e-256 512 --mesh.data 16
    plan weak-2x128 gemma2_9b 2xv5e-128 512
    "$python" -m jaxft.plans.pages growth "${files[@]}"
    printf '\nStrong scaling: 32 rows of 1,024 tokens over all chips, the default mesh; where it has more chips than rows, layers split.\n\n'
    files=()
    for chips in 4 8 16 32 64; do
      plan "strong-$chips" gemma2_9b "v5e-$chips" 32
    done
    for chips in 64 128 256; do
      plan "strong-$chips-tensor" gemma2_9b "v5e-$chips" 32 --mesh.tensor $((chips / 32))
    done
    "$python" -m jaxft.plans.pages growth "${files[@]}"
    ;;
  quantized)
    # One row, and the most rows that fit, with everything recomputed.
    for config in gemma2_9b llama32_3b qwen2_1_5b; do
      for base in int8 int4 nf4; do
        largest=''
        for rows in 1 2 4 8 16 32 64; do
          held=("${files[@]}")
          plan "$config-$base-$rows" "$config" v5e-1 "$rows" --model.quantize "$base" --model.remat full
          "$python" -c 'import json, sys; sys.exit(not json.load(open(sys.argv[1]))["rows"][0]["fits"])' "${files[-1]}" || {
            files=("${held[@]}")
            break
          }
          # Of those before it only the first row stays.
          [ -z "$largest" ] || [ "$largest" = 1 ] || files=("${held[@]:0:${#held[@]}-1}" "${files[-1]}")
          largest=$rows
        done
      done
    done
    plan gemma2_9b-int8-tables gemma2_9b v5e-1 1 --model.quantize int8 --model.quantize_tables True --model.remat full
    "$python" -m jaxft.plans.pages quantized "${files[@]}"
    ;;
  full)
    # Every weight trained, in float32 and in bfloat16 with stochastic rounding, eight rows of 1,024 tokens.
    for config in llama32_3b gemma2_9b; do
      for dtype in float32 bfloat16; do
        for where in v5e-8 v6e-8 v5p-8; do
          plan "$config-full-$dtype-$where" "$config" "$where" 8 --lora none --model.param_dtype "$dtype"
        done
      done
    done
    "$python" -m jaxft.plans.pages full "${files[@]}"
    ;;
  *)
    printf 'error: %s: expected runs, growth, quantized or full\n' "$what" >&2
    exit 2
    ;;
esac
