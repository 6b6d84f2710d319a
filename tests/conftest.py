"""Fixtures: `frontend` runs a test once per frontend that is installed."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest

import frontends

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

_MAKERS = {"core": frontends.Core, "torch": frontends.Torch, "jax": frontends.Jax}
_made: dict[str, Any] = {}


def make(name: str) -> Any:
    if name != "core" and find_spec(name) is None:
        pytest.skip(f"{name} isn't installed")
    if name not in _made:
        _made[name] = _MAKERS[name]()
    return _made[name]


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
