"""Models on disk: a folder of config.json, model.safetensors and README.md that rebuilds itself.

Published checkpoints, which are single .pth files, are read too, by `gsr.models.published`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsr.config import ModelConfig, Section, from_dict, to_dict
from gsr.errors import InputError
from gsr.io.paths import check_path, make_folder

if TYPE_CHECKING:
    from gsr.models import GaussianSR

FORMAT = 4  # of config.json; raised when older code could not read it any more
_WEIGHTS = Path(__file__).parents[1] / "weights"
# The models that ship: for lossless images, and for lossy or noisy ones.
BUNDLED = {"lite": _WEIGHTS / "gsr-lite", "photo": _WEIGHTS / "gsr-photo"}
_FILES = ("model.safetensors", "README.md", "config.json")  # the config last: it makes the folder


class _File(Section):
    """What config.json holds."""

    format: int = FORMAT
    model: ModelConfig = ModelConfig()
    bf16_loss: float | None = None  # dB of PSNR that bf16 was measured to cost


def load(path: str | os.PathLike | None = None) -> GaussianSR:
    """Load a model by name or path, on the CPU, in evaluation mode.

    Args:
        path: "lite" or None, the bundled model for lossless images; "photo", that for JPEG and
            other lossy files, noise and blur; or a path, see `load_model` ("./lite" is a folder of
            that name).

    A folder whose config names code from outside gsr (docs/extend.md) loads only if you have
    imported the module before: loading never imports what a file names.

    Raises:
        InputError: as `load_model`, or this installation lacks the bundled model.
    """
    path = "lite" if path is None else path
    if not isinstance(path, str) or path not in BUNDLED:
        return load_model(path)
    folder = BUNDLED[path]
    if not (folder / "config.json").is_file():
        raise InputError(
            f"this installation of gsr has no bundled model {path} ({folder.name}); "
            "name a model folder, or reinstall the package"
        )
    return load_model(folder)


def load_model(path: str | os.PathLike) -> GaussianSR:
    """A GaussianSR from a folder that `save_model` wrote, or from a published .pth file.

    On the CPU, in float32 and in evaluation mode. Nothing in the folder is ever executed, and
    no module imported that its config names. Raises InputError if something is missing, damaged, of
    an unknown format, made with code that is not imported, or if the tensors are not exactly those
    that the config calls for.
    """
    path = check_path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such model; name a model folder or a .pth file")
    if path.is_file():
        if path.suffix.lower() not in (".pth", ".pt"):
            raise InputError(
                f"{path} is no model; name the folder that holds config.json and "
                "model.safetensors, or a published .pth file"
            )
        from gsr.models.published import load_published

        return load_published(path)
    from gsr.models.registry import check_imported

    content = _read_config(path / "config.json")
    try:
        check_imported(content.model)
    except InputError as error:
        raise InputError(f"{path / 'config.json'}: {error}") from None
    tensors = _read_tensors(path / "model.safetensors")
    refusal = f"{path / 'model.safetensors'} does not fit its config.json"
    model = assemble(content.model, tensors, refusal)
    model.bf16_loss = content.bf16_loss
    return model


def assemble(
    config: ModelConfig,
    tensors: dict[str, Any],
    refusal: str,
    *,
    named: Callable[[str], str] = str,
) -> GaussianSR:
    """A model of these weights, which become float32, in evaluation mode.

    Raises InputError unless every tensor that the config calls for is there, dense, finite and of
    the right shape, and no other. The message starts with `refusal`; `named` says what a tensor is
    called in the file.
    """
    import torch

    from gsr.models import GaussianSR
    from gsr.models.registry import own_parts

    # Names and shapes only: nothing is allocated or drawn. What is not of gsr might hold more than
    # its weights, which would have no values there.
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if own_parts(config) else "meta"):
        model = GaussianSR(config)
    want = model.state_dict()
    faults = [f"{named(name)} is unknown" for name in tensors if name not in want]
    faults += [f"{named(name)} is missing" for name in want if name not in tensors]
    for name in (name for name in want if name in tensors):
        tensor, shape = tensors[name], want[name].shape
        if tensor.shape != shape:
            faults.append(f"{named(name)} is {list(tensor.shape)} instead of {list(shape)}")
        elif tensor.layout != torch.strided or _kind(tensor) != _kind(want[name]):
            kind = _kind(want[name])
            faults.append(f"{named(name)} is not a dense tensor of {kind}")
        elif not tensor.float().isfinite().all():  # some small types have no test of their own
            faults.append(f"{named(name)} holds infinite or undefined numbers")
    if faults:
        more = f", and {len(faults) - 3} more such faults" if len(faults) > 3 else ""
        raise InputError(
            f"{refusal}: {'; '.join(faults[:3])}{more}: give the unchanged files of one model"
        )
    # Parts from outside gsr may hold whole numbers, such as BatchNorm's count.
    weights = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _kind(tensor: Any) -> str:
    return "floating-point numbers" if tensor.is_floating_point() else f"{tensor.dtype}"


def save_model(folder: str | os.PathLike, model: GaussianSR, readme: str | None = None) -> None:
    """Write a model to a folder (made if need be): config.json, model.safetensors, README.md.

    A file is replaced only once its successor is complete. `readme` is the model card, in
    Markdown; without one an existing card is kept, or a card with the bare facts is written.
    Raises InputError if the folder cannot be made or written to.
    """
    import torch
    from safetensors.torch import save

    from gsr.io.image import write_atomic

    folder = make_folder(folder)
    # Copies: weights may be channels_last or the same under two names, which a safetensors file
    # cannot say.
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in model.state_dict().items()
    }
    content = {
        "format": FORMAT, "bf16_loss": model.bf16_loss, "model": to_dict(model.config)
    }  # fmt: skip
    config = json.dumps(content, indent=2) + "\n"
    contents = {
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
        "config.json": config.encode(),
    }
    if readme is not None:
        contents["README.md"] = readme.encode()
    elif not (folder / "README.md").exists():
        contents["README.md"] = _card(model).encode()
    for name in _FILES:
        if name in contents:
            write_atomic(folder / name, contents[name])


def _card(model: GaussianSR) -> str:
    count = sum(p.numel() for p in model.parameters())
    return (
        f"# GaussianSR, mode {model.config.mode}\n\n"
        f"{count:,} parameters. Load it with `gsr.load(folder)`, use it with `gsr.upscale` or "
        "`gsr upscale --model FOLDER`.\n\n"
        "Licence, training data, protocol and metrics: not stated.\n"
    )


def _read_config(path: Path) -> _File:
    """What a model folder's config.json says; InputError if it is no description of a model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} is not a model folder: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold an object with the keys format and model")
    if content.get("format") not in range(1, FORMAT + 1):
        raise InputError(
            f"{path} has format {content.get('format')!r}, but this version of gsr reads formats "
            f"up to {FORMAT}; update gsr or save the model again"
        )
    if "model" not in content:
        raise InputError(f"{path} has no key model")
    try:
        file = from_dict(_File, content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    # What older files do not say was a constant when they were written.
    if content["format"] < 2:
        file.model.direct.reach = 0.75
    if content["format"] < 3:
        file.model.direct.activation = "relu"
    return file


def _read_tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    # Read first and parse then: a file that is mapped could change under our hands.
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent} is not a complete model: it has no {path.name}") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error})") from None
