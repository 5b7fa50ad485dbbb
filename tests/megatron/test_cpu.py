"""MEGATRON_PD_DEVICE chooses the device, or says why it cannot be had."""

import os
import subprocess
import sys

import pytest


def install(device: str) -> subprocess.CompletedProcess:
    """In a process of its own, since the facade stays where it is put."""
    script = (
        "from megatron_pd.errors import reporting_errors\n"
        "from megatron_pd.megatron import cpu\n"
        "with reporting_errors(): print(cpu.install(), cpu.install(), cpu.is_cpu())\n"
    )
    environment = {**os.environ, "MEGATRON_PD_DEVICE": device, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )


def test_a_machine_without_a_gpu_is_a_cpu() -> None:
    assert install("auto").stdout == "cpu cpu True\n"


@pytest.mark.parametrize(
    ("device", "sentence"), [("cuda", "torch sees no GPU"), ("tpu", "'tpu' is unknown")]
)
def test_a_device_that_is_not_there_is_a_sentence(device: str, sentence: str) -> None:
    done = install(device)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
