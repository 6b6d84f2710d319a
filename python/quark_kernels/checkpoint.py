"""`python -m quark_kernels quantize`: a safetensors checkpoint, one tensor after the other.

Shapes say how long every result will be, so the header of the new file is written before anything is quantized. Memory
holds one tensor and its codes at a time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from quark_kernels import schema
from quark_kernels.files import (
    BITS,
    DTYPES,
    FRAMEWORKS,
    KEY,
    Entry,
    FileError,
    Raw,
    Reader,
    Static,
    Writer,
    check_names,
    create,
    entry_of,
    from_raw,
    part_names,
    read_json,
    read_static,
    static_of,
    to_raw,
    widen,
    write_static,
)
from quark_kernels.formats import FORMATS
from quark_kernels.schema import Shape
from quark_kernels.spec import PRESETS, QuantSpec, as_int, one_of

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
BLOCK = 2**20
"""Elements whose noise is summed at a time."""


@dataclass(frozen=True)
class Options:
    """How a checkpoint is quantized, and which of its tensors are."""

    spec: QuantSpec
    framework: str = "torch"
    axis: int | None = None
    group_size: int | None = None
    packed: bool | None = None
    """None: wherever a code is narrower than a byte."""
    include: str | None = None
    """A regular expression; None: all names."""
    exclude: str | None = None
    min_dim: int = 2
    sqnr: bool = False
    """Whether to measure signal to quantization noise."""

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError where an option can't be."""
        one_of("framework", self.framework, FRAMEWORKS)
        as_int("min_dim", self.min_dim, 0)
        if self.spec.rounding == "stochastic":
            raise ValueError(f"spec is {self.spec}; a checkpoint has no seed, allowed: another rounding")
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name) or "")
            except (re.error, RecursionError) as error:
                text = f"{name} is {getattr(self, name)!r}; allowed: a regular expression"
                raise ValueError(f"{text} ({error})") from None

    @property
    def is_packed(self) -> bool:
        """Whether codes are packed."""
        return self.spec.element.can_pack if self.packed is None else self.packed

    def chooses(self, name: str, entry: Entry) -> bool:
        """Whether a tensor is quantized; the others, and those without elements, are copied."""
        if DTYPES.get(entry.code) not in schema.FLOAT_DTYPES or len(entry.shape) < self.min_dim or not entry.nbytes:
            return False
        if self.include is not None and not re.search(self.include, name):
            return False
        return self.exclude is None or not re.search(self.exclude, name)

    def static(self, name: str, shape: Shape, dtype: str) -> Static:
        """What a tensor of this shape and dtype becomes."""
        try:
            whole, _ = schema.plan(self.spec, shape, self.axis, self.group_size, self.is_packed)
            return Static(whole, shape, dtype, self.is_packed)
        except ValueError as error:
            raise ValueError(f"{name!r} of shape {shape}: {error}") from None


class Summary(NamedTuple):
    """What was done; bytes are those of tensors, without the files' headers."""

    quantized: int
    copied: int
    bytes_before: int
    bytes_after: int
    values: int
    """Elements of the quantized tensors."""
    bits: int
    """That these take now."""
    worst: tuple[float, str] | None
    """The least signal to quantization noise of a tensor, in dB, and its name; None where it wasn't measured."""


