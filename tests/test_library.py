"""Loading: importing never fails, and the first use says what is wrong, with every reason that is known."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import warpform
from helpers import elf
from warpform import _elf, _env, _library
from warpform._sources import sources_hash

PACKAGE = Path(warpform.__file__).resolve().parent

# Imports warpform, then reports what a user meets at the first use of anything.
REPORT = """
import json, sys
import warpform
from warpform import _library
found = {"loaded": _library.loaded(), "path": str(_library.library_path())}
for name in ("ops", "Packing", "nn", "models"):
    try:
        getattr(warpform, name)
        found[name] = None
    except ImportError as error:
        found[name] = str(error)
found["version"] = warpform.__version__
print(json.dumps(found))
"""


def report(*path: Path, before: str = "") -> dict:
    """REPORT run in a fresh process whose sys.path begins with `path`."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", before + REPORT]
    done = subprocess.run(command, env=env, cwd=path[0], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder for sys.path with a copy of the package in it, the library included."""
    shutil.copytree(PACKAGE, tmp_path / "copy" / "warpform", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def fake_torch(folder: Path, text: str) -> Path:
    (folder / "fake" / "torch").mkdir(parents=True)
    (folder / "fake" / "torch" / "__init__.py").write_text(text)
    return folder / "fake"


def test_loaded_here():
    assert _library.loaded(), _library.load_error()
    assert _library.load_error() is None
    _library.require()
    assert isinstance(torch.ops.warpform._build_info(), str)
    assert isinstance(_library.build_info(), dict)
    assert isinstance(_library.kernel_table(), list)


def test_public_names():
    assert set(warpform.__all__) <= set(dir(warpform))
    for name in warpform.__all__:
        assert getattr(warpform, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = warpform.nothing


def test_import_registers_autograd(copy):
    # A call of the op itself, with nothing but the package imported, must differentiate.
    code = (
        "import torch, warpform\n"
        "x = torch.randn(3, 4, requires_grad=True)\n"
        "torch.ops.warpform.bias_gelu(x, None).sum().backward()\n"
        "assert x.grad.abs().sum() > 0\n"
    )
    found = report(copy, before=code)
    assert found["loaded"] and found["ops"] is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("raise ImportError('broken on purpose')", "importing torch failed (ImportError: broken on purpose)"),
        ("raise OSError('libcudart.so.13: cannot open')", "importing torch failed (OSError: libcudart.so.13"),
        ("__version__ = '2.9.0'", "needs torch >= 2.10, this Python has torch 2.9.0"),
    ],
)
def test_bad_torch(copy, tmp_path, text, expected):
    found = report(fake_torch(tmp_path, text), copy)
    assert not found["loaded"]
    assert found["version"] == warpform.__version__
    for name in ("ops", "Packing", "nn", "models"):
        assert expected in found[name] and "install torch" in found[name]


def test_library_missing(copy):
    (copy / "warpform" / "libwarpform.so").unlink()
    found = report(copy)
    assert not found["loaded"]
    assert f"{copy}/warpform/libwarpform.so does not exist" in found["ops"] and "pip install" in found["ops"]


def test_library_that_torch_cannot_load(copy):
    """torch says no more than that it failed; what the dynamic loader said is the cause of its error."""
    library = copy / "warpform" / "libwarpform.so"
    wanted = [s.name for s in elf.read(library).symbols if not s.defined and not s.weak and s.name.startswith("aoti_")]
    name = wanted[0].encode()
    library.write_bytes(library.read_bytes().replace(b"\0" + name + b"\0", b"\0" + name[:-1] + b"?\0"))
    found = report(copy)
    assert not found["loaded"]
    first, *rest = found["ops"].splitlines()
    assert f"{library} could not be loaded with torch {torch.__version__}" in first and "rebuild it" in first
    assert any("undefined symbol" in line and name[:-1].decode() + "?" in line for line in rest)


def _patched(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


def _cuts(content: bytes) -> dict[str, int]:
    """Lengths that a truncated copy of an ELF file may have, by the part in which it ends."""
    segments, sections = struct.unpack_from("<QQ", content, 32)
    count = struct.unpack_from("<H", content, 56)[0]
    of_segments = [struct.unpack_from("<IIQQQQ", content, segments + 56 * i) for i in range(count)]
    loaded = [(s[2], s[5]) for s in of_segments if s[0] == 1]
    cuts = {"magic": 3, "header": 40, "table of segments": segments + 56, "first page": 4096}
    cuts |= {"sections": sections + 100}
    cuts |= {f"segment {i}": offset + length // 2 for i, (offset, length) in enumerate(loaded)}
    return cuts | {"last byte": len(content) - 1}


# Loads every library that it is given; a loader that trusts one of them does not live to tell.
LOAD_EACH = """
import json, pathlib, sys
from warpform import _library
errors = []
for path in map(pathlib.Path, sys.argv[1:]):
    _library.library_path = lambda path=path: path
    assert not _library.load()
    errors.append(str(_library.load_error()))
print(json.dumps(errors))
"""


def test_library_cut_off(copy):
    """Loaded without a look at its length, it would end Python with SIGBUS."""
    library = copy / "warpform" / "libwarpform.so"
    content = library.read_bytes()
    assert _elf.fault(library) is None
    cuts = _cuts(content)
    paths = [copy / f"{length}.so" for length in (len(content) // 2, *cuts.values())]
    for path in (library, *paths):
        path.write_bytes(content[: int(path.stem) if path != library else 4096])
    env = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-c", LOAD_EACH, *map(str, paths)]
    done = subprocess.run(command, env=env, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    for path, error in zip(paths, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert error.startswith(f"warpform: {path} is cut off: it has {path.stem} of "), error
        assert error.endswith(f"; rebuild it with {_library.REBUILD}, or copy it again")


def test_library_without_sections_is_judged_by_its_segments(copy):
    """The table of sections, which stands last, may be stripped."""
    library = copy / "warpform" / "libwarpform.so"
    content = library.read_bytes()
    segments, sections = struct.unpack_from("<QQ", content, 32)
    count = struct.unpack_from("<H", content, 56)[0]
    of_segments = [struct.unpack_from("<IIQQQQ", content, segments + 56 * i) for i in range(count)]
    end = max(s[2] + s[5] for s in of_segments if s[0] == 1)
    assert end < sections
    stripped = _patched(_patched(content[:end], 40, bytes(8)), 60, bytes(2))
    library.write_bytes(stripped)
    assert _elf.fault(library) is None
    library.write_bytes(stripped[:-1])
    assert _elf.fault(library) == f"is cut off: it has {end - 1} of {end} bytes"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda _: b"", "is empty"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a pointer of Git LFS"),
        (lambda _: b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        (lambda _: b"PK\x03\x04 a wheel", "is no shared library"),
        (lambda c: _patched(c, 4, b"\1"), "is no shared library of a 64-bit little-endian machine"),
        (lambda c: _patched(c, 18, struct.pack("<H", 62 if c[18] == 183 else 183)), "is for "),
        (lambda c: _patched(c, 18, struct.pack("<H", 243)), "is for ELF machine 243, this machine is "),
        (lambda c: _patched(c, 32, b"\xff" * 8), "is cut off"),
    ],
    ids=("empty", "lfs", "html", "zip", "32-bit", "other-machine", "unknown-machine", "nonsense"),
)
def test_library_that_is_none(tmp_path: Path, change: Callable[[bytes], bytes], fault: str):
    path = tmp_path / "libwarpform.so"
    path.write_bytes(change((PACKAGE / "libwarpform.so").read_bytes()))
    assert (_elf.fault(path) or "").startswith(fault)


def test_every_reason_is_told():
    try:
        try:
            raise OSError("libx.so: undefined symbol: y\nand a second line")
        except OSError as cause:
            raise RuntimeError("it failed\nException raised from f at g.cpp:1\nframe #0: h") from cause
    except RuntimeError as error:
        lines = str(_library._failure("loading failed", error, "rebuild it")).splitlines()
    assert lines == [
        "warpform: loading failed (RuntimeError: it failed); rebuild it",
        "  OSError: libx.so: undefined symbol: y",
        "  and a second line",
    ]


def test_stale_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The library's own hash against that of the checkout around it."""
    built: dict[str, str] = {}
    monkeypatch.setattr(_library, "library_path", lambda: tmp_path / "python" / "warpform" / "libwarpform.so")
    monkeypatch.setattr(_library, "build_info", lambda: built)
    monkeypatch.setattr(_library, "_loaded", True)
    csrc = tmp_path / "csrc"
    built["sources"] = "0" * 64
    assert _library.stale_sources() is None  # no checkout, as where a wheel is installed
    (csrc / "simt").mkdir(parents=True)
    (csrc / "a.cu").write_text("one")
    stale = _library.stale_sources()
    assert stale is not None and str(csrc) in stale and "rebuild it" in stale
    built["sources"] = sources_hash(csrc)
    assert _library.stale_sources() is None
    (csrc / "simt" / "host.cpp").write_text("no part of the library")
    assert _library.stale_sources() is None
    (csrc / "a.cu").rename(csrc / "b.cu")
    assert _library.stale_sources() is not None
    del built["sources"]
    assert _library.stale_sources() is None  # a library that does not say
    built["sources"] = "0" * 64
    monkeypatch.setattr(_library, "_loaded", False)
    assert _library.stale_sources() is None


def test_second_copy_of_the_library(copy, tmp_path):
    # Loading the second one would end the process, with no Python exception.
    other = tmp_path / "other" / "libwarpform.so"
    other.parent.mkdir()
    shutil.copy(copy / "warpform" / "libwarpform.so", other)
    found = report(copy, before=f"import torch; torch.ops.load_library({str(other)!r})\n")
    assert not found["loaded"]
    assert str(other) in found["ops"] and found["path"] in found["ops"]


def test_same_library_loaded_before(copy):
    library = str(copy / "warpform" / "libwarpform.so")
    found = report(copy, before=f"import torch; torch.ops.load_library({library!r})\n")
    assert found["loaded"] and found["ops"] is None


def test_python_side_that_cannot_register(copy):
    # As when a library is older than the Python files beside it.
    with (copy / "warpform" / "ops" / "__init__.py").open("a") as file:
        file.write("\nraise RuntimeError('no such schema')\n")
    found = report(copy)
    assert not found["loaded"]
    assert "registering the ops failed (RuntimeError: no such schema)" in found["ops"]


def test_environment_variables(monkeypatch):
    for name in _env.NAMES:
        monkeypatch.delenv(name, raising=False)
    assert (_env.backend(), _env.strict(), _env.validate(), _env.log_debug()) == ("auto", False, False, False)
    for name in ("WARPFORM_STRICT", "WARPFORM_VALIDATE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WARPFORM_BACKEND", "reference")
    monkeypatch.setenv("WARPFORM_LOG", "debug")
    assert (_env.backend(), _env.strict(), _env.validate(), _env.log_debug()) == ("reference", True, True, True)


@pytest.mark.parametrize(
    "name, read",
    [
        ("WARPFORM_BACKEND", _env.backend),
        ("WARPFORM_STRICT", _env.strict),
        ("WARPFORM_VALIDATE", _env.validate),
        ("WARPFORM_LOG", _env.log_debug),
    ],
)
def test_environment_variables_reject_other_values(monkeypatch, name, read):
    monkeypatch.setenv(name, "sometimes")
    with pytest.raises(ValueError, match=f"{name} must be .*got 'sometimes'"):
        read()
