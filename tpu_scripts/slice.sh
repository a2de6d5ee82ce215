# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is read by the scripts
# Google's facts of a type: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and …/runtimes; the shapes are those of
# jaxft/parallel/topology.py. Sets KIND, CHIPS (of a slice), SLICES, HOST_CHIPS, HOSTS, TOPOLOGY, ACCELERATOR, RUNTIME,
# GKE_ACCELERATOR.
tpu_read_type() {
  local pattern='^(([1-9][0-9]*)x)?(v4|v5e|v5litepod|v5p|v6e)-([1-9][0-9]*)$' size
  [[ $1 =~ $pattern ]] || tpu_wrong "--type: $(printf %q "$1"): expected a kind and a size, such as v5e-8 or 2xv5e-16; kinds are v4, v5e, v5p, v6e"
  SLICES=${BASH_REMATCH[2]:-1} KIND=${BASH_REMATCH[3]} size=${BASH_REMATCH[4]}
  [ "$KIND" != v5litepod ] || KIND=v5e
  CHIPS=$size HOST_CHIPS=4 ACCELERATOR=$KIND-$size TOPOLOGY=''
  case $KIND in
    v4 | v5p)
      CHIPS=$((size % 2 == 0 ? size / 2 : 0))
      case $CHIPS in
        4) TOPOLOGY=2x2x1 ;; 8) TOPOLOGY=2x2x2 ;; 16) TOPOLOGY=2x2x4 ;; 32) TOPOLOGY=2x4x4 ;; 64) TOPOLOGY=4x4x4 ;;
        128) TOPOLOGY=4x4x8 ;; 256) TOPOLOGY=4x8x8 ;; 512) TOPOLOGY=8x8x8 ;; 1024) TOPOLOGY=8x8x16 ;;
        2048) TOPOLOGY=8x16x16 ;;
      esac
      ;;
    *)
      case $CHIPS in
        1) TOPOLOGY=1x1 ;; 4) TOPOLOGY=2x2 ;; 8) TOPOLOGY=2x4 ;; 16) TOPOLOGY=4x4 ;; 32) TOPOLOGY=4x8 ;;
        64) TOPOLOGY=8x8 ;; 128) TOPOLOGY=8x16 ;; 256) TOPOLOGY=16x16 ;;
      esac
      [ "$CHIPS" -gt 8 ] || HOST_CHIPS=$CHIPS # one VM has up to eight chips, and in larger slices four
      ;;
  esac
  [ -n "$TOPOLOGY" ] || tpu_wrong "--type: $(printf %q "$1"): there is no such slice of $KIND; see jaxft/parallel/topology.py"
  HOSTS=$((CHIPS / HOST_CHIPS))
  case $KIND in
    v4) RUNTIME=tpu-ubuntu2204-base GKE_ACCELERATOR=tpu-v4-podslice ;;
    v5e) RUNTIME=v2-alpha-tpuv5-lite GKE_ACCELERATOR=tpu-v5-lite-podslice ACCELERATOR=v5litepod-$size ;;
    v5p) RUNTIME=v2-alpha-tpuv5 GKE_ACCELERATOR=tpu-v5p-slice ;;
    v6e) RUNTIME=v2-alpha-tpuv6e GKE_ACCELERATOR=tpu-v6e-slice ;;
  esac
}
