"""Checks of tensors with one scale for each 32 elements, for every backend, against the definition in float64.

A scaled element is exact in float32 where it is in its range: 4 digits at most, times a power of two. Sums err by what
those of float32 tensors do: a sum of squares by ``sums`` of it, a bucket of ``n`` elements by ``n`` units of its sum of
magnitudes and a rounding, a total by one rounding.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from gac_kernels.elements import SCALE_DTYPES
from gac_kernels.layout import SketchLayout
from tests.gac_kernels.cases import SMALLEST, SketchCase, bucket_mass, values

U32 = 2.0**-24
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


def exponents(*shape: int, low: int, high: int, seed: int = 0) -> Tensor:
    """Scales from ``low`` to ``high``, as uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.uint8)


def by_definition(x: Tensor, scales: Tensor | None) -> Tensor:
    """The elements in float64, flat, one after the other."""
    wide = x.detach().double().reshape(-1).cpu()
    if scales is None:
        return wide
    codes = scales.contiguous().view(torch.uint8).reshape(-1).tolist()
    powers = [math.nan if code == 255 else 2.0 ** (code - 127) for code in codes]
    return torch.stack([value * powers[i // 32] for i, value in enumerate(wide)]) if len(wide) else wide


def scaled_lists(device: str) -> dict[str, tuple[list[Tensor], list[Tensor | None]]]:
    """Both formats, either dtype of scales, ends within a block, strides, odd addresses, others beside, extremes."""
    found = {}
    for dtype, kind in zip(EIGHT_BITS, SCALE_DTYPES * 2, strict=False):
        draw = lambda *shape, seed=0, d=dtype: values(*shape, seed=seed).to(d).to(device)
        code = lambda *shape, low=110, high=140, k=kind: exponents(*shape, low=low, high=high).to(device).view(k)
        x, odd = draw(10, 640, seed=1), draw(5001, seed=2)
        strided = draw(64, 96, seed=3).t().contiguous().t()
        found[str(dtype)] = (
            [x, values(77, device=device), draw(100), draw(1), odd[1:], draw(0), strided, draw(3, 7), draw(2, 3, 32)],
            [code(10, 20), None, code(4), code(1), code(157), code(0), code(3, 64).t(), None, code(2, 3, 1)],
        )
        far = [draw(2048), draw(2048, seed=4)]
        found[f"{dtype} far out"] = far, [code(64, low=0, high=3), code(64, low=240, high=245)]
    mixed = [values(64, 64, seed=5).to(d).to(device) for d in (*EIGHT_BITS, torch.bfloat16, torch.float32)]
    found["mixed"] = mixed, [exponents(64, 2, low=120, high=130).to(device)] * 2 + [None, None]
    return found


def check_scaled(backend, device: str, sums: float, *, few: bool = False) -> None:
    """Every operation that takes scales. ``few``: no more than what is needed to go through every line once."""
    lists = scaled_lists(device)
    if few:
        tensors, scales = next(iter(lists.values()))
        few_rows = [x[:3, :64] if x.dim() == 2 else x[:1101] for x in tensors[:6]]
        few_scales = [None if s is None else s[:3, :2] if s.dim() == 2 else s[:35] for s in scales[:6]]
        lists = {"few": (few_rows, few_scales)}
    for name, (tensors, scales) in lists.items():
        taken = [by_definition(x, s) for x, s in zip(tensors, scales, strict=True)]
        squares = torch.tensor([float(x.square().sum()) for x in taken], dtype=torch.float64, device=device)
        lost = torch.tensor([x.numel() * 2.0**-149 for x in taken], dtype=torch.float64, device=device)
        numels = tuple(x.numel() for x in taken)

        def right(got: Tensor, name: str = name, squares: Tensor = squares, lost: Tensor = lost) -> None:
            assert not got[:, 1].any(), name
            assert ((got[:, 0] - squares).abs() <= sums * squares + lost).all(), (name, got[:, 0], squares)

        right(backend.moments(tensors, block_scales=scales, per_tensor=True))
        total = backend.moments(tensors, block_scales=scales)
        assert abs(float(total[0] - squares.sum())) <= float(sums * squares.sum() + lost.sum())
        for rows in (3,) if few else (1, 3):
            layout = SketchLayout((7, *numels), rows, seed=3)
            regions = list(range(1, len(numels) + 1))
            out = torch.full((layout.size,), math.nan, device=device)
            options = {"layout": layout, "regions": regions, "block_scales": scales}
            right(backend.sketch(tensors, out, per_tensor=True, **options))
            want = torch.zeros(layout.size, dtype=torch.float64)
            plain = {"layout": layout, "regions": regions}
            reference_sketch(taken, want, **plain)
            case = SketchCase(name, list, layout, layout.size, tuple(regions))
            mass, count = bucket_mass(case, taken)
            bound = 2 * (count + 1) * U32 * mass + (count + 1) * SMALLEST[torch.float32]
            assert ((out.cpu().double() - want).abs() <= bound)[7:].all(), name
            previous, sketched = torch.zeros(2, layout.size, device=device)
            gained = backend.absorb_sketch_(tensors, previous, sketched, 1.0, **options)
            assert torch.equal(previous[7:], out[7:])
            assert torch.equal(sketched[7:], out[7:])
            assert abs(float(gained[0] - squares.sum())) <= float(sums * squares.sum() + lost.sum())
            expected = out[7:].double().square().sum()
            torch.testing.assert_close(gained[2:].sum(), expected, rtol=1e-12, atol=0)
        whole = torch.cat(taken)
        for previous in (None, torch.zeros(len(whole), device=device)):
            total = torch.zeros(len(whole), device=device)
            right(backend.accumulate_(tensors, total, previous=previous, per_tensor=True, block_scales=scales))
            assert torch.equal(total.cpu(), whole.float()), name
            assert previous is None or torch.equal(previous.cpu(), whole.float())
    # pieces of one region, each with scales of its own
    x, s = values(4096, seed=1).to(EIGHT_BITS[0]).to(device), exponents(128, low=120, high=130).to(device)
    layout, outs = SketchLayout((4096,), 2), torch.zeros(2, 2048, device=device)
    backend.sketch([x], outs[0], layout=layout, block_scales=[s])
    pieces, scales = [x[2080:], x[:2080]], [s[65:], s[:65]]
    backend.sketch(pieces, outs[1], layout=layout, regions=[0, 0], starts=[2080, 0], block_scales=scales)
    torch.testing.assert_close(*outs, rtol=4 * U32, atol=4 * U32 * float(outs.abs().max()))


def reference_sketch(tensors: list[Tensor], out: Tensor, **options) -> None:
    """The float64 reference on plain numbers."""
    from gac_kernels import reference

    reference.sketch(tensors, out, **options)


def check_scaled_nonfinite(backend, device: str, *, few: bool = False) -> None:
    """A scale of 255 makes 32 NaN, which are counted; what leaves float32 by its scale is not, its square is right."""
    for dtype in EIGHT_BITS[: 1 if few else None]:
        x = values(4096, seed=1).to(dtype).to(device)
        for place in (127,) if few else (0, 31, 127):
            scales = torch.full((128,), 127, dtype=torch.uint8, device=device)
            scales[place] = 255
            nan = torch.zeros(4096, dtype=torch.bool, device=device)
            nan[32 * place : 32 * place + 32] = True
            got = backend.moments(x, block_scales=scales)
            assert got[1] == 32
            assert torch.isnan(got[0])
            out, total = torch.zeros(2, 4096, device=device)
            options = {"layout": SketchLayout((4096,), 1), "block_scales": scales}
            assert backend.sketch(x, out, **options)[1] == 32
            assert torch.equal(torch.isnan(out), nan)
            assert backend.accumulate_(x, total, **options)[1] == 32
            assert torch.equal(torch.isnan(total), nan)
        x = torch.full((4096,), 256.0, device=device).to(dtype)
        scales = torch.full((128,), 127, dtype=torch.uint8, device=device)
        scales[5] = 254
        square = (4064 + 32 * 2.0**254) * 65536
        far = slice(160, 192)
        for previous in (None, torch.zeros(4096, device=device)):
            out, total = torch.zeros(2, 4096, device=device)
            options = {"layout": SketchLayout((4096,), 1), "block_scales": scales}
            found = [backend.moments(x, block_scales=scales), backend.sketch(x, out, **options)]
            gained = backend.accumulate_(x, total, previous=previous, **options)
            found += [gained] if previous is None else []
            for got in found:
                assert got[1] == 0
                torch.testing.assert_close(float(got[0]), square, rtol=1e-6, atol=0)
            assert gained[1] == 0
            for vector in (out, total):
                assert torch.isinf(vector[far]).all()
                assert torch.isfinite(vector).sum() == 4064


def check_scaled_errors(backend, device: str) -> None:
    """What is refused, by name, before anything is written."""
    x, s = values(64, 64).to(EIGHT_BITS[0]).to(device), exponents(64, 2, low=120, high=130).to(device)
    out, layout = torch.zeros(4096, device=device), SketchLayout((5000,), 1)
    flat = torch.zeros(100, dtype=torch.uint8, device=device).view(EIGHT_BITS[1])
    for error, message, tensors, scales in (
        (ValueError, "block_scales has 1 entries, tensors 2", [x, x], [s]),
        (TypeError, r"block_scales\[1\] must be a float8_e8m0fnu or uint8", [x, x], [s, s.float()]),
        (TypeError, r"block_scales\[0\] must be a float8_e8m0fnu or uint8", [x], ["scales"]),
        (TypeError, r"tensors\[0\] has block scales and must be float8_e4m3fn", [x.float()], [s]),
        (ValueError, r"block_scales\[0\] has shape \(64, 1\), \(64, 2\) is needed", [x], [s[:, :1]]),
        (ValueError, r"block_scales\[0\] has shape \(128,\)", [x], [s.reshape(-1)]),
        (ValueError, r"has shape \(64, 40\).*multiple of 32", [x[:, :40]], [s]),
        (ValueError, r"has shape \(100,\).*multiple of 32|is needed", [flat], [s[:3, 0]]),
        (ValueError, "is on meta", [x], [s.to("meta")]),
    ):
        with pytest.raises(error, match=message):
            backend.moments(tensors, block_scales=scales)
        with pytest.raises(error, match=message):
            backend.accumulate_(tensors, out[: sum(t.numel() for t in tensors)], block_scales=scales)
    with pytest.raises(ValueError, match="block_scales and second_moments are not taken together"):
        backend.sketch(x, out, second_moments=x.float(), block_scales=s)
    with pytest.raises(ValueError, match=r"tensors\[0\] has block scales and starts at 5"):
        backend.sketch(x, torch.zeros(5000, device=device), layout=layout, starts=[5], block_scales=s)
    assert not out.any()


DRAWN = {"numel": st.integers(1, 3000), "rows": st.integers(1, 4), "dtype": st.sampled_from(EIGHT_BITS)}
"""What :func:`check_doubling` is drawn for."""


def check_doubling(backend, device: str, numel: int, rows: int, dtype: torch.dtype) -> None:
    """One more in every scale doubles all that is linear, to the bit, and makes four times the squares."""
    x, s = values(numel, seed=numel).to(dtype).to(device), exponents(-(-numel // 32), low=100, high=150).to(device)
    layout = SketchLayout((numel,), rows, seed=numel)
    outs, totals = torch.zeros(2, layout.size, device=device), torch.zeros(2, numel, device=device)
    moments = [backend.sketch(x, outs[k], layout=layout, block_scales=s + k) for k in range(2)]
    sums = [backend.accumulate_(x, totals[k], block_scales=s + k) for k in range(2)]
    assert torch.equal(2 * outs[0], outs[1])
    assert torch.equal(2 * totals[0], totals[1])
    for one, two in (moments, sums, [backend.moments(x, block_scales=s + k) for k in range(2)]):
        torch.testing.assert_close(4 * one, two, rtol=0, atol=0)
