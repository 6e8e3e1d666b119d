"""Models that are read, quantized and written block by block: the same files as from memory, never all in it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import where
from safetensors.torch import load_file, save_file

import phasequant
from phasequant import PhaseQuantError, streaming
from phasequant.source import open_streamed
from phasequant.streaming.opening import NotStreamable

FEW = ["calibration.sequences=2", "calibration.seqlen=48", "weights.sequences=2", "weights.seqlen=48",
       "learning.sequences=2", "learning.seqlen=48", "learning.epochs=1", "learning.batch=1"]  # fmt: skip
TELLS_TIMES = ("manifest.json",)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same(whole: Path, streamed: Path) -> None:
    """Every tensor bit for bit, and every other file byte for byte."""
    one, other = tensors(whole), tensors(streamed)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
    for path in whole.iterdir():
        if path.suffix != ".safetensors" and path.name not in TELLS_TIMES:
            assert path.read_bytes() == (streamed / path.name).read_bytes(), path.name


def both(model: Path, recipe: str, overrides: list[str]) -> tuple[Path, Path]:
    targets = [model.parent / f"{model.name}-{word}" for word in ("whole", "streamed")]
    for target, stream in zip(targets, (False, True), strict=True):
        phasequant.quantize(model, recipe, overrides=overrides, output=target, stream=stream, device="cpu")
    return targets[0], targets[1]


@pytest.mark.parametrize(
    "family",
    ["llama", "llama-bias", "llama-odd", "qwen2", "qwen3", "gemma", "gemma2", "stablelm", "phi", "opt", "phi3"],
)
def test_streamed_is_what_memory_gives(saved, family):
    whole, streamed = both(saved(family, dtype=torch.bfloat16), "quarot", where(family))
    assert_same(whole, streamed)
    assert len(list(streamed.glob("model-*.safetensors"))) > 2
    phasequant.load(streamed, device="cpu")


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("quarot-gptq", []),
        ("quarot", ["policy.name=budget", "policy.score=noise", "policy.a8_share=0.2"]),
        ("quarot", ["policy.name=paper", "weights.bits=16"]),
        ("static-w8a8", []),
        ("smooth", []),
        ("flat", []),
        ("16bit", []),
        ("qfep-w8a8", []),
        ("quarot-gptq", ["prefix.method=prefixquant", "prefix.eta=2"]),
        ("flat", ["prefix.method=bos", "policy.name=budget", "policy.score=noise", "policy.a8_share=0.2"]),
    ],
)
def test_what_looks_at_data_streams_too(saved, recipe, overrides, text_file, monkeypatch, tmp_path):
    monkeypatch.setenv("PHASEQUANT_CACHE", str(tmp_path / "cache"))
    assert_same(*both(saved("llama"), recipe, [*overrides, *FEW, f"calibration.text={text_file}"]))


def test_blocks_are_gone_when_they_are_done(saved):
    source = open_streamed(saved("llama"), "cpu")
    assert all(p.is_meta for p in source.model.get_submodule("model.layers").parameters())
    made = phasequant.quantize(saved("qwen2"), "quarot", output=source.name + "-out", stream=True, device="cpu")
    assert all(p.is_meta for p in made.model.get_submodule("model.layers").parameters())
    assert streaming.is_lazy(made.model) and made.model.lm_head.weight.is_meta


def test_chosen_where_it_does_not_fit(saved, tmp_path, run, monkeypatch):
    monkeypatch.setattr("phasequant.streaming.choice.available", lambda: 1000)
    model = saved("llama")
    status, _, err = run("quantize", model, "-o", tmp_path / "out", "--device", "cpu")
    assert status == 0 and "it is streamed, block by block" in err
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 5
    status, _, err = run("quantize", model, "-o", tmp_path / "in-memory", "--device", "cpu", "--no-stream")
    assert status == 0 and (tmp_path / "in-memory" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-r", "spin"], "end to end"),
        (["--set", "finetune.steps=1"], "finetune"),
        (["--policy", "budget", "--set", "policy.score=gradient"], "runs the whole model"),
    ],
)
def test_what_cannot_stream_says_why(saved, tmp_path, run, options, words):
    status, _, err = run("quantize", saved("llama"), "-o", tmp_path / "out", "--stream", *options)
    assert status == 2 and words in err and "cannot be streamed" in err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_gguf_cannot_stream(tmp_path, run):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    status, _, err = run("quantize", tmp_path / "m.gguf", "-o", tmp_path / "out", "--stream")
    assert status == 2 and "safetensors" in err


def sharded(model: Path) -> dict[str, str]:
    """Split a model in two shards; the index's map."""
    found = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    placed = {}
    for number, part in enumerate((sorted(found)[:5], sorted(found)[5:])):
        file = f"model-{number}.safetensors"
        save_file({name: found[name] for name in part}, model / file, {"format": "pt"})
        placed |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return placed


def test_shards(saved):
    model = saved("llama-bias")
    copy = Path(shutil.copytree(model, model.parent / "again"))
    sharded(model)
    whole, streamed = both(copy, "quarot", [])[0], both(model, "quarot", [])[1]
    (whole / "README.md").unlink()  # it names the directory
    assert_same(whole, streamed)


def test_an_index_may_not_leave_its_directory(saved, tmp_path):
    model = saved("llama-bias")
    placed = sharded(model)
    shutil.copy(model / "model-0.safetensors", tmp_path / "outside.safetensors")
    for name, file in placed.items():
        placed[name] = "../outside.safetensors" if file == "model-0.safetensors" else file
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(PhaseQuantError, match="not in its directory"):
        open_streamed(model, "cpu")


def test_shapes_are_checked_before_anything_is_read(saved):
    model = saved("llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(PhaseQuantError, match="its config says"):
        open_streamed(model, "cpu")
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(NotStreamable, match="do not hold"):
        open_streamed(model, "cpu")


def test_nan_is_found(saved, tmp_path):
    model = saved("llama")
    found = load_file(model / "model.safetensors")
    found["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(found, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(PhaseQuantError, match="holds 1 values that are NaN"):
        phasequant.quantize(model, "quarot", output=tmp_path / "out", stream=True, device="cpu")


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_dry_run_tells_what_will_be(saved, tmp_path, run, stream):
    model, out = saved("qwen2-sliding", dtype=torch.bfloat16), tmp_path / "out"
    status, printed, _ = run("quantize", model, "-o", out, "--dry-run", "--json", "--device", "cpu", stream)
    assert status == 0 and not out.exists() and not list(tmp_path.glob(".out*"))
    told = json.loads(printed.splitlines()[-1])
    assert told["streamed"] == (stream == "--stream") and (told["blocks"], told["blocks_tried"]) == (3, 2)
    assert run("quantize", model, "-o", out, "--device", "cpu", stream)[0] == 0
    real = sum(path.stat().st_size for path in out.rglob("*"))
    assert abs(told["output_bytes"] / real - 1) < 0.2
    assert told["peak_bytes"] > 2**27 and told["seconds"] > 0
