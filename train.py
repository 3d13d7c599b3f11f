"""Train a model: `python train.py --config configs/NAME.yaml [--resume] [section.key=value ...]`.

On N GPUs: `torchrun --nproc_per_node N train.py --config ...`, the batch shared among them.
The steps are in `gsr.training.Trainer`: `fit` is the loop, `_train_step` one optimiser step.
"""

from gsr.cli import guard
from gsr.training import main

if __name__ == "__main__":
    guard(main)
