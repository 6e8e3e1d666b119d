"""Isolating spikes: a prefix is the same as its tokens in the text, whatever the batch; searches find what is there."""

import json

import pytest
import torch
from conftest import COMMON, CONFIGS, foldable, make_tokenizer
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

import phasequant
from phasequant import isolate
from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.isolate.prefixquant import outlier_tokens
from phasequant.isolate.qfem import exclude, search_alpha, threshold
from phasequant.isolate.qfep import candidates
from phasequant.nn import attach_prefix, kv_in_16_bits, prefix_states, quant_linears, without_prefix
from phasequant.nn.attention import ATTENTION
from phasequant.observe import spike_ratio, sweep, token_spikes
from phasequant.recipe import PrefixPart, Recipe
from phasequant.source import open_model
from phasequant.transform import fixed_rotations
from phasequant.transform.learned import LearnedBlock

PREFIX = (256, 46, 10)


def behind(source, stored=torch.float32):
    attach_prefix(source.model, source.map, prefix_states(source.model, source.map, PREFIX, stored))
    return source


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **more).logits


def close(a, b, tolerance=2e-5):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def recipe_of(text_file, name="llama", **parts):
    values = {
        "rotation": {"where": "folded" if foldable(name) else "online"},
        "transform": {"method": "quarot"},
        "weights": {"bits": 4},
        "activations": {"bits": 4},
        "kv": {"bits": 4},
        "prefix": {"method": "tokens", "tokens": PREFIX},
        "calibration": {"text": str(text_file), "sequences": 4, "seqlen": 64},
    }
    for name, part in parts.items():
        values[name] = {**values.get(name, {}), **part}
    return Recipe.from_dict(values)


# --- a prefix is its tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prefix_is_its_tokens_in_the_text(name, tiny, ids):
    source = tiny(name)
    if getattr(source.model.config, "sliding_window", None):
        source.model.config.sliding_window = 512  # its tokens in the text would leave the window
    first = torch.tensor(PREFIX).expand(len(ids), -1)
    wanted = logits(source.model, torch.cat((first, ids), 1))[:, len(PREFIX) :]
    without = logits(source.model, ids)
    behind(source)
    assert close(logits(source.model, ids), wanted)
    assert not close(without, wanted, 1e-2)
    with without_prefix(source.model, source.map):
        assert torch.equal(logits(source.model, ids), without)


def test_a_prefix_is_seen_past_a_sliding_window(tiny, ids):
    """The window is 16 tokens; the prefix changes what the 24th reads, which its tokens in the text would not."""
    source = tiny("mistral")
    without = logits(source.model, ids)
    behind(source)
    assert not close(logits(source.model, ids)[:, -1], without[:, -1], 1e-3)


def padded(rows, pad=257):
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids, mask


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "opt", "gpt_neox"])
@pytest.mark.parametrize("bits", [4, 16])
def test_batches_padding_chunks_and_caches_give_single_runs_logits(name, bits, tiny, ids, text_file):
    run = phasequant.quantize(tiny(name), recipe_of(text_file, name, activations={"bits": 16}, kv={"bits": bits}))
    model = run.model
    rows = [ids[0], ids[1][:9], ids[0][3:4], ids[1][:0]]  # the last prompt is empty: nothing but padding
    alone = [logits(model, row[None])[0] for row in rows[:3]]
    batch, mask = padded(rows)
    together = logits(model, batch, attention_mask=mask)
    assert torch.isfinite(together).all()
    for i, wanted in enumerate(alone):
        assert close(together[i, -len(wanted) :], wanted)
    with torch.no_grad():  # prefill in pieces, then token by token, through one cache
        cache, found = None, []
        for piece in (batch[:, :7], batch[:, 7:20], *batch[:, 20:].split(1, 1)):
            seen = mask[:, : sum(f.shape[1] for f in found) + piece.shape[1]]
            out = model(input_ids=piece, attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    chunked = torch.cat(found, 1)
    assert cache.get_seq_length() == batch.shape[1]  # the prefix is no user token
    for i, wanted in enumerate(alone):
        assert close(chunked[i, -len(wanted) :], wanted)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gemma2", "opt"])
def test_generate_with_and_without_cache_and_in_batches(name, tiny, ids, text_file):
    model = phasequant.quantize(tiny(name), recipe_of(text_file, name)).model
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 257, "eos_token_id": None}
    rows = [ids[0], ids[1][:5]]
    alone = [
        model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)[0, len(row) :] for row in rows
    ]
    for row, wanted in zip(rows, alone, strict=True):
        slow = model.generate(row[None], attention_mask=torch.ones(1, len(row)), use_cache=False, **options)
        assert torch.equal(slow[0, len(row) :], wanted)
    batch, mask = padded(rows)
    together = model.generate(batch, attention_mask=mask, **options)[:, batch.shape[1] :]
    assert torch.equal(together, torch.stack(alone))
    empty = model.generate(max_new_tokens=8, do_sample=False, eos_token_id=None)  # begins with BOS alone
    begun = model.generate(torch.tensor([[256]]), **options)
    assert torch.equal(empty, begun)


