r"""QuaRot: fixed Hadamard rotations (arXiv 2404.00456).

With rows x, a block reads n(x)·diag(γ)·Wᵀ, n the RMSNorm without gain. Since ‖xR‖ = ‖x‖, n(xR) = n(x)·R, and

    n(x)·diag(γ)·Wᵀ  =  n(xR1)·(W·diag(γ)·R1)ᵀ

so R1 can be folded everywhere: embedding E·R1, readers W·diag(γ)·R1, writers R1ᵀ·W (bias b·R1), head W·diag(γ)·R1.
R2 rotates each value head (v: output, bias too; o: input). Before o the heads are mixed by M, so that o sees
M ⊗ R2 over the whole width; before down R4 acts on the product of the MLP; R3 on q and k after RoPE.

    rotation.where   folded   gains, R1, R2 folded: free; online M, R3, R4
                     online   gains stay in the norms; a rotation of the model width runs after each: 2·D·(a + b)
                              multiply-adds a token and block more (D = a·b); R2 folded; online M, R3, R4

Folded, every norm's readers see the residual in one common rotation, and its gains are lost to the weights; online, the
gains have flattened the input before it is rotated, and norms that cannot be folded are no obstacle. R1 is a randomized
Hadamard diag(±1)·H (seed of the recipe); the others are plain. Where no Hadamard matrix exists the ladder of
`numerics.hadamard` decides, and the report says so: 9 heads take a random orthogonal M.

Not done: QuaRot's code also subtracts the mean of every embedding row. That suits LayerNorm; with RMSNorm it changes
the function (methods.md §4), so it is left out and logits are tested to stay.
"""

from phasequant.arch import ModelMap
from phasequant.numerics import spreading_mix, spreading_rotation
from phasequant.transform.contract import BlockTransform, Task, Transform


def fixed_rotations(model_map: ModelMap, seed: int, where: str = "folded", method: str = "quarot") -> Transform:
    """QuaRot's rotations for a model; also where the learned methods begin."""
    shape = model_map.shape
    folded = where == "folded"
    reader = None if folded else spreading_rotation(shape.d_model, seed)
    block = BlockTransform(
        qkv=reader,
        gate_up=reader,
        value=spreading_rotation(shape.d_head, seed, copies=shape.kv_heads),
        heads=spreading_mix(shape.heads, shape.d_head, seed) if shape.heads > 1 else None,
        qk=spreading_rotation(shape.d_head, seed),
        down=spreading_rotation(shape.d_ffn, seed),
    )
    residual = spreading_rotation(shape.d_model, seed, randomize=True) if folded else None
    return Transform.alike(method, model_map, block, folds_norms=folded, residual=residual)


def quarot(task: Task) -> Transform:
    """QuaRot."""
    return fixed_rotations(task.map, task.seed, task.rotation.where)
