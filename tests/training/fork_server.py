"""Runs Megatron jobs one after another, each as real gloo processes, and imports Megatron once.

    python fork_server.py < jobs > results        (one JSON object per line)

Starting Megatron takes ten seconds a process, its training a tiny model two. So this process
imports everything, starts no thread, and forks the ranks of each job with the environment that
torchrun would give them. A rank that fails takes the others down, as torchrun does.

Job: {"module": …, "argv": […], "ranks": n, "log": path, "kill_when": path or null}. With
`kill_when`, all ranks get SIGKILL as soon as that file exists. Result: {"statuses": […]}, exit
statuses by rank, or −signal.
"""

import contextlib
import glob
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from typing import Any

from megatron_pd.errors import reporting_errors

MODULES = (
    "megatron_pd.pretrain",
    "megatron_pd.evaluate.loss",
    "megatron_pd.cli",
    "megatron_pd.teacher.megatron",
    "few_descriptors_job",
    "logits_job",
    "model_logits_job",
    "prefetch_job",
    "second_node_job",
    "stock_job",
    "uneven_replicas_job",
    "unsampled_job",
    "validate_job",
)
TIMEOUT_S = 240
GRACE_S = 5


def run_rank(job: dict[str, Any], rank: int, port: int) -> None:
    """The life of one rank; never returns to the server's loop."""
    status = 1
    try:
        output = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["ranks"]),
            LOCAL_WORLD_SIZE=str(job["ranks"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        sys.argv = [job["module"], *job["argv"]]
        with reporting_errors():
            sys.exit(importlib.import_module(job["module"]).main())
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # Megatron's checkpoints start a helper that outlives a process which ends by _exit.
        for helper in multiprocessing.active_children():
            helper.terminate()
        flush_tensorboard()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def flush_tensorboard() -> None:
    """What was logged last, of the evaluation after training, would be lost by _exit."""
    writer = importlib.import_module("megatron.training").get_tensorboard_writer()
    if writer is not None:
        writer.flush()


def free_port() -> int:
    """A port below those that the system gives out by itself, which others could get meanwhile."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run(job: dict[str, Any]) -> list[int]:
    port = free_port()
    ranks: dict[int, int] = {}
    for rank in range(job["ranks"]):
        process = os.fork()
        if process == 0:
            run_rank(job, rank, port)
        ranks[process] = rank
    statuses = [0] * job["ranks"]
    deadline = time.monotonic() + TIMEOUT_S
    while ranks:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            code = os.waitstatus_to_exitcode(status)
            statuses[ranks.pop(process)] = code
        killed = job["kill_when"] and glob.glob(job["kill_when"])
        if any(statuses):
            # As under torchrun, the others have a moment to say what they found.
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if killed or time.monotonic() > deadline:
            for survivor in ranks:
                os.kill(survivor, signal.SIGKILL)
        if not process:
            time.sleep(0.002)
    return statuses


def main() -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print is no result
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        results.write(json.dumps({"statuses": run(json.loads(line))}) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
