"""Save, load, and the same numbers come back; what is damaged is refused."""

import json
import shutil

import pytest
import torch
from conftest import CONFIGS, NEW, make_model, where
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import phasequant
from phasequant import pipeline
from phasequant.errors import PhaseQuantError
from phasequant.nn import PackedCache, PackedLayer, quant_linears
from phasequant.recipe import Recipe
from phasequant.source import wrap

SMALL = ["calibration.sequences=2", "calibration.seqlen=32"]


def quantized(source, name="quarot", *sets):
    return pipeline.run(source, Recipe.load(name, [*SMALL, *sets]))


def greedy(model, ids, n=12):
    return model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=257)


@pytest.mark.parametrize("name", CONFIGS)
def test_reload_gives_the_same_tokens_and_logits(name, tiny, ids, tmp_path):
    run = quantized(tiny(name), "quarot", "policy.name=paper", *where(name))
    before = run.model(input_ids=ids, use_cache=False).logits
    tokens = greedy(run.model, ids)
    run.save(tmp_path / "out")
    for loaded in (
        phasequant.load(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32),
    ):
        assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, before)
        assert torch.equal(greedy(loaded, ids), tokens)
        assert all(m.weight_packed.dtype == torch.uint8 for _, m in quant_linears(loaded))


@pytest.mark.parametrize(
    "sets",
    [
        ["weights.symmetric=false"],
        ["weights.granularity=group", "weights.group_size=12"],
        ["weights.bits=8", "kv.bits=8"],
        ["weights.bits=3", "kv.bits=2", "activations.bits=6"],
        ["activations.symmetric=false", "activations.granularity=tensor"],
        ["weights.bits=16"],
        ["kv.bits=16"],
        ["activations.bits=16"],
        ["transform.method=none"],
        ["kv.group_size=6", "kv.symmetric=true"],
    ],
    ids=" ".join,
)
def test_every_grid_survives_the_disk(sets, tiny, ids, tmp_path):
    run = quantized(tiny("llama"), "quarot", *sets)
    before = run.model(input_ids=ids, use_cache=False).logits
    run.save(tmp_path / "out")
    loaded = phasequant.load(tmp_path / "out")
    assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, before)
    assert loaded.config.quantization_config.layout == run.model.config.quantization_config.layout


def test_saving_a_loaded_model_again_keeps_every_tensor(tiny, tmp_path):
    quantized(tiny("qwen2")).save(tmp_path / "one")
    phasequant.load(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_parts_load_in_the_type_that_is_asked_for(dtype, tiny, tmp_path):
    quantized(tiny("llama-bias")).save(tmp_path / "out")
    model = phasequant.load(tmp_path / "out", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert any(name.endswith("q_proj.bias") for name, _ in model.named_parameters())


def test_what_nothing_folds_into_stays_tied(tiny, ids, tmp_path):
    run = quantized(tiny("llama"), "quarot-online")
    run.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    again = phasequant.load(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(ids).logits, run.model(ids).logits)


def test_files_hold_what_they_promise(tiny, tmp_path):
    run = quantized(tiny("llama"), "dynamicptq")
    run.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "phasequant"
    assert config["tie_word_embeddings"] is False
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {"config.json", "model.safetensors", "plan.json", "recipe.yaml"} <= set(manifest["files"])
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == run.recipe
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        packed = file.get_tensor("model.layers.0.self_attn.q_proj.weight_packed")
        seal = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
    assert packed.dtype == torch.uint8 and packed.shape == (48, 24)
    # a loader that does not know us finds no linear of the blocks but one, and that has no linear's shape: the seal
    plain = [key for key in keys if key.startswith("model.layers") and key.endswith("proj.weight")]
    assert plain == ["model.layers.0.self_attn.q_proj.weight"] and seal.shape == (32,)


def test_half_and_double_leave_the_grid_alone(tiny, tmp_path):
    run = quantized(tiny("llama"))
    _, linear = quant_linears(run.model)[-1]
    scale, left = linear.weight_scale.clone(), linear.online.left.clone()
    run.model.to(torch.bfloat16)
    assert torch.equal(linear.weight_scale, scale) and torch.equal(linear.online.left, left)


def test_generate_uses_a_packed_cache(tiny, ids):
    run = quantized(tiny("llama"))
    output = run.model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=257)
    cache = output.past_key_values
    tokens = cache.get_seq_length()
    codes = [layer.packed.keys.codes for layer in cache.layers]
    assert all(c.dtype == torch.uint8 and c.shape == (2, 2, tokens, 6) for c in codes)
    per_token = sum(q.bytes_per_token(2) for q in run.model.modules() if type(q).__name__ == "KVQuantizer")
    assert sum(layer.nbytes for layer in cache.layers) == per_token * tokens * 2


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-sliding", "qwen3", *NEW])
def test_cache_chunks_and_padding_give_the_same_logits(name, tiny, ids):
    model = quantized(tiny(name, torch.float64), "quarot", *where(name)).model
    whole = model(input_ids=ids, use_cache=False).logits
    cache = PackedCache(model)
    pieces = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([10, 1, 9, 4], dim=1)]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-9)
    padded = torch.cat([torch.full((2, 5), 257), ids], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    shifted = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 5:]
    assert torch.allclose(shifted, whole, atol=1e-9)


