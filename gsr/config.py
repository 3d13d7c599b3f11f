"""The configuration of a model and of a training, as dataclasses that a YAML file fills in.

A section of the file is a dataclass here, a key is a field, and its annotation is the type that a
value must have. Anything else in a file is an error, reported by its full key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import sys
import types
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gsr.errors import InputError
from gsr.io.paths import check_path

DEVICES = r"auto|cpu|cuda(:[0-9]+)?|mps|xpu"
MAX_THREADS = 1024
BYTES = r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(i?)B"  # an amount of memory

# Fields are declared as `name: type = default  # meaning, unit, range`.


@dataclass
class EncoderConfig:
    """Feature extractor at LR: [B, 3, h, w] in [0, 1] to [B, n_feats, h, w]."""

    name: Literal["edsr", "span", "rdn", "swinir"] = "edsr"
    n_feats: int = 64  # channels; EDSR-baseline, RDN and SwinIR 64, EDSR 256, SPAN 48
    n_blocks: int = 16  # blocks of edsr, span and rdn; EDSR-baseline and RDN 16, EDSR 32, SPAN 6
    res_scale: float = 1.0  # edsr: factor on each residual branch; EDSR 0.1
    layers: int = 8  # rdn: convolutions of a block, each of which sees all before it
    growth: int = 64  # rdn: channels that each of them adds
    dim: int = 180  # swinir: channels inside
    depths: list[int] = field(default_factory=lambda: [6] * 6)  # swinir: blocks of each group
    heads: int = 6  # swinir: of the attention; a divisor of dim
    window: int = 8  # swinir: side of a window of attention, LR pixels, even


@dataclass
class DirectConfig:
    """Head of `direct`: every LR pixel emits coloured Gaussians."""

    gaussians: int = 4  # K, Gaussians per LR pixel
    radius: int = 1  # r, a HR pixel sums over the (2r + 1)^2 nearest LR pixels
    reach: float = 0.5  # farthest offset from the LR pixel, LR pixels; the rest is left to sigma
    normalize: bool = True  # divide by the total weight
    width: int = 64  # hidden channels of the head
    # Of the hidden channels. Under relu all of them can die, and the residual with them.
    activation: Literal["leaky_relu", "relu"] = "leaky_relu"


@dataclass
class BankConfig:
    """Gaussian bank and selective assignment of `official` and `field`."""

    points: int = 100  # N, Gaussians in the bank (a square number)
    channels: int = 8  # feature channels that are splatted; the rest is resized bicubically
    window: int = 7  # side in LR pixels, odd (official: disjoint windows; field: nearest pixels)
    kernel_size: int = 5  # taps a side, official only
    assignment: Literal["argmax", "softmax", "gumbel"] = "argmax"  # in evaluation
    train_assignment: Literal["gumbel", "softmax"] = "gumbel"  # in training


@dataclass
class DecoderConfig:
    """Fourier decoder at HR of `official`, `field` and `bicubic`."""

    hidden_dim: int = 256  # channels of coef and freq; even
    hidden_list: list[int] = field(default_factory=lambda: [256, 256, 256, 256])  # MLP widths
    skip: bool = False  # decode what the bicubic enlargement lacks; never in official


@dataclass
class LIIFConfig:
    """Head of `liif`."""

    hidden_list: list[int] = field(default_factory=lambda: [256, 256, 256, 256])  # MLP widths
    skip: bool = False  # decode what the bilinear enlargement lacks, as lte does; not as published


@dataclass
class LTEConfig:
    """Head of `lte`."""

    hidden_dim: int = 256  # channels of coef and freq; even
    hidden_list: list[int] = field(default_factory=lambda: [256, 256, 256])  # MLP widths
    scale_max: float = 4.0  # largest scale of the training; above, the phase is that of this one


@dataclass
class ModelConfig:
    mode: Literal["direct", "field", "official", "bicubic", "liif", "lte"] = "direct"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    direct: DirectConfig = field(default_factory=DirectConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    liif: LIIFConfig = field(default_factory=LIIFConfig)
    lte: LTEConfig = field(default_factory=LTEConfig)


@dataclass
class BlurConfig:
    """Gaussian blur of an LR image."""

    share: float = 0.3  # of the degraded patches
    sigma: list[float] = field(default_factory=lambda: [0.2, 0.8])  # drawn between these, LR pixels


@dataclass
class NoiseConfig:
    """Gaussian and Poisson (shot) noise on an LR image, in levels of 255."""

    share: float = 0.3  # of the degraded patches
    sigma: list[float] = field(default_factory=lambda: [0.0, 6.0])  # Gaussian, drawn between these
    shot: list[float] = field(default_factory=lambda: [0.0, 6.0])  # Poisson, where it is white
    grey: float = 0.3  # share with the same noise in all channels


@dataclass
class JpegConfig:
    """An LR image saved as JPEG."""

    share: float = 0.85  # of the degraded patches
    quality: list[int] = field(default_factory=lambda: [25, 95])  # drawn between these, both used
    chroma_420: float = 0.8  # share at 4:2:0; the rest is at 4:4:4
    twice: float = 0.1  # share that is saved a second time, on a shifted grid of blocks


@dataclass
class DegradeConfig:
    """Mixture of degradations that LR patches are made with, see `gsr.data.degradations`."""

    clean: float = 0.2  # share of patches that are plain bicubic
    kernels: list[Literal["bicubic", "bilinear", "lanczos", "area"]] = field(
        default_factory=lambda: ["bicubic", "bilinear", "lanczos", "area"]
    )  # resampling of the other patches, drawn equally
    blur: BlurConfig = field(default_factory=BlurConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    jpeg: JpegConfig = field(default_factory=JpegConfig)


@dataclass
class DataConfig:
    train: str | dict[str, float] = "data/train"  # folder of HR images, or several with shares
    val: str | None = None  # folder of HR pictures; None: val_count of train, set aside
    val_count: int = 10  # pictures used for validation
    patch: int = 48  # LR patch side, pixels
    scale_min: float = 1.0
    scale_max: float = 4.0  # one scale per batch, uniform in [scale_min, scale_max]
    queries: int = 2304  # HR pixels sampled per patch, without replacement
    batch: int = 16  # patches of an optimiser step, over all processes and micro-batches
    repeat: int = 20  # times each picture is visited per epoch, on average
    degrade: DegradeConfig | None = None  # how LR is made of HR; None: Pillow's bicubic
    workers: int = 2  # loader processes of each training process; 0 loads in that one itself
    # Where decoded pictures are kept; true and false, as in older files, are memory and none. With
    # memory, each training process keeps its own, up to the whole budget.
    cache: Literal["memory", "mmap", "none", True, False] = "memory"
    cache_budget: str | None = None  # such as 4GB; what is beyond is decoded every time
    cache_dir: str | None = None  # of mmap; None: .gsr-cache in the folder of train


@dataclass
class TrainConfig:
    steps: int | None = None  # total optimiser steps; None: epochs * steps per epoch
    epochs: int = 2000  # used where steps is None
    lr: float = 1e-4  # of Adam
    muon_lr: float | None = None  # of Muon for the encoder, such as 0.01; null: Adam for all
    schedule: Literal["step", "cosine"] = "step"
    step_epochs: int = 200  # `step`: multiply lr by `gamma` every so many epochs
    gamma: float = 0.5
    warmup: int = 100  # steps of linear warm-up
    clip: float | None = 0.5  # largest gradient norm; null: any
    accumulate: int = 1  # micro-batches of a step, one after the other: less memory, same result
    ema: float | None = None  # decay of a running mean of the weights, such as 0.999; None: off
    precision: Literal["fp32", "bf16"] = "fp32"  # of the encoder; the splat is always fp32
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    threads: int | None = None  # CPU threads; None: PyTorch's choice
    log_every: int = 50  # steps
    val_every: int = 1000  # steps
    save_every: int = 1000  # steps
    keep: int = 0  # states from before the newest that stay, as state-STEP.pt


@dataclass
class Config:
    """One experiment."""

    name: str = "unnamed"
    output: str = "runs"  # the run lives in output/name
    init: str | None = None  # model folder or published .pth whose weights to start from
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


# ---- limits -------------------------------------------------------------------------------------
# Section: (keys that the rule reads, what must hold of the section, how to say it). A rule is tried
# once all its keys have the right type; keys reach into sections below with a dot.


def _at_least(low: int, *keys: str) -> list[tuple]:
    return [
        ((key,), lambda c, k=key: getattr(c, k) is None or getattr(c, k) >= low, f"at least {low}")
        for key in keys
    ]


def _between(low: int, high: int, *keys: str) -> list[tuple]:
    return [
        (
            (key,),
            lambda c, k=key: getattr(c, k) is None or low <= getattr(c, k) <= high,
            f"from {low} to {high}",
        )
        for key in keys
    ]


def _above_zero(*keys: str) -> list[tuple]:
    return [
        ((key,), lambda c, k=key: getattr(c, k) is None or getattr(c, k) > 0, "above 0")
        for key in keys
    ]


def _filled(what: str, *keys: str) -> list[tuple]:
    """A path of no characters would mean the current folder."""
    return [
        ((key,), lambda c, k=key: getattr(c, k) is None or getattr(c, k).strip() != "", what)
        for key in keys
    ]


# The upper limits are far above any use: they keep a damaged file from having modules without end
# built, and a typing error from ending in an overflow.
WIDEST = 4096
LONGEST = 1_000_000_000  # steps or epochs


def _even(key: str, low: int, high: int) -> tuple:
    return (
        (key,),
        lambda c: low <= getattr(c, key) <= high and getattr(c, key) % 2 == 0,
        f"even and from {low} to {high}",
    )


def _list(key: str, longest: int, what: str, high: int) -> tuple:
    return (
        (key,),
        lambda c: (
            0 < len(getattr(c, key)) <= longest and all(0 < n <= high for n in getattr(c, key))
        ),
        f"1 to {longest} {what}, each from 1 to {high}",
    )


def _shares(*keys: str) -> list[tuple]:
    return [((key,), lambda c, k=key: 0 <= getattr(c, k) <= 1, "from 0 to 1") for key in keys]


def _range(key: str, low: float, high: float) -> tuple:
    return (
        (key,),
        lambda c: (
            len(getattr(c, key)) == 2 and low <= getattr(c, key)[0] <= getattr(c, key)[1] <= high
        ),
        f"two numbers [least, most] from {low} to {high}",
    )


CHECKS: dict[type, list[tuple]] = {
    EncoderConfig: [
        *_between(1, WIDEST, "n_feats"),
        *_between(1, 1024, "n_blocks"),
        (("n_blocks", "name"), lambda c: c.name != "span" or c.n_blocks > 1, "at least 2 in span"),
        *_above_zero("res_scale"),
        *_between(1, 32, "layers"),
        *_between(1, WIDEST, "growth", "dim"),
        _list("depths", 32, "groups", 32),
        (
            ("heads", "dim"),
            lambda c: 0 < c.heads and c.dim % c.heads == 0,
            "a divisor of dim, such as 1",
        ),
        _even("window", 2, 64),
    ],
    DirectConfig: [
        *_between(1, 256, "gaussians"),
        *_between(1, 16, "radius"),
        *_between(1, WIDEST, "width"),
        (("reach", "radius"), lambda c: 0.5 <= c.reach <= c.radius, "from 0.5 to radius"),
    ],
    BankConfig: [
        *_between(1, WIDEST, "channels"),
        (
            ("points",),
            lambda c: 0 < c.points <= 10_000 and math.isqrt(c.points) ** 2 == c.points,
            "a square number up to 10000, such as 100",
        ),
        (
            ("window",),
            lambda c: 3 <= c.window <= 99 and c.window % 2 == 1,
            "odd and from 3 to 99",
        ),
        *_between(2, 99, "kernel_size"),
    ],
    DecoderConfig: [
        _even("hidden_dim", 2, WIDEST),
        _list("hidden_list", 64, "widths", WIDEST),
    ],
    LIIFConfig: [_list("hidden_list", 64, "widths", WIDEST)],
    LTEConfig: [
        _even("hidden_dim", 2, WIDEST),
        _list("hidden_list", 64, "widths", WIDEST),
        *_above_zero("scale_max"),
    ],
    ModelConfig: [
        (
            ("decoder.skip", "mode"),
            lambda c: c.mode != "official" or not c.decoder.skip,
            "false in mode official, which is as published",
        ),
        (
            ("bank.channels", "encoder.n_feats", "mode"),
            lambda c: c.mode not in ("field", "official") or c.bank.channels < c.encoder.n_feats,
            "below encoder.n_feats",
        ),
    ],
    BlurConfig: [*_shares("share"), _range("sigma", 0, 100)],
    NoiseConfig: [*_shares("share", "grey"), _range("sigma", 0, 255), _range("shot", 0, 255)],
    JpegConfig: [*_shares("share", "chroma_420", "twice"), _range("quality", 1, 100)],
    DegradeConfig: [
        *_shares("clean"),
        (("kernels",), lambda c: len(c.kernels) > 0, "at least one kernel"),
    ],
    DataConfig: [
        *_filled("a folder", "val", "cache_dir"),
        (
            ("train",),
            lambda c: (
                c.train.strip() != ""
                if isinstance(c.train, str)
                else c.train and all(k.strip() and s > 0 for k, s in c.train.items())
            ),
            "a folder, or folders with shares above 0",
        ),
        *_between(1, 1000, "scale_min", "scale_max"),
        *_between(8, WIDEST, "patch"),
        *_between(1, 1_000_000, "batch", "val_count"),
        *_between(1, 10_000, "repeat"),
        *_at_least(1, "queries"),
        *_between(0, 1024, "workers"),
        (
            ("cache_budget",),
            lambda c: c.cache_budget is None or re.fullmatch(BYTES, c.cache_budget),
            "an amount such as 500MB, 4GB or 2GiB",
        ),
        (("scale_max", "scale_min"), lambda c: c.scale_max >= c.scale_min, "at least scale_min"),
        (
            ("queries", "patch", "scale_min"),
            lambda c: c.queries <= round(c.patch * c.scale_min) ** 2,
            "at most round(patch * scale_min)^2, the HR pixels of the smallest patch",
        ),
    ],
    TrainConfig: [
        *_between(1, LONGEST, "steps", "epochs", "step_epochs"),
        *_between(1, MAX_THREADS, "threads"),
        *_between(1, LONGEST, "log_every", "val_every", "save_every"),
        *_between(1, 1_000_000, "accumulate"),
        *_between(0, LONGEST, "warmup", "keep"),
        *_above_zero("lr", "muon_lr", "clip"),
        (("gamma",), lambda c: 0 < c.gamma <= 1, "above 0 and at most 1"),
        (("ema",), lambda c: c.ema is None or 0 < c.ema < 1, "above 0 and below 1"),
        (("seed",), lambda c: 0 <= c.seed < 2**32, "in 0 .. 2^32 - 1"),
        (
            ("device",),
            lambda c: re.fullmatch(DEVICES, c.device),
            "auto, cpu, cuda, cuda:1 or the like, mps or xpu",
        ),
    ],
    Config: [
        (
            ("name",),
            lambda c: c.name.strip(". ") != "" and not set(c.name) & set("/\\"),
            "a folder name without slashes",
        ),
        *_filled("a folder", "output"),
        *_filled("a model folder or a .pth file", "init"),
        (
            ("model.lte.scale_max", "data"),
            lambda c: c.model.mode != "lte" or c.model.lte.scale_max >= c.data.scale_max,
            "at least data.scale_max in mode lte",
        ),
    ],
}


# ---- loading ------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """A config or a section of one as plain dictionaries and lists; undoes `from_dict`."""
    return dataclasses.asdict(config)


def from_dict(cls: type, mapping: Any, where: str = "") -> Any:
    """Build the dataclass `cls` from a mapping as a YAML or JSON file gives it.

    Keys left out take their defaults; a section that is null takes all of them. `where` is put
    before every key in messages, such as "model". Raises one InputError that lists every mistake:
    unknown keys with the nearest known one, values of the wrong type and values out of range.
    """
    errors: list[str] = []
    config = _build(cls, mapping, where, errors, _all_keys(cls, where))
    _refuse(errors)
    return config


def check(config: Any) -> Any:
    """A copy of a config, or of a section of one, that keeps to every type and limit.

    For configs that were not read by `from_dict`. Raises InputError as that does.
    """
    return from_dict(type(config), to_dict(config))


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file into a Config, with overrides such as "train.lr=2e-4" on top.

    The right-hand side of an override is YAML too ("null", "[64, 64]"). Raises one InputError
    that lists every mistake in file and overrides, each with its full key.
    """
    path = check_path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such config file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; name a YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error})") from None
    mapping = _parse_yaml(text, str(path))
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, dict):
        raise InputError(f"{path} must hold keys and values, not {_show(mapping)}")
    errors: list[str] = []
    known = _all_keys(Config, "")
    for override in overrides:
        _override(mapping, override, errors, known)
    config = _build(Config, mapping, "", errors, known)
    _refuse(errors, f"{path}: ")
    return config


