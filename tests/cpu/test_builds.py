"""CPU kernels in other builds: each instruction set of this machine, under sanitizers, and in other threads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from warpform import _library

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "tools").is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))

import gates  # noqa: E402

pytestmark = pytest.mark.slow

# By the name in WARPFORM_CPU_ISA: that of the table of kernels.
NAMES = {"v3": "x86-64-v3", "v4": "x86-64-v4", "neon": "aarch64"}


def build_folder() -> Path:
    """The folder that the library was linked in. Skips the test where there is none."""
    objects = gates.cpu_objects(_library.library_path())
    if not objects or not shutil.which("g++"):
        pytest.skip("needs the build's folder and g++")
    return next(iter(objects.values()))[0].parents[4]


def compile_commands(folder: Path, isa: str) -> list[list[str]]:
    """How each file of CPU kernels was compiled for an instruction set, without the output."""
    commands = []
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        words = entry["command"].split()
        if f"-DWARPFORM_CPU_ISA={isa}" in words:
            at = words.index("-o")
            first = next(i for i, word in enumerate(words) if word.endswith("g++"))  # after ccache
            commands.append(words[first:at] + words[at + 2 :])
    assert commands
    return commands


def run(command: list[str], **how: object) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **how)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"


def run_conformance(environment: dict[str, str], *choice: str, folder: Path = ROOT / "python") -> None:
    """The conformance tests of CPU kernels in a process of their own, which finds warpform in `folder`."""
    env = {key: value for key, value in os.environ.items() if key != "CI" and not key.startswith("PYTEST")}
    env |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment}
    code = (
        "import sys, pytest, warpform\n"
        f"assert warpform.__file__.startswith({str(folder)!r}), warpform.__file__\n"
        "from warpform import _library\n"
        "assert not _library.cpu_kernels_missing(), _library.cpu_kernels_missing()\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    run([sys.executable, "-c", code, *options, "tests/conformance", *choice], cwd=ROOT, env=env, timeout=1500)


@pytest.mark.parametrize("isa", ("v3",))
def test_other_instruction_sets(isa: str) -> None:
    """The tests themselves run on the widest; here each that is narrower."""
    if _library.cpu_isa() in ("", NAMES[isa]) or not _library.cpu_isa().startswith("x86"):
        pytest.skip("this machine has no other instruction set with kernels")
    run_conformance({"WARPFORM_CPU_ISA": isa}, "-k", "cpu")


@pytest.fixture(scope="module")
def isa() -> str:
    if not _library.cpu_isa():
        pytest.skip(_library.cpu_kernels_missing())
    return "neon" if _library.cpu_isa() == "aarch64" else "v3"


def test_address_and_undefined_behaviour_sanitizer(isa: str, tmp_path: Path) -> None:
    """Kernels compiled with both: an element read past a tensor, or a shift too far, ends the process."""
    folder = build_folder()
    # Without expensive optimizations GCC fuses no product with a sum, and roundings would be others.
    flags = ["-O1", "-fexpensive-optimizations", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = {}
    for words in compile_commands(folder, isa):
        source = Path(words[-1])
        objects[source.name] = tmp_path / f"{source.stem}.o"
        run([*words, *flags, "-o", str(objects[source.name])], cwd=folder)
    ninja = gates.run([shutil.which("ninja") or "ninja", "-C", str(folder), "-t", "commands", "libwarpform.so"])
    link = ninja.splitlines()[-1].replace(": && ", "").replace(" && :", "").split()
    for name, path in objects.items():
        at = link.index(f"CMakeFiles/warpform_cpu_{isa}.dir/csrc/cpu/{name}.o")
        link[at] = str(path)
    package = tmp_path / "python" / "warpform"
    shutil.copytree(ROOT / "python" / "warpform", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    link[link.index("-o") + 1] = str(package / "libwarpform.so")
    run([*link, "-fsanitize=address,undefined"], cwd=folder)
    runtimes = [gates.run(["g++", f"-print-file-name=lib{name}.so"]).strip() for name in ("asan", "ubsan")]
    environment = {
        "WARPFORM_CPU_ISA": isa,
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    # Without -s pytest would keep what goes to stderr, and lose it when a sanitizer ends the process.
    run_conformance(environment, "-s", "-k", "cpu and test_cases", folder=package.parent)


def test_threads(isa: str, tmp_path: Path) -> None:
    """Each kernel on 1, 2, 3 and 7 threads that are not torch's: the same bits, and no race for ThreadSanitizer."""
    commands = compile_commands(build_folder(), isa)
    program = tmp_path / "threads"
    # One compilation for all: the files share no name but those of their namespace.
    words = [word for word in commands[0][:-2] if word not in ("-c", "-O3", "-std=c++20")]
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-pthread"]
    sources = [words[-1] for words in commands]
    command = [*words, *flags, "-o", str(program), str(Path(__file__).with_name("threads.cpp")), *sources]
    run(command, cwd=build_folder())
    run([str(program)], timeout=300)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64-static")),
    reason="needs a compiler and an emulator for aarch64",
)
def test_aarch64_computes_the_same(isa: str, tmp_path: Path) -> None:
    """Every kernel in an emulator of that processor, against this one: they differ by roundings alone."""
    sources = [words[-1] for words in compile_commands(build_folder(), isa)]
    common = ["-O2", "-std=c++20", "-Icsrc", "-Icsrc/kernels", "-pthread", "-static", "tests/cpu/threads.cpp", *sources]
    native = ["g++", f"-DWARPFORM_CPU_ISA={isa}", *([] if isa == "neon" else ["-march=x86-64-v3"])]
    run([*native, *common, "-o", str(tmp_path / "native")], cwd=ROOT)
    run(["aarch64-linux-gnu-g++", "-DWARPFORM_CPU_ISA=neon", *common, "-o", str(tmp_path / "other")], cwd=ROOT)
    run([str(tmp_path / "native"), str(tmp_path / "native.bin")])
    run(["qemu-aarch64-static", str(tmp_path / "other"), str(tmp_path / "other.bin")])
    here, there = (torch.from_file(str(path), size=path.stat().st_size // 4) for path in sorted(tmp_path.glob("*.bin")))
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-4)
