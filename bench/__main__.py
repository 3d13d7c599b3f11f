"""python -m bench splat | network | static | training | gpu"""

from __future__ import annotations

import sys
from importlib import import_module

from gsr.cli import guard
from gsr.errors import InputError

COMMANDS = ("splat", "network", "static", "training", "gpu")


def main(argv=None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print("usage: python -m bench splat | network | static | training | gpu [-h] ...")
        return
    if not argv or argv[0] not in COMMANDS:
        raise InputError(f"python -m bench needs one of: {', '.join(COMMANDS)}")
    try:
        module = import_module(f"bench.{argv[0]}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise InputError(
            "compiling kernels needs Triton: pip install 'gaussiansr[triton]'"
        ) from None
    module.main(argv[1:])


if __name__ == "__main__":
    guard(main)
