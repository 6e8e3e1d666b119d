"""The command line: one JSON as the last line of stdout, and for every mistake status 2, one message, nothing left."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

CALIB = ["--set", "calibration.sequences=2", "--set", "calibration.seqlen=32"]


def last_json(out):
    return json.loads(out.strip().splitlines()[-1])


def test_the_whole_walk(run, saved, text_file, tmp_path):
    folder, out = saved("llama"), tmp_path / "out"
    status, stdout, stderr = run("analyze", folder, "-o", tmp_path / "run", "--json", "--calib", text_file, *CALIB)
    assert status == 0 and last_json(stdout)["plan"]["policy"] == "budget"
    assert "observe" in stderr and "observe" not in stdout
    plan = tmp_path / "run" / "plan.json"
    status, stdout, _ = run("quantize", folder, "-r", "quarot", "--plan", plan, "-o", out, "--json")
    assert status == 0 and 0 < last_json(stdout)["a8_share"] <= 0.125
    status, stdout, _ = run("eval", out, "--text", text_file, "--chunks", 2, "--seqlen", 64, "--json")
    found = last_json(stdout)
    assert status == 0 and found["ppl"] > 0 and found["ppl_16bit"] > 0 and found["kl"] > 0
    status, stdout, _ = run("chat", out, "Hello", "--max-new-tokens", 3, "--json", "--quiet")
    assert status == 0 and last_json(stdout)["prompt"] == "Hello"


def test_eval_takes_recipes_and_short_options(run, saved, text_file):
    folder = saved("mistral")
    common = ["--text", text_file, "--chunks", 1, "--seqlen", 64, "--json"]
    _, stdout, _ = run("eval", folder, *common)
    plain = last_json(stdout)
    _, stdout, _ = run("eval", folder, *common, "--set", "transform.method=quarot")
    rotated = last_json(stdout)
    assert rotated["ppl"] == pytest.approx(plain["ppl"], rel=5e-3) and rotated["ppl_16bit"] == plain["ppl"]
    _, stdout, _ = run("eval", folder, *common, "--policy", "budget", "--a8-share", 0.5, *CALIB)
    assert 0.2 < last_json(stdout)["a8_share"] <= 0.5


def test_a_share_asks_for_the_budget_policy(run, saved, text_file, tmp_path):
    folder = saved("llama")
    common = ["--text", text_file, "--chunks", 1, "--seqlen", 64, "--json", *CALIB]
    _, stdout, _ = run("eval", folder, *common, "--a8-share", 0.5)
    assert 0.2 < last_json(stdout)["a8_share"] <= 0.5
    status, stdout, _ = run("eval", folder, *common, "--seed", 3)
    assert status == 0 and last_json(stdout)["kernels"] == {"cpu-int8": 21}
    refused(run("quantize", folder, "-o", tmp_path / "o", "--plan", "p.json", "--policy", "paper"), "--plan decides")


def test_recipes(run):
    status, stdout, _ = run("recipes", "--json")
    assert status == 0 and "quarot" in last_json(stdout)["presets"]
    status, stdout, _ = run("recipes", "quarot")
    assert status == 0 and "# " in stdout and "method: quarot" in stdout


def refused(result, *words):
    status, stdout, stderr = result
    assert status == 2, (status, stderr)
    message = stderr[stderr.index("error: ") :]
    assert "Traceback" not in stderr and stdout.strip() == ""
    for word in words:
        assert word in message, message
    return message


def test_bad_models(run, saved, tmp_path):
    refused(run("eval", tmp_path / "none"), "does not exist", "demo")
    refused(run("eval", "no-such-org/no-such-model"), "could not be found", "Hub id")
    (tmp_path / "empty").mkdir()
    refused(run("eval", tmp_path / "empty"), "config.json")
    (tmp_path / "x.bin").write_bytes(b"123")
    refused(run("eval", tmp_path / "x.bin"), "GGUF")
    (tmp_path / "x.gguf").write_bytes(b"GGUF123")
    refused(run("eval", tmp_path / "x.gguf"), "could not be loaded")
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path / "bert")
    refused(run("quantize", tmp_path / "bert", "-o", tmp_path / "out"), "'bert'", "LLaMA", "Qwen3")
    folder = saved("llama")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(run("eval", folder), "cut short")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, weights, metadata={"format": "pt"})
    refused(run("eval", folder), "lacks 1 weights", name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(run("quantize", folder, "-o", tmp_path / "out"), name, "NaN")
    assert not (tmp_path / "out").exists()


def test_bad_texts(run, saved, tmp_path):
    folder = saved("llama")
    refused(run("eval", folder, "--text", tmp_path / "none.txt"), "does not exist")
    (tmp_path / "empty.txt").write_text("")
    refused(run("eval", folder, "--text", tmp_path / "empty.txt"), "empty")
    (tmp_path / "short.txt").write_text("a few words")
    refused(run("eval", folder, "--text", tmp_path / "short.txt"), "11 tokens", "2048")
    refused(run("analyze", folder, "-o", tmp_path / "r", "--calib", tmp_path / "short.txt"), "11 tokens", "512")
    refused(run("eval", folder, "--chunks", "0"), "at least 1")
    assert not (tmp_path / "r").exists()


def test_bad_recipes_and_plans(run, saved, tmp_path):
    folder, out = saved("llama"), tmp_path / "out"
    refused(run("quantize", folder, "-o", out, "-r", "quartot"), "did you mean 'quarot'")
    refused(run("quantize", folder, "-o", out, "--set", "weights.bit=4"), "did you mean 'bits'")
    refused(run("quantize", folder, "-o", out, "--policy", "papper"), "did you mean 'paper'")
    refused(run("quantize", folder, "-o", out, "--set", "kv.group_size=7"), "kv.group_size 7")
    refused(
        run("quantize", folder, "-o", out, "--set", "weights.granularity=group", "--set", "weights.group_size=7"), "7"
    )
    refused(run("quantize", folder, "-o", out, "--device", "tpu9"), "unknown device")
    refused(run("quantize", folder, "-o", out, "--device", "meta"), "not supported")
    refused(run("quantize", "x" * 300, "-o", out), "too long")
    run("analyze", folder, "-o", tmp_path / "run", *CALIB)
    other = saved("qwen3")
    refused(run("quantize", other, "-o", out, "--plan", tmp_path / "run" / "plan.json"), "another model")
    refused(run("eval", other, "--plan", tmp_path / "none.json"), "cannot be read")
    assert not out.exists() and not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_bad_outputs(run, saved, tmp_path, monkeypatch):
    folder = saved("llama")
    (tmp_path / "file").write_text("x")
    refused(run("quantize", folder, "-o", tmp_path / "file"), "is a file")
    refused(run("quantize", folder, "-o", folder), "holds other files")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    refused(run("quantize", folder, "-o", tmp_path / "out"), "MiB free")
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoints(run, saved, text_file, tmp_path):
    out = tmp_path / "out"
    run("quantize", saved("llama"), "-o", out)
    options = ["--text", text_file, "--seqlen", 64, "--chunks", 1]
    path = out / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    refused(run("eval", out, *options), "cut short")
    refused(run("chat", out, "Hello"), "cut short")
    path.write_bytes(whole)
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"bits": 4', '"bits": 8', 1))
    refused(run("eval", out, *options), "config.json", "edited")
    (out / "config.json").write_text(config)
    (out / "plan.json").unlink()
    refused(run("eval", out, *options), "lacks 'plan.json'")
    refused(run("quantize", out, "-o", tmp_path / "again"), "lacks 'plan.json'")


def test_a_disk_that_fills_up_leaves_nothing(saved, tmp_path):
    """For real: the process may not write files of more than 40 kB."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000));"
        "from phasequant.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "quantize", str(saved("llama")), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model-llama"]


