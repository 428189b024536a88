"""A training step on a GPU: kernel launches, and no host synchronization anywhere in it."""

import math

import pytest
import torch

import gac
from gac.ending import why_in_torch
from gac.observe import pending

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (torch.nn.Linear(512, 512), torch.nn.GELU())]
    return torch.nn.Sequential(*layers).to("cuda", torch.bfloat16)


def losses(model, inputs):
    return model(inputs).float().square().mean(), model(inputs + 1).float().abs().mean()


def kernels_of(call) -> int:
    """Kernels that ``call`` starts; copies of tables to the device are none."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith("Memcpy") for name in names)


@pytest.mark.parametrize("estimator", ["sketch", "exact"])
def test_launches_of_a_backward_pass(estimator, monkeypatch):
    model = network()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    monkeypatch.setattr(pending, "bucket_bytes", lambda **_: size // 4)
    inputs = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.tensor(0.5, device="cuda")

    def plain() -> None:
        (weight * losses(model, inputs)[0]).backward()

    model.zero_grad(set_to_none=False)
    plain()
    plain()
    without = kernels_of(plain)
    with gac.patch(model, estimator=estimator) as mixer:
        for _ in range(2):
            model.zero_grad(set_to_none=False)
            with mixer.sft():
                mixer.backward(losses(model, inputs)[0])
            with mixer.rl():
                mixer.backward(losses(model, inputs)[1])
            mixer.step()
        with mixer.sft():
            added = kernels_of(lambda: mixer.backward(losses(model, inputs)[0])) - without
    assert 2 <= added <= 2 * math.ceil(size / (size // 4)) + 1


@pytest.mark.parametrize(
    ("options", "most"),
    [({"estimator": "sketch"}, 5), ({"estimator": "exact"}, 5), ({"alpha": "kl", "prior": 0.3}, 5)],
)
def test_launches_of_the_end_of_a_step(options, most):
    model = network()
    inputs = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    told = {"kl": 0.02} if "alpha" in options else {}
    counts = []
    with gac.patch(model, interval=3, report_interval=None, **options) as mixer:
        for _ in range(6):
            for _ in range(2):
                with mixer.sft():
                    mixer.backward(losses(model, inputs)[0])
                with mixer.rl():
                    mixer.backward(losses(model, inputs)[1])
            counts.append(kernels_of(lambda: mixer.step(**told)))
        assert why_in_torch(mixer.controller.law, mixer.device) is None
    assert counts[3] <= most, counts  # the second measured step
    assert counts[4] <= 1, counts


@pytest.mark.parametrize("estimator", ["sketch", "exact"])
@pytest.mark.parametrize(
    ("law", "options", "told"),
    [
        ("gac", {}, {}),
        ("gac", {"alpha": "kl", "prior": 0.3}, {"kl": 0.02}),
        ("gac", {"alpha": "kl"}, {"kl": torch.tensor}),
        ("aim", {}, {}),
        ("paper", {"mu_update_freq": 1}, {}),
        ("fixed", {"mu": 0.5}, {}),
        ("chord", {}, {}),
        ("kl-ctrl", {}, {"kl": 0.02}),
        ("entropy-ctrl", {}, {"entropy": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_no_host_synchronization_in_a_whole_step(estimator, law, options, told, micro_batches):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    told = {k: torch.full((), 0.02, device="cuda") if v is torch.tensor else v for k, v in told.items()}
    with gac.patch(model, law=law, estimator=estimator, **options) as mixer:

        def step() -> None:
            for _ in range(micro_batches):
                with mixer.sft():
                    mixer.backward(losses(model, inputs)[0])
                with mixer.rl():
                    mixer.backward(losses(model, inputs)[1])
            optimizer.step()
            mixer.step(**told)
            optimizer.zero_grad()
            mixer.metrics()

        step()
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert 0.0 <= float(mixer.mu) <= 1.0
        assert not mixer.metrics(wait=True)["skipped"]
