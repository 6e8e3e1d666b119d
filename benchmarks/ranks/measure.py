"""One process against several: the same plan, the same perplexity within 0.1 %, and how much sooner.

    python benchmarks/ranks/measure.py MODEL --calib FILE [--text FILE --chunks 8] [--nproc 2] [-o OUT] -- -r flat …

What follows `--` goes to `phasequant quantize`. Each run has an empty cache, so that nothing learned is taken up; CPU
processes have one thread each (OMP_NUM_THREADS=1), the single one too. `seconds` are wall-clock, whole commands, with
what starting Python and opening the model takes; `steps` are what the manifest tells of learning and of the weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def command(processes: int) -> list[str]:
    """What starts `python -m phasequant` in so many processes."""
    if processes == 1:
        return [sys.executable, "-m", "phasequant"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "-m", "phasequant"]


def timed(arguments: list[str], cache: Path) -> tuple[float, str]:
    """Wall-clock seconds and stdout."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PHASEQUANT_CACHE": str(cache)}
    begun = time.monotonic()
    ran = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return time.monotonic() - begun, ran.stdout


def run(processes: int, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Quantize and evaluate."""
    out, cache = folder / str(processes), folder / f"cache-{processes}"
    for kept in (given.cache or Path("~/.cache/phasequant").expanduser()).glob("*.gguf"):  # not unpacked again
        cache.mkdir(exist_ok=True)
        (cache / kept.name).symlink_to(kept)
    start = command(processes)
    options = [*given.options, *(["--calib", given.calib] if given.calib else [])]
    seconds, _ = timed([*start, "quantize", given.model, "-o", str(out), "--device", given.device, *options], cache)
    manifest = json.loads((out / "manifest.json").read_text())
    found: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "steps": {part: manifest[part] and manifest[part]["seconds"] for part in ("learning", "weights")},
        "plan": json.loads((out / "plan.json").read_text())["raised"],
    }
    if given.text:
        asked = ["--text", given.text, "--chunks", str(given.chunks), "--device", given.device, "--json", "-q"]
        evaluated, told = timed([*start, "eval", str(out), "--original", given.model, *asked], cache)
        figures = json.loads(told.strip().splitlines()[-1])
        found |= {"eval_seconds": round(evaluated, 1), "ppl": figures["ppl"], "kl": figures["kl"]}
    print(f"{processes}: {json.dumps({k: v for k, v in found.items() if k != 'plan'})}", flush=True)
    return found


def main() -> None:
    """Both runs, and what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib")
    parser.add_argument("--text")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    own = sys.argv[1:]
    at = own.index("--") if "--" in own else len(own)
    given = parser.parse_args(own[:at])
    given.options = own[at + 1 :]
    with tempfile.TemporaryDirectory() as name:
        one, several = (run(processes, given, Path(name)) for processes in (1, given.nproc))
    result = {
        "processes": given.nproc,
        "options": given.options,
        "model": Path(given.model).name,
        "one": one,
        "several": several,
        "same_plan": one["plan"] == several["plan"],
        "sooner": round(one["seconds"] / several["seconds"], 2),
    }
    if given.text:
        result["ppl_ratio"] = several["ppl"] / one["ppl"]
        result["eval_sooner"] = round(one["eval_seconds"] / several["eval_seconds"], 2)
    print(json.dumps({key: value for key, value in result.items() if key not in ("one", "several")}))
    if given.output:
        given.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
