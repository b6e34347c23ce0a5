"""Sets up .venv and builds warpform in it; what is there already is kept. Needs nothing but a Python.

    python3 tools/environment.py run test lint build

`run`, `test`, `bench`, `lint` and `docs` install requirements/*.txt, each again only when it changed; `build` compiles
what changed.
A torch with CUDA that the calling Python has is used as it is, instead of downloading another.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
REQUIREMENTS = ROOT / "requirements"
SETS = {
    "run": ["build", "run", "weights"],
    "test": ["test", "bench"],
    "bench": ["bench"],
    "lint": ["lint"],
    "docs": ["docs"],
}


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"warpform: {sentence}")


def say(text: str, end: str = "\n") -> None:
    print(f"environment: {text}", end=end, flush=True)


def run_step(title: str, command: list[str]) -> None:
    """One line on the screen while it runs, the command's output only where it fails."""
    say(f"{title} ... ", end="")
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{'done' if done.returncode == 0 else 'failed'}, {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-30:]))
        fail(f"{title} failed; the lines above say why (no network? install the packages of requirements/ by hand).")


def probe(python: str | Path, code: str) -> str:
    """Returns the output of `python -c code`, or "" where it fails."""
    command = [str(python), "-c", code]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cuda_torch() -> tuple[str, Path] | None:
    """Version and site-packages of a usable CUDA torch in the calling Python."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.__file__, sep='\\n')"
    lines = probe(sys.executable, code).splitlines()
    if len(lines) != 3 or lines[1] == "None":
        return None
    numbers = re.match(r"(\d+)\.(\d+)", lines[0])
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (2, 10):
        return None
    return lines[0], Path(lines[2]).parent.parent


def has_nvcc() -> bool:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    named = [os.environ.get("CUDACXX"), *(str(Path(home) / "bin" / "nvcc") for home in homes if home), "nvcc"]
    return any(shutil.which(name) for name in named if name)


def create() -> None:
    """Makes .venv, with a view of the caller's torch where that one has CUDA."""
    if VENV_PYTHON.exists():
        if probe(VENV_PYTHON, "print(1)") == "1":
            return
        fail(".venv is there but its Python does not run on this machine; remove the folder .venv and try again.")
    if sys.version_info < (3, 10):  # noqa: UP036 (this file also meets Pythons that are too old for the package)
        fail(
            f"needs Python 3.10 or newer, and {sys.executable} is {sys.version.split()[0]}; try make PYTHON=python3.12."
        )
    if not probe(sys.executable, "import venv, ensurepip; print(1)"):
        fail(
            f"{sys.executable} cannot make virtual environments (venv or ensurepip is missing); install it "
            "(Debian, Ubuntu: apt install python3-venv), or choose another interpreter with make PYTHON=..."
        )
    torch = cuda_torch()
    flags = ["--system-site-packages"] if torch else []
    what = f" that sees torch {torch[0]} of {sys.executable}" if torch else ""
    run_step(
        f"creating .venv (Python {sys.version.split()[0]}){what}", [sys.executable, "-m", "venv", *flags, str(VENV)]
    )
    if torch and not probe(VENV_PYTHON, "import torch; print(1)"):
        # The caller is a virtual environment itself; --system-site-packages shows its parent's packages, not its own.
        site = probe(VENV_PYTHON, "import sysconfig; print(sysconfig.get_path('purelib'))")
        (Path(site) / "_caller_site_packages.pth").write_text(f"{torch[1]}\n")


def pip(title: str, *arguments: str) -> None:
    command = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    run_step(title, command)


def install(name: str) -> None:
    """Installs requirements/NAME.txt unless that was done before with the same content."""
    path = REQUIREMENTS / f"{name}.txt"
    stamp = VENV / f".warpform-{name}"
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == content:
        return
    names = " ".join(dict.fromkeys(re.findall(r"^[\w.-]+", path.read_text(), re.MULTILINE)))
    options = ["--no-deps"] if name == "weights" else []
    if name == "build":
        # Into .venv, whatever the Python that it sees through has: the build looks for their programs beside them.
        options.append("--ignore-installed")
    pip(f"installing {names}", *options, "-r", str(path))
    stamp.write_text(content)


def install_torch() -> None:
    """torch comes first; one that works already in the environment stays."""
    version = probe(VENV_PYTHON, "import torch; print(torch.__version__)")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (2, 10):
        say("torch is large; this can take minutes")
        install("torch")


def build() -> None:
    """Compiles what changed, and makes the package importable in .venv."""
    start = time.monotonic()
    if subprocess.run([str(VENV_PYTHON), "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT).returncode:
        raise SystemExit(1)
    print(f"build: up to date, {time.monotonic() - start:.0f} s", flush=True)
    here = str(ROOT / "python" / "warpform")
    code = "import importlib.util, os; s = importlib.util.find_spec('warpform'); print(os.path.dirname(s.origin))"
    done = subprocess.run(
        [str(VENV_PYTHON), "-c", code], cwd=VENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    if done.stdout.strip() != here:
        pip("linking warpform into .venv", "--no-build-isolation", "--no-deps", "-e", str(ROOT))


def main(arguments: list[str]) -> int:
    unknown = sorted(set(arguments) - set(SETS) - {"build"})
    if unknown or not arguments:
        fail(f"environment.py takes any of run, test, bench, lint, docs, build; got {' '.join(unknown) or 'nothing'}.")
    create()
    for name in arguments:
        if name == "run":
            install_torch()
            if os.environ.get("WARPFORM_CUDA") != "0" and not has_nvcc():
                install("nvcc")
        for part in SETS.get(name, []):
            install(part)
    if "build" in arguments:
        build()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
