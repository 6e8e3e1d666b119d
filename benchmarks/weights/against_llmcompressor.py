"""Our GPTQ and llm-compressor's: the same weights, tokens and grid in one run; output error, seconds, peak memory.

    python3 -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python benchmarks/weights/against_llmcompressor.py --peer peer/bin/python --text wiki.test --calib wiki.train

Both quantize the plain (un-rotated) fp32 SmolLM2 to symmetric int4 per channel with static activation order and damping
0.01, each in a process of its own with the same number of threads, one after the other. Grids: `minmax` (scale =
max|w| / 7.5, which is llm-compressor's; ours at clip 14/15) and `mse` (each tool's own search). Seconds are of the
quantizing call alone, peak memory of the whole process. The error of a linear is ‖X·(W - Ŵ)ᵀ‖² / ‖X·Wᵀ‖² with the
16-bit model's inputs X, on the calibration tokens and on held-out text. Finished runs are kept in OUTPUT.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, geometric_mean

import torch
from safetensors.torch import load_file, save_file

CLIPS = {"minmax": "0.9333333333333333", "mse": "mse"}


def peak_so_far() -> int:
    """The process's largest resident memory, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(folder: Path, name: str, seconds: float, peak: int, weights: dict[str, torch.Tensor]) -> None:
    """What a child leaves: its weights, and seconds and peak memory of quantizing."""
    save_file({k: v.float().contiguous() for k, v in weights.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def peer(folder: Path, grid: str) -> None:
    """llm-compressor, in its own environment."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokens = load_file(folder / "tokens.safetensors")["calibration"]
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    observer = {"minmax": "memoryless_minmax", "mse": "memoryless_mse"}[grid]
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel", observer=observer)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], dampening_frac=0.01)
    start = time.monotonic()
    oneshot(
        model=model, dataset=Dataset.from_dict(rows), recipe=recipe, max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens), shuffle_calibration_samples=False,
    )  # fmt: skip
    seconds, peak = time.monotonic() - start, peak_so_far()
    names = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    report(folder, f"peer-{grid}", seconds, peak, {n: model.get_submodule(n).weight.data for n in names})


WAYS = {
    "plain": ["weights.sequential=false", "weights.target=weights", "weights.rounds=0"],
    "sequential": ["weights.target=weights", "weights.rounds=0"],
    "rounds": ["weights.sequential=false", "weights.target=weights"],
    "default": [],
}


def ours(folder: Path, grid: str, way: str) -> None:
    """PhaseQuant."""
    from phasequant import pipeline, weight
    from phasequant.nn import quant_linears
    from phasequant.recipe import Recipe
    from phasequant.source import open_model

    tokens = load_file(folder / "tokens.safetensors")["calibration"]
    sets = ["weights.method=gptq", f"weights.clip={CLIPS[grid]}", *WAYS[way]]
    recipe = Recipe.load("rtn", [*sets, "activations.bits=16", "kv.bits=16"])
    spec = recipe.weights.spec()
    assert spec is not None
    source = open_model(str(folder / "model"), "cpu")
    start = time.monotonic()
    pipeline.observe_and_transform(source, recipe, raw=False, transformed=False, noise=False)
    weight.quantize_weights(
        weight.WeightTask(
            source.model, source.map, spec, recipe.weights, recipe.lowrank, torch.float32, lambda _: {}, tokens,
            source.device,
        )
    )  # fmt: skip
    seconds, peak = time.monotonic() - start, peak_so_far()
    weights = {n: m.dense_weight() for n, m in quant_linears(source.model)}
    report(folder, f"ours-{grid}-{way}", seconds, peak, weights)


def errors(folder: Path, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Run → text → relative squared output error of every linear, on the 16-bit model's inputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    made = {name: load_file(folder / f"{name}.safetensors") for name in names}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for text, tokens in load_file(folder / "tokens.safetensors").items():
        moments: dict[str, torch.Tensor] = {}

        def add(name: str, x: torch.Tensor, moments: dict[str, torch.Tensor] = moments) -> None:
            x = x.flatten(0, -2)
            moments[name] = moments.get(name, 0) + x.T @ x

        hooks = [m.register_forward_pre_hook(lambda _, a, n=n: add(n, a[0])) for n, m in linears.items()]
        with torch.no_grad():
            for row in tokens:
                model(row[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for name in names:
            for key, linear in linears.items():
                weight, hessian = linear.weight.data, moments[key]
                left = weight - made[name][key]
                size = ((weight @ hessian) * weight).sum(dtype=torch.float64)
                error = ((left @ hessian) * left).sum(dtype=torch.float64) / size
                found[name].setdefault(text, []).append(float(error))
    return found


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a Python with llmcompressor")
    parser.add_argument("--text")
    parser.add_argument("--calib")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/against"))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.output.resolve()
    if options.child:
        torch.set_num_threads(int(options.child[-1]))
        (peer if options.child[0] == "peer" else ours)(folder, *options.child[1:-1])
        return
    from phasequant import text
    from phasequant.source import open_model

    if not (folder / "tokens.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = open_model("demo", "cpu")
        source.model.save_pretrained(folder / "model")
        source.tokenizer.save_pretrained(folder / "model")
        cut = {
            "calibration": text.cut(
                text.find(options.calib, "calibration"), source.tokenizer, options.seqlen, options.sequences
            ),
            "held-out": text.cut(text.find(options.text, "evaluation"), source.tokenizer, options.seqlen, 16),
        }
        save_file({k: v.contiguous() for k, v in cut.items()}, folder / "tokens.safetensors")
        del source
    threads = str(torch.get_num_threads())
    runs = [(options.peer, ["peer", grid]) for grid in CLIPS]
    runs += [(Path(sys.executable), ["ours", grid, way]) for grid in CLIPS for way in WAYS]
    for python, child in runs:
        if not (folder / f"{'-'.join(child)}.json").exists():
            print(f"{' '.join(child)} …", flush=True)
            subprocess.run([python, __file__, "-o", folder, "--child", *child, threads], check=True)
    names = ["-".join(child) for _, child in runs]
    found = errors(folder, names)
    print("\n| run | seconds | peak GiB | error, calibration | error, held-out | linears not worse, held-out |")
    print("|---|---|---|---|---|---|")
    for name in names:
        cost = json.loads((folder / f"{name}.json").read_text())
        base = found[f"peer-{name.split('-')[1]}"]
        ratios = {t: geometric_mean([a / b for a, b in zip(found[name][t], base[t], strict=True)]) for t in base}
        better = fmean(a <= b for a, b in zip(found[name]["held-out"], base["held-out"], strict=True))
        cells = [f"{fmean(found[name][t]):.5f} ({ratios[t]:.3f} ×)" for t in ("calibration", "held-out")]
        spent = f"{cost['seconds']:.0f} | {cost['peak_bytes'] / 2**30:.2f}"
        print(f"| {name} | {spent} | {' | '.join(cells)} | {better:.0%} |")


if __name__ == "__main__":
    main()
