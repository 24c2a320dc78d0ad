# SPDX-License-Identifier: Apache-2.0
from lean_kernels.ops.ngram_lookup.op import ngram_lookup, ngram_slots

__all__ = ["ngram_lookup", "ngram_slots"]
