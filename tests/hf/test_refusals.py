"""What Megatron or Hugging Face can't express, and files that are damaged or hostile."""

import argparse
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import JobRunner
from models import CONFIGS, YARN, random_model
from safetensors.torch import load_file, save_file

from megatron_pd.errors import UserError
from megatron_pd.hf.architectures import ARCHITECTURES, UNSUPPORTED
from megatron_pd.hf.checkpoint import TorchDistCheckpoint
from megatron_pd.hf.config import config_of_arguments, read_config
from megatron_pd.hf.export_hf import export_hf
from megatron_pd.hf.import_hf import import_hf

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def config_json(name: str) -> dict[str, Any]:
    return json.loads(CONFIGS[name]().to_json_string())


# ------------------------------------------------------------------------------- config.json

ROPE = {"rope_theta": 10000.0}
REFUSED = [
    ("llama", "hidden_act", "gelu"),
    ("llama", "attention_bias", True),
    ("llama", "mlp_bias", True),
    ("llama", "rope_interleaved", True),
    ("llama", "quantization_config", {"quant_method": "gptq"}),
    ("llama", "quantization_config", "gguf"),
    ("llama", "auto_map", {"AutoModelForCausalLM": "modeling.My"}),
    ("llama", "layer_types", ["full_attention", "sliding_attention"]),
    ("llama", "layer_types", 3),
    ("llama", "final_logit_softcapping", 30.0),
    ("llama", "vocab_size", None),
    ("llama", "vocab_size", -5),
    ("llama", "hidden_size", "64"),
    ("llama", "num_hidden_layers", True),
    ("llama", "num_attention_heads", 0),
    ("llama", "num_key_value_heads", 3),
    ("llama", "intermediate_size", 1 << 40),
    ("llama", "head_dim", 16.5),
    ("llama", "max_position_embeddings", [4096]),
    ("llama", "rms_norm_eps", float("nan")),
    ("llama", "rms_norm_eps", "1e-5"),
    ("llama", "rms_norm_eps", 10**400),
    ("llama", "tie_word_embeddings", "yes"),
    ("mistral", "sliding_window", 32),
    ("mistral", "sliding_window", "x"),
    ("qwen3", "attention_bias", True),
    ("glm", "attention_bias", False),
]
REFUSED_ROPE = [
    ("rope_type", {**ROPE, "rope_type": "longrope", "factor": 4.0}),
    ("original_max_position_embeddings", {**ROPE, "rope_type": "yarn", "factor": 4.0}),
    ("attention_factor", {**YARN, "attention_factor": 1.5}),
    ("truncate", {**YARN, "truncate": "no"}),
    ("rope_type", {**ROPE, "rope_type": "dynamic", "factor": 4.0}),
    ("rope_type", {**ROPE, "rope_type": ["default"]}),
    ("low_freq_factor", {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}),
    ("factor", {**ROPE, "rope_type": "linear"}),
    ("factor", {**ROPE, "rope_type": "linear", "factor": 0}),
    ("rope_theta", {"rope_theta": "10000", "rope_type": "default"}),
    ("mrope_section", {**ROPE, "rope_type": "default", "mrope_section": [16, 24, 24]}),
    ("partial_rotary_factor", {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}),
    ("rope_parameters", ["default"]),
]


@pytest.mark.parametrize("name, field, value", REFUSED)
def test_refused_field(name: str, field: str, value: Any) -> None:
    config = config_json(name) | {field: value}
    with pytest.raises(UserError, match=rf"^here: .*\b{field}\b|^here has no {field}"):
        read_config(config, "here")


@pytest.mark.parametrize("parameter, rope", REFUSED_ROPE)
def test_refused_rope(parameter: str, rope: Any) -> None:
    with pytest.raises(UserError, match=rf"^here: .*\b{parameter}\b"):
        read_config(config_json("llama") | {"rope_parameters": rope}, "here")


def test_interleaved_yarn() -> None:
    config = config_json("glm") | {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}
    with pytest.raises(UserError, match=r"'yarn', and Megatron .* for interleaved RoPE"):
        read_config(config, "here")


def test_a_sliding_window_that_is_used() -> None:
    config = config_json("qwen2") | {"use_sliding_window": True, "sliding_window": 32}
    with pytest.raises(UserError, match=r"sliding_window is 32, .*use_sliding_window is true"):
        read_config(config, "here")
    for harmless in ({"use_sliding_window": False}, {"sliding_window": 64}):
        read_config(config | harmless, "here")


def test_a_default_that_is_refused() -> None:
    """A config.json of Mistral's that says nothing has a window all the same."""
    config = config_json("mistral") | {"max_position_embeddings": 8192}
    del config["sliding_window"]
    with pytest.raises(UserError, match=r"sliding_window is 4096 \(transformers' default\)"):
        read_config(config, "here")


