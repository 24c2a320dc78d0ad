# SPDX-License-Identifier: Apache-2.0
"""How a dense model becomes lean: token profiles, exits, n-gram students."""
