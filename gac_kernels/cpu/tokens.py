"""Sums over tokens, for the coefficient estimator."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from gac_kernels.calls import TokenCall, takes, token_call
from gac_kernels.cpu.library import check, require
from gac_kernels.cpu.tables import DTYPE_CODES, readable, require_cpu

_TOKENS = struct.Struct("@qqPqqPqqPqqPqiiii")
_TOKENS_PER_TASK = 4096  # tokens that are worth a second thread


@takes(token_call)
def token_moments(call: TokenCall) -> Tensor:
    """Per-sequence sums of the coefficient estimator; see :func:`gac_kernels.token_moments`."""
    library, (logprobs, advantages, mask, is_expert) = require(), call
    require_cpu([logprobs], "logprobs, advantages, mask and is_expert")
    logprobs, advantages, is_expert = readable(logprobs), readable(advantages), is_expert.detach()
    if mask.is_complex():
        mask = mask != 0
    mask = mask.detach().resolve_neg()
    rows, length = logprobs.shape
    packed = _TOKENS.pack(
        rows,
        length,
        logprobs.data_ptr(),
        *logprobs.stride(),
        advantages.data_ptr(),
        *advantages.stride(),
        mask.data_ptr(),
        *mask.stride(),
        is_expert.data_ptr(),
        is_expert.stride(0),
        DTYPE_CODES[logprobs.dtype],
        DTYPE_CODES[advantages.dtype],
        mask.element_size(),
        mask.is_floating_point(),
    )
    out = torch.empty(rows, 7, dtype=torch.float64)
    threads = torch.get_num_threads() if rows * length > _TOKENS_PER_TASK else 1
    check(library.call.gac_token_moments(packed, out.data_ptr(), threads))
    return out
