"""The binary's promises, and one clear sentence for whatever a builder lacks."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import elf
from warpform import __version__, _direct, _library

ROOT = Path(__file__).resolve().parent.parent
checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")


# ---- the binary ----


@pytest.fixture(scope="module")
def binary() -> elf.SharedLibrary:
    return elf.read(_library.library_path())


def test_needs_libtorch_and_nothing_of_a_version(binary):
    # libtorch.so must be named although nothing is taken from it: it brings the stream function of a CUDA torch.
    assert "libtorch.so" in binary.needed
    system = (
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libdl",
        "librt",
        "libpthread",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    )
    others = {name for name in binary.needed if name.split(".so")[0] not in (*system, "libtorch", "libtorch_cpu")}
    assert not others


def test_has_no_search_path(binary):
    assert binary.search_paths == []


def test_imports_the_c_interface_of_torch_only(binary):
    imported = [symbol.name for symbol in binary.symbols if not symbol.defined]
    assert any(name.startswith("aoti_torch_") for name in imported)
    assert not [name for name in imported if re.match(r"_ZT?[A-Z]*N?K?(3c10|2at|5torch|6caffe2)", name)]
    assert not [name for name in imported if re.match(r"_?Py[A-Z_]", name)]


def test_exports_the_table_alone(binary):
    assert [symbol.name for symbol in binary.symbols if symbol.defined] == ["warpform_api_v3"]


def test_calls_are_direct():
    """Where the build lost warpform._C, most tests of it would be skipped."""
    if _direct.why_not() is not None and not os.environ.get("CI"):
        pytest.skip(f"there are no direct calls: {_direct.why_not()}")
    assert _direct.why_not() is None


def test_stream_function_is_weak(binary):
    found = [symbol for symbol in binary.symbols if symbol.name == "aoti_torch_get_current_cuda_stream"]
    assert all(symbol.weak for symbol in found)
    assert found or not _library.build_info()["cuda"]


def test_build_info_is_of_this_version():
    info = _library.build_info()
    assert info["version"] == __version__
    assert bool(info["cuda"]) == bool(info["cuda_archs"])
    assert bool(info["cuda"]) == bool(_library.kernel_table())
    if info["hopper"]:
        assert info["hopper"] == "90a" and "90a" in info["cuda_archs"]


def test_elf_reader_reads_what_readelf_reads(binary):
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    text = subprocess.run(
        ["readelf", "-dW", _library.library_path()], capture_output=True, text=True, check=True
    ).stdout
    assert binary.needed == re.findall(r"\(NEEDED\).*\[(.+)\]", text)


# ---- what a builder may lack ----


class Builder:
    """Runs setup.py with a torch made of nothing but what the build looks for, so that no test waits for one."""

    def __init__(self, folder: Path) -> None:
        self.modules = folder / "modules"
        self.programs = folder / "programs"
        self.programs.mkdir(parents=True)
        headers = self.modules / "torch" / "include" / "torch" / "csrc" / "stable"
        headers.mkdir(parents=True)
        (headers / "library.h").touch()
        self.module("torch/__init__.py", "__version__ = '2.13.0'")
        # A package with an __init__ hides the namespace package in which a CUDA compiler may be installed.
        self.module("nvidia/__init__.py", "")
        self.program("g++", "exit 1")
        self.out = folder / "out"

    def module(self, name: str, text: str) -> None:
        path = self.modules / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def sentence(self, **variables: str) -> str:
        """Builds, expects a failure, and returns the one line that says why."""
        env = {
            "PATH": str(self.programs),
            "PYTHONPATH": str(self.modules),
            "WARPFORM_BUILD_DIR": str(self.out),
        } | variables
        command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(self.out), "-t", str(self.out)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("warpform: ")]
        assert len(lines) == 1, done.stderr
        return lines[0]


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    return Builder(tmp_path)


@checkout
@pytest.mark.parametrize(
    "torch, expected",
    [
        ("raise ImportError('no such thing')", "ImportError: no such thing"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("__version__ = '2.9.1+cu128'", "has torch 2.9.1+cu128"),
        ("__version__ = 'unknown'", "has torch unknown"),
    ],
)
def test_torch_missing_broken_or_old(builder, torch, expected):
    builder.module("torch/__init__.py", torch)
    sentence = builder.sentence()
    assert expected in sentence
    assert "torch >= 2.10" in sentence and "install torch==2.13.0" in sentence


@checkout
def test_torch_without_headers(builder):
    shutil.rmtree(builder.modules / "torch" / "include")
    assert "without its C++ headers" in builder.sentence()


@checkout
def test_no_compiler(builder):
    (builder.programs / "g++").unlink()
    assert "apt install g++" in builder.sentence()
    assert "CXX=my-compiler is not a program" in builder.sentence(CXX="my-compiler")


@checkout
@pytest.mark.parametrize("module", ["cmake", "ninja"])
def test_no_cmake_or_ninja(builder, module):
    builder.module(f"{module}.py", "raise ImportError")
    builder.module(
        "sitecustomize.py",
        "import importlib.metadata as m\nall = m.distributions\n"
        "m.distributions = lambda **given: [] if 'name' in given else all(**given)",
    )
    sentence = builder.sentence()
    assert f"the Python package {module}" in sentence
    assert f"{sys.executable} -m pip install --ignore-installed cmake ninja" in sentence


@checkout
@pytest.mark.parametrize("module, attribute", [("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")])
def test_cmake_and_ninja_of_an_environment_behind_this_one(builder, module, attribute):
    # Such a package says that its program is beside this Python, where it is not.
    builder.module(f"{module}.py", f"{attribute} = '/nonexistent/bin'")
    assert "cmake configure failed" in builder.sentence(WARPFORM_CUDA="0", WARPFORM_SIMT="0")


@checkout
def test_says_which_driver_the_kernels_need():
    code = "import runpy, sys; sys.argv = ['setup.py', '-q', '--version']; made = runpy.run_path('setup.py'); "
    code += "print(*map(made['hardware'].needed_driver, ('13.0', '99.1')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "an NVIDIA driver 580 or later None"


@checkout
@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [
        (["9.0"], "90a-real"),
        (["9.0", "9.0"], "90a-real"),
        (["8.6"], "80-real"),
        (["8.0", "9.0"], "80-real;90a-real"),
        (["8.0", "12.0"], "80"),
        (["9.0", "12.0"], "80;90a-real"),
        (["7.5"], "80"),
        (["[N/A]"], "80-virtual;90a-real"),
        ([], "80-virtual;90a-real"),
    ],
)
def test_a_local_build_takes_the_architectures_of_this_machine(tmp_path, capabilities, archs):
    path = tmp_path / "nvidia-smi"
    path.write_text("#!/bin/sh\n" + ("printf '%s\\n' " + " ".join(capabilities) if capabilities else "exit 9") + "\n")
    path.chmod(0o755)
    code = "import runpy, sys; sys.argv = ['setup.py', '-q', '--version']; made = runpy.run_path('setup.py'); "
    code += "print(made['local_archs']())"
    env = {**os.environ, "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == archs


@checkout
@pytest.mark.slow
def test_a_read_only_tree_builds_a_wheel(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "out"
    ignored = shutil.ignore_patterns("build", ".*", "*.so", "*.egg-info", "__pycache__", "results", "tests", "plots")
    shutil.copytree(ROOT, tree, ignore=ignored)
    out.mkdir()
    before = {path.relative_to(tree) for path in tree.rglob("*")}
    for path in [tree, *tree.rglob("*")]:  # root may write all the same, so what is there is compared too
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    env = {**os.environ, "WARPFORM_BUILD_DIR": str(out), "WARPFORM_CUDA": "0", "WARPFORM_SIMT": "0"}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(out)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=tree, env=env, capture_output=True, text=True, timeout=600
    )
    after = {path.relative_to(tree) for path in tree.rglob("*")}
    for path in [tree, *tree.rglob("*")]:  # so that pytest can remove it
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list(out.glob("warpform-*.whl"))
    assert after == before


@checkout
def test_cuda_wanted_and_not_there(builder):
    sentence = builder.sentence(WARPFORM_CUDA="1")
    assert "found no nvcc" in sentence and "nvidia-cuda-nvcc" in sentence


@checkout
@pytest.mark.parametrize("where", ["PATH", "CUDACXX", "CUDA_HOME"])
def test_cuda_too_old(builder, where):
    builder.program("nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    variables = {}
    if where != "PATH":
        home = builder.programs.parent / "toolkit"
        (home / "bin").mkdir(parents=True)
        (builder.programs / "nvcc").rename(home / "bin" / "nvcc")
        variables[where] = str(home if where == "CUDA_HOME" else home / "bin" / "nvcc")
    assert "is CUDA 11.8, and C++20 needs 12.0 or newer" in builder.sentence(WARPFORM_CUDA="1", **variables)


@checkout
@pytest.mark.parametrize("name", ["WARPFORM_CUDA", "WARPFORM_SIMT"])
def test_switches_take_auto_0_1(builder, name):
    assert f"{name} must be auto, 0 or 1, got 'yes'" in builder.sentence(**{name: "yes"})


@checkout
def test_a_failing_compiler_shows_what_it_said(builder):
    builder.program("g++", "echo 'this compiler is broken' >&2; exit 1")
    assert "cmake configure failed" in builder.sentence(WARPFORM_CUDA="0", WARPFORM_SIMT="0")


# ---- the tools around it ----


def run_environment(folder: Path, modules: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """tools/environment.py from a copy, so that it finds no .venv."""
    (folder / "tools").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tools" / "environment.py", folder / "tools")
    command = [sys.executable, str(folder / "tools" / "environment.py"), *arguments]
    env = {**os.environ, "PYTHONPATH": str(modules)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@checkout
def test_python_without_venv_is_one_sentence(tmp_path):
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "ensurepip.py").write_text("raise ImportError")
    done = run_environment(tmp_path, modules, "run")
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1 and "apt install python3-venv" in done.stderr


@checkout
def test_venv_of_another_machine_is_one_sentence(tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/nowhere/python\n")
    python.chmod(0o755)
    done = run_environment(tmp_path, tmp_path, "run")
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1 and "remove the folder .venv" in done.stderr


@checkout
def test_build_tools_go_into_the_environment_itself(tmp_path, monkeypatch):
    # A Python that the environment sees through may have them, with programs where the build does not look.
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    monkeypatch.setattr(environment, "VENV", tmp_path)
    commands = []
    monkeypatch.setattr(environment, "run_step", lambda title, command: commands.append(command))
    environment.install("build")
    environment.install("test")
    assert ["--ignore-installed" in command for command in commands] == [True, False]


@checkout
def test_environment_rejects_unknown_steps(tmp_path):
    done = run_environment(tmp_path, tmp_path, "bulid")
    assert done.returncode != 0 and "got bulid" in done.stderr


@pytest.mark.slow
@checkout
def test_gpu_check_without_a_gpu_is_one_sentence(tmp_path):
    # Torch is told to see no GPU, so that this holds on every machine.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tools/gpu_check", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "needs a machine with a CUDA GPU" in done.stderr
    assert "did not run: needs a machine" in (tmp_path / "summary.txt").read_text()
