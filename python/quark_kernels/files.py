"""Safetensors files of QTensors and plain tensors: written by either framework, read by either, the same bits.

A QTensor ``NAME`` is stored as ``NAME.qvalue``, ``NAME.scale`` and so on. What isn't an array (spec, shape, dtype,
packed) is JSON in the file's metadata. Bytes pass through NumPy, so that a file needs only the framework it is read by.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray

from quark_kernels import schema
from quark_kernels.qtensor import QTensorBase
from quark_kernels.schema import Part, Shape
from quark_kernels.spec import QuantSpec, one_of

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

FRAMEWORKS = ("torch", "jax")
KEY = "quark_kernels"
"""Of the metadata: JSON of what QTensors have besides arrays."""
VERSION = 1
FIELDS = ("spec", "shape", "dtype", "packed")

CODES = {
    "bool": "BOOL",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    "bfloat16": "BF16",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
}
"""Safetensors' names of the frameworks' dtypes."""
DTYPES = {code: name for name, code in CODES.items()}
BITS = {"BOOL": 8, "C64": 64, "BF16": 16, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | {
    code: int(code.lstrip("IUF").partition("_")[0]) for code in CODES.values() if code[0] in "IUF"
}
"""Width of an element of each of safetensors' dtypes."""

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors refuses longer ones."""
MOST_AXES = 64
"""NumPy's limit."""
ALIGNMENT = 64
"""Bytes; both frameworks then share the memory that is read into."""
CHUNK = 8 * 2**20
"""Bytes that are copied at a time."""


# ---- tensors as bytes ------------------------------------------------------------------------------------------------


class Raw(NamedTuple):
    """A tensor's bytes; ``dtype`` is the frameworks' name, ``shape`` theirs too."""

    dtype: str
    shape: Shape
    data: Bytes

    def array(self, dtype: Any = None) -> Array:
        """The tensor as NumPy has it; ``dtype`` where NumPy lacks the tensor's own."""
        return self.data.view(self.dtype if dtype is None else dtype).reshape(self.shape)

    @classmethod
    def of(cls, array: Array, dtype: str | None = None) -> Raw:
        """An array's bytes, which are those of a tensor of this dtype."""
        flat = np.ascontiguousarray(array).reshape(-1)
        return cls(dtype or array.dtype.name, array.shape, flat.view(np.uint8))


