"""--shuffle-files: another order of files for another seed, the same one for the same, and files stay whole.

Workers of pytest-xdist run each test once.
"""

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
    config = SimpleNamespace(getoption=lambda name: seed if name == "shuffle_files" else None)
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


def test_workers_run_what_one_process_runs(tmp_path: Path) -> None:
    """Every test once, with the same seed; files of one unit in one process, the others in any."""
    pytest.importorskip("xdist")
    text = Path(__file__).with_name("conftest.py").read_text()
    # What is tested here does not need the seconds that importing torch takes.
    (tmp_path / "conftest.py").write_text(text.replace("import torch\n", "raise ImportError\n"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = distributed\n  one_worker\n  slow\n  gpu\n")
    marks = {"a": "distributed", "b": "distributed", "c": "one_worker", "d": "slow"}
    for name, mark in marks.items():
        (tmp_path / f"test_{name}.py").write_text(
            "import os, pathlib, pytest\n"
            f"pytestmark = pytest.mark.{mark}\n"
            "@pytest.mark.parametrize('case', [0, 1, 'x@y', 'a::b'])\n"
            "def test(case, request):\n"
            f"    name = f'{name} ' + request.node.name.replace(':', '.')\n"
            "    with open(pathlib.Path(os.environ['DRAWN'], name), 'a') as file:\n"
            "        file.write(f'{os.getpid()} ')\n"
        )
    drawn = []
    for number, workers in enumerate((["-p", "no:xdist"], ["-p", "xdist", "-n", "2"])):
        folder = tmp_path / f"drawn{number}"
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--slow", "--shuffle-files=3", *workers],
            cwd=tmp_path,
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "DRAWN": str(folder)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        drawn.append({path.name: path.read_text().split() for path in folder.iterdir()})
    one, several = drawn
    assert one.keys() == several.keys() and len(several) == 4 * len(marks)
    assert all(len(processes) == 1 for processes in several.values())
    where = {names: {several[name][0] for name in several if name[0] in names} for names in ("ab", "c", "abcd")}
    assert len(where["ab"]) == len(where["c"]) == 1 and len(where["abcd"]) == 2