def test_interrupt_leaves_nothing(saved, tmp_path):
    command = [sys.executable, "-m", "phasequant.cli", "analyze", str(saved("llama")), "-o", str(tmp_path / "out")]
    command += ["--set", "calibration.sequences=400", "--set", "calibration.seqlen=512"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    assert process.stderr is not None
    begun = next(line for line in process.stderr if "observe" in line)  # imports done, well inside the sweep
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, begun + stderr
    assert "Traceback" not in stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model-llama"]


def test_bench_times_every_group_at_every_width(run, saved):
    folder = saved("llama")
    status, stdout, stderr = run("bench", "groups", folder, "--tokens", 8, "--bits", "4,8,16", "--json")
    found = last_json(stdout)
    assert status == 0 and len(found["linears"]) == 12 and "a block's linears at 4 bits" in stderr
    assert all(row["microseconds"] > 0 and row["kernel"] for row in found["linears"])
    for bits, message in (("4,nine", "'nine' is not a whole number"), ("1", "2 to 8 bits"), ("", "not none")):
        status, _, stderr = run("bench", "groups", folder, "--bits", bits)
        assert status == 2 and message in stderr


def test_allow_lets_weights_and_kv_share_the_budget(run, saved, text_file, tmp_path):
    folder = saved("llama")
    common = ["--a8-share", "0.5", "--calib", text_file, *CALIB, "--set", "policy.tokens=64", "--json"]
    status, stdout, _ = run("quantize", folder, "-o", tmp_path / "a", "--allow", "weights=4,8 kv=4,8", *common)
    found = last_json(stdout)
    assert status == 0 and found["weights_raised"] and "more bits for weights of" in stdout
    for word, message in (("heads=8", "weights"), ("weights=eight", "not a whole number")):
        status, _, stderr = run("quantize", folder, "-o", tmp_path / "b", "--allow", word, *common)
        assert status == 2 and message in stderr