def widen(raw: Raw) -> Array:
    """Numbers of at most 32 bits as float32, exactly; float64 rounded."""
    if raw.dtype == "bfloat16":
        return (raw.array(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.array().astype(np.float32)


def framework_of(x: object) -> str | None:
    """Return ``torch``, ``jax`` or ``numpy``; None for anything but their tensors. Imports nothing."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(x, torch.Tensor):
        return "torch"
    if jax is not None and isinstance(x, jax.Array):
        return "jax"
    return "numpy" if isinstance(x, (np.ndarray, np.generic)) else None


def describe(name: str, x: Any) -> Part:
    """Return a tensor's shape and dtype. Raises unless it is a tensor that has bytes and a dtype of safetensors."""
    framework = framework_of(x)
    if framework is None:
        kind = f"{type(x).__module__}.{type(x).__name__}"
        raise TypeError(f"{name} is a {kind}; allowed: QTensors, torch tensors, JAX and NumPy arrays")
    dtype = str(x.dtype).removeprefix("torch.") if framework == "torch" else str(x.dtype.name)
    if framework == "torch":
        import torch

        if x.layout != torch.strided or x.is_nested:
            raise TypeError(
                f"{name} has layout {'nested' if x.is_nested else x.layout}; allowed: torch.strided (dense)"
            )
        if x.device.type == "meta":
            raise ValueError(f"{name} is a meta tensor; it has no bytes")
    if framework == "jax":
        from jax.core import Tracer

        if isinstance(x, Tracer):
            raise TypeError(f"{name} is a tracer; inside jit there are no bytes, call this outside")
        if x.is_deleted():
            raise ValueError(f"{name} has been deleted or donated; it has no bytes")
        if not x.is_fully_addressable:
            raise ValueError(f"{name} has shards on other hosts; gather it first")
    if dtype not in CODES:
        raise TypeError(f"{name} has dtype {dtype}; allowed: {', '.join(CODES)}")
    return Part(tuple(x.shape), dtype)


def to_raw(name: str, x: Any) -> Raw:
    """Return a tensor's bytes, in row-major order; they are its own memory where that is possible."""
    shape, dtype = describe(name, x)
    if framework_of(x) == "torch":
        import torch

        flat = x.detach().resolve_conj().resolve_neg().cpu().contiguous()
        flat = flat.as_strided((flat.numel(),), (1,))  # one element is contiguous whatever its strides
        return Raw(dtype, shape, flat.view(torch.uint8).numpy())
    array = np.asarray(x)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return Raw.of(array, dtype)


def from_raw(raw: Raw, framework: str) -> Any:
    """Return a tensor of the framework on its default CPU or device; 64 bits stay in NumPy where JAX has only 32."""
    dtype, shape, data = raw
    if framework == "torch":
        import torch

        if not data.size:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        if not data.flags.writeable:
            data = data.copy()
        return torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)
    import jax

    if not hasattr(jax.numpy, "bool_" if dtype == "bool" else dtype):
        raise ValueError(f"dtype {dtype}; JAX has no such dtype")
    array = data.view(jax.numpy.dtype(dtype)).reshape(shape)
    return array if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype else jax.device_put(array)


# ---- files -----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor in a file: safetensors' dtype and shape, and where its bytes are."""

    code: str
    shape: Shape
    start: int
    nbytes: int


class FileError(ValueError):
    """A file that isn't what it says, or a tensor that can't be in one."""


def read_json(text: str | bytes) -> Any:
    """Return the value that a JSON text has. Raises ValueError where it isn't one, or has a name twice in an object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # readers would differ in which of them they take
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{name!r} is there more than once")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(str(error)) from None


class Reader:
    """A safetensors file: its header, and its tensors one at a time. A context manager.

    Raises FileError, a ValueError, unless everything that the header says is true of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        # Not blocking: opening a FIFO would wait for its writer.
        self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(self._file)
            if not stat.S_ISREG(status.st_mode):
                raise FileError(f"{self.path}: not a regular file")
            self.size = status.st_size
            self.metadata, self.entries = self._header()
        except BaseException:
            self.close()
            raise

    def _header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        start = 8 + length
        entries = {}
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                metadata = file.metadata() or {}
                for name in file.offset_keys():  # safetensors allows no holes, so this order gives the offsets
                    part = file.get_slice(name)
                    entries[name] = self._entry(name, part.get_dtype(), tuple(part.get_shape()), start)
                    start += entries[name].nbytes
        except safetensors.SafetensorError as error:
            raise FileError(f"{self.path}: {' '.join(str(error).split())}") from None
        if start != self.size:
            raise FileError(f"{self.path}: {self.size} bytes, but its header describes {start}")
        try:
            read_json(os.pread(self._file, length, 8))  # safetensors takes the last tensor of a name
        except ValueError as error:
            raise FileError(f"{self.path}: header: {error}") from None
        return metadata, entries

    def _entry(self, name: str, code: str, shape: Shape, start: int) -> Entry:
        if code not in BITS:
            raise FileError(f"{self.path}: {name!r} has dtype {code}; known are {', '.join(BITS)}")
        # Frameworks multiply lengths without the zeros, too.
        if len(shape) > MOST_AXES or prod(n or 1 for n in shape) > schema.LONGEST // BITS[code]:
            raise FileError(f"{self.path}: {name!r} has shape {shape}, which no tensor can have")
        return Entry(code, shape, start, prod(shape) * BITS[code] // 8)

    def read(self, name: str) -> Bytes:
        """A tensor's bytes."""
        entry = self.entries[name]
        memory = np.empty(entry.nbytes + ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % ALIGNMENT
        data = memory[first : first + entry.nbytes]
        self._fill(data, entry.start)
        return data

    def chunks(self, name: str) -> Iterator[Bytes]:
        """A tensor's bytes a few at a time."""
        entry = self.entries[name]
        for done in range(0, entry.nbytes, CHUNK):
            data = np.empty(min(CHUNK, entry.nbytes - done), np.uint8)
            self._fill(data, entry.start + done)
            yield data

    def _fill(self, data: Bytes, start: int) -> None:
        done = 0
        while done < data.size:
            count = os.preadv(self._file, [data[done:].data], start + done)
            if count == 0:
                raise FileError(f"{self.path}: it has become shorter while it was read")
            done += count

    def raw(self, name: str) -> Raw:
        """A tensor's bytes with its dtype and shape as the frameworks have them."""
        code, shape, *_ = self.entries[name]
        if code not in DTYPES:
            raise FileError(
                f"{self.path}: {name!r} has dtype {code}; no framework has it, allowed: {', '.join(DTYPES)}"
            )
        if code == "F4":
            if not shape or shape[-1] % 2:
                raise FileError(f"{self.path}: {name!r} has dtype F4 and shape {shape}; allowed: an even last axis")
            shape = (*shape[:-1], shape[-1] // 2)
        data = self.read(name)
        if code == "BOOL" and data.size and data.max() > 1:  # which the frameworks would take for different things
            raise FileError(f"{self.path}: {name!r} has dtype BOOL and a byte {data.max()}; allowed: 0 and 1")
        return Raw(DTYPES[code], shape, data)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def entry_of(part: Part) -> tuple[str, Shape]:
    """Return a tensor's dtype and shape as safetensors has them."""
    code = CODES[part.dtype]
    return code, (*part.shape[:-1], 2 * part.shape[-1]) if code == "F4" else part.shape


class Writer:
    """A safetensors file whose header is written before any tensor's bytes; these follow in any order."""

    def __init__(self, file: BinaryIO, tensors: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> None:
        """Writes the header: dtypes and shapes as safetensors has them."""
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        start = 0
        self._entries = {}
        # The widest first, as safetensors does: then each is aligned. By name: equal tensors give equal files.
        for name, (code, shape) in sorted(tensors.items(), key=lambda item: (-BITS[item[1][0]], item[0])):
            nbytes = prod(shape) * BITS[code] // 8
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, start + nbytes]}
            self._entries[name] = Entry(code, shape, start, nbytes)
            start += nbytes
        try:
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError as error:
            raise FileError(f"names and metadata must be Unicode text: {error}") from None
        text += b" " * (-len(text) % 8)
        if len(text) > LONGEST_HEADER:
            raise FileError(f"the header would have {len(text)} bytes; safetensors allows {LONGEST_HEADER}")
        self._file, self._start = file, 8 + len(text)
        self.size = self._start + start
        self._missing = {name for name, entry in self._entries.items() if entry.nbytes}
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)

    def write(self, name: str, *chunks: Bytes) -> None:
        """Writes a tensor's bytes."""
        self.write_chunks(name, iter(chunks))

    def write_chunks(self, name: str, chunks: Iterator[Bytes]) -> None:
        """Writes a tensor's bytes as they come."""
        entry = self._entries[name]
        self._file.seek(self._start + entry.start)
        count = sum(self._file.write(chunk.data) for chunk in chunks)
        if count != entry.nbytes:
            raise FileError(f"{name!r} has {count} bytes; its header says {entry.nbytes}")
        self._missing.discard(name)

    def check_complete(self) -> None:
        """Raises FileError where a tensor's bytes weren't written."""
        if self._missing:
            raise FileError(f"no bytes were written for {', '.join(sorted(self._missing))}")


@contextmanager
def create(
    path: str | os.PathLike[str], tensors: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]
) -> Iterator[Writer]:
    """Write a safetensors file that appears under its name only when it is complete, and not at all if this raises."""
    target = os.path.realpath(os.fsdecode(path))  # a link stays one
    if os.path.isdir(target):
        raise IsADirectoryError(f"{target} is a directory; allowed: a file's name")
    if os.path.exists(target) and not os.path.isfile(target):
        raise FileError(f"{target} isn't a regular file; it can't be replaced by one")
    unfinished = os.path.join(os.path.dirname(target), f".quark-{secrets.token_hex(8)}.tmp")
    file = open(unfinished, "xb")  # noqa: SIM115 (closed below, before it is renamed or removed)
    try:
        with file:
            writer = Writer(file, tensors, metadata)
            yield writer
            writer.check_complete()
            file.truncate(writer.size)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        os.unlink(unfinished)
        raise


# ---- QTensors --------------------------------------------------------------------------------------------------------


class Static(NamedTuple):
    """What a QTensor has besides arrays."""

    spec: QuantSpec
    shape: Shape
    dtype: str
    packed: bool

    def check(self, name: str, parts: Mapping[str, Part]) -> None:
        """Raises TypeError or ValueError unless these are the arrays of such a QTensor, which is called ``name``."""
        try:
            schema.expect_float("q", self.dtype)
            whole, op_spec = schema.plan(self.spec, self.shape, packed=self.packed)
            given = {part: parts.get(part) for part in QTensorBase.ARRAYS}
            schema.check_parts(whole, op_spec, self.shape, self.packed, given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None

    def parts(self) -> dict[str, Part]:
        """The arrays of such a QTensor, as ``quantize`` makes it with a dynamic scale."""
        whole, op_spec = schema.plan(self.spec, self.shape, packed=self.packed)
        made = schema.made_parts(whole, op_spec, self.shape, self.packed)
        return {name: part for name, part in made.items() if part is not None}

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return {"spec": str(self.spec), "shape": list(self.shape), "dtype": self.dtype, "packed": self.packed}

    @classmethod
    def from_json(cls, data: object) -> Static:
        """Reads what ``to_json`` wrote. Raises ValueError for anything else."""
        if not isinstance(data, dict) or set(data) != set(FIELDS):
            raise ValueError(f"allowed: an object of {', '.join(FIELDS)}")
        spec, shape, dtype, packed = (data[field] for field in FIELDS)
        if not isinstance(spec, str) or not isinstance(dtype, str) or not isinstance(packed, bool):
            raise ValueError("spec and dtype must be strings, packed true or false")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("shape must be a list of lengths")
        if len(shape) > MOST_AXES or prod(n or 1 for n in shape) > schema.LONGEST // 64:
            raise ValueError("shape is one that no tensor can have")
        one_of("dtype", dtype, schema.FLOAT_DTYPES)
        return cls(QuantSpec.parse(spec), tuple(shape), dtype, packed)


def static_of(q: QTensorBase) -> Static:
    """What a QTensor has besides arrays."""
    if not isinstance(q.spec, QuantSpec):
        raise TypeError(f"q.spec is {q.spec!r}; allowed: a QuantSpec")
    return Static(q.spec, tuple(q.shape), str(getattr(q.dtype, "name", q.dtype)).removeprefix("torch."), q.packed)


def part_names(name: str) -> dict[str, str]:
    """The names in a file that belong to a QTensor of this name."""
    return {part: f"{name}.{part}" for part in QTensorBase.ARRAYS}


def write_static(statics: Mapping[str, Static]) -> dict[str, str]:
    """Return the metadata that says which tensors of a file are QTensors."""
    if not statics:
        return {}
    tensors = {name: static.to_json() for name, static in sorted(statics.items())}
    return {KEY: json.dumps({"version": VERSION, "tensors": tensors}, separators=(",", ":"))}


def read_static(reader: Reader) -> dict[str, Static]:
    """Return which tensors of a file are QTensors, their parts checked. Raises FileError where the file isn't sound."""
    if KEY not in reader.metadata:
        return {}
    where = f"{reader.path}: metadata {KEY!r}"
    try:
        data = read_json(reader.metadata[KEY])
    except ValueError as error:
        raise FileError(f"{where}: not JSON: {error}") from None
    if not isinstance(data, dict) or set(data) != {"version", "tensors"} or not isinstance(data["tensors"], dict):
        raise FileError(f"{where}: allowed: an object of version and tensors")
    if type(data["version"]) is not int or data["version"] != VERSION:
        raise FileError(f"{where}: version is {data['version']!r}; this release reads {VERSION}")
    statics = {}
    for name, value in data["tensors"].items():
        try:
            statics[name] = Static.from_json(value)
            if name in reader.entries:
                raise ValueError("it is a plain tensor as well")
            statics[name].check(name, _parts(reader, name))
        except (TypeError, ValueError, OverflowError) as error:
            raise FileError(f"{where}: {name!r}: {error}") from None
    return statics


def _parts(reader: Reader, name: str) -> dict[str, Part]:
    parts = {}
    for part, full in part_names(name).items():
        if full in reader.entries:
            code, shape, *_ = reader.entries[full]
            parts[part] = Part(shape, DTYPES.get(code, code))
    return parts


def save(path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None) -> None:
    """Write a file; ``interop.save_safetensors`` says the rest."""
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors is a {type(tensors).__name__}; allowed: a dictionary of names and tensors")
    plain: dict[str, Any] = {}
    statics = {}
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors has the name {name!r}; allowed: strings")
        if not isinstance(value, QTensorBase):
            plain[name] = value
            continue
        arrays = {part: getattr(value, part) for part in value.ARRAYS if getattr(value, part) is not None}
        statics[name] = static_of(value)
        statics[name].check(name, {part: describe(f"{name}: {part}", a) for part, a in arrays.items()})
        Static.from_json(statics[name].to_json())  # raises where it couldn't be read again
        plain |= {f"{name}.{part}": a for part, a in arrays.items()}
    check_names(tensors, statics)
    entries = {name: entry_of(describe(name, value)) for name, value in plain.items()}
    with create(path, entries, check_metadata(metadata) | write_static(statics)) as writer:
        for name, value in plain.items():
            writer.write(name, to_raw(name, value).data)


def check_names(names: Iterable[str], statics: Mapping[str, Static]) -> None:
    """Raise ValueError where a name, of a plain tensor or a QTensor, would mean something else to a reader."""
    reserved = {full: name for name in statics for full in part_names(name).values()}
    for name in names:
        if name == "__metadata__":
            raise ValueError("tensors has '__metadata__', a name that safetensors keeps for itself")
        if name in reserved:
            raise ValueError(f"tensors has {name!r}, a name that belongs to the QTensor {reserved[name]!r}")


def check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return the metadata as a dictionary. Raises unless it maps strings to strings, without our key."""
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, Mapping) or not all(
        isinstance(text, str) for item in metadata.items() for text in item
    ):
        raise TypeError(f"metadata is {metadata!r}; allowed: a dictionary of strings")
    if KEY in metadata:
        raise ValueError(f"metadata has {KEY!r}, a key that this library keeps for itself")
    return dict(metadata)


def load(path: str | os.PathLike[str], framework: str) -> dict[str, Any]:
    """Read a file; ``interop.load_safetensors`` says the rest."""
    one_of("framework", framework, FRAMEWORKS)
    with Reader(path) as reader:
        statics = read_static(reader)
        parts = {full for name in statics for full in part_names(name).values()}
        loaded = {name: _qtensor(reader, name, static, framework) for name, static in statics.items()}
        plain = {name: _plain(reader, name, framework) for name in reader.entries if name not in parts}
        return dict(sorted((loaded | plain).items()))


def _plain(reader: Reader, name: str, framework: str) -> Any:
    try:
        return from_raw(reader.raw(name), framework)
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{reader.path}: {name!r}: {error}") from None


def _qtensor(reader: Reader, name: str, static: Static, framework: str) -> Any:
    return make_qtensor(static, {part: reader.raw(f"{name}.{part}") for part in _parts(reader, name)}, framework)


def make_qtensor(static: Static, parts: Mapping[str, Raw], framework: str) -> Any:
    """Return a QTensor of the framework."""
    arrays: dict[str, Any] = {
        part: from_raw(parts[part], framework) if part in parts else None for part in QTensorBase.ARRAYS
    }
    spec, shape, dtype, packed = static
    if framework == "torch":
        import torch

        import quark_torch

        return quark_torch.QTensor(**arrays, spec=spec, shape=shape, dtype=getattr(torch, dtype), packed=packed)
    import jax

    import quark_jax

    return quark_jax.QTensor(**arrays, spec=spec, shape=shape, dtype=jax.numpy.dtype(dtype), packed=packed)
