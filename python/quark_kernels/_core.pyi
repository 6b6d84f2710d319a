"""
The compiled core of quark-kernels. Its functions write into tensors that the caller allocates.
"""

VERSION: str = "0.1.0"

MAX_RANK: int = 16

def choose_qparams(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def extremes(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def quantize(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def quantize_dynamic(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def quantize_values(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def dequantize(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def dequantize_backward(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def fake_quantize(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def fake_quantize_dynamic(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def fake_quantize_backward(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def lsq_backward(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def tqt_quantize(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def tqt_backward(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def convert(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def pack(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def unpack(inputs: tuple, outputs: tuple, spec: str, threads: int = 1) -> None: ...
def formats() -> list[tuple[str, int, int, int, int, float, float, str, str]]:
    """
    Rows of (name, bits, exponent bits, mantissa bits, min_exp, lo, hi, specials, storage dtype).
    """

def ops() -> list[tuple[str, str, str]]:
    """Rows of (name, kinds of the inputs, kinds of the outputs)."""

def roundings() -> list[str]:
    """Names of the rounding rules."""

def cpu_levels() -> list[tuple[str, bool]]:
    """The compiled CPU levels, and whether this machine supports each."""

def cpu_level() -> str:
    """
    The CPU level in use. Raises ValueError where QUARK_CPU_LEVEL names none that can be.
    """

def gpu_builds() -> list[tuple[str, str]]:
    """For each GPU platform what was compiled, or why nothing was."""

def check_gpu(platform: str) -> None:
    """
    Raise RuntimeError, which says why, where a compiled platform has no device to run on.
    """

def xla_handlers(platform: str) -> dict:
    """
    XLA FFI handlers by target name, as capsules: for "cpu", "CUDA" or "ROCM". Empty where not compiled.
    """

def xla_ffi_api() -> tuple[int, int]:
    """The XLA FFI API (major, minor) that the handlers were compiled for."""
