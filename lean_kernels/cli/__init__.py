# SPDX-License-Identifier: Apache-2.0
"""The command line: `lean-kernels` or `python -m lean_kernels`. One module per command."""

from lean_kernels.cli import bench, convert, demo, info, profile, tune
from lean_kernels.cli.common import app, command

__all__ = ["app", "main"]

# --help lists them in this order.
_COMMANDS = (info.info, profile.profile, convert.convert, demo.demo, bench.bench, tune.tune)
for _function in _COMMANDS:
    command(_function)


def main() -> None:
    app(prog_name="lean-kernels")
