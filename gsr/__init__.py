"""GaussianSR: images upscaled to any size by 2D Gaussian splatting.

    import gsr
    large = gsr.upscale(image, scale=3.7)     # a Pillow image, NumPy array or tensor

`upscale` works with the bundled model, `load` reads another, `GaussianSR` is the module itself.
Bad input raises `InputError`, a ValueError. Importing this package imports nothing heavy: torch
comes with the first use of a name below.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["GaussianSR", "InputError", "__version__", "load", "upscale"]

_HOMES = {
    "GaussianSR": "gsr.models",
    "InputError": "gsr.errors",
    "load": "gsr.models.checkpoint",
    "upscale": "gsr.inference.upscale",
}

if TYPE_CHECKING:
    from gsr.errors import InputError as InputError
    from gsr.inference.upscale import upscale as upscale
    from gsr.models import GaussianSR as GaussianSR
    from gsr.models.checkpoint import load as load


def __getattr__(name: str):
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
