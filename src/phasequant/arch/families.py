"""One declarative adapter a family: the names under which its parts stand in the Transformers model. Nothing runs here.

A family lists, relative to a decoder block, which linears read the same input (a group), which norm that input comes
from, and where attention lives. All four families below share one layout, pre-norm with gated MLP:

    x ─ norm ─ {q,k,v} ─ attention ─ {o} ─(+)─ norm ─ {gate,up} ─ act·mul ─ {down} ─(+)─
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class GroupNames:
    """Linears of a block that read one input, and the norm (if any) whose output that input is."""

    name: str
    linears: tuple[str, ...]
    norm: str | None = None


@dataclass(frozen=True)
class Family:
    """Names of one architecture. `q`, `k`, `v`, `o` name single linears for what only they take part in."""

    name: str
    model_types: tuple[str, ...]
    decoder: str = "model"
    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    groups: tuple[GroupNames, ...] = (
        GroupNames("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        GroupNames("o", ("self_attn.o_proj",)),
        GroupNames("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        GroupNames("down", ("mlp.down_proj",)),
    )
    value: str = "self_attn.v_proj"
    up: str = "mlp.up_proj"
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    qk_norms: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


FAMILIES: tuple[Family, ...] = (
    Family("LLaMA", ("llama",)),
    Family("Mistral", ("mistral",)),
    Family("Qwen2", ("qwen2",), notes=("q, k and v have biases; v's is rotated with its weights",)),
    Family(
        "Qwen3",
        ("qwen3",),
        qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
        notes=(
            "q and k are normalized per head: no rotation can be folded through those norms, so R3 is never folded "
            "into q and k; it runs online, after the norms and RoPE",
        ),
    ),
)

GROUPS = ("qkv", "o", "gate_up", "down")
"""The groups every family has, in the order of computation."""
