"""Transform and logits stay: every method, every family, every place, in fp64; and what each method is for."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, NEW, foldable
from transformers import AutoModelForCausalLM, LlamaConfig

import phasequant
from phasequant import transform
from phasequant.arch import GROUPS, ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.nn import KVQuantizer, QuantLinear, quant_linears
from phasequant.numerics import LinearMap, QuantSpec, random_orthogonal
from phasequant.observe.gsr import gsr
from phasequant.recipe import Recipe
from phasequant.transform import BlockTransform, Task, Transform, fixed_rotations
from phasequant.transform.dfrot import alternate, massive_tokens, rounding_error
from phasequant.transform.flat import kronecker_start, squarest
from phasequant.transform.frtq import precondition, uniform_target
from phasequant.transform.os_plus import search
from phasequant.transform.quarot import block_rotations
from phasequant.transform.smooth import migration
from phasequant.transform.wush import aligning

# Transformers computes RMSNorm in fp32 whatever the model, so fp64 logits agree to fp32 rounding, not better.
TOLERANCE = 2e-6
STATIC = QuantSpec(8, True, "tensor", static=True)
A4, W4 = QuantSpec(4, True, "token"), QuantSpec(4, True, "channel")
QUICK = {
    "rotation": {"iterations": 3, "preconditioning": 3, "down": "learned"},
    "learning": {"sequences": 4, "seqlen": 24, "batch": 2, "epochs": 1, "steps": 2},
}
ROTATING = ("quarot", "dfrot", "frtq", "spin")
LEARNED = ("smooth", "dfrot", "frtq", "spin", "flat", "wush")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def relative(a, b):
    return float((a - b).norm() / b.norm())


def task(model, model_map, ids, recipe, clips=frozenset(), a=A4, w=W4, seed=0):
    kv = QuantSpec(4, False, "group", model_map.shape.d_head)
    grids = {(block, group): a for block in model_map.blocks for group in GROUPS}
    return Task(
        model, model_map, ids, grids, w, kv, recipe.transform, recipe.rotation, recipe.learning, seed,
        torch.device("cpu"), torch.float64, frozenset(clips),
    )  # fmt: skip


def quick(method, **parts):
    values = {name: {**part, **parts.get(name, {})} for name, part in QUICK.items()}
    rest = parts.get("transform", {})
    return Recipe.from_dict({**values, "transform": {"method": method, **rest}})


def not_identity(found):
    maps = [getattr(b, n) for b in found.blocks for n in transform.contract.MAPS if getattr(b, n) is not None]
    scales = [s for b in found.blocks for s in b.scales.values()]
    eye = all(relative(m.matrix(), torch.eye(m.size, dtype=torch.float64)) > 0.1 for m in maps if m.size > 1)
    return eye and all(relative(s, torch.ones_like(s)) > 0.01 for s in scales) and (maps or scales)


WHERES = [(m, w) for m in ("quarot", *LEARNED) for w in ("folded", "online") if (m, w) != ("smooth", "online")]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("method", "where"), WHERES)
def test_every_method_keeps_logits(method, name, where, tiny, ids):
    source = tiny(name, torch.float64)
    before = logits(source.model, ids)
    recipe = quick(method, rotation={"where": where})
    if where == "folded" and method in ROTATING and not foldable(name):
        with pytest.raises(PhaseQuantError, match=r"can be folded into.*set rotation.where=online"):
            transform.METHODS[method].learn(task(source.model, source.map, ids, recipe))
        return
    found = transform.METHODS[method].learn(task(source.model, source.map, ids, recipe))
    assert torch.equal(logits(source.model, ids), before)  # the original is left alone
    assert not_identity(found)
    if method in ROTATING:
        assert (found.residual is not None) == found.folds_norms == (where == "folded")
    tied = source.model.config.tie_word_embeddings
    transform.apply(source.model, source.map, found)
    assert relative(logits(source.model, ids), before) < TOLERANCE
    assert source.model.config.tie_word_embeddings is (tied and not found.folds_norms)


@pytest.mark.parametrize("start", ["hadamard", "random", "wush"])
def test_flat_starts_anywhere(start, tiny, ids):
    source = tiny("llama-bias", torch.float64)
    before = logits(source.model, ids)
    found = transform.METHODS["flat"].learn(
        task(source.model, source.map, ids, quick("flat", learning={"start": start}), {"weights", "activations", "kv"})
    )
    assert set(found.block(0).weight_clips) == {n for g in source.map.groups for n in g.linears}
    assert set(found.block(0).inputs) == set(GROUPS) and found.block(0).kv is not None
    transform.apply(source.model, source.map, found)
    assert relative(logits(source.model, ids), before) < TOLERANCE


@pytest.mark.parametrize(("width", "ffn", "heads"), [(576, 2 * 191, 9), (896, 1216, 14), (3584, 1024, 28)])
def test_sizes_of_real_models(width, ffn, heads):
    """Hidden sizes of SmolLM2, Qwen2.5-0.5B and Qwen2.5-7B, an intermediate size with a large prime factor."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=ffn, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).double().eval().requires_grad_(False)
    model_map = ModelMap.from_config(config)
    ids = torch.randint(0, 64, (2, 16))
    before = logits(model, ids)
    methods = ("quarot", "wush", "flat", "frtq") if width < 3584 else ("quarot", "flat")
    for method in methods:
        work = copy.deepcopy(model)
        found = transform.METHODS[method].learn(
            task(work, model_map, ids, quick(method, rotation={"down": "hadamard"}))
        )
        transform.apply(work, model_map, found)
        assert relative(logits(work, ids), before) < TOLERANCE, method


