"""Where the parts of a decoder are found, for the families that our own block can run. A family is a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from luthier.model import lean

if TYPE_CHECKING:
    from luthier.kernels.pointwise import Activation


@dataclass(frozen=True)
class Family:
    """Names inside a transformers module: of the decoder's own parts, then of a layer's; and what the layer computes.

    The block they describe: x += out(attention(rotary(qkv(norm(x))))); x += down(act(gate(norm(x))) · up(norm(x))).
    Norms are RMS norms, or LayerNorms where the module has those. Linear layers may have biases.
    """

    layers: str = "layers"
    norm: str = "norm"
    rotary: str = "rotary_emb"
    attention_norm: str = "input_layernorm"
    query_norm: str | None = None  # of each head, before it is turned
    key_norm: str | None = None
    attention_end: str | None = None  # norm of what attention adds
    mlp_end: str | None = None  # and of what the MLP adds
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    mlp_norm: str | None = "post_attention_layernorm"  # None: the MLP reads what attention reads
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    eps: str = "rms_norm_eps"  # of the config
    act: str = "hidden_act"  # of the config
    gated: bool = True  # False: down(act(up(norm(x)))), and `gate_up` names the one layer
    parallel: bool = False  # both halves read the layer's input, and both are added to it
    grouped: bool = False  # q|k|v holds query, key and value of one head, then those of the next
    gain: float = 0.0  # what is added to the weights of norms
    scale: str | None = None  # of the config: 1 / scale² of attention, where that is not a head's size
    turned: str | None = None  # of the config, for each layer: 0, whose heads are not turned, or what `rotary` is told
    neighbours: bool = False  # rotary embedding turns features 2i and 2i + 1 together, not the halves of a head
    needs: dict[str, Any] = field(default_factory=dict)  # what the config has to say

    @property
    def is_llama(self) -> bool:
        """Whether a layer computes what Llama's does, with separate layers for q, k and v, for gate and for up."""
        names = {"needs", "eps", "act", "layers", "norm", "rotary"}  # where things are
        same = all(getattr(self, f.name) == f.default for f in fields(self) if f.name not in names)
        return same and self.eps == Family.eps


_LLAMA = Family()
_GEMMA_2 = Family(
    attention_end="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_end="post_feedforward_layernorm",
    act="hidden_activation",
    gain=1.0,
    scale="query_pre_attn_scalar",
    needs={"attn_logit_softcapping": None},
)
_GLM = Family(gate_up=("mlp.gate_up_proj",), neighbours=True)
_NEOX = Family(
    norm="final_layer_norm",
    qkv=("attention.query_key_value",),
    out="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    eps="layer_norm_eps",
    gated=False,
    grouped=True,
    needs={"use_parallel_residual": False},
)

FAMILIES: dict[str, tuple[Family, ...]] = {
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "qwen2": (_LLAMA,),
    "qwen3": (Family(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),),
    "phi": (
        Family(
            norm="final_layernorm",
            out="self_attn.dense",
            mlp_norm=None,
            gate_up=("mlp.fc1",),
            down="mlp.fc2",
            eps="layer_norm_eps",
            gated=False,
            parallel=True,
            needs={"qk_layernorm": False},
        ),
    ),
    "phi3": (Family(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),),
    "falcon": (
        Family(
            layers="h",
            norm="ln_f",
            qkv=("self_attention.query_key_value",),
            out="self_attention.dense",
            mlp_norm=None,
            gate_up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            eps="layer_norm_epsilon",
            act="activation",
            gated=False,
            parallel=True,
            needs={"alibi": False, "new_decoder_architecture": False, "parallel_attn": True, "multi_query": True},
        ),
    ),
    "gemma": (Family(gain=1.0),),
    "gemma2": (_GEMMA_2,),
    "gemma3_text": (
        replace(
            _GEMMA_2,
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
            turned="layer_types",
            needs=_GEMMA_2.needs | {"use_bidirectional_attention": False},
        ),
    ),
    "glm": (_GLM,),
    "glm4": (replace(_GLM, attention_end="post_self_attn_layernorm", mlp_end="post_mlp_layernorm"),),
    "gpt_neox": (_NEOX, replace(_NEOX, parallel=True, needs={"use_parallel_residual": True})),
    "smollm3": (Family(turned="no_rope_layers"),),
    "stablelm": (Family(eps="layer_norm_eps", needs={"qk_layernorm": False, "use_parallel_residual": False}),),
}

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""By transformers' names; those of the same function differ in how they write it."""


def find(config: Any) -> Family | None:
    """The family of a transformers config, or None if our block does not compute what that model does."""
    rows = FAMILIES.get(config.model_type, ())
    return next((row for row in rows if _fits(row, config)), None)


def of_file(config: Mapping[str, Any]) -> Family | None:
    """The family of a model's `config.json`; transformers is asked only for what the file leaves out."""
    rows = FAMILIES.get(config.get("model_type", ""), ())
    if not rows:
        return None
    said = all(name in config for row in rows for name in (row.act, *row.needs))
    return find(SimpleNamespace(**config) if said else _whole(config))


def window_of_file(config: Mapping[str, Any]) -> int | None:
    """`window` of a model's `config.json`."""
    return None if config.get("sliding_window", "") is None else window(_whole(config))


def is_llama(config: Mapping[str, Any]) -> bool:
    """Whether all models of the type that a `config.json` names are `Family.is_llama`."""
    rows = FAMILIES.get(config.get("model_type", ""), ())
    return bool(rows) and all(row.is_llama for row in rows)


def _whole(config: Mapping[str, Any]) -> Any:
    """The transformers config of a `config.json`, with the defaults of what that leaves out."""
    with lean.importing():
        from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))


def _fits(row: Family, config: Any) -> bool:
    known = getattr(config, row.act, None) in _ACTIVATIONS
    return known and all(getattr(config, name, None) == value for name, value in row.needs.items())


def activation(family: Family, config: Any) -> Activation:
    """What is between the products of a layer's MLP."""
    return _ACTIVATIONS[getattr(config, family.act)]


def window(config: Any) -> int | None:
    """The most tokens a row may have before some layer stops seeing its start; None: all of them."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)
