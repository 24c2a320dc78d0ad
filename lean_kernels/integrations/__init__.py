# SPDX-License-Identifier: Apache-2.0
"""Ties to other projects, each importable alone and each optional."""
