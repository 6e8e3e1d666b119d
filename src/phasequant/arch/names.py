"""What a map of names consists of: groups of linears, what a config must say, a family of models. Nothing runs here.

A family lists, relative to a decoder block, which linears read the same input (a group), which norm that input comes
from, and where attention lives. Most share one layout, pre-norm with gated MLP:

    x ─ norm ─ {q,k,v} ─ attention ─ {o} ─(+)─ norm ─ {gate,up} ─ act·mul ─ {down} ─(+)

and where one differs, a field says so, which transforms ask before they touch a place:

    norm         rms: n(x)·w        rms+1: n(x)·(1 + w), Gemma's        layer: mean taken off too, and a bias
    post_norms   norms of the sublayers' outputs, before they are added to the residual stream
    value, ups   the linears whose rows can scale or rotate what o, or down, reads; none where nothing can
    fused        q, k and v are rows of one linear, in this order, gate and up of another: `value` and `ups` name those
                 two, and what is folded into values and up goes into their rows alone (`ModelMap.value_rows`)
    experts      where a mixture of them stands: names with {} are each expert's, all of a block one group, whose input
                 is seen at its `probe`; the router reads the norm too, and stays in 16 bits
    shared       an MLP of that many experts' width beside them, which every token goes through: it is taken apart into
                 experts that every token is given (`nn.experts`); its `shared_gate`, if any, stays in 16 bits

Only `norm` rms and rms+1 without `post_norms` let a rotation of the residual stream be folded. Two groups that name one
norm read one input: what is folded into that norm is shared by both. A group without a norm reads the residual stream,
or what stands before it in the block, as it is.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GroupNames:
    """Linears of a block that read one input, and the norm (if any) whose output that input is."""

    name: str
    linears: tuple[str, ...]
    norm: str | None = None
    probe: str | None = None
    expert: int | None = None

    @property
    def input(self) -> str:
        """The module at whose entrance the group's input is seen: its `probe`, or the first of its linears."""
        return self.probe or self.linears[0]


@dataclass(frozen=True)
class Needs:
    """What a config has to say for the names to hold: `attribute` equal to `value`, or to the attribute `same_as`."""

    attribute: str
    why: str
    value: Any = None
    same_as: str | None = None


@dataclass(frozen=True)
class Family:
    """Names of one architecture. `q`, `k`, `v`, `o` name single linears for what only they take part in.

    `when` chooses among families of one model type by attributes of the config, the first that fits. `n_experts`,
    `d_ffn`, `shared_width`, `softcap`, `logit_softcap`, `logit_divisor` and `multipliers` name attributes of it: how
    many experts a router chooses from, the width inside the MLP (of one expert), that of the shared one, the caps of
    attention scores and of logits, what logits are divided by, and the numbers that the model multiplies by elsewhere.
    """

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
    norm: str = "rms"
    post_norms: tuple[str, ...] = ()
    value: str | None = "self_attn.v_proj"
    ups: tuple[str, ...] = ("mlp.up_proj",)
    fused: bool = False
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    qk_norms: tuple[str, ...] = ()
    experts: str | None = None
    router: str | None = None
    shared: str | None = None
    shared_gate: str | None = None
    shared_width: str | None = None
    n_experts: str = "num_local_experts"
    d_ffn: str = "intermediate_size"
    softcap: str | None = None
    logit_softcap: str | None = None
    logit_divisor: str | None = None
    multipliers: tuple[str, ...] = ()
    when: tuple[tuple[str, Any], ...] = ()
    needs: tuple[Needs, ...] = ()
    notes: tuple[str, ...] = field(default=())
