"""Builds the native parts; everything else about the package is in pyproject.toml.

Three shared libraries, each from the sources of one folder under csrc/:

    megatron_pd/ops/_sparse_log_softmax       the operators and their CPU kernels
    megatron_pd/ops/_sparse_log_softmax_cuda  their CUDA kernels, where nvcc is found
    megatron_pd/store/_logit_codec            the codec of the logit store (pybind11, no torch)

The CPU kernels are one source compiled once per instruction set, so files need their own flags,
and setuptools compiles an editable install into a fresh temporary folder each time. So the
compiler is called here: objects stay in build/, and one is compiled again only when its command
line or a file it includes has changed.

Environment: MEGATRON_PD_BUILD_CUDA=0|1|auto (default auto), TORCH_CUDA_ARCH_LIST, CUDA_HOME,
CXX, MAX_JOBS.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "objects"
CXX = shlex.split(os.environ.get("CXX", "g++"))
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-DNDEBUG"]
CXX_FLAGS += [
    "-ffp-contract=fast"
]  # the exponential's range reduction gains from fused multiply-add


@dataclass(frozen=True)
class Source:
    """One file to compile: `flags` come on top of the library's own."""

    path: Path
    compiler: tuple[str, ...]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """One shared library, named like the Python module beside which it lies."""

    name: str
    sources: list[Source]
    link_flags: list[str] = field(default_factory=list)


# --- what is built -------------------------------------------------------------------------------


def x86_flags(path: Path) -> tuple[str, ...]:
    """Instruction set of one CPU kernel file; the operator chooses between them at run time."""
    return {
        "cpu_rows_avx2": ("-mavx2", "-mfma"),
        "cpu_rows_avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    }.get(path.stem, ())


def torch_flags() -> tuple[list[str], list[str]]:
    """Compile and link flags of a library that uses torch's C++ operators."""
    import torch

    folder = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    compile_flags = [f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-fopenmp"]
    compile_flags += [f"-isystem{folder / 'include'}"]
    # torch's own OpenMP runtime carries the soname of the system's, so both are one at run time.
    return compile_flags, [f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-fopenmp"]


def sparse_log_softmax() -> Library:
    compile_flags, link_flags = torch_flags()
    folder = ROOT / "csrc" / "sparse_log_softmax"
    paths = sorted(folder.glob("*.cpp"))
    if platform.machine() not in ("x86_64", "AMD64"):
        paths = [path for path in paths if not x86_flags(path)]
    compiler = (*CXX, *CXX_FLAGS, *compile_flags)
    sources = [Source(path, compiler, x86_flags(path)) for path in paths]
    return Library("megatron_pd.ops._sparse_log_softmax", sources, link_flags)


def logit_codec() -> Library:
    import pybind11

    paths = sorted((ROOT / "csrc" / "logit_codec").glob("*.cpp"))
    includes = (pybind11.get_include(), sysconfig.get_path("include"))
    compiler = (*CXX, *CXX_FLAGS, *(f"-isystem{path}" for path in includes))
    return Library("megatron_pd.store._logit_codec", [Source(p, compiler) for p in paths])


def libraries() -> list[Library]:
    return [library for library in (sparse_log_softmax(), logit_codec()) if library.sources]


# --- how it is built -----------------------------------------------------------------------------


def object_path(library: Library, source: Source) -> Path:
    return OBJECTS / library.name / (source.path.name + ".o")


def compile_command(library: Library, source: Source) -> list[str]:
    target = object_path(library, source)
    command = [*source.compiler, *source.flags, "-MD", "-MF", f"{target}.d"]
    return [*command, "-c", str(source.path), "-o", str(target)]


def is_fresh(target: Path, command: list[str], inputs: list[Path]) -> bool:
    """True when `target` was made by this very command and is newer than all its inputs."""
    stamp = Path(f"{target}.command")
    if not (target.exists() and stamp.exists() and stamp.read_text() == shlex.join(command)):
        return False
    made = target.stat().st_mtime
    return all(path.exists() and path.stat().st_mtime <= made for path in inputs)


def included_files(target: Path) -> list[Path]:
    """The files that the compiler read for `target`, from the make rule it left behind."""
    rule = Path(f"{target}.d")
    if not rule.exists():
        return [rule]  # never compiled: a file that doesn't exist makes it stale
    _, _, names = rule.read_text().replace("\\\n", " ").partition(":")
    return [Path(name.replace("\0", " ")) for name in names.replace("\\ ", "\0").split()]


def run_once(target: Path, command: list[str], inputs: list[Path]) -> None:
    if is_fresh(target, command, inputs):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"building {target.relative_to(ROOT)}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise RuntimeError(f"Building {target.name} failed; the command was: {shlex.join(command)}")
    Path(f"{target}.command").write_text(shlex.join(command))


def build(library: Library) -> Path:
    """Compile what is stale, link it, and return the shared library's path."""

    def compile_one(source: Source) -> Path:
        target = object_path(library, source)
        run_once(target, compile_command(library, source), included_files(target))
        return target

    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        objects = list(pool.map(compile_one, library.sources))
    shared = OBJECTS / library.name / "library.so"
    command = [*CXX, "-shared", *map(str, objects), *library.link_flags, "-o", str(shared)]
    run_once(shared, command, objects)
    return shared


def install(shared: Path, target: Path) -> None:
    """Put the library in place, by renaming: a running process may have the old one mapped."""
    if target.exists() and target.read_bytes() == shared.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_suffix(".new")
    shutil.copyfile(shared, staged)
    os.replace(staged, target)


class BuildLibraries(build_ext):
    def build_extensions(self) -> None:
        self.built = {library.name: build(library) for library in LIBRARIES}
        for name, shared in self.built.items():
            install(shared, Path(self.get_ext_fullpath(name)))

    def copy_extensions_to_source(self) -> None:
        for name, shared in self.built.items():
            install(shared, ROOT / self.get_ext_filename(name))


LIBRARIES = libraries()

setup(
    ext_modules=[
        Extension(library.name, [str(s.path.relative_to(ROOT)) for s in library.sources])
        for library in LIBRARIES
    ],
    cmdclass={"build_ext": BuildLibraries},
)
