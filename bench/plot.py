"""An image of a report: python -m bench.plot splat.json -o splat.png

Of `python -m bench splat` the times, of `python -m bench static` the model's limits, of `python -m
bench network` time and memory against the size of the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import schema
from gsr.cli import guard
from gsr.errors import InputError


def pyplot():
    """matplotlib.pyplot, set up for files; InputError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install 'gaussiansr[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def dots(groups: dict[str, dict[str, tuple[float, float, float]]], title: str, unit: str):
    """A figure of dots with ranges on a logarithmic axis: {group: {series: (low, value, high)}}."""
    plt = pyplot()
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    count = sum(map(len, groups.values())) + len(groups)
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.16 * count), layout="constrained")
    at, ticks, handles = 0, {}, {}
    for group, values in groups.items():
        ticks[at + (len(values) - 1) / 2] = group
        for name, (low, value, high) in values.items():
            handles[name] = axes.errorbar(
                value, at, xerr=[[value - low], [high - value]], fmt="o", ms=4, lw=1.2,
                color=f"C{series.index(name)}",
            )  # fmt: skip
            at += 1
        axes.axhline(at, color="0.9", lw=0.8)
        at += 1
    axes.set_xscale("log")
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_ylim(at - 1, -1)
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=len(series), fontsize=8
    )
    return figure


def lines(panels: dict[str, dict[str, list[tuple[float, float]]]], title: str, horizontal: str):
    """A figure of panels side by side, logarithmic: {vertical axis: {series: [(x, y), ...]}}."""
    figure, axes = pyplot().subplots(1, len(panels), figsize=(9, 3.6), layout="constrained")
    for one, (vertical, series) in zip(axes, panels.items(), strict=True):
        for name, points in series.items():
            one.plot(*zip(*points, strict=True), "o-", ms=4, lw=1.2, label=name)
        one.set_xscale("log")
        one.set_yscale("log")
        one.set_xlabel(horizontal)
        one.set_ylabel(vertical)
        one.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def draw(report: dict):
    """The figure of a report."""
    groups: dict[str, dict] = {}
    if sized := [r for r in report["rows"] if "per_pixel" in r]:
        panels = {"seconds": {}, "whole process at its peak, MB": {}}
        for r in sized:
            pixels = r["sizes"]["H"] * r["sizes"]["W"] / 1e6
            for panel, y in zip(panels, (r["seconds"]["p50"], r["rss"] / 1e6), strict=True):
                panels[panel].setdefault(r["provider"], []).append((pixels, y))
        title = f"gsr.upscale at x{sized[0]['sizes']['H'] // sized[0]['sizes']['h']}, "
        title += f"{report['device']}, {report['threads']} threads"
        return lines(panels, title, "output, million pixels")
    if report["benchmark"] == "static":
        for r in report["rows"]:
            if "model" in r:
                group = f"{r['case']}, {r['provider'].removeprefix('model ')}"
                groups[group] = {n: (t * 1e3,) * 3 for n, t in r["model"].items()}
        title, unit = "Modelled limits, x4 to 2040 x 1356: not a measurement", "ms"
    else:
        for r in report["rows"]:
            if r["seconds"]:
                kind = r.get("direction") or r["part"]
                group = groups.setdefault(f"{r['case']}, {kind}", {})
                group[r["provider"]] = tuple(r["seconds"][p] * 1e3 for p in ("p20", "p50", "p80"))
        title, unit = f"{report['device']}: median, and 20 % to 80 %", "ms"
    if not groups:
        raise InputError("there are no times in this report")
    return dots(groups, title, unit)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="image file to write")
    args = parser.parse_args(argv)
    figure = draw(schema.load(args.report))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    guard(main)
