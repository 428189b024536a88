"""Launches without a GPU: kernels are compiled for one, and a driver that starts nothing records what it was given.

Run as a program (``python stub_driver.py``): it makes calls again and again, and prints as JSON, for each, the launches
that went through Triton's own interface and those that reached the driver. ``--unprepared`` pretends that this version
of Triton is not known. ``--time`` measures the host time of calls instead, in microseconds: least and median.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from time import perf_counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gac_kernels import SketchLayout, cpu
from gac_kernels import triton as operations
from gac_kernels.step_vector import SIZE, WEIGHTS_SIZE
from gac_kernels.triton import config, ending, gather_kernel, kernels, step_kernels
from gac_kernels.triton import launch as starting

reached: list[tuple] = []
ordinary: list[str] = []


class Utils:
    def load_binary(self, name, *rest):
        return name, f"function of {name}", 32, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    """Takes the place of what calls the CUDA driver."""

    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        address = lambda a: isinstance(a, int) and a >> 32
        numbers = [a.data_ptr() if isinstance(a, torch.Tensor) else a if address(a) else str(a) for a in args]
        reached.append((self.name, [x, y, z], stream, function, numbers))


class Driver:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self):
        return torch.device("cpu")

    def is_active(self):
        return True

    def map_python_to_cpp_type(self, name):
        return name


def observed(call) -> dict:
    """What one call launched."""
    reached.clear()
    ordinary.clear()
    call()
    return {"reached": list(reached), "ordinary": list(ordinary)}


def watch(kernel) -> None:
    """Notes the launches that go through Triton's own interface."""
    run = kernel.run

    def noted(*args, **options):
        ordinary.append(kernel.__name__)
        return run(*args, **options)

    kernel.run = noted


def times() -> dict[str, tuple[float, float]]:
    """Of calls on lists of 1, 38, 100 and 300 tensors."""
    found = {}
    Launcher.__call__ = lambda *args: None
    for count in (1, 38, 100, 300):
        gradients = [torch.zeros(64, dtype=torch.bfloat16) for _ in range(count)]
        options = {"regions": list(range(count)), "into": torch.zeros(2, dtype=torch.float64)}
        for name, size in (("sketch", 65536), ("accumulate_", None)):
            layout = SketchLayout.per_tensor([64] * count, size=size)
            out, call = torch.zeros(layout.size), getattr(operations, name)
            measured = []
            for _ in range(40):
                start = perf_counter()
                for _ in range(50):
                    call(gradients, out, layout=layout, **options)
                measured.append((perf_counter() - start) / 50 * 1e6)
            found[f"{name} of {count}"] = (round(min(measured), 1), round(median(measured), 1))
    return found


def refused(layout, gradients, out, into) -> list[str]:
    """Errors of calls that are like one that was right, but for one thing."""
    found = []
    for tensors, to, options in (
        ([gradients[0].new_zeros(9000), *gradients[1:]], out, {}),
        ([gradients[0].int(), *gradients[1:]], out, {}),
        (gradients, out[:-1], {}),
        (gradients, out.half(), {}),
        (gradients, out[None], {}),
        (gradients, out, {"into": into.float()}),
        (gradients, out, {"into": into[None]}),
        (gradients, out, {"scale": torch.zeros(2)}),
        (gradients, out, {"scale": True}),
        (gradients, out, {"regions": [0, 1, 3]}),
        (gradients, [0.0], {}),
    ):
        try:
            operations.sketch(tensors, to, **{"layout": layout, "into": into} | options)
        except (TypeError, ValueError) as error:
            found.append(str(error))
        else:
            found.append("accepted")
    return found


