"""Sensitivities against the same thing done the long way; the knapsack against all plans; swaps against both."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import where

import phasequant
from phasequant import pipeline, planning
from phasequant.arch import GROUPS
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import kl_divergence
from phasequant.nn import QuantLinear, quant_linears, set_activations
from phasequant.numerics import QuantSpec, fake_quantize
from phasequant.observe import search_clips
from phasequant.observe.clips import RATIOS
from phasequant.plan import PrecisionPlan, Prices, Terms, better
from phasequant.plan.knapsack import solve
from phasequant.recipe import Recipe
from phasequant.sensitivity import MEASURES, Ask, PlanDivergence, Runs
from phasequant.source import Source

LOW, HIGH = QuantSpec(4), QuantSpec(8)


def asked(source: Source, tokens, choices=(HIGH,), **parts) -> Ask:
    recipe = Recipe.from_dict({"transform": {"method": "quarot"}, "activations": {"bits": 4}, **parts})
    made = pipeline.observe_and_transform(source, recipe, raw=False, transformed=True, noise=True)
    runs = Runs(source.model, tokens, torch.device("cpu"))
    return Ask(source.map, made.observations[-1], LOW, choices, False, runs)


@pytest.fixture
def ask(tiny, ids):
    return asked(tiny("llama"), ids, (HIGH, QuantSpec(6), None))


def long_way(ask, activations):
    """KL of the whole model, its activations on given grids."""
    model = ask.run.model

    def logits(grids):
        set_activations(model, ask.map, grids)
        with torch.no_grad():
            return [model(row[None], use_cache=False).logits[0] for row in ask.run.tokens]

    everywhere = [(b, g.name) for b in ask.map.blocks for g in ask.map.groups]
    exact = logits(dict.fromkeys(everywhere))
    rounded = logits(activations)
    set_activations(model, ask.map, dict.fromkeys(everywhere))
    total = sum(
        float((p.log_softmax(-1).exp() * (p.log_softmax(-1) - q.log_softmax(-1))).sum())
        for p, q in zip(exact, rounded, strict=True)
    )
    return total / ask.run.tokens.numel()


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "gemma2"])
def test_kl_is_that_of_the_whole_model(name, tiny, ids):
    choices = (HIGH, None)
    parts = {"rotation": {"where": "online"}}
    ask = asked(tiny(name), ids, choices, **parts)
    found = MEASURES["kl"](ask)
    base = long_way(ask, dict.fromkeys(ask.places, LOW))
    assert found.notes["all_low"] == pytest.approx(base, rel=0.02, abs=1e-4)
    for place in [(0, "qkv"), (1, "down"), (2, "gate_up"), (2, "o")]:
        each = {4: base}
        for bits, spec in ((8, HIGH), (16, None)):
            each[bits] = long_way(ask, {**dict.fromkeys(ask.places, LOW), place: spec})
        for bits, value in each.items():
            assert found.harm[place][bits] == pytest.approx(value - min(each.values()), rel=0.05, abs=0.02 * base)


def test_kl_alone_is_that_of_one_group(ask):
    found = MEASURES["kl_alone"](ask)
    for place in ask.places:
        assert found.harm[place][16] == 0.0
        wanted = long_way(ask, {**dict.fromkeys(ask.places), place: LOW})
        assert found.harm[place][4] == pytest.approx(wanted, rel=0.03, abs=1e-4)
        assert found.harm[place][8] < found.harm[place][6] < found.harm[place][4]


def test_a_whole_plan_is_measured(ask):
    measure = PlanDivergence(ask)
    plan = {place: HIGH if place[0] == 1 else LOW for place in ask.places}
    assert measure(plan) == pytest.approx(long_way(ask, plan), rel=0.02)
    assert measure(dict.fromkeys(ask.places)) == pytest.approx(0.0, abs=1e-4)


def test_local_is_the_error_of_the_groups_output(ask):
    found = MEASURES["local"](ask)
    seen = []
    linear = ask.run.model.model.layers[1].mlp.down_proj
    hook = linear.register_forward_pre_hook(lambda m, a: seen.append(m.prepare(a[0][0])))
    with torch.no_grad():
        for row in ask.run.tokens:
            ask.run.model(row[None], use_cache=False)
    hook.remove()
    x, w = torch.cat(seen), linear.weight_dense
    wanted = ((fake_quantize(x, LOW) - x) @ w.T).square().sum() / (x @ w.T).square().sum()
    assert found.harm[1, "down"][4] == pytest.approx(float(wanted), rel=1e-3)
    assert found.harm[1, "down"][16] == 0.0 and found.harm[1, "down"][8] < found.harm[1, "down"][6]


def test_fisher_is_half_the_square_of_the_loss_slope(tiny, ids):
    """Along each token's rounding noise, by finite differences of the loss."""
    source = tiny("llama", torch.float64)
    ask = asked(source, ids[:1, :12])
    found = MEASURES["fisher"](ask)
    model, row = source.model, ids[0, :12]
    place, linear = (1, "down"), model.model.layers[1].mlp.down_proj
    assert isinstance(linear, QuantLinear)

    def loss(token, size):
        def shift(module, args, y):
            x = linear.prepare(args[0])
            noise = (fake_quantize(x, LOW) - x) @ linear.weight_dense.T
            kept = torch.zeros_like(noise)
            kept[:, token] = noise[:, token]
            return y + size * kept

        hook = linear.register_forward_hook(shift)
        with torch.no_grad():
            logits = model(row[None], use_cache=False).logits[0]
        hook.remove()
        return torch.nn.functional.cross_entropy(logits[:-1].double(), row[1:], reduction="sum")

    slopes = [float(loss(t, 1e-2) - loss(t, -1e-2)) / 2e-2 for t in range(12)]
    wanted = sum(s**2 for s in slopes) / 2 / 12
    assert found.harm[place][4] == pytest.approx(wanted, rel=0.02)