@pytest.mark.parametrize("model_type", [*UNSUPPORTED, "bert", None, ["llama"]])
def test_refused_model_type(model_type: Any) -> None:
    with pytest.raises(UserError, match=r"model_type .* is not supported .*llama, mistral"):
        read_config(config_json("llama") | {"model_type": model_type}, "here")


@pytest.mark.parametrize("name", CONFIGS)
def test_all_of_transformers_fields_are_known(name: str) -> None:
    assert read_config(config_json(name), "here").values["vocab_size"] == 301


# ------------------------------------------------------------------------ Megatron's arguments

ARGUMENTS = [
    ("normalization", "LayerNorm"),
    ("swiglu", False),
    ("add_bias_linear", True),
    ("position_embedding_type", "learned_absolute"),
    ("num_experts", 8),
    ("multi_latent_attention", True),
    ("qk_l2_norm", True),
    ("softmax_type", "learnable"),
    ("window_size", (128, 0)),
    ("layernorm_zero_centered_gamma", True),
    ("mtp_num_layers", 1),
]


def arguments_of(name: str) -> argparse.Namespace:
    return argparse.Namespace(**read_config(config_json(name), "here").arguments())


@pytest.mark.parametrize("name, value", ARGUMENTS)
def test_refused_argument(name: str, value: Any) -> None:
    args = arguments_of("llama")
    setattr(args, name, value)
    with pytest.raises(UserError, match=f"^there: .*{name} = "):
        config_of_arguments(args, 301, {}, "there")


def test_refused_combinations_of_arguments() -> None:
    args = arguments_of("qwen3")
    args.add_qkv_bias = True
    with pytest.raises(UserError, match="add_qkv_bias = True, qk_layernorm = True"):
        config_of_arguments(args, 301, {}, "there")
    args = arguments_of("llama 3")
    args.rotary_seq_len_interpolation_factor = 2
    with pytest.raises(UserError, match=r"use_rope_scaling = True, rotary_seq_len.*factor = 2"):
        config_of_arguments(args, 301, {}, "there")


@pytest.mark.parametrize("name", CONFIGS)
def test_arguments_tell_the_architecture(name: str) -> None:
    config = read_config(config_json(name), "here")
    kept = {"model_type": "mistral"} if name == "mistral" else {}
    found = config_of_arguments(arguments_of(name), 301, kept, "there")
    assert (found.architecture, found.values, found.rope) == (
        config.architecture,
        config.values,
        config.rope,
    )


def test_older_arguments() -> None:
    """What a checkpoint of an older Megatron lacks is what it was."""
    args = arguments_of("llama")
    for name in ("mtp_num_layers", "use_mup", "softmax_type", "kv_channels"):
        delattr(args, name)
    found = config_of_arguments(args, 301, {}, "there")
    assert found.architecture is ARCHITECTURES["llama"] and found.values["head_dim"] == 8


# ------------------------------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model(CONFIGS["llama"](), 1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def rewritten(folder: Path, change: Callable[[bytes], bytes]) -> None:
    (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def indexed(folder: Path, file: Any) -> None:
    names = load_file(folder / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


Q = "model.layers.2.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda f: rewritten(f, lambda data: data[:-100]), "no sound safetensors file"),
    "cut in the header": (lambda f: rewritten(f, lambda data: data[:50]), "no sound safetensors"),
    "empty": (lambda f: rewritten(f, lambda data: b""), "no sound safetensors"),
    "a long header": (
        lambda f: rewritten(f, lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
        "no sound safetensors",
    ),
    "a pickle": (lambda f: rewritten(f, lambda data: pickle.dumps([1] * 99)), "no sound safe"),
    "offsets": (
        lambda f: rewritten(
            f, lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,')
        ),
        "no sound safetensors",
    ),
    "a missing tensor": (lambda f: resave(f, lambda t: t.pop(Q)), f"has no tensor {Q}"),
    "an extra tensor": (
        lambda f: resave(f, lambda t: t.update(other=torch.ones(3))),
        "other have no place in a LlamaForCausalLM",
    ),
    "a wrong shape": (
        lambda f: resave(f, lambda t: t.update({Q: torch.ones(64, 63)})),
        rf"{Q} has the shape \[64, 63\], and by config.json it is \[64, 64\]",
    ),
    "a wrong dtype": (
        lambda f: resave(f, lambda t: t.update({Q: torch.ones(64, 64, dtype=torch.float64)})),
        f"{Q} is F64",
    ),
    "two dtypes": (
        lambda f: resave(f, lambda t: t.update({Q: t[Q].bfloat16()})),
        f"{Q} is BF16 and .* F32",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "pickles among them, are not read"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "no JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), "config.json is not JSON"),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00{"), "is not JSON"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 99_999), "is not JSON"),
    "another kind of JSON": (lambda f: (f / "config.json").write_text("[]"), "no.* JSON object"),
    "more layers": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('layers": 4', f'layers": {(1 << 31) - 1}')
        ),
        "has no tensor model.layers.4.",
    ),
    "an index elsewhere": (lambda f: indexed(f, "../../x"), "'../../x', which is no file of this"),
    "an absolute index": (lambda f: indexed(f, "/etc/passwd"), "no file of this folder"),
    "an index of numbers": (lambda f: indexed(f, 7), "no file of this folder"),
    "an index of no file": (lambda f: indexed(f, "model-1.safetensors"), "does not exist"),
    "an empty index": (lambda f: (f / INDEX).write_text("{}"), "no weight_map"),
    "an index of more": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS}})),
        f"which {INDEX} has not",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder(damage: str, folder: Path, tmp_path: Path) -> None:
    make, sentence = DAMAGES[damage]
    make(folder)
    with pytest.raises(UserError, match=sentence) as refused:
        import_hf(folder, tmp_path / "checkpoint")
    assert str(folder) in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_that_exists(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"--save .*checkpoint exists"):
        import_hf(folder, tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"--output .*model exists"):
        export_hf(tmp_path / "checkpoint", folder)


