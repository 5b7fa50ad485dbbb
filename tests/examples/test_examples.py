"""The launch scripts' flags are Megatron's, and their models have the sizes that they name."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.training.arguments import parse_args

from megatron_pd.megatron.arguments import add_pd_arguments, pd_config_from_args

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCAB_SIZE = 151_552

# Billions of parameters, by Table 7's shapes with SwiGLU and this vocabulary.
SIZES = {
    "330m": 0.335,
    "670m": 0.669,
    "1.9b": 1.867,
    "3.8b": 3.750,
    "6.8b": 6.820,
    "13b": 12.562,
}
INHERITED = {"CUDA_DEVICE_MAX_CONNECTIONS", "PET_SIGNALS_TO_HANDLE"}
STUDENT = {"MODEL": "670m", "DATA": "/d/corpus", "TOKENIZER": "/t", "SAVE": "/s"}


def run(script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(EXAMPLES / script), *flags],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )


def dry_run(script: str, *flags: str, **environment: str) -> list[str]:
    """The command that a launch script would run."""
    done = run(script, *flags, **environment, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def arguments(monkeypatch: pytest.MonkeyPatch, *flags: str, **environment: str) -> Namespace:
    """Megatron's arguments of the training command."""
    command = dry_run("pretrain_gpt_pd.sh", *flags, **{**STUDENT, **environment})
    monkeypatch.setattr(sys, "argv", command[command.index("megatron_pd.pretrain") :])
    return parse_args(add_pd_arguments)


@pytest.mark.parametrize("model", SIZES)
def test_a_student_has_the_size_that_it_is_named_after(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(monkeypatch, MODEL=model)
    hidden, heads = args.hidden_size, args.num_attention_heads
    head = hidden // heads
    attention = hidden * head * (2 * heads + 2 * args.num_query_groups)
    layer = attention + 3 * hidden * args.ffn_hidden_size + 2 * hidden
    embeddings = VOCAB_SIZE * hidden * (2 if args.untie_embeddings_and_output_weights else 1)
    billions = (args.num_layers * layer + hidden + embeddings) / 1e9
    assert round(billions, 3) == SIZES[model]
    assert heads % args.tensor_model_parallel_size == 0
    assert args.num_query_groups % args.tensor_model_parallel_size == 0


def test_the_command_is_torchrun_and_the_recipe_pd_star(monkeypatch: pytest.MonkeyPatch) -> None:
    command = dry_run("pretrain_gpt_pd.sh", **STUDENT, NODES="4")
    assert command[:5] == ["torchrun", "--nnodes", "4", "--nproc-per-node", "8"]
    args = arguments(monkeypatch)
    assert args.lr_wsd_decay_iters == args.train_iters // 100
    config = pd_config_from_args(args)
    assert config is not None
    assert (config.loss, config.temperature, config.top_p, config.top_k) == ("kld", 2.0, 0.95, 50)
    assert args.pd_loss_chunk_tokens is None


def test_a_control_run_differs_in_its_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    distilled, control = (
        {name: value for name, value in vars(args).items() if not name.startswith("pd_")}
        for args in (arguments(monkeypatch), arguments(monkeypatch, RECIPE="lm"))
    )
    assert distilled == control
    args = arguments(monkeypatch, RECIPE="lm")
    assert args.pd_lm_only and pd_config_from_args(args) is None
    assert pd_config_from_args(arguments(monkeypatch, RECIPE="robust")) is not None


def test_what_is_set_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(
        monkeypatch,
        "--lr",
        "3e-4",
        DATA="0.7 /d/web 0.3 /d/code",
        EXTRA_ARGS="--lr 2e-4 --recompute-activations",
        SAVE_INTERVAL="100",
        RETAIN_INTERVAL="300",
        ASYNC_SAVE="0",
        EXIT_MINUTES="230",
        WANDB_PROJECT="students",
    )
    assert args.data_path == ["0.7", "/d/web", "0.3", "/d/code"]
    assert args.data_cache_path == "/d/code.cache"
    assert args.lr == 3e-4 and args.recompute_activations
    assert (args.save_interval, args.save_retain_interval) == (100, 300)
    assert not args.async_save and args.exit_duration_in_mins == 230
    assert (args.wandb_project, args.wandb_exp_name) == ("students", "670m-pd-star")
    assert arguments(monkeypatch).async_save


@pytest.mark.parametrize("given, used", [(None, "1"), ("", ""), ("8", "8")])
def test_a_variable_of_the_environment_is_left_as_it_is(
    given: str | None, used: str, tmp_path: Path
) -> None:
    stub(tmp_path, "torchrun", 'echo "[$CUDA_DEVICE_MAX_CONNECTIONS]"')
    setting = {} if given is None else {"CUDA_DEVICE_MAX_CONNECTIONS": given}
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert run("pretrain_gpt_pd.sh", **STUDENT, **setting, PATH=path).stdout == f"[{used}]\n"


@pytest.mark.parametrize(
    "changed, part",
    [
        ({"MODEL": "7b"}, "MODEL=7b is none of 330m 670m 1.9b 3.8b 6.8b 13b"),
        ({"MODEL": ""}, "one of 330m 670m 1.9b 3.8b 6.8b 13b"),
        ({"DATA": ""}, "DATA is not set"),
        ({"TOKENIZER": ""}, "TOKENIZER is not set"),
        ({"SAVE": ""}, "SAVE is not set"),
        ({"TRAIN_ITERS": "99"}, "TRAIN_ITERS=99 leaves no iteration for the decay"),
        ({"SAVE_INTERVAL": "300", "RETAIN_INTERVAL": "500"}, "RETAIN_INTERVAL=500 is no multiple"),
        ({"RECIPE": "pdstar"}, "RECIPE=pdstar is none of pd-star robust vanilla lm"),
    ],
)
def test_a_wrong_setting_gets_a_sentence(changed: dict[str, str], part: str) -> None:
    failed = run("pretrain_gpt_pd.sh", **{**STUDENT, **changed})
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("error: ") and part in failed.stderr
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["pretrain_gpt_pd.sh", "dump_teacher.sh"])
def test_help_names_every_variable_that_a_script_reads(script: str) -> None:
    shown = run(script, "--help")
    assert shown.returncode == 0
    text = "".join((EXAMPLES / name).read_text() for name in (script, "launch.sh"))
    read = set(re.findall(r"\$\{([A-Z_]+):?[-=]", text)) - INHERITED
    read |= set(re.findall(r"^need ([A-Z_]+)", text, re.MULTILINE))
    assert len(read) > 8
    assert {name for name in read if not re.search(rf"\b{name}\b", shown.stdout)} == set()