@pytest.mark.parametrize("name", NEW)
def test_generate_gives_the_same_tokens_with_and_without_a_cache(name, tiny, ids):
    """Past the sliding windows of those that have them."""
    model = quantized(tiny(name), "quarot", *where(name)).model
    output = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, pad_token_id=257)
    assert isinstance(output.past_key_values.layers[0], PackedLayer)
    assert output.past_key_values.layers[-1].get_seq_length() >= ids.shape[1] + 1
    again = model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False, pad_token_id=257)
    assert torch.equal(output.sequences, again)


def test_beam_search_reorders_the_packed_cache(tiny, ids):
    model = quantized(tiny("llama")).model
    plain = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=257)
    again = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=False, pad_token_id=257)
    assert torch.equal(plain, again)


def test_another_attention_is_refused(tiny, ids):
    run = quantized(tiny("llama"))
    run.model.set_attn_implementation("eager")
    with pytest.raises(PhaseQuantError, match="16-bit KV cache"):
        run.model(input_ids=ids)


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny, tmp_path):
    quantized(tiny("llama")).save(tmp_path / "whole")
    return tmp_path / "whole"


def _edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_truncated_weights(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PhaseQuantError, match="cut short"):
        phasequant.load(checkpoint)


def test_one_flipped_bit(checkpoint):
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PhaseQuantError, match="SHA-256 differs"):
        phasequant.load(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json", "plan.json"])
def test_missing_file(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(PhaseQuantError):
        phasequant.load(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"].update(format=1), "format 1"),
        (lambda c: c["quantization_config"]["layout"].pop("weights"), "not one of PhaseQuant's"),
        (lambda c: c["quantization_config"]["layout"]["weights"].update(bits=8), "layout's hash"),
        (lambda c: c["quantization_config"]["layout"]["weights"].update(bitz=4), "bits"),
        (lambda c: c["quantization_config"].update(extra=1), "extra"),
        (
            lambda c: c["quantization_config"]["layout"]["activations"]["others"].update({"7.qkv": {"bits": 8}}),
            "7.qkv",
        ),
    ],
)
def test_edited_config_is_refused_even_unverified(checkpoint, change, message):
    _edit(checkpoint / "config.json", change)
    with pytest.raises(PhaseQuantError, match=r"edited or damaged|cut short or edited"):
        phasequant.load(checkpoint)
    with pytest.raises(PhaseQuantError, match=message):
        phasequant.load(checkpoint, verify=False)


def test_missing_tensor_is_refused_even_unverified(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight_scale")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PhaseQuantError, match=r"missing keys.*up_proj.weight_scale"):
        phasequant.load(checkpoint, verify=False)


def test_not_a_checkpoint(saved, tmp_path):
    with pytest.raises(PhaseQuantError, match=r"manifest\.json"):
        phasequant.load(saved())
    with pytest.raises(PhaseQuantError, match="does not exist"):
        phasequant.load(tmp_path / "nowhere")


def test_failed_writes_leave_nothing(tiny, tmp_path, monkeypatch):
    run = quantized(tiny("llama"))

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.tokenizer.__class__, "save_pretrained", full)
    with pytest.raises(PhaseQuantError, match="No space left"):
        run.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_seen_before_writing(tiny, tmp_path, monkeypatch):
    run = quantized(tiny("llama"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(PhaseQuantError, match="MiB free"):
        run.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_outputs_do_not_overwrite_what_is_not_theirs(tiny, tmp_path):
    run = quantized(tiny("llama"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(PhaseQuantError, match="other files"):
        run.save(tmp_path / "mine")
    (tmp_path / "mine" / "manifest.json").write_text('{"files": {}, "versions": {"phasequant": "1"}}')
    with pytest.raises(PhaseQuantError, match="other files"):  # a manifest, but not of these files
        run.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"
    run.save(tmp_path / "out")
    run.save(tmp_path / "out")  # an earlier result is replaced
    assert phasequant.load(tmp_path / "out") is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_a_failed_swap_keeps_the_earlier_result(tiny, tmp_path, monkeypatch):
    run = quantized(tiny("llama"))
    run.save(tmp_path / "out")

    def fail(self, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(PhaseQuantError, match="Input/output error"):
        run.save(tmp_path / "out")
    monkeypatch.undo()
    assert phasequant.load(tmp_path / "out") is not None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_outputs_follow_links_and_need_a_writable_place(tiny, tmp_path):
    run = quantized(tiny("llama"))
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    run.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and phasequant.load(tmp_path / "big") is not None
    (tmp_path / "file").write_text("x")
    with pytest.raises(PhaseQuantError, match="not a directory"):
        run.save(tmp_path / "file" / "out")


def test_sampling_defaults_that_transformers_refuses_are_mended(tiny, tmp_path):
    run = quantized(tiny("llama"))
    run.model.generation_config.temperature = 0.6
    run.save(tmp_path / "out")
    assert phasequant.load(tmp_path / "out").generation_config.do_sample is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(files={}), "does not name"),
        (lambda m: m.update(files={"config.json": 5}), "not a manifest"),
        (lambda m: m.pop("versions"), "not a manifest"),
    ],
)
def test_edited_manifests(checkpoint, change, message):
    _edit(checkpoint / "manifest.json", change)
    with pytest.raises(PhaseQuantError, match=message):
        phasequant.load(checkpoint)


def test_a_foreign_shard_is_refused(checkpoint):
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "model-00002-of-00002.safetensors")
    with pytest.raises(PhaseQuantError, match="not of this checkpoint"):
        phasequant.load(checkpoint)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models_keep_their_type(dtype, tmp_path, tokenizer, ids):
    make_model("llama").to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=getattr(torch, dtype))
    run = quantized(wrap("m", model, tokenizer))
    before = run.model(input_ids=ids, use_cache=False).logits
    assert before.dtype == getattr(torch, dtype)
    run.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == getattr(torch, dtype)
    assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, before)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_cache_may_come_by_position(name, tiny, ids):
    model = quantized(tiny(name), "quarot", *where(name)).model
    cache = PackedCache(model)
    before = (None,) if name == "opt" else (None, None)
    first = model(ids[:, :5], *before, cache, use_cache=True).logits
    assert cache.get_seq_length() == 5 and torch.equal(first, model(input_ids=ids[:, :5], use_cache=False).logits)
