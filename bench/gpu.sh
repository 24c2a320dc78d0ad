#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What needs a GPU, in stages of under eight minutes:
#   bench/gpu.sh STAGE [OUT]
#     0  build both extensions here, lean-kernels info
#     1  the tests on the GPU, the CUDA C++ kernels under compute-sanitizer
#     2  tune the Triton kernels
#     3  benchmarks
# OUT gets logs, JSON, tables and tables of tile sizes as they come; out/gpu unless named.
# DRY=1 does of each stage what a machine without a GPU can: builds with nvcc, runs kernels under
# Triton's interpreter, compiles them ahead of time, and times the CPU for a moment.
set -uo pipefail
cd "$(dirname "$0")/.."
stage=${1:?usage: bench/gpu.sh STAGE [OUT], STAGE 0 to 3}
out=$(mkdir -p "${2:-out/gpu}" && cd "${2:-out/gpu}" && pwd)
dry=${DRY:-}
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD LEAN_KERNELS_CONFIGS=$out/configs
failed=0

# step NAME SECONDS COMMAND...: runs it with a time limit, output also into OUT/NAME.log
step() {
  local name=$1 limit=$2
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 25
  local status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || { failed=1; echo "== $name: exit status $status"; }
}

case $stage in
  0)
    step build 420 env LEAN_KERNELS_BUILD=required "$python" setup.py build_ext --inplace
    step info 60 "$python" -m lean_kernels info
    "$python" -m lean_kernels info --json > "$out/info.json"
    ;;
  1)
    if [ -n "$dry" ]; then
      step interpreter 440 "$python" -m pytest -q -n 2 tests/test_triton_interpreter.py tests/gpu
      exit $failed
    fi
    triton=$(find tests -name 'test_*_triton.py' | sort)
    # shellcheck disable=SC2086
    step triton 300 "$python" -m pytest -q -n 6 $triton
    step cuda 100 "$python" -m pytest -q tests/gpu $(find tests -name 'test_*_cuda.py' | sort)
    if command -v compute-sanitizer > /dev/null; then
      for tool in memcheck racecheck; do
        step $tool 120 compute-sanitizer --tool $tool --error-exitcode 9 \
          "$python" -m pytest -q -x tests/ops/test_token_compaction_cuda.py
      done
    fi
    ;;
  2)
    for op in block_sparse_linear ragged_attention; do
      if [ -n "$dry" ]; then
        step "compile-$op" 230 "$python" -m pytest -q -n 2 -m "not slow" "tests/ops/test_${op}_aot.py"
      else
        step "tune-$op" 230 "$python" -m lean_kernels tune "$op" --json "$out/$op.json"
      fi
    done
    ;;
  3)
    device=cuda options="--suite numbers --budget 0.3 --save"
    [ -n "$dry" ] && device=cpu options="--quick --budget 0.02"
    cases=$("$python" -c 'from bench.registry import CASES; print(*CASES)')
    for case in ${CASES:-$cases}; do
      # A missed number (exit status 3) is a result like any other.
      # shellcheck disable=SC2086
      step "bench-$case" 230 bash -c '"$@"; s=$?; [ $s = 3 ] || exit $s' - \
        "$python" -m bench.run "$case" --device $device $options \
        --json "$out/$case.json" --markdown "$out/$case.md"
    done
    cp -r bench/results/nvidia-* "$out" 2> /dev/null  # what --save wrote, plots too
    ;;
  *)
    echo "bench/gpu.sh: unknown stage '$stage'; expected 0, 1, 2 or 3" >&2
    exit 2
    ;;
esac
exit $failed
