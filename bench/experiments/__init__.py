# SPDX-License-Identifier: Apache-2.0
"""What dropping tokens and leaving early cost in accuracy, on real models and data."""
