"""AMD Quark's own quantizer, with its kernels and with these behind it: the same bits, in less time.

    python interop_examples/amd_quark_backend.py
    python interop_examples/amd_quark_backend.py --dtype bfloat16 --compiled

A small Llama with random weights goes through AMD Quark's ModelQuantizer in six formats, weights and activations: once
as AMD Quark is, once with `quark_torch.amd_quark` installed, once with `strict=True`. Nothing else changes. AMD Quark
compiles some of its functions with torch.compile; `--compiled` leaves it to, so that its first passes take long. Times
are those of one thread on a processor, whatever else is running there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

TOKENS = (4, 128)
FORWARDS = 4
SAME = "the same bits"


class Run(NamedTuple):
    """What came of quantizing a model: its numbers, and the time that it took."""

    logits: torch.Tensor
    weights: list[torch.Tensor]
    quantizing: float
    forward: float


def layer_configs() -> dict[str, Any]:
    """Return the layers' configuration by format: the same spec for weights and activations, where it can be."""
    from quark.torch.quantization.config import config as amd

    def both(weight: Any, activation: Any = None) -> Any:
        inputs = (activation or weight).to_quantization_spec()
        return amd.QLayerConfig(weight=weight.to_quantization_spec(), input_tensors=inputs)

    return {
        "int8 per tensor": both(amd.Int8PerTensorSpec()),
        "int4 per group": both(
            amd.Int4PerGroupSpec(ch_axis=-1, group_size=32),
            amd.Int4PerGroupSpec(ch_axis=-1, group_size=32, is_dynamic=True),
        ),
        "fp8_e4m3 per tensor": both(amd.FP8E4M3PerTensorSpec()),
        "mxfp4": both(amd.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False), amd.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=True)),
        "mx9": both(amd.MX9Spec(ch_axis=-1, block_size=16)),
        "bfp16": both(amd.BFP16Spec(ch_axis=-1)),
    }


def small_llama(dtype: torch.dtype) -> torch.nn.Module:
    """Return a Llama of random weights, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    model: torch.nn.Module = LlamaForCausalLM(config).to(dtype).eval()
    return model


def run(layers: Any, dtype: torch.dtype) -> Run:
    """Quantize the model, let it compute, and freeze its weights."""
    from quark.torch.quantization.config.config import QConfig

    from quark.torch import ModelQuantizer

    tokens = torch.randint(0, 1000, TOKENS, generator=torch.Generator().manual_seed(1))
    quantizer = ModelQuantizer(QConfig(global_quant_config=layers, exclude=["lm_head"]))
    start = time.process_time()
    model = quantizer.quantize_model(small_llama(dtype), [tokens])
    quantizing = time.process_time() - start
    with torch.no_grad():
        logits = model(tokens).logits
        forward = fastest(lambda: model(tokens))
    frozen = quantizer.freeze(model)
    weights = [p.detach().clone() for name, p in frozen.named_parameters() if name.endswith("proj.weight")]
    return Run(logits, weights, quantizing, forward)


def operator_calls(dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Return calls of AMD Quark's operators on a million numbers, by what they do."""
    ops, none = torch.ops.quark, torch.empty(0)
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(2)).to(dtype)
    one, rows, groups = torch.tensor(0.03), torch.full((1024,), 0.03), torch.full((1024, 32), 0.5)

    def fake(name: str, scale: torch.Tensor, low: float, high: float, axis: int, scheme: str) -> torch.Tensor:
        z = torch.zeros(scale.shape, dtype=torch.int32) if name.startswith("int") else none
        y: torch.Tensor = ops.scaled_fake_quantize(name, x, scale, z, axis, 32, low, high, 8, scheme, "None")
        return y

    return {
        "int8 per tensor": lambda: fake("int8", one, -128, 127, 1, "per_tensor"),
        "int8 per channel": lambda: fake("int8", rows, -128, 127, 0, "per_channel"),
        "int4 per group": lambda: fake("int4", groups, -8, 7, -1, "per_group"),
        "fp8_e4m3 per tensor": lambda: fake("fp8_e4m3", one, -448, 448, 1, "per_tensor"),
        "fp4 per group": lambda: fake("fp4", groups, -6, 6, -1, "per_group"),
        "mx fp4, scales too": lambda: ops.non_scaled_fake_quantize(x, "mx", "fp4", -1, 32),
        "mx9": lambda: ops.non_scaled_fake_quantize(x, "mx9", "", -1, 16),
        "bfp16": lambda: ops.non_scaled_fake_quantize(x, "bfp16", "", -1, 8),
    }


