# SPDX-License-Identifier: Apache-2.0
from lean_kernels.cli import main

main()
