"""MEGATRON_PD_DEVICE chooses the device, or says why it cannot be had; and what "cuda" draws."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megatron_pd.megatron import cpu

cpu.install()


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


DRAWS = {
    "rand": lambda: torch.rand(4, device="cuda"),
    "randn": lambda: torch.randn(4, device=torch.device("cuda", 0)),
    "randint": lambda: torch.randint(9, (4,), device=0),
    "randperm": lambda: torch.randperm(9, device="cuda"),
    "dropout": lambda: F.dropout(torch.ones(64), 0.5),
    "attention's dropout": lambda: F.scaled_dot_product_attention(
        *torch.ones(3, 1, 8, 4), dropout_p=0.5
    ),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_cuda_has_a_generator_of_its_own(draw: str) -> None:
    torch.manual_seed(3)
    torch.cuda.manual_seed(5)
    cpu_state, cuda_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    first = DRAWS[draw]()
    assert torch.equal(torch.get_rng_state(), cpu_state)
    assert not torch.equal(torch.cuda.get_rng_state(), cuda_state)
    assert not torch.equal(DRAWS[draw](), first)
    torch.cuda.set_rng_state(cuda_state)
    torch.manual_seed(3)  # seeds "cuda" too
    torch.cuda.manual_seed(5)
    assert torch.equal(DRAWS[draw](), first)


def test_the_cpus_draws_leave_cuda_alone() -> None:
    state = torch.cuda.get_rng_state()
    torch.rand(4), torch.empty(4).normal_(), torch.randperm(9)
    assert torch.equal(torch.cuda.get_rng_state(), state)