def test_the_prefix_stays_in_16_bits_where_the_kv_cache_has_4(tiny, ids, text_file):
    run = phasequant.quantize(tiny("llama"), recipe_of(text_file, activations={"bits": 16}, weights={"bits": 16}))
    rounded = logits(run.model, ids)
    with kv_in_16_bits(run.model):
        exact = logits(run.model, ids)
    first = torch.tensor(PREFIX).expand(len(ids), -1)
    plain = logits(tiny("llama").model, torch.cat((first, ids), 1))[:, len(PREFIX) :]
    assert close(exact, plain, 0.02)  # bf16 norms, embeddings and prefix
    with torch.no_grad():  # the first token sees itself and the prefix; its own states are all that 4 bits touch
        few = logits(run.model, ids[:, :1])
    with kv_in_16_bits(run.model):
        assert not torch.equal(few, logits(run.model, ids[:, :1]))
    assert not close(rounded, exact, 1e-3)


def test_other_attention_is_refused(tiny, ids):
    source = behind(tiny("llama"))
    source.model.config._attn_implementation = "sdpa"
    with pytest.raises(PhaseQuantError, match="does not see this model's prefix of 3 tokens"):
        logits(source.model, ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_with_a_prefix_and_static_grids(name, tiny, ids, text_file, tmp_path):
    parts = {
        "activations": {"granularity": "tensor", "scales": "static", "bits": 8},
        "exclude": {"method": "qfem", "alpha": 4.0},
    }
    run = phasequant.quantize(tiny(name), recipe_of(text_file, name, **parts))
    made = logits(run.model, ids)
    run.save(tmp_path / "out")
    again = phasequant.load(tmp_path / "out")
    assert torch.equal(logits(again, ids), made)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["prefix"]["tokens"] == list(PREFIX) and manifest["prefix"]["position_offset"] == 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layout"]["prefix"]


@pytest.mark.parametrize("method", ["smooth", "os-plus", "dfrot", "frtq", "spin", "flat", "wush"])
def test_every_transform_keeps_the_prefix(method, tiny, ids, text_file):
    """Un-quantized, a transformed model behind its prefix gives the logits of the raw one behind its own."""
    learning = {"sequences": 2, "seqlen": 24, "batch": 1, "epochs": 1, "steps": 1}
    recipe = recipe_of(
        text_file, transform={"method": method}, weights={"bits": 16}, activations={"bits": 16}, kv={"bits": 16},
        learning=learning, storage={"dtype": "float32"},
    )  # fmt: skip
    wanted = logits(behind(tiny("llama-bias")).model, ids)
    run = phasequant.quantize(tiny("llama-bias"), recipe)
    assert close(logits(run.model, ids), wanted, 1e-4)


def test_learning_sees_the_prefix(tiny, ids):
    """A block that learns holds values mapped as its own: at the start its output is the block's own behind the
    prefix."""
    source = behind(tiny("llama"))
    start = fixed_rotations(source.map, 0, "online").block(0)
    block = source.model.model.layers[0]
    hidden = source.model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None] + len(PREFIX)
    arguments = {"position_embeddings": source.model.model.rotary_emb(hidden, positions), "attention_mask": None}
    wanted = block(hidden, **arguments)
    none = dict.fromkeys(("qkv", "o", "gate_up", "down"))
    learned = LearnedBlock(block, source.map, start, none, None, None)
    block.self_attn.config._attn_implementation = ATTENTION
    assert close(learned(hidden, **arguments), wanted)


def test_chat_does_not_begin_a_text_twice(tiny, text_file, tmp_path, monkeypatch):
    run = phasequant.quantize(tiny("llama"), recipe_of(text_file))
    run.save(tmp_path / "out")
    given = []
    source = open_model(tmp_path / "out")
    monkeypatch.setattr(
        type(source.tokenizer), "__call__", lambda *a, **k: BatchEncoding({"input_ids": torch.tensor([[256, 72, 73]])})
    )
    generate = source.model.generate
    monkeypatch.setattr(source.model, "generate", lambda **k: given.append(k["input_ids"]) or generate(**k))
    phasequant.chat(source, "Hi", max_new_tokens=2)
    assert given[0].tolist() == [[72, 73]]


