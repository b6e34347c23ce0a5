"""Builds libwarpform.so and the module _C with CMake and ninja, and hands them to setuptools.

The library uses torch's stable ABI and no Python, so the wheel serves every Python and every torch from 2.10 on. _C is
for the Python that builds; another one does without, and calls the ops through torch.
Everything a builder may lack is looked for before anything is compiled, and its absence is one sentence.

Environment: WARPFORM_CUDA=auto|0|1, WARPFORM_CUDA_ARCHS (a build in the checkout takes those of this machine's GPUs, a
wheel takes all), WARPFORM_SIMT=auto|0|1, MAX_JOBS, CXX, CUDACXX, CUDA_HOME, WARPFORM_BUILD_DIR (where CMake works;
build/ in the checkout).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit("warpform: building needs setuptools >= 77; run: pip install -U setuptools") from None

ROOT = Path(__file__).resolve().parent
# A wheel serves every GPU from sm_80 on: machine code of sm_80 and sm_90a, and PTX that drivers compile for later ones.
WHEEL_ARCHS = "80;90a-real"
# Where there is no GPU to build for: machine code of sm_90a, and PTX for every other GPU from sm_80 on.
NO_GPU_ARCHS = "80-virtual;90a-real"
MIN_TORCH = (2, 10)
MIN_NVCC = (12, 0)
BYTES_PER_JOB = 2 << 30
PIP_NVCC = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl, all ==13.0.*"


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"warpform: {sentence}")


def load_hardware() -> ModuleType:
    """_hardware.py of the package, which cannot be imported before it is built."""
    spec = importlib.util.spec_from_file_location("_hardware", ROOT / "python" / "warpform" / "_hardware.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hardware = load_hardware()


def scratch_options() -> dict[str, dict[str, str]]:
    """Where setuptools works: beside CMake, so that with WARPFORM_BUILD_DIR the source tree may be read-only."""
    folder = os.environ.get("WARPFORM_BUILD_DIR")
    if not folder:
        return {}
    base = Path(folder).resolve() / "setuptools"
    base.mkdir(parents=True, exist_ok=True)
    return {"build": {"build_base": str(base)}, "egg_info": {"egg_base": str(base)}}


def version() -> str:
    text = (ROOT / "python" / "warpform" / "_version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text)[1]


def switch(name: str) -> str:
    value = os.environ.get(name, "auto") or "auto"
    if value not in ("auto", "0", "1"):
        fail(f"{name} must be auto, 0 or 1, got {value!r}.")
    return value


@dataclass(frozen=True)
class Torch:
    version: str
    include: Path
    lib: Path


def find_torch() -> Torch:
    """The torch that this Python imports, by path."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        fail(
            f"building needs torch >= 2.10 in the Python that builds, and importing it failed ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}); install torch==2.13.0 and build with "
            "pip install --no-build-isolation."
        )
    found = str(getattr(torch, "__version__", "0"))
    if (hardware.version_pair(found) or (0, 0)) < MIN_TORCH:
        fail(f"building needs torch >= 2.10 and this Python has torch {found}; install torch==2.13.0.")
    home = Path(torch.__file__).parent
    if not (home / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        fail(f"torch {found} at {home} comes without its C++ headers; install torch==2.13.0 with pip.")
    return Torch(found, home / "include", home / "lib")


def find_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "c++", "clang++"]:
        path = shutil.which(name)
        if path:
            return path
    what = f"CXX={wanted} is not a program" if wanted else "none of g++, c++, clang++ is on PATH"
    fail(f"building needs a C++20 compiler and {what}; install g++ 11 or newer (Debian, Ubuntu: apt install g++).")


def find_tool(module: str, attribute: str, program: str) -> str:
    """A program out of a Python package. No system CMake: 3.25 drops C++20 for nvcc 13 without a word."""
    candidates = []
    with contextlib.suppress(Exception):
        candidates.append(Path(getattr(importlib.import_module(module), attribute)) / program)
    # A package of the environment that this one sees through looks for its program in the wrong one of the two. Its
    # list of files says where the program is.
    for found in importlib.metadata.distributions(name=module):
        candidates += [Path(file.locate()) for file in found.files or [] if file.name == program]
    for path in candidates:
        if path.is_file() and os.access(path, os.X_OK):
            return str(path.resolve())
    fail(
        f"building needs the Python package {module} with its program {program}, and {sys.executable} has none; run: "
        f"{sys.executable} -m pip install --ignore-installed cmake ninja"
    )


def find_module_headers() -> tuple[Path, Path] | None:
    """The folders of Python.h and of pybind11, which _C needs; None where one is missing."""
    python = Path(sysconfig.get_paths()["include"])
    found = importlib.util.find_spec("pybind11")
    pybind11 = Path(found.origin).parent / "include" if found and found.origin else None
    missing = []
    if not (python / "Python.h").is_file():
        missing.append(f"{python} has no Python.h (Debian, Ubuntu: apt install python3-dev)")
    if pybind11 is None or not (pybind11 / "pybind11" / "pybind11.h").is_file():
        missing.append("there is no Python package pybind11")
    if missing:
        print(f"warpform: building without _C, which makes calls faster: {'; '.join(missing)}.", flush=True)
        return None
    return python, pybind11


