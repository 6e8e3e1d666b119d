"""One declarative adapter a family: the names under which its parts stand in the Transformers model (`names` has what
they mean). Mixtures of experts are in `mixtures`, and so is what is known and refused."""

from dataclasses import replace

from phasequant.arch.mixtures import MIXTURES
from phasequant.arch.names import Family, GroupNames, Needs

POST_NORM = (
    GroupNames("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    GroupNames("o", ("self_attn.o_proj",)),
    GroupNames("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"),
    GroupNames("down", ("mlp.down_proj",)),
)
ONE_MORE = "norms multiply by 1 + w: w holds the folded gain less 1"
OUTPUT_NORMS = (
    "the sublayers' outputs are normalized before they are added: rotations run online, where attention and MLP read"
)
MEAN_OFF = "LayerNorms take off the mean: rotations run online, after the norms"
NO_UP = "the MLP has no gate, and no scale goes through its activation: the input of its second linear is not scaled"
ONE_NORM = "attention and MLP read one norm: scales of the input are one for both"


def _behind(groups: tuple[GroupNames, ...], name: str, norm: str | None) -> tuple[GroupNames, ...]:
    """The groups, one of them behind another norm."""
    return tuple(replace(group, norm=norm) if group.name == name else group for group in groups)


STABLELM = Family(
    "StableLM",
    ("stablelm",),
    norm="layer",
    qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
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
    ups=("fc1",),  # relu(c·z) = c·relu(z)
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
        notes=(ONE_MORE, OUTPUT_NORMS),
    ),
    replace(
        STABLELM,
        name="StableLM, parallel",
        groups=_behind(STABLELM.groups, "gate_up", "input_layernorm"),
        when=(("use_parallel_residual", True),),
        notes=(MEAN_OFF, ONE_NORM),
    ),
    STABLELM,
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
        ups=(),
        writers=("self_attn.dense", "mlp.fc2"),
        qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        notes=(MEAN_OFF, ONE_NORM, NO_UP),
    ),
    OPT,
    replace(OPT, name="OPT, no ReLU", ups=(), when=(), notes=(MEAN_OFF, NO_UP)),
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
        ups=(),
        writers=("attention.dense", "mlp.dense_4h_to_h"),
        notes=(
            MEAN_OFF,
            "q, k and v are rows of one linear: no map of values is folded (no R2), and o's input is not scaled",
            NO_UP,
        ),
    ),
    Family("SmolLM3", ("smollm3",)),
    Family(
        "Granite",
        ("granite",),
        logit_divisor="logits_scaling",
        multipliers=("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    ),
    Family(
        "OLMo 2",
        ("olmo2",),
        groups=_behind(_behind(POST_NORM, "qkv", None), "gate_up", None),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
        notes=(
            OUTPUT_NORMS,
            "no norm stands before attention and MLP: they read the residual stream itself, whose channels no gain can "
            "scale, so that scales are folded before down and o alone",
        ),
    ),
    Family(
        "Phi-3",
        ("phi3",),
        groups=(
            GroupNames("qkv", ("self_attn.qkv_proj",), "input_layernorm"),
            GroupNames("o", ("self_attn.o_proj",)),
            GroupNames("gate_up", ("mlp.gate_up_proj",), "post_attention_layernorm"),
            GroupNames("down", ("mlp.down_proj",)),
        ),
        value="self_attn.qkv_proj",
        ups=("mlp.gate_up_proj",),
        fused=True,
        notes=(
            "q, k and v are rows of one linear, gate and up of another: what is folded into v and up goes into theirs",
        ),
    ),
    *MIXTURES,
)

GROUPS = ("qkv", "o", "gate_up", "down")
"""The groups every family has, in the order of computation."""

__all__ = ["FAMILIES", "GROUPS", "Family", "GroupNames", "Needs"]
