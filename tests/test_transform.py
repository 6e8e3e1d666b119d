"""Rotate and logits stay: every family, every part of QuaRot, in fp64."""

from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS

from phasequant import transform
from phasequant.nn import KVQuantizer, QuantLinear, quant_linears
from phasequant.numerics import QuantSpec, Rotation, random_orthogonal
from phasequant.transform.contract import Transform

# Transformers computes RMSNorm in fp32 whatever the model, so fp64 logits agree to fp32 rounding, not better.
TOLERANCE = 2e-6
PARTS = ["folds_norms", "residual", "value", "heads", "down"]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_quarot_keeps_logits(name, tiny, ids):
    source = tiny(name, torch.float64)
    before = logits(source.model, ids)
    weights = {key: value.clone() for key, value in source.model.state_dict().items()}
    chosen = transform.quarot(source.map, seed=3)
    transform.apply(source.model, source.map, chosen)
    after = logits(source.model, ids)
    assert relative(after, before) < TOLERANCE
    # and the transform was not the identity
    embedding = f"{source.map.family.embeddings}.weight"
    assert relative(source.model.state_dict()[embedding], weights[embedding]) > 0.1
    assert source.model.config.tie_word_embeddings is False
    assert source.model.lm_head.weight is not source.model.model.embed_tokens.weight


@pytest.mark.parametrize("part", PARTS)
def test_each_place_alone_keeps_logits(part, tiny, ids):
    source = tiny("llama-bias", torch.float64)
    before = logits(source.model, ids)
    full = transform.quarot(source.map, seed=1)
    kept = {part: getattr(full, part)}
    if part == "residual":
        kept["folds_norms"] = True  # a rotation cannot pass a gain
    transform.apply(source.model, source.map, Transform("part", **kept))
    assert relative(logits(source.model, ids), before) < TOLERANCE


def test_arbitrary_orthogonal_matrices_fold_too(tiny, ids):
    """Nothing in `apply` relies on Hadamard matrices being symmetric."""
    source = tiny("llama", torch.float64)
    before = logits(source.model, ids)
    one = torch.ones(1, 1, dtype=torch.float64)

    def dense(n, seed):
        return Rotation("random-orthogonal", 1, random_orthogonal(n, seed), one)

    shape = source.map.shape
    chosen = Transform(
        "random",
        folds_norms=True,
        residual=dense(shape.d_model, 1),
        value=dense(shape.d_head, 2),
        heads=dense(shape.heads, 3),
        down=dense(shape.d_ffn, 4),
    )
    transform.apply(source.model, source.map, chosen)
    assert relative(logits(source.model, ids), before) < TOLERANCE


def test_missing_one_fold_is_seen(tiny, ids):
    """The invariance test can fail: without folding the gains, rotated logits are wrong."""
    source = tiny("llama", torch.float64)
    before = logits(source.model, ids)
    broken = replace(transform.quarot(source.map, seed=1), folds_norms=False)
    transform.apply(source.model, source.map, broken)
    assert relative(logits(source.model, ids), before) > 1e-2


def test_r3_keeps_attention_scores():
    from phasequant.numerics import spreading_rotation

    rotation = spreading_rotation(12)
    quantizer = KVQuantizer.of(QuantSpec(8, False, "group", 12), 12, rotation)
    q, k = torch.randn(1, 4, 5, 12, dtype=torch.float64), torch.randn(1, 4, 7, 12, dtype=torch.float64)
    scores = quantizer.rotate(q) @ quantizer.rotate(k).transpose(-1, -2)
    assert torch.allclose(scores, q @ k.transpose(-1, -2), atol=1e-6)
    assert not torch.allclose(quantizer.rotate(q), q, atol=1e-2)


def test_none_changes_nothing_but_the_linears(tiny, ids):
    source = tiny("qwen2")
    before = logits(source.model, ids)
    transform.apply(source.model, source.map, transform.METHODS["none"](source.map, 0))
    assert torch.equal(logits(source.model, ids), before)
    assert len(quant_linears(source.model)) == 7 * source.map.shape.blocks
    assert all(isinstance(m, QuantLinear) for _, m in quant_linears(source.model))
    assert source.model.config.tie_word_embeddings is False  # untied always, and saved so


def test_describe_names_rungs_and_places(tiny):
    source = tiny("llama-odd")
    steps = {s["name"]: s for s in transform.quarot(source.map, 0).describe(source.map)}
    assert steps["R2·M"]["rung"] == "random-orthogonal" and steps["R2·M"]["where"] == "online"
    assert steps["R4"]["rung"] == "random-orthogonal"  # 107 is prime
    assert steps["R1"]["where"] == "folded" and steps["R1"]["macs"] == 0
    assert steps["R4"]["macs"] == 107 * 107 * source.map.shape.blocks
