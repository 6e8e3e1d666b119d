"""Mixtures: taken apart they are the same model; experts' inputs are seen in the order of tokens; rare ones borrow."""

import sys

import pytest
import torch
from conftest import CONFIGS, make_model
from safetensors import safe_open
from torch import nn

import phasequant
from phasequant import text, transform
from phasequant.arch import ModelMap
from phasequant.nn import prepared, quant_linears
from phasequant.nn.experts import ExpertLinears, Experts
from phasequant.observe import token_spikes
from phasequant.recipe import Recipe
from phasequant.source import wrap
from phasequant.weight.inputs import Seen, share
from phasequant.weight.moments import Moments


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


MIXTURES = [name for name, config in CONFIGS.items() if ModelMap.from_config(config).family.experts]


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_taken_apart_is_the_same(dtype, name, tokenizer, ids):
    model = make_model(name, dtype)
    before = logits(model, ids)
    wrap("m", model, tokenizer)
    assert all(isinstance(layer.mlp.experts, Experts) for layer in model.model.layers)
    assert not any("gate_up_proj" in name for name, _ in model.named_parameters())
    close = 0.05 if dtype == torch.bfloat16 else 1e-5  # in bfloat16 a router may choose another of two that are close
    assert float((logits(model, ids) - before).norm() / before.norm()) < close
    wrap("m", model, tokenizer)  # once more changes nothing


def test_a_shared_expert_is_every_tokens(tiny, ids, text_file, tmp_path):
    """Its pieces are the last experts; its gate, in 16 bits, is what they are given; every row calibrates them."""
    source = tiny("qwen2_moe")
    block, chosen, shares = source.model.model.layers[0].mlp, [], []
    block.experts.register_forward_pre_hook(lambda m, a: chosen.append(a[1]) or shares.append(a[2]))
    block.shared_expert_gate.register_forward_hook(lambda m, a, y: shares.append(y.sigmoid()))
    logits(source.model, ids)
    assert (chosen[0][:, 2:] == torch.tensor([4, 5])).all() and (chosen[0][:, :2] < 4).all()
    assert torch.equal(shares[1][:, 2:], shares[0].expand(-1, 2)) and len(block.experts.gate) == 6
    run = phasequant.quantize(tiny("qwen2_moe"), recipe_of(text_file, weights=GPTQ))
    told = {e["expert"]: e for e in run.origin["weights"]["groups"] if e["group"] == "down" and e["block"] == 0}
    assert set(told) == set(range(6)) and told[4]["why"] is told[5]["why"] is None
    made = logits(run.model, ids)
    run.save(tmp_path / "out")
    assert torch.equal(logits(phasequant.load(tmp_path / "out"), ids), made)
    assert len(quant_linears(run.model)) == 3 * (4 + 3 * 6)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = {n for n in file.keys() if "layers.0.mlp" in n}  # noqa: SIM118
    kept = {"model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight"}
    assert kept <= names and all(".experts." in name for name in names - kept)


def test_experts_that_clamp_do(tiny, ids):
    """The limit is 1, which random inputs of random experts reach."""
    experts = tiny("gpt_oss").model.model.layers[0].mlp.experts
    x = torch.linspace(-3, 3, 32)[None]
    inner = experts.inner(x, x.flip(-1))
    g, u = x.clamp(max=1), x.flip(-1).clamp(-1, 1)
    torch.testing.assert_close(inner, (u + 1) * g * torch.sigmoid(1.702 * g))
    assert all(linear.bias is not None for part in (experts.gate, experts.up, experts.down) for linear in part)


def test_rows_go_through_their_own_expert():
    torch.manual_seed(0)
    linears = ExpertLinears([nn.Linear(6, 5, bias=False) for _ in range(4)])
    rows, experts = torch.randn(9, 6, requires_grad=True), torch.tensor([2, 0, 2, 3, 0, 0, 3, 2, 2])  # none to 1
    found = linears(rows, experts)
    wanted = torch.stack([linears[e](row) for row, e in zip(rows, experts.tolist(), strict=True)])
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    assert rows.grad.abs().amin(1).gt(0).all() and linears[1].weight.grad is None
    assert prepared(linears, rows) is rows


@pytest.mark.parametrize("name", CONFIGS)
def test_spikes_have_one_number_a_token(name, tiny, ids):
    source = tiny(name)
    found = token_spikes(source.model, source.map, ids)
    assert {tuple(s.shape) for s in found.values()} == {tuple(ids.shape)}


def test_inputs_of_experts_are_seen_in_the_order_of_tokens(tiny, ids):
    source = tiny("mixtral")
    layer = source.model.model.layers[0]
    seen = {}
    layer.mlp.gate.register_forward_hook(lambda m, a, out: seen.update(x=a[0], chosen=out[2]))
    logits(source.model, ids[:1])
    wanted = []
    for x, chosen in zip(seen["x"], seen["chosen"].tolist(), strict=True):
        parts = [layer.mlp.experts.act_fn(layer.mlp.experts.gate[e](x)) * layer.mlp.experts.up[e](x) for e in chosen]
        wanted.append(max(float(part.abs().max()) for part in parts))
    found = token_spikes(source.model, source.map, ids[:1])
    torch.testing.assert_close(found[0, "down"][0], torch.tensor(wanted))
    torch.testing.assert_close(found[0, "gate_up"][0], token_spikes(source.model, source.map, ids)[0, "gate_up"][0])


