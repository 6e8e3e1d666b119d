"""One declarative adapter a family: the names under which its parts stand in the Transformers model. Nothing runs here.

A family lists, relative to a decoder block, which linears read the same input (a group), which norm that input comes
from, and where attention lives. Most share one layout, pre-norm with gated MLP:

    x ─ norm ─ {q,k,v} ─ attention ─ {o} ─(+)─ norm ─ {gate,up} ─ act·mul ─ {down} ─(+)─

and where one differs, a field says so, which transforms ask before they touch a place:

    norm         rms: n(x)·w        rms+1: n(x)·(1 + w), Gemma's        layer: mean taken off too, and a bias
    post_norms   norms of the sublayers' outputs, before they are added to the residual stream
    value, up    the linear whose rows can scale or rotate what o, or down, reads; None where nothing can

Only `norm` rms and rms+1 without `post_norms` let a rotation of the residual stream be folded. Two groups that name one
norm read one input: what is folded into that norm is shared by both.
"""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class GroupNames:
    """Linears of a block that read one input, and the norm (if any) whose output that input is."""

    name: str
    linears: tuple[str, ...]
    norm: str | None = None


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

    `when` chooses among families of one model type by attributes of the config; `d_ffn`, `softcap` and `logit_softcap`
    name attributes of it: the width inside the MLP, and the caps of attention scores and of logits.
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
    up: str | None = "mlp.up_proj"
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    qk_norms: tuple[str, ...] = ()
    d_ffn: str = "intermediate_size"
    softcap: str | None = None
    logit_softcap: str | None = None
    when: tuple[tuple[str, Any], ...] = ()
    needs: tuple[Needs, ...] = ()
    notes: tuple[str, ...] = field(default=())


POST_NORM = (
    GroupNames("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    GroupNames("o", ("self_attn.o_proj",)),
    GroupNames("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"),
    GroupNames("down", ("mlp.down_proj",)),
)
ONE_MORE = "norms multiply by 1 + w: w holds the folded gain less 1"
OUTPUT_NORMS = (
    "the sublayers' outputs are normalized before they are added: rotations run online, after the input norms"
)
NORMED_QK = (
    "q and k are normalized per head: no rotation can be folded through those norms, so R3 is never folded into q and "
    "k; it runs online, after the norms and RoPE"
)

MEAN_OFF = "LayerNorms take off the mean: rotations run online, after the norms"
NO_UP = "the MLP has no gate, and no scale goes through its activation: the input of its second linear is not scaled"
ONE_NORM = "attention and MLP read one norm: scales of the input are one for both"


def _behind(groups: tuple[GroupNames, ...], name: str, norm: str) -> tuple[GroupNames, ...]:
    """The groups, one of them behind another norm."""
    return tuple(replace(group, norm=norm) if group.name == name else group for group in groups)


STABLELM = Family(
    "StableLM",
    ("stablelm",),
    norm="layer",
    qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    when=(("use_parallel_residual", False),),
    notes=(MEAN_OFF,),
)

OPT = Family(
    "OPT",
    ("opt",),
    decoder="model.decoder",
    blocks="model.decoder.layers",
    embeddings="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    groups=(
        GroupNames("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn_layer_norm"),
        GroupNames("o", ("self_attn.out_proj",)),
        GroupNames("gate_up", ("fc1",), "final_layer_norm"),
        GroupNames("down", ("fc2",)),
    ),
    norm="layer",
    up="fc1",  # relu(c·z) = c·relu(z)
    writers=("self_attn.out_proj", "fc2"),
    d_ffn="ffn_dim",
    when=(("activation_function", "relu"),),
    needs=(
        Needs("do_layer_norm_before", "its norms stand after the sublayers, on the residual stream itself", True),
        Needs(
            "word_embed_proj_dim",
            "its embeddings are of another width than its blocks and go through projections",
            same_as="hidden_size",
        ),
        Needs("layer_norm_elementwise_affine", "its norms have no gain that scales could be folded into", True),
        Needs("_remove_final_layer_norm", "it has no norm before the head", False),
    ),
    notes=(MEAN_OFF, "scales of fc2's input are folded through the ReLU into fc1's rows"),
)

FAMILIES: tuple[Family, ...] = (
    Family("LLaMA", ("llama",)),
    Family("Mistral", ("mistral",)),
    Family("Qwen2", ("qwen2",), notes=("q, k and v have biases; v's is rotated with its weights",)),
    Family(
        "Qwen3",
        ("qwen3",),
        qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
        notes=(NORMED_QK,),
    ),
    Family("Gemma", ("gemma",), norm="rms+1", notes=(ONE_MORE,)),
    Family(
        "Gemma 2",
        ("gemma2",),
        groups=POST_NORM,
        norm="rms+1",
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        softcap="attn_logit_softcapping",
        logit_softcap="final_logit_softcapping",
        notes=(ONE_MORE, OUTPUT_NORMS),
    ),
    Family(
        "Gemma 3",
        ("gemma3_text",),
        groups=POST_NORM,
        norm="rms+1",
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
        softcap="attn_logit_softcapping",
        logit_softcap="final_logit_softcapping",
        notes=(ONE_MORE, OUTPUT_NORMS, NORMED_QK),
    ),
    STABLELM,
    replace(
        STABLELM,
        name="StableLM, parallel",
        groups=_behind(STABLELM.groups, "gate_up", "input_layernorm"),
        when=(("use_parallel_residual", True),),
        notes=(MEAN_OFF, ONE_NORM),
    ),
    Family(
        "Phi",
        ("phi",),
        final_norm="model.final_layernorm",
        groups=(
            GroupNames("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
            GroupNames("o", ("self_attn.dense",)),
            GroupNames("gate_up", ("mlp.fc1",), "input_layernorm"),
            GroupNames("down", ("mlp.fc2",)),
        ),
        norm="layer",
        up=None,
        writers=("self_attn.dense", "mlp.fc2"),
        qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        notes=(MEAN_OFF, ONE_NORM, NO_UP),
    ),
    OPT,
    replace(OPT, name="OPT, no ReLU", up=None, when=(), notes=(MEAN_OFF, NO_UP)),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        decoder="gpt_neox",
        blocks="gpt_neox.layers",
        embeddings="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        groups=(
            GroupNames("qkv", ("attention.query_key_value",), "input_layernorm"),
            GroupNames("o", ("attention.dense",)),
            GroupNames("gate_up", ("mlp.dense_h_to_4h",), "post_attention_layernorm"),
            GroupNames("down", ("mlp.dense_4h_to_h",)),
        ),
        norm="layer",
        value=None,
        up=None,
        writers=("attention.dense", "mlp.dense_4h_to_h"),
        notes=(
            MEAN_OFF,
            "q, k and v are rows of one linear: no map of values is folded (no R2), and o's input is not scaled",
            NO_UP,
        ),
    ),
)

GROUPS = ("qkv", "o", "gate_up", "down")
"""The groups every family has, in the order of computation."""
