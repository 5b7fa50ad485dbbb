"""The paper's five students, as the launch scripts have them, are Llamas of the same shapes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.training.arguments import parse_args
from transformers import AutoConfig, LlamaForCausalLM

from megatron_pd.hf.config import config_of_arguments, read_config
from megatron_pd.hf.export_hf import planned_tensors
from megatron_pd.megatron.arguments import add_pd_arguments

SCRIPT = Path(__file__).parents[2] / "examples/pretrain_gpt_pd.sh"
VOCAB_SIZE = 151_552
# Billions of parameters, by Table 7's shapes with SwiGLU and this vocabulary.
SIZES = {"330m": 0.334, "670m": 0.669, "1.9b": 1.866, "3.8b": 3.750, "6.8b": 6.820}


class Bfloat16Checkpoint:
    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16


@pytest.mark.parametrize("model", SIZES)
def test_student(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"MODEL": model, "DATA": "/d", "TOKENIZER": "/t", "SAVE": "/s", "DRY_RUN": "1"}
    command = subprocess.check_output(["bash", SCRIPT], env=os.environ | settings, text=True)
    flags = shlex.split(command)
    monkeypatch.setattr(sys, "argv", flags[flags.index("megatron_pd.pretrain") :])
    args = parse_args(add_pd_arguments)

    config = config_of_arguments(args, VOCAB_SIZE, {}, "the student")
    made = config.json("bfloat16", {})
    assert read_config(made, "config.json") == config
    (tmp_path / "config.json").write_text(json.dumps(made))
    with torch.device("meta"):
        llama = LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path))
    planned = {name: shape for name, shape, _ in planned_tensors(config, Bfloat16Checkpoint())}
    expected = {name: tuple(tensor.shape) for name, tensor in llama.state_dict().items()}
    if not args.untie_embeddings_and_output_weights:
        del expected["lm_head.weight"]
    assert planned == expected
    billions = sum(torch.Size(shape).numel() for shape in planned.values()) / 1e9
    assert billions == pytest.approx(SIZES[model], abs=0.001)
    assert llama.config.rope_parameters["rope_theta"] == args.rotary_base == 500_000
    assert llama.config.rms_norm_eps == args.layernorm_epsilon
