"""One adapter for the core, torch and JAX each, so that every test body runs on all three.

Arrays go in and come out as NumPy's; codes come out as they are stored.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from matrix import Case, DocumentedCase, numpy_dtype
from quark_kernels import _core
from quark_kernels.schema import OPS, OpSpec, codes_spec, op_spec, outputs, scale_shape


def bits(a: np.ndarray) -> np.ndarray:
    """The bit patterns of an array."""
    a = np.asarray(a, order="C")
    return a.view(np.dtype(f"u{a.itemsize}"))


def stored_codes(case: Case, codes: np.ndarray) -> np.ndarray:
    """Codes as int64, from what a frontend stores: unpacked, signed where the format is."""
    import reference

    row = case.spec.element
    signed = row.exponent_bits == 0 and row.lo < 0
    if case.packed:
        length = case.shape[-1] if case.shape else 1
        return reference.unpack(codes, row.bits, length, signed).reshape(case.shape)
    if row.exponent_bits > 0:
        return bits(codes).astype(np.int64)
    return codes.astype(np.int64)


class Adapter:
    """What all adapters share."""

    def stored(self, case: Case) -> dict[str, np.ndarray]:
        """The arrays of the QTensor that quantize makes, scales in normal form."""
        raise NotImplementedError

    def quantize(self, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        arrays = self.stored(case)
        return arrays["qvalue"], arrays["scale"], arrays.get("zero_point")


class Core(Adapter):
    """The compiled core itself, on NumPy arrays."""

    name = "core"
    layouts = ("rows", "transposed", "sliced", "reversed", "broadcast")

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    def _run(self, op: str, inputs: list[Any], spec: OpSpec, shape: tuple[int, ...], dtype: str) -> list[np.ndarray]:
        outs = [np.empty(size, numpy_dtype(name)) for size, name in outputs(OPS[op], spec, shape, dtype)]
        getattr(_core, op)(tuple(a for a in inputs if a is not None), tuple(outs), spec.text, self.threads)
        return outs

    def _spec(self, case: Case, dtype: str | None = None, packed: bool = False) -> OpSpec:
        return op_spec(case.spec, case.shape, packed, dtype)

    def _scales(self, case: Case) -> list[np.ndarray | None]:
        """What quantize takes beside x, in the order of the operators' letters: s g p k z."""
        if case.spec.scale_format == "float32":
            return [case.scale, self._key(case), case.zero]
        return [*(case.stored.get(name) for name in ("scale", "global_scale", "pair_bits")), self._key(case)]

    def _key(self, case: Case) -> np.ndarray | None:
        """The low and the high word of a seed."""
        return None if case.seed is None else np.array([case.seed % 2**64], "<u8").view(np.int32)

    def stored(self, case: Case) -> dict[str, np.ndarray]:
        spec = self._spec(case, packed=case.packed)
        if case.given:
            (q,) = self._run("quantize", [case.x, *self._scales(case)], spec, case.shape, case.dtype)
            return {**case.stored, "qvalue": q}
        arrays = self._run("quantize_dynamic", [case.x, self._key(case)], spec, case.shape, case.dtype)
        return dict(zip(case.stored, arrays, strict=True))

    def dequantize(self, case: Case, dtype: str) -> np.ndarray:
        spec = self._spec(case, dtype, case.packed)
        return self._run("dequantize", [*self.stored(case).values()], spec, case.shape, dtype)[0]

    def fake_quantize(self, case: Case) -> np.ndarray:
        if case.given:
            operands = [case.x, *self._scales(case)]
            return self._run("fake_quantize", operands, self._spec(case), case.shape, case.dtype)[0]
        operands = [case.x, self._key(case)]
        return self._run("fake_quantize_dynamic", operands, self._spec(case), case.shape, case.dtype)[0]

    def choose_qparams(self, case: Case) -> tuple[np.ndarray, np.ndarray | None]:
        s, *z = self._run("choose_qparams", [case.x], self._spec(case), case.shape, case.dtype)
        return s, z[0] if z else None

    def clipped_gradient(self, case: Case) -> np.ndarray:
        operands = [case.x, case.gradient, *self._scales(case)]
        return self._run("fake_quantize_backward", operands, self._spec(case), case.shape, case.dtype)[0]

    def scale_gradient(self, case: Case) -> np.ndarray:
        q, _, z = self.quantize(case)
        spec = self._spec(case, None, case.packed)
        return self._run("dequantize_backward", [case.gradient, q, z], spec, case.shape, case.dtype)[0]

    def pack(self, codes: np.ndarray, bits: int) -> np.ndarray:
        return self._run("pack", [codes], codes_spec(bits, length=codes.shape[-1]), codes.shape, codes.dtype.name)[0]

    def unpack(self, packed: np.ndarray, bits: int, length: int, signed: bool) -> np.ndarray:
        spec = codes_spec(bits, signed=signed, length=length)
        return self._run("unpack", [packed], spec, (*packed.shape[:-1], length), "")[0]


