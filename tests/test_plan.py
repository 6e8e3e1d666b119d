"""Policies choose what their rules say; plans survive JSON, edits, and mistakes."""

import json

import pytest
from conftest import CONFIGS
from transformers import LlamaConfig

from phasequant.arch import GROUPS, ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.observe import Curve, GroupStats, Observations
from phasequant.plan import LOW, PrecisionPlan, Seen, make_plan, thresholds
from phasequant.recipe import Recipe

SMOL = ModelMap.from_config(
    LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    )
)
QUAROT = Recipe.load("quarot")


def observations(model_map=SMOL, coordinates="after quarot"):
    n = model_map.shape.blocks
    found = Observations(coordinates, n, 1, 8)
    found.jump_ratio = Curve([0.3] * n, [0.3] * n)
    found.snr = {b: Curve([16.0 + 0.01 * i for i in range(n)], [16.0 + 0.01 * i for i in range(n)]) for b in ("4", "8")}
    found.groups = [
        GroupStats(b, g, 0.45, 0.6, 0.45, 3.0, 2.0, {LOW: 1e-3 * model_map.macs(g) / 1e6})
        for b in range(n)
        for g in GROUPS
    ]
    return found


def test_shares_of_the_groups_are_those_of_the_readme():
    """o 9 %, down 25 %, qkv 16 %, gate_up 50 % of SmolLM2; seven blocks 23 %."""
    total = sum(SMOL.macs(g) for g in GROUPS)
    assert {g: round(100 * SMOL.macs(g) / total) for g in GROUPS} == {"qkv": 16, "o": 9, "gate_up": 50, "down": 25}


def test_paper_set():
    plan = make_plan(QUAROT.with_("policy.name=paper"), SMOL, None)
    assert {b for b, _ in plan.raised} == {0, 1, 2, 29} and len(plan.raised) == 16
    assert plan.a8_share == pytest.approx(4 / 30)
    assert plan.spec(0, "o").bits == 8 and plan.spec(3, "o").bits == 4
    assert plan.spec(0, "o").clip == 1.0 and plan.spec(3, "o").clip == 0.9
    tiny = ModelMap.from_config(CONFIGS["llama-one"])
    assert {b for b, _ in make_plan(QUAROT.with_("policy.name=paper"), tiny, None).raised} == {0}


def test_threshold_is_the_papers_rule():
    seen = observations()
    for block, jr, snr in ((4, 2.0, 10.0), (9, 2.0, 20.0), (12, 0.1, 10.0)):
        seen.jump_ratio.without_first[block] = jr
        seen.snr["4"].without_first[block] = snr
    plan = make_plan(QUAROT.with_("policy.name=threshold"), SMOL, Seen(seen))
    assert {b for b, _ in plan.raised} == {4}  # both conditions, not one
    assert "Jump Ratio 2.00" in plan.raised[4, "qkv"].why
    given = QUAROT.with_("policy.name=threshold", "policy.tau_jr=0.05", "policy.tau_snr=16.005")
    assert {b for b, _ in make_plan(given, SMOL, Seen(seen)).raised} == {0, 4, 12}
    assert thresholds(given.policy, seen) == (0.05, 16.005)


def test_threshold_reads_the_coordinates_it_is_told():
    raw, rotated = observations(coordinates="raw"), observations()
    for where, block in ((raw, 1), (rotated, 2)):
        where.jump_ratio.without_first[block], where.snr["4"].without_first[block] = 5.0, 1.0
    recipe = QUAROT.with_("policy.name=threshold")
    assert {b for b, _ in make_plan(recipe, SMOL, Seen(raw, rotated)).raised} == {2}
    recipe = recipe.with_("policy.coordinates=raw")
    assert {b for b, _ in make_plan(recipe, SMOL, Seen(raw, rotated)).raised} == {1}


@pytest.mark.parametrize("share", [0.0, 0.004, 0.125, 0.5, 1.0])
def test_budget_is_never_exceeded_and_buys_the_best_first(share):
    seen = observations()
    best = next(g for g in seen.groups if (g.block, g.group) == (17, "o"))
    best.noise[LOW] = 1.0
    recipe = QUAROT.with_("policy.name=budget", "policy.score=noise", policy={"a8_share": share})
    plan = make_plan(recipe, SMOL, Seen(seen))
    assert plan.a8_share <= share + 1e-9
    if share == 1.0:
        assert plan.a8_share == pytest.approx(1.0)
    if share > 0.003:
        assert (17, "o") in plan.raised and "rank 1 of 120" in plan.raised[17, "o"].why


