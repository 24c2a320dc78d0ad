# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture
def saved(tmp_path):
    """A directory that holds a lean BERT."""
    pytest.importorskip("transformers")
    from hf_models import lean

    lean().save_pretrained(tmp_path / "lean")
    return tmp_path / "lean"
