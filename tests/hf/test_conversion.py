"""What goes in comes out: tensors, dtypes, config.json and the files beside them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import JobRunner, environment
from models import CONFIGS, SIZES, random_model
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from megatron_pd.errors import UserError
from megatron_pd.hf import weights
from megatron_pd.hf.export_hf import export_hf
from megatron_pd.hf.import_hf import import_hf
from megatron_pd.hf.layouts import join, split
from megatron_pd.hf.weights import WeightsFolder, write_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = {**SIZES, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24}


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> None:
    random_model(CONFIGS[name](), np.random.randint(1 << 30), dtype).save_pretrained(folder)


def save_tokenizer(folder: Path, tokens: int) -> None:
    words = {f"w{number}": number for number in range(tokens - 1)} | {"</s>": tokens - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def there_and_back(folder: Path, scratch: Path) -> Path:
    import_hf(folder, scratch / "checkpoint")
    export_hf(scratch / "checkpoint", scratch / "back")
    return scratch / "back"


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = WeightsFolder(a), WeightsFolder(b)
    assert first.tensors.keys() == second.tensors.keys()
    for name in first.tensors:
        assert first.read(name).dtype == second.read(name).dtype
        assert torch.equal(first.read(name), second.read(name)), name


@pytest.mark.parametrize("number, name", enumerate(CONFIGS))
def test_round_trip(number: int, name: str, tmp_path: Path) -> None:
    """With more rows of embeddings than the tokenizer has tokens, or without a tokenizer."""
    model = tmp_path / "model"
    save(model, name, DTYPES[number % 3])
    if number % 2 == 0:
        save_tokenizer(model, SIZES["vocab_size"] - number)
    back = there_and_back(model, tmp_path)
    assert_same_tensors(model, back)
    files = {file.name for file in model.iterdir()}
    assert files == {file.name for file in back.iterdir()} and len(files) > 2
    for file in files - {"model.safetensors"}:
        assert json.loads((back / file).read_text()) == json.loads((model / file).read_text()), file
    assert AutoModelForCausalLM.from_pretrained(back, dtype="auto").dtype == DTYPES[number % 3]


def test_round_trip_of_transformers_4(tmp_path: Path) -> None:
    """Its config.json: rope_theta and rope_scaling apart, torch_dtype, fields left out."""
    model = tmp_path / "model"
    save(model, "llama 3", torch.bfloat16)
    config = json.loads((model / "config.json").read_text())
    rope = config.pop("rope_parameters")
    for field in ("head_dim", "attention_bias", "mlp_bias", "dtype", "use_cache"):
        del config[field]
    config |= {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "torch_dtype": "bfloat16",
        "_name_or_path": "somewhere/else",
        "pretraining_tp": 1,
    }
    left_behind = {"quantization_config": {"quant_method": "gguf"}}
    (model / "config.json").write_text(json.dumps(config | left_behind))
    back = there_and_back(model, tmp_path)
    assert json.loads((back / "config.json").read_text()) == config
    assert_same_tensors(model, back)


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(LlamaConfig(**SIZES), 1)
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    monkeypatch.setattr(weights.write_weights, "__kwdefaults__", {"file_bytes": 150_000})
    back = there_and_back(tmp_path / "model", tmp_path)
    assert_same_tensors(tmp_path / "model", back)
    files = list(back.glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 160_000 for file in files)
    loaded = AutoModelForCausalLM.from_pretrained(back).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_ids_in_the_new_folder(name: str, tmp_path: Path) -> None:
    """transformers cuts words by a folder's model_type; where that makes other ids, it is said."""
    save(tmp_path / "model", name)
    import_hf(tmp_path / "model", tmp_path / "checkpoint")
    save_tokenizer(tmp_path / "tokenizer", 290)
    back = tmp_path / "back"
    made = export_hf(tmp_path / "checkpoint", back, tokenizer=tmp_path / "tokenizer")
    assert bool(made.companions.notes) == (name == "qwen2")
    for note in made.companions.notes:
        assert "makes other ids" in note and str(tmp_path / "tokenizer") in note
    loaded = PreTrainedTokenizerFast.from_pretrained(back)
    assert loaded("w3")["input_ids"] == [3]
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 289


KEPT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SENTENCEPIECES = {
    "as Llama 2's": ({"model_type": "bpe", "byte_fallback": True, **KEPT}, True),
    "without BOS": ({"model_type": "bpe", "byte_fallback": True, "bos_id": -1, **KEPT}, True),
    "of another kind": ({"model_type": "unigram"}, False),
}


