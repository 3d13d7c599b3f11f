"""Encoders and heads by name: built-in ones, and those of one's own by import path.

An encoder is a module that turns LR [B, 3, h, w] in [0, 1] into features [B, n_feats, h, w]:

    class Plain(nn.Module):
        def __init__(self, n_feats, depth=2):  # the keys of model.encoder
            super().__init__()
            sides = [3] + depth * [n_feats]
            self.body = nn.Sequential(*(nn.Conv2d(*c, 3, padding=1) for c in pairwise(sides)))
            self.halo = depth  # LR pixels around a pixel on which its features depend

        def forward(self, lr):
            return self.body(lr)

Large images are encoded by bands of rows and tiles of columns with the halo around each;
`halo = None` says that features depend on the whole image, which is then encoded at once. A deep
encoder should have `stream` (see `gsr.models.stream` and `gsr.models.encoders.rdn`), which computes
no row twice, and `floats`: how many numbers it holds for each pixel of a band and for each column
of the image. With a stream, windows may be counted from the image's corner: `alignment` is their
side. A head of one's own is best a `gsr.models.query_head.QueryHead`.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from typing import Any

import torch
from torch import nn

from gsr import parts
from gsr.config import CustomEncoder, EncoderConfig, ModelConfig, is_import_path
from gsr.errors import InputError

ENCODERS = {
    "edsr": "gsr.models.encoders.edsr.EDSR",
    "span": "gsr.models.encoders.span.SPAN",
    "rdn": "gsr.models.encoders.rdn.RDN",
    "swinir": "gsr.models.encoders.swinir.SwinIR",
}
HEADS = {
    "direct": "gsr.models.heads.direct.DirectHead",
    "field": "gsr.models.heads.field.FieldHead",
    "official": "gsr.models.heads.official.OfficialHead",
    "bicubic": "gsr.models.heads.bicubic.BicubicHead",
    "liif": "gsr.models.heads.liif.LIIFHead",
    "lte": "gsr.models.heads.lte.LTEHead",
}
WHOLE = 2**31  # a halo beyond the border of every image
MARGIN, WIDTH, CUT = 7, 16, 9  # of the image on which a halo is tried, and what is cut off
_tried: set[tuple[type, str]] = set()


def make_encoder(config: EncoderConfig | CustomEncoder) -> nn.Module:
    """The encoder that `config.name` names.

    Raises:
        InputError: a name, key or attribute that an encoder of one's own has not, or a false halo.
    """
    if not isinstance(config, CustomEncoder):
        return parts.find(config.name, ENCODERS, "model.encoder.name")(config)
    keys = {**config.keys, "n_feats": config.n_feats}
    encoder: Any = _make_own(config.name, "model.encoder", ("halo",), keys)
    if encoder.halo is None:
        encoder.halo = WHOLE
        if not hasattr(encoder, "floats"):
            encoder.floats = 20 * config.n_feats, 0
    if type(encoder.halo) is not int or encoder.halo < 0:
        raise InputError(
            f"model.encoder: {config.name} has halo {encoder.halo!r}, which must be a whole number "
            "from 0, or None if features depend on the whole image"
        )
    tried = type(encoder), json.dumps(keys, default=str)
    if encoder.halo != WHOLE and tried not in _tried:
        check_halo(encoder, config.name, config.n_feats)
        _tried.add(tried)
    return encoder


def make_head(config: ModelConfig) -> nn.Module:
    """The head that `config.mode` names; InputError as `make_encoder`."""
    if not is_import_path(config.mode):
        return parts.find(config.mode, HEADS, "model.mode")(config)
    needed = "halo", "encode", "render", "query", "rows_needed"
    keys = {**config.head, "n_feats": config.encoder.n_feats}
    return _make_own(config.mode, "model.head", needed, keys)


def _make_own(name: str, key: str, needed: tuple[str, ...], keys: dict) -> nn.Module:
    """A module of the user's own, which is what it has to be."""
    part = parts.find(name, {}, key)
    if not (isinstance(part, type) and issubclass(part, nn.Module)):
        raise InputError(f"{key}: {name} is no class of torch.nn.Module")
    module = parts.make(part, (), keys, f"{key}: {name}")
    if missing := [attribute for attribute in needed if not hasattr(module, attribute)]:
        raise InputError(f"{key}: {name} lacks {', '.join(missing)}")
    return module


def own_parts(config: ModelConfig) -> list[str]:
    """The import paths of a model's encoder and head, of those that are not gsr's."""
    return [name for name in (config.encoder.name, config.mode) if is_import_path(name)]


def check_imported(config: ModelConfig) -> None:
    """Raise InputError if a config names a module that has not been imported by now.

    For configs from model folders, which may be anybody's: what they name is never imported, and
    must be a class of torch.nn.Module.
    """
    for name in own_parts(config):
        module = name.rpartition(".")[0]
        if module not in sys.modules:
            raise InputError(
                f"this model is made with {name}, code that is not part of gsr: if you trust it, "
                f"import {module} before (on a command line: --import {module})"
            )


@torch.no_grad()
def check_halo(encoder: Any, name: str, n_feats: int) -> None:
    """Raise InputError if features further than `halo` from where an image is cut change.

    Bands of rows and tiles of columns are cut so. Tried on a narrow image and on a low one, from an
    odd row or column on: what depends on even places shows too. In float64, where what is left of
    a change after some tens of convolutions can still be seen.
    """
    alignment = getattr(encoder, "alignment", 1) if hasattr(encoder, "stream") else 1
    cut_off = math.ceil(CUT / alignment) * alignment
    length, generator = encoder.halo + MARGIN + cut_off, torch.Generator().manual_seed(0)
    rest = length - cut_off
    twin = copy.deepcopy(encoder).cpu().eval()
    for axis, unit in ((-2, "rows"), (-1, "columns")):
        image = torch.rand(1, 3, length, WIDTH, generator=generator, device="cpu")
        image = image if axis == -2 else image.mT
        cuts = image, image.narrow(axis, cut_off, rest), image.narrow(axis, 0, rest)
        least = 1e-12
        try:
            whole, lower, upper = (twin.double()(x.double()) for x in cuts)
        except RuntimeError:  # it computes in float32 whatever it is given
            whole, lower, upper = (twin.float()(x) for x in cuts)
            least = 1e-5
        if whole.shape != (1, n_feats, *image.shape[2:]):
            raise InputError(
                f"model.encoder: {name} turns an image {list(image.shape)} into features "
                f"{list(whole.shape)}, which must be {[1, n_feats, *image.shape[2:]]}"
            )
        pairs = (
            (lower, whole.narrow(axis, cut_off, rest)),
            (upper.flip(axis), whole.narrow(axis, 0, rest).flip(axis)),
        )
        for cut, same in pairs:  # the cut is above the first row, or left of the first column
            change = (cut - same).abs().transpose(axis, 0).flatten(1).amax(1)
            far = max((change > least * whole.abs().max()).nonzero().flatten().tolist(), default=-1)
            if far >= encoder.halo:
                raise InputError(
                    f"model.encoder: {name} has halo {encoder.halo}, but its features depend on "
                    f"pixels {far + 1} {unit} away: set the right halo, or None if they depend on "
                    "the whole image, or on the place in it"
                )
