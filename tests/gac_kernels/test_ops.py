"""Dispatch, operators and the behaviour of the public functions that no single backend owns."""

import dataclasses
import importlib.util
import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

import gac_kernels
from gac_kernels import SketchLayout, backends, calls, cpu, fallback, ops, reference, totals
from tests.gac_kernels.cases import values

OPERATORS = torch.ops.gac_kernels


def python(code: str, **environment: str) -> str:
    """Output of ``code`` in a fresh interpreter."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GAC_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def inputs():
    a = [values(100), values(7, 3, seed=1), values(5, seed=2, dtype=torch.bfloat16)]
    b = [values(100, seed=3), values(7, 3, seed=4), values(5, seed=5, dtype=torch.bfloat16)]
    return a, b


MU = torch.tensor(0.3)
LAYOUT = SketchLayout((100, 21, 5), 2, seed=7)
TOKENS = (values(3, 5), values(3), torch.ones(3, 5, dtype=torch.bool), torch.tensor([True, False, True]))


def operator_calls():
    a, b = inputs()
    parameters = [torch.nn.Parameter(t) for t in inputs()[0]]
    seconds, none = [t.square() for t in (b[2], b[0], b[1])], (None, 1e-8)
    numbers = [list(LAYOUT.numels), 2, 1024, [2, 0, 1], [0, 0, 0], 7]
    absorbed, sums = (numbers[0], 2, 1024, None, 7), torch.ones(2 + LAYOUT.cells, dtype=torch.float64)
    flat, lossless = (None, 0, 0, None, None, 0), [numbers[0], 1, *numbers[2:]]
    c, p, t = (values(1500, seed=s) for s in (1, 2, 3))
    two, rows, cells = (torch.ones(shape, dtype=torch.float64) for shape in (2, (3, 2), 2))
    return {
        "moments": (OPERATORS.moments, (a, True)),
        "moments_of_parameters": (OPERATORS.moments, (parameters, False)),
        "moments_of_nothing": (OPERATORS.moments, ([], False)),
        "sketch_flat": (
            OPERATORS.sketch,
            (a, torch.zeros(126), None, 0, 0, None, None, 3, MU, 1.0, False, True, *none),
        ),
        "sketch": (OPERATORS.sketch, ([a[2], a[0], a[1]], torch.zeros(126), *numbers, None, 2.0, True, False, *none)),
        "sketch_weighted": (
            OPERATORS.sketch,
            ([a[2], a[0], a[1]], torch.zeros(126), *numbers, None, 2.0, True, False, seconds, 1e-8),
        ),
        "sketch_into_": (
            OPERATORS.sketch_into_,
            ([a[2], a[0], a[1]], torch.zeros(126), two, *numbers, MU, 1.0, False, False, seconds, 0.1),
        ),
        "sketch_into_flat": (
            OPERATORS.sketch_into_,
            (a, torch.zeros(126), rows, None, 0, 0, None, None, 3, None, 2.0, True, True, *none),
        ),
        "pair_moments": (OPERATORS.pair_moments, (a, b, True)),
        "mix_": (OPERATORS.mix_, (a, b, MU, 1.0)),
        "mix_number": (OPERATORS.mix_, (a, b, None, 0.4)),
        "mix_moments_": (OPERATORS.mix_moments_, (a, b, MU, 1.0)),
        "token_moments": (OPERATORS.token_moments, TOKENS),
        "accumulate_": (OPERATORS.accumulate_, (a, t[:126], None, *flat, MU, 1.0, True, *none)),
        "accumulate_running": (
            OPERATORS.accumulate_,
            ([a[2], a[0], a[1]], t[:126], p[:126], *lossless, None, 2.0, False, seconds, 1e-8),
        ),
        "accumulate_into_": (
            OPERATORS.accumulate_into_,
            ([a[2], a[0], a[1]], t[:126], p[:126], two, *lossless, MU, 1.0, False, *none),
        ),
        "accumulate_into_first": (OPERATORS.accumulate_into_, (a, t[:126], None, rows, *flat, None, 2.0, True, *none)),
        "absorb_sketch_": (OPERATORS.absorb_sketch_, (a, p[:126], t[:126], *absorbed, MU, 1.0, *none)),
        "absorb_sketch_into_": (
            OPERATORS.absorb_sketch_into_,
            ([a[2], a[0]], p[:126], t[:126], sums, *absorbed[:3], [2, 0], 7, None, 0.5, [seconds[0], seconds[1]], 0.1),
        ),
        "absorb_": (OPERATORS.absorb_, (c, p, t, MU, 1.0)),
        "absorb_first": (OPERATORS.absorb_, (c, None, t, None, 0.5)),
        "absorb_into_": (OPERATORS.absorb_into_, (c, p, t, cells, MU, 1.0)),
        "absorb_into_first": (OPERATORS.absorb_into_, (c, None, t, cells, None, 0.5)),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name):
    operator, arguments = operator_calls()[name]
    results = opcheck(operator.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def everything(a, b, mu, out, flat, c, p, t, two, rows, cells):
    """One call of every operation, in every form the schemas have."""
    return (
        gac_kernels.moments(a, per_tensor=True),
        gac_kernels.moments(a[0]),
        gac_kernels.sketch(a, out, layout=LAYOUT, scale=mu),
        gac_kernels.sketch(a, out, layout=LAYOUT, regions=(0, 1, 2), starts=(0, 0, 0), scale=0.5, accumulate=True),
        gac_kernels.sketch(a, flat, seed=5, per_tensor=True),
        gac_kernels.sketch(a, out, layout=LAYOUT, scale=mu, into=two),
        gac_kernels.sketch(a, flat, seed=5, per_tensor=True, into=rows),
        gac_kernels.sketch(a, out, layout=LAYOUT, second_moments=[x * x for x in b]),
        gac_kernels.sketch(
            a, out, layout=LAYOUT, second_moments=[x * x for x in b], eps=0.1, accumulate=True, into=two
        ),
        gac_kernels.pair_moments(a, b),
        gac_kernels.mix_(a, b, mu, moments=True),
        gac_kernels.mix_(a, b, 0.5),
        gac_kernels.token_moments(*TOKENS),
        gac_kernels.accumulate_(a, t[:126], scale=mu),
        gac_kernels.accumulate_(a, t[:126], layout=SketchLayout((100, 21, 5), 1), previous=p[:126], per_tensor=True),
        gac_kernels.accumulate_(a, t[:126], scale=0.5, second_moments=[x * x for x in b], into=two),
        gac_kernels.absorb_sketch_(a, p[:126], t[:126], mu, layout=LAYOUT),
        gac_kernels.absorb_sketch_(
            a[1:2], p[:126], t[:126], 0.5, layout=LAYOUT, regions=[1], second_moments=[b[1] * b[1]]
        ),
        gac_kernels.absorb_(c, None, t, mu),
        gac_kernels.absorb_(c, p, t, 0.5),
        gac_kernels.absorb_(c, p, t, mu, into=cells),
        two + gac_kernels.sketch(a, out, layout=LAYOUT, into=two),  # after the write
    )


def test_compiled_calls_equal_eager_calls():
    def arguments():
        a, b = inputs()
        vectors = [values(1500, seed=s) for s in (1, 2, 3)]
        sums = [torch.ones(shape, dtype=torch.float64) for shape in (2, (3, 2), 2)]
        return a, b, MU, torch.zeros(LAYOUT.size), torch.zeros(126), *vectors, *sums

    eager, compiled = arguments(), arguments()
    expected = everything(*eager)
    got = torch.compile(everything, fullgraph=True, backend="aot_eager")(*compiled)
    for want, have in zip((*expected, *eager[0], *eager[3:]), (*got, *compiled[0], *compiled[3:]), strict=True):
        assert want is have is None or torch.equal(want, have)


def test_results_of_parameters_need_no_gradient():
    parameters = [torch.nn.Parameter(values(30))]
    compiled = torch.compile(lambda p: gac_kernels.moments(p), fullgraph=True, backend="aot_eager")
    assert not gac_kernels.moments(parameters).requires_grad
    assert not compiled(parameters).requires_grad
    assert not OPERATORS.moments(parameters, False).requires_grad


def test_fake_tensors_go_through_the_operators():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = [torch.empty(10), torch.empty(3)]
        assert gac_kernels.moments(x).shape == (2,)
        assert gac_kernels.sketch(x, torch.empty(13), per_tensor=True).shape == (2, 2)
        assert gac_kernels.absorb_(torch.empty(1025), None, torch.empty(1025), 1.0).shape == (2,)
        into = torch.empty(2, dtype=torch.float64)
        assert gac_kernels.accumulate_(x, torch.empty(13), per_tensor=True).shape == (2, 2)
        assert gac_kernels.accumulate_(x, torch.empty(13), previous=torch.empty(13), into=into) is into
        assert gac_kernels.sketch(x, torch.empty(13), into=into) is into
        assert gac_kernels.sketch(x, torch.empty(13), second_moments=x).shape == (2,)
        assert gac_kernels.absorb_(torch.empty(1025), None, torch.empty(1025), 1.0, into=into) is into


def test_eager_calls_do_not_cross_the_operator_boundary():
    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Calls.seen += str(function).startswith("gac_kernels")
            return function(*args, **(kwargs or {}))

    assert not ops.traced()
    with Calls():  # a dispatch mode wants to see the call
        gac_kernels.moments(values(5))
    assert Calls.seen == 1


def test_generators_and_single_tensors_are_lists():
    a, b = inputs()
    assert torch.equal(gac_kernels.moments(t for t in a), gac_kernels.moments(a))
    assert torch.equal(gac_kernels.pair_moments(tuple(a), iter(b)), gac_kernels.pair_moments(a, b))
    assert torch.equal(gac_kernels.moments(a[0]), gac_kernels.moments([a[0]]))
    squares = [t.square() for t in a]
    outs = torch.zeros(2, 126)
    for out, second_moments in zip(outs, (squares, (t for t in squares)), strict=True):
        gac_kernels.sketch(a, out, second_moments=second_moments)
    assert torch.equal(*outs)
    with pytest.raises(TypeError, match="tensors"):
        gac_kernels.moments(3)


def test_importing_loads_neither_triton_nor_a_compiler():
    code = """
