# SPDX-License-Identifier: Apache-2.0
from lean_kernels.ops.add_layer_norm.op import add_layer_norm

__all__ = ["add_layer_norm"]
