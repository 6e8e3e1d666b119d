"""AdamW, Muon and Zeta train one small LLaMA from scratch, each at its best learning rate of a grid.

    python benchmarks/optim/train.py --text wiki.train.raw [--text more.txt] [-o runs/optim] [--compile] [--seeds 3]

Same initial weights, batches, clipping and schedule (linear warm-up, cosine to a tenth) for every run of a seed. Muon
and Zeta own the matrices of the blocks; embeddings, head and norms go to the same AdamW in all. Muon's step is scaled
to AdamW's RMS as Zeta's is, and the run's learning rate serves both parts. Tokens are bytes; the last tenth of the text
is held out. Every finished run is written to curves.json at once, and a run that is there is not repeated: interrupt
and start again at will. curves.html shows the curves (curves.png too where kaleido is installed); the table is printed.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from phasequant.optim import Zeta

Json = dict[str, Any]
Model = Callable[..., Any]  # a module, or what torch.compile makes of one
BETAS = (0.9, 0.95)  # AdamW's
CLIP = 1.0
FLOOR = 0.1  # of the learning rate, where the cosine ends
ZETAS: dict[str, Json] = {
    "zeta": {},
    "zeta-paper-betas": {"betas": (0.95, 0.99)},
    "zeta-spectral": {"stages": ("spectral",)},
    "zeta-coordinate": {"stages": ("coordinate",)},
    "zeta-swapped": {"stages": ("spectral", "coordinate")},
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")


# --- one run ------------------------------------------------------------------------------------------------------


def make_model(options: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    """A LLaMA of random weights, on the device, fp32."""
    torch.manual_seed(seed)
    heads = max(1, options.d // 64)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.d,
        intermediate_size=64 * round(options.d * 8 / 3 / 64),
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=options.context,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(options.device)


def make_optimizers(name: str, model: LlamaForCausalLM, lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """One optimizer for all, or one for the matrices of the blocks and AdamW for the rest, which never decays."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    mine = {id(p) for p in hidden}
    rest: Json = {"params": [p for p in model.parameters() if id(p) not in mine], "weight_decay": 0.0}
    fused = hidden[0].is_cuda
    if name == "adamw":
        groups = [{"params": hidden, "weight_decay": decay}, rest]
        return [torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=fused)]
    others = torch.optim.AdamW([rest], lr=lr, betas=BETAS, fused=fused)
    if name == "muon":
        return [torch.optim.Muon(hidden, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"), others]
    return [Zeta(hidden, lr=lr, weight_decay=decay, **ZETAS[name]), others]


def schedule(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate at a step, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def loss_of(model: Model, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats; bf16 autocast on CUDA."""
    tokens = rows.long()
    with torch.autocast("cuda", torch.bfloat16, enabled=rows.is_cuda):
        logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Model, windows: Tensor, batch: int) -> float:
    """Mean over all windows."""
    losses = [loss_of(model, rows) * len(rows) for rows in torch.split(windows, batch)]
    return float(torch.stack(losses).sum() / len(windows))


def clock(device: torch.device) -> float:
    """Seconds, after what was sent to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(name: str, lr: float, seed: int, train: Tensor, windows: Tensor, options: argparse.Namespace) -> Json:
    """Train once: losses of every step, held-out losses along the way, seconds without evaluation."""
    model = make_model(options, seed)
    optimizers = make_optimizers(name, model, lr, options.weight_decay)
    trained = torch.compile(model) if options.compile else model
    warmup = max(1, round(options.warmup * options.steps))
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: schedule(step, options.steps, warmup)) for o in optimizers
    ]
    picks = torch.Generator().manual_seed(seed)
    span = torch.arange(options.context + 1, device=options.device)
    losses: list[Tensor] = []
    held_out: list[tuple[int, float]] = [(0, held_out_loss(trained, windows, options.batch))]
    seconds, started = 0.0, clock(options.device)
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(train) - options.context, (options.batch, 1), generator=picks)
        loss = loss_of(trained, train[starts.to(options.device) + span])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        losses.append(loss.detach())
        if step % options.every == 0 or step == options.steps:
            seconds += clock(options.device) - started
            held_out.append((step, held_out_loss(trained, windows, options.batch)))
            if not math.isfinite(held_out[-1][1]):
                break
            started = clock(options.device)
    train_loss = torch.stack(losses).tolist()
    return {
        "optimizer": name,
        "lr": lr,
        "seed": seed,
        "steps": len(losses),
        "diverged": not math.isfinite(held_out[-1][1]),
        "train_loss": [_finite(value) for value in train_loss],
        "held_out": [(step, _finite(value)) for step, value in held_out],
        "seconds": round(seconds, 2),
        "optimizer_ms": _optimizer_ms(model, optimizers, options.device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "cpu",
    }


def _optimizer_ms(model: nn.Module, optimizers: list[torch.optim.Optimizer], device: torch.device) -> float:
    """Milliseconds of the optimizers alone, after the run: the median of ten steps on made-up gradients."""
    times = []
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for _ in range(10):
        started = clock(device)
        for optimizer in optimizers:
            optimizer.step()
        times.append(1000 * (clock(device) - started))
    return round(statistics.median(times), 3)


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


# --- the grid, kept in a file -------------------------------------------------------------------------------------


def read_text(paths: list[Path], options: argparse.Namespace) -> tuple[Tensor, Tensor, str]:
    """Bytes to train on, windows of the held-out tenth, and the sha256 of all."""
    data = b"".join(path.read_bytes() for path in paths)
    held_out = len(data) // 10
    if held_out <= options.context:
        sys.exit(f"error: {len(data)} bytes of text: a tenth of it must exceed the context of {options.context}")
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(options.device)
    train, rest = tokens[:-held_out], tokens[-held_out:]
    windows = rest.unfold(0, options.context + 1, options.context)[: options.windows]
    return train, windows.contiguous(), hashlib.sha256(data).hexdigest()


def load(path: Path, settings: Json) -> list[Json]:
    """The runs already done under these settings; others in the file are an error."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        changed = [key for key in settings if found["settings"].get(key) != settings[key]]
        sys.exit(f"error: {path} holds runs made with other settings ({', '.join(changed)}): give another --output")
    runs: list[Json] = found["runs"]
    return runs


def save(path: Path, settings: Json, runs: list[Json]) -> None:
    """Replace the file in one move, so that an interruption leaves the old or the new one."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"settings": settings, "runs": runs}))
    scratch.replace(path)


# --- what came of it ----------------------------------------------------------------------------------------------


def final(run: Json) -> float:
    """The last held-out loss; infinite where the run diverged."""
    last: float | None = run["held_out"][-1][1]
    return math.inf if last is None else last


def best_rate(runs: list[Json]) -> float:
    """The learning rate of the lowest median final held-out loss, of those that ran with the most seeds."""
    found: dict[float, list[float]] = {}
    for run in runs:
        found.setdefault(run["lr"], []).append(final(run))
    most = max(map(len, found.values()))
    medians = {rate: statistics.median(losses) for rate, losses in found.items() if len(losses) == most}
    return min(medians, key=medians.__getitem__)


def steps_to(target: float, curve: list[tuple[int, float]]) -> float:
    """The first step at which a held-out curve is down to the target, linear between evaluations; inf if never."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low) if high > target else before
    return math.inf


def median_curve(runs: list[Json]) -> list[tuple[int, float]]:
    """Held-out loss by step, the median over seeds."""
    columns = zip(*(run["held_out"] for run in runs if not run["diverged"]), strict=False)
    return [(column[0][0], statistics.median(loss for _, loss in column)) for column in columns]


def at_best(runs: list[Json]) -> dict[str, list[Json]]:
    """Optimizer → its runs (one a seed) at its best learning rate."""
    chosen: dict[str, list[Json]] = {}
    for name in dict.fromkeys(run["optimizer"] for run in runs):
        mine = [run for run in runs if run["optimizer"] == name]
        rate = best_rate(mine)
        chosen[name] = [run for run in mine if run["lr"] == rate]
    return chosen


def table(runs: list[Json]) -> str:
    """One row an optimizer, at its best learning rate; medians over seeds."""
    chosen = at_best(runs)
    adamw = median_curve(chosen.get("adamw", []))
    target = adamw[-1][1] if adamw else -math.inf
    lines = [
        "| optimizer | best lr | held-out, final | held-out, lowest (step) | train, final | steps to AdamW's final | "
        "ratio | s a run | optimizer ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, mine in chosen.items():
        rates = sorted({run["lr"] for run in runs if run["optimizer"] == name})
        lr, curve = mine[0]["lr"], median_curve(mine)
        if not curve:
            lines.append(f"| {name} | – | diverged at every rate | | | | | | |")
            continue
        step, lowest = min(curve, key=lambda point: point[1])
        needed = steps_to(target, curve)
        ratio = f"{steps_to(target, adamw) / needed:.2f}×" if math.isfinite(needed) else "–"
        tail = statistics.median(statistics.mean(run["train_loss"][-20:]) for run in mine if not run["diverged"])
        speed = [statistics.median(run[key] for run in mine) for key in ("seconds", "optimizer_ms")]
        reached = f"{needed:.0f}" if math.isfinite(needed) else "never"
        lines.append(
            f"| {name} | {lr:g} | {curve[-1][1]:.4f} | {lowest:.4f} ({step}) | {tail:.4f} | {reached} | {ratio} | "
            f"{speed[0]:.1f} | {speed[1]:.2f} |"
        )
        if len(rates) > 1 and lr in (rates[0], rates[-1]):
            notes.append(f"{name}: the best rate {lr:g} is the edge of its grid; widen --lrs")
        if curve[-1][1] > lowest + 0.005:
            notes.append(f"{name}: overfits after step {step}; its final held-out loss is no measure of speed")
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def figure(runs: list[Json]) -> go.Figure:
    """Train loss, held-out loss (both at the best rates; first seed and median), and the loss by learning rate."""
    titles = ("train loss, mean of 20 steps", "held-out loss", "final held-out loss by learning rate")
    made = make_subplots(rows=1, cols=3, subplot_titles=titles)
    for index, (name, mine) in enumerate(at_best(runs).items()):
        style: Json = {"line": {"color": COLORS[index % len(COLORS)]}, "legendgroup": name, "mode": "lines"}
        label = f"{name}, lr {mine[0]['lr']:g}"
        losses = [loss for loss in mine[0]["train_loss"] if loss is not None]
        smooth = [statistics.mean(losses[max(0, i - 20) : i]) for i in range(1, len(losses) + 1)]
        made.add_scatter(x=list(range(1, len(losses) + 1)), y=smooth, name=label, row=1, col=1, **style)
        curve = median_curve(mine)
        steps, values = [step for step, _ in curve], [loss for _, loss in curve]
        made.add_scatter(x=steps, y=values, name=label, showlegend=False, row=1, col=2, **style)
        by_rate: dict[float, list[float]] = {}
        for run in runs:
            if run["optimizer"] == name and not run["diverged"]:
                by_rate.setdefault(run["lr"], []).append(final(run))
        rates = sorted(by_rate)
        style["mode"] = "lines+markers"
        medians = [statistics.median(by_rate[rate]) for rate in rates]
        made.add_scatter(x=rates, y=medians, name=label, showlegend=False, row=1, col=3, **style)
    made.update_xaxes(title_text="step", col=1).update_xaxes(title_text="step", col=2)
    made.update_xaxes(title_text="learning rate", type="log", col=3)
    made.update_yaxes(title_text="nats a byte", col=1)
    return made.update_layout(template="plotly_white", width=1500, height=480, legend={"orientation": "h", "y": -0.2})


def report(folder: Path, runs: list[Json]) -> None:
    """The figure as files, the table on the screen."""
    if not runs:
        return
    made = figure(runs)
    made.write_html(folder / "curves.html", include_plotlyjs=True)
    try:
        made.write_image(folder / "curves.png", scale=2)
    except (ValueError, ImportError, RuntimeError) as error:
        print(f"curves.png is not written (pip install kaleido; it needs Chrome): {str(error).strip().splitlines()[0]}")
    print(table(runs))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, action="append", required=True, help="a text file; may be repeated")
    add("-o", "--output", type=Path, default=Path("runs/optim"), help="folder of curves.json and the charts")
    names = ["adamw", "muon", *ZETAS]
    add("--optimizers", nargs="+", choices=names, default=["adamw", "muon", "zeta"], metavar="NAME", help=f"of {names}")
    add("--lrs", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3])
    add("--seeds", type=int, default=1, help="how many, from 0; results are medians over them")
    add("--d", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--context", type=int, default=512)
    add("--batch", type=int, default=32)
    add("--steps", type=int, default=800)
    add("--warmup", type=float, default=0.05, help="share of the steps")
    add("--weight-decay", type=float, default=0.1)
    add("--every", type=int, default=20, help="steps between held-out losses")
    add("--windows", type=int, default=192, help="held-out windows of --context bytes, at most")
    add("--compile", action="store_true")
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return parser.parse_args()


def main() -> None:
    """Run what is missing of the grid, then report on all of it."""
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "curves.json"
    train, windows, sha256 = read_text(options.text, options)
    keys = ("d", "layers", "context", "batch", "steps", "warmup", "weight_decay", "every", "windows", "compile")
    settings = {key: getattr(options, key) for key in keys} | {"text": sha256, "device": options.device.type}
    runs = load(path, settings)
    epochs = options.steps * options.batch * options.context / len(train)
    print(f"{len(train):,} bytes to train on, {windows.numel():,} held out; a run reads the text {epochs:.1f} times")
    done = {(run["optimizer"], run["lr"], run["seed"]) for run in runs}
    try:
        for seed in range(options.seeds):
            for name in options.optimizers:
                for lr in options.lrs:
                    if (name, lr, seed) in done:
                        continue
                    made = run(name, lr, seed, train, windows, options)
                    runs.append(made)
                    save(path, settings, runs)
                    print(f"{name:16} lr {lr:<8g} seed {seed}: {final(made):.4f}, {made['seconds']:.1f} s", flush=True)
    finally:
        report(options.output, runs)


if __name__ == "__main__":
    main()
