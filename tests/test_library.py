"""Loading: importing never fails, and the first use says in one sentence what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import warpform
from warpform import _env, _library

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


def test_library_corrupt(copy):
    (copy / "warpform" / "libwarpform.so").write_bytes(b"\x7fELF" + bytes(100))
    found = report(copy)
    assert not found["loaded"]
    assert "could not be loaded with torch" in found["ops"] and "rebuild it" in found["ops"]


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
