"""Low-rank branches at equal rank: what rounding error and what grid-to-std ratio they leave in rotated weights.

    python benchmarks/weights/branches.py [--ranks 16 32 64 128] [--blocks 1 15 28] [--clip mse]

SmolLM2 under QuaRot's rotations, int4 per channel, no data: for every method the mean over groups of the chosen blocks
of ‖Q(W - L) - (W - L)‖² relative to no branch, and of the residual's GSR (step of the row's largest value over its
std).
`--clip 1.0` rounds without a clip search, as FRTQ's description has it. About 20 minutes on one core.
"""

import argparse
from statistics import fmean

import torch

from phasequant import pipeline
from phasequant.nn import QuantLinear
from phasequant.numerics import QuantSpec
from phasequant.recipe import Recipe
from phasequant.source import open_model
from phasequant.weight.lowrank import split


def main() -> None:
    """Measure and print one row a rank and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 15, 28])
    parser.add_argument("--clip", default="mse")
    options = parser.parse_args()
    source = open_model("demo", "cpu")
    pipeline.observe_and_transform(source, Recipe.load("quarot"), raw=False, transformed=False, noise=False)
    spec = QuantSpec(4, True, "channel", clip="mse" if options.clip == "mse" else float(options.clip))
    print("| rank | method | error, of no branch's | GSR | iterations |\n|---|---|---|---|---|")
    for rank in options.ranks:
        for method in ("svd", "loftq", "tsvd"):
            found = []
            for index in options.blocks:
                block = source.model.get_submodule(source.map.block_name(index))
                for group in source.map.groups:
                    linears = [block.get_submodule(name) for name in group.linears]
                    weight = torch.cat([m.dense_weight().float() for m in linears if isinstance(m, QuantLinear)])
                    found.append(split(weight, spec, rank, method)[2])
            error, gsr, before, steps = (
                fmean(n[key] for n in found) for key in ("branch_error", "residual_gsr", "gsr", "iteration")
            )
            print(f"| {rank} | {method} | {error:.4f} | {before:.4f} → {gsr:.4f} | {steps:.0f} |", flush=True)


if __name__ == "__main__":
    main()
