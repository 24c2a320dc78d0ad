# SPDX-License-Identifier: Apache-2.0
"""What autocast does to the inputs of an op."""

import torch
from torch import Tensor

_CAST = (torch.float32, torch.bfloat16, torch.float16)


def autocast(
    device: str, *tensors: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor | None, ...]:
    """Under autocast, cast what torch's own matrix products cast: not float64, not integers.

    To autocast's dtype, or to `dtype` where torch keeps an op in it.
    """
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = dtype or torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype not in _CAST else t.to(dtype) for t in tensors)
