"""The configuration of a model and of a training, as pydantic models that a YAML file fills in.

A section of the file is a class here and a key is a field: its type, limits, default and meaning
stand together. `from_dict` and `load_config` raise one InputError for all mistakes in a file.
Sections made in Python are as free as dataclasses until `check` validates them.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, Signature
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from gsr.errors import InputError
from gsr.io.paths import check_path
from gsr.io.yaml import parse_yaml

DEVICES = r"auto|cpu|cuda(:[0-9]+)?|mps|xpu"
MAX_THREADS = 1024
BYTES = r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(i?)B"  # an amount of memory


class _Unvalidated(type(BaseModel)):
    """Makes Section(...) set fields as a dataclass does; validation does not come through here."""

    def __call__(cls, *values: Any, **named: Any) -> Any:
        fields = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in cls.model_fields]
        return cls.model_construct(**Signature(fields).bind_partial(*values, **named).arguments)


class Section(BaseModel, metaclass=_Unvalidated):
    """Base of all sections: strict types, finite numbers, no unknown keys."""

    # Defaults are validated too: a limit may depend on keys that are not left out.
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_empty(cls, mapping: Any) -> Any:
        return {} if mapping is None else mapping  # `train:` with nothing below it


def key(default: Any, description: str, **limits: Any) -> Any:
    """A field with a description; `limits` are those of pydantic's Field."""
    return Field(default, description=description, **limits)


def must(text: str, holds: Callable[[Any, dict], Any], blame: str = "") -> AfterValidator:
    """A limit that Field has no word for: holds(value, {field above this one: its value}).

    It is skipped if a field that it reads is wrong itself. `blame` is the key at fault where that
    is another one; it starts in this section, such as "bank.channels".
    """

    def validate(value: Any, info: Any) -> Any:
        try:
            if holds(value, info.data):
                return value
        except KeyError:  # suppress follow-on errors
            return value
        if not blame:
            raise ValueError(text)
        first, *below = blame.split(".")
        wrong = functools.reduce(getattr, below, {**info.data, info.field_name: value}[first])
        raise ValueError(text, blame, wrong)

    return AfterValidator(validate)


# Upper limits are far above any use: they keep a damaged file from building modules without end,
# and a typing error from ending in an overflow.
Width = Annotated[int, Field(ge=1, le=4096)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=64)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PathName = Annotated[str, must("a path", lambda s, _: s.strip())]  # "" would be the current folder


def between(low: float, high: float) -> AfterValidator:
    """A pair [least, most] within limits."""
    text = f"two numbers [least, most] from {low} to {high}"
    return must(text, lambda pair, _: len(pair) == 2 and low <= pair[0] <= pair[1] <= high)


class EncoderConfig(Section):
    """Feature extractor at LR: [B, 3, h, w] in [0, 1] to [B, n_feats, h, w]."""

    name: Literal["edsr", "span", "rdn", "swinir"] = key("edsr", "architecture")
    n_feats: Width = key(64, "channels; EDSR-baseline, RDN, SwinIR 64; EDSR 256; SPAN 48")
    n_blocks: Annotated[
        int, must("at least 2 in span", lambda n, c: c["name"] != "span" or n > 1)
    ] = key(16, "edsr, span, rdn: blocks; EDSR 32, SPAN 6, others 16", ge=1, le=1024)
    res_scale: Positive = key(1.0, "edsr: factor on each residual branch; EDSR 0.1")
    layers: int = key(8, "rdn: convolutions of a block, each reads all before it", ge=1, le=32)
    growth: Width = key(64, "rdn: channels that each of these convolutions adds")
    dim: Width = key(180, "swinir: channels inside")
    depths: Annotated[
        list[Annotated[int, Field(ge=1, le=32)]], Field(min_length=1, max_length=32)
    ] = key([6] * 6, "swinir: blocks of each group")
    heads: Annotated[
        int, must("a divisor of dim, such as 1", lambda n, c: n > 0 and c["dim"] % n == 0)
    ] = key(6, "swinir: attention heads; a divisor of dim")
    window: int = key(8, "swinir: side of a window, LR pixels", ge=2, le=64, multiple_of=2)


