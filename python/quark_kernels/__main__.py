"""`python -m quark_kernels`: what this machine can do (`info`), and the library at work (`demo`)."""

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
    from . import info

    print("\n".join(info_lines(info())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
