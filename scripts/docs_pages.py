"""Hooks of mkdocs.yml: pages of files that lie outside docs/, and links that work on GitHub as well as on the site."""

from __future__ import annotations

import ast
import os.path
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

# Files of the repository that are a page, or a file, of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE.txt",
    "interop_examples": "examples.md",
}
ADDING = ("Add a number format", "Add an operator")
"""Sections of CONTRIBUTING.md that are a page by themselves."""

CODE = r"^```.*?^```|``.+?``|`[^`]+`"
LINK = re.compile(
    rf"(?P<mark>!?)\[(?P<text>(?:`[^`]+`|[^\[\]`])*)\]\((?P<target>[^)\s]+)\)|{CODE}", re.DOTALL | re.MULTILINE
)


def on_files(files: Any, config: Any) -> None:
    """Add the pages that aren't in docs/."""
    contents = {page: (ROOT / path).read_text() for path, page in PAGES.items() if (ROOT / path).is_file()}
    contents["contributing.md"], contents["adding.md"] = without(contents["contributing.md"], ADDING)
    contents["examples.md"] = examples()
    for page, content in contents.items():
        files.append(File.generated(config, page, content=content))


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Point the links of a page, which lead through the repository, to the pages of the site."""
    here = page.file.src_uri
    origins = {name: path for path, name in PAGES.items()} | {
        "adding.md": "CONTRIBUTING.md",
        "examples.md": "examples.md",
    }
    origin, names = origins.get(here, f"docs/{here}"), dict(titles(config.nav))

    def moved(link: re.Match[str]) -> str:
        target = link["target"]
        if target is None or re.match(r"[a-z]+:", target):
            return link[0]
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path)) if path else origin
        if not (ROOT / path).exists() and path not in origins.values():
            return link[0]  # which mkdocs reports
        to = where(path, anchor)
        if to is None:
            return link["text"]  # the site doesn't have the sources
        text = names.get(to, link["text"]) if link["text"].strip("`") == target else link["text"]
        relative = posixpath.relpath(to, posixpath.dirname(here) or ".") if to != here or not mark else ""
        return f"{link['mark']}[{text}]({relative}{mark}{anchor})"

    return LINK.sub(moved, markdown)


def titles(nav: Any) -> Iterator[tuple[str, str]]:
    """Pages and their names in the navigation."""
    for entry in nav:
        for name, below in entry.items():
            if isinstance(below, str):
                yield below, name
            else:
                yield from titles(below)


def where(path: str, anchor: str) -> str | None:
    """The page of the site that a file of the repository, or a section of it, is on."""
    if path == "CONTRIBUTING.md" and anchor in {title.lower().replace(" ", "-") for title in ADDING}:
        return "adding.md"
    if path in PAGES:
        return PAGES[path]
    if os.path.dirname(path) == "interop_examples":
        return "examples.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def without(text: str, titles: tuple[str, ...]) -> tuple[str, str]:
    """Cut sections out of a page: what is left, and a page of them."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    cut = [part for part in parts if part.startswith(tuple(f"## {title}\n" for title in titles))]
    assert len(cut) == len(titles), f"CONTRIBUTING.md has no longer the sections {titles}"
    return "".join(part for part in parts if part not in cut), "# Adding a format or an operator\n\n" + "".join(cut)


def examples() -> str:
    """A page of the examples: what each says of itself, and its source."""
    lines = ["---", "search: {boost: 0.1}", "---", "# Examples", ""]
    lines += ["Scripts in the folder `interop_examples` of the repository. Each runs as it is."]
    for path in sorted((ROOT / "interop_examples").glob("*.py")):
        source = path.read_text()
        title, _, rest = (ast.get_docstring(ast.parse(source)) or "").partition("\n")
        lines += ["", f"## {path.name}", "", title, rest, "", '??? example "Source"', "", "    ```python"]
        lines += [f"    {line}".rstrip() for line in source.rstrip().splitlines()] + ["    ```"]
    return "\n".join(lines) + "\n"
