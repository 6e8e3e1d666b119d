"""A run that is killed again and again ends in the very files of a run that is left alone.

    python benchmarks/kill.py [--model demo] [--kills 20] [--seed 0] [-o kill.json] [-- further options of quantize]

First the command runs to its end, uninterrupted, in a cache of its own. Then, in another one, it is started and killed
(SIGKILL) after a random time, again and again; whenever it comes to its end its files are compared with the first
run's, and it begins anew from nothing, until so many kills were made. Kills fall anywhere: while Python starts, while
a block is learned or quantized, while files are written. What is compared: the SHA-256 of every file of the checkpoint
but the manifest and the card, which tell times.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from phasequant.demo_model import MEMBER, demo_gguf

OPTIONS = [
    "-r", "flat-quick", "--set", "weights.method=gptq", "--set", "weights.sequences=4", "--set", "weights.seqlen=256",
    "--set", "learning.sequences=4", "--set", "learning.seqlen=256",
]  # fmt: skip


def start(model: str, options: list[str], output: Path, cache: Path) -> subprocess.Popen[bytes]:
    """The command, its notes into a file."""
    command = [sys.executable, "-m", "phasequant.cli", "quantize", model, "-o", str(output), *options]
    with (cache / "log").open("ab") as log:
        return subprocess.Popen(command, env={**os.environ, "PHASEQUANT_CACHE": str(cache)}, stdout=log, stderr=log)


def fresh(folder: Path, name: str) -> Path:
    """An empty cache that holds the demo model."""
    cache = folder / name
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    (cache / MEMBER).symlink_to(demo_gguf())
    return cache


def hashes(output: Path) -> dict[str, str]:
    """File → SHA-256."""
    files = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def main() -> int:
    """Run, kill, compare; 1 where a file differs or something is left behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("options", nargs="*", help="of quantize, behind --")
    given = parser.parse_args()
    options = given.options or OPTIONS
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        cache = fresh(folder, "alone")
        status = start(given.model, options, folder / "whole", cache).wait()
        if status:
            print((cache / "log").read_text(errors="replace")[-2000:], file=sys.stderr)
            return 1
        alone = time.monotonic() - began
        wanted = hashes(folder / "whole")
        print(f"uninterrupted: {alone:.0f} s, {len(wanted)} files", flush=True)
        kills, ends, same = [], 0, True
        cache, out = fresh(folder, "killed"), folder / "out" / "it"
        while True:
            process = start(given.model, options, out, cache)
            after = draw.uniform(0, alone * 0.6) if len(kills) < given.kills else None
            try:
                status = process.wait(after)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills.append(round(after or 0, 2))
                print(f"kill {len(kills)} after {after:.1f} s", flush=True)
                continue
            if status:
                print((cache / "log").read_text(errors="replace")[-2000:], file=sys.stderr)
                return 1
            ends += 1
            found = hashes(out)
            different = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
            left = sorted(path.name for path in out.parent.iterdir() if path != out)
            same = same and not different and not left
            print(f"end {ends}: {len(found)} files, different: {different}, left behind: {left}", flush=True)
            if len(kills) == given.kills:
                break
            shutil.rmtree(out.parent)
            cache = fresh(folder, "killed")
        told = {"seconds_alone": round(alone, 1), "kills": kills, "ends": ends, "same": same, "files": wanted}
        if given.output is not None:
            given.output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({key: value for key, value in told.items() if key != "files"}))
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