def test_moments_are_of_each_experts_rows():
    rows = torch.arange(12.0).reshape(6, 2)
    seen = Seen(rows, torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [0, 1], [1, 0]]))
    assert seen.of(2).tolist() == rows[[1, 2, 3]].tolist() and seen.of(None) is rows
    assert Seen(rows, torch.tensor([0, 1, 1, 0, 2, 2])).of(1).tolist() == rows[[1, 2]].tolist()
    own = [Moments(2, torch.device("cpu")) for _ in range(3)]
    for e, one in enumerate(own):
        for _ in range(1 if e else 40):
            one.add(torch.randn(int(e != 2), 2), None)
    before = [one.hessian.clone() for one in own]
    share(own)
    assert torch.equal(own[0].hessian, before[0]) and [one.borrowed for one in own] == [0, 1, 2]
    total = sum(before)
    torch.testing.assert_close(own[1].hessian, before[1] + total / 41)
    torch.testing.assert_close(own[2].hessian, total * 2 / 41)


def recipe_of(text_file, **parts):
    base = Recipe.load("quarot").with_(calibration={"text": str(text_file), "sequences": 4, "seqlen": 64})
    return base.with_(**parts)


GPTQ = {"method": "gptq", "sequences": 4, "seqlen": 64}


@pytest.mark.parametrize(
    "parts",
    [
        {"weights": GPTQ},
        {"weights": {**GPTQ, "hessian": "rounded", "target": "outputs", "sequential": False}},
        {"weights": {**GPTQ, "granularity": "group", "group_size": 8}, "lowrank": {"method": "svd", "rank": 2}},
        {"weights": {"bits": 16}, "kv": {"bits": 16}},
        {"activations": {"granularity": "tensor", "scales": "static", "bits": 8}},
    ],
    ids=["gptq", "outputs", "groups and branches", "16-bit weights", "static"],
)
def test_quantize_save_load_same_logits(parts, tiny, ids, text_file, tmp_path):
    run = phasequant.quantize(tiny("mixtral"), recipe_of(text_file, **parts))
    made = logits(run.model, ids)
    assert torch.isfinite(made).all()
    run.save(tmp_path / "out")
    assert torch.equal(logits(phasequant.load(tmp_path / "out"), ids), made)
    assert len(quant_linears(run.model)) == 3 * (4 + 3 * 4)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert any(".experts.gate.3.weight_" in name for name in names) and any(".gate.weight" in name for name in names)


def test_a_rarely_used_expert_is_told(tiny, text_file, capsys):
    """Expert 3 is never chosen: its codes are GPTQ's for the inputs of the others."""
    source = tiny("mixtral")
    with torch.no_grad():
        for layer in source.model.model.layers:
            weight = layer.mlp.gate.weight
            weight.mul_(0.01)

    def never(module, args, out):
        scores, chosen = out[1], out[2]
        return out[0], scores, torch.where(chosen == 3, (chosen.flip(-1) + 1) % 3, chosen)

    for layer in source.model.model.layers:
        layer.mlp.gate.register_forward_hook(never)
    run = phasequant.quantize(source, recipe_of(text_file, weights=GPTQ))
    told = [e for e in run.origin["weights"]["groups"] if e.get("expert") == 3]
    assert len(told) == 2 * 3 and all(e["notes"]["tokens"] == 0 and e["rung"].startswith("gptq") for e in told)
    assert all("0 rows reached expert 3" in e["why"] for e in told)
    assert {e["notes"]["borrowed"] for e in told} == {48.0, 96.0}
    others = [e for e in run.origin["weights"]["groups"] if e.get("expert") == 0]
    assert all(e["why"] is None or "rows reached expert 0" in e["why"] for e in others)
    assert "did not go as asked" in " ".join(capsys.readouterr().err.split())


def test_bits_go_to_all_experts_of_a_block(tiny, text_file):
    run = phasequant.quantize(tiny("mixtral"), recipe_of(text_file, policy={"name": "budget", "a8_share": 0.4}))
    raised = set(run.plan.raised)
    assert raised and run.plan.a8_share <= 0.4
    for block, group, name in run.map.linears():
        assert run.model.get_submodule(name).input_spec.bits == (8 if (block, group) in raised else 4)


def test_a_turn_that_the_router_misses_is_seen(tiny, ids, monkeypatch):
    """The invariance tests can fail: gains and rotations that are folded around the router change what it chooses."""
    for misses in (False, True):
        source = tiny("mixtral", torch.float64)
        before = logits(source.model, ids)
        if misses:
            monkeypatch.setattr(sys.modules["phasequant.transform.apply"], "_turn_router", lambda *_: None)
        transform.apply(source.model, source.map, transform.fixed_rotations(source.map, 0))
        error = float((logits(source.model, ids) - before).norm() / before.norm())
        assert (error > 1e-2) if misses else (error < 1e-5)


def test_text_for_calibration_reaches_every_expert(tiny, text_file):
    source = tiny("mixtral")
    tokens = text.cut(text.find(str(text_file), "calibration"), source.tokenizer, 64, 4)
    chosen = []
    source.model.model.layers[0].mlp.gate.register_forward_hook(lambda m, a, out: chosen.append(out[2]))
    logits(source.model, tokens)
    assert torch.cat(chosen).unique().tolist() == [0, 1, 2, 3]
