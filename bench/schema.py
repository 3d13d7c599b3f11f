"""The one form of every result file: a report that says where it comes from, and its rows.

A report: benchmark, date, protocol, device, threads, platform, versions, commit, limits, rows.
A row: one case by one provider. What was not measured is None; a model's seconds stand under
`model`, so that nothing computed can be taken for something measured.
"""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gsr.describe import describe_run
from gsr.errors import InputError

VERSION = 1

_NUMBER = (int, float)
_REPORT = {
    "schema": int,
    "benchmark": str,
    "date": str,
    "protocol": dict,
    "device": str,
    "threads": int,
    "platform": str,
    "versions": dict,
    "commit": (str, type(None)),
    "limits": (dict, type(None)),  # measured in the same run: bandwidth B/s, arithmetic op/s
    "rows": list,
}
_ROW = {
    "case": str,
    "provider": str,
    "sizes": dict,
    "seconds": (dict, type(None)),  # p20, p50, p80
    "bytes": (int, type(None)),  # by formula: bench/cost.py
    "operations": (int, type(None)),
    "share": (dict, type(None)),  # of limits: memory, arithmetic
    "note": (str, type(None)),  # why there are no seconds
}
_MORE = {
    "direction": str,  # "forward" or "forward and backward"
    "passes": _NUMBER,  # p50 in EDSR-baseline passes over the same LR image
    "config": dict,
    "resources": dict,  # a compiled kernel's
    "loop": dict,  # instructions of its innermost loop
    "occupancy": int,  # warps a multiprocessor
    "model": dict,  # seconds by limit, modelled
    "part": str,  # of `python -m bench network`, as the names below
    "spread": dict,  # p20, p50, p80 of passes or ratio
    "memory": int,  # bytes at the peak, above the loaded model
    "rss": int,  # bytes at the peak, of the whole process
    "per_pixel": _NUMBER,  # p50 seconds a pixel of the result
    "rates": dict,  # of `python -m bench training`: FLOP/s, their share, share of time waiting
    "ratio": _NUMBER,  # to the smallest image's per_pixel, or to a training step of the encoder
}


def report(benchmark: str, device: torch.device, protocol: dict, rows: list, limits=None) -> dict:
    """A report of `rows` measured on `device` now, checked."""
    run = describe_run(device)
    try:
        import triton

        run["versions"]["triton"] = triton.__version__
    except ImportError:
        pass
    result = {
        "schema": VERSION,
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "protocol": protocol,
        **run,
        "limits": limits,
        "rows": rows,
    }
    check(result)
    return result


def row(case: str, provider: str, sizes: dict, **fields: Any) -> dict:
    """A row with what is not given as None."""
    missing = dict.fromkeys(("seconds", "bytes", "operations", "share", "note"))
    return {"case": case, "provider": provider, "sizes": sizes, **missing, **fields}


def check(report: Any) -> None:
    """Raise ValueError, naming the place, if `report` is not in the form above."""
    _fields(report, _REPORT, {"configs": dict}, "report")
    if report["schema"] != VERSION:
        raise ValueError(f"report.schema is {report['schema']}, this version reads {VERSION}")
    for i, one in enumerate(report["rows"]):
        place = f"rows[{i}]"
        _fields(one, _ROW, _MORE, place)
        if one["seconds"] is not None:
            _fields(one["seconds"], dict.fromkeys(("p20", "p50", "p80"), _NUMBER), {}, place)
            times = [one["seconds"][p] for p in ("p20", "p50", "p80")]
            if not all(math.isfinite(t) and t > 0 for t in times) or times != sorted(times):
                raise ValueError(f"{place}.seconds are no quantiles: {times}")
        elif not one["note"] and not {"model", "resources", "memory"} & one.keys():
            raise ValueError(f"{place} has no seconds and no note that says why")


def _fields(value: Any, required: dict, optional: dict, place: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is no mapping")
    for name in required.keys() - value.keys():
        raise ValueError(f"{place} lacks {name}")
    for name in value.keys() - required.keys() - optional.keys():
        raise ValueError(f"{place}.{name} is not in the schema")
    for name, content in value.items():
        kind = required.get(name) or optional[name]
        if not isinstance(content, kind) or isinstance(content, bool):
            raise ValueError(f"{place}.{name} is {content!r}")


def save(report: dict, path: str | Path) -> None:
    check(report)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line for each row: a diff then says which of them changed.
    rows = ",\n".join("  " + json.dumps(row) for row in report["rows"])
    head = json.dumps({k: v for k, v in report.items() if k != "rows"}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def load(path: str | Path) -> dict:
    """Raises InputError if the file cannot be read or is no report."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        check(report)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no report of a measurement: {error}") from None
    return report
