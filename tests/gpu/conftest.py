"""The device of the GPU tests. Those with a `device` run on the CPU too, which tests the tests."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and where there is one, a GPU."""
    return torch.device(request.param)
