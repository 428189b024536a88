"""Checks of the Kronecker sketch that every backend has to pass, against sums of outer products in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from gac_kernels.kronecker import sign_keys
from gac_kernels.layout import _finalize32
from tests.gac_kernels.cases import DTYPES, UNIT_ROUNDOFF, values

BOUNDS = {
    "one": (0, 1),
    "padded": (0, 64, 128, 192),
    "blocks": (0, 63, 128, 193, 256),
    "empty": (0, 0, 5, 5, 5, 150, 150),
    "tail left out": (0, 33, 100),
    "head left out": (7, 40, 47),
}
SIDES = [(100, 32, 70, 32), (9, 9, 200, 16), (64, 64, 65, 64), (1, 1, 130, 8), (130, 17, 12, 12), (300, 64, 257, 33)]
"""``p, P, q, Q``."""


def sign_matrix(size: int, columns: int, key: int, multiplier: int) -> Tensor:
    """``[size, columns]`` float64: a side's map, element by element; the identity where nothing is saved."""
    if size == columns:
        return torch.eye(size, dtype=torch.float64)
    words = -(-columns // 32)
    rows = [[_hash(i * words + c // 32, key, multiplier) >> c % 32 & 1 for c in range(columns)] for i in range(size)]
    return (1.0 - 2.0 * torch.tensor(rows, dtype=torch.float64)) / math.sqrt(columns)


def _hash(word: int, key: int, multiplier: int) -> int:
    return _finalize32(((word ^ key) * multiplier) & 0xFFFFFFFF)


def truth(left: Tensor, right: Tensor, shape, *, bounds, seed: int, size=None, ones=False) -> tuple[Tensor, Tensor]:
    """The sketches in float64, and for each number the sum of magnitudes that rounding errors are relative to."""
    keys, (tall, wide) = sign_keys(seed), shape
    if left.dtype == torch.int64:
        height = size
        dense = torch.zeros(len(left), size, dtype=torch.float64)
        there = left.cpu() >= 0
        dense[there] = torch.nn.functional.one_hot(left.cpu()[there], size).double()
        left = dense
    else:
        height, left = left.shape[1], left.cpu().double()
    right = right.cpu().double()
    if ones:
        right = torch.cat([right, torch.ones(len(right), 1, dtype=torch.float64)], dim=1)
    a = sign_matrix(height, tall, *keys[:2])
    b = sign_matrix(right.shape[1], wide, *keys[2:])
    found, mass = [], []
    for begin, end in itertools.pairwise(bounds):
        found.append(a.T @ left[begin:end].T @ right[begin:end] @ b)
        mass.append(a.abs().T @ left[begin:end].abs().T @ right[begin:end].abs() @ b.abs())
    return torch.stack(found), torch.stack(mass)


def error_bound(mass: Tensor, *, depth: int, dtype: torch.dtype, scale: float, before: Tensor) -> Tensor:
    """Of a chain of ``depth`` float32 roundings relative to ``mass``, TF32's three products, and the last addition."""
    unit = UNIT_ROUNDOFF[torch.float32] if dtype != torch.float64 else UNIT_ROUNDOFF[torch.float64]
    split = 0.0 if dtype == torch.float64 else 2.0**-20
    last = UNIT_ROUNDOFF[torch.float32] * (before.abs() + abs(scale) * mass)
    return 2.0 * (depth * unit + split) * abs(scale) * mass + 2.0 * last


def check(backend, left: Tensor, right: Tensor, shape, *, bounds, seed=7, scale=0.5, size=None, ones=False) -> Tensor:
    """One call against :func:`truth`; what was in ``out`` stays, and so does what lies between its rows."""
    device, rows = right.device, len(bounds) - 1
    room = values(rows, shape[0] * shape[1] + 3, seed=91).to(device)
    before = room.clone()
    out = room[:, : shape[0] * shape[1]].view(rows, *shape)
    keys = torch.tensor(sign_keys(seed), device=device)
    longest = max(end - begin for begin, end in itertools.pairwise(bounds))
    offsets = torch.tensor(bounds, device=device)
    options = {"bounds": offsets, "keys": keys, "size": size, "longest": longest, "ones": ones, "scale": scale}
    assert backend.kronecker_sketch(left, right, out, **options) is out
    want, mass = truth(left, right, shape, bounds=bounds, seed=seed, size=size, ones=ones)
    old = before[:, : shape[0] * shape[1]].view(rows, *shape).cpu().double()
    height = size if size is not None else left.shape[1]
    bound = error_bound(mass, depth=height + right.shape[1] + longest + 8, dtype=right.dtype, scale=scale, before=old)
    assert ((out.cpu().double() - old - scale * want).abs() <= bound).all()
    assert torch.equal(room[:, shape[0] * shape[1] :], before[:, shape[0] * shape[1] :])
    return out


def check_shapes(backend, device: str) -> None:
    """Every layout of sequences, side and dtype; with and without a column of ones."""
    for number, (p, tall, q, wide) in enumerate(SIDES):
        for name, bounds in BOUNDS.items():
            tokens = bounds[-1] + (3 if "left out" in name else 0)
            dtype = DTYPES[(number + len(name)) % 4]
            left = values(tokens, p, dtype=dtype, device=device, seed=number)
            right = values(tokens, q, dtype=dtype, device=device, seed=number + 50)
            check(backend, left, right, (tall, wide), bounds=bounds)
            check(backend, left, right, (tall, min(wide, q)), bounds=bounds, ones=True, seed=2**63 + 11)


def check_dtypes(backend, device: str) -> None:
    """Both sides in any dtype, alike or not."""
    bounds = (0, 70, 100)
    for a in DTYPES:
        for b in DTYPES:
            left, right = values(100, 96, dtype=a, device=device), values(100, 40, dtype=b, device=device, seed=1)
            wide = right if torch.float64 not in (a, b) else right.double()
            check(backend, left, wide if a == torch.float64 else right, (16, 32), bounds=bounds)


def check_places(backend, device: str) -> None:
    """A left of places: hashed, whole, and with places that count for nothing."""
    for size, tall in ((1000, 32), (7, 7), (100, 64), (2**31 + 5, 32)):
        tokens = 150
        left = torch.arange(tokens, device=device) * 37 % min(size, 10_000)
        left[::5] = -1
        right = values(tokens, 90, device=device, dtype=torch.bfloat16)
        if size < 10_000:
            check(backend, left, right, (tall, 32), bounds=(0, 80, 80, 150), size=size)
            continue
        out = torch.zeros(1, tall, 32, device=device)  # far rows: against the same rows given as they are
        far = left.clone()
        far[left >= 0] += size - 10_000
        keys = torch.tensor(sign_keys(3), device=device)
        backend.kronecker_sketch(far, right, out, bounds=torch.tensor([0, tokens], device=device), keys=keys, size=size)
        key, multiplier, *rest = sign_keys(3)
        rows = [[_hash(i, key, multiplier) >> c & 1 for c in range(tall)] for i in far.tolist()]
        a = torch.where((far >= 0).cpu()[:, None], 1.0 - 2.0 * torch.tensor(rows, dtype=torch.float64), 0.0)
        b = right.cpu().double() @ sign_matrix(90, 32, *rest)
        want = a.T @ b / math.sqrt(tall)
        mass = a.abs().T @ right.cpu().double().abs().sum(1, keepdim=True).expand(-1, 32) / tall
        assert ((out[0].cpu() - want).abs() <= 2 * (300 * 2.0**-24 + 2.0**-20) * mass).all()


def check_strides(backend, device: str) -> None:
    """Views that a kernel can read as they are, and those that it has to copy."""
    block = values(60, 3, 120, device=device)
    wide = values(60, 240, device=device, dtype=torch.bfloat16)
    for left, right in (
        (block[:, 1], wide[:, ::2]),
        (block[:, 0, 5:70], wide[:, 7:100]),
        (values(50, 60, device=device).t(), wide.flip(0)),
        (values(1, 40, device=device).expand(60, 40), values(60, 1, device=device).expand(60, 70)),
    ):
        check(backend, left, right, (16, 16), bounds=(0, 20, 60))


def check_poison(backend, device: str) -> None:
    """NaN outside of every sequence is not read; inside one it reaches that sequence alone."""
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (values(200, 80, dtype=dtype, device=device, seed=s) for s in (1, 2))
        left[:3] = right[:3] = left[150:] = right[150:] = math.nan
        out = check(backend, left, right, (32, 32), bounds=(3, 70, 90, 150))
        assert out.isfinite().all()
        for side, place in ((left, (71, 5)), (right, (89, 79))):
            for poison in (math.nan, math.inf):
                kept = side[place].clone()
                side[place] = poison
                out = torch.zeros(3, 32, 32, device=device)
                bounds = torch.tensor([3, 70, 90, 150], device=device)
                backend.kronecker_sketch(
                    left, right, out, bounds=bounds, keys=torch.tensor(sign_keys(1), device=device)
                )
                assert out[[0, 2]].isfinite().all()
                assert not out[1].isfinite().any(dim=0 if side is left else 1).any()
                side[place] = kept


def check_same_bits(backend, device: str) -> None:
    """Twice the same call, twice the same bits."""
    left, right = values(500, 90, device=device), values(500, 70, device=device, seed=1)
    keys, bounds = torch.tensor(sign_keys(1), device=device), torch.tensor([0, 100, 500], device=device)
    found = []
    for _ in range(2):
        out = torch.zeros(2, 32, 32, device=device)
        found.append(backend.kronecker_sketch(left, right, out, bounds=bounds, keys=keys))
    assert torch.equal(*found)


def check_wrong(backend, device: str) -> None:
    """What is wrong is named, and nothing is written."""
    out = torch.zeros(2, 8, 8, device=device)
    right = {
        "left": values(10, 20, device=device),
        "right": values(10, 30, device=device),
        "out": out,
        "bounds": torch.tensor([0, 4, 10], device=device),
        "keys": torch.tensor(sign_keys(0), device=device),
    }
    for error, match, change in (
        (TypeError, "left must be a tensor", {"left": [1.0]}),
        (ValueError, "right is on meta", {"right": values(10, 30).to("meta")}),
        (ValueError, r"right must be floating point with shape \[N, q\]", {"right": values(10)}),
        (ValueError, r"left must be floating point with shape \[10, p\]", {"left": values(9, 20, device=device)}),
        (ValueError, "size is missing", {"left": torch.zeros(10, dtype=torch.int64, device=device)}),
        (ValueError, "size=5 belongs", {"size": 5}),
        (ValueError, r"out must be float32", {"out": out.double()}),
        (ValueError, r"out must be contiguous within", {"out": out.transpose(1, 2)[:, :, :4]}),
        (ValueError, r"overlap in memory", {"out": out[:1].expand(2, 8, 8)}),
        (ValueError, r"out has P = 21", {"out": torch.zeros(2, 21, 8, device=device)}),
        (ValueError, r"out has Q = 31", {"out": torch.zeros(2, 8, 31, device=device)}),
        (ValueError, r"bounds must be contiguous int64 with shape \(3,\)", {"bounds": torch.zeros(2).long()}),
        (ValueError, r"keys must be contiguous int64 with shape \(4,\)", {"keys": torch.zeros(4, device=device)}),
    ):
        arguments = right | {k: v.to(device) if k == "bounds" else v for k, v in change.items()}
        with pytest.raises(error, match=match):
            backend.kronecker_sketch(arguments.pop("left"), arguments.pop("right"), arguments.pop("out"), **arguments)
    assert not out.any()


CHECKS = (
    check_shapes,
    check_dtypes,
    check_places,
    check_strides,
    check_poison,
    check_same_bits,
    check_wrong,
)
