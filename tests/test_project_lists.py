"""Lists that are kept in several places agree: environment variables, and the packages that are needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from warpform import _env

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")

# These belong to Python, to gloo and to OpenMP, and are set rather than read.
OTHERS = {"PYTHONPATH", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "PYTEST_XDIST_WORKER"}
READS = re.compile(r'(?:environ(?:\.get\(|\[)|getenv\(|_flag\(|switch\()"([A-Z_]+)"')


def read_variables() -> set[str]:
    """The variables that sources read by their names."""
    files = [ROOT / "setup.py", ROOT / "bench" / "harness.py", ROOT / "tools" / "environment.py"]
    files += [ROOT / "tests" / "conftest.py", ROOT / "tests" / "simt" / "conftest.py"]
    files += [*(ROOT / "python").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]
    files += (ROOT / "csrc").rglob("*.cu")
    return {name for file in files for name in READS.findall(file.read_text(encoding="utf-8"))} - OTHERS


def described_variables() -> set[str]:
    """The first column of the table in docs/settings.md."""
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    section = page.split("## Environment variables")[1].split("\n## ")[0]
    return {name for row in re.findall(r"^\|([^|]+)\|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def test_every_variable_is_described() -> None:
    found = read_variables()
    assert {"WARPFORM_CUDA", "WARPFORM_STRICT", "WARPFORM_BACKEND", "WARPFORM_HOPPER", "CXX", "CUDACXX", "CI"} <= found
    assert found | set(_env.NAMES) | {"PYTHON", "CUDA_PATH"} == described_variables()


def test_doctor_knows_what_is_read() -> None:
    assert read_variables() - {"CI"} <= set(_env.NAMES)


def requirements(*names: str) -> dict[str, list]:
    """The requirements of files of requirements/, by the name of the package."""
    from packaging.requirements import Requirement

    found: dict[str, list] = {}
    for name in names:
        for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                required = Requirement(line)
                found.setdefault(required.name, []).append(required)
    return found


@pytest.mark.parametrize(
    "group, files",
    [
        ("dependencies", ("torch", "run")),
        ("transformers", ("run",)),
        ("demo", ("run", "weights")),
        ("test", ("test",)),
        ("dev", ("lint", "build")),
        ("build-system", ("build",)),
    ],
)
def test_pinned_versions_are_those_that_the_package_allows(group: str, files: tuple[str, ...]) -> None:
    tomllib = pytest.importorskip("tomllib")
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = {
        **project["project"]["optional-dependencies"],
        "dependencies": project["project"]["dependencies"],
        "build-system": project["build-system"]["requires"],
    }
    pinned = requirements(*files)
    for line in groups[group]:
        wanted = Requirement(line)
        assert wanted.name in pinned, f"{wanted.name} of {group} is in none of {', '.join(files)}"
        for required in pinned[wanted.name]:
            versions = [s.version for s in required.specifier if s.operator in ("==", ">=")]
            assert versions and all(wanted.specifier.contains(v) for v in versions), f"{required} against {wanted}"


def test_pages_name_the_versions_that_the_build_takes() -> None:
    """The tables of README and docs/settings.md against pyproject.toml, setup.py and the drivers that doctor names."""
    tomllib = pytest.importorskip("tomllib")
    from warpform._hardware import DRIVERS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    torch = ".".join(re.findall(r"\d+", re.findall(r"^MIN_TORCH = (.+)$", setup, re.MULTILINE)[0]))
    nvcc = ".".join(re.findall(r"\d+", re.findall(r"^MIN_NVCC = (.+)$", setup, re.MULTILINE)[0]))
    assert f"torch>={torch}" in project["dependencies"]
    needed = {
        "Python": project["requires-python"].removeprefix(">="),
        "torch": torch,
        "transformers": project["optional-dependencies"]["transformers"][0].removeprefix("transformers>="),
    }
    for page in ("README.md", "docs/settings.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for name, version in needed.items():
            assert f"| {name} | {version} or later" in text, f"{page}: {name} {version}"
        assert f"{nvcc} or later" in text and "sm_80" in text, page
        for cuda, driver in DRIVERS.items():
            words = rf"\b{driver}( or later)? for (kernels built with )?CUDA {cuda}\b"
            assert re.search(words, text), f"{page}: {driver}"