def test_searched_clips_are_the_best_of_those_tried(ask):
    model = ask.run.model
    found = search_clips(model, ask.map, ask.run.tokens, {p: LOW for p in ask.places if p != (0, "o")})
    assert set(found) == set(ask.places) - {(0, "o")} and min(found.values()) < 1
    linear, seen = model.model.layers[1].mlp.down_proj, []
    hook = linear.register_forward_pre_hook(lambda m, a: seen.append(m.prepare(a[0][0])))
    with torch.no_grad():
        for row in ask.run.tokens:
            model(row[None], use_cache=False)
    hook.remove()
    x, w = torch.cat(seen), linear.weight_dense
    errors = {r: float(((fake_quantize(x, replace(LOW, clip=r)) - x) @ w.T).square().sum()) for r in RATIOS}
    assert found[1, "down"] == min(errors, key=lambda r: errors[r])


def test_a_gaussian_row_is_clipped_at_three_quarters():
    x, w = torch.randn(256, 576), torch.randn(64, 576)
    errors = {r: float(((fake_quantize(x, replace(LOW, clip=r)) - x) @ w.T).square().sum()) for r in RATIOS}
    assert 0.65 <= min(errors, key=lambda r: errors[r]) <= 0.85


@pytest.mark.parametrize("method", ["quarot", "flat"])
def test_plans_carry_searched_clips_and_are_made_with_them(method, tiny, ids, text_file):
    recipe = Recipe.from_dict(
        {
            "transform": {"method": method}, "weights": {"bits": 4}, "activations": {"bits": 4, "clip": "searched"},
            "learning": {"sequences": 2, "seqlen": 24, "batch": 1, "epochs": 1},
            "policy": {"name": "budget", "score": "kl", "a8_share": 0.3, "tokens": 64},
            "calibration": {"text": str(text_file), "sequences": 4, "seqlen": 64},
        }
    )  # fmt: skip
    run = phasequant.quantize(tiny("llama"), recipe)
    assert run.plan.raised and run.plan.clips and not set(run.plan.raised) & set(run.plan.clips)
    assert {(b, g) for b in range(3) for g in GROUPS} == set(run.plan.raised) | set(run.plan.clips)
    specs = {linear.input_spec.clip for _, linear in quant_linears(run.model) if linear.input_spec.bits == 4}
    assert specs == set(run.plan.clips.values()) and len(specs) > 1
    with pytest.raises(PhaseQuantError, match="calibrate=mse"):
        Recipe.from_dict({"activations": {"bits": 8, "granularity": "tensor", "scales": "static", "clip": "searched"}})


def test_sensitivities_see_the_searched_clips(ask):
    clips = dict.fromkeys(ask.places, 0.6)
    at = {place: replace(LOW, clip=0.6) for place in ask.places}
    found = MEASURES["kl"](replace(ask, clips=clips))
    assert found.notes["all_low"] == pytest.approx(long_way(ask, at), rel=0.02)
    assert found.notes["all_low"] != pytest.approx(MEASURES["kl"](ask).notes["all_low"], rel=0.02)


