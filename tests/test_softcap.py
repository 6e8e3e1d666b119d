"""Attention with caps or sinks is Transformers' eager attention: in 16 bits, with the KV grid off, and on it."""

import copy

import pytest
import torch
from conftest import CONFIGS, make_model, where
from transformers import AutoModelForCausalLM
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

import phasequant
from phasequant import pipeline
from phasequant.arch import ModelMap
from phasequant.nn import ATTENTION, kv_in_16_bits
from phasequant.nn.softcap import attend
from phasequant.recipe import Recipe
from phasequant.source import wrap


class Module(torch.nn.Module):
    is_causal, num_key_value_groups, head_dim = True, 2, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", ["none", "bool", "float", "one query"])
def test_capped_attention_is_the_eager_one(masked, dtype):
    g = torch.Generator().manual_seed(0)
    queries = 1 if masked == "one query" else 7
    q = 4 * torch.randn(2, 4, queries, 8, generator=g).to(dtype)
    k, v = (torch.randn(2, 2, 7, 8, generator=g).to(dtype) for _ in range(2))
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    if masked == "bool":
        seen = seen.triu(-2)
    additive = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]
    options = {"scaling": 0.3, "softcap": 1.5, "dropout": 0.0, "sliding_window": None}
    wanted, _ = modeling_gemma2.eager_attention_forward(
        Module().eval(), q, k, v, None if queries == 1 else additive, **options
    )
    given = {"none": None, "bool": seen[None, None], "float": additive, "one query": None}[masked]
    found, _ = attend(Module(), q, k, v, given, **options)
    torch.testing.assert_close(found, wanted)
    uncapped, _ = attend(Module(), q, k, v, given, **{**options, "softcap": None})
    assert (uncapped - wanted).abs().max() > 0.05


@pytest.mark.parametrize("masked", ["none", "bool", "one query"])
def test_attention_with_sinks_is_the_eager_one(masked):
    g = torch.Generator().manual_seed(0)
    queries = 1 if masked == "one query" else 7
    q, module = 4 * torch.randn(2, 4, queries, 8, generator=g), Module().eval()
    k, v = (torch.randn(2, 2, 7, 8, generator=g) for _ in range(2))
    module.sinks = torch.randn(4, generator=g)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    if masked == "bool":
        seen = seen.triu(-2)
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    wanted, _ = modeling_gpt_oss.eager_attention_forward(
        module, q, k, v, None if queries == 1 else additive, scaling=0.3
    )
    given = seen[None, None] if masked == "bool" else None
    found, _ = attend(module, q, k, v, given, scaling=0.3, s_aux=module.sinks)
    torch.testing.assert_close(found, wanted)
    without, _ = attend(module, q, k, v, given, scaling=0.3)
    assert (without - wanted).abs().max() > 0.05


def test_gpt_oss_reads_its_cache_as_the_eager_model_does(tiny, ids):
    """With only the KV cache quantized, to 8 bits: close to the eager model, and far from one without sinks."""
    source = tiny("gpt_oss")
    with torch.no_grad():
        wanted = source.model(input_ids=ids, use_cache=False).logits
        sets = ["calibration.sequences=2", "calibration.seqlen=32", "weights.bits=16", "activations.bits=16",
                "kv.bits=8"]  # fmt: skip
        model = pipeline.run(source, Recipe.load("rtn", sets)).model
        assert model.config._attn_implementation == ATTENTION
        found = model(input_ids=ids, use_cache=False).logits
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e9)
        without = model(input_ids=ids, use_cache=False).logits
    assert (found - wanted).norm() < 0.03 * wanted.norm() < 0.3 * (without - wanted).norm()


def eager_logits(model, ids):
    """What Transformers' eager attention gives."""
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    eager.to(next(model.parameters()).dtype).eval().load_state_dict(model.state_dict())
    assert eager.config._attn_implementation == "eager"
    with torch.no_grad():
        return eager(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_opened_model_is_capped(dtype, tokenizer, ids):
    """As Transformers opens it the cap is left out; as we do it is the eager model."""
    model = make_model("gemma2", dtype)
    wanted = eager_logits(model, ids)
    with torch.no_grad():
        assert (model(input_ids=ids, use_cache=False).logits - wanted).abs().max() > 1e-3
        opened = wrap("m", model, tokenizer).model
        assert opened.config._attn_implementation == ATTENTION
        assert (opened(input_ids=ids, use_cache=False).logits - wanted).abs().max() < 1e-5
        cached = opened(input_ids=ids[:, :9])
        rest = opened(input_ids=ids[:, 9:], past_key_values=cached.past_key_values).logits
    assert (rest - wanted[:, 9:]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_with_the_kv_grid_off_a_quantized_model_is_its_eager_one(name, tiny, ids):
    """Weights and activations in 16 bits: the logits of the original, but for the KV grid."""
    source = tiny(name, torch.float64)
    wanted = eager_logits(source.model, ids)
    sets = ["calibration.sequences=2", "calibration.seqlen=32", "weights.bits=16", "activations.bits=16"]
    recipe = Recipe.load("quarot", [*sets, "transform.method=none", "storage.dtype=float32"])
    model = pipeline.run(source, recipe).model
    with torch.no_grad(), kv_in_16_bits(model):
        assert (model(input_ids=ids, use_cache=False).logits - wanted).abs().max() < 1e-5
    rounded = model(input_ids=ids, use_cache=False).logits
    assert 1e-3 < (rounded - wanted).abs().max() < 1.5
    fine = pipeline.run(tiny(name, torch.float64), recipe.with_(kv={"bits": 8})).model
    with torch.no_grad():
        assert (fine(input_ids=ids, use_cache=False).logits - wanted).abs().max() < (rounded - wanted).abs().max() / 4


@pytest.mark.parametrize("bits", [4, 16])
def test_a_loaded_model_is_capped(bits, tiny, ids, tmp_path):
    """With a 16-bit KV cache too, where no KV grid calls for our attention."""
    recipe = Recipe.load("quarot", [f"kv.bits={bits}", *where("gemma2")])
    run = pipeline.run(tiny("gemma2"), recipe)
    run.save(tmp_path / "out")
    for loaded in (phasequant.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert loaded.config._attn_implementation == ATTENTION
        assert loaded.config.attn_logit_softcapping == CONFIGS["gemma2"].attn_logit_softcapping
    loaded = phasequant.load(tmp_path / "out")
    assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, run.model(input_ids=ids, use_cache=False).logits)


def test_gemma_maps():
    assert ModelMap.from_config(CONFIGS["gemma"]).unfoldable is None
    for name in ("gemma2", "gemma3"):
        found = ModelMap.from_config(CONFIGS[name])
        assert "post_feedforward_layernorm" in found.unfoldable
        assert found.group("gate_up").norm == "pre_feedforward_layernorm"
