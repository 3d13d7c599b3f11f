"""Measure a model, next to bicubic: `python evaluate.py --data FOLDER ...`, see `--help`.

The steps are in `gsr.evaluation`: `open_set` finds pictures, `evaluate` measures, `main` reports;
tables for a paper and the figure of crops are made in `gsr.report`.
"""

from gsr.cli import guard
from gsr.evaluation import main

if __name__ == "__main__":
    guard(main)