def test_policies_that_raise_nothing_are_refused():
    with pytest.raises(PhaseQuantError, match="does not raise"):
        make_plan(QUAROT.with_("activations.bits=8", "policy.name=paper"), SMOL, None)


def test_policies_above_16_bits_are_refused():
    with pytest.raises(PhaseQuantError, match="16 already"):
        make_plan(QUAROT.with_("activations.bits=16", "policy.name=paper"), SMOL, None)


def test_plans_survive_json():
    for name in ("uniform", "paper", "budget"):
        plan = make_plan(QUAROT.with_(f"policy.name={name}", "policy.score=noise"), SMOL, Seen(observations()))
        assert PrecisionPlan.from_json(plan.to_json(), SMOL) == plan


def test_plans_can_be_edited_by_hand():
    values = json.loads(make_plan(QUAROT.with_("policy.name=paper"), SMOL, None).to_json())
    del values["raised"]["0.qkv"]
    values["raised"]["7.down"] = {"bits": 8}
    values["raised"]["8.down"] = {"bits": 16, "why": "a test"}
    plan = PrecisionPlan.from_dict(values, SMOL)
    assert plan.spec(0, "qkv").bits == 4
    assert plan.spec(7, "down").bits == 8 and plan.spec(7, "down").clip == 1.0
    assert plan.spec(8, "down") is None and plan.raised[8, "down"].why == "a test"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["raised"].update({"30.qkv": {"bits": 8}}), "30.qkv"),
        (lambda v: v["raised"].update({"3.kqv": {"bits": 8}}), "3.kqv"),
        (lambda v: v["raised"].update({"x.qkv": {"bits": 8}}), "x.qkv"),
        (lambda v: v["raised"].update({"3.qkv": 8}), "3.qkv"),
        (lambda v: v["raised"].update({"3.qkv": {"bits": 99}}), "2 to 8"),
        (lambda v: v["raised"].update({"3.qkv": {"bit": 8}}), "bits"),
        (lambda v: v.update(rased={}), "did you mean 'raised'"),
        (lambda v: v.update(raised=["0.qkv"]), "must be an object"),
        (lambda v: v["low"].update(granularity="group", group_size=8), "per token or tensor or column, not per group"),
        (lambda v: v["low"].update(clip="mse"), "weights only"),
        (lambda v: v["low"].update(bits=4.5), "not valid"),
        (lambda v: v["low"].update(symmetric="no"), "not valid"),
        (lambda v: v["weights"].update(granularity="tensor"), "per channel or group, not per tensor"),
        (lambda v: v["weights"].update(granularity="group", group_size=7), "does not divide"),
        (lambda v: v["kv"].update(group_size=7), "does not divide"),
        (lambda v: v["kv"].update(granularity="tensor", group_size=None), "per group, not per tensor"),
        (lambda v: v.pop("low"), "lacks 'low'"),
        (lambda v: v.pop("model"), "lacks 'model'"),
    ],
)
def test_mistakes_in_plans(change, message):
    values = json.loads(make_plan(QUAROT.with_("policy.name=paper"), SMOL, None).to_json())
    change(values)
    with pytest.raises(PhaseQuantError, match=message):
        PrecisionPlan.from_dict(values, SMOL)


def test_plan_for_another_model():
    plan = make_plan(QUAROT, SMOL, None)
    with pytest.raises(PhaseQuantError, match="another model"):
        PrecisionPlan.from_json(plan.to_json(), ModelMap.from_config(CONFIGS["qwen3"]))
    with pytest.raises(PhaseQuantError, match="not valid JSON"):
        PrecisionPlan.from_json("{", SMOL)
    with pytest.raises(PhaseQuantError, match="JSON object"):
        PrecisionPlan.from_json("[]", SMOL)


def test_unsupported_models_name_the_supported():
    from transformers import BertConfig, GPT2Config

    for config in (BertConfig(), GPT2Config()):
        with pytest.raises(PhaseQuantError, match=r"not supported; supported are: LLaMA.*Qwen3"):
            ModelMap.from_config(config)
