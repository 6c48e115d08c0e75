import os
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings
from tiny import Tiny

torch.set_num_threads(1)
settings.register_profile("attnviz", deadline=None)  # the machine may have other work
settings.load_profile("attnviz")


@pytest.fixture
def tiny():
    return Tiny().double()


@pytest.fixture
def tiny_inplace():
    return Tiny(inplace=True)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def real_data():
    root = os.environ.get("ATTNVIZ_DATA")
    if not root or not (Path(root) / "weights").is_dir():
        pytest.skip("$ATTNVIZ_DATA with genuine weights and images is not set")
    return Path(root)


@pytest.fixture
def untyped():
    """Lets bad arguments reach the package's own checks, past the type checks of the test run."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
