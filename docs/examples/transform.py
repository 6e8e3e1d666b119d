"""A new transform: cosines in place of Hadamards, folded into the weights, so that nothing of it runs online.

    R1 = diag(±1)·C,   C_ij = √(2/D)·cos(π(2i + 1)j / 2D),  C_i0 = √(1/D)      orthogonal for every width D

A method chooses maps; folding them, and proving that no logit moves, is done for it. From outside the package a
transform travels as a file (`transform.method=load`); inside it is a function (Task) → Transform, named in
`transform.METHODS` and in `TransformPart.method`. Run: python docs/examples/transform.py [MODEL]
"""

import math
import sys
import tempfile

import torch

import phasequant
from phasequant.arch import ModelMap
from phasequant.numerics import LinearMap
from phasequant.transform import BlockTransform, Transform, save_transform


def cosines(n: int) -> torch.Tensor:
    """The orthogonal matrix of the discrete cosine transform, (n, n), fp64."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = math.sqrt(2 / n) * torch.cos(math.pi * (2 * i + 1) * j / (2 * n))
    matrix[:, 0] = math.sqrt(1 / n)
    return matrix


def cosine_transform(model_map: ModelMap, seed: int = 0) -> Transform:
    """R1 of the residual stream, and one rotation of every value head."""
    shape, drawn = model_map.shape, torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (shape.d_model, 1), generator=drawn) * 2.0 - 1
    heads = cosines(shape.d_head).expand(shape.kv_heads, -1, -1)
    residual = LinearMap.dense(signs * cosines(shape.d_model))
    block = BlockTransform(value=LinearMap.dense(heads))
    # Gains go into the readers, for a rotation does not commute with them.
    return Transform.alike("cosine", model_map, block, folds_norms=True, residual=residual)


def main(model: str = "demo") -> dict[str, float]:
    """Perplexity of the 16-bit model, transformed with nothing rounded, and at W8A8."""
    source = phasequant.open_model(model)
    text = {"chunks": 1, "seqlen": 256}
    found = {"16-bit": phasequant.evaluate(source, **text)["ppl"]}
    with tempfile.TemporaryDirectory() as folder:
        file = save_transform(f"{folder}/cosine.safetensors", cosine_transform(source.map), source.map)
        ours = ["transform.method=load", f"transform.file={file}", "storage.dtype=float32"]
        for name, bits in (("transformed", 16), ("W8A8", 8)):
            keys = [*ours, f"weights.bits={bits}", f"activations.bits={bits}"]
            found[name] = phasequant.evaluate(source, recipe="16bit", overrides=keys, **text)["ppl"]
    print(found)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
