"""Imported models compute in Megatron what transformers computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import JobRunner
from models import CONFIGS, SIZES, random_model

LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_an_imported_model(name: str, runner: JobRunner, tmp_path: Path) -> None:
    seed = np.random.randint(1 << 30)
    model = random_model(CONFIGS[name](), seed)
    folder, checkpoint = tmp_path / "model", tmp_path / "checkpoint"
    model.save_pretrained(folder)
    runner.check("megatron_pd.cli", ["import-hf", folder, "--save", checkpoint])
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (2, 48))
    np.save(tmp_path / "windows.npy", tokens)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    for layout, (ranks, flags) in LAYOUTS.items():
        found = tmp_path / f"{layout}.npy"
        runner.check(
            "model_logits_job",
            [
                *(tmp_path / "windows.npy", found, "--load", checkpoint, *flags),
                *("--tokenizer-type", "NullTokenizer", "--vocab-size", SIZES["vocab_size"]),
            ],
            ranks,
        )
        logits = np.load(found)
        assert logits.shape[-1] == 384
        np.testing.assert_allclose(
            logits[..., :301], expected, rtol=0, atol=1e-5, err_msg=f"{layout}, seed {seed}"
        )
        assert not logits[..., 301:].any()
