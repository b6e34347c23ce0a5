"""The site of docs/, built once, and a server of it."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def absent(pytestconfig: pytest.Config) -> Callable[[str], NoReturn]:
    """Says that something is not installed: a reason to skip, and in CI a failure."""

    def absent(reason: str) -> NoReturn:
        # --slow sets CI too, on machines that need not have everything.
        if os.environ.get("CI") and not pytestconfig.getoption("--slow"):
            pytest.fail(reason)
        pytest.skip(reason)

    return absent


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site; any warning of the build is an error."""
    if not (ROOT / "mkdocs.yml").exists():
        pytest.skip("needs a checkout")
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            # CI builds the site in a step of its own, `make docs`, which installs it.
            pytest.skip(f"the site needs {module}: pip install -r requirements/docs.txt")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def pages(site: Path) -> list[str]:
    """Paths of all pages in the site, but for the page of errors."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return [path for path in found if path != "404.html"]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """The address of a server of the site on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
