"""Tiny tokenizers and models as files of Hugging Face's libraries and of llama.cpp."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import safetensors.torch
import tokenizers
import transformers


def trained_tokenizer(folder: Path, text: str) -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def saved_model(folder: Path, tokenizer_folder: Path, config: Any, dtype: Any = None) -> Path:
    shutil.copytree(tokenizer_folder, folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder)
    return folder


def as_gguf(model: Path, path: Path) -> Path:
    """The Llama of a folder, by the names and layouts of llama.cpp, its weights in float32."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 399)
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    for kind in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{kind}_token_id")(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weights in safetensors.torch.load_file(model / "model.safetensors").items():
        for kind, count in zip("qk", heads, strict=True):
            if f"{kind}_proj" in name:  # llama.cpp has the two halves of a head's pairs interleaved
                pairs = weights.reshape(count, 2, -1, weights.shape[1])
                weights = pairs.swapaxes(1, 2).reshape(weights.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weights.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
