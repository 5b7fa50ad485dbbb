"""The launch scripts' flags are Megatron's, and their models have the sizes that they name."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.training.arguments import parse_args

from megatron_pd.megatron.arguments import add_pd_arguments, pd_config_from_args

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCAB_SIZE = 151_552

# Billions of parameters, by Table 7's shapes with SwiGLU and this vocabulary.
SIZES = {"330m": 0.334, "670m": 0.669, "1.9b": 1.866, "3.8b": 3.750, "6.8b": 6.820}


def dry_run(script: str, **environment: str) -> list[str]:
    """The command that a launch script would run."""
    output = subprocess.run(
        ["bash", EXAMPLES / script, "--seed", "7"],
        env={**os.environ, **environment, "DRY_RUN": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return shlex.split(output)


@pytest.mark.parametrize("model", SIZES)
def test_student_recipe(model, monkeypatch):
    command = dry_run(
        "pretrain_gpt_pd.sh", MODEL=model, DATA="/d/corpus", TOKENIZER="/t", SAVE="/s", NODES="4"
    )
    assert command[:5] == ["torchrun", "--nnodes", "4", "--nproc-per-node", "8"]
    module = command.index("megatron_pd.pretrain")
    monkeypatch.setattr(sys, "argv", command[module:])
    args = parse_args(add_pd_arguments)
    assert args.seed == 7
    assert args.lr_wsd_decay_iters == args.train_iters // 100
    config = pd_config_from_args(args)
    assert (config.loss, config.temperature, config.top_p, config.top_k) == ("kld", 2.0, 0.95, 50)

    hidden, heads = args.hidden_size, args.num_attention_heads
    head = hidden // heads
    attention = hidden * head * (2 * heads + 2 * args.num_query_groups)
    layer = attention + 3 * hidden * args.ffn_hidden_size
    embeddings = VOCAB_SIZE * hidden * (2 if args.untie_embeddings_and_output_weights else 1)
    billions = (args.num_layers * layer + embeddings) / 1e9
    assert billions == pytest.approx(SIZES[model], abs=0.002)
    assert heads % args.tensor_model_parallel_size == 0
    assert args.num_query_groups % args.tensor_model_parallel_size == 0


def test_missing_settings_are_named():
    failed = subprocess.run(
        ["bash", EXAMPLES / "pretrain_gpt_pd.sh"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert failed.returncode != 0
    assert "one of 330m 670m 1.9b 3.8b 6.8b" in failed.stderr


def test_dump_names_the_checkpoint_and_the_corpus():
    command = dry_run("dump_teacher.sh", TEACHER="/ckpt/t", DATA="/d/corpus")
    module = command.index("megatron_pd.cli")
    assert command[module + 1] == "dump"
    assert command[command.index("--load") + 1] == "/ckpt/t"
    assert command[command.index("--data-path") + 1] == "/d/corpus"
