"""What each Hugging Face architecture is in Megatron: tables, each read in both directions.

Axes, as a letter each in a tensor's shape:

    V vocabulary    H hidden size    F feed-forward size    U gate and up, 2 F
    Q all query heads    K all key heads, or all value heads    D one head

Written against transformers 5.24 (and the config.json of its versions 4) and megatron-core 0.19.2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = [
    "ARCHITECTURES",
    "COMMON_ARGUMENTS",
    "EMBEDDING",
    "HARMLESS",
    "OUTPUT",
    "ROPE_TYPES",
    "UNSUPPORTED",
    "Architecture",
    "Field",
    "Refusal",
    "RopeType",
    "TensorRow",
]

Config = Mapping[str, Any]
"""A config.json."""


@dataclass(frozen=True)
class TensorRow:
    """Tensors of a Hugging Face model and the one tensor that they are in a Megatron checkpoint."""

    parts: tuple[tuple[str, str], ...]
    """(name, shape) each. A name with `*` is one tensor per layer."""
    megatron: str
    """Its name in a torch_dist checkpoint, the same for both of Megatron's layer specs. What is one
    per layer is one tensor there, with the layers as its first axis."""
    grouped: bool = False
    """Several parts lie one after another along their first axis. Grouped: for each query group
    anew."""

    @property
    def per_layer(self) -> bool:
        return "*" in self.parts[0][0]

    @property
    def padded(self) -> bool:
        """Whether Megatron pads the first axis, the vocabulary."""
        return self.parts[0][1][0] == "V"

    def names(self, layer: int) -> list[str]:
        """Of the parts in one layer."""
        return [name.replace("*", str(layer)) for name, _ in self.parts]


def _layer(*parts: str, into: str, grouped: bool = False) -> TensorRow:
    """A row of one tensor per layer; parts as "name SHAPE"."""
    named = tuple((f"model.layers.*.{name}", shape) for name, shape in map(str.split, parts))
    return TensorRow(named, f"decoder.layers.{into}", grouped)


@dataclass(frozen=True)
class Field:
    """A field of config.json and the Megatron argument of the same value."""

    hf: str
    megatron: str
    kind: type
    absent: Any = ...
    """What transformers takes where config.json lacks the field; `...`: it must be there. A
    function is given the config."""
    opposite: bool = False
    """The argument is true where the field is false."""


@dataclass(frozen=True)
class Refusal:
    """A field of config.json with values that Megatron can't express."""

    field: str
    allowed: Callable[[Any, Config], bool]
    reason: str
    """Why other values are refused: ends a sentence."""
    absent: Any = None
    """What transformers takes where config.json lacks the field."""


@dataclass(frozen=True)
class RopeType:
    """A `rope_type` of transformers' and Megatron's arguments for it."""

    arguments: Mapping[str, Any]
    """What tells it from the others."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Its parameters and the arguments of the same values."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes where config.json lacks one."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Other parameters, which Megatron has no arguments for, and their values there."""
    interleaved: bool = True
    """Whether Megatron has it for interleaved RoPE."""


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers' for causal language models."""

    model_type: str
    class_name: str
    tensors: tuple[TensorRow, ...]
    """Those of tied embeddings lack OUTPUT's."""
    fields: tuple[Field, ...]
    refusals: tuple[Refusal, ...]
    arguments: Mapping[str, Any]
    """Megatron's arguments that tell it from other architectures."""
    rope_defaults: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    )


# ------------------------------------------------------------------------------------- tensors

EMBEDDING = TensorRow(
    (("model.embed_tokens.weight", "VH"),),
    "embedding.word_embeddings.weight",
)
OUTPUT = TensorRow((("lm_head.weight", "VH"),), "output_layer.weight")