# --- Slurm, with its commands replaced ------------------------------------------------------------


def stub(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def batch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the batch script as slurmd does, from a copy of it in a folder of its own."""
    stub(
        tmp_path,
        "scontrol",
        f"""case "$*" in
        "show job 17") echo "   Command={EXAMPLES}/pretrain_gpt_pd.sbatch --seed 7" ;;
        "show hostnames node[3-4]") printf 'node3\nnode4\n' ;;
        *) echo "scontrol $*" ;;
        esac""",
    )
    stub(tmp_path, "srun", 'echo "srun $MASTER_ADDR $NODES $GPUS_PER_NODE $*"')
    copied = shutil.copy(EXAMPLES / "pretrain_gpt_pd.sbatch", tmp_path / "slurm_script")

    def run_batch(**environment: str) -> subprocess.CompletedProcess[str]:
        slurm = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[3-4]"}
        return subprocess.run(
            ["bash", copied, "--seed", "7"],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm, **STUDENT, **environment},
            capture_output=True,
            text=True,
        )

    return run_batch


@pytest.mark.parametrize(
    "begun, ended, status, said",
    [
        ("", "500", 0, "saved at iteration 500 of 11921: queued again\nscontrol requeue 17\n"),
        ("11500", "11921", 0, "saved at iteration 11921 of 11921: done\n"),
        ("500", "500", 1, ""),
        ("", "", 1, ""),
    ],
)
def test_a_batch_job_is_queued_again_until_its_end_and_never_in_vain(
    batch: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    begun: str,
    ended: str,
    status: int,
    said: str,
) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    if begun:
        tracker.write_text(begun)
    write = f"printf {ended} > {tracker}" if ended else ":"
    stub(tmp_path, "srun", f'{write}; echo "srun $MASTER_ADDR $NODES $GPUS_PER_NODE $*"')
    done = batch(SAVE=str(tmp_path), SLURM_GPUS_ON_NODE="4")
    assert done.returncode == status, done.stderr
    launched, rest = done.stdout.split("\n", 1)
    assert launched.startswith("srun node3 2 4 --kill-on-bad-exit=1 bash -c")
    assert launched.endswith(f"{EXAMPLES}/pretrain_gpt_pd.sh --seed 7")
    assert rest == said
    assert ("where it had begun" in done.stderr) == (status == 1)


def test_a_batch_job_that_cannot_begin_fails(
    batch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    lost = batch(EXAMPLES=str(tmp_path))
    assert lost.returncode == 2 and f"pretrain_gpt_pd.sh is not in {tmp_path}" in lost.stderr
    stub(tmp_path, "scontrol", "exit 1")
    alone = batch(EXAMPLES=str(EXAMPLES))
    assert alone.returncode != 0 and "srun" not in alone.stdout
    stub(tmp_path, "srun", "echo failed; exit 3")
    failed = batch(EXAMPLES=str(EXAMPLES), MASTER_ADDR="node3", SAVE=str(tmp_path))
    assert failed.returncode == 3 and failed.stdout == "failed\n"


def test_dump_names_the_checkpoint_and_the_corpus():
    command = dry_run("dump_teacher.sh", TEACHER="/ckpt/t", DATA="/d/corpus")
    module = command.index("megatron_pd.cli")
    assert command[module + 1] == "dump"
    assert command[command.index("--load") + 1] == "/ckpt/t"
    assert command[command.index("--data-path") + 1] == "/d/corpus"
