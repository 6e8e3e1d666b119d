"""Damaged checkpoints: the very logits of the original, or an error that says so; `benchmarks/fuzz.py` does thousands.

Cases whose files are pipes or huge by config run there, in a process of their own; here what is safe in this one.
"""

import json
import os
import shutil
import warnings

import conftest
import mutations
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import phasequant
from phasequant import pipeline
from phasequant.checkpoint import manifest
from phasequant.errors import PhaseQuantError
from phasequant.recipe import Recipe
from phasequant.source import wrap

SMALL = ["calibration.sequences=2", "calibration.seqlen=32"]
WRONG = {"OTHER", "RAISED", "PANIC", "MEMORY"}


def _made(folder, seed, *sets):
    source = wrap("m", conftest.make_model("llama", seed=seed), conftest.make_tokenizer())
    pipeline.run(source, Recipe.load("quarot", [*SMALL, *sets])).save(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return [
        _made(root / "plain", 0, "policy.name=paper"),
        _made(root / "plan", 0),
        _made(root / "zeros", 3, "weights.symmetric=false", "weights.granularity=group", "weights.group_size=12"),
    ]


@pytest.fixture(scope="module")
def wanted(bases):
    return {path: mutations.DOORS["load"](path) for path in bases}


@pytest.fixture
def folder(bases, tmp_path):
    return shutil.copytree(bases[0], tmp_path / "copy")


@pytest.mark.parametrize("seed", range(5000, 5000 + 3 * len(mutations.MUTATIONS)))
def test_damage_is_harmless_or_refused(seed, bases, wanted, tmp_path):
    base = bases[seed // len(mutations.MUTATIONS) % len(bases)]
    kind, said, signed = mutations.mutate(seed, base, bases, tmp_path / "copy")
    if "pipe" in said or "/dev/zero" in said:
        pytest.skip("in a process of its own: benchmarks/fuzz.py")
    for door in mutations.DOORS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, text = mutations.outcome(door, tmp_path / "copy", wanted[base])
        assert mutations.judged(found, said, signed) not in WRONG, (kind, said, signed, door, text)


def _edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _both_refuse(folder, match):
    mutations.sign(folder)
    for load in (phasequant.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(PhaseQuantError, match=match):
            load(folder)


@pytest.mark.parametrize(
    ("ending", "value", "match"),
    [
        ("q_proj.weight_scale", float("nan"), "NaN or infinite"),
        ("q_proj.weight_scale", float("inf"), "NaN or infinite"),
        ("q_proj.weight_scale", 0.0, "not positive"),
        ("q_proj.weight_scale", -1.0, "not positive"),
        ("down_proj.online.left", float("nan"), "NaN or infinite"),
        ("norm.weight", float("inf"), "NaN or infinite"),
        ("embed_tokens.weight", float("nan"), "NaN or infinite"),
    ],
)
def test_numbers_that_cannot_be(ending, value, match, folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith(ending))
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
    _both_refuse(folder, match)


def test_zero_points_outside_their_grid(bases, tmp_path):
    folder = shutil.copytree(bases[2], tmp_path / "copy")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    next(t for n, t in tensors.items() if n.endswith("weight_zero"))[0, 0] = 16
    save_file(tensors, path, {"format": "pt"})
    _both_refuse(folder, "zero points")


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_scales_of_floating_point_grids(kind, tmp_path):
    source = wrap("m", conftest.make_model("llama-fp4"), conftest.make_tokenizer())
    folder = pipeline.run(source, Recipe.load(kind, [*SMALL, "weights.clip=none"])).save(tmp_path / "made")
    assert phasequant.load(folder) is not None
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("weight_scale"))
    tensors[name][0, 0] = 0x7F if kind == "nvfp4" else 255  # NaN of E4M3; 2^128
    save_file(tensors, path, {"format": "pt"})
    _both_refuse(folder, "not positive")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(rms_norm_eps=1e-2),
        lambda c: c["rope_parameters"].update(rope_theta=5.0),
        lambda c: c.update(hidden_act="gelu"),
        lambda c: c.update(num_attention_heads=2, num_key_value_heads=1, head_dim=24),
        lambda c: c.update(tie_word_embeddings=True),
    ],
)
def test_another_architecture_of_the_same_shapes(change, folder):
    """The manifest may fit, or be away: the seal knows."""
    _edit(folder / "config.json", change)
    _both_refuse(folder, "architecture's hash|could not be loaded|does not fit|has shape|map of width|divide")
    (folder / manifest.NAME).unlink()
    with pytest.raises(PhaseQuantError):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_no_logit_turns_on_may_be_edited(folder, bases, wanted):
    _edit(folder / "config.json", lambda c: c.update(eos_token_id=[3, 4], transformers_version="9.9"))
    mutations.sign(folder)
    assert torch.equal(mutations.DOORS["load"](folder), wanted[bases[0]])


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_more_blocks_than_the_files_can_hold_are_not_built(key, folder):
    _edit(folder / "config.json", lambda c: c.update({key: 10**9}))
    _both_refuse(folder, "edited")
    with pytest.raises(PhaseQuantError, match="edited"):
        phasequant.doctor(folder, gpu="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_pipe_is_not_waited_for(name, folder):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for load in (phasequant.load, phasequant.doctor, AutoModelForCausalLM.from_pretrained):
        if (name, load) != ("manifest.json", AutoModelForCausalLM.from_pretrained):  # no manifest: not compared
            with pytest.raises((PhaseQuantError, OSError, ValueError)):
                found = load(folder)
                assert found["as_promised"] is False or name == "manifest.json"
                raise PhaseQuantError("told in the report")


def test_a_file_may_not_ask_for_more_than_it_has(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    _both_refuse(folder, "cut short|cannot be read|could not be loaded")


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_may_not_leave_the_directory(absolute, folder, bases):
    """Not even for a checkpoint that would fit."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    shutil.copytree(bases[0], folder.parent / "other")
    target = str(folder.parent / "other" / "model.safetensors") if absolute else "../other/model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / manifest.NAME).unlink()
    with pytest.raises(PhaseQuantError, match="other places"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_manifest_may_not_name_other_places(folder):
    _edit(folder / "manifest.json", lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}))
    with pytest.raises(PhaseQuantError, match="not a manifest"):
        phasequant.load(folder)


def test_a_tensor_in_two_shards(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    shutil.move(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    names = list(load_file(folder / "model-00001-of-00002.safetensors"))
    half = len(names) // 2
    files = [f"model-0000{1 + (i >= half)}-of-00002.safetensors" for i in range(len(names))]
    index = {"metadata": {}, "weight_map": dict(zip(names, files, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / manifest.NAME).unlink()
    with pytest.raises(PhaseQuantError, match="more than one file"):
        AutoModelForCausalLM.from_pretrained(folder)