def test_sentences_on_the_command_line(folder: Path, tmp_path: Path, runner: JobRunner) -> None:
    (folder / "config.json").write_text("{")
    failed = runner.run("megatron_pd.cli", ["import-hf", folder, "--save", tmp_path / "c"])
    assert failed.statuses == [2]
    assert failed.log.startswith("error: ") and "config.json is not JSON" in failed.log
    assert "Traceback" not in failed.log


# ------------------------------------------------------------------------------- checkpoints


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import_hf(folder, tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkpoint"


def evil_metadata(checkpoint: Path) -> None:
    (checkpoint / "release" / ".metadata").write_bytes(pickle.dumps(Evil()))


def evil_arguments(checkpoint: Path) -> None:
    torch.save({"args": Evil()}, checkpoint / "release" / "common.pt")


def metadata_elsewhere(checkpoint: Path) -> None:
    path = checkpoint / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../../model/model.safetensors"
    path.write_bytes(pickle.dumps(metadata))


def missing_part(checkpoint: Path) -> None:
    path = checkpoint / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks.pop(1)
    path.write_bytes(pickle.dumps(metadata))


def cut(name: str, length: int) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (path,) = (checkpoint / "release").glob(name)
        path.write_bytes(path.read_bytes()[:length])

    return change


CHECKPOINT_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code in .metadata": (
        evil_metadata,
        r"\.metadata is not sound .*posix.mkdir, which is refused",
    ),
    "code in the arguments": (evil_arguments, "arguments .* cannot be read .*mkdir"),
    "a file elsewhere": (metadata_elsewhere, r"names the file '\.\./\.\./model"),
    "a part that is missing": (missing_part, r"linear_fc1\.weight cannot be read .*0 of 12,288"),
    "half the tensors": (cut("*.distcp", 200_000), "cannot be read"),
    "half the metadata": (cut(".metadata", 999), "not sound"),
    "no metadata": (lambda c: (c / "release" / ".metadata").unlink(), "no .metadata"),
    "another format": (lambda c: (c / "release" / "metadata.json").unlink(), "no metadata.json"),
    "a format of the past": (
        lambda c: (c / "release" / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "the format is 'zarr', not torch_dist",
    ),
    "no tracker": (lambda c: (c / "latest_checkpointed_iteration.txt").unlink(), "has no latest"),
    "a tracker elsewhere": (
        lambda c: (c / "latest_checkpointed_iteration.txt").write_text("../7"),
        "has '../7', expected an iteration",
    ),
}


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGES)
def test_damaged_checkpoint(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    make, sentence = CHECKPOINT_DAMAGES[damage]
    make(checkpoint)
    with pytest.raises(UserError, match=sentence) as refused:
        export_hf(checkpoint, tmp_path / "back")
    assert str(checkpoint) in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "checkpoint"}


def test_a_region_of_a_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Parts are put together across the borders of what was saved."""
    reader = TorchDistCheckpoint(checkpoint / "release")
    tensors = load_file(folder / WEIGHTS)
    found = reader.read("decoder.layers.mlp.linear_fc2.weight", (1, 3, 5), (2, 7, 11))
    for layer in (1, 2):
        expected = tensors[f"model.layers.{layer}.mlp.down_proj.weight"][3:10, 5:16]
        assert torch.equal(found[layer - 1], expected)