class DirectConfig(Section):
    """Head of `direct`: every LR pixel emits coloured Gaussians."""

    gaussians: int = key(4, "K, Gaussians per LR pixel", ge=1, le=256)
    radius: int = key(1, "r: an HR pixel sums over the (2r + 1)^2 nearest LR pixels", ge=1, le=16)
    reach: Annotated[float, must("at most radius", lambda x, c: x <= c["radius"])] = key(
        0.5, "farthest offset from the LR pixel, LR pixels; the rest is left to sigma", ge=0.5
    )
    normalize: bool = key(True, "divide by the total weight")
    width: Width = key(64, "hidden channels of the head")
    # Under relu all of them can die, and the residual with them.
    activation: Literal["leaky_relu", "relu"] = key("leaky_relu", "of the hidden channels")


class BankConfig(Section):
    """Gaussian bank and selective assignment of `official` and `field`."""

    points: Annotated[
        int, must("a square number, such as 100", lambda n, _: math.isqrt(n) ** 2 == n)
    ] = key(100, "N, Gaussians in the bank", ge=1, le=10_000)
    channels: Width = key(8, "feature channels that are splatted; the rest is resized bicubically")
    window: Annotated[int, must("odd and from 3 to 99", lambda n, _: n in range(3, 100, 2))] = key(
        7, "side in LR pixels (official: disjoint windows; field: nearest pixels)"
    )
    kernel_size: int = key(5, "official: taps a side", ge=2, le=99)
    assignment: Literal["argmax", "softmax", "gumbel"] = key("argmax", "in evaluation")
    train_assignment: Literal["gumbel", "softmax"] = key("gumbel", "in training")


class DecoderConfig(Section):
    """Fourier decoder at HR of `official`, `field` and `bicubic`."""

    hidden_dim: Width = key(256, "channels of coef and freq", multiple_of=2)
    hidden_list: Widths = key([256] * 4, "MLP widths")
    skip: bool = key(False, "decode the residual of bicubic upsampling; never in official")


class LIIFConfig(Section):
    """Head of `liif`."""

    hidden_list: Widths = key([256] * 4, "MLP widths")
    skip: bool = key(False, "decode the residual of bilinear upsampling, as lte; not as published")


class LTEConfig(Section):
    """Head of `lte`."""

    hidden_dim: Width = key(256, "channels of coef and freq", multiple_of=2)
    hidden_list: Widths = key([256] * 3, "MLP widths")
    scale_max: Positive = key(4.0, "largest scale of the training; above, the phase is that of it")


class ModelConfig(Section):
    """The encoder, and the head that `mode` names."""

    mode: Literal["direct", "field", "official", "bicubic", "liif", "lte"] = key("direct", "head")
    encoder: EncoderConfig = EncoderConfig()
    direct: DirectConfig = DirectConfig()
    bank: Annotated[
        BankConfig,
        must(
            "below encoder.n_feats",
            lambda bank, c: (
                c["mode"] not in ("field", "official") or bank.channels < c["encoder"].n_feats
            ),
            blame="bank.channels",
        ),
    ] = BankConfig()
    decoder: Annotated[
        DecoderConfig,
        must(
            "false in mode official, which is as published",
            lambda decoder, c: c["mode"] != "official" or not decoder.skip,
            blame="decoder.skip",
        ),
    ] = DecoderConfig()
    liif: LIIFConfig = LIIFConfig()
    lte: LTEConfig = LTEConfig()


class BlurConfig(Section):
    """Gaussian blur of an LR image."""

    share: Share = key(0.3, "of the degraded patches")
    sigma: Annotated[list[float], between(0, 100)] = key([0.2, 0.8], "[least, most], LR pixels")


class NoiseConfig(Section):
    """Gaussian and Poisson (shot) noise on an LR image: standard deviations in levels of 255."""

    share: Share = key(0.3, "of the degraded patches")
    sigma: Annotated[list[float], between(0, 255)] = key([0.0, 6.0], "[least, most] of Gaussian")
    shot: Annotated[list[float], between(0, 255)] = key(
        [0.0, 6.0], "[least, most] of Poisson, where the image is white"
    )
    grey: Share = key(0.3, "share with the same noise in all channels")


class JpegConfig(Section):
    """An LR image saved as JPEG."""

    share: Share = key(0.85, "of the degraded patches")
    quality: Annotated[list[int], between(1, 100)] = key([25, 95], "[least, most]")
    chroma_420: Share = key(0.8, "share at 4:2:0; the rest is at 4:4:4")
    twice: Share = key(0.1, "share that is saved a second time, on a shifted grid of blocks")