# --- searches --------------------------------------------------------------------------------------------------------


def test_qfem_leaves_out_what_exceeds_alpha():
    ratios = {(0, "down"): 1290.0, (1, "qkv"): 3.0, (2, "o"): 12.9}
    found = exclude(ratios, 6.0)
    assert list(found.places) == [(0, "down"), (2, "o")] and "1290" in found.places[0, "down"]
    assert threshold([9.0, 4.0, 1.0], 1) == 6.0 and threshold([9.0, 4.0], 0) > 9.0 and threshold([9.0, 4.0], 2) < 4.0


@pytest.mark.parametrize("needed", [0, 1, 3, 7, 8])
def test_alpha_is_searched_against_the_budget(needed):
    ratios = {(i, "down"): 100.0 - i for i in range(8)}
    tried = []

    def perplexity(places):
        tried.append(len(places))
        return 10.0 + max(0, needed - len(places))

    found = search_alpha(ratios, perplexity, 10.05, 1.0)
    assert [block for block, _ in found.places] == list(range(needed)) and found.searched
    assert len(tried) <= 5


def test_an_unreachable_budget_is_said(capsys):
    ratios = {(i, "down"): 100.0 - i for i in range(8)}
    found = search_alpha(ratios, lambda places: 99.0, 10.0, 0.25)
    assert len(found.places) == 2 and "does not keep to the budget" in capsys.readouterr().err


def test_candidates_are_the_largest_by_token():
    absmax = torch.tensor([[50.0, 1.0, 9.0, 2.0], [60.0, 30.0, 1.0, 8.0]])
    tokens = torch.tensor([[256, 5, 6, 7], [256, 6, 8, 7]])
    assert candidates(absmax, tokens, 256, 2) == [6, 7]
    assert candidates(absmax, tokens, None, 1) == [256]


def test_prefixquant_takes_frequent_outliers_then_begin():
    tokens = torch.tensor([[1, 5, 9, 5, 2, 3, 4, 8]] * 4)
    s = torch.ones(4, 8)
    s[:, 0] = 1e4  # the first token is not counted
    s[:, 1] = s[:, 3] = 500.0
    s[0, 2] = 500.0
    spikes = {(0, "down"): s, (1, "down"): torch.ones(4, 8), (0, "qkv"): s * 1e6}
    found, notes = outlier_tokens(spikes, tokens, 256, 64.0)
    assert found == [5, 9, 256] and notes["block"] == 0 and notes["outliers"] == 2.25
    assert outlier_tokens({(0, "down"): torch.ones(4, 8)}, tokens, 256, 64.0)[0] == [256]


def test_begin_is_bos_or_eos():
    tokenizer = make_tokenizer()
    assert isolate.begin_token(tokenizer) == 256
    tokenizer.bos_token = None
    assert isolate.begin_token(tokenizer) == 257
    tokenizer.eos_token = None
    assert isolate.begin_token(tokenizer) is None


def test_mistakes_in_prefixes(tiny, text_file):
    with pytest.raises(PhaseQuantError, match=r"prefix\.tokens goes with prefix\.method=tokens"):
        Recipe.from_dict({"prefix": {"tokens": [1]}})
    with pytest.raises(PhaseQuantError, match="knows ids 0 to 257"):
        phasequant.quantize(tiny("llama"), recipe_of(text_file, prefix={"tokens": [999]}))
    source = tiny("llama")
    source.tokenizer.bos_token = source.tokenizer.eos_token = None
    with pytest.raises(PhaseQuantError, match="no BOS and no EOS"):
        isolate.find_prefix(source.model, source.map, source.tokenizer, PrefixPart(method="bos"), None)
    with pytest.raises(PhaseQuantError, match=r"set activations\.bits below 16"):
        Recipe.from_dict({"exclude": {"method": "qfem"}})
    with pytest.raises(PhaseQuantError, match="changes nothing"):
        Recipe.from_dict({"exclude": {"method": "qfem", "bits": 8}, "activations": {"bits": 8}})


def test_excluded_groups_read_16_bits_or_8_a_token(tiny, text_file):
    for bits, wanted in ((16, None), (8, 8)):
        recipe = recipe_of(text_file, exclude={"method": "qfem", "alpha": 1.5, "bits": bits})
        run = phasequant.quantize(tiny("llama"), recipe)
        assert run.plan.raised and run.plan.alpha == 1.5
        for (block, group), entry in run.plan.raised.items():
            assert (entry.spec and entry.spec.bits) == wanted and entry.why.startswith("QFeM")
            assert run.plan.spec(block, group) == entry.spec
        specs = {linear.input_spec for _, linear in quant_linears(run.model)}
        assert len(specs) == (2 if len(run.plan.raised) < 12 else 1)


