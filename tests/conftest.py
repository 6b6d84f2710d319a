"""Fixtures: `frontend` runs a test once per frontend that is installed."""

from __future__ import annotations

import json
import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import frontends
import transforms

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch's arrays are on the same GPU

_MAKERS = {"core": frontends.Core, "torch": frontends.Torch, "jax": frontends.Jax}
_made: dict[str, Any] = {}
_device = "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the frontends' arrays are")


def pytest_configure(config: pytest.Config) -> None:
    global _device
    _device = config.getoption("--device")
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if _device == "cpu" else "cuda,cpu")


def make(name: str) -> Any:
    if name != "core" and find_spec(name) is None:
        pytest.skip(f"{name} isn't installed")
    if name == "core" and _device != "cpu":
        pytest.skip("the core by itself is called with NumPy arrays, which are on the CPU")
    if name not in _made:
        _made[name] = _MAKERS[name]() if name == "core" else _MAKERS[name](_device)
    return _made[name]


@pytest.fixture(scope="session")
def device() -> str:
    """Where the frontends' arrays are."""
    return _device


@pytest.fixture(params=list(_MAKERS))
def frontend(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture(params=["torch", "jax"])
def framework(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture
def torch_frontend() -> Any:
    return make("torch")


@pytest.fixture
def jax_frontend() -> Any:
    return make("jax")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """What jax 0.9 can't do, 0.8 and 0.10 can: return from jit what XLA has cut by a part of a mesh axis."""
    try:
        return (yield)
    except Exception as error:
        if type(error).__name__ == "IndivisibleError" and metadata.version("jax").startswith("0.9."):
            pytest.xfail(f"jax 0.9: {error}")
        raise


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what the transform tests found, for the tables in the documentation."""
    rows = [[*cell, outcome] for cell, outcome in transforms.RESULTS.items()]
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: its process tells the one that writes
        session.config.workeroutput["transforms"] = rows
    elif path := os.environ.get("QUARK_TRANSFORMS_JSON"):
        Path(path).write_text(json.dumps(sorted(rows), indent=1) + "\n")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for row in getattr(node, "workeroutput", {}).get("transforms", []):
        transforms.record(*row)