class DegradeConfig(Section):
    """Mixture of degradations that LR patches are made with, see `gsr.data.degradations`."""

    clean: Share = key(0.2, "share of patches that are plain bicubic")
    kernels: list[Literal["bicubic", "bilinear", "lanczos", "area"]] = key(
        ["bicubic", "bilinear", "lanczos", "area"],
        "resampling of the other patches, each drawn equally often",
        min_length=1,
    )
    blur: BlurConfig = BlurConfig()
    noise: NoiseConfig = NoiseConfig()
    jpeg: JpegConfig = JpegConfig()


class DataConfig(Section):
    """Training and validation images, and the patches that are cut out of them."""

    train: PathName | Annotated[dict[PathName, Positive], Field(min_length=1)] = key(
        "data/train", "folder of HR images, searched recursively; or several with their shares"
    )
    val: PathName | None = key(None, "folder of HR images; null: val_count of train, set aside")
    val_count: Count = key(10, "images used for validation")
    patch: int = key(48, "LR patch side, pixels", ge=8, le=4096)
    scale_min: float = key(1.0, "smallest scale; a batch has one scale, uniform", ge=1, le=1000)
    scale_max: Annotated[float, must("at least scale_min", lambda x, c: x >= c["scale_min"])] = key(
        4.0, "largest scale", ge=1, le=1000
    )
    queries: Annotated[
        int,
        must(
            "at most round(patch * scale_min)^2, the HR pixels of the smallest patch",
            lambda n, c: n <= round(c["patch"] * c["scale_min"]) ** 2,
        ),
    ] = key(2304, "HR pixels sampled per patch, without replacement", ge=1)
    batch: Count = key(16, "patches of an optimiser step, over all processes and micro-batches")
    repeat: int = key(20, "times each image is visited per epoch, on average", ge=1, le=10_000)
    degrade: DegradeConfig | None = key(None, "how LR is made of HR; null: Pillow's bicubic")
    workers: int = key(2, "loader processes of a training process; 0: itself", ge=0, le=1024)
    # With memory, each training process keeps its own images, up to the whole budget.
    cache: Literal["memory", "mmap", "none"] = key("memory", "where decoded images are kept")
    cache_budget: (
        Annotated[
            str,
            must("an amount such as 500MB, 4GB or 2GiB", lambda s, _: re.fullmatch(BYTES, s)),
        ]
        | None
    ) = key(None, "such as 4GB; what is beyond is decoded every time")
    cache_dir: PathName | None = key(None, "of mmap; null: .gsr-cache in the folder of train")


class TrainConfig(Section):
    """Optimisation, and what a run writes."""

    steps: Steps | None = key(None, "optimiser steps in total; null: epochs * steps per epoch")
    epochs: Steps = key(2000, "used where steps is null")
    lr: Positive = key(1e-4, "learning rate of Adam")
    muon_lr: Positive | None = key(None, "of Muon for the encoder, like 0.01; null: Adam for all")
    schedule: Literal["step", "cosine"] = key("step", "how the learning rate falls")
    step_epochs: Steps = key(200, "step: multiply lr by gamma every so many epochs")
    gamma: Positive = key(0.5, "step: factor on lr", le=1)
    warmup: int = key(100, "steps of linear warm-up", ge=0, le=1_000_000_000)
    clip: Positive | None = key(0.5, "largest gradient norm; null: any")
    accumulate: Count = key(1, "micro-batches of a step, in turn: less memory, same result")
    ema: float | None = key(None, "decay of the mean weights, like 0.999; null: off", gt=0, lt=1)
    precision: Literal["fp32", "bf16"] = key("fp32", "of the encoder; the splat is always fp32")
    seed: int = key(0, "of weights and patches", ge=0, lt=2**32)
    device: Annotated[
        str,
        must(
            "auto, cpu, cuda, cuda:1 or the like, mps or xpu", lambda s, _: re.fullmatch(DEVICES, s)
        ),
    ] = key("auto", "auto: CUDA where there is one, else cpu")
    threads: int | None = key(None, "CPU threads; null: PyTorch's choice", ge=1, le=MAX_THREADS)
    log_every: Steps = key(50, "steps")
    val_every: Steps = key(1000, "steps")
    save_every: Steps = key(1000, "steps")
    keep: int = key(0, "older states that stay, as state-STEP.pt", ge=0, le=1_000_000_000)


