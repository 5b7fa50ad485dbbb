"""The launch script: Megatron accepts its flags, and two "machines" find each other and train. No
launcher at all: one process trains."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from jobs import ROOT, World, curves, environment

SCRIPT = ROOT / "examples" / "pretrain_gpt_pd.sh"

# A model and a batch that two CPU processes train in seconds, in the place of the recipe's.
SMALL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
    --lr-warmup-fraction 0.5 --eval-iters 0 --log-interval 1 --num-workers 0
""".split()


# Data-parallel ranks of each student on 8 machines of 8 GPUs.
DATA_PARALLEL = {"330m": 64, "670m": 64, "1.9b": 64, "3.8b": 32, "6.8b": 16, "13b": 8}


@pytest.mark.parametrize("model", DATA_PARALLEL)
def test_megatron_accepts_the_recipe_on_64_gpus(model: str, bare_world: World) -> None:
    command = subprocess.run(
        ["bash", str(SCRIPT), "--vocab-size", "151551"],
        env={
            **os.environ,
            "DRY_RUN": "1",
            "MODEL": model,
            "DATA": "corpus",
            "SAVE": "checkpoints",
            "TOKENIZER_TYPE": "NullTokenizer",
            "TOKENIZER": "none",
            "NODES": "8",
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    flags = shlex.split(command)
    flags = flags[flags.index("megatron_pd.pretrain") + 1 :]
    log = bare_world.runner.check("validate_job", flags)
    assert json.loads(log.splitlines()[-1]) == {"data_parallel_size": DATA_PARALLEL[model]}


def machine_environment(world: World, save: Path, **settings: str) -> dict[str, str]:
    """What the script is told on one machine."""
    return {
        **environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": "330m",
        "DATA": str(world.corpus),
        "SPLIT": "100,0,0",
        "TOKENIZER_TYPE": "SentencePieceTokenizer",
        "TOKENIZER": str(world.tokenizer),
        "SAVE": str(save),
        "MASTER_ADDR": "127.0.0.1",
        **settings,
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_machines_find_each_other_and_train(world: World) -> None:
    save = world.folder / "launched"
    port = free_port()
    machines = [
        subprocess.Popen(
            ["bash", str(SCRIPT), *SMALL, "--train-iters", "4", "--lr-wsd-decay-iters", "1"],
            env=machine_environment(
                world,
                save,
                RECIPE="vanilla",
                NODES="2",
                NODE_RANK=str(rank),
                GPUS_PER_NODE="1",
                MASTER_PORT=str(port),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for machine in machines:
        log, _ = machine.communicate(timeout=240)
        assert machine.returncode == 0, log[-4000:]
    found = curves(save / "tensorboard")
    assert len(found["lm loss"]) == 4 and np.isfinite(found["lm loss"]).all()
    assert (found["kd loss"] > 0).all()
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_without_torchrun_one_process_trains_as_under_it(world: World) -> None:
    flags = [*world.from_student(), "--pd-recipe", "vanilla", "--train-iters", "2"]
    flags = world.training_flags(*flags, "--lr-warmup-iters", 0, "--lr-wsd-decay-iters", 1)
    events = world.folder / "events-without-torchrun"
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_pd.pretrain", *flags, "--tensorboard-dir", str(events)],
        env={name: value for name, value in environment().items() if name not in launcher},
        cwd=world.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone, launched = curves(events), world.curves_of(flags)
    for tag in ("lm loss", "kd loss", "grad-norm"):
        np.testing.assert_array_equal(alone[tag], launched[tag])


def test_sigterm_saves_a_checkpoint_and_ends_well(world: World) -> None:
    """All processes get the signal, as from Slurm: torchrun, which would kill the others after 30
    seconds, and those that read data and write checkpoints, without which none is saved."""
    save = world.folder / "terminated"
    machine = subprocess.Popen(
        ["bash", str(SCRIPT), *SMALL, "--num-workers", "1", "--exit-duration-in-mins", "3"],
        env=machine_environment(
            world, save, TRAIN_ITERS="2000", GPUS_PER_NODE="2", MASTER_PORT=str(free_port())
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert machine.stdout is not None
    log = ""
    for line in machine.stdout:
        log += line
        if " iteration        3/" in line:
            script = psutil.Process(machine.pid)
            for process in [script, *script.children(recursive=True)]:
                process.terminate()
    assert machine.wait() == 0, log[-4000:]
    assert "exiting program after receiving SIGTERM" in log
    assert "closing signal" not in log  # what torchrun says when it ends its processes
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < 2000 and (save / f"iter_{saved:07d}" / "metadata.json").exists()


def test_a_run_that_fails_ends(world: World) -> None:
    """Its data workers, which take SIGTERM for the run's, end with it."""
    save = world.folder / "failing"
    save.mkdir()
    (save / "iter_0000002").write_text("where the folder of a checkpoint should be")
    settings = {"TRAIN_ITERS": "100", "SAVE_INTERVAL": "2", "GPUS_PER_NODE": "1"}
    done = subprocess.run(
        ["bash", str(SCRIPT), *SMALL, "--num-workers", "1"],
        env=machine_environment(world, save, MASTER_PORT=str(free_port()), **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout[-4000:]
    assert "iter_0000002: File exists" in done.stdout or "Not a directory" in done.stdout