class Framework(Adapter):
    """What the torch and JAX adapters share: the everyday functions."""

    name: str
    api: Any

    def array(self, a: np.ndarray | None) -> Any:
        raise NotImplementedError

    def numpy(self, a: Any) -> np.ndarray:
        raise NotImplementedError

    def dtype(self, name: str) -> Any:
        raise NotImplementedError

    def context(self, case: Case) -> Any:
        return nullcontext()

    def scales(self, case: Case) -> dict[str, Any]:
        """What a call is given besides x and the spec."""
        given = {} if case.seed is None else {"seed": case.seed}
        if case.given and not case.spec.element.is_cast:
            given |= {"scale": self.array(case.scale_argument), "zero_point": self.array(case.zero)}
        return given

    def _normal(self, case: Case, a: Any) -> np.ndarray:
        """A scale in normal form; per tensor it must come as 0-d."""
        a = self.numpy(a)
        if not any(case.block) and str(case.spec.granularity) == "PerTensor()":
            assert a.shape == ()
        return a.reshape(scale_shape(case.shape, case.block))

    def _quantize(self, case: Case) -> Any:
        can_pack = case.spec.element.can_pack or case.spec.scale_format == "exponent"
        packed = case.packed if can_pack else None
        q = self.api.quantize(self.array(case.x), case.spec, packed=packed, **self.scales(case))
        assert q.shape == case.shape
        assert q.packed == case.packed
        assert q.spec == case.spec
        return q

    def stored(self, case: Case) -> dict[str, np.ndarray]:
        with self.context(case):
            q = self._quantize(case)
            arrays = {name: getattr(q, name) for name in q.ARRAYS if getattr(q, name) is not None}
            normal = ("scale", "zero_point")
            return {name: self._normal(case, a) if name in normal else self.numpy(a) for name, a in arrays.items()}

    def dequantize(self, case: Case, dtype: str) -> np.ndarray:
        with self.context(case):
            return self.numpy(self.api.dequantize(self._quantize(case), self.dtype(dtype)))

    def fake_quantize(self, case: Case) -> np.ndarray:
        with self.context(case):
            return self.numpy(self.api.fake_quantize(self.array(case.x), case.spec, **self.scales(case)))

    def choose_qparams(self, case: Case) -> tuple[np.ndarray, np.ndarray | None]:
        with self.context(case):
            s, z = self.api.choose_qparams(self.array(case.x), case.spec, method=case.method)
            if case.spec.scale_format == "e4m3":
                return self.numpy(s), z
            return self._normal(case, s), None if z is None else self._normal(case, z)

    def pack(self, codes: np.ndarray, bits: int) -> np.ndarray:
        return self.numpy(self.api.pack(self.array(codes), bits))

    def unpack(self, packed: np.ndarray, bits: int, length: int, signed: bool) -> np.ndarray:
        return self.numpy(self.api.unpack(self.array(packed), bits, signed=signed))[..., :length]


