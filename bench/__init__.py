# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: every competitor is checked, then timed side by side on the same inputs.

Run from a checkout: `python -m bench.run CASE --quick`, or `lean-kernels bench CASE --quick`.
"""
