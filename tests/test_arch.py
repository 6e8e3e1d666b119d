"""Maps of every family: sizes that are the model's, places that can carry scales, and what is refused."""

import runpy
from pathlib import Path

import pytest
import torch
from conftest import COMMON, CONFIGS, OPT, foldable
from torch import nn
from transformers import AutoConfig, GemmaConfig, GPT2Config, OPTConfig

from phasequant.arch import FAMILIES, GROUPS, REFUSED, ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.serving.support import UNSERVED
from phasequant.transform.apply import _new_gain
from phasequant.transform.norms import gain_of, set_gain, unit


@pytest.mark.parametrize("name", CONFIGS)
def test_widths_and_multiply_adds_are_the_weights(name, tiny):
    source = tiny(name)
    assert tuple(group.name for group in source.map.groups) == GROUPS
    for block in source.map.blocks:
        for group in source.map.groups:
            linears = [source.model.get_submodule(f"{source.map.block_name(block)}.{n}") for n in group.linears]
            assert {linear.in_features for linear in linears} == {source.map.width_in(group.name)}
            shape = source.map.shape
            every, used = (shape.experts, shape.active) if group.probe else (1, 1)
            assert sum(linear.out_features for linear in linears) == every * source.map.width_out(group.name)
            assert sum(linear.weight.numel() for linear in linears) * used == every * source.map.macs(group.name)
    inside = [m for n, m in source.model.named_modules() if isinstance(m, nn.Linear) and n != source.map.family.head]
    if not source.map.shape.experts:
        assert source.map.macs_total == sum(linear.weight.numel() for linear in inside)


@pytest.mark.parametrize("name", CONFIGS)
def test_named_parts_are_there(name, tiny):
    source = tiny(name)
    block = source.model.get_submodule(source.map.block_name(0))
    family = source.map.family
    for part in (family.attention, family.value, *family.ups, *family.writers, *family.post_norms):
        assert part is None or block.get_submodule(part) is not None
    linears = {n for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    kept = {family.shared_gate} - {None}
    assert linears == {n for group in source.map.groups for n in group.linears} | kept
    norms = {n for n, m in block.named_children() if "norm" in n and m is not None}
    assert norms == {g.norm for g in source.map.groups if g.norm} | set(family.post_norms)
    assert source.model.get_input_embeddings() is source.model.get_submodule(family.embeddings)
    assert source.model.get_output_embeddings() is source.model.get_submodule(family.head)


def test_where_scales_can_stand():
    scaled = {name: ModelMap.from_config(config).scaled for name, config in CONFIGS.items()}
    assert scaled["llama"] == scaled["gemma2"] == scaled["stablelm"] == scaled["opt"] == ("qkv", "gate_up", "down")
    assert scaled["stablelm-parallel"] == ("qkv", "down")  # one norm for both
    assert scaled["phi"] == ("qkv",)
    assert scaled["opt-gelu"] == scaled["gpt_neox"] == ("qkv", "gate_up")
    phi = ModelMap.from_config(CONFIGS["phi"])
    assert phi.scale_of("gate_up") == "qkv" and phi.scale_of("o") is phi.scale_of("down") is None
    assert phi.sharing("gate_up") == phi.sharing("qkv") == (*phi.group("qkv").linears, "mlp.fc1")
    assert phi.sharing("down") == ("mlp.fc2",)


def test_which_families_fold():
    others = {"gemma", "smollm3", "granite", "phi3", "gpt_oss"}
    assert {name for name in CONFIGS if foldable(name)} == {n for n in CONFIGS if n[:2] in ("ll", "mi", "qw")} | others
    assert "take off the mean" in ModelMap.from_config(CONFIGS["gpt_neox"]).unfoldable
    assert "post_attention_layernorm" in ModelMap.from_config(CONFIGS["gemma3"]).unfoldable


def test_families_of_one_type_are_told_apart():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert ModelMap.from_config(CONFIGS["opt"]).fingerprint() != ModelMap.from_config(CONFIGS["opt-gelu"]).fingerprint()
    assert ModelMap.from_config(CONFIGS["stablelm-parallel"]).family.name == "StableLM, parallel"
    for family in FAMILIES:  # the last of a type takes what no other does
        last = [other for other in FAMILIES if set(other.model_types) & set(family.model_types)][-1]
        assert last.when == ()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"do_layer_norm_before": False}, "norms stand after the sublayers"),
        ({"word_embed_proj_dim": 32}, "word_embed_proj_dim=32, and only 48 is supported: .*go through projections"),
        ({"layer_norm_elementwise_affine": False}, "no gain"),
    ],
)
def test_opts_that_do_not_fit_are_refused(options, why):
    with pytest.raises(PhaseQuantError, match=why):
        ModelMap.from_config(OPTConfig(**{**OPT, **options}))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_known_and_refused_says_why(kind):
    with pytest.raises(PhaseQuantError, match=f"{REFUSED[kind][0]} models .*latent attention"):
        ModelMap.from_config(AutoConfig.for_model(kind))


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("options", "why"),
    [({"mlp_only_layers": [0]}, "mlp_only_layers=.0., and only"), ({"decoder_sparse_step": 2}, "another width stand")],
)
def test_mixtures_with_dense_blocks_are_refused(options, why, name):
    with pytest.raises(PhaseQuantError, match=why):
        ModelMap.from_config(type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), **options}))


