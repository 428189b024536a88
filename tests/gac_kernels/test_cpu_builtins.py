"""The builtins that take plain calls: same bits as the functions behind them, which get everything else untouched."""

import contextlib
import copy
import gc
import pickle
import resource
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from gac_kernels import arguments, cpu
from gac_kernels.cpu import builtins as cpu_builtins
from gac_kernels.cpu import library as cpu_library
from gac_kernels.cpu import operations
from tests.gac_kernels.cases import DTYPES, values

if not cpu.available():
    pytest.skip(f"no CPU library: {cpu.status()['reason']}", allow_module_level=True)

LIBRARY = cpu_library.load()
EXPECTED = (
    sys.implementation.name == "cpython"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
    and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
)


class Passed(Exception):
    """Raised by the functions behind the builtins under test, with the call they got."""


def _passed(*args, **options):
    raise Passed(args, options)


@pytest.fixture(scope="module")
def made():
    """Builtins with a function behind that tells."""
    if not EXPECTED:
        pytest.skip("this Python or torch has no builtins")
    return cpu_builtins.builtins_for(LIBRARY.quick, dict.fromkeys(cpu_builtins.NAMES, _passed))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit."""
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.detach().view(view), b.detach().view(view))


def argument_lists():
    """Plain arguments: single tensors and lists, of every dtype and on both sides of every limit."""
    for dtype in DTYPES:
        for numel in (0, 1, 2, 31, 1000, 16_385, 49_152, 49_153):
            yield values(numel, dtype=dtype, seed=1), values(numel, dtype=dtype, seed=2)
    yield values(3, 1, 5), values(3, 1, 5, seed=1)
    yield values(40, 6).t()[:, :1].t(), values(1, 6, seed=1)  # strides that say nothing
    yield Parameter(values(70)), values(70, seed=1)
    yield values(300), values(300, dtype=torch.bfloat16, seed=1)
    yield [values(64)], [values(64, seed=1)]
    yield [values(100, seed=k) for k in range(9)], [values(100, seed=k + 9) for k in range(9)]
    yield [values(k, 7, dtype=d, seed=k) for k, d in enumerate(DTYPES)], [values(k, 7, seed=9) for k in range(4)]
    yield [values(30_000), values(), values(30_000)], [values(30_000, seed=1), values(), values(30_000)]


def copies(argument):
    return [t.clone() for t in argument] if isinstance(argument, list) else argument.detach().clone()


@pytest.mark.parametrize(("a", "b"), argument_lists(), ids=lambda a: f"{len(a) if isinstance(a, list) else a.shape}")
def test_plain_calls_give_the_bits_of_the_functions_behind(made, a, b):
    assert same(made["moments"](a), operations.moments(a))
    assert same(made["moments"](a, per_tensor=False), operations.moments(a))
    assert same(made["pair_moments"](a, b), operations.pair_moments(a, b))
    for mu in (0.3, -2.0, Parameter(torch.tensor(0.7)), *[torch.tensor(0.3, dtype=d) for d in DTYPES]):
        for wanted in (False, True):
            got, expected = copies(a), copies(a)
            result = made["mix_"](got, b, mu, moments=wanted)
            behind = operations.mix_(expected, b, mu, moments=wanted)
            assert (result is None and behind is None) if not wanted else same(result, behind)
            for x, y in zip(got, expected, strict=True) if isinstance(a, list) else [(got, expected)]:
                assert same(x, y)


def unusual():
    """What is not plain, by name: pairs of arguments and the weight of the mix."""
    x, y = values(100), values(100, seed=1)
    negated = torch.ones(1, dtype=torch.complex64).conj().imag
    with FakeTensorMode():
        fake = torch.empty(100)
    return {
        "integers": (torch.arange(9), torch.arange(9), 0.5),
        "complex": (x.to(torch.complex64), y, 0.5),
        "eight bits": (x.to(torch.float8_e4m3fnuz), y, 0.5),
        "meta": (x.to("meta"), y.to("meta"), 0.5),
        "not contiguous": (values(200)[::2], y, 0.5),
        "sparse": (x.to_sparse(), y.to_sparse(), 0.5),
        "negated": (negated, torch.ones(1), 0.5),
        "fake": (fake, fake, 0.5),
        "subclass": (TwoTensor(x, x), TwoTensor(y, y), 0.5),
        "one of a list": ([x, x.to("meta")], [y, y], 0.5),
        "tuples": ((x,), (y,), 0.5),
        "empty lists": ([], [], 0.5),
        "no tensors": ([3], "b", 0.5),
        "nothing": (None, None, 0.5),
        "nested lists": ([[x]], [[y]], 0.5),
    }


@pytest.mark.parametrize("name", unusual())
def test_what_is_not_plain_is_passed_on_as_it_came(made, name):
    a, b, mu = unusual()[name]
    for call, args, options in (
        ("moments", (a,), {}),
        ("pair_moments", (a, b), {"per_tensor": False}),
        ("mix_", (a, b, mu), {"moments": True}),
        ("mix_", (a, values(100), mu), {}),
    ):
        with pytest.raises(Passed) as passed:
            made[call](*args, **options)
        got_args, got_options = passed.value.args
        assert len(got_args) == len(args)
        assert all(x is y for x, y in zip(got_args, args, strict=True))
        assert got_options == options


def test_calls_that_do_not_fit_are_passed_on_with_nothing_done(made):
    x, y = values(100), values(100, seed=1)
    kept, version = x.clone(), x._version
    lazy = torch.tensor(2j, dtype=torch.complex64).conj().imag

    class Undecided:
        def __bool__(self):
            raise ValueError

    calls = [
        lambda: made["moments"](),
        lambda: made["moments"](x, per_tensor=True),
        lambda: made["moments"](tensors=x),
        lambda: made["moments"](x, x),
        lambda: made["moments"](x, unknown=1),
        lambda: made["pair_moments"](x, y[:50]),
        lambda: made["pair_moments"](x.view(10, 10), y.view(100)),
        lambda: made["pair_moments"]([x, x], [y]),
        lambda: made["pair_moments"]([x], y.view(10, 10)),
        lambda: made["pair_moments"](x, y, per_tensor=True),
        lambda: made["mix_"](x, y),
        lambda: made["mix_"](x, y, mu=0.5),
        lambda: made["mix_"](x, y, 0.5, True),
        lambda: made["mix_"](x, y, 0.5, moments=Undecided()),
        *[lambda mu=mu: made["mix_"](x, y, mu) for mu in (1, True, "half", None, x, torch.tensor(1), lazy)],
        *[lambda mu=mu: made["mix_"](x, y, mu) for mu in (torch.ones(1), torch.ones((), device="meta"))],
        lambda: vmap(made["moments"])(values(3, 4)),
        lambda: vmap(lambda t: made["mix_"](t, y, 0.5))(values(3, 100)),
    ]
    for k, call in enumerate(calls):
        with pytest.raises(Passed):
            call()
        assert torch.equal(x, kept), k
        assert x._version == version, k


def test_versions_move_where_it_was_written(made):
    x, y = [values(5), Parameter(values(5)), values(60_000)], [values(5), values(5), values(60_000)]
    x = [x[0].clone(), x[1], x[2].clone()]
    versions = [t._version for t in x + y]
    made["mix_"](x, y, 0.5)
    made["mix_"](x[1], y[1], torch.tensor(0.5))
    made["mix_"]([x[0]], [y[0]], 0.5)
    assert [t._version - v for t, v in zip(x + y, versions, strict=True)] == [2, 2, 1, 0, 0, 0]
    needed = values(5).requires_grad_()
    product = needed * x[0]
    made["mix_"](x[0], y[0], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        made["mix_"](torch.zeros(5), torch.zeros(5), 0.5)


def test_results_are_tensors_like_others(made):
    got = made["moments"](Parameter(values(100)))
    assert not got.requires_grad
    assert got.is_leaf
    for copied in (got.clone(), copy.deepcopy(got), pickle.loads(pickle.dumps(got)), got.clone().share_memory_()):
        assert same(copied, got)
    view = got[:1]
    kept = got.tolist()
    del got
    for _ in range(1000):
        made["moments"](values(3))  # would take the memory again, had it been given back
    assert view.item() == kept[0]
    view.add_(1).requires_grad_().sum().backward()
    with torch.inference_mode():
        assert made["moments"](values(5)).is_inference()


@pytest.mark.slow
def test_references_and_memory_come_back(made):
    a, b, mu, lists = values(10).clone(), values(10, seed=1), torch.tensor(0.5), [values(40_000), values(40_000)]
    everything = [a, b, mu, lists, *lists, made["mix_"]]

    def rounds(count):
        for k in range(count):
            made["moments"](a)
            made["mix_"](a, b, mu, moments=True)
            made["mix_"](a, b, 0.5)
            if k % 50 == 0:
                made["pair_moments"](lists, lists, per_tensor=False)
                made["mix_"](lists, lists, mu)
                for call in (lambda: made["mix_"](a, b, 1, moments=True), lambda: made["moments"](a.to("meta"))):
                    with contextlib.suppress(Passed):
                        call()

    rounds(2000)
    gc.collect()  # exceptions of other tests
    before, peak = [sys.getrefcount(x) for x in everything], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds(50_000)
    assert [sys.getrefcount(x) for x in everything] == before
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * unit < 4 << 20  # less than 40 bytes a result


def test_threads_that_call_at_once_and_change_the_list_meanwhile(made):
    small, large = values(1000), [values(40_000, seed=k) for k in range(4)]
    expected = made["moments"](small), made["moments"](large)
    pairs = made["pair_moments"](large, large)

    def one(k):
        listed = list(large)
        results = [made["moments"](small), made["moments"](listed)]
        mixed = [t.clone() for t in large]
        made["mix_"](mixed, large, 0.25)
        return results, all(torch.allclose(x, y) for x, y in zip(mixed, large, strict=True))

    with ThreadPoolExecutor(4) as pool:
        for results, right in pool.map(one, range(40)):
            assert right
            assert all(same(x, y) for x, y in zip(results, expected, strict=True))

        for _ in range(20):  # the memory of what leaves the list has to stay while it is read
            listed = [t.clone() for t in large]
            running = pool.submit(made["pair_moments"], listed, listed)
            pool.submit(listed.clear)
            refused = running.exception()  # cleared before the call
            assert refused is not None or same(running.result(), pairs)
            assert refused is None or refused.args[0] == ([], [])


def test_function_modes_do_not_change_results(made):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    x = values(50)
    expected = made["moments"](x)
    with Mode():
        assert same(made["moments"](x), expected)
    with torch.device("meta"):
        assert same(made["moments"]([x]), expected)


@pytest.mark.skipif(not EXPECTED, reason="this Python or torch has no builtins")
def test_a_list_is_described_as_python_sees_it(monkeypatch):
    describe = cpu_builtins.builtins_for(LIBRARY.quick, {cpu_builtins.DESCRIBE: lambda tensors: None})["describe"]
    plain = [values(n, dtype=d, seed=n) for n in (0, 1, 7, 300) for d in arguments.KNOWN_DTYPES]
    lists = [
        [],
        plain,
        plain[:: len(arguments.KNOWN_DTYPES)],
        [torch.nn.Parameter(values(3, 5)), values(2, 1, 4)],
        [values()],
    ]
    for tensors in lists:
        numbers = memoryview(describe(tensors)).cast("q").tolist()
        dtypes = [arguments.KNOWN_DTYPES.index(t.dtype) for t in tensors]
        assert numbers[0] == (dtypes[0] if len(set(dtypes)) == 1 else -1)
        assert numbers[1:] == [*map(torch.Tensor.data_ptr, tensors), *map(torch.Tensor.numel, tensors), *dtypes]
        found = []
        for function in (describe, lambda tensors: None):
            monkeypatch.setattr(arguments, "describe", function)
            listed = arguments.described(tensors, "tensors")
            found.append((*map(id, listed.tensors), listed.dtypes, listed.plain, listed.numels()))
        assert found[0] == found[1]
    negated = torch.zeros(1, dtype=torch.complex64).conj().imag
    others = (values(6, 4).t(), values(9).to_sparse(), values(3).to(torch.float8_e4m3fnuz), torch.arange(3), negated)
    for other in (*others, values(3).to("meta"), 3, torch.ones(3).as_subclass(type("Mine", (torch.Tensor,), {}))):
        assert describe([plain[3], other]) is None
    for whole in (plain[3], tuple(plain), iter(plain), None):
        assert describe(whole) is None


def test_they_stand_in_their_places_or_nobody_does(monkeypatch):
    assert cpu.available()
    behind = {name: getattr(cpu, name) for name in cpu_builtins.NAMES}
    if EXPECTED:
        assert all(f.__self__ is getattr(operations, name) for name, f in behind.items())
    else:
        assert all(f is getattr(operations, name) for name, f in behind.items())
    with monkeypatch.context() as patch:
        patch.setattr(cpu_builtins, "_CAPSULE", b"other")
        assert cpu_builtins.builtins_for(LIBRARY.quick, behind) == {}
    with monkeypatch.context() as patch:
        functions, objects = cpu_builtins._names(LIBRARY.quick)
        patch.setattr(cpu_builtins, "_names", lambda library: ([*functions, "PyNoSuch_Function"], objects))
        assert cpu_builtins.builtins_for(LIBRARY.quick, behind) == {}
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_config_var", lambda name: 1)
        assert cpu_builtins.builtins_for(LIBRARY.quick, behind) == {}


@pytest.mark.skipif(not EXPECTED, reason="this Python or torch has no builtins")
def test_a_library_that_asks_for_other_objects_is_refused(monkeypatch):
    functions, objects = cpu_builtins._names(LIBRARY.quick)
    behind = dict.fromkeys(cpu_builtins.NAMES, _passed)
    for wanted in (objects[:-1], [*objects, "something"]):
        monkeypatch.setattr(cpu_builtins, "_names", lambda library, wanted=wanted: (functions, wanted))
        with pytest.raises(cpu_library.LibraryError, match="reinstall"):
            cpu_builtins.builtins_for(LIBRARY.quick, behind)


@pytest.mark.skipif(not EXPECTED, reason="this Python or torch has no builtins")
def test_an_operation_that_has_no_builtin_keeps_its_function(monkeypatch):
    monkeypatch.setattr(cpu_builtins, "NAMES", ("sketch", "moments"))
    made = cpu_builtins.builtins_for(LIBRARY.quick, dict.fromkeys(("sketch", "moments"), _passed))
    assert made["sketch"] is _passed is made["moments"].__self__


def test_the_public_way_tells_autograd_where_the_private_one_is_gone(monkeypatch):
    told = []
    monkeypatch.setattr(torch.autograd.graph, "increment_version", told.append)
    for private in (None, lambda tensor: tensor._version):  # none, and one that takes no tuples
        monkeypatch.setattr(torch._C, "_increment_version", private)
        assert cpu_builtins._increment_version() == told.append