import sys, torch
before = set(sys.modules)
import gac_kernels
print(sorted(name for name in set(sys.modules) - before if not name.startswith("gac_kernels")))
gac_kernels.moments(torch.ones(3))
print("triton" in sys.modules, "torch._dynamo" in sys.modules)
"""
    imported, used = python(code).splitlines()
    assert "triton" not in imported
    assert used == "False False"


def test_the_interpreter_serves_only_who_asks_for_it():
    code = """
import os, torch, gac_kernels
from gac_kernels import SketchLayout, backends, calls, cpu, fallback, ops, reference
print(backends.select("cpu")[1] == "triton")
os.environ["GAC_BACKEND"] = "triton"
backends.forget()
print(gac_kernels.moments(torch.ones(300))[0].item(), backends.select("cpu")[0].__name__)
"""
    assert python(code, TRITON_INTERPRET="1").splitlines() == ["False", "300.0 gac_kernels.triton"]


@pytest.fixture
def force(monkeypatch):
    """Sets GAC_BACKEND as if for a new process."""

    def clear():
        backends.forget()
        ops._cpu_mix.cache_clear()

    def force(value):
        monkeypatch.setenv("GAC_BACKEND", value)
        clear()

    yield force
    monkeypatch.undo()
    clear()


def test_the_variable_forces_a_backend(force):
    for backend in ("reference", "fallback", "cpu"):
        if backend == "cpu" and not cpu.available():
            continue
        force(backend)
        assert backends.select("cpu")[0].__name__ == f"gac_kernels.{backend}"
        assert gac_kernels.backend_status()["cpu"] == f"{backend} (GAC_BACKEND={backend})"
        assert gac_kernels.moments(torch.ones(300)).tolist() == [300.0, 0.0]
        assert ops._cpu_mix() is importlib.import_module(f"gac_kernels.{backend}").mix_


def test_a_wrong_backend_is_named(force):
    force("cuda")
    with pytest.raises(ValueError, match="GAC_BACKEND is 'cuda': use one of reference, fallback, cpu, triton"):
        gac_kernels.moments(torch.ones(3))
    assert "none (GAC_BACKEND is 'cuda'" in gac_kernels.backend_status()["cpu"]


def test_triton_on_cpu_tensors_says_what_to_do(force):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter takes CPU tensors")
    force("triton")
    with pytest.raises(ValueError, match=r"need a GPU.*TRITON_INTERPRET=1"):
        gac_kernels.moments(torch.ones(3))


def test_a_missing_or_old_triton_falls_back(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backends.select.cache_clear()
    try:
        module, name, reason = backends.select("cuda")
        assert (module, name) == (reference, "reference")
        assert "triton is not installed" in reason
        monkeypatch.undo()
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton, "__version__", "3.2.0")
        backends.select.cache_clear()
        assert "too old: version 3.3" in backends.select("cuda")[2]
    finally:
        monkeypatch.undo()
        backends.select.cache_clear()


def test_backend_status_names_backends_and_reasons():
    status = gac_kernels.backend_status()
    assert set(status) == {"cpu", "cuda", "triton", "cpu_library"}
    assert status["cpu"].startswith(("cpu (", "reference ("))
    assert all(isinstance(text, str) and text for text in status.values())
    if not torch.cuda.is_available():
        assert status["cuda"].startswith("no device")


def test_other_devices_are_served_by_the_reference():
    assert backends.select("mps")[:2] == (reference, "reference")


@pytest.mark.parametrize("name", ["sketch", "accumulate_", "absorb_", "absorb_sketch_", "token_moments"])
def test_a_checked_call_has_the_signature_of_its_operation(name):
    make = {
        "sketch": calls.sketch_call,
        "accumulate_": totals.accumulate_call,
        "absorb_": totals.absorb_call,
        "absorb_sketch_": totals.absorb_sketch_call,
        "token_moments": calls.token_call,
    }[name]
    public = inspect.signature(getattr(gac_kernels, name)).parameters
    made = dict(inspect.signature(make).parameters)
    if fresh := made.pop("fresh", None):  # of the library alone, for who knows that it serves
        assert (fresh.kind, fresh.default) == (inspect.Parameter.KEYWORD_ONLY, 0)
        assert name in ("accumulate_", "absorb_sketch_")
    assert list(public.values()) == list(made.values())
    for backend in (reference, fallback, cpu):
        assert getattr(backend, name).make is make
        assert list(inspect.signature(getattr(backend, name).run).parameters) == ["call"]


def test_equal_calls_share_their_places_and_none_can_be_changed():
    a = [values(100), values(21), values(5)]
    one, other = (calls.sketch_call(a, torch.zeros(LAYOUT.size), layout=LAYOUT, regions=[0, 1, 2]) for _ in range(2))
    assert one.places is other.places
    assert one.places.room == LAYOUT.numels
    flat = calls.sketch_call(a, torch.zeros(200), seed=3)
    assert (flat.tail, flat.places.starts, flat.layout.numels) == (200 - 126, (0, 100, 121), (126,))
    with pytest.raises(AttributeError):
        one.scale = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.places.regions = (0, 0, 0)


def test_every_backend_has_every_operation():
    for backend in (reference, fallback, cpu):
        for name in set(ops.__all__) - {"backend_status"}:
            assert callable(getattr(backend, name)), name
