# SPDX-License-Identifier: Apache-2.0
"""Write what the standard library only reads: TOML of nested tables, lists, numbers and strings."""

import json
import math
import re

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(content: dict) -> str:
    """The TOML text of a dict; `tomllib.loads` gives the dict back.

    Values are bools, ints, finite floats, strings, lists of these, and dicts. None has no spelling
    in TOML: leave such keys out. Raises ValueError for anything else.
    """
    lines: list[str] = []
    _table(content, (), lines)
    return "\n".join(lines).strip() + "\n"


def _table(content: dict, path: tuple[str, ...], lines: list[str]) -> None:
    plain = {key: value for key, value in content.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    if path and (plain or not tables):
        lines += ["", f"[{'.'.join(map(_key, path))}]"]
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in tables.items():
        _table(value, (*path, key), lines)


def _key(key) -> str:
    if not isinstance(key, str):
        raise ValueError(f"TOML keys are strings, got {key!r}")
    return key if _BARE.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for the one control character JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    raise ValueError(f"TOML has no spelling for {value!r} here")
