"""--shuffle-files: another order of files for another seed, the same one for the same, and files stay whole."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

FILES = [f"tests/{folder}/test_{name}.py" for folder in ("ops", "nn") for name in "abcde"]
TESTS = ("test_2", "test_0", "test_1")


@pytest.fixture
def conftest(pytestconfig: pytest.Config) -> ModuleType:
    plugins = pytestconfig.pluginmanager.get_plugins()
    path = str(Path(__file__).with_name("conftest.py"))
    return next(plugin for plugin in plugins if getattr(plugin, "__file__", None) == path)


def order(conftest: ModuleType, files: list[str], seed: int | None) -> list[str]:
    """The files in the order that they run in."""
    config = SimpleNamespace(getoption=lambda name: seed)
    items = [
        SimpleNamespace(nodeid=f"{file}::{test}", get_closest_marker=lambda name: None)
        for file in files
        for test in TESTS
    ]
    conftest.pytest_collection_modifyitems(config, items)
    groups = [
        (file, tuple(item.nodeid.split("::")[1] for item in group))
        for file, group in itertools.groupby(items, lambda item: item.nodeid.split("::")[0])
    ]
    assert sorted(groups) == sorted((file, TESTS) for file in files)
    return [file for file, _ in groups]


def test_files_are_shuffled_whole(conftest: ModuleType) -> None:
    assert order(conftest, FILES, None) == FILES
    orders = {seed: order(conftest, FILES, seed) for seed in range(5)}
    assert len({tuple(files) for files in (FILES, *orders.values())}) == 6
    for seed, files in orders.items():
        assert order(conftest, FILES, seed) == files
        assert order(conftest, FILES[::3], seed) == [file for file in files if file in FILES[::3]]


def test_the_seed_is_printed(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text("def test(): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "--shuffle-files"],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "files shuffled: --shuffle-files=" in done.stdout and "2 tests collected" in done.stdout
