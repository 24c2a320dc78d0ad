# SPDX-License-Identifier: Apache-2.0
from lean_kernels.ops.lazy_adam.op import lazy_adam_

__all__ = ["lazy_adam_"]
