"""Imports among the models go one way: auto and the tables, families, those that some stand on, common."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import warpform
from warpform.models.families import FAMILIES, OTHERS

MODELS = Path(warpform.__file__).resolve().parent / "models"
# What only `auto` and the package itself may import, as it is above the families.
ABOVE = {"auto", "families"}
# Families that others stand on: language systems on the decoder, vision systems on the ResNet.
STOOD_ON = {"decoder", "resnet"}
# What families share that stands on one of those.
SHARED = {"system_backbone"}
ALONE = {place for place in OTHERS if "." not in place} - ABOVE


def imported(path: Path) -> set[str]:
    """The modules under models/ that a file imports, as dotted names below it; types that only a checker reads too."""
    parts = path.relative_to(MODELS).with_suffix("").parts
    package = parts[:-1]  # of an __init__.py the package itself
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(name.name for name in node.names)]
            assert not any(name.split(".")[0] == "warpform" for name in names), f"{path}: import relatively"
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        depth = len(package) - (node.level - 1)
        if depth < 0:
            continue  # nn, ops, packing: below
        target = [*package[:depth], *(node.module or "").split(".")] if node.module else list(package[:depth])
        found |= {".".join([*target, name.name]) for name in node.names} if not node.module else {".".join(target)}
    return found


def places(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_imports_no_family(family: str) -> None:
    files = sorted((MODELS / family).rglob("*.py")) or [MODELS / f"{family}.py"]
    for path in files:
        assert places(path) <= {family, "common"} | (STOOD_ON | SHARED if family not in STOOD_ON else set()), path


def test_common_imports_no_family() -> None:
    for path in sorted((MODELS / "common").rglob("*.py")):
        assert places(path) <= {"common"}, path


def test_there_is_nothing_else() -> None:
    found = {p.name.removesuffix(".py") for p in MODELS.iterdir() if not p.name.startswith("__")}
    assert found == {*FAMILIES, *ALONE, *ABOVE, *SHARED, "common"}


def test_no_circles() -> None:
    modules = {
        ".".join(p.relative_to(MODELS).with_suffix("").parts).removesuffix(".__init__"): p for p in MODELS.rglob("*.py")
    }
    arrows = {name: {target for target in imported(path) if target in modules} for name, path in modules.items()}
    # A package imports its own modules, and these import each other's names, not the package's.
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for target in sorted(arrows[name]):
                visit(target, (*way, name))
            done.add(name)

    for name in modules:
        if name != "__init__":
            visit(name, ())
