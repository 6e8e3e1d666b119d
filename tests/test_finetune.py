"""Polish: what is learned is settled into the tensors that a checkpoint holds, and codes stay."""

import pytest
import torch
from conftest import NEW, where

import phasequant
from phasequant import finetune
from phasequant.errors import PhaseQuantError
from phasequant.finetune.distillation import divergence
from phasequant.finetune.polished import PolishedBlock
from phasequant.nn import quant_linears
from phasequant.recipe import Recipe

STEPS = {"steps": 3, "sequences": 9, "seqlen": 48, "batch": 2, "lr": 1e-2, "clip_lr": 5e-2, "branch_lr": 1e-2}
EPOCHS = {**STEPS, "steps": 0, "epochs": 2}


def recipe(text, polish, **parts) -> Recipe:
    return Recipe.from_dict(
        {
            "transform": {"method": "quarot"}, "weights": {"bits": 4}, "activations": {"bits": 4, "clip": 0.9},
            "kv": {"bits": 4}, "calibration": {"text": str(text), "sequences": 2, "seqlen": 64}, "finetune": polish,
            **parts,
        }
    )  # fmt: skip


@pytest.mark.parametrize("polish", [STEPS, EPOCHS], ids=["distill", "blocks"])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "llama-one", "llama-odd", "qwen3", *NEW])
def test_every_family_is_polished_saved_and_reloaded(name, polish, tiny, text_file, tmp_path):
    plain = phasequant.quantize(tiny(name), recipe(text_file, {}), overrides=where(name))
    run = phasequant.quantize(tiny(name), recipe(text_file, polish), overrides=where(name))
    before = dict(quant_linears(plain.model))
    for key, linear in quant_linears(run.model):
        assert torch.equal(linear.weight_packed, before[key].weight_packed)  # codes stay
    told = run.origin["finetune"][0]
    changed = any(
        not torch.equal(linear.weight_scale, before[key].weight_scale) for key, linear in quant_linears(run.model)
    )
    kept = told["kept"] if "kept" in told else any(b["after"] < b["before"] for b in told["blocks"])
    assert changed == kept
    run.save(tmp_path / "out")
    tokens = torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        expected = run.model(tokens).logits
        assert torch.equal(expected, phasequant.load(tmp_path / "out")(tokens).logits)


def test_distillation_lowers_the_divergence_where_grids_are_poor(tiny, text_file):
    """Every scale of the weights is off by a quarter: that can be put right."""
    wanted = recipe(text_file, {**STEPS, "steps": 60, "lr": 2e-2, "parameters": ["scales"]},
                    weights={"bits": 8}, activations={"bits": 8}, kv={"bits": 16})  # fmt: skip
    source = tiny("llama")
    run = phasequant.quantize(source, wanted.with_(finetune={"steps": 0}))
    plain = tiny("llama")
    with torch.no_grad():
        for _, linear in quant_linears(run.model):
            linear.weight_scale.mul_(1.25)
    tokens = torch.randint(0, 256, (9, 48), generator=torch.Generator().manual_seed(3))
    task = finetune.PolishTask(
        run.model, run.map, tokens, wanted.finetune, torch.float32, 0, torch.device("cpu"),
        dict.fromkeys(run.map.blocks),
    )  # fmt: skip
    residual, gain = run.transform.residual, plain.model.model.norm.weight  # the teacher in the student's coordinates
    final = [plain.model.model(row[None]).last_hidden_state[0] for row in tokens]
    teacher = [residual.apply(states / gain) for states in final]
    found = finetune.distill(task, teacher)
    assert found.told["kl_after"] < 0.5 * found.told["kl_before"] and found.told["steps"] == 60


def test_a_polished_block_computes_what_the_block_computes(tiny, text_file):
    for low in ({"weights": {"bits": 4}}, {"weights": {"bits": 4, "granularity": "group", "group_size": 12,
                                           "symmetric": False}}, {"lowrank": {"method": "svd", "rank": 4,
                                           "weighting": "none"}}):  # fmt: skip
        run = phasequant.quantize(tiny("llama"), recipe(text_file, {}, **low, kv={"bits": 16}))
        hidden = torch.randn(1, 20, 48)
        block = run.model.model.layers[1]
        seen = {}

        def keep(module, args, kwargs, into=seen):
            into.update(kwargs)

        hook = block.register_forward_pre_hook(keep, with_kwargs=True)
        run.model(torch.randint(0, 256, (1, 20)), use_cache=False)
        hook.remove()
        before = block(hidden, **seen)
        polished = PolishedBlock(block, run.map, frozenset(), run.transform.block(1).qk)
        with torch.no_grad():
            assert torch.allclose(polished(hidden, **seen), before, atol=1e-4)
        assert not list(polished.learned())
        polished.settle(torch.float32)
        assert torch.equal(block(hidden, **seen), before)


