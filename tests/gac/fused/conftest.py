"""Where the program that ends steps on a GPU is tested: there, or in a process of its own in Triton's interpreter."""

import os

import torch

collect_ignore = []
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore += ["test_device.py"]  # test_interpreter.py runs it
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import quicken

    quicken()
