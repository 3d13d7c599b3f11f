"""Measure what bf16 costs a model, and write it into its folder.

    python -m bench.precision gsr/weights/gsr-lite --images FOLDER

`gsr upscale` takes bf16 by itself for models that lose at most 0.01 dB. A training measures that at
every validation; this is for weights that came otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gsr.cli import guard
from gsr.errors import InputError
from gsr.io.image import list_images
from gsr.models.checkpoint import load_model, save_model
from gsr.runs import bf16_loss, validate, validation_pairs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="model folder")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="of HR images")
    args = parser.parse_args(argv)
    model, pairs = load_model(args.model), validation_pairs(list_images(args.images))
    model.bf16_loss = bf16_loss(model, pairs, validate(model, pairs))
    if model.bf16_loss is None:
        raise InputError("this processor has no instructions for bf16; measure on one that has")
    save_model(args.model, model.eval())
    print(f"{args.model}: bf16 costs {model.bf16_loss:.5f} dB")


if __name__ == "__main__":
    guard(main)
