"""Two processes find what one finds, within the order of sums; the first speaks and writes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks_worker import everything

from phasequant import ranks
from phasequant.ranks import Dealt, World, part_of

WORKER = Path(__file__).with_name("ranks_worker.py")


def torchrun(*arguments, cache: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **({"PHASEQUANT_CACHE": str(cache)} if cache else {}),
    }
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


def differences(one, two, place=""):
    """Where two results differ by more than sums in another order do."""
    if isinstance(one, dict):
        assert set(one) == set(two), place
        for key in one:
            yield from differences(one[key], two[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), place
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            yield from differences(a, b, f"{place}/{index}")
    elif isinstance(one, float) and isinstance(two, float):
        if not math.isclose(one, two, rel_tol=1e-3, abs_tol=1e-5):
            yield place, one, two
    elif one != two and not place.endswith("seconds"):
        yield place, one, two


@pytest.fixture
def alone():
    yield
    ranks._world = World()


def test_two_processes_find_what_one_finds(saved, text_file, tmp_path, monkeypatch):
    folder = saved("llama")
    ran = torchrun(WORKER, folder, text_file, tmp_path / "found", cache=tmp_path / "cache")
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"found.{rank}").read_text()) for rank in (0, 1))
    assert first == second  # whatever is decided, both decide
    monkeypatch.setenv("PHASEQUANT_CACHE", str(tmp_path / "another"))
    one = json.loads(json.dumps(everything(str(folder), str(text_file))))
    exact = [key for key in one if key.startswith(("rtn", "flat", "static"))]
    assert len(exact) >= 8
    found = list(differences(one, first))
    chaotic = ("quarot-gptq", "finetune", "spin")  # a last bit of a Hessian or gradient moves codes
    assert [entry for entry in found if not any(word in entry[0] for word in chaotic)] == []
    for key in one:
        if key.endswith("scores"):
            for ours, theirs in zip(one[key], first[key], strict=True):
                assert sum(ours) / len(ours) == pytest.approx(sum(theirs) / len(theirs), rel=0.02, abs=1e-3), key


def test_one_command_on_two_processes(saved, text_file, tmp_path):
    folder, out = saved("llama"), tmp_path / "out"
    options = ["--calib", text_file, "--set", "calibration.sequences=4", "--set", "calibration.seqlen=24"]
    ran = torchrun("-m", "phasequant", "quantize", folder, "-o", out, "--policy", "budget", "--json", *options)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert len([line for line in ran.stdout.splitlines() if line.startswith("{")]) == 1
    assert (out / "model.safetensors").is_file() and not list(tmp_path.glob(".out*"))
    told = torchrun("-m", "phasequant", "eval", out, "--text", text_file, "--seqlen", "24", "--chunks", "5", "--json")
    assert told.returncode == 0, told.stderr[-3000:]
    command = [sys.executable, "-m", "phasequant", "eval", str(out), "--text", str(text_file), "--seqlen", "24"]
    alone = subprocess.run([*command, "--chunks", "5", "--json"], capture_output=True, text=True, check=True)
    two, one = (json.loads(ran.stdout.splitlines()[-1]) for ran in (told, alone))
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-6) and two["chunks"] == 5
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-5)


def test_other_commands_and_errors_speak_once(saved, tmp_path):
    refused = torchrun("-m", "phasequant", "chat", saved("llama"), "hello")
    assert refused.returncode != 0 and "only quantize, analyze, eval share their work" in refused.stderr
    wrong = torchrun("-m", "phasequant", "quantize", tmp_path / "nothing", "-o", tmp_path / "out")
    assert wrong.returncode != 0 and wrong.stderr.count("error: ") == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_what_is_dealt_comes_together(size, alone, monkeypatch):
    parts, dealt = [], []
    for rank in range(size):
        ranks._world = World(rank, size)
        parts += list(part_of(10))
        dealt += list(Dealt.of(10).mine)
        assert Dealt.of(10).below(4) == len([i for i in Dealt.of(10).mine if i < 4])
        assert list(Dealt.of(size - 1).mine) == list(range(size - 1)), "fewer than ranks: everyone has all"
    assert parts == list(range(10))
    assert sorted(dealt) == list(range(10))
    monkeypatch.setattr(ranks, "everyones", lambda _: [list(range(10))[r::size] for r in range(size)])
    assert Dealt(10, 0, size).ordered(list(range(0, 10, size))) == list(range(10))