def test_rungs_of_kronecker_maps():
    assert squarest(576) == (24, 24) and squarest(14336) == (112, 128)
    assert kronecker_start(11008, "hadamard", 0).shape_name == "86⊗128"
    assert kronecker_start(107, "hadamard", 0).shape_name == "107"  # prime: dense
    assert kronecker_start(16 * 521, "hadamard", 0).shape_name == "521 blocks of 16"
    assert kronecker_start(2 * 6151, "hadamard", 0) is None  # scales alone


def places(source, residual=False):
    shape = source.map.shape

    def dense(n, seed, m=1):
        return LinearMap.dense(torch.stack([random_orthogonal(n, seed + i) for i in range(m)]))

    def free(n, seed, m=1):
        g = torch.Generator().manual_seed(seed)
        return LinearMap.dense(torch.eye(n) + 0.2 * torch.randn(m, n, n, generator=g, dtype=torch.float64))

    scale = torch.rand(shape.d_ffn, dtype=torch.float64) + 0.5
    mix = LinearMap("mix", free(shape.heads, 3).left, tail=shape.d_head, orthogonal=False)
    carried = source.map.scaled
    gains = {g: torch.rand(shape.d_model, dtype=torch.float64) + 0.5 for g in ("qkv", "gate_up") if g in carried}
    value = free(shape.d_head, 4, shape.kv_heads)
    return {
        "qkv": BlockTransform(qkv=free(shape.d_model, 1)),
        "gate_up": BlockTransform(gate_up=free(shape.d_model, 2)),
        "value": BlockTransform(value=value),
        "heads": BlockTransform(heads=mix),
        "down": BlockTransform(down=free(shape.d_ffn, 5)),
        "down-scales": BlockTransform(scales={"down": scale}),
        "norm-scales": BlockTransform(scales=gains),
        "all": BlockTransform(
            qkv=free(shape.d_model, 1),
            gate_up=free(shape.d_model, 2),
            value=value if source.map.family.value is not None else None,
            heads=mix,
            down=free(shape.d_ffn, 5),
            scales={**({"down": scale} if "down" in carried else {}), **gains},
        ),
    }, dense(shape.d_model, 9)