def test_closed_measures_fall_with_bits_and_need_no_model(ask):
    for name in ("noise", "gsr", "ratio", "jr_snr"):
        found = MEASURES[name](Ask(ask.map, ask.seen, LOW, ask.choices))
        for by in found.harm.values():
            assert by[16] == 0.0 and by[4] >= by[6] == by[4] / 16 >= by[8] == by[4] / 256
    jumps = MEASURES["jr_snr"](ask).harm
    assert len({jumps[1, g][4] for g in ("qkv", "o", "gate_up", "down")}) == 1


@pytest.mark.parametrize("seed", range(6))
def test_the_knapsack_finds_the_best_of_all_plans(seed):
    generator = torch.Generator().manual_seed(seed)
    places = [(b, g) for b in range(3) for g in ("qkv", "o")]
    bits = (4, 6, 8)
    harm = {p: dict(zip(bits, torch.rand(3, generator=generator).tolist(), strict=True)) for p in places}
    price = {p: {4: 0.0, 6: float(torch.rand((), generator=generator)), 8: 1.0} for p in places}
    for budget in (0.0, 0.7, 2.0, 6.0):
        plans = [dict(zip(places, chosen, strict=True)) for chosen in itertools.product(bits, repeat=len(places))]
        fitting = [p for p in plans if sum(price[q][b] for q, b in p.items()) <= budget]
        wanted = min(sum(harm[q][b] for q, b in p.items()) for p in fitting)
        found = solve(harm, price, budget)
        assert sum(price[q][b] for q, b in found.items()) <= budget + 1e-6
        assert sum(harm[q][b] for q, b in found.items()) == pytest.approx(wanted, abs=1e-6)


def test_a_budget_that_nothing_keeps_to_is_an_error():
    with pytest.raises(PhaseQuantError, match="the cheapest one costs 3"):
        solve({(0, "o"): {4: 1.0, 8: 0.0}}, {(0, "o"): {4: 3.0, 8: 5.0}}, 1.0)


def test_swaps_mend_what_adding_up_gets_wrong():
    places = [(0, "o"), (1, "o"), (2, "o"), (3, "o")]
    gain = {places[0]: 4.0, places[1]: 3.0, places[2]: 2.0, places[3]: 1.0}
    price = dict.fromkeys(places, 1.0)

    def measure(bits):
        raised = {p for p in places if bits[p] == 8}
        return 10 - sum(gain[p] for p in raised) + (5 if {places[0], places[1]} <= raised else 0)

    begin = {p: 8 if p in places[:2] else 4 for p in places}
    found = better(begin, Terms(4, 8, gain, price, 2.0), measure, 10)
    assert {p for p, b in found.bits.items() if b == 8} == {places[0], places[2]}
    assert found.after == 4.0 < found.before == 8.0 and found.tries <= 10
    added = better(dict.fromkeys(places, 4), Terms(4, 8, gain, price, 1.0), measure, 10)
    assert [p for p, b in added.bits.items() if b == 8] == [places[0]]
    assert better(begin, Terms(4, 8, gain, price, 2.0), measure, 0).bits == begin


@pytest.mark.parametrize("score", ["kl", "fisher", "local", "ratio", "gsr", "jr_snr", "kl_alone"])
def test_every_score_makes_a_plan(score, tiny, ids, text_file):
    recipe = Recipe.from_dict(
        {
            "transform": {"method": "quarot"}, "weights": {"bits": 4}, "activations": {"bits": 4}, "kv": {"bits": 4},
            "policy": {"name": "budget", "score": score, "a8_share": 0.4, "tokens": 64, "swaps": 3},
            "calibration": {"text": str(text_file), "sequences": 4, "seqlen": 64},
        }
    )  # fmt: skip
    run = phasequant.quantize(tiny("llama"), recipe)
    assert 0 < run.plan.a8_share <= 0.4 + 1e-9
    for entry in run.plan.raised.values():
        assert entry.spec.bits == 8 and (f"by {score}" in entry.why or entry.why.startswith("a swap"))
    with torch.no_grad():
        assert torch.isfinite(run.model(ids).logits).all()


def test_more_bits_than_one_can_be_chosen(tiny, text_file):
    recipe = Recipe.from_dict(
        {
            "activations": {"bits": 4}, "weights": {"bits": 4},
            "policy": {"name": "budget", "score": "gsr", "a8_share": 0.3, "choices": [5, 6, 8], "price": "bits"},
            "calibration": {"text": str(text_file), "sequences": 2, "seqlen": 64},
        }
    )  # fmt: skip
    plan = phasequant.quantize(tiny("llama"), recipe).plan
    assert {entry.spec.bits for entry in plan.raised.values()} >= {5, 6}