def fastest(function: Callable[[], Any]) -> float:
    """The least time of several calls, in seconds; the first one isn't counted."""
    function()
    return min(timed(function) for _ in range(FORWARDS))


def timed(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def different(a: Run, b: Run) -> str:
    """Say in how many weights and logits two runs differ, bit for bit."""
    pairs = {"weights": list(zip(a.weights, b.weights, strict=True)), "logits": [(a.logits, b.logits)]}
    counts = {name: sum(int(unequal(x, y).sum()) for x, y in both) for name, both in pairs.items()}
    if not any(counts.values()):
        return SAME
    return ", ".join(f"{n} of {sum(x.numel() for x, _ in pairs[name])} {name} differ" for name, n in counts.items())


def unequal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    assert x.dtype == y.dtype
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.contiguous().view(integer) != y.contiguous().view(integer)


Ways = dict[str, Callable[[], AbstractContextManager[None]]]


def model_rows(ways: Ways, dtype: torch.dtype) -> list[str]:
    """Return a table of models: the time of quantizing and of a forward pass, and which bits differ."""
    rows = [
        f"{'':20} {'quantizing, s':^29} {'a forward pass, ms':^29}",
        " " * 20 + "".join(f"{way:>10}" for way in ways) * 2,
    ]
    for name, layers in layer_configs().items():
        runs, refused = {}, ""
        for way, context in ways.items():
            with context():
                try:
                    runs[way] = run(layers, dtype)
                except RuntimeError as error:
                    if way == "ours" or "only implemented in CUDA" not in str(error):
                        raise
                    refused = f"{way}: {error}".splitlines()[0]
        if refused:
            rows.append(f"{name:20}   {refused}; done: {', '.join(runs)}")
            continue
        seconds = "".join(f"{r.quantizing:10.2f}" for r in runs.values())
        rows.append(f"{name:20}{seconds}" + "".join(f"{r.forward * 1e3:10.1f}" for r in runs.values()))
        theirs = runs.pop("AMD Quark")
        found = {way: different(theirs, mine) for way, mine in runs.items()}
        if found["strict"] != SAME:
            raise SystemExit(f"{name}, strict=True: {found['strict']}")
        rows += [f"{'':20}   {way}: {what}" for way, what in found.items()]
    return rows


def operator_rows(ways: Ways, dtype: torch.dtype) -> list[str]:
    """Return a table of operators by themselves."""
    calls = operator_calls(dtype)
    columns = []
    for context in ways.values():
        with context():
            columns.append([fastest(call) * 1e3 for call in calls.values()])
    rows = [f"{'an operator on 2^20 numbers, ms':31}" + "".join(f"{way:>10}" for way in ways)]
    for name, *times in zip(calls, *columns, strict=True):
        rows.append(f"{name:31}" + "".join(f"{ms:10.2f}" for ms in times))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--compiled", action="store_true", help="let AMD Quark compile its functions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("QUARK_LOG_LEVEL", "error")
    if not options.compiled:
        os.environ["QUARK_DISABLE_COMPILE"] = "1"  # read when AMD Quark is imported
    import quark_torch.amd_quark as backend

    backend.uninstall()
    ways: Ways = {"AMD Quark": nullcontext, "ours": backend.installed, "strict": lambda: backend.installed(strict=True)}
    dtype = getattr(torch, options.dtype)
    print("\n".join([*model_rows(ways, dtype), "", *operator_rows(ways, dtype)]))


if __name__ == "__main__":
    main()
