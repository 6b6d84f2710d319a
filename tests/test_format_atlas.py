"""The atlas of number formats: pages are drawn, and their numbers are the library's."""

from __future__ import annotations

import importlib
import io
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import quark_kernels
import reference
from quark_kernels import PRESETS, PerTensor

matplotlib = pytest.importorskip("matplotlib")
FRAMEWORKS = [name for name in ("torch", "jax") if find_spec(name)]
if not FRAMEWORKS:
    pytest.skip("needs torch or JAX", allow_module_level=True)

EXAMPLES = Path(__file__).parent.parent / "interop_examples"
DIGITS = load_file(Path(quark_kernels.__file__).with_name("data") / "digits.safetensors")
WEIGHTS = [DIGITS[f"layers.{i}.weight"] for i in range(3)]


@pytest.fixture(scope="module")
def atlas() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("format_atlas")


@pytest.fixture(scope="module")
def drawn(atlas: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The quick pages, by framework."""
    files, before = {}, dict(matplotlib.rcParams)
    for name in FRAMEWORKS:
        folder = tmp_path_factory.mktemp(name) / "new" / "folder"
        with redirect_stdout(io.StringIO()) as output:
            files[name] = atlas.main(["--quick", "--framework", name, "--out", str(folder)])
        assert output.getvalue() == f"{len(files[name])} pages in {folder}\n"
        assert sorted(files[name]) == sorted(folder.iterdir())
    assert dict(matplotlib.rcParams) == before
    return files


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_pages(name: str, atlas: Any, drawn: dict[str, list[Path]]) -> None:
    assert {file.stem for file in drawn[name]} == {*atlas.PAGES, "format_int4", "format_fp8_e4m3", "format_mxfp4"}
    for file in drawn[name]:
        page = matplotlib.image.imread(file)[:, :, :3]
        assert page.shape[:2] == tuple(round(side * atlas.QUICK_DPI) for side in reversed(atlas.INCHES))
        assert page.std() > 0.05
        for edge in (page[0], page[-1], page[:, 0], page[:, -1]):
            assert (edge == 1).all()  # nothing runs over it


def test_both_frameworks_draw_the_same(drawn: dict[str, list[Path]]) -> None:
    for files in zip(*drawn.values(), strict=True):
        assert len({file.read_bytes() for file in files}) == 1, files[0].name


def int8_per_channel(x: NDArray[np.float32]) -> NDArray[np.float64]:
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    return np.clip(np.rint(x / scale), -128, 127).astype(np.float64) * scale


def mxfp4(x: NDArray[np.float32]) -> NDArray[np.float64]:
    blocks = x.reshape(-1, 32).astype(np.float64)
    scale = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(axis=1, keepdims=True))) - 2)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = np.abs(np.abs(blocks / scale)[:, :, None] - values).argmin(axis=2)  # no weight is a tie
    return (np.copysign(values[nearest], blocks) * scale).reshape(x.shape)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_overview(name: str, atlas: Any) -> None:
    """Bits and SQNR of two presets, computed in NumPy; every weight matrix has rows of whole blocks."""
    frontend, size = atlas.Frontend(name), sum(w.size for w in WEIGHTS)
    rows = sum(len(w) for w in WEIGHTS)
    for preset, quantize, bits in (("int8", int8_per_channel, 8 + 32 * rows / size), ("mxfp4", mxfp4, 4 + 8 / 32)):
        signal = sum(np.sum(w.astype(np.float64) ** 2) for w in WEIGHTS)
        noise = sum(np.sum((quantize(w) - w) ** 2) for w in WEIGHTS)
        expected = bits, 10 * np.log10(signal / noise)
        assert atlas.on_data(frontend, preset, "weights") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("preset", [name for name, spec in PRESETS.items() if spec.granularity == PerTensor()])
def test_grid(preset: str, atlas: Any) -> None:
    """All values of a format, as its specification says."""
    values = reference.values(preset)
    expected = np.unique(values[np.isfinite(values)] + 0.0)
    np.testing.assert_array_equal(atlas.grid(atlas.Frontend(FRAMEWORKS[0]), preset), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "int4", "fp5"], "--formats has fp5; allowed: int2, int3"),
        (["--framework", "numpy"], "invalid choice: 'numpy'"),
        (["--quick", "--docs"], "not allowed with"),
        (["--out", str(Path(__file__))], "which can't be a folder"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, atlas: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as failure:
        atlas.main(["--out", str(tmp_path), *arguments])
    assert failure.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_framework_is_named(
    atlas: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(atlas, "find_spec", lambda name: None if name == "jax" else object())
    with pytest.raises(SystemExit) as failure:
        atlas.main(["--framework", "jax"])
    assert failure.value.code == 2
    assert "--framework is jax, which isn't installed; allowed: torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [([], []), ([5.0], [5.0]), ([0, 10], [0, 10]), ([5, 5], [4.5, 5.5]), ([9, 0, 0, 9], [8.5, -0.5, 0.5, 9.5])],
)
def test_labels_are_spread(wanted: list[float], expected: list[float], atlas: Any) -> None:
    assert atlas.spread(wanted, 1.0) == pytest.approx(expected)