@pytest.mark.parametrize("name", ["llama-bias", *NEW])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("place", ["qkv", "gate_up", "value", "heads", "down", "down-scales", "norm-scales", "all"])
def test_each_place_alone_keeps_logits(place, rotated, name, tiny, ids):
    """With any invertible map, not only Hadamards; alone and on top of a folded residual rotation."""
    source = tiny(name, torch.float64)
    before = logits(source.model, ids)
    blocks, residual = places(source)
    chosen = Transform.alike("one", source.map, blocks[place])
    if rotated and not foldable(name):
        with pytest.raises(PhaseQuantError, match=r"can be folded into.*set rotation.where=online"):
            transform.apply(source.model, source.map, replace(chosen, residual=residual, folds_norms=True))
        return
    if rotated:
        chosen = replace(chosen, residual=residual, folds_norms=True)
    missing = {"value": source.map.family.value, "down-scales": source.map.family.ups}
    if not missing.get(place, "there"):
        with pytest.raises(PhaseQuantError, match=f"cannot be folded into a {source.map.family.name} model"):
            transform.apply(source.model, source.map, chosen)
        return
    transform.apply(source.model, source.map, chosen)
    assert relative(logits(source.model, ids), before) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_gains_are_folded_as_they_are_stored(name, tiny, ids):
    """Scales in a norm's gain are rounded to the stored type before the weights make up for them."""
    source = tiny(name, torch.float64)
    before = logits(source.model, ids)
    blocks, _ = places(source)
    transform.apply(source.model, source.map, Transform.alike("s", source.map, blocks["norm-scales"]),
                    stored=torch.bfloat16)  # fmt: skip
    gain = source.model.model.layers[0].input_layernorm.weight
    assert torch.equal(gain.to(torch.bfloat16).to(gain.dtype), gain)
    assert not torch.equal(gain, tiny(name, torch.float64).model.model.layers[0].input_layernorm.weight)
    assert relative(logits(source.model, ids), before) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt_neox", "phi", "opt"])
def test_what_a_family_has_no_linear_for_is_left_out(name, tiny, ids):
    source = tiny(name)
    maps = {s["name"] for s in fixed_rotations(source.map, 0, "online").describe(source.map)}
    assert maps == {"T qkv", "M", "R3", "T gate_up", "R4"} | (set() if name == "gpt_neox" else {"R2"})
    found = transform.METHODS["smooth"].learn(task(source.model, source.map, ids, quick("smooth")))
    assert set(found.block(0).scales) == set(source.map.scaled)
    assert (found.block(0).value is None) == (name == "gpt_neox")
    blocks = block_rotations(source.map, 16).blocks
    assert (blocks[0].value is None) == (name == "gpt_neox")


def test_gemmas_gains_are_one_more_than_its_weights(tiny, ids):
    """Folded gains leave 0 in the weights of norms that multiply by 1 + w; 1 would double what they give."""
    source = tiny("gemma", torch.float64)
    transform.apply(source.model, source.map, fixed_rotations(source.map, 0))
    norms = {n: p for n, p in source.model.named_parameters() if "norm" in n}
    assert len(norms) == 7 and all(not weight.any() for weight in norms.values())


def test_missing_one_fold_is_seen(tiny, ids):
    """The invariance test can fail: without folding the gains, rotated logits are wrong."""
    source = tiny("llama", torch.float64)
    before = logits(source.model, ids)
    broken = replace(fixed_rotations(source.map, seed=1), folds_norms=False)
    transform.apply(source.model, source.map, broken)
    assert relative(logits(source.model, ids), before) > 1e-2


@pytest.mark.parametrize("orthogonal", [True, False])
def test_maps_of_keys_keep_attention_scores(orthogonal):
    from phasequant.numerics import spreading_rotation

    found = spreading_rotation(12) if orthogonal else LinearMap.dense(torch.eye(12) + 0.2 * torch.randn(12, 12))
    spec = QuantSpec(8, False, "group", 12)
    quantizer = KVQuantizer.of(spec, spec, 12, found)
    q, k = torch.randn(1, 4, 5, 12, dtype=torch.float64), torch.randn(1, 4, 7, 12, dtype=torch.float64)
    scores = quantizer.rotate_queries(q) @ quantizer.rotate_keys(k).transpose(-1, -2)
    assert torch.allclose(scores, q @ k.transpose(-1, -2), atol=1e-5)
    assert not torch.allclose(quantizer.rotate_keys(k), k, atol=1e-2)