def test_what_does_not_help_is_put_back(tiny, text_file):
    wild = {**STEPS, "steps": 2, "lr": 3.0, "clip_lr": 20.0}
    plain = phasequant.quantize(tiny("llama"), recipe(text_file, {}))
    run = phasequant.quantize(tiny("llama"), recipe(text_file, wild))
    assert run.origin["finetune"][0]["kept"] is False and run.plan.clips == plain.plan.clips
    for (key, a), (_, b) in zip(run.model.state_dict().items(), plain.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


def test_distillation_ends_with_its_minutes(tiny, text_file):
    run = phasequant.quantize(tiny("llama"), recipe(text_file, {**STEPS, "steps": 10**6, "minutes": 0.01}))
    assert 0 < run.origin["finetune"][0]["steps"] < 1000


def test_the_teacher_is_the_model_in_16_bits(tiny, text_file):
    source = tiny("gemma2")
    tokens = torch.randint(0, 256, (2, 30))
    task = finetune.PolishTask(source.model, source.map, tokens, Recipe().finetune, torch.float32, 0,
                               torch.device("cpu"), {})  # fmt: skip
    for row, states in zip(tokens, finetune.teach(task), strict=True):
        assert divergence(task, row, states) < 1e-6
    assert divergence(task, tokens[0], finetune.teach(task)[1]) > 1e-3


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"finetune": {"steps": 5}}, "polishes a quantized model"),
        ({"finetune": {"step": 5}}, "finetune.steps|steps"),
        ({"finetune": {"steps": 5, "parameters": ["weights"]}}, "finetune.parameters"),
    ],
)
def test_recipes_that_cannot_be_meant(parts, message):
    with pytest.raises(PhaseQuantError, match=message):
        Recipe.from_dict(parts)


def test_blocks_computed_again_for_the_gradient_learn_the_same(tiny, text_file, monkeypatch):
    runs = []
    for kept in (0, 2**40):
        monkeypatch.setattr("phasequant.finetune.distillation.KEPT_BYTES", kept)
        runs.append(phasequant.quantize(tiny("llama"), recipe(text_file, STEPS)))
    for (key, a), (_, b) in zip(quant_linears(runs[0].model), quant_linears(runs[1].model), strict=True):
        assert torch.allclose(a.weight_scale, b.weight_scale, rtol=1e-4), key
    assert runs[0].origin["finetune"][0]["kept"]


@pytest.mark.parametrize("polish", [STEPS, EPOCHS], ids=["distill", "blocks"])
def test_an_interrupted_polish_leaves_the_quantized_model(polish, tiny, text_file, monkeypatch):
    run = phasequant.quantize(tiny("llama"), recipe(text_file, {}))
    plain = {key: value.clone() for key, value in run.model.state_dict().items()}
    part = recipe(text_file, polish).finetune
    tokens = torch.randint(0, 256, (4, 32))
    task = finetune.PolishTask(run.model, run.map, tokens, part, torch.float32, 0, torch.device("cpu"),
                               {b: run.transform.block(b).qk for b in run.map.blocks})  # fmt: skip
    calls = []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    step = torch.optim.AdamW.step
    lessons = finetune.aims(task), finetune.teach(task)
    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        if part.epochs:
            finetune.reconstruct(task, lessons[0])
        else:
            finetune.distill(task, lessons[1])
    after = run.model.state_dict()
    assert set(after) == set(plain) and all(torch.equal(after[key], plain[key]) for key in plain)


def test_a_single_sequence_is_polished_on_and_judged_by_nothing(tiny, text_file):
    run = phasequant.quantize(tiny("llama"), recipe(text_file, {**STEPS, "sequences": 1}))
    told = run.origin["finetune"][0]
    assert told["kept"] and told["kl_before"] is None
