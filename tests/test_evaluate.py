"""Perplexity and KL against torch by hand, and the API end to end on tiny models."""

import math

import pytest
import torch

import phasequant
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import score, weight_bytes
from phasequant.recipe import Recipe


def test_perplexity_and_kl_by_hand(tiny):
    a, b = tiny("llama", seed=1).model, tiny("llama", seed=2).model
    chunks = torch.randint(0, 200, (3, 600), generator=torch.Generator().manual_seed(0))
    scores, original = score({"b": b}, chunks, a)
    losses, divergences = [], []
    for chunk in chunks:
        p, q = (m(input_ids=chunk[None]).logits[0, :-1].double().log_softmax(-1) for m in (a, b))
        losses.append(-q.gather(1, chunk[1:, None]).mean().item())
        divergences.append((p.exp() * (p - q)).sum(-1).mean().item())
    assert scores["b"].ppl == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert scores["b"].kl == pytest.approx(sum(divergences) / 3, rel=1e-5)
    same, _ = score({"a": a}, chunks, a)
    assert same["a"].kl == pytest.approx(0, abs=1e-6) and same["a"].ppl == original.ppl


def test_broken_models_are_not_scored(tiny):
    model = tiny().model
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(PhaseQuantError, match="NaN"):
        score({"broken": model}, torch.randint(0, 200, (1, 16)))


