"""A run that is stopped goes on behind its finished blocks and ends in the very same files."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_streaming import FEW, assert_same

import phasequant
from phasequant import PhaseQuantError, artifact
from phasequant.weight import walk
from phasequant.weight.kept import KeptCodes

RECIPES = {
    "gptq": ("quarot-gptq", []),
    "branch": ("quarot-gptq", ["lowrank.method=svd", "lowrank.rank=4", "lowrank.input=rounded"]),
    "groups": ("quarot-gptq", ["weights.target=weights", "weights.granularity=group", "weights.group_size=16"]),
    "nvfp4": ("nvfp4", ["weights.method=gptq"]),
}


class Stopped(KeyboardInterrupt):
    """Ctrl-C, at a place of our choice."""


def stop_after(monkeypatch, blocks: int) -> None:
    """Let a run finish so many blocks and no more."""
    write, done = KeptCodes.write, []

    def counted(self, *args):
        if len(done) == blocks:
            raise Stopped
        done.append(write(self, *args))

    monkeypatch.setattr(KeptCodes, "write", counted)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_goes_on_behind_the_finished_blocks(saved, text_file, monkeypatch, tmp_path, name, stream):
    recipe, overrides = RECIPES[name]
    model = saved("llama-fp4" if name == "nvfp4" else "llama")
    options = {"overrides": [*overrides, *FEW, f"calibration.text={text_file}"], "stream": stream, "device": "cpu"}
    phasequant.quantize(model, recipe, output=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            phasequant.quantize(model, recipe, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".out.work").glob("block-*.json"))) == 2
    quantized, group = [], walk.quantize_group
    monkeypatch.setattr(walk, "quantize_group", lambda task, block, index, *rest: quantized.append(index) or group(
        task, block, index, *rest
    ))  # fmt: skip
    phasequant.quantize(model, recipe, output=tmp_path / "out", **options)
    assert set(quantized) == {2}
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("change", ["recipe", "weights", "damage"])
def test_what_does_not_fit_is_made_anew(saved, monkeypatch, tmp_path, change):
    model = saved("llama")
    options = {"overrides": [], "stream": True, "device": "cpu"}
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            phasequant.quantize(model, "quarot", output=tmp_path / "out", **options)
    if change == "recipe":
        options["overrides"] = ["seed=3"]
    elif change == "weights":
        file = model / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(data)
    else:
        file = tmp_path / ".out.work" / "block-00000.safetensors"
        data = bytearray(file.read_bytes())
        data[-20] ^= 1
        file.write_bytes(data)
    phasequant.quantize(model, "quarot", output=tmp_path / "out", **options)
    phasequant.quantize(model, "quarot", output=tmp_path / "whole", **options)
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_two_runs_on_one_output(saved, tmp_path, run):
    model = saved("llama")
    (tmp_path / ".out.work").mkdir()
    with (tmp_path / ".out.work" / "lock").open("w") as other:
        other.write("4711")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        status, _, err = run("quantize", model, "-o", tmp_path / "out", "--device", "cpu")
        assert status == 2 and "another run (process 4711)" in err
    status, _, _ = run("quantize", model, "-o", tmp_path / "out", "--device", "cpu")  # a lock of the dead is none
    assert status == 0 and not (tmp_path / ".out.work").exists()


def test_a_full_disk_costs_one_block(saved, monkeypatch, tmp_path, run):
    model = saved("llama")
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 7:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(artifact.os, "fsync", full)
    status, _, err = run("quantize", model, "-o", tmp_path / "out", "--stream", "--device", "cpu")
    assert status == 2 and "is full" in err and "run the same command again" in err
    assert len(list((tmp_path / ".out.work").glob("*.json"))) == 1
    assert not list((tmp_path / ".out.work").glob("*.part"))
    monkeypatch.setattr(artifact.os, "fsync", real)
    assert run("quantize", model, "-o", tmp_path / "out", "--stream", "--device", "cpu")[0] == 0
    phasequant.load(tmp_path / "out", device="cpu")


def test_a_vanished_input(saved, monkeypatch, tmp_path):
    model = saved("llama")
    write = KeptCodes.write

    def lose(self, *args):
        write(self, *args)
        (model / "model.safetensors").rename(model / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(KeptCodes, "write", lose)
        with pytest.raises(PhaseQuantError, match=r"is gone.*run the same command again"):
            phasequant.quantize(model, "quarot", output=tmp_path / "out", stream=True, device="cpu")
    (model / "elsewhere").rename(model / "model.safetensors")
    made = phasequant.quantize(model, "quarot", output=tmp_path / "out", stream=True, device="cpu")
    assert made.blocks is not None and len(made.blocks) == 3


def test_killed(saved, text_file, tmp_path):
    """SIGKILL once there is a finished block."""
    model = saved("llama", dtype=torch.bfloat16)
    sets = [word for item in [*FEW, f"calibration.text={text_file}"] for word in ("--set", item)]
    out, work = tmp_path / "out", tmp_path / ".out.work"
    command = [sys.executable, "-m", "phasequant.cli", "quantize", str(model), "-o", str(out), "-r", "quarot-gptq",
               "--device", "cpu", "-q", *sets]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(work.glob("*.json")):
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
    stale = tmp_path / ".out.partial-abcd"
    stale.mkdir()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert not stale.exists() and not work.exists()
    subprocess.run([str(tmp_path / "whole") if word == str(out) else word for word in command], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    assert_same(tmp_path / "whole", Path(out))
