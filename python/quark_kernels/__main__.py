"""`python -m quark_kernels`: `info` (what this machine can do), `demo` (the library at work), `quantize` (files)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m quark_kernels", description="Number formats for neural networks.")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, the CPU level, GPU architectures, and what is missing and why")
    demo = commands.add_parser("demo", help="run every preset in torch and JAX and compare the bits")
    demo.add_argument("--input", metavar="FILE", help="a .safetensors, .npy or .npz file instead of the bundled digits")
    demo.add_argument("--json", metavar="FILE", help="write the table to this file as well")
    quantize = commands.add_parser("quantize", help="quantize a safetensors checkpoint, one tensor after the other")
    quantize.add_argument("source", metavar="IN", help="a .safetensors file, a directory of them, or its index")
    quantize.add_argument("target", metavar="OUT", help="the new file, or the new directory")
    quantize.add_argument("--spec", required=True, help='a preset, or a spec such as "int4 group=128,-1 asymmetric"')
    quantize.add_argument("--framework", choices=("torch", "jax"), default="torch", help="what quantizes")
    quantize.add_argument("--axis", type=int, help="the axis of channels, or that groups run along")
    quantize.add_argument("--group-size", type=int, metavar="N", help="how many elements share a scale")
    quantize.add_argument(
        "--packed", action=argparse.BooleanOptionalAction, help="pack codes; by default where they are below 8 bits"
    )
    quantize.add_argument("--include", metavar="REGEX", help="quantize only tensors in whose names this is found")
    quantize.add_argument("--exclude", metavar="REGEX", help="copy tensors in whose names this is found")
    quantize.add_argument(
        "--min-dim", type=int, default=2, metavar="N", help="copy tensors of fewer axes; 2 by default"
    )
    quantize.add_argument("--sqnr", action="store_true", help="measure the noise, and say where it is worst")
    return top


def info_lines(value: Mapping[str, object], indent: str = "") -> Iterator[str]:
    """One line for each entry; nested entries below their name."""
    width = max(map(len, value), default=0)
    for name, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield f"{indent}{name}"
            yield from info_lines(entry, indent + "  ")
        elif isinstance(entry, (list, tuple)):
            yield f"{indent}{name:{width}}  {', '.join(map(str, entry)) or 'none'}"
        else:
            yield f"{indent}{name:{width}}  {'none' if entry is None or entry == {} else entry}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.command == "demo":
        from . import demo

        return demo.run(input=arguments.input, json_path=arguments.json)
    if arguments.command == "quantize":
        from . import checkpoint

        return checkpoint.run(arguments)
    from . import info

    print("\n".join(info_lines(info())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
