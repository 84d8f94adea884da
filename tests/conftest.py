# SPDX-License-Identifier: Apache-2.0
"""Devices and seeds. GPU tests carry the `gpu` marker and are skipped, with the reason, without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every test that takes it runs on the CPU and, where there is one, on a GPU."""
    return request.param


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