def _refuse(errors: list[str], prefix: str = "") -> None:
    if len(errors) == 1:
        raise InputError(prefix + errors[0])
    if errors:
        raise InputError(f"{prefix}{len(errors)} mistakes\n" + "\n".join(f"  {e}" for e in errors))


def _override(mapping: dict, override: str, errors: list[str], known: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        errors.append(f"override {override!r} must read section.key=value")
        return
    try:
        value = _parse_yaml(text, f"override {override!r}")
    except InputError as error:
        errors.append(str(error))
        return
    *sections, last = key.split(".")
    for where in map(".".join, (sections[: i + 1] for i in range(len(sections)))):
        if where in known and not any(k.startswith(f"{where}.") for k in known):
            errors.append(f"{key} is not a key; {where} is a value, not a section")
            return
    for section in sections:
        if mapping.get(section) is None:
            mapping[section] = {}
        mapping = mapping[section]
        if not isinstance(mapping, dict):
            return  # the file has a plain value where a section must be, and _build says so
    mapping[last] = value


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _all_keys(cls: type, where: str) -> list[str]:
    """Every key of `cls` and of the sections below it, in full."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys.append(_join(where, name))
        kind = next(filter(dataclasses.is_dataclass, get_args(kind)), kind)  # a section or null
        if dataclasses.is_dataclass(kind):
            keys += _all_keys(kind, _join(where, name))
    return keys


def _build(cls: type, mapping: Any, where: str, errors: list[str], known: list[str]) -> Any:
    """A `cls` if nothing was wrong with the mapping; else errors has grown."""
    if mapping is None:  # `train:` with nothing below it
        mapping = {}
    if not isinstance(mapping, dict):
        errors.append(f"{where or 'the config'} must be a section of keys, not {_show(mapping)}")
        return None
    hints = get_type_hints(cls)
    values, bad = {}, set()
    for key, value in mapping.items():
        if key not in hints:
            errors.append(f"{_join(where, key)} is not a key; {_nearest(key, where, cls, known)}")
            continue
        before = len(errors)
        values[key] = _convert(hints[key], value, _join(where, key), errors, known)
        if len(errors) > before:
            bad.add(key)
            del values[key]
    config = cls(**values)
    for keys, holds, text in CHECKS.get(cls, []):
        if not bad & {key.partition(".")[0] for key in keys} and not holds(config):
            value = functools.reduce(getattr, keys[0].split("."), config)
            errors.append(f"{_join(where, keys[0])} must be {text}, not {_show(value)}")
            bad.add(keys[0].partition(".")[0])  # what follows from this mistake is none
    return config


def _nearest(key: Any, where: str, cls: type, known: list[str]) -> str:
    """Which key was meant: one of this section, one of that name elsewhere, or the whole list."""
    own = [f.name for f in dataclasses.fields(cls)]
    match = difflib.get_close_matches(str(key), own, 1)
    if match:
        return f"did you mean {_join(where, match[0])}?"
    for cutoff in (1.0, 0.75):
        for full in known:
            last = full.rpartition(".")[2]
            if difflib.SequenceMatcher(None, str(key).rpartition(".")[2], last).ratio() >= cutoff:
                return f"did you mean {full}?"
    return f"{where or 'the top level'} knows {', '.join(own)}"


def _convert(kind: Any, value: Any, key: str, errors: list[str], known: list[str]) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key, errors, known)
    origin, args, or_null = get_origin(kind), get_args(kind), ""
    if origin in (Union, types.UnionType) and type(None) in args:
        if value is None:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        if dataclasses.is_dataclass(kind):
            return _build(kind, value, key, errors, known)
        origin, args, or_null = get_origin(kind), get_args(kind), " or null"
    if kind == str | dict[str, float]:
        if not isinstance(value, dict):
            kind, origin, args = str, None, ()
        else:
            return {
                str(name): _convert(float, share, f"{key}.{name}", errors, known)
                for name, share in value.items()
            }
    if origin is Literal and any(type(a) is type(value) and a == value for a in args):
        return value  # a YAML true is no 1
    if origin is list and isinstance(value, list):
        return [
            _convert(args[0], item, f"{key}[{i}]", errors, known) for i, item in enumerate(value)
        ]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        if not abs(value) <= sys.float_info.max:  # NaN, infinity, a whole number beyond
            errors.append(f"{key} must be a finite number, not {value}")
            return None
        return float(value)
    if kind is int and number and isinstance(value, int):
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    hint = ""
    if origin is Literal and isinstance(value, str):
        match = difflib.get_close_matches(value, [str(a) for a in args], 1)
        hint = f"; did you mean {match[0]}?" if match else ""
    elif kind is int and number and value == value // 1:
        hint = f"; write {int(value)}"
    elif kind is str and isinstance(value, (int, float)):
        hint = "; put it in quotes"
    errors.append(f"{key} must be {_expected(kind)}{or_null}, not {_show(value)}{hint}")
    return None


def _expected(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(a).lower() if a in (True, False) else str(a) for a in args)
    if origin is list:
        return {int: "a list of whole numbers", str: "a list of texts"}.get(args[0], "a list")
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _show(value: Any) -> str:
    names = {dict: "a section", list: "a list", type(None): "null", bool: str(value).lower()}
    if isinstance(value, str):
        return f"the text {value!r}"
    return names.get(type(value), repr(value)) if value != [] else "an empty list"


@functools.lru_cache(maxsize=1)
def _yaml_loader() -> type:
    """PyYAML's safe loader with YAML 1.2's idea of numbers and booleans, and no duplicate keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        # YAML 1.1, PyYAML's own, reads 1e-4 as text, `no` as false, 1:30 as 90 and 010 as 8.
        yaml_implicit_resolvers: dict = {}

        def construct_mapping(self, node, deep=False):
            seen = {}
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                line = key_node.start_mark.line + 1
                if not isinstance(key, Hashable):
                    raise yaml.MarkedYAMLError(problem=f"line {line}: a key must be a plain word")
                if key in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"line {line}: the key {key} is there already, in line {seen[key]}"
                    )
                seen[key] = line
            return super().construct_mapping(node, deep=deep)

    def resolve(tag: str, pattern: str, first: str) -> None:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))

    resolve("null", r"^(?:~|null|Null|NULL|)$", "~nN")
    Loader.yaml_implicit_resolvers.setdefault("", []).append(
        ("tag:yaml.org,2002:null", re.compile(r"^$"))
    )
    resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
    resolve("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789")
    resolve(
        "float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
        r"|^\.(?:nan|NaN|NAN)$",
        "-+.0123456789",
    )
    return Loader


def _parse_yaml(text: str, name: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=_yaml_loader())
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{name} is not valid YAML: {line}{' '.join(problem.split())}") from None
    except (ValueError, RecursionError) as error:  # PyYAML lets these out of odd scalars
        raise InputError(f"{name} is not valid YAML ({error})") from None