def test_none_changes_nothing_but_the_linears(tiny, ids):
    source = tiny("qwen2")
    before = logits(source.model, ids)
    transform.apply(source.model, source.map, Transform("none"))
    assert torch.equal(logits(source.model, ids), before)
    assert len(quant_linears(source.model)) == 7 * source.map.shape.blocks
    assert all(isinstance(m, QuantLinear) for _, m in quant_linears(source.model))


def test_describe_names_rungs_places_and_costs(tiny):
    source = tiny("llama-odd")
    steps = {s["name"]: s for s in fixed_rotations(source.map, 0).describe(source.map)}
    blocks, shape = source.map.shape.blocks, source.map.shape
    assert steps["M"]["rung"] == "random-orthogonal" and steps["M"]["where"] == "online"
    assert steps["M"]["macs"] == blocks * shape.heads * shape.heads * shape.d_head
    assert steps["R4"]["rung"] == "random-orthogonal"  # 107 is prime
    assert steps["R1"]["where"] == "folded" and steps["R1"]["macs"] == 0
    assert steps["R4"]["macs"] == 107 * 107 * blocks
    online = fixed_rotations(source.map, 0, "online")
    steps = {s["name"]: s for s in online.describe(source.map)}
    assert "R1" not in steps and steps["T qkv"]["macs"] > 0 and "gains" not in steps
    assert online.online_macs(source.map) == sum(s["macs"] for s in steps.values() if s["where"] == "online")


# --- what each method is for ---------------------------------------------------------------------------------------


