# SPDX-License-Identifier: Apache-2.0
"""What the rules of a recipe share: checks of single values, and their settings as plain values."""

from dataclasses import fields

MOST = 2**31 - 1  # of any number; kernels count in int32


def settings(rule) -> dict:
    values = {
        item.name: getattr(rule, item.name)
        for item in fields(rule)
        if getattr(rule, item.name) != item.default
    }
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def check_fraction(name: str, value, *, zero: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name} must lie in {'[' if zero else '('}0, 1], got {value}")


def check_choice(name: str, value, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; expected one of {valid}")


def check_bool(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def listed(names) -> str:
    return ", ".join(names)