def test_weight_bytes_counts_codes_as_they_are(tiny):
    source = tiny("llama")
    dense = weight_bytes(source.model)
    assert dense == 2 * sum(p.numel() for p in source.model.parameters())
    run = phasequant.quantize(source, "quarot")
    linears = [m for m in run.model.modules() if type(m).__name__ == "QuantLinear"]
    codes = sum(m.in_features * m.out_features // 2 for m in linears)
    scales = sum(4 * m.out_features for m in linears)
    factors = sum(b.nbytes for n, b in run.model.named_buffers() if n.endswith((".left", ".right")))
    embeddings = 2 * 2 * run.map.shape.vocab * run.map.shape.d_model
    norms = 2 * 7 * run.map.shape.d_model
    assert weight_bytes(run.model) == codes + scales + factors + embeddings + norms


KEYS = ("ppl", "ppl_16bit", "kl", "chunks", "seqlen", "a8_share", "weight_bytes", "kv_bytes_per_token")


def test_evaluate_reports_what_the_issue_names(saved, text_file, tmp_path):
    folder = str(saved("qwen2"))
    options = {"text": text_file, "chunks": 3, "seqlen": 64}
    plain = phasequant.evaluate(folder, **options)
    assert all(plain[key] is not None for key in KEYS)
    assert plain["ppl"] == plain["ppl_16bit"] and plain["kl"] == 0 and plain["chunks"] == 3
    sets = ["calibration.sequences=2", "calibration.seqlen=32", "policy.name=budget"]
    memory = phasequant.evaluate(folder, recipe="quarot", overrides=sets, **options)
    assert memory["ppl_16bit"] == plain["ppl"] and memory["kl"] > 0
    assert memory["weight_bytes"] < plain["weight_bytes"]
    assert memory["kv_bytes_per_token"] < plain["kv_bytes_per_token"]
    phasequant.quantize(folder, "quarot", overrides=sets, output=tmp_path / "out")
    disk = phasequant.evaluate(tmp_path / "out", **options)
    assert disk["ppl"] == memory["ppl"] and disk["kl"] == memory["kl"]
    assert disk["a8_share"] == memory["a8_share"] <= 0.125
    assert sum(disk["kernels"].values()) == 21


def test_a_given_plan_is_followed(saved, tmp_path):
    folder = str(saved("llama"))
    run = phasequant.quantize(folder, "dynamicptq")
    path = tmp_path / "plan.json"
    path.write_text(run.plan.to_json())
    again = phasequant.quantize(folder, "quarot", plan=path)
    assert again.plan.raised.keys() == run.plan.raised.keys()
    ids = torch.randint(0, 200, (1, 20))
    assert torch.equal(again.model(input_ids=ids).logits, run.model(input_ids=ids).logits)
    with pytest.raises(PhaseQuantError, match="cannot be read"):
        phasequant.quantize(folder, plan=tmp_path / "none.json")


def test_checkpoint_whose_original_is_gone_is_still_measured(saved, text_file, tmp_path):
    folder = saved("llama")
    phasequant.quantize(str(folder), output=tmp_path / "out")
    folder.rename(tmp_path / "moved")
    options = {"text": text_file, "chunks": 1, "seqlen": 64}
    found = phasequant.evaluate(tmp_path / "out", **options)
    assert found["ppl"] > 0 and found["kl"] is None and found["ppl_16bit"] is None
    named = phasequant.evaluate(tmp_path / "out", original=tmp_path / "moved", **options)
    assert named["kl"] > 0 and named["ppl"] == found["ppl"]


def test_analyze_plans_without_quantizing(saved, tmp_path):
    sets = ["calibration.sequences=2", "calibration.seqlen=32"]
    found = phasequant.analyze(str(saved("qwen3")), overrides=sets, output=tmp_path / "run")
    assert found.plan.policy == "budget" and set(found.plans) == {"uniform", "paper", "threshold", "budget"}
    assert {"report.json", "report.html", "plan.json", "recipe.yaml"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert [o.coordinates for o in found.observations] == ["raw", "after quarot"]
    found.save(tmp_path / "run")  # an earlier report is replaced
    (tmp_path / "run" / "mine.txt").write_text("words")
    with pytest.raises(PhaseQuantError, match="other files"):
        found.save(tmp_path / "run")
    with pytest.raises(PhaseQuantError, match=r"activations\.bits below 16"):
        phasequant.analyze(str(saved("llama")), "16bit")


def test_chat_answers(saved, capsys):
    text = phasequant.chat(str(saved("llama")), "Hello", max_new_tokens=5)
    assert isinstance(text, str)
    streamed = phasequant.chat(str(saved("qwen3")), "Hello", max_new_tokens=5, stream=True)
    assert streamed in capsys.readouterr().out
    with pytest.raises(PhaseQuantError, match="prompt is empty"):
        phasequant.chat("demo", " ")


def test_quantizing_twice_is_refused(saved, tmp_path):
    phasequant.quantize(str(saved("llama")), output=tmp_path / "out")
    with pytest.raises(PhaseQuantError, match="already"):
        phasequant.quantize(tmp_path / "out")
    with pytest.raises(PhaseQuantError, match="already"):
        phasequant.evaluate(tmp_path / "out", recipe=Recipe.load("quarot"))


def test_the_original_must_be_the_original(saved, text_file, tmp_path):
    folder, other = saved("llama"), saved("qwen3")
    phasequant.quantize(str(folder), output=tmp_path / "out")
    options = {"text": text_file, "chunks": 1, "seqlen": 64}
    with pytest.raises(PhaseQuantError, match="quantized itself"):
        phasequant.evaluate(tmp_path / "out", original=tmp_path / "out", **options)
    with pytest.raises(PhaseQuantError, match="another architecture"):
        phasequant.evaluate(tmp_path / "out", original=other, **options)
    with pytest.raises(PhaseQuantError, match="not quantized"):
        phasequant.evaluate(folder, original=other, **options)


def test_the_original_is_found_from_any_directory(saved, text_file, tmp_path, monkeypatch):
    folder = saved("llama")
    monkeypatch.chdir(folder.parent)
    phasequant.quantize(f"./{folder.name}", output="out")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert phasequant.evaluate(tmp_path / "out", text=text_file, chunks=1, seqlen=64)["kl"] > 0


def test_models_in_memory_are_models_too(tiny, text_file):
    source, options = tiny("qwen2"), {"text": text_file, "chunks": 1, "seqlen": 64}
    plain = phasequant.evaluate(source.model, tokenizer=source.tokenizer, **options)
    run = phasequant.quantize(source.model, "quarot", tokenizer=source.tokenizer)
    found = phasequant.evaluate(run, original=tiny("qwen2"), **options)
    assert found["ppl_16bit"] == plain["ppl"] and found["kl"] > 0
    with pytest.raises(PhaseQuantError, match="needs its tokenizer"):
        phasequant.quantize(tiny("qwen2").model)
    with pytest.raises(PhaseQuantError, match="not a int"):
        phasequant.quantize(3)


def test_a_source_is_used_up_once(tiny):
    source = tiny("llama")
    phasequant.quantize(source)
    with pytest.raises(PhaseQuantError, match="quantized already"):
        phasequant.quantize(source)
    source = tiny("llama")
    phasequant.analyze(source, overrides=["calibration.sequences=2", "calibration.seqlen=32"])
    with pytest.raises(PhaseQuantError, match="transformed already"):
        phasequant.quantize(source)