def spiky(tokens=256, width=64, seed=0):
    """Anisotropic Laplace tokens of norm √width, with a few massive ones."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(tokens, width, generator=g, dtype=torch.float64) - 0.5
    x = -u.sign() * (1 - 2 * u.abs()).clamp(min=1e-12).log() * torch.linspace(0.2, 3.0, width, dtype=torch.float64)
    x[:4] = 0.01 * x[:4]
    x[:4, 7] = 100.0
    return x * (width**0.5 / x.norm(dim=-1, keepdim=True))


def test_smooth_balances_by_the_published_formula():
    x_max, w_max = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([0.5, 0.5, 0.5])
    s = migration(x_max, w_max, 0.8)
    assert s[0] == pytest.approx(100**0.8 / 0.5**0.2) and s[2] == 1
    assert float(x_max[0] / s[0]) < 100 / 20


def test_dfrot_lowers_the_rounding_error_and_knows_massive_tokens():
    from phasequant.numerics import spreading_rotation

    rows = spiky()
    assert massive_tokens(rows, 0.13)[:4].all() and massive_tokens(rows, 0.13)[4:].double().mean() < 0.3
    start = LinearMap.dense(spreading_rotation(64, 0, randomize=True).matrix())
    weighted = torch.where(massive_tokens(rows, 0.13)[:, None], rows * 100, rows)
    found = alternate(weighted, start, 50)
    assert rounding_error(weighted, found) < 0.8 * rounding_error(weighted, start)
    massive, unweighted = massive_tokens(rows, 0.13), alternate(rows, start, 50)
    assert rounding_error(rows[massive], found) < 0.8 * rounding_error(rows[massive], unweighted)
    assert found.orthogonal and relative(found.apply(rows).norm(dim=-1), rows.norm(dim=-1)) < 1e-9


def test_preconditioning_contracts_the_grid_to_std_ratio():
    from phasequant.numerics import spreading_rotation

    rows = spiky(512)[4:]
    start = LinearMap.dense(spreading_rotation(64, 0, randomize=True).matrix())
    found = precondition(rows, start, 20)
    assert float(gsr(found.apply(rows)).mean()) < 0.95 * float(gsr(start.apply(rows)).mean())
    target = uniform_target(start.apply(rows))
    assert torch.allclose(target.norm(dim=-1), rows.norm(dim=-1))
    # the floor of a uniform row, up to its 64 points
    assert float(gsr(target).mean()) == pytest.approx(3**0.5 / 7, rel=0.03)


def test_wush_brings_activations_and_weights_to_the_same_moments():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(4000, 32, generator=g, dtype=torch.float64) @ torch.diag(torch.logspace(-1, 1, 32).double())
    w = torch.randn(64, 32, generator=g, dtype=torch.float64) @ torch.randn(32, 32, generator=g, dtype=torch.float64)
    t = aligning((x.T @ x / len(x))[None], (w.T @ w / len(w))[None])[0]
    a = (x @ t).T @ (x @ t) / len(x)
    v = w @ torch.linalg.inv(t).T
    b = v.T @ v / len(w)
    assert relative(a, b) < 0.1  # equal but for the damping

    def alignment(x, w):
        return float((x @ w.T).square().sum() / (w.square().sum() * x.square().sum()))

    assert alignment(x @ t, v) > 1.5 * alignment(x, w)


def block_loss(found):
    return [(b.notes["loss_before"], b.notes["loss_after"]) for b in found.blocks]


@pytest.mark.parametrize("optimizer", ["adamw", "zeta"])
def test_flat_lowers_every_blocks_loss_and_repeats(optimizer, tiny, ids):
    source = tiny("llama")
    recipe = quick("flat", learning={"epochs": 20, "optimizer": optimizer})
    clips = {"weights", "activations", "kv"}
    found = transform.METHODS["flat"].learn(task(source.model, source.map, ids, recipe, clips))
    assert sum(after for _, after in block_loss(found)) < 0.9 * sum(before for before, _ in block_loss(found))
    again = transform.METHODS["flat"].learn(task(source.model, source.map, ids, recipe, clips))
    for a, b in zip(found.blocks, again.blocks, strict=True):
        assert torch.equal(a.qkv.left, b.qkv.left) and a.inputs == b.inputs and a.kv == b.kv
        assert all(torch.equal(a.weight_clips[n], b.weight_clips[n]) for n in a.weight_clips)


@pytest.mark.parametrize("name", ["llama-bias", *NEW])
def test_a_block_that_is_learned_is_the_block(name, tiny, ids):
    """Before anything is rounded: maps, scales and norms as the learned block computes them change nothing."""
    source = tiny(name)
    given = replace(task(source.model, source.map, ids, quick("flat", learning={"epochs": 0}), a=None, w=None), kv=None)
    found = transform.METHODS["flat"].learn(given)
    assert not_identity(found) and set(found.block(0).scales) == set(source.map.scaled)
    assert all(before < 1e-9 for before, _ in block_loss(found))
    rounded = transform.METHODS["flat"].learn(replace(given, weights=W4))
    assert all(before > 1e-6 for before, _ in block_loss(rounded))


def test_blocks_are_independent(tiny, ids):
    """A block's result does not depend on how the others read: raising one block changes it alone."""
    source = tiny("llama")
    recipe = quick("flat")
    low = task(source.model, source.map, ids, recipe, {"activations"})
    raised = replace(low, activations={p: (QuantSpec(8) if p[0] == 1 else s) for p, s in low.activations.items()})
    a, b = (transform.METHODS["flat"].learn(one) for one in (low, raised))
    same = [torch.equal(x.qkv.left, y.qkv.left) for x, y in zip(a.blocks, b.blocks, strict=True)]
    assert same == [True, False, True]
    assert {s.bits for s in b.block(1).inputs.values()} == {8} and {s.bits for s in b.block(0).inputs.values()} == {4}


