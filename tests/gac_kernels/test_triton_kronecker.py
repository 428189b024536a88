"""The Kronecker sketch in Triton, on a GPU or in Triton's interpreter (``conftest.py``)."""

import pytest
import torch

from gac_kernels import triton as backend
from tests.gac_kernels import kronecker_cases as cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("check", cases.CHECKS, ids=lambda check: check.__name__)
def test_triton(check):
    check(backend, DEVICE)
