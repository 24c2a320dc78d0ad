# SPDX-License-Identifier: Apache-2.0
from lean_kernels.ops.token_selection.op import (
    Threshold,
    compact_tokens,
    kept_count,
    select_tokens,
)
from lean_kernels.ops.token_selection.rows import gather_tokens, scatter_tokens

__all__ = [
    "Threshold",
    "compact_tokens",
    "gather_tokens",
    "kept_count",
    "scatter_tokens",
    "select_tokens",
]
