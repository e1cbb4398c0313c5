#!/usr/bin/env bash
# What is wanted of one NVIDIA GPU of 80 GB or more, in under 9 minutes:
#
#   benchmarks/gpu.sh WHEELS [OUT]
#
# Checks the cuDNN attention, times train steps of 151 M and 1.6 B parameters (and PyTorch's, if it
# is there) and attention alone, and takes a profiler's trace of one step of each size. A part that
# fails or takes too long is reported, and the next one starts. OUT (default: gpu_results) gets
# results.txt, which is all that is printed, and trace_*.xplane.pb for TensorBoard or
# jax.profiler.ProfileData.
#
# The machine needs Python 3.12 with flax and jax for CUDA, and no package index. WHEELS is a
# directory with the rest, made on another machine; "" if nothing is missing:
#
#   pip download --only-binary=:all: --python-version=3.12 --implementation=cp \
#     --platform=manylinux_2_28_x86_64 --platform=manylinux_2_27_x86_64 \
#     --platform=manylinux2014_x86_64 --dest=WHEELS \
#     array-record interegular matplotlib ml-collections orjson tqdm zstandard sentencepiece
#
# The variables below can be set to try it elsewhere, as in
#
#   SMALL=--config=smoke LARGE=--config=smoke TORCH_SMALL=$SMALL CHECK="--backend=chunked" ...

set -u
WHEELS=${1?usage: benchmarks/gpu.sh WHEELS [OUT]}
OUT=${2:-gpu_results}
mkdir -p "$OUT"
[ -n "$WHEELS" ] && WHEELS=$(realpath "$WHEELS")
OUT=$(realpath "$OUT")
cd "$(dirname "$0")/.."

: "${PYTHON:=python3}"
: "${MINUTES:=9}"
: "${SMALL=--config=bipe_rope_151m --set=batch_size=32 --set=model.remat=none}"
: "${LARGE=--config=bipe_rope_1b6 --set=batch_size=8 --set=model.remat=none --set=mesh.fsdp=1}"
: "${TORCH_SMALL=$SMALL --set=batch_size=16}" # two programs share the memory
: "${TORCH_LARGE=$LARGE}"
: "${LENGTHS=1024,8192}"
: "${TORCH_LENGTHS=1024}"
: "${ROUNDS=--rounds=5 --steps=3}"
: "${CHECK=--backend=cudnn --length=1000}"
: "${ATTENTION=--lengths=1024,4096,8192,32768 --tokens=32768 --calls=5}"

TEMPORARY=$(mktemp -d)
trap 'rm -rf "$TEMPORARY"' EXIT
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=$TEMPORARY/cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
END=$((MINUTES * 60 - 15))
SUMMARY=()
FAILED=0

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS left=$((END - SECONDS)) status
  shift 2
  printf '\n== %s: %s\n' "$name" "$*"
  if ((left < 10)); then
    status="skipped, no time is left"
  else
    timeout -k 5 $((limit < left ? limit : left)) "$@"
    case $? in
      0) status=ok ;;
      124 | 137) status="stopped at its time limit" ;;
      *) status="FAILED" ;;
    esac
  fi
  [ "$status" = ok ] || FAILED=1
  SUMMARY+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - start)) "$status")")
}

trace() { # NAME ARGUMENTS: one step, after one that is not in the trace
  local name=$1
  shift
  part "$name" 40 "$PYTHON" -m benchmarks.step "$@" --encodings=bipe_rope --rounds=1 \
    --trace="$TEMPORARY/$name"
  find "$TEMPORARY/$name" -name '*.xplane.pb' -exec cp {} "$OUT/$name.xplane.pb" \; 2>/dev/null
}

everything() {
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null
  if [ -n "$WHEELS" ]; then
    part install 60 "$PYTHON" -m pip install --quiet --no-index --find-links="$WHEELS" \
      array-record interegular matplotlib ml-collections orjson tqdm zstandard sentencepiece
  fi
  # Arguments are split into words on purpose.
  part check_64 75 "$PYTHON" -m benchmarks.gpu_check $CHECK --width=64
  part check_128 40 "$PYTHON" -m benchmarks.gpu_check $CHECK --width=128 --encodings=rope,bipe_alibi
  local jax="$PYTHON -m benchmarks.step $ROUNDS --encodings=rope,bipe_rope,bipe_alibi"
  part step_small 130 $jax $SMALL --lengths="$LENGTHS"
  part step_large 160 $jax $LARGE --lengths="$LENGTHS"
  trace trace_small $SMALL
  trace trace_large $LARGE
  if "$PYTHON" -c 'import torch' 2>/dev/null; then
    export XLA_PYTHON_CLIENT_PREALLOCATE=false
    local torch="$PYTHON -m benchmarks.step $ROUNDS --encodings=bipe_rope"
    part torch_small 120 $torch $TORCH_SMALL --torch=compile --lengths="$TORCH_LENGTHS"
    part torch_large 100 $torch $TORCH_LARGE --torch=compile
  fi
  part attention 90 "$PYTHON" -m benchmarks.attention $ATTENTION
  printf '\n== summary, %d s\n' "$SECONDS"
  printf '%s\n' "${SUMMARY[@]}"
  return $FAILED
}

set -o pipefail
everything 2>&1 | tee "$OUT/results.txt"
