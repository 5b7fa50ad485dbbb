"""setup.py: what it compiles, for which GPUs, against which torch, and what it says."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch
import triton

from megatron_pd.ops.library import _CUDA_LIBRARY, has_cuda_kernels

ROOT = Path(__file__).parents[2]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py's functions, without setting anything up."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_of_megatron_pd", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA toolkit whose nvcc knows three architectures."""
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'sm_80\\nsm_90\\nsm_100\\n'\n")
    nvcc.chmod(0o755)
    return tmp_path


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here: the CUDA kernels aren't compiled")
def test_the_cuda_library_is_built_for_every_architecture_that_nvcc_knows() -> None:
    """Its operators are registered, which takes loading it, and it has machine code for A100, H100
    and B200. It is not run: that takes a GPU (tools/gpu_check.py)."""
    assert has_cuda_kernels(), "nvcc is here, but `make build` made no CUDA library"
    softmax = [f"sparse_log_softmax_{name}" for name in ("forward", "backward", "backward_")]
    for name in (*softmax, "row_divergence"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_pd::{name}", "CUDA")
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available():
        return
    known = subprocess.check_output([find_nvcc(), "--list-gpu-code"], text=True).split()
    images = subprocess.check_output([CUOBJDUMP, "--list-elf", _CUDA_LIBRARY], text=True)
    for architecture in ("sm_80", "sm_90", "sm_100"):
        if architecture in known:
            assert f".{architecture}.cubin" in images


def test_a_build_without_nvcc_says_so(build, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setattr(build, "BUILD_CUDA", "auto")
    assert [library.name for library in build.libraries()] == [
        "megatron_pd.ops._operators",
        "megatron_pd.store._logit_codec",
    ]
    sentence = "Building without CUDA kernels (the CPU's are complete): /nowhere/bin/nvcc"
    assert sentence in capsys.readouterr().out


def test_cuda_kernels_that_are_asked_for_and_cannot_be_built_are_an_error(
    build, monkeypatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setattr(build, "BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="BUILD_CUDA=1, but /nowhere/bin/nvcc doesn't exist"):
        build.libraries()


def use_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])


def test_kernels_are_built_for_the_gpus_that_are_here(build, monkeypatch, toolkit) -> None:
    use_gpus(monkeypatch, (9, 0), (9, 0), (8, 0))
    assert build.cuda_architectures(toolkit) == ["8.0", "9.0"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert build.cuda_architectures(toolkit) == ["8.0", "9.0+PTX"]


def test_without_a_gpu_kernels_are_built_for_those_of_clusters(build, monkeypatch, toolkit) -> None:
    use_gpus(monkeypatch)
    assert build.cuda_architectures(toolkit) == ["8.0", "9.0", "10.0"]


def test_a_gpu_that_nvcc_does_not_know_is_a_sentence(build, monkeypatch, toolkit) -> None:
    use_gpus(monkeypatch, (12, 0))
    with pytest.raises(build.CudaUnavailableError, match=r"doesn't know the GPU .* 12\.0"):
        build.cuda_architectures(toolkit)


def test_a_torch_that_is_too_old_is_refused_not_replaced(build, monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    with pytest.raises(SystemExit, match=r"torch 2\.7\.1\+cu126 is installed here, and .* needs 2"):
        build.torch_flags()
    monkeypatch.setattr(torch, "__version__", "2.8.0a0+34c6371d24.nv25.08")
    assert "-DMEGATRON_PD_TORCH=2.8.0a0+34c6371d24.nv25.08" in build.torch_flags()[0]


def test_what_the_build_needs_and_lacks_is_a_sentence(build, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(SystemExit, match="error: pybind11 is needed to build megatron_pd"):
        build.logit_codec()
    monkeypatch.undo()
    monkeypatch.setattr(build.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(SystemExit, match=r"Python\.h is missing.*apt-get install python3\.\d+-dev"):
        build.logit_codec()


def test_a_toolchain_with_a_static_libstdcpp_makes_no_second_copy_of_it(
    build, monkeypatch, tmp_path
) -> None:
    link_flags = build.torch_flags()[1]
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "OBJECTS", tmp_path / "objects")
    monkeypatch.setattr(build, "CXX", [*build.CXX, "-static-libstdc++"])
    source = tmp_path / "csrc/message.cpp"
    source.parent.mkdir()
    source.write_text("#include <ostream>\nvoid print(std::ostream& out) { out << 1L << 1.5; }\n")
    compiler = (*build.CXX, "-fPIC")
    library = build.Library("message", [build.Source(source, compiler)], link_flags)
    defined = subprocess.check_output(
        ["nm", "--demangle", "--defined-only", build.build(library)], text=True
    )
    assert "print(std::" in defined and "std::ostream::_M_insert" not in defined
    assert "std::codecvt" not in defined


def test_a_missing_compiler_is_a_sentence(build, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    with pytest.raises(build.BuildError, match=r"compiler /nowhere/g\+\+ isn't there.*apt-get"):
        build.run_once(tmp_path / "objects/a.o", ["/nowhere/g++"], [tmp_path / "a.cpp"])


def test_operators_of_another_torch_are_a_sentence() -> None:
    script = "import torch; torch.__version__ = '2.3.1+cu121'; import megatron_pd.ops"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "was built against torch 2." in done.stderr
    assert "this is torch 2.3.1+cu121, which it can't run with. Build it again" in done.stderr
