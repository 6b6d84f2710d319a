"""Record what the core makes of the tests' cases, for tests/cpp/replay.cpp to make again elsewhere.

usage: python scripts/dump_calls.py FILE
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quark_kernels import _core

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


class Recorder:
    """Stands before every operator of the core, and writes each call that it hasn't seen."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seen = file, set[bytes]()
        self.count: Counter[str] = Counter()
        for name, *_ in _core.ops():
            setattr(_core, name, self._recorded(name, getattr(_core, name)))

    def _recorded(self, name: str, operator: Callable[..., None]) -> Callable[..., None]:
        def call(inputs: Sequence[Any], outputs: Sequence[Any], spec: str, threads: int = 1) -> None:
            before = b"".join(map(written, inputs))  # an output may be an input's memory
            operator(inputs, outputs, spec, threads)
            line = f"{name} {len(inputs)} {len(outputs)} {spec}\n".encode()
            key = hashlib.sha256(line + before).digest()
            if key not in self.seen:
                self.seen.add(key)
                self.file.write(line + before + b"".join(map(written, outputs)))
                self.count[name] += 1

        return call


def written(tensor: Any) -> bytes:
    """A NumPy array or a torch tensor as the file has it."""
    from frontends import Torch

    a = tensor if isinstance(tensor, np.ndarray) else Torch().numpy(tensor)
    return " ".join([a.dtype.name, *map(str, a.shape)]).encode() + b"\n" + a.tobytes()


def record() -> None:
    """Make the calls: the recorded ones of AMD Quark, the tables of matrix.py, and every operator with batches."""
    import conformance_cases
    import matrix
    import test_batches_and_shards as batches
    from frontends import Core, Torch

    core, torch = Core(), Torch()
    for recorded in conformance_cases.cases():
        conformance_cases.run_torch(recorded)
    for documented in matrix.DOCUMENTED:
        torch.documented(documented)
    for case in matrix.CHOICES:
        torch.choose_qparams(case)
    for case in (*matrix.CASES, *matrix.BLOCKS, *matrix.STOCHASTIC):
        of = core if case.layout == "reversed" else torch
        of.stored(case)
        of.fake_quantize(case)
        of.dequantize(case, case.dtype)
        of.clipped_gradient(case)
    for name, text, given in batches.CALLS:
        arrays = batches.arrays_of(name, text, given)
        batches.run(name, arrays, text)
        batches.run(
            name, [np.stack([a, a[..., ::-1]]) if a.ndim else np.stack([a, a]) for a in arrays], text + " batch=1"
        )


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with open(sys.argv[1], "wb") as file:
        recorder = Recorder(file)
        record()
    missing = {name for name, *_ in _core.ops()} - set(recorder.count)
    if missing:
        sys.exit(f"not called: {', '.join(sorted(missing))}")
    print(
        f"{recorder.count.total()} calls of {len(recorder.count)} operators, {Path(sys.argv[1]).stat().st_size} bytes"
    )


if __name__ == "__main__":
    main()
