"""Sequences under what trainers do to a model: checkpointing, compilation, mixed precision, accumulation in parts."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gac
from tests.gac.models import tiny_model
from tests.gac.sequences.truth import assert_close, expected, losses, mixed


def small(family="qwen2", *, tied=True):
    return tiny_model(family, tied=tied, width=16)


def patched(model, **options):
    return gac.patch(model, estimator="sequence", sketch_size=64, law="fixed", mu=0.3, **options)


def step(mixer, model, batch):
    with mixer.batch(is_expert=batch.is_expert):
        mixer.mixed_loss(**losses(model, batch)).backward()
    mixer.step()
    return mixer.statistics


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["batch", "branches", "plain"])
def test_recomputed_layers_count_once(reentrant, mode):
    model, batch = small(), mixed()
    wanted = expected(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    mixer = patched(model)
    if mode == "batch":
        step(mixer, model, batch)
    else:
        for branch, name in ((mixer.sft, "sft_loss"), (mixer.rl, "rl_loss")):
            own = batch[batch.is_expert == (name == "sft_loss")]
            with branch():
                loss = losses(model, own)[name]
                mixer.backward(loss) if mode == "branches" else (mixer.weight * loss).backward()
        mixer.step()
    assert_close(mixer.statistics, wanted)


def test_checkpointing_still_frees_what_it_recomputes():
    """The inputs that are kept go the way of everything that a checkpointed layer saves."""
    lin = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
    mixer = patched(lin)
    kept = []

    def pack(t):
        kept.append(t.shape)
        return t

    x = torch.randn(6, 5, 64)
    with mixer.batch(is_expert=[True, False] * 3):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = checkpoint(lin, x, use_reentrant=False)
        assert kept == [torch.Size([6, 5, 64])], "what goes into the checkpoint, and nothing of its layers"
        mixer.mixed_loss(sft_loss=y[::2].square().sum(), rl_loss=y[1::2].sum()).backward()
    mixer.step()
    assert float(mixer.statistics.n_s) == 3


def test_what_a_layer_saw_is_let_go_with_its_pass():
    import gc
    import weakref

    model = torch.nn.Linear(8, 8)
    mixer = patched(model)
    x = torch.randn(4, 8)
    seen = weakref.ref(x.untyped_storage())
    with mixer.batch(is_expert=[True, False, True, False]):
        y = model(x)
        loss = mixer.mixed_loss(sft_loss=y[::2].sum(), rl_loss=y[1::2].square().sum())
        loss.backward()
        del x, y
        gc.collect()
        assert seen() is None, "the loss is alive, its graph is not"


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_compiled_models(how):
    """The whole without a break, so that a compiler that may break has nothing else to do."""
    model, batch = small(), mixed()
    wanted = expected(model, [batch])
    compile = functools.partial(torch.compile, backend="aot_eager", dynamic=False)
    mixer = patched(model)
    target = model
    if how == "whole":
        target = compile(model, fullgraph=True)
    else:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", dynamic=False)
    assert_close(step(mixer, target, batch), wanted)
    model.zero_grad()
    assert_close(step(mixer, target, batch), wanted)


def test_compiled_before_the_patch():
    model, batch = small(), mixed()
    wanted = expected(model, [batch])
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(input_ids=batch.ids)
    mixer = patched(model)
    assert_close(step(mixer, compiled, batch), wanted)


@pytest.mark.parametrize("everything", [True, False])
def test_bfloat16_autocast(everything):
    """Both see the products of bfloat16: what differs is how a row at a time is rounded."""
    model, batch = small(), mixed(8)
    autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    with autocast():
        wanted = expected(model, [batch])
    mixer = patched(model)
    if everything:
        with autocast():
            step(mixer, model, batch)
    else:
        with mixer.batch(is_expert=batch.is_expert):
            with autocast():
                parts = losses(model, batch)
            mixer.mixed_loss(**parts).backward()
        mixer.step()
    assert_close(mixer.statistics, wanted, rel=0.02)


def test_sketches_are_made_in_float32_under_autocast():
    """The same pass of a float32 layer, inside of an autocast and outside: the same bits."""
    model, batch = torch.nn.Linear(200, 200), torch.randn(4, 6, 200)
    found = []
    for enabled in (True, False):
        mixer = gac.patch(model, estimator="sequence", law="fixed", mu=0.3)
        with mixer.batch(is_expert=[True, False, True, False]):
            y = model(batch).square().sum((1, 2))
            loss = mixer.mixed_loss(sft_loss=y[::2].sum(), rl_loss=y[1::2].sum())
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss.backward()
        mixer.step()
        found.append(float(mixer.statistics.sigma_s2))
        mixer.unpatch()
    assert found[0] == found[1]


def test_a_model_in_bfloat16():
    model, batch = small().to(torch.bfloat16), mixed(8)
    wanted = expected(model, [batch])
    mixer = patched(model)
    assert_close(step(mixer, model, batch), wanted, rel=0.02)


def test_a_scaled_loss():
    model, batch = small(), mixed()
    wanted = expected(model, [batch])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    mixer = patched(model, scaler=scaler)
    with mixer.batch(is_expert=batch.is_expert):
        scaler.scale(mixer.mixed_loss(**losses(model, batch))).backward()
    mixer.step()
    assert_close(mixer.statistics, wanted)


@pytest.mark.parametrize("mode", ["batch", "branch"])
def test_passes_of_two_threads_at_once_are_refused(mode):
    """The second meets the first in the middle of its pass."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    mixer = patched(model)
    said: list[str] = []

    def inside(gradient):
        def other():
            try:
                loss_of_other.backward()
            except RuntimeError as error:
                said.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with mixer.batch(is_expert=[True, False]) if mode == "batch" else mixer.sft():
        loss, loss_of_other = (
            mixer.mixed_loss(sft_loss=y[0].sum(), rl_loss=y[1].sum()) if mode == "batch" else mixer.weight * y.sum()
            for y in (model(torch.randn(2, 8)), model(torch.randn(2, 8)))
        )
        handle = model[0].weight.register_hook(inside)
        loss.backward()
        handle.remove()
    assert len(said) == 1
    assert "at once" in said[0]
    mixer.step()
    assert float(mixer.statistics.nonfinite) > 0, "the step is broken"