def test_learned_blocks_are_kept_and_a_changed_plan_learns_only_what_changed(tiny, ids, tmp_path, capsys):
    source = tiny("llama")
    recipe = quick("flat")
    low = replace(task(source.model, source.map, ids, recipe, {"activations"}), kept=tmp_path)
    first = transform.METHODS["flat"].learn(low)
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(kept) == 3
    second = transform.METHODS["flat"].learn(low)
    assert all(torch.equal(a.down.left, b.down.left) for a, b in zip(first.blocks, second.blocks, strict=True))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == kept
    assert "3 of 3 blocks were learned in an earlier run" in capsys.readouterr().err
    raised = replace(low, activations={p: (QuantSpec(8) if p[0] == 1 else s) for p, s in low.activations.items()})
    transform.METHODS["flat"].learn(raised)
    assert len(list(tmp_path.iterdir())) == 4
    for path in kept:
        path.write_bytes(b"damaged")
    again = transform.METHODS["flat"].learn(low)  # what cannot be read is learned anew
    assert torch.equal(again.block(0).down.left, first.block(0).down.left)


def test_clips_are_learned_for_any_transform(tiny, ids):
    source = tiny("llama")
    recipe = quick("quarot", learning={"epochs": 10})
    start = fixed_rotations(source.map, 0)
    found = transform.learn_clips(task(source.model, source.map, ids, recipe, {"weights", "activations", "kv"}), start)
    assert sum(after for _, after in block_loss(found)) < sum(before for before, _ in block_loss(found))
    block = found.block(0)
    assert torch.equal(block.down.left, start.block(0).down.left)  # maps stay
    assert all(0 < s.clip < 1 for s in block.inputs.values()) and len({s.clip for s in block.inputs.values()}) > 1
    assert torch.equal(found.residual.matrix(), start.residual.matrix())


def test_kept_blocks_know_the_rotation_of_the_residual(tiny, ids, tmp_path):
    """Two seeds of QuaRot differ in nothing but R1: their clips are learned apart."""
    source = tiny("llama")
    given = replace(task(source.model, source.map, ids, quick("quarot"), {"weights"}), kept=tmp_path)
    for seed in (0, 1):
        transform.learn_clips(given, fixed_rotations(source.map, seed))
    assert len(list(tmp_path.iterdir())) == 2 * source.map.shape.blocks


@pytest.mark.parametrize(("optimizer", "loss"), [("cayley", "ce"), ("cayley", "kl"), ("qr-orth", "kl"), ("zeta", "kl")])
def test_spin_lowers_its_loss_and_stays_orthogonal(optimizer, loss, tiny, ids):
    from phasequant.transform.learned_maps import LearnedRotation
    from phasequant.transform.spin import RotatedModel, _loss, start

    source = tiny("llama", seed=3)
    rate = {"cayley": 0.05, "qr-orth": 0.02, "zeta": 0.01}[optimizer]
    options = {"optimizer": optimizer, "steps": 30, "batch": 2, "loss": loss, "lr": rate}
    given = task(source.model, source.map, ids, quick("spin", learning=options))
    found = transform.METHODS["spin"].learn(given)

    def value(one):
        rotated = RotatedModel(given, one, LearnedRotation)
        teacher = source.model if loss == "kl" else None
        with torch.no_grad():
            return sum(float(_loss(rotated, teacher, row)) for row in ids)

    assert value(found) < value(start(given))
    eye = torch.eye(48, dtype=torch.float64)
    assert relative(found.residual.matrix() @ found.residual.matrix().T, eye) < 1e-9
    assert relative(found.residual.matrix(), start(given).residual.matrix()) > 1e-3


@pytest.mark.parametrize("name", ["llama", *NEW])
def test_spins_copy_is_the_model_before_anything_is_rounded(name, tiny, ids):
    """With caps on scores and logits, gains that are not the weights, and no dropout."""
    from phasequant.transform.learned_maps import LearnedRotation
    from phasequant.transform.spin import RotatedModel, start

    source = tiny(name)
    wanted = logits(source.model, ids[:1])
    recipe = quick("spin", rotation={"where": "folded" if foldable(name) else "online"})
    given = replace(task(source.model, source.map, ids, recipe, a=None, w=None), kv=None)
    rotated = RotatedModel(given, start(given), LearnedRotation)
    found = rotated.head(rotated.hidden(ids[:1]))
    assert found.requires_grad and relative(found.detach(), wanted) < 1e-5
    assert torch.equal(logits(source.model, ids[:1]), wanted)