def test_analyze_measures_what_its_policy_asks_for(tiny, text_file, tmp_path):
    sets = ["policy.score=kl", "policy.tokens=64", "calibration.sequences=2", "calibration.seqlen=64"]
    source = tiny("llama")
    found = phasequant.analyze(
        source, "quarot", overrides=[*sets, f"calibration.text={text_file}"], output=tmp_path / "a"
    )
    assert all("by kl" in entry.why for entry in found.plan.raised.values()) and found.plan.raised


def test_kl_divergence_agrees_with_evaluations():
    a, b = torch.randn(9, 30), torch.randn(9, 30)
    p, q = a[:-1].log_softmax(-1), b[:-1].log_softmax(-1)
    assert kl_divergence(a, b) == pytest.approx(float((p.exp() * (p - q)).sum() / 8), rel=1e-5)


@pytest.mark.parametrize("name", ["llama-one", "llama-odd"])
def test_the_smallest_and_an_odd_model_are_planned(name, tiny, text_file):
    recipe = Recipe.from_dict(
        {
            "transform": {"method": "quarot"}, "activations": {"bits": 4, "clip": "searched"}, "weights": {"bits": 4},
            "policy": {"name": "budget", "score": "kl", "a8_share": 0.5, "tokens": 64, "swaps": 2, "choices": [6, 8],
                       "price": "bits"},
            "prefix": {"method": "bos"}, "calibration": {"text": str(text_file), "sequences": 2, "seqlen": 64},
        }
    )  # fmt: skip
    plan = phasequant.quantize(tiny(name), recipe).plan
    spent = sum(plan.model.macs(g) * (e.spec.bits - 4) / 4 for (_, g), e in plan.raised.items())
    assert 0 < spent <= 0.5 * plan.model.macs_total * (1 + 1e-9)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"policy": {"name": "budget", "price": "bits"}, "activations": {"bits": 8}}, "below 8"),
        ({"policy": {"name": "budget", "choices": [6], "format": "fp8"}}, "8 and 16 alone"),
    ],
)
def test_policies_that_cannot_be_meant_are_refused(parts, message):
    with pytest.raises(PhaseQuantError, match=message):
        Recipe.from_dict({"activations": {"bits": 4}, **parts})


def shared_budget(text, **policy) -> Recipe:
    return Recipe.from_dict(
        {
            "transform": {"method": "quarot"}, "weights": {"bits": 4}, "activations": {"bits": 4}, "kv": {"bits": 4},
            "policy": {"name": "budget", "score": "gradient", "price": "bytes", "tokens": 128, "a8_share": 0.4,
                       "allow": {"weights": [8], "kv": [8]}, "context": 64, **policy},
            "calibration": {"text": str(text), "sequences": 2, "seqlen": 64},
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "llama-one", "llama-odd", "mixtral", "gemma2", "opt", "gpt_neox"])
def test_weights_and_kv_share_a_budget_in_bytes(name, tiny, text_file, tmp_path):
    run = phasequant.quantize(tiny(name), shared_budget(text_file), overrides=where(name))
    plan, shape = run.plan, run.map.shape
    per = {group.name: run.map.width_in(group.name) * run.map.rows(group.name) / 2 for group in run.map.groups}
    spent = sum(per[g] for _, g in plan.raised) + sum(run.map.macs(g) / 2 for _, g in plan.weights_raised)
    kv = 2 * shape.kv_heads * shape.d_head * 64 / 2
    spent += kv * len(plan.kv_raised)
    whole = shape.blocks * (sum(per.values()) + sum(run.map.macs(g.name) / 2 for g in run.map.groups) + kv)
    assert 0 < spent <= 0.4 * whole * (1 + 1e-6) and plan.weights_raised
    for block, group, linear in run.map.linears():
        expected = 8 if (block, group) in plan.weights_raised else 4
        assert run.model.get_submodule(linear).weight_spec.bits == expected
    again = PrecisionPlan.from_json(plan.to_json(), run.map)
    assert again.weights_raised == plan.weights_raised and again.kv_raised == plan.kv_raised
    run.save(tmp_path / "out")
    tokens = torch.randint(0, 256, (1, 30))
    with torch.no_grad():
        assert torch.equal(run.model(tokens).logits, phasequant.load(tmp_path / "out")(tokens).logits)
    given = phasequant.quantize(tiny(name), shared_budget(text_file), overrides=where(name), plan=again)
    with torch.no_grad():
        assert torch.equal(run.model(tokens).logits, given.model(tokens).logits)