@dataclass
class Shard:
    """One file of a checkpoint, and what it becomes."""

    reader: Reader
    name: str
    """The file's, without its directory."""
    todo: dict[str, Static]
    """What is quantized, with what it becomes."""
    statics: dict[str, Static]
    """Every QTensor of the new file: also those that are there already."""
    entries: dict[str, tuple[str, Shape]]
    """Every tensor of the new file."""

    @classmethod
    def of(cls, reader: Reader, options: Options) -> Shard:
        """What a file becomes. Raises ValueError where that can't be."""
        there = read_static(reader)
        parts = {full for name in there for full in part_names(name).values()}
        todo, entries = {}, {}
        for name, entry in reader.entries.items():
            if name in parts or not options.chooses(name, entry):
                entries[name] = (entry.code, entry.shape)
                continue
            todo[name] = options.static(name, entry.shape, DTYPES[entry.code])
            entries |= {f"{name}.{part}": entry_of(made) for part, made in todo[name].parts().items()}
        plain = [name for name in reader.entries if name not in parts]
        check_names([*plain, *there], there | todo)
        return cls(reader, os.path.basename(reader.path), todo, there | todo, entries)

    @property
    def nbytes(self) -> int:
        """Bytes that the new file's tensors have."""
        return sum(prod(shape) * BITS[code] // 8 for code, shape in self.entries.values())

    def metadata(self) -> dict[str, str]:
        """The new file's."""
        kept = {key: text for key, text in self.reader.metadata.items() if key != KEY}
        return kept | write_static(self.statics)


# ---- tensors ---------------------------------------------------------------------------------------------------------


class Quantizer:
    """A framework that quantizes."""

    def __init__(self, options: Options) -> None:
        """Imports the framework; raises what that raises."""
        self.options = options
        self.api: Any = importlib.import_module(f"quark_{options.framework}")
        self.float32: Any = importlib.import_module("torch" if options.framework == "torch" else "numpy").float32
        self.worst: tuple[float, str] | None = None

    def quantize(self, name: str, raw: Raw, static: Static) -> dict[str, Raw]:
        """The parts of a tensor's QTensor."""
        options = self.options
        x = from_raw(raw, options.framework)
        if isinstance(x, np.ndarray):
            raise ValueError(f"{name!r} is {raw.dtype}; JAX has no such dtype unless jax_enable_x64 is set (torch has)")
        q = self.api.quantize(
            x, options.spec, axis=options.axis, group_size=options.group_size, packed=options.is_packed
        )
        del x
        assert static_of(q) == static, (static_of(q), static)
        if options.sqnr:
            db = sqnr(raw, to_raw(name, q.dequantize(self.float32)))
            if self.worst is None or (not db >= self.worst[0] and not math.isnan(self.worst[0])):  # NaN is worst
                self.worst = (db, name)
        return {part: to_raw(name, getattr(q, part)) for part in static.parts()}


def sqnr(original: Raw, result: Raw) -> float:
    """Signal to quantization noise in dB: float64 sums over float32 numbers. NaN where a number isn't finite."""
    signal = noise = 0.0
    sizes = [raw.data.size // max(prod(raw.shape), 1) for raw in (original, result)]
    with np.errstate(all="ignore"):
        for first in range(0, prod(original.shape), BLOCK):
            x, y = (
                widen(Raw(raw.dtype, (-1,), raw.data[first * size : (first + BLOCK) * size])).astype(np.float64)
                for raw, size in zip((original, result), sizes, strict=True)
            )
            signal += float(np.sum(x * x))
            noise += float(np.sum((x - y) ** 2))
    if not math.isfinite(signal + noise):
        return math.nan
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def convert(shard: Shard, writer: Writer, quantizer: Quantizer, progress: tqdm[Any]) -> None:
    """Write a shard's tensors, in the order in which they are in the file."""
    reader = shard.reader
    for name, entry in reader.entries.items():
        progress.set_postfix_str(name, refresh=False)
        static = shard.todo.get(name)
        if static is None:
            writer.write_chunks(name, _counted(reader.chunks(name), progress))
            continue
        for part, raw in quantizer.quantize(name, reader.raw(name), static).items():
            writer.write(f"{name}.{part}", raw.data)
        progress.update(entry.nbytes)


def _counted(chunks: Iterator[Any], progress: tqdm[Any]) -> Iterator[Any]:
    for chunk in chunks:
        yield chunk
        progress.update(chunk.nbytes)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Index(NamedTuple):
    """What says in which shard of a checkpoint a tensor is."""

    name: str
    metadata: dict[str, Any]
    weight_map: dict[str, str]


def quantize_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str], options: Options) -> Summary:
    """Quantize a safetensors file, or a directory of shards, to a new one.

    Args:
        source: a file; a directory with shards and at most one index; or an index (``*.safetensors.index.json``).
        target: a file's name (one that is there is replaced), or a directory's (it must be empty or not be there). It
            appears when it is complete, and not at all if this raises.
        options: what is quantized, and how. The rest is copied byte for byte: integers, tensors of fewer axes than
            ``min_dim``, QTensors. Metadata is kept.

    Returns:
        A Summary.

    Raises:
        ValueError: the source isn't sound, nothing in it is chosen, or a tensor doesn't go with the spec.
        OSError: a file can't be read or written.

    """
    source, target = Path(os.fsdecode(source)), Path(os.fsdecode(target))
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the input; allowed: another output")
    paths, index = shards_of(source)
    with ExitStack() as stack:
        shards = [Shard.of(stack.enter_context(Reader(path)), options) for path in paths]
        if index is not None:
            index = new_index(index, shards)
        if not any(shard.todo for shard in shards):
            count = sum(len(shard.reader.entries) for shard in shards)
            raise ValueError(f"{source}: none of its {count} tensors is to be quantized; see include, exclude, min_dim")
        quantizer = Quantizer(options)
        total = sum(entry.nbytes for shard in shards for entry in shard.reader.entries.values())
        # disable=None: no bar where stderr isn't a terminal.
        progress = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, disable=None, leave=False)
        )
        if source.is_dir() or index is not None:
            with directory(target) as unfinished:
                for shard in shards:
                    with create(unfinished / shard.name, shard.entries, shard.metadata()) as writer:
                        convert(shard, writer, quantizer, progress)
                if index is not None:
                    data = {"metadata": index.metadata, "weight_map": index.weight_map}
                    (unfinished / index.name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        else:
            (shard,) = shards
            with create(target, shard.entries, shard.metadata()) as writer:
                convert(shard, writer, quantizer, progress)
        return summary(shards, quantizer)


def summary(shards: Sequence[Shard], quantizer: Quantizer) -> Summary:
    """What was done."""
    quantized = sum(len(shard.todo) for shard in shards)
    before = sum(entry.nbytes for shard in shards for entry in shard.reader.entries.values())
    copied = sum(len(shard.reader.entries) - len(shard.todo) for shard in shards)
    after = sum(shard.nbytes for shard in shards)
    taken = sum(shard.reader.entries[name].nbytes for shard in shards for name in shard.todo)
    values = sum(prod(static.shape) for shard in shards for static in shard.todo.values())
    return Summary(quantized, copied, before, after, values, 8 * (after - (before - taken)), quantizer.worst)


def shards_of(source: Path) -> tuple[list[Path], Index | None]:
    """Return a checkpoint's files, and its index if it has one."""
    if source.is_dir():
        indexes = sorted(source.glob(f"*{INDEX}"))
        if len(indexes) > 1:
            names = ", ".join(path.name for path in indexes)
            raise ValueError(f"{source} has more than one index: {names}; give one of them")
        if not indexes:
            paths = sorted(source.glob(f"*{SUFFIX}"))
            if not paths:
                raise ValueError(f"{source}: no {SUFFIX} files in this directory")
            return paths, None
        (source,) = indexes
    if not source.name.endswith(INDEX):
        return [source], None
    index = read_index(source)
    return [source.with_name(name) for name in sorted(set(index.weight_map.values()))], index


def read_index(path: Path) -> Index:
    """Read an index. Raises FileError where it isn't sound."""
    try:
        data = read_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("weight_map"), dict) or not data["weight_map"]:
        raise FileError(f"{path}: not an index; it has no weight_map")
    metadata = data.get("metadata", {})
    if not isinstance(metadata, dict):
        raise FileError(f"{path}: metadata is {metadata!r}; allowed: an object")
    for name, file in data["weight_map"].items():
        # A path could lead anywhere.
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(SUFFIX) or "\0" in file:
            raise FileError(f"{path}: {name!r} is in {file!r}; allowed: the name of a {SUFFIX} file beside it")
    return Index(path.name, metadata, data["weight_map"])


