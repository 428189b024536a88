"""Where the Triton suite runs, on a GPU or in a process of its own under Triton's interpreter; and on how many threads.

``test_triton*.py`` need one or the other for the whole process, so without a GPU a plain run leaves them out and
``test_interpreter.py`` starts them in a subprocess with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

collect_ignore = []
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore += ["test_triton.py", "test_triton_kronecker.py"]
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import quicken

    quicken()


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Tests that need more threads ask for them. Thousands of small parallel calls crawl when the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
