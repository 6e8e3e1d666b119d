"""Damaged checkpoints and recipes by the thousand, each in a process of its own: python benchmarks/fuzz.py --cases 1000

A case is a number: it chooses the base checkpoint, the mutation (tests/mutations.py) and what becomes of the manifest.
The child that opens it by five doors (phasequant.load, Transformers, doctor, the recipe, the tokenizer) may take
`--seconds`, and 3 GiB of address space more than it began with. Allowed: the very logits of the original, a
`PhaseQuantError`, and by the doors of Transformers an exception of its own. Never: a signal, a hang, an absurd
allocation, other logits. Prints counts by outcome; writes every case that may not be to `--findings`; status 1 then.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import conftest
import mutations
import torch

import phasequant
from phasequant import pipeline
from phasequant.checkpoint import manifest
from phasequant.recipe import Recipe
from phasequant.source import wrap

SMALL = ["calibration.sequences=2", "calibration.seqlen=32"]
ROOM = 3 * 2**30
WRONG = ("OTHER", "RAISED", "PANIC", "MEMORY", "CRASH", "HANG", "LARGE")


def bases(root: Path) -> list[Path]:
    """Five checkpoints: symmetric, another plan of it, another seed, groups with zero points, and in shards."""
    made = []
    for name, family, seed, sets in (
        ("plain", "llama", 0, ["policy.name=paper"]),
        ("plan", "llama", 0, ["policy.name=uniform"]),
        ("seed", "llama", 3, ["policy.name=paper"]),
        ("zeros", "qwen2", 0, ["weights.symmetric=false", "weights.granularity=group", "weights.group_size=12"]),
    ):
        source = wrap(name, conftest.make_model(family, seed=seed), conftest.make_tokenizer())
        pipeline.run(source, Recipe.load("quarot", [*SMALL, *sets])).save(root / name)
        made.append(root / name)
    sharded = root / "shards"
    phasequant.load(made[0]).save_pretrained(sharded, max_shard_size="40KB")
    for path in made[0].iterdir():
        if not path.name.startswith(("model", "config")) and path.name != manifest.NAME:
            (sharded / path.name).write_bytes(path.read_bytes())
    content = manifest.read(made[0])
    manifest.write(sharded, {key: value for key, value in content.items() if key not in ("files", "format")})
    return [*made, sharded]


def child(folder: Path, wanted: torch.Tensor, pipe: int, room: int, seconds: int) -> None:
    """Open by every door; one line of JSON each."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for door in mutations.DOORS:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found, text = mutations.outcome(door, folder, wanted)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(pipe, (json.dumps([door, found, text[:300], round(grown)]) + "\n").encode())


def one(folder: Path, wanted: torch.Tensor, seconds: int) -> list[list[object]]:
    """The doors' outcomes, of a child."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            child(folder, wanted, write, ROOM, seconds)
        finally:
            os._exit(0)
    os.close(write)
    deadline, status = time.monotonic() + 2 * seconds, None
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = code if done else time.sleep(0.01)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with os.fdopen(read) as file:
        lines = [json.loads(line) for line in file.read().splitlines()]
    missing = [door for door in mutations.DOORS if door not in [line[0] for line in lines]]
    if missing:
        signalled = status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status)
        hung = status is None or signalled in (signal.SIGXCPU, signal.SIGKILL)
        lines.append([missing[0], "HANG" if hung else "CRASH", f"status {status}", 0])
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=20, help="of a child's processor time")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many")
    parser.add_argument("--findings", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, counts, wrong, done = time.monotonic(), Counter(), [], 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = bases(root)
        wanted = {path: mutations.DOORS["load"](path) for path in made}
        built = time.monotonic() - start
        for case in range(options.first, options.first + options.cases):
            folder, base = root / f"case-{case}", made[(case * 7 + case // 19) % len(made)]
            kind, said, signed = mutations.mutate(case, base, made, folder)
            for door, found, text, grown in one(folder, wanted[base], options.seconds):
                found = mutations.judged(found, said, signed)
                if grown > 1024:
                    found = "LARGE"
                counts[door, found] += 1
                if found in WRONG:
                    row = {"case": case, "base": base.name, "mutation": kind, "did": said, "manifest": signed,
                           "door": door, "outcome": found, "text": text, "MiB": grown}  # fmt: skip
                    wrong.append(row)
                    print(json.dumps(row, ensure_ascii=False), flush=True)
            with contextlib.suppress(OSError):
                mutations.shutil.rmtree(folder)
            done += 1
            if time.monotonic() - start > options.minutes * 60:
                break
    for (door, found), count in sorted(counts.items()):
        print(f"{door:13} {found:8} {count}")
    took = time.monotonic() - start
    print(f"{done} cases, {len(wrong)} that may not be; {took:.0f} s ({built:.0f} s for the originals)")
    if options.findings is not None:
        options.findings.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