def new_index(index: Index, shards: Sequence[Shard]) -> Index:
    """Return the index of the new shards. Raises FileError where the one of the old doesn't fit them."""
    for shard in shards:
        missing = [name for name, file in index.weight_map.items() if file == shard.name]
        missing = [name for name in missing if name not in shard.reader.entries]
        if missing:
            raise FileError(f"{shard.reader.path}: {missing[0]!r} is missing; {index.name} says it is there")
    weight_map: dict[str, str] = {}
    for shard in shards:
        for name in shard.entries:
            if weight_map.setdefault(name, shard.name) != shard.name:
                raise FileError(f"{index.name}: {name!r} would be both in {weight_map[name]} and in {shard.name}")
    metadata = {**index.metadata, "total_size": sum(shard.nbytes for shard in shards)}
    return Index(index.name, metadata, dict(sorted(weight_map.items())))


@contextmanager
def directory(path: Path) -> Iterator[Path]:
    """A directory that appears under its name only when it is complete, and not at all if this raises."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there; allowed: an empty directory, or the name of a new one")
    target = path.resolve()
    unfinished = target.with_name(f".quark-{secrets.token_hex(8)}.tmp")
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


# ---- the command -----------------------------------------------------------------------------------------------------


def read_spec(text: str) -> QuantSpec:
    """Return the spec of a preset's name or a QuantSpec's text. Raises ValueError for anything else."""
    if text.partition(" ")[0] not in FORMATS:
        one_of("spec", text, PRESETS)
    return PRESETS[text] if text in PRESETS else QuantSpec.parse(text)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command. Returns the exit status: 0, 2 where the input is wrong, 130 after Ctrl-C."""
    try:
        spec = read_spec(arguments.spec)
        names = ("framework", "axis", "group_size", "packed", "include", "exclude", "min_dim", "sqnr")
        options = Options(spec, **{name: getattr(arguments, name) for name in names})
        done = quantize_checkpoint(arguments.source, arguments.target, options)
    except (OSError, ValueError, TypeError, ImportError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"quark_kernels quantize: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quark_kernels quantize: interrupted, nothing was written", file=sys.stderr)
        return 130
    print("\n".join(lines(done, options, arguments.target)))
    return 0


def lines(done: Summary, options: Options, target: str) -> Iterator[str]:
    """A summary for people."""
    spec = options.spec.along(options.axis, options.group_size)
    yield f"{target}: {done.quantized} tensors quantized to {spec}, {done.copied} copied"
    share = f", {100 * done.bytes_after / done.bytes_before:.1f} %" if done.bytes_before else ""
    yield f"{done.bytes_before:,} bytes before, {done.bytes_after:,} after{share}"
    if done.values:
        yield f"{done.bits / done.values:.3f} bits per quantized value"
    if done.worst is not None:
        yield f"worst signal to noise: {done.worst[0]:.1f} dB in {done.worst[1]}"
