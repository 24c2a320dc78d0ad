#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the kernels of one instruction set with setup.py's flags, without torch, and checks them:
#   tests/isa_check.sh generic|avx2|avx512 [BINARY]
# A BINARY named is built static and not run, for an emulator or another machine.
set -eu
isa=${1:?usage: isa_check.sh generic|avx2|avx512 [BINARY]}
case $isa in
  generic) flags= ;;
  avx2) flags="-mavx2 -mfma -mf16c" ;;
  avx512)
    flags="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512" ;;
  *) echo "isa_check.sh: unknown instruction set '$isa'; expected generic, avx2 or avx512" >&2
     exit 2 ;;
esac
binary=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
common="-std=c++20 -O3 -fPIC -Wall -Wno-psabi -DLEAN_KERNELS_ISA=$isa"
for source in csrc/cpu/isa/block_sparse_linear csrc/cpu/isa/fma_peak tests/isa_check_narrow; do
  ${CXX:-g++} $common $flags -c $source.cpp -o "$work/${source##*/}.o"
done
${CXX:-g++} $common tests/isa_check.cpp "$work"/*.o -static -o "${binary:-$work/isa_check}"
[ -n "$binary" ] || "$work/isa_check"
