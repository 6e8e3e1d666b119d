"""GPTQ against the textbook, and where it must not die; low-rank branches; the walk over a whole model."""

import pytest
import torch
from conftest import CONFIGS, foldable

import phasequant
from phasequant import pipeline
from phasequant.errors import PhaseQuantError
from phasequant.nn import quant_linears
from phasequant.numerics import QuantSpec, dequantize, fake_quantize, round_values
from phasequant.recipe import Recipe
from phasequant.weight import Moments, best_weights, gptq, round_to_nearest, shrunk
from phasequant.weight.gptq import normalized, refit
from phasequant.weight.lowrank import split

GRIDS = [
    QuantSpec(4, True, "channel", clip="mse"),
    QuantSpec(4, False, "channel", clip=1.0),
    QuantSpec(4, True, "group", 32, "mse"),
    QuantSpec(3, False, "group", 64, 1.0),
]


def textbook(weight, hessian, scale, zero, spec, damping):
    """GPTQ by its paper, one column at a time, U from the Cholesky factor of the inverse, fp64."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian /= hessian.diagonal().mean()
    hessian.diagonal().add_(damping)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes = torch.zeros_like(weight)
    span = weight.shape[1] // scale.shape[1]
    for i in range(weight.shape[1]):
        c, v = round_values(weight[:, i], scale[:, i // span].double(), zero[:, i // span].double(), spec)
        codes[:, i] = c
        weight[:, i + 1 :] -= ((weight[:, i] - v) / upper[i, i])[:, None] * upper[i, i + 1 :]
    return codes


@pytest.fixture
def problem():
    """A weight and inputs of very unequal, correlated channels; wider than one block of columns."""
    torch.manual_seed(0)
    weight = torch.randn(48, 320)
    inputs = torch.randn(2000, 320) @ torch.randn(320, 320) * torch.rand(320).pow(2)
    return weight, inputs.T @ inputs


def output_error(weight, made, hessian):
    error = (weight - made).double()
    return float(((error @ hessian.double()) * error).sum() / ((weight @ hessian) * weight).double().sum())


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_gptq_is_the_textbooks(problem, spec):
    weight, hessian = problem
    made, told = gptq(weight, hessian, spec, order="natural")
    wanted = textbook(weight, hessian, made.scale, made.zero, spec, 0.01)
    assert (made.codes.double() != wanted).double().mean() < 2e-3  # fp32 against fp64, at ties
    assert told.rung == "gptq" and told.why is None
    damped = normalized(hessian)[0]
    damped.diagonal().add_(0.01)
    error = weight - made.values(spec)
    loss = float(((error @ damped) * error).sum() / ((weight @ normalized(hessian)[0]) * weight).sum())
    assert told.error == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_gptq_beats_rounding_to_nearest(problem, spec, order):
    weight, hessian = problem
    made, _ = gptq(weight, hessian, spec, order=order)
    nearest = output_error(weight, fake_quantize(weight, spec), hessian)
    assert output_error(weight, made.values(spec), hessian) < 0.65 * nearest
    same = round_to_nearest(weight, spec)
    assert torch.equal(made.scale, same.scale) and torch.equal(made.zero, same.zero)
    more, told = gptq(weight, hessian, spec, order=order, rounds=8)
    assert output_error(weight, more.values(spec), hessian) < 0.97 * output_error(weight, made.values(spec), hessian)
    assert told.error < 0.97 * gptq(weight, hessian, spec, order=order)[1].error


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_refitted_scales_are_the_least_squares_ones(problem, spec):
    weight, hessian = problem
    made, _ = gptq(weight, hessian, spec)
    found = refit(weight, made.codes, made.scale, made.zero, hessian, spec)
    best = output_error(weight, dequantize(made.codes, found, made.zero, spec), hessian)
    assert best <= output_error(weight, made.values(spec), hessian)
    for factor in (0.999, 1.001):
        assert output_error(weight, dequantize(made.codes, found * factor, made.zero, spec), hessian) > best


def test_activation_order_helps_and_is_stored_unpermuted(problem):
    weight, hessian = problem
    spec = GRIDS[2]
    natural, _ = gptq(weight, hessian, spec, order="natural")
    ordered, _ = gptq(weight, hessian, spec, order="activation")
    a, b = (output_error(weight, made.values(spec), hessian) for made in (natural, ordered))
    assert b < 0.9 * a


def test_a_diagonal_hessian_is_rounding_to_nearest(problem):
    weight, hessian = problem
    for spec in GRIDS:
        made, _ = gptq(weight, hessian.diagonal().diag(), spec)
        assert torch.equal(made.codes, round_to_nearest(weight, spec).codes)


def test_learned_clips_are_the_scales(problem):
    weight, hessian = problem
    spec, clips = QuantSpec(4, True, "channel"), torch.rand(48, 1) * 0.5 + 0.5
    made, _ = gptq(weight, hessian, spec, clips)
    assert torch.equal(made.scale, round_to_nearest(weight, spec, clips).scale)


@pytest.mark.parametrize("spec", GRIDS[:1] + GRIDS[3:], ids=str)
def test_it_never_dies(problem, spec):
    weight, hessian = problem
    nearest = round_to_nearest(weight, spec).codes

    made, told = gptq(weight, torch.zeros_like(hessian), spec)  # nothing was seen
    assert torch.equal(made.codes, nearest) and told.dead == 320 and told.rung == "gptq"

    few = torch.randn(3, 320)
    made, told = gptq(weight, few.T @ few, spec)  # rank 3: the damping carries it
    assert told.why is None and output_error(weight, made.values(spec), few.T @ few) < 1e-3

    made, told = gptq(weight, hessian * 1e30, spec)  # near the end of fp32
    assert torch.equal(made.codes, gptq(weight, hessian, spec)[0].codes)
    made, told = gptq(weight, hessian * 1e-30, spec)
    assert torch.equal(made.codes, gptq(weight, hessian, spec)[0].codes)

    for bad in (float("nan"), float("inf")):
        broken = hessian.clone()
        broken[5, 7] = bad
        made, told = gptq(weight, broken, spec)
        assert torch.equal(made.codes, nearest) and told.rung == "rtn" and "not finite" in told.why

    broken = weight.clone()
    broken[3, 4] = float("nan")
    with pytest.raises(PhaseQuantError, match=r"block 7, down has 1 values that are not finite"):
        gptq(broken, hessian, spec, place="block 7, down")
    made, _ = gptq(torch.zeros_like(weight), hessian, spec)
    assert (made.values(spec) == 0).all()


def test_the_damping_ladder_and_its_end(problem):
    weight, hessian = problem
    spec = GRIDS[0]
    value, vectors = torch.linalg.eigh(normalized(hessian)[0].double())
    indefinite = (vectors * torch.where(value < value.median(), -0.3, value)) @ vectors.T
    made, told = gptq(weight, indefinite.float(), spec)
    assert told.rung == "gptq (damping 1, float32)" and "singular" in told.why and told.error is not None
    far = normalized(hessian)[0]
    far[0, 1] = far[1, 0] = 1e4  # no diagonal of the ladder outweighs this
    made, told = gptq(weight, far.float(), spec)
    assert told.rung == "rtn" and "no Cholesky factor" in told.why
    assert torch.equal(made.codes, round_to_nearest(weight, spec).codes)


def test_dead_columns_round_to_nearest_and_leave_others_alone(problem):
    weight, hessian = problem
    spec = GRIDS[0]
    hessian[:, 10:20] = 0
    hessian[10:20] = 0
    made, told = gptq(weight, hessian, spec)
    assert told.dead == 10
    assert torch.equal(made.codes[:, 10:20], round_to_nearest(weight, spec).codes[:, 10:20])
    kept = [i for i in range(320) if not 10 <= i < 20]
    alone, _ = gptq(weight[:, kept], hessian[kept][:, kept], spec, scales=(made.scale, made.zero))
    assert (alone.codes != made.codes[:, kept]).double().mean() < 2e-3


# --- moments ------------------------------------------------------------------------------------------------------


def test_moments_of_full_rounded_and_mixed_inputs():
    torch.manual_seed(0)
    spec = QuantSpec(4)
    parts = torch.randn(3, 50, 16)
    x = parts.flatten(0, 1)
    q = fake_quantize(x, spec)
    wanted = {"full": x.T @ x, "rounded": q.T @ q, "mixed": (x.T @ x + q.T @ q) / 2}
    for kind, hessian in wanted.items():
        found = Moments(16, torch.device("cpu"), kind)
        for part in parts:
            found.add(part, lambda x: fake_quantize(x, spec))
        torch.testing.assert_close(found.hessian, hessian)
        assert found.tokens == 150


def test_best_weights_are_the_least_squares_ones():
    torch.manual_seed(0)
    weight, x = torch.randn(8, 16), torch.randn(400, 16)
    original = x @ (torch.eye(16) + 0.1 * torch.randn(16, 16)) + 0.05 * torch.randn(400, 16)
    moments = Moments(16, torch.device("cpu"), cross=True)
    moments.add(x, None, original)
    found, why = best_weights(weight, moments, 1e-7)
    assert why is None
    exact = torch.linalg.lstsq(x, original @ weight.T).solution.T
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(best_weights(weight, moments, 1e7)[0], weight, rtol=1e-3, atol=1e-3)
    same = Moments(16, torch.device("cpu"), cross=True)
    same.add(x, None, x)
    torch.testing.assert_close(best_weights(weight, same, 0.01)[0], weight)


def test_a_rarely_used_expert_borrows_from_all_tokens():
    own, shared = torch.eye(4) * 6, torch.ones(4, 4) * 100
    assert shrunk(own, 40, shared, 1000, 32) is own
    torch.testing.assert_close(shrunk(own, 6, shared, 100, 16), own + shared * 0.1)
    assert shrunk(own, 0, shared, 0, 16) is own


# --- low rank -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "loftq", "tsvd"])
@pytest.mark.parametrize("weighted", [False, True])
def test_branch_and_residual_make_the_weight(problem, method, weighted):
    weight, hessian = problem
    spec = GRIDS[0]
    root = None
    if weighted:
        damped = normalized(hessian)[0]
        damped.diagonal().add_(0.01)
        root = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    branch, residual, notes = split(weight, spec, 8, method, root=root, iterations=20)
    assert branch.down.shape == (8, 320) and branch.up.shape == (48, 8) and branch.up.dtype == torch.bfloat16
    torch.testing.assert_close(branch.product() + residual, weight, rtol=1e-5, atol=1e-5)

    def error(made):
        return float(((made - weight) if root is None else (made - weight) @ root).square().sum())

    rounded = fake_quantize(residual, spec) + branch.product()
    assert error(rounded) < error(fake_quantize(weight, spec))
    assert notes["branch_error"] <= notes["svd_error"] and notes["rank"] == 8


def test_the_methods_differ_as_they_should():
    """A weight with rows of outliers: tuned truncation < alternation < plain SVD, in rounding error."""
    torch.manual_seed(0)
    weight = torch.randn(128, 128)
    weight += 10 * torch.randn(128, 4) @ torch.randn(4, 128) * (torch.rand(128, 128) < 0.1)
    spec = QuantSpec(4, True, "channel")
    errors = {}
    for method in ("svd", "loftq", "tsvd"):
        _, residual, _ = split(weight, spec, 16, method, stored=torch.float32)
        errors[method] = float((fake_quantize(residual, spec) - residual).square().sum())
    assert errors["tsvd"] < errors["loftq"] < errors["svd"]


def test_svd_is_the_best_of_its_rank(problem):
    weight, _ = problem
    branch, _, _ = split(weight, GRIDS[0], 8, "svd", stored=torch.float32)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(branch.product(), (u[:, :8] * s[:8]) @ v[:8], rtol=1e-4, atol=1e-4)


def test_a_rank_that_does_not_fit_is_told(problem):
    with pytest.raises(PhaseQuantError, match=r"lowrank.rank 48 is not between 1 and 47"):
        split(problem[0], GRIDS[0], 48)


# --- through the pipeline -----------------------------------------------------------------------------------------


def recipe_of(text_file, **parts):
    base = Recipe.load("quarot").with_(
        weights={"method": "gptq", "sequences": 4, "seqlen": 64},
        calibration={"text": str(text_file), "sequences": 4, "seqlen": 64},
    )
    return base.with_(**parts)


VARIANTS = {
    "gptq": {},
    "rounded": {"weights": {"hessian": "rounded"}},
    "mixed-natural": {"weights": {"hessian": "mixed", "order": "natural", "sequential": False}},
    "outputs": {"weights": {"hessian": "rounded", "target": "outputs"}},
    "groups": {"weights": {"granularity": "group", "group_size": 8, "symmetric": False}},
    "tsvd": {"lowrank": {"method": "tsvd", "rank": 4, "iterations": 5}},
    "loftq-rtn": {"weights": {"method": "rtn"}, "lowrank": {"method": "loftq", "rank": 4, "iterations": 5}},
    "svd-blind": {
        "weights": {"method": "rtn"},
        "lowrank": {"method": "svd", "ranks": {"o": 0, "qkv": 2}, "rank": 4, "weighting": "none", "input": "rounded"},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_quantize_save_load_same_logits(name, tiny, ids, text_file, tmp_path):
    recipe = recipe_of(text_file, **VARIANTS[name])
    run = phasequant.quantize(tiny("llama-bias"), recipe)
    told = run.origin["weights"]
    assert len(told["groups"]) == 4 * 3 and told["method"] == recipe.weights.method
    if recipe.weights.method == "gptq":
        assert all(entry["rung"].startswith("gptq") and 0 < entry["error"] < 1 for entry in told["groups"])
    made = run.model(ids, use_cache=False).logits
    run.save(tmp_path / "out")
    loaded = phasequant.load(tmp_path / "out")
    assert torch.equal(loaded(ids, use_cache=False).logits, made)
    for group in run.map.groups:
        for linear in group.linears:
            assert loaded.get_submodule(f"model.layers.1.{linear}").rank == recipe.lowrank.rank_of(group.name)
    again = phasequant.quantize(tiny("llama-bias"), recipe)
    for (_, a), (_, b) in zip(quant_linears(run.model), quant_linears(again.model), strict=True):
        assert torch.equal(a.weight_packed, b.weight_packed)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name, tiny, ids, text_file):
    source = tiny(name)
    recipe = recipe_of(text_file, lowrank={"method": "svd", "rank": 2})
    run = phasequant.quantize(source, recipe if foldable(name) else recipe.with_(rotation={"where": "online"}))
    assert torch.isfinite(run.model(ids, use_cache=False).logits).all()


def test_gptq_sees_what_the_quantized_blocks_before_produce(tiny, text_file, monkeypatch):
    """The Hessian of the last group of the last block is of inputs that quantized blocks made."""
    from phasequant.weight import group

    seen = {}
    true = group.gptq

    def spy(weight, hessian, *args, place, **options):
        seen[place] = hessian.clone()
        return true(weight, hessian, *args, place=place, **options)

    monkeypatch.setattr(group, "gptq", spy)
    source = tiny("llama")
    run = phasequant.quantize(source, recipe_of(text_file, activations={"bits": 16}, kv={"bits": 16}))
    from phasequant import text

    tokens = text.cut(text.find(str(text_file), "calibration"), source.tokenizer, 64, 4)
    inputs = []
    linear = run.model.get_submodule("model.layers.2.mlp.down_proj")
    linear.register_forward_pre_hook(lambda m, a: inputs.append(m.prepare(a[0].flatten(0, -2))))
    for row in tokens:
        run.model(row[None], use_cache=False)
    x = torch.cat(inputs)
    torch.testing.assert_close(seen["block 2, down"], x.T @ x, rtol=1e-3, atol=1e-3)


def test_outputs_are_nearer_with_more_of_what_gptq_can_see(tiny, text_file):
    """Rounding to nearest > GPTQ > GPTQ towards the outputs, in error of the logits on the calibration text."""
    from phasequant import text

    source = tiny("llama")
    tokens = text.cut(text.find(str(text_file), "calibration"), source.tokenizer, 64, 4)
    before = torch.cat([source.model(row[None]).logits for row in tokens])
    errors = {}
    for name, weights in {
        "rtn": {"method": "rtn"},
        "gptq": {},
        "outputs": {"hessian": "rounded", "target": "outputs"},
    }.items():
        run = phasequant.quantize(tiny("llama"), recipe_of(text_file, weights=weights, kv={"bits": 16}))
        after = torch.cat([run.model(row[None], use_cache=False).logits for row in tokens])
        errors[name] = float((after - before).square().sum() / before.square().sum())
    assert errors["outputs"] < errors["gptq"] < errors["rtn"]


def test_a_linear_that_fell_to_rounding_is_told(tiny, text_file, monkeypatch, capsys):
    from phasequant.weight import inputs

    class Broken(inputs.Moments):
        def add(self, *args):
            super().add(*args)
            self.hessian[0, 0] = float("nan")

    monkeypatch.setattr(inputs, "Moments", Broken)
    run = phasequant.quantize(tiny("llama-one"), recipe_of(text_file))
    assert {entry["rung"] for entry in run.origin["weights"]["groups"]} == {"rtn"}
    assert "rounded to nearest, because the Hessian is not finite" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights.method=gptqq", "gptq"),
        ("lowrank.method=tsv", "tsvd"),
        ("lowrank.ranks={downn: 3}", "lowrank.ranks"),
        ("lowrank.rank=0", "greater than or equal to 1"),
    ],
)
def test_wrong_keys_are_told(override, message):
    with pytest.raises(PhaseQuantError, match=message):
        Recipe.load("quarot", [override])


def test_a_branch_needs_codes():
    with pytest.raises(PhaseQuantError, match="lowrank goes beside codes"):
        Recipe.load("16bit", ["lowrank.method=svd"])


def test_codes_from_rounded_inputs_see_the_plan(tiny, text_file):
    """What is raised to 8 bits gives another Hessian, and so other codes; with full inputs the plan changes nothing."""
    codes = {}
    for hessian in ("full", "rounded"):
        for policy in ("uniform", "paper"):
            recipe = recipe_of(text_file, weights={"hessian": hessian}, policy={"name": policy})
            assert pipeline.sees_plan(recipe) == (hessian == "rounded")
            run = phasequant.quantize(tiny("llama"), recipe)
            codes[hessian, policy] = run.model.get_submodule("model.layers.1.mlp.down_proj").weight_packed
    assert torch.equal(codes["full", "uniform"], codes["full", "paper"])
    assert not torch.equal(codes["rounded", "uniform"], codes["rounded", "paper"])


def test_branches_are_counted(tiny):
    model_map = tiny("llama").map
    recipe = Recipe.load("frtq-tsvd", ["lowrank.rank=4", "lowrank.ranks={o: 0}"])
    groups = [g for g in model_map.groups if g.name != "o"]
    wanted = sum(4 * (model_map.width_in(g.name) + model_map.width_out(g.name)) for g in groups) * 3
    assert pipeline.branch_macs(recipe, model_map) == wanted


@pytest.mark.parametrize("sequential", [True, False])
def test_the_target_is_the_16_bit_models(sequential, tiny, text_file, monkeypatch):
    """`target: outputs` compares with hidden states that no quantized block has touched."""
    from phasequant import text
    from phasequant.weight import walk

    seen = {}
    true = walk.moments_of

    def spy(task, block, twin, groups, hidden, original, *rest):
        seen[len(seen)] = (list(hidden), list(original))
        return true(task, block, twin, groups, hidden, original, *rest)

    monkeypatch.setattr(walk, "moments_of", spy)
    source = tiny("llama")
    tokens = text.cut(text.find(str(text_file), "calibration"), source.tokenizer, 64, 4)
    with torch.no_grad():
        wanted = [source.model(row[None], output_hidden_states=True).hidden_states[2][0] for row in tokens]
    weights = {"hessian": "rounded", "sequential": sequential}
    recipe = recipe_of(text_file, weights=weights, transform={"method": "none"}, storage={"dtype": "float32"})
    phasequant.quantize(tiny("llama"), recipe)
    hidden, original = seen[8 if sequential else 2]
    assert len(seen) == (12 if sequential else 3)
    torch.testing.assert_close(original, wanted, rtol=1e-4, atol=1e-4)
    assert all(float((a - b).abs().max()) > 1e-2 for a, b in zip(hidden, wanted, strict=True))


def test_weighting_of_branches_is_followed_and_only_gptq_aims_at_outputs(tiny, text_file, monkeypatch):
    from phasequant.weight import group, walk

    roots, twins = [], []
    true_split, true_twin = group.split, walk.sixteen_bit_twin
    monkeypatch.setattr(group, "split", lambda *a, **o: roots.append(o["root"]) or true_split(*a, **o))
    monkeypatch.setattr(walk, "sixteen_bit_twin", lambda *a: twins.append(1) or true_twin(*a))
    for weighting in ("none", "hessian"):
        roots.clear()
        recipe = recipe_of(text_file, lowrank={"method": "svd", "rank": 2, "weighting": weighting})
        phasequant.quantize(tiny("llama-one"), recipe)
        assert len(roots) == 4 and all((root is None) == (weighting == "none") for root in roots)
    assert len(twins) == 2
    recipe = recipe_of(text_file, weights={"method": "rtn"}, lowrank={"method": "svd", "rank": 2})
    phasequant.quantize(tiny("llama-one"), recipe)
    assert len(twins) == 2


def test_a_branch_without_its_hessian_is_told(tiny, text_file, monkeypatch, capsys):
    from phasequant.weight import group

    monkeypatch.setattr(group, "factor", lambda *a: (None, "no factor"))
    recipe = recipe_of(text_file, weights={"method": "rtn"}, lowrank={"method": "svd", "rank": 2})
    run = phasequant.quantize(tiny("llama-one"), recipe)
    assert all("chosen without data: no factor" in entry["why"] for entry in run.origin["weights"]["groups"])
    assert "did not go as asked" in " ".join(capsys.readouterr().err.split())


def test_calibration_longer_than_the_model_is_shortened_and_said(tiny, text_file, capsys):
    recipe = Recipe.from_dict(
        {
            "weights": {"bits": 4, "method": "gptq", "seqlen": 600, "sequences": 1},
            "prefix": {"method": "bos"},
            "calibration": {"text": str(text_file), "sequences": 1, "seqlen": 64},
        }
    )
    phasequant.quantize(tiny("opt"), recipe)  # whose table of positions ends there
    said = capsys.readouterr().err
    assert "weights: sequences of 511 tokens, not 600: the model has 512 positions, 1 of them the prefix's" in said