@pytest.mark.parametrize("kind", SENTENCEPIECES)
def test_sentencepiece(kind: str, tmp_path: Path) -> None:
    """It becomes a tokenizer.json where transformers then makes its ids, and else not."""
    options, converts = SENTENCEPIECES[kind]
    text = [line for line in Path(__file__).read_text().splitlines() if line and "s>" not in line]
    model = tmp_path / "tokens.model"
    with model.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=file,
            vocab_size=380,
            minloglevel=2,
            **options,
        )
    save(tmp_path / "model", "llama")
    import_hf(tmp_path / "model", tmp_path / "checkpoint")
    made = export_hf(tmp_path / "checkpoint", tmp_path / "back", tokenizer=model)
    assert (tmp_path / "back" / "tokenizer.json").exists() == converts
    assert [str(model) in note for note in made.companions.notes] == [True] * (not converts)
    assert made.config.values["vocab_size"] == 380  # of 384 rows
    if converts:
        pieces, loaded = (
            SentencePieceProcessor(model_file=str(model)),
            AutoTokenizer.from_pretrained(tmp_path / "back"),
        )
        for line in ("", " ", "  x", *text):
            assert loaded(line)["input_ids"] == pieces.encode(line), line
            assert loaded.decode(pieces.encode(line)) == line


def test_a_redundant_output_layer(tmp_path: Path) -> None:
    """Tied, and yet with an lm_head that equals the embeddings, as some folders are."""
    model = tmp_path / "model"
    save(model, "llama tied")
    tensors = load_file(model / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, model / "model.safetensors")
    assert "lm_head.weight" not in WeightsFolder(there_and_back(model, tmp_path)).tensors
    head[3, 4] += 1
    save_file({**tensors, "lm_head.weight": head}, model / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed"):
        import_hf(model, tmp_path / "other")


def test_layout_of_groups() -> None:
    """Query heads of a group, its key head, its value head: written out for 4 heads, 2 groups."""
    q, k, v = (torch.tensor(rows)[:, None] for rows in ([0, 1, 2, 3], [10, 11], [20, 21]))
    joined = join([q, k, v], groups=2)
    assert joined[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    for part, found in zip((q, k, v), split(joined, [4, 2, 2], groups=2), strict=True):
        assert torch.equal(part, found)


# ------------------------------------------------------------------------------------- streaming


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 24 layers, 163 MB."""
    folder = tmp_path_factory.mktemp("large") / "model"
    config = LlamaConfig(**LARGE)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in LlamaForCausalLM(config).state_dict().items()
        }
    write_weights(
        folder,
        [(name, shape, torch.bfloat16) for name, shape in shapes.items()],
        (torch.full(shape, 0.5, dtype=torch.bfloat16) for shape in shapes.values()),
    )
    return folder


PEAK = """
import sys
from pathlib import Path
from megatron_pd.hf.export_hf import export_hf
from megatron_pd.hf.import_hf import import_hf

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if key in line)

def growth(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    work()
    return (kilobytes("VmHWM") - before) << 10

small, large, scratch = map(Path, sys.argv[1:])
import_hf(small, scratch / "small made")
export_hf(scratch / "small made", scratch / "small back")
before = kilobytes("VmRSS")
print(growth(lambda: import_hf(large, scratch / "large")))
print(growth(lambda: export_hf(scratch / "large", scratch / "large back")))
"""


def test_memory(large: Path, tmp_path: Path) -> None:
    """Import and export hold a few tensors of a layer, mapped files included, not the model."""
    save(tmp_path / "small", "llama")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small", large, tmp_path],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    size = (large / "model.safetensors").stat().st_size
    growths = [int(line) for line in done.stdout.split()]
    assert len(growths) == 2 and max(growths) < size / 5, (size, growths)


def test_killed(large: Path, runner: JobRunner, tmp_path: Path) -> None:
    """Half an import or export is under no name that anything reads, and the next run is whole."""
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    for target, command, begun in (
        (checkpoint, ["import-hf", large, "--save", checkpoint], "release/*.distcp"),
        (back, ["export-hf", "--load", checkpoint, "--output", back], "*.safetensors"),
    ):
        killed = runner.run("megatron_pd.cli", command, kill_when=f"{target}.unfinished/{begun}")
        assert killed.statuses == [-9]
        assert not target.exists()
        runner.check("megatron_pd.cli", command)
        assert target.exists() and not Path(f"{target}.unfinished").exists()
    assert_same_tensors(large, back)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model", "llama")

    def read(self: WeightsFolder, name: str) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(WeightsFolder, "read", read)
        with pytest.raises(OSError, match="No space"):
            import_hf(tmp_path / "model", tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    import_hf(tmp_path / "model", tmp_path / "checkpoint")
