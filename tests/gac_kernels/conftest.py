"""Where the Triton suite runs: on a GPU, or in a process of its own under Triton's interpreter.

``test_triton.py`` needs one or the other for the whole process, so without a GPU a plain run leaves it out and
``test_interpreter.py`` starts it in a subprocess with TRITON_INTERPRET=1.
"""

import os

import torch

collect_ignore = []
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore.append("test_triton.py")
