#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds csrc with the address and undefined-behaviour sanitizers in a copy of the tree and runs
# the op tests and a fuzz of random and corrupted patterns through it, on every instruction set this
# processor has. Any report is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r csrc lean_kernels tests setup.py pyproject.toml README.md LICENSE "$copy"
cd "$copy"
rm -f lean_kernels/*.so
LEAN_KERNELS_BUILD=required LEAN_KERNELS_SANITIZE=1 python setup.py --quiet build_ext --inplace

compiler=${CXX:-g++}
# libstdc++ as well: the sanitizer must find the function that throws before torch loads it.
for library in libasan.so libubsan.so libstdc++.so; do
  LD_PRELOAD=${LD_PRELOAD:-}${LD_PRELOAD:+:}$("$compiler" -print-file-name="$library")
done
export LD_PRELOAD PYTHONPATH=$copy
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
for isa in generic avx2 avx512 amx; do
  export LEAN_KERNELS_CPU_ISA=$isa
  python -c 'from lean_kernels import _extension; raise SystemExit(not _extension.cpu_isa())' ||
    continue  # not on this processor
  echo "instruction set $isa"
  python tests/fuzz_patterns.py --seconds "${FUZZ_SECONDS:-60}"
  python tests/fuzz_sequences.py --seconds "${FUZZ_SECONDS:-60}"
  # The sanitizers write to file descriptor 2, which pytest would keep to itself when they abort.
  python -m pytest -q -x -p no:cacheprovider --capture=sys \
    tests/ops/test_block_sparse_linear_determinism.py \
    tests/ops/test_block_sparse_linear_errors.py \
    tests/ops/test_block_sparse_linear_gradients.py \
    tests/ops/test_block_sparse_linear_int8.py \
    tests/ops/test_block_sparse_linear_properties.py \
    tests/ops/test_block_sparse_linear_amx.py tests/ops/test_ragged_attention_amx.py
  python -m pytest -q -x -p no:cacheprovider --capture=sys \
    -k "cpu and not opcheck and not compile and not gradcheck" \
    tests/ops/test_add_layer_norm.py tests/ops/test_lazy_adam.py \
    tests/ops/test_low_rank_embedding.py \
    tests/ops/test_low_rank_logits.py \
    tests/ops/test_ngram_embedding_bag.py tests/ops/test_ragged_attention.py \
    tests/ops/test_tensor_product_embedding.py tests/ops/test_tensor_train_embedding.py \
    tests/ops/test_token_selection.py
done
