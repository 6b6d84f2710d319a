"""What is measured and what is expected of it. Only data: `contenders.py` makes the calls, `bench.py` times them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from quark_kernels import PRESETS, QuantSpec
from quark_kernels.spec import Granularity, PerChannel, PerGroup, PerTensor, PerToken

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
COLUMNS = 4096

# Sizes are bytes of float32; with 16-bit data it is the elements that are as many.
LARGE, IN_L2 = 64 * MIB, 256 * KIB
EVERY_SIZE = tuple(KIB * 4**i for i in range(10))
BEYOND_CACHES = EVERY_SIZE[-1]  # 256 MiB: of 64, some may still be in L3
HUGE = (GIB, 4 * GIB)

SPEEDUP = 1.6  # of two threads, in L2
LINEAR = 0.8  # the least GB/s of a huge input, as a share of those beyond the caches

# ---- kernels: the core alone, outputs preallocated, against a copy ---------------------------------------------------

ALONG: dict[str, Granularity] = {
    "per tensor": PerTensor(),
    "per channel": PerChannel(0),
    "per token": PerToken(),
    "groups of 128": PerGroup(128),
}


def granular(preset: str, along: str) -> QuantSpec:
    """Return the preset with a granularity."""
    return replace(PRESETS[preset], granularity=ALONG[along]) if along in ALONG else PRESETS[preset]


@dataclass(frozen=True)
class Kernel:
    """One operator of the core."""

    operation: str
    preset: str
    along: str = "blocks"
    """A key of ALONG; blocks: as the preset has them."""
    dtype: str = "float32"
    dynamic: bool = False
    """Whether scales are found from x in the same call, or given."""
    rounding: str = "half_even"
    target: float | None = None
    """The least share of a copy's GB/s, at 64 MiB; None: measured for information."""
    in_l2: float = 0.25
    """The same at 256 KiB."""
    sizes: tuple[int, ...] = (LARGE, IN_L2)

    @property
    def spec(self) -> QuantSpec:
        """The preset with this granularity and rounding."""
        return replace(granular(self.preset, self.along), rounding=self.rounding)

    def __str__(self) -> str:
        words = [f"{self.operation} {self.preset}"]
        words += [self.along] if self.along in ALONG else []
        words += [self.rounding] if self.rounding != "half_even" else []
        words += [self.dtype] if self.dtype != "float32" else []
        # Block formats are dynamic unless said otherwise, the others are not.
        if self.operation in ("quantize", "fake_quantize") and self.dynamic is (self.along in ALONG):
            words.append("dynamic" if self.dynamic else "scales given")
        return ", ".join(words)


BLOCKS = ("mxfp8_e4m3", "mxfp4", "nvfp4")
EIGHT_BITS = ("int8", "fp8_e4m3")
NARROW = (("int8", "per tensor"), ("fp8_e4m3", "per tensor"), ("int4", "per tensor"), ("int4", "groups of 128"))

_KERNELS = (
    *(
        Kernel("fake_quantize", preset, along, target=0.90, in_l2=0.45)
        for preset in EIGHT_BITS
        for along in ("per tensor", "per channel", "groups of 128")
    ),
    *(Kernel("quantize", *narrow, target=0.75) for narrow in NARROW),
    *(Kernel("dequantize", *narrow, target=0.80) for narrow in NARROW),
    *(
        Kernel("fake_quantize", preset, "per tensor", dtype, target=0.65)
        for dtype in ("bfloat16", "float16")
        for preset in EIGHT_BITS
    ),
    *(Kernel("fake_quantize", preset, dynamic=True, target=0.80) for preset in BLOCKS),
    *(Kernel("quantize", preset, dynamic=True, target=0.60) for preset in BLOCKS),
    *(
        Kernel(operation, preset, dtype="bfloat16", dynamic=True, target=0.50)
        for operation in ("fake_quantize", "quantize")
        for preset in BLOCKS
    ),
    *(
        Kernel("quantize", preset, "per token", "bfloat16", dynamic=True, target=0.60)
        for preset in ("fp8_e4m3", "int8")
    ),
    Kernel("lsq_backward", "int8", "per tensor", target=0.75),
    Kernel("lsq_backward", "int8", "per channel", target=0.75),
    Kernel("tqt_backward", "int8", "per tensor", target=0.75),
    Kernel("fake_quantize", "int8", "per tensor", rounding="stochastic", target=0.40),
    Kernel("fake_quantize", "int8", "per tensor", dynamic=True),
    Kernel("fake_quantize", "int8", "groups of 128", dynamic=True),
    Kernel("quantize", "nvfp4"),
    Kernel("fake_quantize", "mx6", dynamic=True),
    Kernel("fake_quantize", "mx9", dynamic=True),
)

ROOFLINE = (
    "fake_quantize int8, per tensor",
    "fake_quantize fp8_e4m3, per tensor",
    "quantize int8, per tensor",
    "dequantize int8, per tensor",
    "quantize mxfp4",
    "quantize fp8_e4m3, per token, bfloat16, dynamic",
)
"""The kernels that are measured at every size."""
LINEARITY = ("fake_quantize int8, per tensor", "quantize mxfp4")
"""Those that go on to 4 GiB."""


