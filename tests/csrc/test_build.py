"""The CUDA library, compiled and linked for every architecture where there is an nvcc."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from megatron_pd.ops.library import _CUDA_LIBRARY, has_cuda_kernels

ROOT = Path(__file__).parents[2]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def run_setup(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here: the CUDA kernels aren't compiled")
def test_the_cuda_library_is_built_for_every_architecture_that_nvcc_knows() -> None:
    """Its operators are registered, which takes loading it, and it has machine code for A100, H100
    and B200. It is not run: that takes a GPU (tools/gpu_check.py)."""
    assert has_cuda_kernels(), "nvcc is here, but `make build` made no CUDA library"
    softmax = [f"sparse_log_softmax_{name}" for name in ("forward", "backward", "backward_")]
    for name in (*softmax, "row_divergence"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_pd::{name}", "CUDA")
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return
    known = subprocess.check_output([find_nvcc(), "--list-gpu-code"], text=True).split()
    images = subprocess.check_output([CUOBJDUMP, "--list-elf", _CUDA_LIBRARY], text=True)
    for architecture in ("sm_80", "sm_90", "sm_100"):
        if architecture in known:
            assert f".{architecture}.cubin" in images


def test_a_build_without_nvcc_says_so() -> None:
    done = run_setup(CUDA_HOME="/nowhere", MEGATRON_PD_BUILD_CUDA="auto")
    assert done.returncode == 0
    assert (
        "Building without CUDA kernels (the CPU's are complete): /nowhere/bin/nvcc" in done.stdout
    )


def test_cuda_kernels_that_are_asked_for_and_cannot_be_built_are_an_error() -> None:
    done = run_setup(CUDA_HOME="/nowhere", MEGATRON_PD_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "MEGATRON_PD_BUILD_CUDA=1, but /nowhere/bin/nvcc doesn't exist" in done.stderr
