"""Pages and files beside the code: README's size, links that lead somewhere, files that their readers can parse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import warpform

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
YAML = [
    ".pre-commit-config.yaml", "CITATION.cff", ".github/workflows/ci.yml", ".github/ISSUE_TEMPLATE/bug.yml",
    ".github/ISSUE_TEMPLATE/feature.yml", ".github/ISSUE_TEMPLATE/config.yml",
]  # fmt: skip
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


def prose(text: str) -> str:
    """The text without what stands in blocks of code and in inline code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """The names that headings get, from their text in lower case: those of GitHub and of MkDocs."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if i == 0 else f"{name}-{i}" for name, count in found.items() for i in range(count + 1)}


def documented(name: str, text: str) -> bool:
    """Whether a page of the reference takes the docstring of this name, or of the class or module that has it."""
    return any(f"{name}.".startswith(f"{taken}.") for taken in re.findall(r"^::: ([\w.]+)", text, flags=re.M))


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of it."""
    wrong = []
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        text = file.read_text(encoding="utf-8") if file.suffix == ".md" and file.is_file() else ""
        if not file.exists() or (text and anchor and anchor not in anchors(text) and not documented(anchor, text)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A `name` of [it](x)\n## Twice\n## Twice\n```\n# not one\n```\n::: m.f\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# Title\n[x](b.md) [y](b.md#a-name-of-it) [z](#title) [t](b.md#twice-1) `[c](none)` [w](https://a.b/c)\n"
        "[f](b.md#m.f) [g](b.md#m.f.g)\n"
        "[1](none.md) [2](b.md#not-one) [3](#none) ![4](no.svg) [6](b.md#m.fg)\n```python\n[5](none)\n```\n"
    )
    assert broken(page) == ["none.md", "b.md#not-one", "#none", "no.svg", "b.md#m.fg"]


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) < 150
    assert not [line for line in lines if len(line) > 140]
    # What a newcomer looks for, in this order.
    order = [
        "](docs/pictures/",
        "(#install)",
        "## Install",
        "make demo",
        "pip install",
        "```python",
        "## Which family",
        "## Numbers",
    ]
    places = [text.find(words) for words in order]
    assert -1 not in places and places == sorted(places)
    # The contents line names headings, and every part is in it.
    contents = re.findall(r"\]\(#([\w-]+)\)", text)
    assert set(contents) | {"license", "warpform"} == anchors(text)


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "pictures").glob("*.svg")), ids=lambda path: path.stem)
def test_picture(picture: Path) -> None:
    """A title for those who cannot see it, no font or picture from elsewhere, and a page that shows it."""
    text = picture.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert root.get("aria-label") or (title is not None and title.text)
    assert not re.findall(r"(?:href|src|url)\s*[=(]|@import|@font-face|<script", text)
    assert any(f"pictures/{picture.name})" in page.read_text(encoding="utf-8") for page in PAGES)


def load(name: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", YAML)
def test_yaml_parses(name: str) -> None:
    assert isinstance(load(name), dict)


def test_every_yaml_file_is_in_the_list() -> None:
    found = {*(ROOT / ".github").rglob("*.y*ml"), *ROOT.glob(".*.yaml"), *ROOT.glob("*.cff")}
    assert {str(path.relative_to(ROOT)) for path in found} == set(YAML)


def test_citation() -> None:
    """The version is the package's, and what the format (1.2.0) requires is there."""
    cited = load("CITATION.cff")
    assert str(cited["version"]) == warpform.__version__
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["license"] == "Apache-2.0"
    assert cited["message"] and cited["title"] and all(author.get("name") for author in cited["authors"])
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["abstract"].startswith(project["description"]) and project["license"] == cited["license"]


def test_commit_hooks_call_what_lint_calls() -> None:
    repositories = load(".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = [hook for repository in repositories for hook in repository["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:\n")[1].split("\n\n")[0]
    makefile = makefile.replace("$(VENV_PYTHON)", ".venv/bin/python")
    called = re.findall(r"@(\.venv/bin/.+?)(?: \.| \$\(CXX_SOURCES\))?$", makefile, flags=re.M)
    assert sorted(hook["entry"] for hook in hooks) == sorted(called)


def test_workflow_runs_ci() -> None:
    workflow = load(".github/workflows/ci.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in [step.get("run") for step in steps]


def test_editors_use_the_widths_of_the_formatters() -> None:
    text = (ROOT / ".editorconfig").read_text(encoding="utf-8")
    widths = {
        name: int(width)
        for name, width in re.findall(r"^\[(.+)\]\n(?:(?!\[).*\n)*?max_line_length = (\d+)", text, re.M)
    }
    assert "ColumnLimit: 120" in (ROOT / ".clang-format").read_text(encoding="utf-8")
    assert "line-length = 120" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert widths == {"*.{py,pyi}": 120, "*.{cpp,h,cu,cuh}": 120, "*.md": 140}


def test_contributing_names_folders_that_exist() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where things are")[1].split("\n## ")[0]
    named = [
        name for row in re.findall(r"^\| (`.+?) \|", section, flags=re.M) for name in re.findall(r"`([^`]+)`", row)
    ]
    assert len(named) > 10 and all((ROOT / name).is_dir() for name in named), named