def _sizes(kernel: Kernel) -> tuple[int, ...]:
    sizes = EVERY_SIZE if str(kernel) in ROOFLINE else kernel.sizes
    return sizes + HUGE if str(kernel) in LINEARITY else sizes


KERNELS = tuple(replace(kernel, sizes=_sizes(kernel)) for kernel in _KERNELS)

# ---- peers: the public functions, allocation included, against what a user would call or write instead ---------------

ELEMENTS = (64 * KIB, MIB, 4 * MIB)


class Against(NamedTuple):
    """A peer, and how many times as fast as it ours should be."""

    peer: str
    times: float | None = None
    elements: tuple[int, ...] = ELEMENTS[-1:]
    """Where that is expected."""


@dataclass(frozen=True)
class Peer:
    """One public function of a framework, with given scales unless the preset has blocks."""

    framework: str
    operation: str
    preset: str
    along: str
    against: tuple[Against, ...]
    sizes: tuple[int, ...] = ELEMENTS
    """Elements."""

    @property
    def spec(self) -> QuantSpec:
        """The preset with this granularity."""
        return granular(self.preset, self.along)

    def __str__(self) -> str:
        return f"{self.operation} {self.preset}" + (f", {self.along}" if self.along in ALONG else "")


TORCH_OWN = {
    "per tensor": "torch.fake_quantize_per_tensor_affine",
    "per channel": "torch.fake_quantize_per_channel_affine",
}
EAGER, COMPILED, JITTED = (
    Against("torch eager"),
    Against("torch.compile", 1, ELEMENTS),
    Against("jnp jitted", 1, ELEMENTS),
)
EXTRA = {"torchao": "torchao", "ml_dtypes": "ml_dtypes"}
"""Peers that `--peers` adds, and the packages that they need."""

_ELEMENTWISE = (
    ("fake_quantize", "int8", "per tensor"),
    ("fake_quantize", "int8", "per channel"),
    ("fake_quantize", "fp8_e4m3", "per tensor"),
    ("quantize", "int8", "per tensor"),
    ("quantize", "fp8_e4m3", "per tensor"),
    ("dequantize", "int8", "per tensor"),
    ("dequantize", "fp8_e4m3", "per tensor"),
)


def _torch_peers(operation: str, preset: str, along: str) -> tuple[Against, ...]:
    if (operation, preset) == ("fake_quantize", "int8"):
        return Against(TORCH_OWN[along], 15), EAGER, COMPILED
    if (operation, preset) == ("quantize", "fp8_e4m3"):
        return EAGER._replace(times=8), COMPILED, Against("ml_dtypes")
    return EAGER, COMPILED


PEERS = (
    *(Peer("torch", *row, _torch_peers(*row)) for row in _ELEMENTWISE),
    Peer("torch", "quantize", "mxfp4", "blocks", (Against("torchao", 40), EAGER), ELEMENTS[-1:]),
    Peer("torch", "quantize", "mxfp8_e4m3", "blocks", (Against("torchao", 10), EAGER), ELEMENTS[-1:]),
    Peer("torch", "quantize", "nvfp4", "blocks", (Against("torchao"), EAGER), ELEMENTS[-1:]),
    *(Peer("jax", *row, (JITTED,)) for row in _ELEMENTWISE),
)

# ---- overhead: calls on so few elements that the work hardly counts --------------------------------------------------

FEW = 1024
CHAIN = 16
"""Calls that the longer of two jitted chains has more: their difference is the cost of a call inside a jit."""


@dataclass(frozen=True)
class Overhead:
    """One call through the public functions on 1,024 float32 elements."""

    framework: str
    name: str
    """A key of `contenders.OVERHEADS`."""
    yardstick: str
    microseconds: float | None = None
    """The most that a call may take."""
    times: float | None = None
    """The most that it may take, as a multiple of the yardstick."""

    def __str__(self) -> str:
        return f"{self.framework}: {self.name}"


OVERHEADS = (
    Overhead("torch", "fake_quantize, no gradient", TORCH_OWN["per tensor"], 6, 1.0),
    Overhead("torch", "fake_quantize of a number as scale, no gradient", TORCH_OWN["per tensor"]),
    Overhead("torch", "fake_quantize, gradient recorded", TORCH_OWN["per tensor"]),
    Overhead("torch", "ScaledFakeQuantizeFunction.apply, gradient recorded", TORCH_OWN["per tensor"], 12, 1.6),
    Overhead("torch", "quantize", TORCH_OWN["per tensor"]),
    Overhead("torch", "dequantize", TORCH_OWN["per tensor"]),
    Overhead("jax", "jitted fake_quantize", "jitted x + 1", None, 1.3),
    Overhead("jax", "fake_quantize inside a jit", "jitted x + 1", 1),
)
