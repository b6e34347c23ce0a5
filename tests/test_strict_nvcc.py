"""tools/strict_nvcc.py, through which kernels for Hopper are compiled: what ptxas only notes is an error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from warpform import _hardware

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "tools" / "strict_nvcc.py"
pytestmark = pytest.mark.skipif(not LAUNCHER.exists(), reason="needs a checkout")

SERIALISED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma "
    "instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the "
    "function 'f'"
)
INJECTED = (
    "ptxas info    : (C7519) warpgroup.arrive is injected in around line 37 by compiler to allow use of registers in "
    "GMMA in function 'f'"
)
HARMLESS = "ptxas info    : Used 168 registers, used 1 barriers"
# With a fence and without a change of registers in flight it compiles without a note.
KERNEL = r"""
__global__ void __launch_bounds__(128) products(float* out, unsigned long long a) {
  float c[4] = {};
  for (int i = 0; i < 4; ++i) {
    FENCE
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "l"(a));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    CHANGE
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = c[i];
}
"""
FENCE = 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");'
CHANGE = "c[0] *= 2.0f;"


def launch(*command: str | Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, str(LAUNCHER), *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120)


def compiler(folder: Path, says: str, status: int = 0) -> Path:
    """A compiler that writes what -o names, and a file of dependencies beside it, as CMake asks nvcc for."""
    path = folder / "nvcc"
    path.write_text(
        "#!/bin/sh\necho compiled\n"
        f"cat >&2 <<'END'\n{says}\nEND\n"
        'while [ $# -gt 0 ]; do case $1 in -o|-MF) echo "$1" > "$2";; esac; shift; done\n'
        f"exit {status}\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def arguments(tmp_path: Path) -> list[str | Path]:
    return ["-MD", "-MF", tmp_path / "a.o.d", "-x", "cu", "-c", tmp_path / "a.cu", "-o", tmp_path / "a.o"]


def test_what_compiles_without_a_note_passes(tmp_path, arguments):
    done = launch(compiler(tmp_path, HARMLESS), *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "compiled\n", HARMLESS + "\n")
    assert (tmp_path / "a.o").is_file() and (tmp_path / "a.o.d").is_file()


@pytest.mark.parametrize(
    ("note", "remedy"),
    [
        (SERIALISED, "untouched until the wgmma_wait"),
        (SERIALISED.replace("C7510", "C7511"), "smaller tiles"),
        (SERIALISED.replace("C7510", "C7514"), "the same fences and waits"),
        (SERIALISED.replace("C7510", "C9999"), "from the wgmma_fence to the wgmma_wait"),
        (INJECTED, "in the wgmma_fence before it"),
        (INJECTED.replace("C7519", "C9999"), "in the wgmma_fence before it"),
    ],
)
def test_a_note_is_one_sentence_and_leaves_no_object(tmp_path, arguments, note, remedy):
    done = launch(compiler(tmp_path, f"{HARMLESS}\n{note}"), *arguments)
    *said, sentence = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "compiled\n" and said == [HARMLESS, note]
    assert sentence.startswith(f"warpform: {tmp_path / 'a.cu'} ") and note in sentence and remedy in sentence
    assert not (tmp_path / "a.o").exists()


def test_a_compiler_that_fails_keeps_its_status(tmp_path, arguments):
    done = launch(compiler(tmp_path, SERIALISED, 3), *arguments)
    assert done.returncode == 3 and done.stderr == SERIALISED + "\n"
    assert launch(tmp_path / "missing").returncode == 127
    assert launch().returncode == 2


def test_a_cache_stands_behind_it(tmp_path, arguments):
    cache = tmp_path / "ccache"
    cache.write_text('#!/bin/sh\necho cached\nexec "$@"\n')
    cache.chmod(0o755)
    done = launch(cache, compiler(tmp_path, INJECTED), *arguments)
    assert done.returncode == 1 and done.stdout == "cached\ncompiled\n"
    assert f"warpform: {tmp_path / 'a.cu'} " in done.stderr


@pytest.mark.parametrize(("fence", "change", "code"), [(FENCE, CHANGE, "C7511"), ("", "", "C7519"), (FENCE, "", None)])
def test_notes_of_the_compiler_that_is_there(tmp_path, fence, change, code):
    nvcc = next(filter(_hardware.nvcc_version, _hardware.nvcc_paths()), None)
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "kernel.cu"
    source.write_text(KERNEL.replace("FENCE", fence).replace("CHANGE", change))
    done = launch(nvcc, "-O3", "-arch=sm_90a", "-cubin", "-o", tmp_path / "kernel.cubin", source)
    assert done.returncode == (code is not None), done.stderr
    assert (tmp_path / "kernel.cubin").exists() is (code is None)
    if code:
        assert f"({code})" in done.stderr.splitlines()[-1]


def test_a_source_package_has_what_the_build_reads():
    read = re.findall(r"\$\{CMAKE_SOURCE_DIR\}/([\w./]+\.py)", (ROOT / "CMakeLists.txt").read_text())
    packed = (ROOT / "MANIFEST.in").read_text().split()
    assert "tools/strict_nvcc.py" in read
    assert [name for name in read if name not in packed and not name.startswith("python/warpform/")] == []
