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

EXAMPLES = (
    "torch_qat",
    "jax_qat",
    "lsq_qat_torch",
    "lsq_qat_jax",
    "train_in_torch_serve_in_jax",
    "quantize_in_jax_serve_in_torch",
    "fp8_per_token_activations",
    "weight_only_transformer",
    "format_atlas",
    "qwix_rules",
    "amd_quark_backend",
)
"""The scripts in interop_examples/, from the first to read to those for few."""
BESIDES = {name: name for name in ("flax", "matplotlib", "optax", "qwix", "transformers")} | {"quark": "amd-quark"}
"""What an example may import beyond torch, JAX and what this package brings, and what pip calls it."""

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

    # Output looks another way than code (extra.css).
    return LINK.sub(moved, markdown).replace("\n```text\n", "\n``` { .text .output }\n")


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
    lines += ["Scripts in the folder `interop_examples` of the repository. Each runs as it is where torch, JAX and the"]
    lines += ["packages below its title are installed. `make amd-quark` installs those of the last one, and runs it."]
    folder = ROOT / "interop_examples"
    unlisted = {path.stem for path in folder.glob("*.py")} ^ set(EXAMPLES)
    assert not unlisted, f"EXAMPLES and interop_examples/ differ in {sorted(unlisted)}"
    for name in EXAMPLES:
        source = (folder / f"{name}.py").read_text()
        tree = ast.parse(source)
        title, _, rest = (ast.get_docstring(tree) or "").partition("\n")
        lines += ["", f"## {name}.py", ""]
        if packages := needed(tree):
            lines += [f"Needs besides: {', '.join(packages)}.", ""]
        lines += [title, rest, "", '??? example "Source"', "", "    ```python"]
        lines += [f"    {line}".rstrip() for line in source.rstrip().splitlines()] + ["    ```"]
    return "\n".join(lines) + "\n"


def needed(tree: ast.Module) -> list[str]:
    """What a script imports, anywhere in it, of BESIDES."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    return sorted(BESIDES[name] for name in imported & BESIDES.keys())
