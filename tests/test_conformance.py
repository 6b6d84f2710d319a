"""Every recorded call of AMD Quark 0.8, replayed in torch and JAX, at every CPU level."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from conformance_cases import FUNCTIONS, Case, cases, check, compare, run
from quark_kernels import _core
from test_parity import LEVELS, run_python


def test_all_are_here() -> None:
    assert len({case.id for case in cases()}) == len(cases()) == 4038
    assert {case.class_name for case in cases()} == set(FUNCTIONS)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_case(case: Case, framework: Any) -> None:
    assert check(case, run(framework.name, case)) == []


@pytest.mark.parametrize("class_name", FUNCTIONS)
def test_keywords(class_name: str, framework: Any) -> None:
    """Every function, outside jit, with its documented names of arguments."""
    case = next(case for case in cases() if case.class_name == class_name)
    kernel = import_module({"torch": "quark.torch.kernel", "jax": "quark_jax.kernel"}[framework.name])
    arrays = {name: framework.array(a.copy()) for name, a in case.arrays.items()}
    out = getattr(kernel, FUNCTIONS[class_name])(**{**case.args, **arrays})
    assert case.out is not None
    assert compare("out", framework.numpy(out), case.out, case.undefined) == []


@pytest.mark.parametrize("level", [level for level in LEVELS if level != _core.cpu_level()])
def test_other_cpu_levels(level: str, framework: Any) -> None:
    code = f"""if True:
        import conformance_cases
        from quark_kernels import _core
        conformance_cases.replay({framework.name!r})
        print(_core.cpu_level())"""
    done = run_python(code, QUARK_CPU_LEVEL=level)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-3:] == [f"{len(cases())} cases, 0 wrong", level, ""], done.stdout
