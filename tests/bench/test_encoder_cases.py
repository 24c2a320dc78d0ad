# SPDX-License-Identifier: Apache-2.0
"""token_dropping and early_exit compare right with right, and would notice wrong."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from bench import early_exit, registry, runner, token_dropping
from bench.token_dropping import Config

OPTIONS = registry.Options(threads=1)


def check(case, config):
    workload = case.prepare(config, OPTIONS)
    with torch.no_grad():
        return workload, runner.check(workload.competitors, threads=1)


@pytest.mark.parametrize(("kept", "density"), [(1.0, 1.0), (0.4, 1.0), (0.4, 0.5)])
def test_token_dropping(kept, density):
    config = Config(size="small", batch=3, tokens=16, kept=kept, density=density)
    workload, errors = check(token_dropping.CASE, config)
    expected = {"lean", "dense"} | ({"packed"} if kept < 1 else set())
    assert set(errors) == expected | ({"torch linears"} if density == 1 else set())
    assert workload.ideal > 1.3 / density * (1.5 if kept < 1 else 1)
    assert workload.facts["filled"] == pytest.approx(0.66, abs=0.03)


def test_dropping_other_tokens_is_refused():
    config = Config(size="small", batch=3, tokens=16, kept=0.4)
    workload = token_dropping.prepare(config, OPTIONS)
    dense = token_dropping._models(config, "cpu")["dense"]
    ids = torch.randint(1000, (3, 16), generator=torch.Generator().manual_seed(0))
    lengths = token_dropping.lengths_of(config)
    mask = (torch.arange(16) < torch.from_numpy(lengths)[:, None]).long()
    layers = dense.config.num_hidden_layers
    profile = token_dropping.profile_of(layers, 0.4)
    counts = token_dropping.kept_counts(lengths, layers, profile=profile)
    with torch.no_grad():
        right, wrong = (
            token_dropping.masked_oracle(dense.double(), ids, mask, each)[mask.bool()]
            for each in (counts, np.maximum(counts - (counts < lengths), 1))
        )
    lean = workload.competitors["lean"]
    assert runner.relative_error(right, lean.expected[0]) < 1e-12
    assert runner.relative_error(wrong, lean.expected[0]) > 1000 * lean.tolerance


def test_profiles_and_lengths_are_as_named():
    for kept in (0.53, 0.27):
        profile = token_dropping.profile_of(12, kept)
        assert sum(profile) / 12 == pytest.approx(kept, abs=1e-3)
    lengths = token_dropping.lengths_of(Config())
    assert lengths.max() == 128 and lengths.mean() == pytest.approx(0.66 * 128, abs=1)


def test_early_exit_spreads_over_the_layers():
    config = early_exit.Config(size="small", batch=6, tokens=8, fill=0.8)
    workload, errors = check(early_exit.CASE, config)
    assert list(errors) == ["lean", "live work", "packed", "dense"]
    # 6 samples at 4 layers: 6, 4 or 5, 3, 1 or 2 are there
    assert 13 / 24 <= workload.facts["layers run"] <= 16 / 24


def test_scale_lets_the_stated_number_leave():
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    for count in range(10):
        entropy = early_exit._entropy(early_exit._scale_for(logits, count) * logits.double())
        assert int((entropy < early_exit.THRESHOLD).sum()) == count
