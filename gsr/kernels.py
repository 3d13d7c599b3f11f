"""Makes the folder `kernels` of the repository importable as `gsr.kernels`.

A top-level import called `kernels` belongs to another distribution, so the folder is no package of
its own. Here a module takes the place of the package and says where its submodules are: beside
this file in a wheel, one level up in a checkout. Only `gsr.ops` imports from here, when it runs.
"""

import os
from pathlib import Path

# Triton 3.10 fuses multiplications with additions no more, unless this says so when it compiles.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

_here = Path(__file__).resolve().parent
_installed = _here / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _here.parent / "kernels")]
