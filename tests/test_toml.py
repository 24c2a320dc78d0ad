# SPDX-License-Identifier: Apache-2.0
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_kernels._toml import dumps

try:
    import tomllib
except ImportError:
    import tomli as tomllib

# Surrogates are no text; TOML counts a lone carriage return as part of no line.
text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | text
scalars = scalars.filter(lambda value: not isinstance(value, float) or math.isfinite(value))
values = scalars | st.lists(scalars, max_size=3)
tables = st.recursive(
    st.dictionaries(text, values, max_size=3),
    lambda inner: st.dictionaries(text, values | inner, max_size=3),
    max_leaves=5,
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(tables)
def test_round_trip(content):
    assert tomllib.loads(dumps(content)) == content


def test_reads_as_people_write_it():
    content = {
        "linear": {"encoder.layer.*": {"density": 0.2, "block_shape": [32, 32]}},
        "tokens": {"packed": True, "profile": [1.0, 0.5], "speed": 1.0},
    }
    assert dumps(content) == (
        '[linear."encoder.layer.*"]\ndensity = 0.2\nblock_shape = [32, 32]\n\n'
        "[tokens]\npacked = true\nprofile = [1.0, 0.5]\nspeed = 1.0\n"
    )


@pytest.mark.parametrize("content", [{"a": None}, {"a": math.inf}, {1: 2}, {"a": [{}]}, {"a": b""}])
def test_what_toml_cannot_spell(content):
    with pytest.raises(ValueError, match="TOML"):
        dumps(content)
