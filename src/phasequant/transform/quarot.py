r"""QuaRot: fixed Hadamard rotations (arXiv 2404.00456).

With rows x, a block reads n(x)·diag(γ)·Wᵀ, n the RMSNorm without gain. Since ‖xR‖ = ‖x‖, n(xR) = n(x)·R, and

    n(x)·diag(γ)·Wᵀ  =  n(xR1)·(W·diag(γ)·R1)ᵀ

so R1 can be folded everywhere: embedding E·R1, readers W·diag(γ)·R1, writers R1ᵀ·W (bias b·R1), head W·diag(γ)·R1.
R2 rotates each value head (v: output, bias too; o: input). Before o the heads are mixed by M, so that o sees
M ⊗ R2 over the whole width; before down R4 acts on the product of the MLP; R3 on q and k after RoPE.

    rotation.where   folded   gains, R1, R2 folded: free; online M, R3, R4
                     online   gains stay in the norms; a rotation of the model width runs after each: 2·D·(a + b)
                              multiply-adds a token and block more (D = a·b); R2 folded; online M, R3, R4

    rotation.heads: apart    without M: o sees every head rotated by R2 alone; online only R3 and R4
    rotation.online: false   R1 and R2 alone: neither M, R3 nor R4, so that nothing at all runs online
    rotation.block: B (online) Hadamards of order B side by side instead: B multiply-adds a value; nothing before o,
                     whose blocks are in R2. What MR-GPTQ (arXiv 2509.23202) does for FP4, whose scales span 16 or 32

Folded, every norm's readers see the residual in one common rotation, and its gains are lost to the weights; online, the
gains have flattened the input before it is rotated, and norms that cannot be folded are no obstacle: LayerNorms and
norms after the sublayers, with which folding is refused. Where v is no linear of its own there is no R2. R1 is a
randomized Hadamard diag(±1)·H (seed of the recipe); the others are plain. Where no Hadamard matrix exists the ladder of
`numerics.hadamard` decides, and the report says so: 9 heads take a random orthogonal M.

Not done: QuaRot's code (`fuse_layer_norms`) also subtracts the mean of every embedding row. That suits LayerNorm; with
RMSNorm, which removes no mean, it changes the function, so it is left out and logits are tested to stay.
"""

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.numerics import spreading_mix, spreading_rotation
from phasequant.numerics.hadamard import is_order
from phasequant.transform.contract import BlockTransform, Task, Transform, check_folding


def fixed_rotations(
    model_map: ModelMap,
    seed: int,
    where: str = "folded",
    method: str = "quarot",
    heads: str = "mixed",
    online: bool = True,
) -> Transform:
    """QuaRot's rotations for a model; also where the learned methods begin. `heads`: mixed by M, or apart. `online`:
    whether what cannot be folded runs, M, R3 and R4."""
    shape = model_map.shape
    folded, mixed = where == "folded", shape.heads > 1 and heads == "mixed"
    if folded:
        check_folding(model_map)
    reader = None if folded else spreading_rotation(shape.d_model, seed)
    block = BlockTransform(
        qkv=reader,
        gate_up=reader,
        value=spreading_rotation(shape.d_head, seed, copies=shape.kv_heads) if model_map.family.value else None,
        heads=spreading_mix(shape.heads, shape.d_head, seed) if online and mixed else None,
        qk=spreading_rotation(shape.d_head, seed) if online else None,
        down=spreading_rotation(shape.d_ffn, seed) if online else None,
    )
    residual = spreading_rotation(shape.d_model, seed, randomize=True) if folded else None
    return Transform.alike(method, model_map, block, folds_norms=folded, residual=residual)


def block_rotations(model_map: ModelMap, size: int) -> Transform:
    """Hadamards of order `size` side by side before every linear; before o they are in v, where they fit its heads."""
    shape = model_map.shape
    for place, width in (("the model's width", shape.d_model), ("the MLP's width", shape.d_ffn)):
        if width % size or not is_order(size):
            raise PhaseQuantError(
                f"rotation.block {size} does not do for {place}, {width}: choose a divisor of it that is an order of "
                "Hadamard matrices, such as 16, 32 or 64"
            )
    head = size if shape.d_head % size == 0 else shape.d_head
    made = [spreading_rotation(size, copies=width // size) for width in (shape.d_model, shape.d_ffn)]
    copies = shape.kv_heads * shape.d_head // head
    block = BlockTransform(
        qkv=made[0],
        gate_up=made[0],
        value=spreading_rotation(head, copies=copies) if model_map.family.value else None,
        qk=spreading_rotation(shape.d_head),
        down=made[1],
    )
    return Transform.alike("quarot", model_map, block)


def quarot(task: Task) -> Transform:
    """QuaRot."""
    if task.rotation.block is not None:
        return block_rotations(task.map, task.rotation.block)
    part = task.rotation
    return fixed_rotations(task.map, task.seed, part.where, heads=part.heads, online=part.online)
