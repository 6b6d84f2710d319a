"""Recorded calls of AMD Quark 0.8, and their replay through our own functions. The data: conformance/README.md."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import frontends
from frontends import bits
from matrix import CLASSES, numpy_dtype

FOLDER = Path(__file__).parent / "conformance"

# The class whose apply was recorded (torch has it too) -> the function of the same arguments that torch and JAX have.
FUNCTIONS = {class_name: function for function, class_name in CLASSES.items()}

SUMS = ("scale", "log_threshold")  # arguments whose gradients are sums, so compared with a tolerance


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """One recorded call and what it must give: `out` and `grads`, or an error."""

    id: str
    class_name: str
    args: dict[str, Any]  # in the order of the call; arrays are NumPy's
    raises: str | None = None  # the recorded exception; ours needn't be the same
    out: np.ndarray | None = None
    undefined: np.ndarray | None = None  # where out means nothing
    grad_output: np.ndarray | None = None
    grads: dict[str, np.ndarray] = field(default_factory=dict)  # by argument
    rtol: float = 0.0  # of the gradients that are sums
    atol: float = 0.0

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arguments that are arrays."""
        return {name: a for name, a in self.args.items() if isinstance(a, np.ndarray)}


@cache
def cases() -> tuple[Case, ...]:
    """Every case, in the order of the manifest."""
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    stores: dict[str, dict[str, np.ndarray]] = {}
    for class_name, file in manifest["files"].items():
        with np.load(FOLDER / file) as store:
            stores[class_name] = dict(store)

    def make(entry: dict[str, Any]) -> Case:
        def array(d: dict[str, Any]) -> np.ndarray:
            stored = stores[entry["func"]][d["array"]]
            return stored.view(numpy_dtype(d["dtype"])).reshape(d["shape"])

        def maybe(*keys: str) -> np.ndarray | None:
            return next((array(entry[key]) for key in keys if key in entry), None)

        undefined = maybe("undefined")
        return Case(
            id=entry["id"],
            class_name=entry["func"],
            args={a["name"]: array(a) if "array" in a else a["value"] for a in entry["args"]},
            raises=entry.get("raises"),
            out=maybe("spec", "out"),
            undefined=None if undefined is None else undefined.astype(bool),
            grad_output=maybe("grad_output"),
            grads={name: array(d) for name, d in {**entry.get("grads", {}), **entry.get("spec_grads", {})}.items()},
            rtol=entry.get("grad_rtol", 0.0),
            atol=entry.get("grad_atol", 0.0),
        )

    return tuple(make(entry) for entry in manifest["cases"])


# ---- comparison ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Result:
    """What a frontend made of a case."""

    out: np.ndarray
    grads: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]  # the arrays that went in, as they are after the call


