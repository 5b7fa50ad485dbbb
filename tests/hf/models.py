"""Tiny random models of every architecture."""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "vocab_size": 301,  # 384 with Megatron's padding
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, rms_norm_eps=1e-3),
    "llama tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=16),
    "llama 3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama linear": lambda: LlamaConfig(
        **{**SIZES, "num_key_value_heads": 8},
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, rope_parameters={"rope_theta": 1e6}),
    "qwen2 tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 yarn": lambda: Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3 yarn": lambda: Qwen3Config(
        **SIZES,
        head_dim=16,
        rope_parameters={**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "qwen3 tied": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True, head_dim=32),
    "glm": lambda: GlmConfig(**SIZES, head_dim=16),
}


def random_model(
    config: PreTrainedConfig, seed: int, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """Random in every weight, norms and biases too, and not small, so that mistakes show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return model