# --- planted spikes --------------------------------------------------------------------------------------------------

BEGIN, SPIKING = 256, 65
PLANTED = {(1, "down"): 17, (2, "down"): 40}  # place → channel


def planted():
    """A model in which the first SPIKING token behind the begin token, and no other, spikes at PLANTED.

    One head of block 0 counts: its SPIKING queries see begin and SPIKING keys alike, and its output is n/(n+1) after n
    of them. The gates of the planted channels open below 0.58: at n = 1.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        **COMMON, head_dim=12, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e12}
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    embeddings = model.model.embed_tokens.weight
    embeddings[:, 8:] = torch.randn(len(embeddings), 40).sign()
    embeddings[:, :8] = 0
    embeddings[SPIKING, 0] = embeddings[BEGIN, 1] = 1.0
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.normal_(0, 0.01)
            linear.weight[:8] = 0
    attention = model.model.layers[0].self_attn
    slow = 5  # of head 0: RoPE does not turn it
    attention.q_proj.weight[:12] = 0
    attention.k_proj.weight[:12] = 0
    attention.q_proj.weight[slow, 0] = attention.k_proj.weight[slow, 0] = attention.k_proj.weight[slow, 1] = 12.0
    attention.v_proj.weight[0] = 0
    attention.v_proj.weight[0, 0] = 1.0
    attention.o_proj.weight[2] = 0
    attention.o_proj.weight[2, 0] = 1.0
    for (block, _), channel in PLANTED.items():
        mlp = model.model.layers[block].mlp
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[channel] = 0
        mlp.gate_proj.weight[channel, 0] = 0.58e3
        mlp.gate_proj.weight[channel, 2] = -1e3 / 0.935  # the value was normalized: rms of a token is 0.935
        mlp.up_proj.weight[channel, 0] = 40.0 / block
        mlp.down_proj.weight[:, channel] = 0
    return model, ModelMap.from_config(config)


@pytest.fixture(scope="module")
def text_with_spikes():
    """Eight sequences that begin with BEGIN; SPIKING once or twice in each, at other places."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 60, (8, 40), generator=generator)
    ids[:, 0] = BEGIN
    for row, at in enumerate(torch.randint(4, 20, (8,), generator=generator).tolist()):
        ids[row, at] = SPIKING
        ids[row, 30] = SPIKING
    return ids


def test_planted_spikes_are_where_they_were_planted(text_with_spikes):
    model, model_map = planted()
    spikes = token_spikes(model, model_map, text_with_spikes)
    for place, s in spikes.items():
        outlier = s > 20 * s.median(-1, keepdim=True).values
        first = torch.stack([(row == SPIKING).nonzero()[0, 0] for row in text_with_spikes])
        wanted = torch.zeros_like(outlier)
        if place in PLANTED:
            wanted[torch.arange(8), first] = True
        assert torch.equal(outlier, wanted), place
    ratios = {place: spike_ratio(s) for place, s in spikes.items()}
    assert set(exclude(ratios, 20.0).places) == set(PLANTED)


def test_the_sweep_names_planted_channels_and_tokens(text_with_spikes):
    model, model_map = planted()
    found = sweep(model, model_map, text_with_spikes)
    for (block, group), channel in PLANTED.items():
        row = found.spikes.row(block, group)
        assert row.channel == channel
        best = max(range(len(row.times)), key=lambda i: row.times[i])
        assert found.spikes.tokens[best] == str(SPIKING)
        assert row.times[best] == pytest.approx(found.group(block, group).spike_ratio, rel=0.5)


@pytest.mark.parametrize("method", ["qfep", "prefixquant"])
def test_a_searched_prefix_takes_planted_spikes_away(method, text_with_spikes):
    model, model_map = planted()
    tokenizer = make_tokenizer()
    text = text_with_spikes if method == "prefixquant" else text_with_spikes[:, 1:]  # qfep puts begin before it
    prefix = isolate.find_prefix(model, model_map, tokenizer, PrefixPart(method=method), text)
    if method == "qfep":
        assert prefix.tokens[0] == BEGIN and prefix.tokens[2] == SPIKING and len(prefix.tokens) == 3
        assert prefix.notes["place"] == "1.down" and prefix.notes["times"] > 100
    else:
        assert prefix.tokens == (SPIKING, BEGIN)
    attach_prefix(model, model_map, prefix_states(model, model_map, prefix.tokens, torch.float32))
    ratios = {place: spike_ratio(s) for place, s in token_spikes(model, model_map, text_with_spikes[:, 1:]).items()}
    assert not exclude(ratios, 20.0).places
