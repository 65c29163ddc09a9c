"""Shared by all tests: the top-level modules on the path, and the folder of reference data."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # faster for tiny networks than two that wait for each other


@pytest.fixture(scope="session")
def shared():
    """Annotations, photographs and reference values that may not be redistributed; see README, "Tests"."""
    folder = Path(os.environ.get("CAPELLM_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder} is absent (set CAPELLM_SHARED)")
    return folder.resolve()
