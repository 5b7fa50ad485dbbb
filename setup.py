"""Builds the native parts; everything else about the package is in pyproject.toml.

Three shared libraries, from the folders under csrc/:

    megatron_pd/ops/_operators       sparse_log_softmax, row_divergence: operators and CPU kernels
    megatron_pd/ops/_operators_cuda  their CUDA kernels, where nvcc fits torch's CUDA
    megatron_pd/store/_logit_codec   the codec of the logit store (pybind11, no torch)

The loops over the vocabulary on the CPU are one source compiled once per instruction set, so files
need their own flags, and setuptools compiles an editable install into a fresh temporary folder
each time. So the compiler is called here: objects stay in build/, and one is compiled again only
when its command line or a file it includes has changed.

The operators run with the torch that they were compiled against and no other, so its version is
written beside them, and megatron_pd.ops.library compares. tools/build_backend.py finds that torch.

Environment: MEGATRON_PD_BUILD_CUDA=0|1|auto (default auto: build if it can be built), CUDA_HOME,
TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"; default: the GPUs that are here, or else A100, H100 and B200),
CXX, MAX_JOBS.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build import build as BuildAll
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPERATORS = [ROOT / "csrc" / name for name in ("sparse_log_softmax", "row_divergence")]
OBJECTS = ROOT / "build" / "objects"
CXX = shlex.split(os.environ.get("CXX", "g++"))
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-DNDEBUG"]
CXX_FLAGS += [
    "-ffp-contract=fast"
]  # the exponential's range reduction gains from fused multiply-add

EXTENSION_NAMES = (
    "megatron_pd.ops._operators",
    "megatron_pd.ops._operators_cuda",
    "megatron_pd.store._logit_codec",
)
BUILD_CUDA = os.environ.get("MEGATRON_PD_BUILD_CUDA", "auto")
CUDA_ARCHITECTURES = {"8.0": "sm_80", "9.0": "sm_90", "10.0": "sm_100"}


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
    avx512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
    return {
        "rows_avx2": ("-mavx2", "-mfma"),
        "rows_avx512": avx512,
        "rows_avx512_bf16": (*avx512, "-mavx512bf16"),
    }.get(path.stem, ())


def torch_flags() -> tuple[list[str], list[str]]:
    """Compile and link flags of a library that uses torch's C++ operators."""
    torch = supported_torch()
    folder = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    compile_flags = [f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-fopenmp"]
    compile_flags += [f"-isystem{folder / 'include'}"]
    # Read by nobody: with another torch the command is another, and nothing old is linked.
    compile_flags += [f"-DMEGATRON_PD_TORCH={torch.__version__}"]
    # torch's own OpenMP runtime carries the soname of the system's, so both are one at run time.
    link_flags = [f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-fopenmp"]
    # Some toolchains have the static libstdc++ alone. A second copy of it beside torch's crashes as
    # soon as an error message prints a number.
    return compile_flags, [*link_flags, "-l:libstdc++.so.6"]


def operators() -> Library:
    compile_flags, link_flags = torch_flags()
    patterns = ("operators.cpp", "cpu/*.cpp")
    paths = [path for folder in OPERATORS for p in patterns for path in sorted(folder.glob(p))]
    if platform.machine() not in ("x86_64", "AMD64"):
        paths = [path for path in paths if not x86_flags(path)]
    compiler = (*CXX, *CXX_FLAGS, *compile_flags)
    sources = [Source(path, compiler, x86_flags(path)) for path in paths]
    return Library("megatron_pd.ops._operators", sources, link_flags)


def operators_cuda() -> Library:
    """Raises CudaUnavailableError where this machine or this torch can't build it."""
    toolkit = cuda_toolkit()
    compile_flags, link_flags = torch_flags()
    # Headers and libraries that a minimal toolkit lacks are in the wheels that torch depends on.
    wheels = Path(needed("torch").__file__).parents[1] / "nvidia"
    folders = [toolkit / "include", *sorted(wheels.glob("*/include"))]
    includes = [f"-isystem{path}" for path in folders]
    nvcc = [str(toolkit / "bin" / "nvcc"), "-std=c++20", "-O3", "-ftz=true", "-lineinfo"]
    nvcc += ["--expt-relaxed-constexpr"]  # std::numeric_limits on the device
    nvcc += ["-ccbin", CXX[0], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    nvcc += [flag for arch in cuda_architectures(toolkit) for flag in gencode(arch)]
    host = (*CXX, *CXX_FLAGS, *compile_flags, *includes)
    sources = [Source(folder / "cuda" / "launch.cu", tuple(nvcc)) for folder in OPERATORS]
    sources += [Source(folder / "cuda" / "operators.cpp", host) for folder in OPERATORS]
    runtime = [str(path) for path in sorted(wheels.glob("*/lib/libcudart.so.*"))[:1]]
    runtime = runtime or [f"-L{toolkit / 'lib64'}", "-lcudart"]
    link_flags = [*link_flags, "-lc10_cuda", *runtime]
    return Library("megatron_pd.ops._operators_cuda", sources, link_flags)


def logit_codec() -> Library:
    pybind11 = needed("pybind11")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise SystemExit(
            f"error: {headers / 'Python.h'} is missing: install Python's headers (Debian and "
            f"Ubuntu: apt-get install python{sysconfig.get_python_version()}-dev)."
        )
    folder = ROOT / "csrc" / "logit_codec"
    paths = sorted(folder.rglob("*.cpp"))
    includes = (pybind11.get_include(), headers)
    compiler = (*CXX, *CXX_FLAGS, f"-I{folder}", *(f"-isystem{path}" for path in includes))
    return Library("megatron_pd.store._logit_codec", [Source(p, compiler) for p in paths])


def libraries() -> list[Library]:
    found = [operators(), logit_codec()]
    if BUILD_CUDA != "0":
        try:
            found.append(operators_cuda())
        except CudaUnavailableError as error:
            report_no_cuda(error)
    return [library for library in found if library.sources]


# --- what it is built against --------------------------------------------------------------------


def needed(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise SystemExit(
            f"error: {name} is needed to build megatron_pd and can't be imported ({error}). "
            "Install it, or leave out --no-build-isolation."
        ) from error


def supported_torch() -> ModuleType:
    """The torch that is here, never another: one that is too old is refused, not replaced."""
    torch = needed("torch")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = next(d for d in project["dependencies"] if d.startswith("torch>=")).partition(">=")[2]
    if release(torch.__version__) < release(oldest):
        raise SystemExit(
            f"error: torch {torch.__version__} is installed here, and megatron_pd needs {oldest} "
            "or newer. Install a newer torch, or use another environment."
        )
    return torch


def release(version: str) -> tuple[int, int]:
    """(2, 10) for "2.10.0a0+b4e4ee8.nv25.12": a container's pre-release counts as the release."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


# --- CUDA ----------------------------------------------------------------------------------------


class CudaUnavailableError(Exception):
    """Why the CUDA kernels can't be built here, as a sentence."""


def report_no_cuda(error: Exception) -> None:
    """Building without CUDA is fine unless it was asked for."""
    if BUILD_CUDA == "1":
        raise SystemExit(f"error: MEGATRON_PD_BUILD_CUDA=1, but {error}")
    print(f"Building without CUDA kernels (the CPU's are complete): {error}", flush=True)


def cuda_toolkit() -> Path:
    """The folder of nvcc and its headers, of the CUDA version that torch was built with."""
    torch = needed("torch")
    if torch.version.cuda is None:
        raise CudaUnavailableError(f"torch {torch.__version__} is a build without CUDA.")
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise CudaUnavailableError(
            f"{nvcc} doesn't exist." if home else "no nvcc is on PATH and CUDA_HOME isn't set."
        )
    # nvcc on PATH may be a script or a link; it knows itself where its toolkit is.
    dry_run = run_tool(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
    top = next(line.partition("TOP=")[2] for line in dry_run.splitlines() if "TOP=" in line)
    toolkit = Path(top.strip()).resolve()
    if cuda_major(toolkit) != torch.version.cuda.partition(".")[0]:
        raise CudaUnavailableError(
            f"{nvcc} is of CUDA {cuda_major(toolkit)} and torch was built with CUDA "
            f"{torch.version.cuda}: install a toolkit of torch's version, or set CUDA_HOME to it."
        )
    return toolkit


def run_tool(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CudaUnavailableError(f"{command[0]} doesn't run: {error}.") from error
    return done.stdout + done.stderr


def cuda_major(toolkit: Path) -> str:
    version = run_tool(str(toolkit / "bin" / "nvcc"), "--version")
    return version.partition("release ")[2].partition(".")[0]


def cuda_architectures(toolkit: Path) -> list[str]:
    """As in TORCH_CUDA_ARCH_LIST; by default the GPUs that are here; where there are none, A100,
    H100 and, if nvcc knows it, B200."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wanted:
        return wanted.replace(";", " ").split()
    known = run_tool(str(toolkit / "bin" / "nvcc"), "--list-gpu-code").split()
    here = visible_architectures()
    for arch in here:
        if f"sm_{arch.replace('.', '')}" not in known:
            raise CudaUnavailableError(
                f"{toolkit / 'bin' / 'nvcc'} doesn't know the GPU that is here (compute capability "
                f"{arch}): install another CUDA toolkit, or set TORCH_CUDA_ARCH_LIST."
            )
    return here or [arch for arch, code in CUDA_ARCHITECTURES.items() if code in known]


def visible_architectures() -> list[str]:
    """The compute capabilities of this machine's GPUs, such as ["9.0"]; [] without a GPU."""
    cuda = needed("torch").cuda
    devices = range(cuda.device_count()) if cuda.is_available() else ()
    return sorted({"{}.{}".format(*cuda.get_device_capability(device)) for device in devices})


def gencode(arch: str) -> list[str]:
    number, _, ptx = arch.partition("+")
    code = number.replace(".", "")
    flags = [f"-gencode=arch=compute_{code},code=sm_{code}"]
    return flags + [f"-gencode=arch=compute_{code},code=compute_{code}"] * (ptx == "PTX")


# --- how it is built -----------------------------------------------------------------------------


class BuildError(Exception):
    """A compiler or linker failed; what it said is on stderr."""


def object_path(library: Library, source: Source) -> Path:
    return OBJECTS / library.name / source.path.relative_to(ROOT / "csrc").with_suffix(".o")


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
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise BuildError(
            f"the compiler {command[0]} isn't there: install it (Debian and Ubuntu: apt-get "
            "install g++), or name another in CXX."
        ) from error
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise BuildError(f"building {target.name} failed; the command was: {shlex.join(command)}")
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
    def run(self) -> None:
        self.wanted = libraries()
        super().run()

    def build_extensions(self) -> None:
        self.built: dict[str, Path] = {}
        for library in self.wanted:
            try:
                shared = self.built[library.name] = build(library)
            except BuildError as error:
                if not library.name.endswith("_cuda"):
                    raise SystemExit(f"error: {error}") from error
                report_no_cuda(error)
            else:
                install(shared, Path(self.get_ext_fullpath(library.name)))
        operators = Path(self.get_ext_fullpath("megatron_pd.ops._operators"))
        write_torch_version(operators.parent)

    def copy_extensions_to_source(self) -> None:
        for name in EXTENSION_NAMES:
            target = ROOT / self.get_ext_filename(name)
            if name in self.built:
                install(self.built[name], target)
            else:
                target.unlink(missing_ok=True)  # an earlier build's, out of step with the rest
        write_torch_version(ROOT / "megatron_pd" / "ops")


def write_torch_version(folder: Path) -> None:
    """Says which torch the operators in `folder` run with."""
    (folder / "_operators.torch").write_text(needed("torch").__version__)


class BuildFresh(BuildAll):
    def run(self) -> None:
        # A module that was moved since the last build would still be put into the wheel.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension(name, []) for name in EXTENSION_NAMES],
    cmdclass={"build": BuildFresh, "build_ext": BuildLibraries},
)