def test_a_shared_expert_of_an_odd_width_is_refused():
    config = type(CONFIGS["qwen2_moe"]).from_dict(
        {**CONFIGS["qwen2_moe"].to_dict(), "shared_expert_intermediate_size": 65}
    )
    with pytest.raises(PhaseQuantError, match=r"shared_expert_intermediate_size=65 .*does not divide"):
        ModelMap.from_config(config)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm3", "no RoPE in blocks 1: R3"),
        ("granite", "embedding_multiplier 6, attention_multiplier 0.2, residual_multiplier 0.4, logits_scaling 3"),
        ("olmo2", "they read the residual stream itself"),
        ("olmo2", "q and k are normalized"),
        ("phi3", "RoPE turns 0.5 of the channels"),
        ("gemma2", "attention scores are capped at 2"),
        ("gemma2", "logits are capped at 3"),
        ("phi-norm", "q and k are normalized"),
        ("qwen2_moe", "taken apart into 2 of"),
        ("gpt_oss", "a sink a head"),
    ],
)
def test_what_a_config_makes_of_a_family_is_said(name, said):
    notes = ModelMap.from_config(CONFIGS[name]).describe()["notes"]
    assert any(said in note for note in notes)
    plain = {"phi-norm": "phi", "granite": "llama", "smollm3": "llama"}.get(name, "llama")
    assert not any(said in note for note in ModelMap.from_config(CONFIGS[plain]).notes)


def test_analyze_says_it(run, saved, text_file, tmp_path):
    sets = ["calibration.sequences=1", "calibration.seqlen=32"]
    status, out, _ = run("analyze", saved("smollm3"), "-o", tmp_path / "out", "--calib", text_file,
                         *(x for s in sets for x in ("--set", s)))  # fmt: skip
    assert status == 0 and "SmolLM3: there is no RoPE in blocks 1" in out
    assert "there is no RoPE in blocks 1" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("group", "rows"), [("o", "value_rows"), ("down", "up_rows")])
def test_rows_of_fused_linears_are_v_and_up(group, rows, tiny, ids):
    """Twice those rows is twice what o, or down, reads; twice the others is not."""
    source = tiny("phi3")
    family, block = source.map.family, source.model.model.layers[0]
    linear, own = block.get_submodule(family.value if group == "o" else family.ups[0]), getattr(source.map, rows)
    seen = []
    block.get_submodule(source.map.group(group).input).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for part in (slice(0, 0), own, slice(0, own.start)):
        kept = linear.weight.clone()
        linear.weight[part] *= 2
        source.model(input_ids=ids, use_cache=False)
        linear.weight.copy_(kept)
    torch.testing.assert_close(seen[1], 2 * seen[0])
    assert (seen[2] - 2 * seen[0]).abs().max() > 0.1 * seen[0].abs().max()


def test_the_page_of_families_is_up_to_date():
    assert set(UNSERVED) <= {family.name for family in FAMILIES}
    folder = Path(__file__).resolve().parents[1] / "docs"
    made = runpy.run_path(str(folder / "families.py"))
    assert (folder / "families.md").read_text(encoding="utf-8") == made["page"](), "run: python docs/families.py"


def test_unknown_types_are_refused_and_every_family_named_once():
    with pytest.raises(PhaseQuantError, match="type 'gpt2' are not supported") as caught:
        ModelMap.from_config(GPT2Config())
    assert "OPT (opt), GPT-NeoX (gpt_neox)" in str(caught.value) and "no ReLU" not in str(caught.value)


# --- norms -----------------------------------------------------------------------------------------------------------


def norm_of(kind, width=32):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = {"rms": LlamaRMSNorm, "rms+1": GemmaRMSNorm, "layer": nn.LayerNorm}[kind](width, eps=1e-3)
    norm.requires_grad_(False)
    norm.weight.uniform_(-1, 1)
    if kind == "layer":
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("kind", ["rms", "rms+1", "layer"])
def test_a_norm_is_its_unit_output_times_its_gain(kind):
    torch.manual_seed(0)
    norm, x = norm_of(kind), torch.randn(5, 32) * 3 + 1
    bias = norm.bias if kind == "layer" else 0.0
    torch.testing.assert_close(unit(x, norm, kind) * gain_of(norm, kind).float() + bias, norm(x))
    set_gain(norm, kind, torch.ones(32, dtype=torch.float64))
    torch.testing.assert_close(unit(x, norm, kind) + bias, norm(x))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rms", "rms+1", "layer"])
def test_scaled_norms_and_their_readers_are_the_same_function(kind, stored):
    """Gains of 0 too: nothing comes through an RMSNorm's, and a LayerNorm's bias does."""
    torch.manual_seed(0)
    norm, x = norm_of(kind).double(), torch.randn(5, 32, dtype=torch.float64)
    gain = gain_of(norm, kind)
    gain[3] = 0
    set_gain(norm, kind, gain)
    weight, scale = torch.randn(7, 32, dtype=torch.float64), torch.rand(32, dtype=torch.float64) + 0.5
    wanted = norm(x) @ weight.T
    before, after = _new_gain(norm, kind, scale, False, stored)
    assert torch.equal(norm.weight.to(stored).double(), norm.weight)
    torch.testing.assert_close(gain_of(norm, kind)[4:], (gain * scale)[4:], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(norm(x) @ (weight * before / after).T, wanted, rtol=1e-5, atol=1e-5)


def test_gemmas_embeddings_keep_their_scale_inside(tiny, ids):
    """They are multiplied by √D after the look-up, so a rotation of their rows is a rotation of what comes out."""
    source = tiny("gemma")
    x = source.model.get_submodule(source.map.family.embeddings)(ids)
    weight = source.model.get_submodule(source.map.family.embeddings).weight
    torch.testing.assert_close(x, weight[ids] * COMMON["hidden_size"] ** 0.5)
    assert ModelMap.from_config(GemmaConfig(**COMMON)).shape.d_model == COMMON["hidden_size"]
