"""The site builds without a warning, and its pages, links, anchors and names are complete."""

from __future__ import annotations

import ast
import importlib.util
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from warpform.models import families

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "warpform"

# All tests of this file read one site.
pytestmark = pytest.mark.one_worker


@dataclass(repr=False)
class Page(HTMLParser):
    """What a page holds: ids, links, what it loads, and the words of its content."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    words: int = 0
    depth: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        elif tag in ("link", "script", "img", "iframe", "source"):
            url = given.get("href") or given.get("src")
            if url and not url.startswith("data:"):
                self.loads.append(url)
        self.depth += tag == "article"

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "article"

    def handle_data(self, data: str) -> None:
        self.words += len(data.split()) if self.depth else 0


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[str, Page]:
    """Every page by its path in the site."""
    found = {}
    for path in sorted(site.rglob("*.html")):
        page = found[path.relative_to(site).as_posix()] = Page()
        page.feed(path.read_text(encoding="utf-8"))
    return found


def test_no_page_is_empty(parsed: dict[str, Page], pages: list[str]) -> None:
    assert {path: parsed[path].words for path in pages if parsed[path].words < 40} == {}
    sources = {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")
    }
    assert set(pages) == sources


def test_links_and_anchors_lead_somewhere(site: Path, parsed: dict[str, Page]) -> None:
    broken = []
    for path, page in parsed.items():
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                # The page of errors may be shown at any address, so its links begin at the root.
                target = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(parts.path))).lstrip("/")
            target = "index.html" if target == "." else target
            if not (site / target).is_file():
                broken.append(f"{path}: {url}")
            elif parts.fragment and target in parsed and unquote(parts.fragment) not in parsed[target].ids:
                broken.append(f"{path}: {url} has no such anchor")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(parsed: dict[str, Page]) -> None:
    elsewhere = {path: [url for url in page.loads if urlsplit(url).netloc] for path, page in parsed.items()}
    assert {path: urls for path, urls in elsewhere.items() if urls} == {}


def exported(module: str) -> list[str]:
    """`__all__` of a module of warpform, read from its text."""
    path = PACKAGE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return list(ast.literal_eval(statement.value))
    raise AssertionError(f"{path} has no __all__")


def test_reference_has_every_public_name(parsed: dict[str, Page]) -> None:
    anchors: set[str] = set()
    for path, page in parsed.items():
        if path.startswith("reference/"):
            anchors |= page.ids
    wanted = {"warpform.Packing"}
    modules = [
        "ops",
        "nn",
        "distributed",
        "integrations.transformers",
        "compat.torch_varlen",
        "compat.flash_attn_interface",
    ]
    modules += ["compat.flash_attn", "compat.flash_attn.bert_padding", "models.auto", "models.sentence_encoder"]
    modules += [f"models.{family}" for family in families.FAMILIES]
    for module in modules:
        wanted |= {f"warpform.{module}.{name}" for name in exported(module)}
    wanted |= {f"warpform.models.{family}.{name}" for family, names in families.FAMILIES.items() for name in names}
    wanted -= {"warpform.compat.flash_attn.flash_attn_interface"}  # its functions are those of flash_attn
    assert sorted(wanted - anchors) == []


def strings() -> Iterator[str]:
    """The texts in the package's, the build's and the binding's sources, those of f-strings in pieces."""
    for path in [*PACKAGE.rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    for path in (ROOT / "csrc").rglob("*.cpp"):
        yield from re.findall(r'"((?:[^"\\\n]|\\.)*)"', path.read_text(encoding="utf-8"))


def test_messages_of_troubleshooting_are_those_of_the_sources() -> None:
    """Each message has a long enough piece of a text in the sources: who changes a message finds the page."""
    if not (ROOT / "docs").exists():
        pytest.skip("needs a checkout")
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = [" ".join(re.sub("^> ?", "", q, flags=re.M).split()) for q in re.findall(r"(?:^> .*\n)+", page, re.M)]
    messages = [quote for quote in quotes if not quote.startswith(("ModuleNotFoundError", "g++"))]
    assert len(messages) > 15
    pieces = {" ".join(text.split()) for text in strings()}
    pieces = {piece for piece in pieces if len(piece) >= 18}
    assert [message for message in messages if not any(piece in message for piece in pieces)] == []


# ---- the hooks ----


@pytest.fixture
def hooks(site: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "tools" / "docs_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "repository, text, expected",
    [
        ("", "[setup.py](../setup.py)", "`setup.py`"),
        ("", "[the build](../setup.py#L1)", "the build (`setup.py`)"),
        (
            "https://host/owner/name/",
            "[setup.py](../setup.py)",
            "[setup.py](https://host/owner/name/blob/HEAD/setup.py)",
        ),
        ("", "[ring](ring.md) [x](#x) [y](https://host/y)", "[ring](ring.md) [x](#x) [y](https://host/y)"),
        ("", "```sh\n[setup.py](../setup.py)\n```", "```sh\n[setup.py](../setup.py)\n```"),
    ],
)
def test_links_out_of_docs(hooks: ModuleType, repository: str, text: str, expected: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    config = SimpleNamespace(repo_url=repository)
    assert hooks.on_page_markdown(text, page=page, config=config, files=None) == expected


def test_link_to_a_file_that_is_not_there(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[tuple[object, ...]] = []
    monkeypatch.setattr(hooks.log, "warning", lambda *arguments: warnings.append(arguments))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="reference/ops.md"))
    hooks.on_page_markdown("[x](../../none.py)", page=page, config=SimpleNamespace(repo_url=""), files=None)
    assert warnings and warnings[0][1:] == ("reference/ops.md", "../../none.py")