def test_kv_alone_may_be_raised(tiny, text_file, tmp_path):
    recipe = shared_budget(text_file, allow={"kv": [8]}, a8_share=0.9, context=10**6)
    run = phasequant.quantize(tiny("llama"), recipe)
    assert run.plan.kv_raised and not run.plan.weights_raised
    run.save(tmp_path / "out")
    loaded = phasequant.load(tmp_path / "out")
    bits = [module.kv_quantizer.layout.keys.bits for module in loaded.modules() if hasattr(module, "kv_quantizer")]
    assert [b == 8 for b in bits] == [block in run.plan.kv_raised for block in run.map.blocks]


def test_the_gradient_is_that_of_kl_and_loss_in_how_much_of_each_noise_is_let_in(ask):
    found = MEASURES["gradient"](ask)
    model, shares, hooks = ask.run.model, {}, []
    total = 0.0
    for row in ask.run.tokens:
        with torch.no_grad():
            p = model(row[None], use_cache=False).logits[0].log_softmax(-1)
        for block, group, name in ask.map.linears():
            share = shares.setdefault((block, group), torch.ones((), requires_grad=True))

            def add(module, args, y, share=share):
                x = module.prepare(args[0].detach())
                return y + share * ((fake_quantize(x, LOW) - x) @ module.dense_weight().T)

            hooks.append(model.get_submodule(name).register_forward_hook(add))
        with torch.enable_grad():
            q = model(row[None], use_cache=False).logits[0].log_softmax(-1)
            loss = (p.exp() * (p - q)).sum()
            (loss - q[:-1].gather(1, row[1:, None]).sum()).backward()
        total += float(loss.detach())
        for hook in hooks:
            hook.remove()
    tokens = ask.run.tokens.numel()
    assert found.notes["kl"] == pytest.approx(total / tokens, rel=1e-4)
    for place, share in shares.items():
        assert found.harm[place][4] == pytest.approx(float(share.grad) / tokens, rel=1e-3, abs=1e-6)
        assert found.harm[place][16] == 0


def test_the_gradient_speaks_of_weights_and_kv_too(tiny, text_file):
    recipe = shared_budget(text_file)
    source = tiny("llama")
    made = pipeline.observe_and_transform(source, recipe, raw=False, transformed=True, noise=False)
    ask = planning._ask(made, recipe)
    found = MEASURES["gradient"](ask)
    assert {name for _, name in found.harm} == {"qkv", "o", "gate_up", "down", "kv", *(
        f"weights:{g}" for g in ("qkv", "o", "gate_up", "down"))}  # fmt: skip
    sizes = [[abs(by[bits]) for by in found.harm.values()] for bits in (4, 8)]
    assert 0 < sum(sizes[1]) < 0.3 * sum(sizes[0])  # 8 bits leave a sixteenth of the noise


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"price": "macs"}, "policy.price=bytes"),
        ({"score": "fisher"}, "policy.score=gradient"),
        ({"swaps": 3}, "policy.swaps=0"),
    ],
)
def test_budgets_that_cannot_be_shared(policy, message, text_file):
    with pytest.raises(PhaseQuantError, match=message):
        shared_budget(text_file, **policy)


@pytest.mark.parametrize("price", ["bytes", "microseconds"])
def test_prices_other_than_multiply_adds(price, tiny, text_file):
    recipe = shared_budget(text_file, price=price, allow={}, a8_share=0.3)
    run = phasequant.quantize(tiny("llama"), recipe)
    if price == "bytes":
        width = {g.name: run.map.width_in(g.name) for g in run.map.groups}
        assert sum(width[g] for _, g in run.plan.raised) <= 0.3 * 3 * sum(width.values()) * (1 + 1e-6)
    assert run.plan.raised


def test_time_is_a_price_only_where_it_is_more_than_noise(tiny):
    source = tiny("llama")
    policy = Recipe.from_dict({"policy": {"price": "microseconds", "a8_share": 0.5}}).policy
    groups = [group.name for group in source.map.groups]
    alike = Prices(policy, source.map, 4, [8], {g: {4: 100.0, 8: 101.0} for g in groups})
    assert alike.budget == 0 and alike("qkv", 8) == 0
    dear = Prices(policy, source.map, 4, [8], {g: {4: 100.0, 8: 190.0} for g in groups})
    assert dear("qkv", 8) == 90 and dear.budget == pytest.approx(0.5 * 90 * len(groups) * source.map.shape.blocks)
