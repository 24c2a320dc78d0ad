# SPDX-License-Identifier: Apache-2.0
import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lean_kernels as lk
from lean_kernels.convert import LeanReport, convert, to_dense
from lean_kernels.nn import BlockSparseLinear
from lean_kernels.recipe import LinearRule, Recipe
from lean_kernels.spec import describe, rebuild


class Conv1D(nn.Module):
    """As transformers has it: x W + b, W [in_features, out_features]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(48, 96)
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 48, bias=False)
        self.mix = Conv1D(48, 48)

    def forward(self, x):
        return x + self.mix(self.down(self.norm(self.up(x))))


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.embed = nn.Embedding(40, 48)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(48, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_density_one_computes_the_same(model):
    expected = model(IDS)
    recipe = {"linear": {"layers.*": {"density": 1.0, "block_shape": [16, 32]}}}
    assert convert(model, recipe) is model
    layers = [name for name, m in model.named_modules() if isinstance(m, BlockSparseLinear)]
    assert layers == [f"layers.{i}.{name}" for i in (0, 1) for name in ("up", "down", "mix")]
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)


def test_blocks_that_are_mostly_padding_leave_a_layer_dense(model):
    convert(model, {"linear": {"layers.0.up": {"block_shape": [1024, 4096]}}})
    assert type(model.layers[0].up) is nn.Linear
    assert "most of them padding" in str(model.lean_report())


def test_recipe_as_dataclass_dict_and_path(model, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[linear."layers.0.up"]\ndensity = 0.5\n')
    recipe = Recipe({"layers.0.up": LinearRule(density=0.5)})
    results = [
        state(convert(copy.deepcopy(model), given))
        for given in (recipe, recipe.to_dict(), path, str(path))
    ]
    assert all(same_state(results[0], other) for other in results[1:])
    with pytest.raises(ValueError, match="recipe must be a Recipe, a dict or a path, got list"):
        convert(model, [])


def test_first_glob_wins(model):
    convert(
        model,
        {
            "linear": {
                "layers.0.*": {"density": 0.5, "block_shape": [16, 16]},
                "layers.*": {"density": 1.0, "block_shape": [48, 48]},
            }
        },
    )
    assert model.layers[0].up.block_shape == (16, 16)
    assert model.layers[0].up.density == 0.5
    assert model.layers[1].up.block_shape == (48, 48)


@pytest.mark.parametrize("name", ["up", "mix"])
def test_pruned_weights_keep_exactly_their_blocks(model, name):
    layer = getattr(model.layers[0], name)
    with torch.no_grad():
        layer.weight[:32, :16] = 0
    convert(model, {"linear": {f"layers.0.{name}": {"block_shape": [16, 16]}}})
    lean = getattr(model.layers[0], name)
    mask = lean.block_mask if name == "up" else lean.block_mask.t()
    assert not mask[:2, 0].any()
    assert mask.sum() == mask.numel() - 2


def test_torch_prune_masks_are_seen(model):
    linear = model.layers[0].up
    mask = torch.ones_like(linear.weight)
    mask[:32] = 0
    prune.custom_from_mask(linear, "weight", mask)
    expected = model(IDS)
    convert(model, {"linear": {"layers.0.up": {}}})
    assert model.layers[0].up.density == pytest.approx(2 / 3)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["prune", "weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*:FutureWarning")
def test_weights_that_are_computed_before_each_call_are_up_to_date(model, way):
    linear = model.layers[0].up
    if way == "prune":
        prune.random_unstructured(linear, "weight", 0.5)
    else:
        getattr(nn.utils, way)(linear)
    linear.eval()  # in training each call of spectral_norm changes the weight
    state = {name: 2 * tensor for name, tensor in model.state_dict().items() if "up" in name}
    model.load_state_dict(state, strict=False)  # computes nothing
    convert(model, {"linear": {"layers.0.up": {}}})
    found = model.layers[0].up
    assert found.weight.requires_grad
    if way == "prune":  # the mask has been doubled too
        expected = state["layers.0.up.weight_orig"] * state["layers.0.up.weight_mask"]
        torch.testing.assert_close(found.to_linear().weight.detach(), expected)
    elif way == "spectral_norm":
        weight, u, v = (state[f"layers.0.up.weight_{name}"] for name in ("orig", "u", "v"))
        torch.testing.assert_close(found.to_linear().weight.detach(), weight / (u @ weight @ v))
    else:
        direction, size = state["layers.0.up.weight_v"], state["layers.0.up.weight_g"]
        expected = direction * size / direction.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found.to_linear().weight.detach(), expected)


def test_dense_layers_are_left_dense_and_reported(model):
    original = model.layers[0].up
    recipe = {"linear": {"layers.0.up": {"density": 0.5, "dense_above": 0.4}}}
    convert(model, recipe)
    assert model.layers[0].up is original
    (entry,) = model.lean_report().entries
    assert (entry.became, entry.density) == ("dense", 1.0)
    assert entry.note == "density 0.5 is above 0.4, dense_above"
    recipe["linear"]["layers.0.up"]["dense_above"] = 0.5
    convert(model, recipe)
    assert model.layers[0].up.density == 0.5


def test_the_measured_break_even_is_the_default(model, tmp_path, monkeypatch):
    from lean_kernels.ops.block_sparse_linear import break_even

    monkeypatch.setattr(break_even, "CONFIGS", tmp_path)
    monkeypatch.setenv("LEAN_KERNELS_CPU_ISA", "generic")
    (tmp_path / "cpu-generic.json").write_text('{"float32": {"32x32": 0.45}}')
    convert(model, {"linear": {"layers.0.up": {"density": 0.5}, "layers.1.up": {"density": 0.4}}})
    dense, lean = model.lean_report().entries
    assert dense.became == "dense" and "measured for cpu-generic" in dense.note
    assert lean.became == "BlockSparseLinear"


def test_tied_head_is_left_dense_and_reported(model):
    convert(model, {"linear": {"*": {"density": 0.5}}})
    assert model.head.weight is model.embed.weight
    entry = model.lean_report().entries[-1]
    assert (entry.name, entry.became) == ("head", "dense")
    assert "shares a parameter with embed.weight" in entry.note


def test_a_tied_head_alone_is_an_error(model):
    with pytest.raises(ValueError, match=r"'head' matches only .*head \(shares .* embed.weight"):
        convert(model, {"linear": {"head": {"density": 0.5}}})


def test_memory_shared_behind_two_parameters_counts_as_tied(model):
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    with pytest.raises(ValueError, match=r"shares a parameter with embed.weight"):
        convert(model, {"linear": {"head": {"density": 0.5}}})


def test_modules_under_two_names_stay_shared(model):
    model.layers[1].up = model.layers[0].up
    convert(model, {"linear": {"layers.1.up": {"density": 0.5}}})
    assert isinstance(model.layers[0].up, BlockSparseLinear)
    assert model.layers[1].up is model.layers[0].up
    assert [entry.name for entry in model.lean_report().entries] == ["layers.0.up"]
    to_dense(model)
    assert type(model.layers[0].up) is nn.Linear and model.layers[1].up is model.layers[0].up


def test_a_bare_layer_is_pointed_to_what_makes_it_lean():
    with pytest.raises(ValueError, match=r"itself a Linear.*from_linear"):
        convert(nn.Linear(32, 32), {"linear": {"*": {}}})
    with pytest.raises(ValueError, match=r"itself a Embedding.*from_embedding"):
        convert(nn.Embedding(32, 32), {"embedding": {"*": {"kind": "low_rank", "rank": 4}}})


def test_float64_is_not_rounded_to_int8(model):
    before = [type(layer.up) for layer in model.double().layers]
    with pytest.raises(ValueError, match=r"layers.0.up: dtype .int8. takes no float64 weight"):
        convert(model, {"linear": {"*.up": {"dtype": "int8"}}})
    assert [type(layer.up) for layer in model.layers] == before
    with pytest.raises(ValueError, match="int8 takes no float64 weight"):
        BlockSparseLinear.from_linear(model.layers[0].up, weight_dtype="int8")


@pytest.mark.parametrize(
    ("glob", "message"),
    [
        ("layer.*.up", r"'layer.\*.up' matches no module; .* 'layers.\*.up'"),
        ("Layers.*.up", "matches no module"),
        ("*.norm", r"matches only .*layers.0.norm \(LayerNorm\), layers.1.norm \(LayerNorm\)"),
        ("layers", r"matches only modules that cannot be converted: layers \(ModuleList\)"),
        ("embed", r"embed \(Embedding\)"),
    ],
)
def test_globs_without_effect_are_errors(model, glob, message):
    before = state(model)
    recipe = {"linear": {"layers.0.up": {"density": 0.5}, glob: {"density": 0.5}}}
    with pytest.raises(ValueError, match=message):
        convert(model, recipe)
    assert same_state(state(model), before) and type(model.layers[0].up) is nn.Linear


def test_a_glob_that_earlier_ones_leave_nothing_is_an_error(model):
    rule = {"density": 0.5}
    recipe = {"linear": {"layers.0.*": rule, "layers.*": rule, "layers.1.up": rule}}
    with pytest.raises(ValueError, match=r"'layers.1.up' is without effect: .* 'layers.\*'"):
        convert(model, recipe)
    assert type(model.layers[0].up) is nn.Linear
    del recipe["linear"]["layers.*"]
    convert(model, recipe)


def test_no_rules_and_no_module_are_errors(model):
    with pytest.raises(ValueError, match="has no rules"):
        convert(model, {})
    with pytest.raises(ValueError, match=r"must be an nn.Module, got str"):
        convert("model", {"linear": {"*": {}}})
    with pytest.raises(ValueError, match="no layer that can be converted"):
        convert(nn.Sequential(nn.ReLU()), {"linear": {"x": {}}})


def test_converting_twice_is_an_error_that_says_so(model):
    recipe = {"linear": {"layers.0.up": {"density": 0.5}}}
    convert(model, recipe)
    with pytest.raises(ValueError, match="block-sparse already"):
        convert(model, recipe)
    convert(model, {"linear": {"layers.*.up": {"density": 0.5}}})  # one of the two is still dense
    assert [entry.name for entry in model.lean_report().entries] == ["layers.1.up", "layers.0.up"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_failed_convert_leaves_the_model_unchanged(model, bad):
    with torch.no_grad():
        model.layers[1].mix.weight[3, 4] = bad
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"layers.1.mix has NaN or infinite"):
        convert(model, {"linear": {"layers.*": {"density": 0.5}}})
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not hasattr(model, "lean_report")


def test_weights_without_data_are_an_error():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ValueError, match="0 is on the meta device"):
        convert(model, {"linear": {"0": {"density": 0.5}}})


def test_linears_that_torch_reads_directly_are_refused():
    layer = nn.TransformerEncoderLayer(32, 2, 64)
    with pytest.raises(ValueError, match=r"linear1 \(Linear of a layer whose fused path"):
        convert(layer, {"linear": {"linear1": {"density": 0.5}}})
    with pytest.raises(ValueError, match=r"out_proj \(NonDynamically.* subclass of nn.Linear"):
        convert(layer, {"linear": {"*out_proj": {"density": 0.5}}})


def test_linears_that_stay_are_listed():
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64), nn.Linear(32, 32))
    convert(model, {"linear": {"*": {"density": 0.5}}})
    became = {entry.name: entry.became for entry in model.lean_report().entries}
    assert became == {
        "0.self_attn.out_proj": "dense",
        "0.linear1": "dense",
        "0.linear2": "dense",
        "1": "BlockSparseLinear",
    }
    model.eval()(torch.ones(1, 3, 32))


def test_dtypes_without_kernels_are_refused():
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].weight = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Linear with a weight of type Parameter, torch.int8"):
        convert(model, {"linear": {"0": {}}})


def test_lazy_linears_stay():
    model = nn.Sequential(nn.LazyLinear(32), nn.Linear(32, 32))
    convert(model, {"linear": {"*": {"density": 0.5}}})
    assert [entry.became for entry in model.lean_report().entries] == ["dense", "BlockSparseLinear"]
    model(torch.ones(1, 5))


def test_layers_go_one_by_one_and_free_their_weight(model):
    weights = [weakref.ref(layer.up.weight) for layer in model.layers]
    steps, alive = [], []

    def progress(done, total, name):
        gc.collect()
        steps.append((done, total, name))
        alive.append([weight() is not None for weight in weights])

    convert(model, {"linear": {"layers.*.up": {"density": 0.5}}}, progress=progress)
    assert steps == [(0, 2, "layers.0.up"), (1, 2, "layers.1.up"), (2, 2, "")]
    assert alive == [[True, True], [False, True], [False, False]]


def test_converted_linears_take_their_density_of_memory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 768))
    convert(model, {"linear": {"*": {"density": 0.2}}})
    report = model.lean_report()
    dense = sum(4 * (768 * 3072 + bias) for bias in (3072, 768))
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert report.dense_bytes == dense
    assert report.lean_bytes == stored <= 0.22 * dense
    assert sum(t.untyped_storage().nbytes() for t in model.state_dict().values()) <= 0.22 * dense


def test_report(model):
    convert(model, {"linear": {"layers.0.*": {"density": 0.5}, "*": {"density": 1.0}}})
    report = model.lean_report()
    assert isinstance(report, LeanReport)
    up = report.entries[0]
    assert (up.name, up.in_features, up.out_features) == ("layers.0.up", 48, 96)
    assert (up.block_shape, up.density) == ((32, 32), 0.5)
    assert up.dense_bytes == 4 * (48 * 96 + 96)
    assert up.lean_bytes == 4 * (3 * 1024 + 96 + 4 + 3)
    as_dict = report.to_dict()
    assert as_dict["replaced"] == 6 and as_dict["left_dense"] == 1
    assert as_dict["dense_bytes"] == sum(entry["dense_bytes"] for entry in as_dict["entries"])
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.entries) + 1
    assert lines[1].split()[:2] == ["layers.0.up", "BlockSparseLinear"]
    assert lines[-1].startswith("6 layers block-sparse, 1 left dense: ")


def test_nothing_pruned_is_noted(model):
    convert(model, {"linear": {"layers.0.up": {}, "layers.1.up": {"density": 1.0}}})
    notes = [entry.note for entry in model.lean_report().entries]
    assert notes == ["no block is zero: set density to prune", ""]


def test_deepcopy_and_pickle(model):
    convert(model, {"linear": {"layers.*": {"density": 0.5}}})
    twin = copy.deepcopy(model)
    assert twin.lean_report() == model.lean_report()
    assert torch.equal(twin(IDS), model(IDS))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(IDS), model(IDS))
    assert str(loaded.lean_report()) == str(model.lean_report())


def test_attributes_of_the_dense_layer_carry_over(model):
    model.layers[0].up.weight.requires_grad_(False)
    model.bfloat16()
    convert(model, {"linear": {"layers.0.up": {"density": 0.5}}})
    lean = model.layers[0].up
    assert not lean.weight.requires_grad and lean.bias.requires_grad
    assert lean.weight.dtype == torch.bfloat16 and not lean.training


def test_to_dense_restores_weights_and_classes(model):
    before, types = state(model), [type(module) for module in model.modules()]
    convert(model, {"linear": {"layers.*": {"density": 1.0}}})
    assert to_dense(model) is model
    assert [type(module) for module in model.modules()] == types
    assert same_state(state(model), before)
    assert not hasattr(model, "lean_report")


def test_to_dense_does_not_lose_an_activation():
    model = nn.Sequential(
        BlockSparseLinear.from_linear(nn.Linear(32, 32), activation="gelu"), nn.Linear(32, 32)
    )
    with pytest.raises(ValueError, match="0 applies gelu itself"):
        to_dense(model)
    assert isinstance(model[0], BlockSparseLinear)


def test_a_plain_module_reloads_from_its_description(model):
    convert(model, {"linear": {"layers.*": {"density": 0.5}}})
    fresh = Model().eval()
    rebuild(fresh, describe(model)["modules"])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS), model(IDS))


def test_the_package_offers_the_function_after_the_submodule_is_imported():
    import lean_kernels.convert  # binds the name of a submodule to its package

    assert lk.convert is convert and lean_kernels.convert is convert


def test_kept_blocks_train(model):
    convert(model.train(), {"linear": {"layers.*": {"density": 0.5}}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.layers[0].up.weight.detach().clone()
    loss = model(IDS).square().mean()
    loss.backward()
    optimizer.step()
    assert not torch.equal(model.layers[0].up.weight, before)
    model.layers[0].up.validate()
