"""Tests of Triton kernels run where Triton does; elsewhere test_triton.py starts a process for them."""

from collections.abc import Iterator

import pytest
import torch
from kernel_comparison import DEVICE, DTYPES

from server.acceleration.kernels import common


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if common.runs_triton(torch.empty(0, device=DEVICE)):
        return
    deselected = [each for each in items if each.get_closest_marker("triton")]
    items[:] = [each for each in items if not each.get_closest_marker("triton")]
    config.hook.pytest_deselected(items=deselected)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
