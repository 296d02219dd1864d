import pytest

from hafrm_ds.processes.ranks import choose_allocators
from tests.gpu.environment import IS_ALLOWED_ON_CPU, IS_GPU


def pytest_runtest_setup(item: pytest.Item) -> None:
    choose_allocators()
    if not IS_GPU and not IS_ALLOWED_ON_CPU:
        pytest.skip("needs an NVIDIA GPU")
