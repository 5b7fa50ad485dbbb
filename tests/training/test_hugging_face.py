"""A student that Megatron trained is exported as it is, with its tokenizer, and imported again."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from jobs import LAYOUTS, VOCAB_SIZE, World
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = [  # no default of Megatron's or transformers'
    *("--group-query-attention", "--num-query-groups", "2"),
    *("--norm-epsilon", "1e-3", "--rotary-base", "777"),
]


@pytest.fixture(scope="module")
def trained(bare_world: World) -> Path:
    """A student after two steps on four ranks, in the layout that is hardest to put together."""
    path = bare_world.folder / "trained"
    ranks, flags = LAYOUTS["tp2pp2"]
    bare_world.train(
        *("--train-iters", 2, "--lr-wsd-decay-iters", 1, "--lr-warmup-iters", 1),
        *("--save", path, "--save-interval", 2, "--init-method-std", 0.1, *MODEL, *flags),
        *("--bf16", "--use-distributed-optimizer"),
        ranks=ranks,
    )
    return path


@pytest.fixture(scope="module")
def exported(bare_world: World, trained: Path) -> Path:
    path = bare_world.folder / "exported"
    bare_world.runner.check("megatron_pd.cli", ["export-hf", "--load", trained, "--output", path])
    return path


def megatron_logits(world: World, checkpoint: Path, tokens: np.ndarray, *flags: str) -> np.ndarray:
    windows, logits = world.folder / "windows.npy", world.folder / "logits.npy"
    np.save(windows, tokens)
    world.runner.check("model_logits_job", [windows, logits, "--load", checkpoint, *flags])
    return np.load(logits)[..., :VOCAB_SIZE]


def test_logits_of_an_exported_student(bare_world: World, trained: Path, exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == VOCAB_SIZE
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-3, 777)
    tokens = np.random.default_rng().integers(0, VOCAB_SIZE, (2, 64))
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert model.lm_head.weight.shape == (VOCAB_SIZE, 64)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)).logits.numpy()
    expected = megatron_logits(bare_world, trained, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_tokenizer_of_an_exported_student(bare_world: World, exported: Path) -> None:
    assert (exported / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(bare_world.tokenizer))
    for text in ("abc def.\n  x\ty", "    ÄÖ 日本 🙂", "a     b", ""):
        assert tokenizer(text)["input_ids"] == pieces.encode(text), text
        assert tokenizer.decode(pieces.encode(text)) == text
    assert tokenizer.eos_token_id == pieces.eos_id()
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == pieces.eos_id()


def test_training_goes_on_from_an_exported_student(
    bare_world: World, trained: Path, exported: Path
) -> None:
    """Imported again, `--use-checkpoint-args` alone makes the same model."""
    checkpoint = bare_world.folder / "again"
    bare_world.runner.check("megatron_pd.cli", ["import-hf", exported, "--save", checkpoint])
    tokens = np.random.default_rng().integers(0, VOCAB_SIZE, (1, 64))
    np.testing.assert_array_equal(
        megatron_logits(bare_world, checkpoint, tokens),
        megatron_logits(bare_world, trained, tokens),
    )
    training = bare_world.training_flags()[len(bare_world.architecture) :]
    tokenizer = bare_world.architecture[-4:]
    assert tokenizer[::2] == ["--tokenizer-type", "--tokenizer-model"]
    start = ["--load", str(checkpoint), "--train-iters", "3", "--lr-wsd-decay-iters", "1"]
    curves = [
        bare_world.curves_of([*architecture, *training, *start])["lm loss"]
        for architecture in (
            [*bare_world.architecture, *MODEL],
            ["--use-checkpoint-args", "--no-use-tokenizer-model-from-checkpoint-args", *tokenizer],
        )
    ]
    np.testing.assert_array_equal(*curves)