class Config(Section):
    """One experiment."""

    name: Annotated[
        str,
        must(
            "a folder name without slashes",
            lambda name, _: name.strip(". ") and not set(name) & set("/\\"),
        ),
    ] = key("unnamed", "of the run")
    output: PathName = key("runs", "the run lives in output/name")
    init: PathName | None = key(None, "model folder or published .pth whose weights to start from")
    model: ModelConfig = ModelConfig()
    data: Annotated[
        DataConfig,
        must(
            "at least data.scale_max in mode lte",
            lambda data, c: c["model"].mode != "lte" or c["model"].lte.scale_max >= data.scale_max,
            blame="model.lte.scale_max",
        ),
    ] = DataConfig()
    train: TrainConfig = TrainConfig()


# ---- loading ------------------------------------------------------------------------------------

S = TypeVar("S", bound=Section)


def to_dict(config: Section) -> dict[str, Any]:
    """Return a config or a section of one as plain dictionaries and lists; undoes `from_dict`."""
    return config.model_dump(warnings=False)  # a value of a wrong type is for `check` to refuse


def from_dict(cls: type[S], mapping: Any, where: str = "") -> S:
    """Build the section `cls` from a mapping as a YAML or JSON file gives it.

    Keys left out take their defaults; a section that is null takes all of them. `where` is put
    before every key in messages, such as "model". Raises one InputError that lists every mistake:
    unknown keys with the nearest known one, values of the wrong type and values out of range.
    """
    return _build(cls, mapping, where, [])


