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
common="-std=c++20 -O3 -fPIC -Wall -Wno-psabi"
${CXX:-g++} $common $flags -c "csrc/cpu/isa/$isa.cpp" -o "$work/kernels.o"
${CXX:-g++} $common $flags -c tests/isa_check_narrow.cpp -o "$work/narrow.o"
${CXX:-g++} $common -DTABLE="kernels_$isa" tests/isa_check.cpp "$work/kernels.o" "$work/narrow.o" \
  -static -o "${binary:-$work/isa_check}"
[ -n "$binary" ] || "$work/isa_check"