def run_text(*command: str) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    root: Path
    cudart: Path


def inspect_nvcc(nvcc: str) -> Cuda | str:
    """What this nvcc is, or one clause saying why it cannot be used."""
    version = hardware.nvcc_version(nvcc)
    if version is None:
        return f"{nvcc} does not answer to --version"
    cuda = "{}.{}".format(*version)
    if version < MIN_NVCC:
        return f"{nvcc} is CUDA {cuda}, and C++20 needs 12.0 or newer"
    # nvcc on PATH may be a wrapper or a link; its own dry run says where the toolkit is.
    top = re.search(r"^#\$ TOP=(.+)$", run_text(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    root = Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (root / folder / "libcudart_static.a").is_file():
            return Cuda(nvcc, cuda, root, root / folder / "libcudart_static.a")
    return f"the toolkit of {nvcc} at {root} has no libcudart_static.a"


def find_cuda() -> Cuda | None:
    """The first nvcc that can be used. None means a build without kernels."""
    wanted = switch("WARPFORM_CUDA")
    if wanted == "0":
        return None
    problems = []
    for nvcc in hardware.nvcc_paths():
        found = inspect_nvcc(nvcc)
        if isinstance(found, Cuda):
            return found
        problems.append(found)
    why = "; ".join(problems) or "found no nvcc in CUDACXX, CUDA_HOME, PATH or Python packages"
    if wanted == "1":
        fail(f"WARPFORM_CUDA=1, but {why}; install the CUDA toolkit or the Python packages {PIP_NVCC}.")
    if problems:
        print(f"warpform: building without CUDA kernels: {why}.", flush=True)
    return None


def find_cuda_headers(cuda: Cuda | None) -> Path | None:
    """The folder of cuda_fp16.h, complete enough for g++ (the runtime's Python package alone lacks crt/)."""
    roots = [cuda.root] if cuda else []
    nvcc = shutil.which("nvcc")
    if not cuda and nvcc:
        found = inspect_nvcc(nvcc)
        roots += [found.root] if isinstance(found, Cuda) else []
    roots += [*hardware.package_toolkits(), Path("/usr/local/cuda"), Path("/usr")]
    for root in roots:
        for folder in (root / "include", root / "targets" / "x86_64-linux" / "include"):
            if (folder / "cuda_fp16.h").is_file() and (folder / "crt" / "host_defines.h").is_file():
                return folder
    return None


def local_archs() -> str:
    """Architectures of a build that stays on this machine: what its GPUs run of a wheel's. One takes 0.6 of the time.

    Without a GPU: NO_GPU_ARCHS, which runs on every GPU from sm_80 on, on most after the driver has compiled it.
    """
    text = run_text("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    capabilities = re.findall(r"^(\d+)\.(\d+)\s*$", text, re.MULTILINE)
    archs = {
        "80-real" if major == "8" else "90a-real" if (major, minor) == ("9", "0") else "80"
        for major, minor in capabilities
    }
    if "80" in archs:
        archs.discard("80-real")
    return ";".join(sorted(archs)) or NO_GPU_ARCHS


def jobs() -> int:
    """Compilers at once: one a core, and no more than memory allows."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0))
    memory = []
    try:
        memory.append(int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) << 10)
        memory.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, TypeError, ValueError):
        pass
    return max(1, min([cores] + [size // BYTES_PER_JOB for size in memory]))


def module_file() -> str:
    """The name of _C for the Python that builds. Other Pythons look for other names, so one wheel may hold it."""
    return "_C" + sysconfig.get_config_var("EXT_SUFFIX")


class BuildLibrary(build_ext):
    """Runs CMake and ninja in build/cmake-*, which stays, and copies the library to where setuptools wants it."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_libraries(self, ext: Extension) -> list[str]:
        return []

    def wants_simt(self, headers: Path | None) -> bool:
        wanted = switch("WARPFORM_SIMT")
        if wanted == "1" and headers is None:
            fail(
                f"WARPFORM_SIMT=1, but cuda_fp16.h was not found; install the CUDA toolkit or the packages {PIP_NVCC}."
            )
        return headers is not None and (wanted == "1" or (wanted == "auto" and (self.editable_mode or self.in_place)))

    def run(self) -> None:
        # The parent clears `inplace` while it runs, so what was asked for is kept under another name.
        self.in_place = bool(self.inplace)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        compiler = find_compiler()
        cmake = find_tool("cmake", "CMAKE_BIN_DIR", "cmake")
        ninja = find_tool("ninja", "BIN_DIR", "ninja")
        cuda = find_cuda()
        headers = find_cuda_headers(cuda)
        module = find_module_headers()
        simt = self.wants_simt(headers)
        local = self.in_place or self.editable_mode
        archs = os.environ.get("WARPFORM_CUDA_ARCHS") or (local_archs() if local else WHEEL_ARCHS)

        # Each set of architectures has a folder, so that a build for one leaves what was built for another.
        identity = "|".join(
            [str(ROOT), str(torch.lib), sys.executable, compiler, *([cuda.nvcc, archs] if cuda else [""])]
        )
        kind = "cuda" if cuda else "nocuda"
        base = Path(os.environ.get("WARPFORM_BUILD_DIR") or ROOT / "build")
        folder = base / f"cmake-{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        folder.mkdir(parents=True, exist_ok=True)

        settings = {
            "CMAKE_BUILD_TYPE": "None",
            "CMAKE_MAKE_PROGRAM": ninja,
            "WARPFORM_PYTHON": sys.executable,
            "CMAKE_CXX_COMPILER": compiler,
            "WARPFORM_VERSION": version(),
            "WARPFORM_TORCH_VERSION": torch.version,
            "WARPFORM_TORCH_INCLUDE": str(torch.include),
            "WARPFORM_TORCH_LIB": str(torch.lib),
            "WARPFORM_CUDA": "ON" if cuda else "OFF",
            "WARPFORM_SIMT": "ON" if simt else "OFF",
            "WARPFORM_CUDA_INCLUDE": str(headers or ""),
            "WARPFORM_PYTHON_INCLUDE": str(module[0]) if module else "",
            "WARPFORM_PYBIND11_INCLUDE": str(module[1]) if module else "",
        }
        env = dict(os.environ)
        if cuda:
            settings |= {
                "CMAKE_CUDA_COMPILER": cuda.nvcc,
                "CMAKE_CUDA_HOST_COMPILER": compiler,
                "WARPFORM_CUDA_ARCHS": archs,
                "WARPFORM_CUDART": str(cuda.cudart),
            }
            # CMake's compiler check links a program, and nvcc from Python packages looks in a folder that they lack.
            env["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(cuda.cudart.parent), env.get("LIBRARY_PATH")]))
        cache = shutil.which("ccache") or shutil.which("sccache")
        settings["CMAKE_CXX_COMPILER_LAUNCHER"] = settings["CMAKE_CUDA_COMPILER_LAUNCHER"] = cache or ""

        parallel = jobs()
        what = f"CUDA {cuda.version} kernels for {archs}" if cuda else "no CUDA kernels"
        driver = hardware.needed_driver(cuda.version) if cuda else None
        print(
            f"warpform: building with torch {torch.version}, {what}{', simt' if simt else ''}, {parallel} jobs",
            flush=True,
        )
        if driver:
            print(f"warpform: the kernels need {driver}; python -m warpform doctor compares", flush=True)
        arguments = [f"-D{name}={value}" for name, value in settings.items()]
        self.step([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *arguments], env, quiet=True)
        self.step([cmake, "--build", str(folder), "--parallel", str(parallel)], env)

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.replace(folder / "libwarpform.so", target)
        if module:
            self.replace(folder / "_C.so", target.with_name(module_file()))
        else:
            target.with_name(module_file()).unlink(missing_ok=True)
        if simt:
            self.replace(folder / "csrc" / "simt" / "libwarpform_simt.so", ROOT / "build" / "libwarpform_simt.so")
            if module:
                control = ROOT / "build" / ("_simt" + sysconfig.get_config_var("EXT_SUFFIX"))
                self.replace(folder / "csrc" / "simt" / "_simt.so", control)

    def step(self, command: list[str], env: dict[str, str], quiet: bool = False) -> None:
        """Runs a command; a quiet one shows what it printed only where it failed."""
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
        done = subprocess.run(command, env=env, text=True, **output)
        if done.returncode:
            print(done.stdout or "", flush=True)
            name = f"{Path(command[0]).name} {'--build' if '--build' in command else 'configure'}"
            fail(f"{name} failed with status {done.returncode}; the lines above say why.")

    def replace(self, source: Path, target: Path) -> None:
        """Copy by renaming over the target, so that a process which has the old library mapped keeps it."""
        temporary = target.with_name(target.name + f".{os.getpid()}")
        shutil.copy2(source, temporary)
        os.replace(temporary, target)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            self.replace(built, ROOT / "python" / "warpform" / "libwarpform.so")
            module = built.with_name(module_file())
            if module.is_file():
                self.replace(module, ROOT / "python" / "warpform" / module.name)
            else:
                (ROOT / "python" / "warpform" / module.name).unlink(missing_ok=True)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the library has no Python in it, and other Pythons do not see this one's _C."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def run(self) -> None:
        # Modules deleted from the source would otherwise live on in build/lib and so in the wheel.
        if not self.skip_build:
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if sys.platform != "linux":
    fail(f"builds on Linux only, and this is {sys.platform}.")

setup(
    ext_modules=[Extension("warpform.libwarpform", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    options=scratch_options(),
)
