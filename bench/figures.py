"""Draw docs/images/kernel_cells.png: python -m bench.figures

The kernel's view of an image: HR pixels by the LR pixel nearest to each, and what one cell reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from bench.plot import pyplot
from gsr.cli import guard

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "kernel_cells.png"
LR, SCALE, CELL, RADIUS = (5, 6), (3.6, 4.0), (2, 2), 1  # CELL: the LR pixel that is looked at
REACH, GAUSSIAN, OFFSET = 0.75, (1, 3), (0.35, -0.3)  # as in gsr/models/heads/direct.py; LR pixels


def ellipse(sigma: tuple[float, float], rho: float, radius: float) -> np.ndarray:
    """Points (y, x) of the line q = radius^2 of a Gaussian around the origin."""
    covariance = np.array([[sigma[0] ** 2, 0.0], [0.0, sigma[1] ** 2]])
    covariance[0, 1] = covariance[1, 0] = rho * sigma[0] * sigma[1]
    t = np.linspace(0, 2 * np.pi, 200)
    return radius * np.linalg.cholesky(covariance) @ np.stack([np.sin(t), np.cos(t)])


def draw():
    plt = pyplot()
    from matplotlib.patches import Rectangle

    (h, w), (i, j) = LR, CELL
    big_h, big_w = round(h * SCALE[0]), round(w * SCALE[1])
    figure, axes = plt.subplots(figsize=(9.4, 5.2), layout="constrained")
    y = (np.arange(big_h) + 0.5) * h / big_h - 0.5
    x = (np.arange(big_w) + 0.5) * w / big_w - 0.5
    yy, xx = (a.ravel() for a in np.meshgrid(y, x, indexing="ij"))
    own = (np.floor(yy + 0.5) == i) & (np.floor(xx + 0.5) == j)
    axes.scatter(xx[~own], yy[~own], s=7, color="0.7", label="HR pixels")
    axes.scatter(
        xx[own], yy[own], s=34, color="C0", label="those of one cell: one thread", zorder=4
    )
    for n in range(h + 1):
        axes.plot([-0.5, w - 0.5], [n - 0.5] * 2, color="0.8", lw=0.8, zorder=0)
    for n in range(w + 1):
        axes.plot([n - 0.5] * 2, [-0.5, h - 0.5], color="0.8", lw=0.8, zorder=0)
    ly, lx = (a.ravel() for a in np.meshgrid(range(h), range(w), indexing="ij"))
    near = (abs(ly - i) <= RADIUS) & (abs(lx - j) <= RADIUS)
    axes.scatter(lx[~near], ly[~near], marker="s", s=34, facecolors="none", edgecolors="0.5",
                 label="LR pixels")  # fmt: skip
    axes.scatter(lx[near], ly[near], marker="s", s=44, facecolors="none", edgecolors="C3",
                 linewidths=1.6, label="those it reads: the window, r = 1")  # fmt: skip

    def box(cy, cx, half, **style):
        axes.add_patch(Rectangle((cx - half, cy - half), 2 * half, 2 * half, fill=False, **style))

    box(i, j, RADIUS + 0.5, color="C3", lw=1.8)
    box(i, j, 0.5, color="C0", lw=1.8)
    gy, gx = GAUSSIAN
    box(gy, gx, REACH, color="C2", ls="--", lw=1.4, label="where its centre may be: 3/4 LR pixel")
    # The largest sigma along y: three of them and the largest offset end where the window does.
    bound = (RADIUS + 0.5 - REACH) / 3
    centre = np.array([[gy + OFFSET[0]], [gx + OFFSET[1]]])
    for k in (1, 2, 3):
        line = ellipse((bound, 0.7 * bound), 0.5, k) + centre
        axes.plot(line[1], line[0], color="C2", lw=1.6 if k == 3 else 0.9,
                  label="one Gaussian: 1, 2 and 3 sigma" if k == 3 else None)  # fmt: skip
    axes.annotate(
        "", (centre[1, 0], centre[0, 0]), (gx, gy), arrowprops={"arrowstyle": "->", "color": "C2"}
    )
    axes.text(gx + 0.05, gy - 0.12, "offset", color="C2", fontsize=9)
    axes.set_aspect("equal")
    axes.set_xlim(-0.6, w - 0.4)
    axes.set_ylim(h - 0.4, -0.6)
    axes.set_xlabel("x, LR pixels")
    axes.set_ylabel("y, LR pixels")
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    return figure


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    figure = draw()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # No date or version in the file, so that it changes only with the image.
    figure.savefig(args.output, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    guard(main)
