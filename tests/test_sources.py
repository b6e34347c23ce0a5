"""The hash that ties a library to its sources."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from warpform import _sources


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


FILES = {"torch/ops.cpp": b"ops", "kernels/a.cu": b"a\r\n\0\xff", "kernels/a/b.cuh": b"", "kernels-old.h": b"old"}


def test_recipe(tmp_path: Path) -> None:
    csrc = tree(tmp_path, FILES | {"simt/host.cpp": b"not in it", "simt/include/device/ptx.cuh": b"nor this"})
    order = ["kernels-old.h", "kernels/a.cu", "kernels/a/b.cuh", "torch/ops.cpp"]  # '-' < '.' < '/' in bytes
    expected = hashlib.sha256(b"".join(name.encode() + b"\0" + FILES[name] + b"\0" for name in order))
    assert _sources.sources_hash(csrc) == expected.hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"torch/ops.cpp": b"opt"},
        {"kernels/new.cu": b""},
        {"torch/simt/x.cpp": b"only the folder at the top is the emulator's"},
        {"simt.h": b"a file is not the folder"},
    ],
    ids=str,
)
def test_every_change_shows(tmp_path: Path, change: dict[str, bytes]) -> None:
    before = _sources.sources_hash(tree(tmp_path / "before", FILES))
    assert _sources.sources_hash(tree(tmp_path / "after", FILES | change)) != before
    assert _sources.sources_hash(tree(tmp_path / "same", dict(reversed(FILES.items())))) == before


def test_header_of_the_build(tmp_path: Path) -> None:
    """The build runs the file as a script, without torch; an unchanged header is not written again."""
    csrc, header = tree(tmp_path / "csrc", FILES), tmp_path / "sources_hash.h"
    command = [sys.executable, "-S", _sources.__file__, str(csrc), str(header)]
    subprocess.run(command, check=True)
    assert header.read_text() == f'#define WARPFORM_SOURCES "{_sources.sources_hash(csrc)}"\n'
    written = header.stat().st_mtime_ns
    subprocess.run(command, check=True)
    assert header.stat().st_mtime_ns == written
    (csrc / "kernels/a.cu").write_bytes(b"b")
    subprocess.run(command, check=True)
    assert _sources.sources_hash(csrc) in header.read_text()
