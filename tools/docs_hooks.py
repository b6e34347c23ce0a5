"""Hooks of mkdocs.yml: links that leave docs/, pictures in the colours of the page, functions named like modules."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent
# A warning of this logger is an error of mkdocs build --strict.
log = logging.getLogger("mkdocs.hooks.warpform")

_FENCE = re.compile(r"^```.*?^```[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]+)\]\((?P<target>[^()\s]+)\)")
_PICTURE = re.compile(r'<img\b[^>]*\bsrc="(?P<source>[^"]+\.svg)"[^>]*>')


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Makes links that leave docs/ links of the repository where mkdocs.yml has a repo_url, else paths in code type."""

    def replace(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if re.match(r"[a-z]+:|/|#", target):
            return match[0]
        path, _, _ = target.partition("#")
        place = os.path.normpath(PurePosixPath("docs") / PurePosixPath(page.file.src_uri).parent / path)
        if PurePosixPath(place).parts[0] == "docs":
            return match[0]
        if not (ROOT / place).exists():
            log.warning("%s: the link to %s leads to no file of the repository", page.file.src_uri, target)
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{place})"
        return f"`{place}`" if text.strip("`") == place else f"{text} (`{place}`)"

    return _outside_of_fences(lambda part: _LINK.sub(replace, part), markdown)


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Puts pictures with colours of both schemes into the page: in a file of its own one knows the system's scheme."""

    def replace(match: re.Match[str]) -> str:
        if "://" in match["source"]:
            return match[0]
        path = Path(config.docs_dir, PurePosixPath(page.file.dest_uri).parent, match["source"])
        if not path.is_file():
            return match[0]
        picture = path.read_text(encoding="utf-8")
        # Its own colours for a dark system stand under svg:root, which matches where the picture is a document.
        return picture[picture.index("<svg") :] if "svg:root" in picture else match[0]

    return _PICTURE.sub(replace, html)


def _outside_of_fences(change: Any, markdown: str) -> str:
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


class FunctionsBeforeModules(griffe.Extension):
    """Of a function and a module of one name, such as `ops.fft_conv` of `ops/fft_conv.py`, users see the function."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for package in _packages(pkg):
            for name, target in package.imports.items():
                module = package.members.get(name)
                if target == f"{package.path}.{name}.{name}" and module is not None and module.is_module:
                    package.members[name] = griffe.Alias(name, module.members[name], parent=package)


def _packages(package: griffe.Module) -> list[griffe.Module]:
    inner = [m for m in package.members.values() if isinstance(m, griffe.Module) and m.is_init_module]
    return [package, *(found for m in inner for found in _packages(m))]