_LLAMA_TENSORS = (
    EMBEDDING,
    _layer(
        "input_layernorm.weight H",
        into="self_attention.linear_qkv.layer_norm_weight",
    ),
    _layer(
        "self_attn.q_proj.weight QH",
        "self_attn.k_proj.weight KH",
        "self_attn.v_proj.weight KH",
        into="self_attention.linear_qkv.weight",
        grouped=True,
    ),
    _layer(
        "self_attn.o_proj.weight HQ",
        into="self_attention.linear_proj.weight",
    ),
    _layer(
        "post_attention_layernorm.weight H",
        into="mlp.linear_fc1.layer_norm_weight",
    ),
    _layer(
        "mlp.gate_proj.weight FH",
        "mlp.up_proj.weight FH",
        into="mlp.linear_fc1.weight",
    ),
    _layer(
        "mlp.down_proj.weight HF",
        into="mlp.linear_fc2.weight",
    ),
    TensorRow((("model.norm.weight", "H"),), "decoder.final_layernorm.weight"),
    OUTPUT,
)
_QKV_BIAS = _layer(
    "self_attn.q_proj.bias Q",
    "self_attn.k_proj.bias K",
    "self_attn.v_proj.bias K",
    into="self_attention.linear_qkv.bias",
    grouped=True,
)
_QK_NORMS = (
    _layer("self_attn.q_norm.weight D", into="self_attention.q_layernorm.weight"),
    _layer("self_attn.k_norm.weight D", into="self_attention.k_layernorm.weight"),
)
_GATE_UP = _layer("mlp.gate_up_proj.weight UH", into="mlp.linear_fc1.weight")

# -------------------------------------------------------------------------------------- config


def _one_head(config: Config) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


_FIELDS = (
    Field("vocab_size", "vocab_size", int),
    Field("hidden_size", "hidden_size", int),
    Field("num_hidden_layers", "num_layers", int),
    Field("intermediate_size", "ffn_hidden_size", int),
    Field("num_attention_heads", "num_attention_heads", int),
    Field(
        "num_key_value_heads",
        "num_query_groups",
        int,
        absent=lambda config: config["num_attention_heads"],
    ),
    Field("head_dim", "kv_channels", int, absent=_one_head),
    Field("max_position_embeddings", "max_position_embeddings", int),
    Field("rms_norm_eps", "layernorm_epsilon", float, absent=1e-6),
    Field(
        "tie_word_embeddings",
        "untie_embeddings_and_output_weights",
        bool,
        absent=False,
        opposite=True,
    ),
    Field("attention_dropout", "attention_dropout", float, absent=0.0),
    Field("initializer_range", "init_method_std", float, absent=0.02),
)


def _in(*values: Any) -> Callable[[Any, Config], bool]:
    return lambda value, config: value in values


def _all_full(layer_types: Any, config: Config) -> bool:
    return layer_types is None or all(layer == "full_attention" for layer in layer_types)


def _plain(quantization: Any, config: Config) -> bool:
    """transformers leaves the field behind when it has made plain weights of a GGUF file."""
    return quantization is None or quantization.get("quant_method") == "gguf"


def _longer_than_context(window: Any, config: Config) -> bool:
    return window is None or window >= config["max_position_embeddings"]


def _unless_used(window: Any, config: Config) -> bool:
    return not config.get("use_sliding_window") or _longer_than_context(window, config)


_NO_WINDOW = "Megatron's attention without Transformer Engine has no sliding window"
_COMMON_REFUSALS = (
    Refusal("hidden_act", _in("silu"), "the tables here have SwiGLU alone", absent="silu"),
    Refusal(
        "quantization_config",
        _plain,
        "dequantize the weights by transformers first, and save them by save_pretrained",
    ),
    Refusal("layer_types", _all_full, _NO_WINDOW),
    Refusal("auto_map", _in(None), "code that comes with a model is never run"),
)
_NO_O_BIAS = Refusal(
    "attention_bias",
    _in(False, None),
    "Megatron has no bias on the attention's output without one on the MLP's layers",
)
_LLAMA_REFUSALS = (
    *_COMMON_REFUSALS,
    _NO_O_BIAS,
    Refusal("mlp_bias", _in(False, None), "the tables here have no biases of the MLP"),
    Refusal(
        "rope_interleaved", _in(False, None), "transformers' Llama rotates halves and ignores it"
    ),
)
_QWEN_REFUSALS = (
    *_COMMON_REFUSALS,
    Refusal("sliding_window", _unless_used, f"{_NO_WINDOW}, and use_sliding_window is true"),
    Refusal("use_mrope", _in(False, None), "Qwen's text models have one position a token"),
)