class Torch(Framework):
    name = "torch"
    layouts = ("rows", "transposed", "sliced", "broadcast")

    def __init__(self, device: str = "cpu") -> None:
        import quark_torch

        self.api, self.device = quark_torch, device

    def array(self, a: np.ndarray | None) -> Any:
        import torch

        if a is None:
            return None
        if a.size and a.ndim and a.strides[0] == 0 and a.shape[0] > 1:  # broadcast along the first axis
            return self.array(a[:1].copy()).expand(a.shape)
        # torch.from_numpy keeps strides, but knows neither ml_dtypes' dtypes nor read-only arrays.
        same_width = a.dtype if a.dtype.kind in "iu" and a.dtype.name in dir(torch) else np.dtype(f"i{a.itemsize}")
        t = torch.from_numpy(a.view(same_width)).view(self.dtype(a.dtype.name))
        return t if self.device == "cpu" else self._moved(t)

    def _moved(self, t: Any) -> Any:
        """The tensor on the device, with its strides."""
        import torch

        storage = torch.empty(t.untyped_storage().nbytes(), dtype=torch.uint8, device=self.device)
        storage.copy_(torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()))
        empty = torch.empty(0, dtype=t.dtype, device=self.device)
        return empty.set_(storage.untyped_storage(), t.storage_offset(), t.shape, t.stride())

    def numpy(self, a: Any) -> np.ndarray:
        import torch

        dtype = numpy_dtype(str(a.dtype).removeprefix("torch."))
        a = a.detach().contiguous()
        return a.view(getattr(torch, f"int{8 * a.element_size()}")).cpu().numpy().view(dtype)

    def dtype(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def clipped_gradient(self, case: Case) -> np.ndarray:
        import torch

        x = self.array(case.x).detach().requires_grad_()
        y = self.api.fake_quantize(x, case.spec, **self.scales(case))
        (grad,) = torch.autograd.grad(y, x, self.array(case.gradient))
        return self.numpy(grad)

    def scale_gradient(self, case: Case) -> np.ndarray:
        import torch

        q = self._quantize(case)
        q.scale.requires_grad_()
        (grad,) = torch.autograd.grad(q.dequantize(), q.scale, self.array(case.gradient))
        return self._normal(case, grad)

    def documented(self, case: DocumentedCase) -> Any:
        """A documented function's class, applied: its result, gradients, and the arrays as they are afterwards."""
        import torch

        from conformance_cases import Result
        from quark.torch import kernel

        arrays = {name: self.array(a) for name, a in case.arrays.items()}
        inputs = [arrays[name].requires_grad_() for name in case.grads]
        out = getattr(kernel, case.class_name).apply(*{**case.args, **arrays}.values())
        grads = torch.autograd.grad(out, inputs, self.array(case.grad_output)) if inputs else ()
        named = {name: self.numpy(grad) for name, grad in zip(case.grads, grads, strict=True)}
        return Result(self.numpy(out), named, {name: self.numpy(a) for name, a in arrays.items()})


class Jax(Framework):
    name = "jax"
    layouts = ("rows",)

    def __init__(self, device: str = "cpu") -> None:
        import quark_jax

        self.api, self.device = quark_jax, device

    def context(self, case: Case) -> Any:
        import jax

        return jax.enable_x64(True) if case.dtype == "float64" else nullcontext()

    def array(self, a: np.ndarray | None) -> Any:
        import jax
        import jax.numpy as jnp

        if a is None:
            return None
        return jnp.asarray(a) if self.device == "cpu" else jax.device_put(a, jax.local_devices(backend=self.device)[0])

    def numpy(self, a: Any) -> np.ndarray:
        import jax

        return np.asarray(jax.block_until_ready(a))  # of an array that had no memory JAX makes no view, but an end

    def dtype(self, name: str) -> Any:
        return numpy_dtype(name)

    def clipped_gradient(self, case: Case) -> np.ndarray:
        import jax

        with self.context(case):
            scales = self.scales(case)
            _, back = jax.vjp(lambda x: self.api.fake_quantize(x, case.spec, **scales), self.array(case.x))
            return self.numpy(back(self.array(case.gradient))[0])

    def scale_gradient(self, case: Case) -> np.ndarray:
        import dataclasses

        import jax

        with self.context(case):
            q = self._quantize(case)
            _, back = jax.vjp(lambda s: dataclasses.replace(q, scale=s).dequantize(), q.scale)
            return self._normal(case, back(self.array(case.gradient))[0])
