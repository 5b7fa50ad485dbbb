"""What a launch line costs, beside the paper's own figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_pd.cluster import distillation_law, sizes
from megatron_pd.cluster.launch_line import parse_launch_line
from megatron_pd.cluster.layout import readers_per_node, reading_ranks
from megatron_pd.errors import UserError

ROOT = Path(__file__).parents[2]
PAPERS_BATCH = 2048 * 4096


def test_steps_and_bytes_of_the_paper() -> None:
    """arXiv 2410.16215: §2 and appendix."""
    assert sizes.steps_of(100e9, PAPERS_BATCH) == 11_921
    assert sizes.steps_of(500e9, PAPERS_BATCH) == 59_605
    # "58.6 PB": 150,000 logits of 4 bytes, in PB of 1,024 TB.
    assert sizes.dense_bytes(100e9, 150_000) / 1e12 / 1024 == pytest.approx(58.6, abs=0.05)
    # "15 TB", a 4,000th: so 37.5 entries of 4 bytes. Ours are of a third, ids included.
    entries = sizes.dense_bytes(100e9, 150_000) / 4000 / (100e9 * 4)
    assert entries == pytest.approx(37.5)
    assert 100e9 * entries * 4 == pytest.approx(15e12)
    assert 100e9 * entries * sizes.STORE_BYTES_PER_ENTRY[10] == pytest.approx(4.9e12, rel=0.01)


def test_memory_of_the_logits() -> None:
    """By hand: 4,096 tokens, a fourth of 151,552 ids, two bytes; chunks of 2,048, H = 4,096."""
    assert sizes.logits_bytes(4096, 37_888, 2) == 310_378_496
    assert sizes.loss_chunk_bytes(2048, 37_888, 4096, 2) == 155_189_248 + 620_756_992


def test_checkpoints_on_the_disk() -> None:
    assert sizes.checkpoints_kept(11_921, 500, None) == 24
    assert sizes.checkpoints_kept(11_921, 500, 2000) == 5 + 2


def test_the_laws_at_points_worked_out_by_hand() -> None:
    assert distillation_law.supervised_loss(7.75e9, 512e9) == pytest.approx(1.933, abs=0.001)
    assert distillation_law.supervised_loss(1.7e9, 100e9) == pytest.approx(2.176, abs=0.001)
    assert distillation_law.distilled_loss(1.7e9, 100e9, 1.827) == pytest.approx(2.137, abs=0.001)


def test_a_store_that_is_shared_pays_sooner() -> None:
    pays = distillation_law.students_that_pay
    assert pays(1.7e9, 100e9, 1.827, teacher_cost=0.1) == 1
    alone, dear = pays(1.7e9, 100e9, 1.827, 1.6), pays(1.7e9, 100e9, 1.827, 16)
    assert alone == 2 and dear is not None and dear > 10
    # A teacher that is worse than the student would be alone never does.
    assert pays(1.7e9, 100e9, 2.6, 0.1) is None


@pytest.mark.parametrize(
    "tp, pp, cp, dp, mapping, ranks",
    [
        (2, 2, 1, 2, False, [4, 6]),
        (2, 2, 1, 2, True, [2, 6]),
        (2, 1, 2, 2, False, [0, 2, 4, 6]),
        (1, 1, 1, 3, False, [0, 1, 2]),
    ],
)
def test_which_ranks_read(
    tp: int, pp: int, cp: int, dp: int, mapping: bool, ranks: list[int]
) -> None:
    args = SimpleNamespace(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        use_tp_pp_dp_mapping=mapping,
    )
    assert reading_ranks(args) == ranks


def test_readers_of_a_node() -> None:
    assert readers_per_node([4, 6, 12, 14], 8) == 2
    assert readers_per_node([4, 6, 12, 14], 4) == 2
    assert readers_per_node([4, 6], 2) == 1


def test_a_launch_line_is_taken_apart() -> None:
    words = "torchrun --nnodes 4 --nproc_per_node=8 --node-rank 0 -m megatron_pd.pretrain --lr 1"
    line = parse_launch_line(words.split())
    assert (line.world_size, line.flags) == (32, ("--lr", "1"))
    assert parse_launch_line(["python", "-m", "megatron_pd.pretrain"]).world_size == 1
    with pytest.raises(UserError, match=r"DRY_RUN=1 examples/pretrain_gpt_pd\.sh"):
        parse_launch_line(["torchrun", "pretrain_gpt.py"])
    with pytest.raises(UserError, match="1:4"):
        parse_launch_line(["torchrun", "--nnodes", "1:4", "-m", "megatron_pd.pretrain"])


def planned(*flags: str, line: str | None = None, **settings: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MEGATRON_PD_DEVICE": "cpu",
        **dict(DRY_RUN="1", DATA="/d/corpus", TOKENIZER="/t", SAVE="/s"),
        **settings,
    }
    if line is None:
        script = ["bash", ROOT / "examples" / "pretrain_gpt_pd.sh"]
        line = subprocess.run(script, env=environment, capture_output=True, text=True).stdout
    done = subprocess.run(
        [sys.executable, "-m", "megatron_pd.cli", "plan", *flags],
        env=environment,
        input=line,
        capture_output=True,
        text=True,
    )
    return done.stdout or done.stderr


def test_the_papers_largest_student_on_1024_gpus() -> None:
    """Its parameters are those of Table 7; a token costs six FLOPs a parameter, but for the input
    embeddings and attention."""
    flags = ("--plan-vocab-size", "151552", "--json")
    figures = json.loads(planned(*flags, MODEL="6.8b", NODES="128"))
    assert figures["run: GPUs"] == 1024
    assert round(figures["run: parameters"] / 1e9, 3) == 6.820
    assert figures["run: steps"] == 11_921
    passed = figures["run: parameters"] - 151_552 * 4096
    attention = 28 * 6 * 4096 * 4096  # a causal half of 12·S·H a layer
    assert figures["run: FLOPs per token"] == pytest.approx(6 * passed + attention, rel=0.001)
    assert figures["run: checkpoint"] == figures["run: parameters"] * 14
    assert figures["reading: ranks that read the store"] == 256
    assert figures["store: compact, 10 bits a value"] == pytest.approx(4.84e12, rel=0.001)
    assert figures["does it pay: students that must share the store"] >= 1


def test_a_table_and_a_line_that_megatron_refuses() -> None:
    table = planned("--plan-vocab-size", "151552", MODEL="330m", NODES="8")
    assert re.search(r"^  parameters +334,521,344$", table, re.MULTILINE)
    refused = planned(line="torchrun --nproc-per-node 8 -m megatron_pd.pretrain --num-layers 2")
    assert refused.startswith("error: Megatron refuses the flags") and "Traceback" not in refused