def compare(
    what: str,
    got: np.ndarray,
    expected: np.ndarray,
    skip: np.ndarray | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> list[str]:
    """How two arrays differ: at most one line. NaN equals NaN, -0 equals +0."""
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return [f"{what} is {got.dtype} {got.shape}, expected {expected.dtype} {expected.shape}"]
    with np.errstate(invalid="ignore"):  # signaling NaNs
        same = np.isclose(got.astype(np.float64), expected.astype(np.float64), rtol, atol, equal_nan=True)
    wrong = ~same if skip is None else ~same & ~skip
    if not wrong.any():
        return []
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    first = f"first at {at}: got {got[at]!r}, expected {expected[at]!r}"
    return [f"{what} differs in {wrong.sum()} of {wrong.size}, {first}"]


def check(case: Case, result: Result | Exception) -> list[str]:
    """What is wrong with a result; empty if nothing is."""
    if case.raises:
        if isinstance(result, ValueError | TypeError | IndexError):
            return []
        got = repr(result) if isinstance(result, Exception) else "a result"
        return [f"expected a ValueError, TypeError or IndexError, got {got}"]
    if isinstance(result, Exception):
        return [f"raised {result!r}"]
    assert case.out is not None
    wrong = compare("out", result.out, case.out, case.undefined)
    for name, expected in case.grads.items():
        tolerances = (case.rtol, case.atol) if name in SUMS else (0.0, 0.0)
        wrong += compare(f"the gradient of {name}", result.grads[name], expected, None, *tolerances)
    for name, before in case.arrays.items():
        if not np.array_equal(bits(result.inputs[name]), bits(before)):
            wrong.append(f"{name} was written to")
    return wrong


# ---- replay ----------------------------------------------------------------------------------------------------------

JAX_BATCH = 128  # cases in one jax.jit: fewer compile more often, more compile no faster


@cache
def _torch() -> Any:
    return frontends.Torch()


def run_torch(case: Case) -> Result | Exception:
    import torch

    kernel = importlib.import_module("quark.torch.kernel")
    array, numpy = _torch().array, _torch().numpy
    arrays = {name: array(a.copy()) for name, a in case.arrays.items()}
    inputs = [arrays[name].requires_grad_() for name in case.grads]
    try:
        out = getattr(kernel, case.class_name).apply(*{**case.args, **arrays}.values())
        grads = torch.autograd.grad(out, inputs, array(case.grad_output)) if inputs else ()
    except Exception as error:
        return error
    named = {name: numpy(grad) for name, grad in zip(case.grads, grads, strict=True)}
    return Result(numpy(out), named, {name: numpy(a) for name, a in arrays.items()})


def run_jax(some: Sequence[Case]) -> list[Result | Exception]:
    """All cases in one compilation; should it fail, in two, and so on until the culprit is alone."""
    import jax

    kernel = importlib.import_module("quark_jax.kernel")

    @jax.jit
    def batch(arrays: list[dict[str, Any]], grad_outputs: list[Any]) -> list[tuple[Any, dict[str, Any]]]:
        def one(case: Case, given: dict[str, Any], grad_output: Any) -> tuple[Any, dict[str, Any]]:
            def call(inputs: dict[str, Any]) -> Any:
                return getattr(kernel, FUNCTIONS[case.class_name])(*{**case.args, **given, **inputs}.values())

            if not case.grads:
                return call({}), {}
            out, back = jax.vjp(call, {name: given[name] for name in case.grads})
            return out, back(grad_output)[0]

        return [one(*each) for each in zip(some, arrays, grad_outputs, strict=True)]

    arrays = [{name: jax.device_put(a.copy()) for name, a in case.arrays.items()} for case in some]
    grad_outputs = [None if case.grad_output is None else jax.device_put(case.grad_output) for case in some]
    try:
        results = jax.block_until_ready(batch(arrays, grad_outputs))
    except Exception as error:
        half = len(some) // 2
        return [*run_jax(some[:half]), *run_jax(some[half:])] if half else [error]
    return [
        Result(np.asarray(out), *({name: np.asarray(a) for name, a in d.items()} for d in (grads, given)))
        for (out, grads), given in zip(results, arrays, strict=True)
    ]


@cache
def _jax_batches() -> tuple[dict[str, int], list[list[Case]]]:
    """Which batch a case is in, and the batches. Errors are raised while tracing, so those cases stay alone."""
    good, bad = [c for c in cases() if not c.raises], [c for c in cases() if c.raises]
    batches = [good[i : i + JAX_BATCH] for i in range(0, len(good), JAX_BATCH)] + [[c] for c in bad]
    return {case.id: i for i, batch in enumerate(batches) for case in batch}, batches


@cache
def _jax_results(batch: int) -> dict[str, Result | Exception]:
    some = _jax_batches()[1][batch]
    return {case.id: result for case, result in zip(some, run_jax(some), strict=True)}


def run(framework: str, case: Case) -> Result | Exception:
    """Replay a case; with JAX this runs its whole batch, once."""
    if framework == "torch":
        return run_torch(case)
    return _jax_results(_jax_batches()[0][case.id])[case.id]


def replay(framework: str) -> None:
    """Replay everything and print what is wrong; the last line counts."""
    wrong = {case.id: found for case in cases() if (found := check(case, run(framework, case)))}
    for name, found in wrong.items():
        print(name, *found, sep="\n    ")
    print(len(cases()), "cases,", len(wrong), "wrong")
