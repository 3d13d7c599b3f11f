"""The small cases of bench/splat.py for pytest-benchmark: pytest bench --benchmark-only"""

import pytest
import torch

from bench.splat import CASES, DIRECTIONS, inputs, providers, step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = [case for case in CASES.values() if case.small]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("provider", providers(SMALL[0], DEVICE, float("inf")))
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_splat(benchmark, case, provider, direction):
    benchmark.group = f"{case.name}, {direction}"
    arguments = inputs(case, DEVICE, grad=direction != "forward")
    function = providers(case, DEVICE, float("inf"))[provider]
    assert callable(function), function
    run = step(function, arguments, direction)
    run()  # compile

    def synchronised():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronised)