def test_a_block_that_learning_made_worse_keeps_its_start(tiny, ids, capsys):
    source = tiny("llama")
    recipe = quick("flat", learning={"lr": 0.5, "clip_lr": 5.0, "epochs": 3})
    found = transform.METHODS["flat"].learn(task(source.model, source.map, ids, recipe, {"weights", "activations"}))
    assert "its start is kept" in capsys.readouterr().err
    for before, after in block_loss(found):
        assert after <= before
    worse = next(b for b in found.blocks if b.notes["loss_after"] == b.notes["loss_before"])
    start = torch.sigmoid(torch.tensor(4.0))
    assert all(torch.allclose(clips, start.expand_as(clips)) for clips in worse.weight_clips.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_os_plus_keeps_logits_and_divides_outlying_channels(name, tiny, ids):
    """A gain of 60 in one channel of the first norm (without one: rows of up): it is divided, the logits stay."""
    source = tiny(name, torch.float64)
    norm = source.map.group("qkv").norm
    block = source.model.get_submodule(source.map.block_name(0))
    group = "down" if norm is None else "qkv"
    if norm is None:
        block.get_submodule(source.map.family.ups[0]).weight[3] *= 60.0
    else:
        block.get_submodule(norm).weight[3] = 60.0
    before = logits(source.model, ids)
    found = transform.METHODS["os-plus"].learn(task(source.model, source.map, ids, quick("os-plus"), a=STATIC))
    scales = found.block(0).scales[group]
    assert scales[3] < 0.5 and scales.max() <= 1 and int(scales.argmin()) == 3
    transform.apply(source.model, source.map, found)
    assert relative(logits(source.model, ids), before) < TOLERANCE


def test_os_plus_leaves_even_inputs_alone():
    torch.manual_seed(0)
    sample, weight = torch.randn(64, 32).clamp(-1, 1), torch.randn(16, 32)
    peak = sample.abs().amax(0)
    assert torch.equal(search(peak, sample, weight, None, None), torch.ones(32))
    sample[:, 5] *= 50
    found = search(sample.abs().amax(0), sample, weight, STATIC, None)
    assert found[5] > 10 and (found.sum() - found[5]) < 33


# --- through the pipeline, and on disk -----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "where"), [pair for pair in WHERES if pair[0] != "quarot"])
def test_quantize_save_load_same_logits(method, where, tiny, ids, text_file, tmp_path, monkeypatch):
    # What was learned is taken, whether or not two steps on random weights happened to lower a loss on this machine.
    monkeypatch.setattr("phasequant.transform.block_job._mean_loss", lambda *_: 0.0)
    recipe = quick(method, rotation={"where": where}).with_(
        weights={"bits": 4, "clip": "learned"}, activations={"bits": 4, "clip": "learned"},
        kv={"bits": 4, "clip": "learned"}, calibration={"text": str(text_file), "sequences": 4, "seqlen": 64},
        policy={"name": "budget"},
    )  # fmt: skip
    run = phasequant.quantize(tiny("llama-bias"), recipe)
    assert run.plan.raised and run.plan.clips
    assert len({linear.input_spec.clip for _, linear in quant_linears(run.model)}) > 2
    made = logits(run.model, ids)
    run.save(tmp_path / "out")
    assert torch.equal(logits(phasequant.load(tmp_path / "out"), ids), made)
    again = run.plan.from_json(run.plan.to_json(), source_map := run.map)
    assert again.clips == run.plan.clips and again.model is source_map


def test_a_learned_plan_is_learned_with_its_bits(tiny, text_file):
    """The plan comes first: raised groups are learned, and clipped, at 8 bits."""
    recipe = quick("flat").with_(
        weights={"bits": 4, "clip": "learned"}, activations={"bits": 4, "clip": "learned"}, policy={"name": "paper"},
        calibration={"text": str(text_file)},
    )  # fmt: skip
    source = tiny("llama")
    run = phasequant.quantize(source, recipe)
    assert {b for b, _ in run.plan.raised} == {0, 1, 2}
    assert {s.bits for b in run.transform.blocks for s in b.inputs.values()} == {8}


def test_transforms_are_saved_and_loaded(tiny, ids, tmp_path):
    source = tiny("llama", torch.float64)
    before = logits(source.model, ids)
    found = transform.METHODS["frtq"].learn(task(source.model, source.map, ids, quick("frtq")))
    path = transform.save_transform(tmp_path / "r.safetensors", found, source.map)
    recipe = Recipe.from_dict({"transform": {"method": "load", "file": str(path)}})
    again = transform.METHODS["load"].learn(task(source.model, source.map, ids, recipe))
    assert torch.equal(again.residual.matrix(), found.residual.matrix()) and again.folds_norms
    transform.apply(source.model, source.map, again)
    assert relative(logits(source.model, ids), before) < TOLERANCE
    with pytest.raises(PhaseQuantError, match="another architecture or size"):
        transform.load_transform(path, tiny("llama-odd").map)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PhaseQuantError, match="cannot be used"):
        transform.load_transform(path, source.map)


