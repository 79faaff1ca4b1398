"""The device of the GPU tests. Those with a `device` run on the CPU too, which tests the tests.

What is slow on a CPU is marked so, and runs on a GPU all the same: `-m gpu` selects it.
"""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and where there is one, a GPU."""
    return torch.device(request.param)
