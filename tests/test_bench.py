"""`phasequant bench`: every kind runs on a CPU or says why not, and its table names what ran."""

import json

import pytest
import torch
from test_cli import last_json

from phasequant.arch import ModelMap
from phasequant.bench.random_model import paper_blocks, random_model
from phasequant.bench.shapes import SHAPES, shape_of
from phasequant.bench.timing import COLD, copies_for, time_calls
from phasequant.errors import PhaseQuantError
from phasequant.nn import quant_linears

CPU = torch.device("cpu")


def small():
    config = shape_of("smollm2-135m", 2)
    config.hidden_size, config.intermediate_size, config.vocab_size = 96, 128, 64
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 3, 1, 32
    return config


def test_shapes_are_those_of_the_models():
    for name in SHAPES:
        shape = ModelMap.from_config(shape_of(name)).shape
        assert shape.d_model % shape.heads == 0 and shape.heads % shape.kv_heads == 0
    eight = ModelMap.from_config(shape_of("llama-3-8b"))
    assert (eight.width_out("qkv"), eight.width_out("gate_up"), eight.shape.blocks) == (6144, 28672, 32)
    assert shape_of("qwen3-8b", 3).num_hidden_layers == 3
    with pytest.raises(PhaseQuantError, match="llama-3-8b"):
        shape_of("llama-3-8B")


@pytest.mark.parametrize("style,eight", [("16-bit", "none"), ("quarot", "paper"), ("flat", "all")])
def test_random_models_run(style, eight):
    model = random_model(small(), CPU, style, eight=eight, dtype=torch.float32)
    logits = model(torch.randint(0, 64, (2, 9))).logits
    assert logits.shape == (2, 9, 64) and torch.isfinite(logits).all() and logits.std() > 0
    bits = {linear.input_spec.bits for _, linear in quant_linears(model)}
    assert bits == {"none": set(), "paper": {8}, "all": {8}}[eight]  # two blocks: both are in the paper's set
    assert paper_blocks(ModelMap.from_config(shape_of("llama-3-8b"))) == {0, 1, 2, 31}


def test_sides_take_turns():
    seen = []
    sides = {name: [lambda name=name, i=i: seen.append((name, i)) for i in range(2)] for name in "ab"}
    found = time_calls(sides, CPU, repeats=3)
    assert set(found) == {"a", "b"} and all(value > 0 for value in found.values())
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] * 2
    assert copies_for(COLD) == 2 and copies_for(1) == 32


def test_on_the_command_line(run, tmp_path):
    status, stdout, _ = run("bench", "linear", "smollm2-135m", "--rows", "1,4", "--json", "-o", tmp_path / "it.json")
    found = last_json(stdout)
    assert status == 0 and len(found["linears"]) == 8 and found == json.loads((tmp_path / "it.json").read_text())
    row = found["linears"][0]
    assert row["ratio"]["bf16"] == 1 and any(side.startswith("W4A4 ") for side in row["microseconds"])
    assert row["roofline"] > 0 and "qkv 576→960" in stdout
    for kind in ("attention", "entrance"):
        status, _, stderr = run("bench", kind, "smollm2-135m")
        assert status == 2 and "no CUDA device" in stderr
    status, _, stderr = run("bench", "linear", "smollm2", "--rows", "1")
    assert status == 2 and "smollm2-135m" in stderr


def test_whole_models(run):
    status, stdout, _ = run("bench", "decode", "smollm2-135m", "--blocks", "1", "--batches", "2", "--context", "8",
                            "--new", "2", "--json")  # fmt: skip
    rows = last_json(stdout)["rows"]
    assert status == 0 and [row["row"] for row in rows][:2] == ["16-bit", "W4A4KV4"]
    assert rows[0]["ratio"]["token_seconds"] == 1 and all(row["decode_tokens_per_second"] > 0 for row in rows)
    assert rows[1]["cache_bytes"] < rows[0]["cache_bytes"] / 3 and rows[1]["runs"]["linears"]["qkv"]["kernel"]


def test_quantizing(run):
    status, stdout, _ = run("bench", "quantize", "smollm2-135m", "-r", "quarot", "--set", "calibration.sequences=2",
                            "--set", "calibration.seqlen=32", "--json")  # fmt: skip
    found = last_json(stdout)
    assert status == 0 and found["blocks"] == 1 and found["weights_seconds"] > 0