def main() -> dict:
    driver.set_active(Driver())
    starting.check_device = lambda device: None
    gpu = config.for_device(torch.device("cuda"))
    config.for_device = lambda device: gpu
    if "--time" in sys.argv:
        cpu.available()
        return times()
    watched = ("sketch_kernel", "sketch_finish_kernel", "sketch_absorb_kernel", "accumulate_kernel", "reduce_kernel")
    for name in (*watched, "absorb_kernel"):
        watch(getattr(kernels, name))
    for kernel in (kernels.pair_kernel, gather_kernel.gather_kernel, step_kernels.finish_kernel):
        watch(kernel)
    if "--unprepared" in sys.argv:
        starting.PREPARED_VERSIONS = ((99, 0), (99, 9))
        starting._KNOBS = starting._runtime_knobs()
    cpu.available()  # its pass over lists
    numels = (3000, 70, 1025)
    gradients = [torch.zeros(n, dtype=torch.bfloat16) for n in numels]
    layout = SketchLayout(numels, 2)
    out, room = torch.zeros(layout.size), torch.zeros(layout.size + 1)
    into, total = torch.zeros(2, dtype=torch.float64), torch.zeros(sum(numels))
    mu, scales = torch.tensor(0.5), torch.zeros(8)
    cells = torch.zeros(-(-layout.size // 1024), dtype=torch.float64)

    def sketched(tensors=gradients, to=out, **options):
        return lambda: operations.sketch(tensors, to, layout=layout, into=into, **options)

    accumulated = lambda: operations.accumulate_(gradients, total, scale=mu, into=into)
    absorbed = lambda: operations.absorb_(out, None, room[:-1], mu, into=cells)
    vectors, sums = [torch.zeros(layout.size) for _ in range(3)], torch.zeros(2 + layout.cells, dtype=torch.float64)
    absorb = lambda previous, scale=mu, **options: (
        lambda: operations.absorb_sketch_(gradients, previous, vectors[1], scale, layout=layout, into=sums, **options)
    )
    found: dict = {"addresses": [out.data_ptr(), into.data_ptr(), vectors[0].data_ptr(), sums.data_ptr()]}
    calls = (("sketch", sketched(scale=mu)), ("accumulate_", accumulated), ("absorb_", absorbed))
    for name, call in (*calls, ("absorb_sketch_", absorb(vectors[0]))):
        found[name] = [observed(call) for _ in range(3)]
    numbers, totals = torch.zeros(8, 6, dtype=torch.float64), torch.zeros(2, 4096)
    state, weights = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(WEIGHTS_SIZE)
    common = {"table": numbers, "options": numbers, "averages": 2}
    gathered = lambda: ending.gather((totals[0], totals[1]), numbers, 4, [0, 1])
    found["gather"] = [observed(gathered) for _ in range(3)]
    found["finish"] = [observed(lambda: ending.finish(numbers, state, weights, **common)) for _ in range(3)]
    found["nothing"] = [observed(lambda: ending.finish(None, state, weights, **common)) for _ in range(2)]
    told = {"alpha": mu.double(), "prior": 0.3}
    found["told"] = [observed(lambda: ending.finish(numbers, state, weights, **common, **told)) for _ in range(2)]
    rows = torch.zeros(16, 4, dtype=torch.float64)  # other sizes, the same program
    found["longer"] = [observed(lambda: ending.gather((totals[0], totals[1]), rows, 1, [0] * 16))]
    moved = [t.clone() for t in gradients]
    found["moved"] = [observed(sketched(moved, scale=mu)) for _ in range(2)]
    found["other scale"] = [observed(sketched(scale=scales[0])), observed(sketched(scale=scales[4]))]
    found["unaligned scale"] = [observed(sketched(scale=scales[1])) for _ in range(2)]
    found["unaligned out"] = [observed(sketched(to=room[1:], scale=mu)) for _ in range(2)]
    found["number"] = [observed(sketched(scale=s)) for s in (0.25, 0.75)]
    weighted = {"second_moments": [t.float() for t in gradients], "eps": 0.5}
    found["weighted"] = [observed(sketched(**weighted)) for _ in range(3)]
    found["absorbed weighted"] = [observed(absorb(vectors[0], 0.5, **weighted)) for _ in range(3)]
    found["absorbed elsewhere"] = [observed(absorb(vectors[k])) for k in (2, 0)]
    found["no into"] = [observed(lambda: operations.sketch(gradients, out, layout=layout)) for _ in range(3)]
    found["refused"] = [refused(layout, gradients, out, into) for _ in range(2)]
    found["two dtypes"] = [observed(sketched([gradients[0], gradients[1].float(), gradients[2]])) for _ in range(2)]
    seen: list[int] = []
    hook = getattr(getattr(triton, "knobs", None), "runtime", None)
    if hook is not None:
        add = lambda metadata: seen.append(1)
        hook.launch_enter_hook.add(add)
        found["watched"] = [observed(sketched(scale=mu))]
        hook.launch_enter_hook.remove(add)
        found["no longer watched"] = [observed(sketched(scale=mu))]
    return found


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