_ROPE = {
    "position_embedding_type": "rope",
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
}
ROPE_TYPES: Mapping[str, RopeType] = {
    "default": RopeType(_ROPE),
    "linear": RopeType(
        {"position_embedding_type": "rope", "use_rope_scaling": False},
        {"factor": "rotary_seq_len_interpolation_factor"},
    ),
    "llama3": RopeType(
        {**_ROPE, "use_rope_scaling": True},
        {"factor": "rope_scaling_factor"},
        fixed={
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": RopeType(
        {**_ROPE, "position_embedding_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.0},
        {
            "factor": "rotary_scaling_factor",
            "original_max_position_embeddings": "yarn_original_max_position_embeddings",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
            "truncate": "yarn_correction_range_round_to_int",
        },
        absent={"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
        interleaved=False,
    ),
}

# ------------------------------------------------------------------------------- architectures

_PLAIN = {
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
}

LLAMA = Architecture(
    "llama", "LlamaForCausalLM", _LLAMA_TENSORS, _FIELDS, _LLAMA_REFUSALS, arguments=_PLAIN
)
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    class_name="MistralForCausalLM",
    refusals=(
        *_COMMON_REFUSALS,
        Refusal("sliding_window", _longer_than_context, _NO_WINDOW, absent=4096),
    ),
)
QWEN2 = Architecture(
    "qwen2",
    "Qwen2ForCausalLM",
    (*_LLAMA_TENSORS, _QKV_BIAS),
    _FIELDS,
    _QWEN_REFUSALS,
    arguments={**_PLAIN, "add_qkv_bias": True},
)
QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    (*_LLAMA_TENSORS, *_QK_NORMS),
    tuple(replace(row, absent=128) if row.hf == "head_dim" else row for row in _FIELDS),
    (*_QWEN_REFUSALS, _NO_O_BIAS),
    arguments={**_PLAIN, "qk_layernorm": True},
)
GLM = Architecture(
    "glm",
    "GlmForCausalLM",
    (
        *(_GATE_UP if row.megatron == _GATE_UP.megatron else row for row in _LLAMA_TENSORS),
        _QKV_BIAS,
    ),
    tuple(
        replace(row, absent={"head_dim": 128, "rms_norm_eps": 1.5625e-7}[row.hf])
        if row.hf in ("head_dim", "rms_norm_eps")
        else row
        for row in _FIELDS
    ),
    (
        *_COMMON_REFUSALS,
        Refusal(
            "attention_bias",
            _in(True),
            "GLM-4's queries, keys and values have biases in the tables here",
            absent=True,
        ),
    ),
    arguments={"add_qkv_bias": True, "qk_layernorm": False, "rotary_interleaved": True},
    rope_defaults={"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
)

ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.model_type: architecture for architecture in (LLAMA, MISTRAL, QWEN2, QWEN3, GLM)
}
"""By config.json's `model_type`. Of those that are the same to Megatron, the first is exported."""

UNSUPPORTED: Mapping[str, str] = {
    "glm4": "Megatron 0.19.2 has no norms after attention and MLP (GLM-4-0414's sandwich norms)",
    "gemma": "its norms add 1 to the weights, and the tables here have SwiGLU alone",
    "gemma2": "Megatron 0.19.2 has no norms after attention and MLP, and no capped logits",
    "gemma3": "Megatron 0.19.2 has no norms after attention and MLP",
    "mixtral": "the tables here have no mixture of experts",
    "qwen2_moe": "the tables here have no mixture of experts",
    "qwen3_moe": "the tables here have no mixture of experts",
    "phi3": "the tables here have no fused query, key and value weights",
}
"""Why well-known model types are refused."""

HARMLESS = frozenset(
    """
    architectures bos_token_id chunk_size_feed_forward dtype eos_token_id is_decoder
    is_encoder_decoder is_llama_config max_window_layers model_type output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type return_dict rope_parameters
    rope_scaling rope_theta partial_rotary_factor task_specific_params tokenizer_class torch_dtype
    transformers.js_config transformers_version use_cache use_sliding_window id2label label2id
    max_sequence_length unk_token_id
    finetuning_task prefix sep_token_id decoder_start_token_id
    do_sample early_stopping length_penalty max_length min_length no_repeat_ngram_size num_beams
    num_return_sequences repetition_penalty temperature top_k top_p typical_p
    """.split()
)
"""Fields of config.json that don't change the forward pass, and those that `rope_parameters` is
made of. Those that begin with `_` are transformers' own."""

COMMON_ARGUMENTS: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "multi_latent_attention": False,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "no_rope_freq": None,
    "num_experts": None,
    "mtp_num_layers": None,
    "hybrid_layer_pattern": None,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "use_mup": False,
    "spec": None,
}
"""Megatron's arguments that all architectures here share; a checkpoint that lacks one has this."""
