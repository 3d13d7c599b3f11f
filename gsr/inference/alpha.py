"""Colours that transparency hides, replaced before a network sees them.

A pixel of alpha 0 has a colour that nobody sees: black, mostly. A network, like any interpolation,
would mix it into the pixels beside it, which is a dark outline around everything.
"""

from __future__ import annotations

import numpy as np


def fill_hidden(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return colour [h, w, C] with the pixels of alpha 0 taking what is visible around them.

    `alpha` is [h, w], of any range from 0; pixels with more than 0 stay as they are. A hidden pixel
    takes the mean, weighted by alpha, of the smallest block of 2 x 2, 4 x 4, ... pixels it lies in
    that has a visible one. Where nothing or everything is visible, the array itself comes back.
    """
    hidden = alpha == 0
    if hidden.all() or not hidden.any():
        return colour
    filled = colour.copy()
    means = _block_means(colour, alpha)
    for dy, dx in np.ndindex(2, 2):
        part, mask = filled[dy::2, dx::2], hidden[dy::2, dx::2]
        mean = means[: mask.shape[0], : mask.shape[1]][mask]
        part[mask] = np.rint(mean) if colour.dtype.kind == "u" else mean
    return filled


def _block_means(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return means [ceil(h / 2), ceil(w / 2), C] of blocks of 2 x 2, all of them filled."""
    sums, weights = [_halve(colour, alpha)], [_halve(alpha[..., None])]
    while not weights[-1].all():  # ends: a single block that has everything has something
        sums.append(_halve(sums[-1]))
        weights.append(_halve(weights[-1]))
    means = sums.pop() / weights.pop()
    for total, weight in zip(reversed(sums), reversed(weights), strict=True):
        means = means.repeat(2, 0).repeat(2, 1)[: total.shape[0], : total.shape[1]]
        seen = weight[..., 0] > 0
        means[seen] = total[seen] / weight[seen]
    return means


def _halve(values: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Sum blocks of 2 x 2 of values [h, w, C], times weight [h, w]: float32."""
    h, w = values.shape[:2]
    out = np.zeros(((h + 1) // 2, (w + 1) // 2, values.shape[2]), np.float32)
    for dy, dx in np.ndindex(2, 2):
        part = values[dy::2, dx::2].astype(np.float32)
        if weight is not None:
            part *= weight[dy::2, dx::2, None]
        out[: part.shape[0], : part.shape[1]] += part
    return out