def test_foreign_rotations_are_loaded_without_running_anything(tiny, ids, tmp_path):
    source = tiny("llama", torch.float64)
    shape = source.map.shape
    before = logits(source.model, ids)
    stored = {f"model.layers.{i}.self_attn.R2": random_orthogonal(shape.d_head, i).float() for i in source.map.blocks}
    torch.save({"R1": random_orthogonal(shape.d_model, 7).float(), **stored}, tmp_path / "R.bin")
    recipe = Recipe.from_dict({"transform": {"method": "load", "file": str(tmp_path / "R.bin")}})
    found = transform.METHODS["load"].learn(task(source.model, source.map, ids, recipe))
    transform.apply(source.model, source.map, found)
    assert relative(logits(source.model, ids), before) < TOLERANCE

    class Evil:
        def __reduce__(self):
            return (print, ("run!",))

    torch.save({"R1": Evil()}, tmp_path / "evil.bin")
    for name, message in (("evil.bin", "cannot be used"), ("none.bin", "cannot be used")):
        bad = Recipe.from_dict({"transform": {"method": "load", "file": str(tmp_path / name)}})
        with pytest.raises(PhaseQuantError, match=message):
            transform.METHODS["load"].learn(task(source.model, source.map, ids, bad))
    torch.save({"R1": torch.eye(8), **stored}, tmp_path / "R.bin")
    with pytest.raises(PhaseQuantError, match="another model"):
        transform.METHODS["load"].learn(task(source.model, source.map, ids, recipe))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["transform.method=load"], "transform.file goes with"),
        (["transform.method=flat", "learning.optimizer=cayley"], "goes with spin"),
        (["transform.method=spin", "learning.optimizer=adamw"], "does not keep rotations orthogonal"),
        (["transform.method=flatt"], "flat"),
        (["rotation.were=online"], "where"),
    ],
)
def test_recipes_that_do_not_fit_are_errors(sets, message):
    with pytest.raises(PhaseQuantError, match=message):
        Recipe.load("16bit", sets)


@pytest.mark.parametrize("method", ["quarot", "frtq"])
def test_heads_that_stay_apart_leave_nothing_online_before_o(method, tiny, text_file):
    recipe = Recipe.from_dict(
        {
            "transform": {"method": method},
            "rotation": {"heads": "apart", "iterations": 3, "preconditioning": 3},
            "learning": {"sequences": 2, "seqlen": 32},
            "calibration": {"text": str(text_file)},
            "storage": {"dtype": "float32"},
        }
    )
    source = tiny("llama")
    ids = torch.randint(0, 256, (1, 20))
    before = logits(source.model, ids)
    run = phasequant.quantize(source, recipe)
    online = {step["name"] for step in run.transform.describe(source.map) if step["where"] == "online"}
    assert online == {"R3", "R4"} or online == {"R4"}
    assert torch.allclose(logits(run.model, ids), before, atol=1e-4)
    with pytest.raises(PhaseQuantError, match="decides that itself"):
        Recipe.from_dict({"transform": {"method": "wush"}, "rotation": {"heads": "apart"}})