def check(config: S) -> S:
    """Return a copy of a config, or of a section of one, that keeps to every type and limit.

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
        mapping = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8; name a YAML file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a YAML file") from None
    if mapping is None:  # an empty file
        mapping = {}
    mistakes = [found for override in overrides if (found := _override(mapping, override))]
    return _build(Config, mapping, "", mistakes, f"{path}: ")


def _build(cls: type[S], mapping: Any, where: str, mistakes: list[str], prefix: str = "") -> S:
    """Validate a mapping; raise InputError for its mistakes and for those found before."""
    try:
        config = cls.model_validate(mapping)
    except ValidationError as error:
        mistakes = [*mistakes, *_mistakes(cls, error, where)]
    if len(mistakes) == 1:
        raise InputError(prefix + mistakes[0])
    if mistakes:
        raise InputError("\n  ".join([f"{prefix}{len(mistakes)} mistakes", *mistakes]))
    return config


def _override(mapping: Any, override: str) -> str | None:
    """Put an override into the mapping, or return what is wrong with it."""
    full, equals, text = override.partition("=")
    *sections, last = full.split(".")
    if not equals or not all(full.split(".")):
        return f"override {override!r} must read section.key=value"
    try:
        value = parse_yaml(text, f"override {override!r}")
    except InputError as error:
        return str(error)
    known = _fields(Config)
    for where in itertools.accumulate(sections, "{}.{}".format):
        if where in known and not _section(known[where]):
            return f"{full} is not a key; {where} is a value, not a section"
    for section in sections:
        if isinstance(mapping, dict):
            if mapping.get(section) is None:
                mapping[section] = {}
            mapping = mapping[section]
    if isinstance(mapping, dict):  # else the file has a value there, which validation reports
        mapping[last] = value
    return None


# ---- messages -----------------------------------------------------------------------------------

# What a value must be, by the type of pydantic's error.
WRONG_TYPE = {
    "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
    "string_type": "text", "list_type": "a list", "dict_type": "a section",
    "model_type": "a section of keys", "literal_error": "one of {expected}",
}  # fmt: skip
OUT_OF_RANGE = {
    "greater_than": "above {gt}", "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}", "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}", "finite_number": "a finite number",
    "too_short": "at least {min_length} long", "too_long": "at most {max_length} long",
}  # fmt: skip


def _kinds(field: FieldInfo) -> list[Any]:
    """The types that a field may have, NoneType apart."""
    union = get_origin(field.annotation) in (Union, types.UnionType)
    kinds = get_args(field.annotation) if union else [field.annotation]
    return [kind for kind in kinds if kind is not type(None)]


def _section(field: FieldInfo) -> type[Section] | None:
    """The class of a field that is a section, or a section or null."""
    kind, *others = _kinds(field)
    return kind if isinstance(kind, _Unvalidated) and not others else None


def _fields(cls: type[Section], where: str = "") -> dict[str, FieldInfo]:
    """{key in full: field} of a section and of those below it."""
    fields = {}
    for name, field in cls.model_fields.items():
        fields[_join(where, name)] = field
        if section := _section(field):
            fields |= _fields(section, _join(where, name))
    return fields


def _join(where: str, *names: str | int) -> str:
    """The full name of a key, such as model.encoder.depths[2]."""
    parts = (f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
    return (where + "".join(parts)).removeprefix(".")


def _mistakes(cls: type[Section], error: ValidationError, where: str) -> Iterator[str]:
    """Say in one sentence each what pydantic found wrong."""
    known = _fields(cls, where)
    values: dict[str, list[tuple[str, dict]]] = {}  # key: [(that or an item in it, error), ...]
    for e in error.errors(include_url=False):
        path = [name for name in e["loc"] if name != "[key]"]
        if e["type"] in ("extra_forbidden", "invalid_key"):
            yield _unknown(str(path.pop()), _join(where, *path), list(known))
            continue
        if e["type"] == "value_error" and (blamed := e["ctx"]["error"].args[1:]):  # see `must`
            path[-1], e["input"] = blamed
        above = [_join(where, *path[:n]) for n in range(len(path) + 1)]
        depth = max((n for n, full in enumerate(above) if full in known), default=0)
        if depth and len(_kinds(known[above[depth]])) > 1:
            del path[depth]  # pydantic's name of the type that it tried
        values.setdefault(above[depth], []).append((_join(where, *path), e))
    for full, errors in values.items():
        # If one of the types that a value may have is the right one, only its errors count.
        inside = [[one] for one in errors if one[0] != full or one[1]["type"] not in WRONG_TYPE]
        nullable = full in known and type(None) in get_args(known[full].annotation)
        for group in inside or [errors]:
            item, e = group[0]
            texts = [_must_be(e) for _, e in group] + ["null"] * (nullable and not inside)
            text = " or ".join(texts)
            yield f"{item or 'the config'} must be {text}, not {_show(e['input'])}{_hint(e)}"


def _must_be(e: dict[str, Any]) -> str:
    """What a value must be by one of pydantic's errors."""
    limits = {k: f"{v:.15g}" if isinstance(v, float) else v for k, v in e.get("ctx", {}).items()}
    if e["type"] == "literal_error":  # 'a', 'b' or 'c'
        limits["expected"] = limits["expected"].replace("'", "").replace(" or ", ", ")
    if e["type"] == "float_type" and type(e["input"]) is int:  # larger than any float
        return OUT_OF_RANGE["finite_number"]
    if e["type"] == "value_error":  # see `must`
        return str(e["ctx"]["error"].args[0])
    text = (WRONG_TYPE | OUT_OF_RANGE).get(e["type"])
    return text.format(**limits) if text else e["msg"].removeprefix("Input should be ")


def _hint(e: dict[str, Any]) -> str:
    """A guess at what was meant by a value of the wrong type."""
    value = e["input"]
    if e["type"] == "string_type" and isinstance(value, (int, float)):
        return "; put it in quotes"
    if e["type"] == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if e["type"] == "literal_error":
        choices = re.findall("'(.*?)'", e["ctx"]["expected"])
        close = difflib.get_close_matches(str(value), choices, 1)
        return f"; did you mean {close[0]}?" if close else ""
    return ""


def _unknown(name: str, where: str, known: list[str]) -> str:
    """Say which key was meant: one of this section, one of that name elsewhere, or any."""
    own = [full.rpartition(".")[2] for full in known if full.rpartition(".")[0] == where]
    elsewhere = {full.rpartition(".")[2]: full for full in reversed(known)}
    if match := difflib.get_close_matches(name, own, 1):
        meant = f"did you mean {_join(where, match[0])}?"
    elif match := difflib.get_close_matches(name.rpartition(".")[2], elsewhere, 1, 0.75):
        meant = f"did you mean {elsewhere[match[0]]}?"
    else:
        meant = f"{where or 'the top level'} knows {', '.join(own)}"
    return f"{_join(where, name)} is not a key; {meant}"


def _show(value: Any) -> str:
    """A value of a file as messages call it."""
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
