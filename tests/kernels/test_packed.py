"""The packed kernels of `direct` on Triton's interpreter, and on CUDA where it is."""

import pytest
import torch

from tests.kernels.test_kernels import load, printed

pytest.importorskip("triton", reason="triton is not installed: there are no kernels")


def test_interpreted():
    cases = load("packed_cases")
    found = printed("packed_cases.py")
    assert found.keys() == cases.CASES.keys()
    assert {n: cases.failures(e) for n, e in found.items() if cases.failures(e)} == {}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    cases = load("packed_cases")
    for name in cases.CASES:
        assert cases.failures(cases.run_case(name, "cuda")) == [], name
