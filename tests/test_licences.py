"""docs/licences.md against pyproject.toml, and against what installed packages say of themselves."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())
BUILD = {"cmake", "ninja"}
"""What scikit-build-core asks for where the machine has none."""

# How metadata, which has no one way to say it, names a licence.
NAMES = {"PSF": "Python Software Foundation|PSF", "Apache-2.0": "Apache", "BSD-3-Clause": "BSD"}


def table(heading: str) -> dict[str, str]:
    """The first two columns of a section's table."""
    section = (HERE / "docs/licences.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in section.splitlines() if line.startswith("|")]
    return dict(rows[2:])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> set[str]:
    """The names of all packages that the project asks for."""
    project = PROJECT["project"]
    lists = [PROJECT["build-system"]["requires"], project["dependencies"]]
    lists += [*project["optional-dependencies"].values(), *PROJECT["dependency-groups"].values()]
    names = {normal(re.match(r"[\w.-]+", line).group()) for some in lists for line in some}  # type: ignore[union-attr]
    return (names | BUILD) - {"quark-kernels"}


def stated(name: str) -> str:
    """What an installed package says of its licence, in short."""
    said = metadata.metadata(name)
    lines = [said["License-Expression"] or "", (said["License"] or "").split("\n")[0]]
    return "; ".join([*lines, *(c for c in said.get_all("Classifier") or [] if c.startswith("License"))])


def test_every_package_has_a_row() -> None:
    assert {normal(name) for name in table("Packages")} == required()


@pytest.mark.parametrize(("name", "licence"), table("Packages").items())
def test_rows_are_what_packages_say(name: str, licence: str) -> None:
    try:
        said = stated(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} isn't installed")
    for one in licence.split(" and "):
        assert re.search(NAMES.get(one, re.escape(one)), said), said
    assert not re.search(r"\b[AL]?GPL|General Public", said), said


def test_licences_of_what_is_compiled_in_are_here() -> None:
    compiled = table("In the compiled module")
    readme = (HERE / "licenses/README.txt").read_text()
    assert all(name in readme for name in compiled)
    for file in re.findall(r"[\w.-]+\.txt", readme):
        assert (HERE / "licenses" / file).stat().st_size > 1000
    assert PROJECT["project"]["license-files"] == ["LICENSE", "licenses/*.txt"]


def test_nanobind_s_licence() -> None:
    pytest.importorskip("nanobind")
    found = [file for file in metadata.files("nanobind") or [] if file.name == "LICENSE"]
    assert [file.read_text() for file in found] == [(HERE / "licenses/nanobind.txt").read_text()]
