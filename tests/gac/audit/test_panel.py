import pytest
import torch

import gac
from gac.audit.panel import COEFFICIENT_FORMS, ESTIMATORS, EXACT, INCOMING, SKETCH, TEMPORAL, Panel, Probe, Watched
from gac.audit.record import three
from gac.statistics import Branch

FIELDS = ("sigma_s2", "sigma_r2", "delta_g2", "distance2", "norm_s2", "norm_r2", "dot", "n_s", "n_r", "nonfinite")


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))


def coefficients(seed, expert):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(4, 5, generator=generator)
    return logprobs, torch.randn(4, generator=generator), torch.ones(4, 5), torch.full((4,), expert)


def take_step(mixer, net, *, seed, tokens=(3, 5, 2), micro_batches=3):
    """A step of both branches, as the hybrid trainer does it."""
    generator = torch.Generator().manual_seed(seed)
    net.zero_grad()
    for k in range(micro_batches):
        x = torch.randn(tokens[k], 6, generator=generator)
        with mixer.rl():
            (net(x).square().mean() * mixer.weight).backward()
        mixer.observe_tokens(*coefficients(100 * seed + k, False))
        with mixer.sft(tokens=tokens[k]):
            ((net(x) - x[:, :3]).square().sum() / sum(tokens) * mixer.weight).backward()
        mixer.observe_tokens(*coefficients(100 * seed + k + 50, True))


def assert_same(found, expected, fields=FIELDS, rtol=1e-5):
    for name in fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=rtol, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_panel_says_what_the_mixer_says(estimator):
    net = model()
    panel = Panel(net)
    with gac.patch(net, estimator=estimator) as mixer:
        for seed in range(3):
            take_step(Watched(mixer, panel), net, seed=seed)
            found = panel.read()
            mixer.step()
            assert tuple(found) == ESTIMATORS
            assert_same(found[estimator], mixer.statistics)
            assert_same(panel.advance(found)[estimator], mixer.statistics, ("sigma_s2_se", "delta_g2_se"), rtol=1e-4)
            assert_same(found["coefficient"], mixer.coefficient, ("sigma_s2", "sigma_r2", "delta_g2", "n_s", "n_r"))
            panel.clear()
    panel.remove()
    net(torch.ones(1, 6)).sum().backward()  # no hooks are left


def test_sequences_are_rows_and_groups():
    """As a mixer with that estimator says of the same passes; new steps have new signs, and one step stays one."""
    net = model()
    panel, found = Panel(net, generations=2), []
    with gac.patch(net, estimator="sequence", interval=1) as mixer:
        for _ in range(2):
            net.zero_grad()
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(6, 6, generator=generator)
            watched = Watched(mixer, panel)
            with watched.sft():
                (net(x).square().mean() * mixer.weight).backward()
            with watched.rl():
                (net(x[:4]).mean() * mixer.weight).backward()
            found.append(panel.read()["sequence"])
            mixer.step()
            assert_same(found[-1], mixer.statistics, ("sigma_s2", "norm_s2", "norm_r2", "dot", "n_s"))
            assert (found[-1].n_r, mixer.statistics.n_r) == (2, 4)
            panel.clear()
    assert found[0].norm_s2 != found[1].norm_s2
    panel.remove()


def test_small_models_need_no_sketch_and_all_forms_of_the_coefficients_differ():
    net = model()
    panel = Panel(net)
    take_step(Probe(panel), net, seed=1)
    found = panel.read()
    for name in (SKETCH, INCOMING):  # every element has a bucket of its own
        assert_same(found[name], found[EXACT], rtol=1e-4)
    assert len({float(found[name].delta_g2) for name in COEFFICIENT_FORMS}) == len(COEFFICIENT_FORMS)
    expected = gac.coefficient_statistics(
        *(
            torch.cat(parts)
            for parts in zip(
                *(coefficients(s, e) for k in range(3) for s, e in ((100 + k, False), (150 + k, True))), strict=True
            )
        ),
        z_normalize=False,
    )
    assert_same(found["coefficient, raw"], expected, ("sigma_s2", "sigma_r2", "delta_g2"))


def test_temporal_compares_with_earlier_steps_alone():
    """As the mixer does for a lone contribution; drawn steps leave no trace in the means."""
    net, other = model(), model()
    panel = Panel(net)
    with gac.patch(other, estimator="exact") as mixer:
        for seed in range(4):
            take_step(Probe(panel), net, seed=seed, tokens=(5,), micro_batches=1)
            found = panel.read()
            assert panel.read()[TEMPORAL] is not found[TEMPORAL]
            panel.advance(found)
            panel.clear()
            take_step(Probe(panel), net, seed=seed + 10, tokens=(5,), micro_batches=1)
            panel.read()
            panel.clear()
            take_step(mixer, other, seed=seed, tokens=(5,), micro_batches=1)
            mixer.step()
            assert_same(found[TEMPORAL], mixer.statistics, ("sigma_s2", "sigma_r2", "delta_g2"), rtol=1e-4)
            assert torch.isnan(found[EXACT].sigma_s2)


def test_gradients_come_without_weights():
    net = model()
    panel = Panel(net)
    with gac.patch(net, law="fixed", mu=0.2) as mixer:
        take_step(Watched(mixer, panel), net, seed=3)
        mixed = torch.cat([p.grad.flatten() for p in net.parameters()]).double()
        found = {branch: x.double() for branch, x in panel.gradients().items()}
        total = 0.2 * found[Branch.SFT] + 0.8 * found[Branch.RL]
        torch.testing.assert_close(total.square().sort().values, mixed.square().sort().values)  # up to signs
        assert_same(panel.read()[EXACT], gac.Statistics(dot=found[Branch.SFT] @ found[Branch.RL]), ("dot",))
        mixer.step()


def test_the_mixer_notices_nothing_of_what_happens_aside():
    net, other = model(), model()
    panel = Panel(net)
    mixer, undisturbed = (gac.patch(x, estimator="exact") for x in (net, other))
    watched = Watched(mixer, panel)
    for seed in range(3):
        with watched.aside():
            take_step(Probe(panel), net, seed=seed + 20)
        panel.clear()
        take_step(watched, net, seed=seed)
        panel.clear()
        take_step(undisturbed, other, seed=seed)
        assert torch.equal(mixer.step(), undisturbed.step())
        assert_same(mixer.statistics, undisturbed.statistics, rtol=0)
    with pytest.raises(RuntimeError, match="outside a branch"):
        net(torch.ones(1, 6)).sum().backward()
    assert three(mixer.statistics).shape == (3,)
