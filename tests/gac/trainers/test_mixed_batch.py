"""One backward over a mixed batch: values, gradients, what is missing, ranks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gac
from gac.saved import VERSION
from gac.trainers.mixed_batch import METRICS, MixedBatch, coefficient_mixer, count_step
from tests.gac.distributed.processes import on_ranks

VOCABULARY, LENGTH, HIDDEN = 11, 6, 5


def policy(dtype=torch.float32):
    """A bag-of-hidden-states 'model': logits = hidden @ weight."""
    torch.manual_seed(0)
    return torch.nn.Linear(HIDDEN, VOCABULARY).to(dtype)


def batch(rows=6, experts=3, seed=0, dtype=torch.float32):
    """Hidden states, taken tokens and what a trainer knows of them; the first ``experts`` rows are demonstrations."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LENGTH + 1, (rows, 1), generator=g)
    return {
        "hidden": torch.randn(rows, LENGTH, HIDDEN, generator=g, dtype=torch.float64).to(dtype),
        "taken": torch.randint(0, VOCABULARY, (rows, LENGTH), generator=g),
        "shift": 0.3 * torch.randn(rows, LENGTH, generator=g, dtype=torch.float64).to(dtype),
        "advantages": torch.randn(rows, generator=g, dtype=torch.float64).to(dtype),
        "mask": (torch.arange(LENGTH) < lengths).to(dtype),
        "is_expert": torch.arange(rows) < experts,
    }


def rows_of(data, keep):
    return {name: value[keep] for name, value in data.items()}


def logprobs_of(model, data):
    return model(data["hidden"]).log_softmax(-1).gather(-1, data["taken"][..., None]).squeeze(-1)


def ppo(tokens):
    """The clipped loss summed over tokens, divided by ``tokens``."""

    def loss(logprobs, old_logprobs, advantages, mask):
        ratio = (logprobs - old_logprobs).exp()
        worst = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
        return (worst * mask).sum() / tokens

    return loss


def mean_ppo(logprobs, old_logprobs, advantages, mask):
    """As some trainers write it: the mean of a selection, NaN when nothing is selected."""
    return (-advantages * (logprobs - old_logprobs).exp())[mask > 0].mean()


def loss_of(mixed, model, data, *, policy_loss=None, counts=None, ranks=1):
    logprobs = logprobs_of(model, data)
    counts = counts or count_step([data["mask"]], [data["is_expert"]])
    return mixed.loss(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() + data["shift"],
        advantages=data["advantages"],
        mask=data["mask"],
        is_expert=data["is_expert"],
        policy_loss=policy_loss or ppo(counts.rl_tokens.clamp(min=1)),
        sft_tokens=counts.sft_tokens,
        ranks=ranks,
    )


def by_hand(model, data, mu, phi=False):
    """The same, row by row in plain Python over the model's logits."""
    logprobs = logprobs_of(model, data)
    sft, rl, sft_tokens, rl_tokens = 0.0, 0.0, 0, 0
    for b in range(len(logprobs)):
        for t in range(LENGTH):
            if not data["mask"][b, t]:
                continue
            logp = logprobs[b, t]
            if data["is_expert"][b]:
                p = logp.detach().exp()
                sft, sft_tokens = sft - logp * (p * (1 - p) if phi else 1.0), sft_tokens + 1
            else:
                a, ratio = data["advantages"][b], (logp - (logp.detach() + data["shift"][b, t])).exp()
                rl, rl_tokens = rl + torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)), rl_tokens + 1
    return mu * sft / max(sft_tokens, 1) + (1 - mu) * rl / max(rl_tokens, 1)


@pytest.mark.parametrize("phi", [False, True])
@pytest.mark.parametrize("experts", [0, 3, 6], ids=["no-demonstrations", "both", "no-rollouts"])
def test_loss_and_gradient_against_float64(experts, phi):
    data, model = batch(experts=experts), policy()
    mixed = MixedBatch(law="fixed", mu=0.3, phi=phi)
    result = loss_of(mixed, model, data)
    result.loss.backward()
    exact_model = policy(torch.float64)
    exact = by_hand(exact_model, batch(experts=experts, dtype=torch.float64), 0.3, phi)
    exact.backward()
    # float32: rounding of some tens of products, relative to the largest term
    torch.testing.assert_close(result.loss.double(), exact, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(model.parameters(), exact_model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("experts", [0, 6])
def test_a_policy_loss_that_divides_by_nothing_gives_no_nan(experts):
    data, model = batch(experts=experts), policy()
    data["advantages"][data["is_expert"]] = float("nan")
    data["shift"][data["is_expert"]] = float("inf")
    result = loss_of(MixedBatch(), model, data, policy_loss=mean_ppo)
    result.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (result.sft_loss if experts == 0 else result.rl_loss) == 0


def test_no_rows_give_a_zero_with_a_graph():
    data, model = rows_of(batch(), slice(0, 0)), policy()
    counts = count_step([batch()["mask"]], [batch()["is_expert"]])
    result = loss_of(MixedBatch(), model, data, counts=counts)
    result.loss.backward()
    assert result.loss == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("split", [1, 2, 3, 6])
def test_micro_batches_add_up_to_the_whole(split):
    """With the step's counts as divisors, gradient and statistics do not depend on how the step is cut."""

    def run(pieces):
        model, mixed = policy(), MixedBatch(law="fixed", mu=0.4)
        data = batch()
        order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
        counts = count_step([data["mask"]], [data["is_expert"]])
        for part in order.chunk(pieces):
            loss_of(mixed, model, rows_of(data, part), counts=counts).loss.backward()
        mixed.step()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), mixed.mixer.statistics

    gradient, statistics = run(split)
    whole, whole_statistics = run(1)
    torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-7)
    for name in ("sigma_s2", "sigma_r2", "delta_g2", "n_s", "n_r"):
        torch.testing.assert_close(getattr(statistics, name), getattr(whole_statistics, name), rtol=1e-5, atol=1e-9)


def test_the_estimator_is_fed_and_the_optimizer_followed():
    data, model, mixed = batch(), policy(), MixedBatch()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.0) for _ in range(2))
    start = mixed.mu
    other.step()  # of another model in the same process: nothing was seen yet
    loss_of(mixed, model, data).loss.backward()
    assert mixed.metrics() == pytest.approx(
        {f"gac/{n}": start if n == "mu" else float("nan") for n in METRICS}, nan_ok=True
    )
    optimizer.step()
    expected = gac.coefficient_statistics(logprobs_of(model, data), data["advantages"], data["mask"], data["is_expert"])
    metrics = mixed.metrics()
    for name in ("sigma_s2", "sigma_r2", "delta_g2", "n_s", "n_r"):
        assert metrics[f"gac/{name}"] == pytest.approx(float(getattr(expected, name)), rel=1e-5)
    mu = float(mixed.mu)
    assert mu != start
    other.step()  # a second optimizer of the same step (ZeRO's groups) ends no step of its own
    assert float(mixed.mu) == mu
    assert mixed.mixer.controller.steps == 1
    mixed.close()
    mixed.open(torch.device("cpu"))
    mixed.close()


def test_the_law_learns_the_momentum_of_the_optimizer_that_stepped():
    data, model, mixed = batch(), policy(), MixedBatch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.8, 0.99))
    loss_of(mixed, model, data).loss.backward()
    optimizer.step()
    told = gac.coefficient_statistics(logprobs_of(model, data), data["advantages"], data["mask"], data["is_expert"])
    expected = gac.Controller("gac", momentum=0.8).update(told)
    assert float(mixed.mu) == pytest.approx(float(expected), rel=1e-5)
    mixed.close()


def test_evaluation_feeds_nothing():
    data, model, mixed = batch(), policy(), MixedBatch()
    with torch.no_grad():
        loss_of(mixed, model, data)
    mixed.step()
    assert mixed.mixer.controller.steps == 0


def test_one_backward_through_mixed_loss():
    """``Mixer.mixed_loss`` alone, with a model that is patched: auto turns to the coefficients in such a step."""
    model, data = policy(), batch()
    with gac.patch(model, law="gac", cap=1.0) as mixer:
        for _ in range(2):
            logprobs = logprobs_of(model, data)
            kept = data["mask"] > 0
            expert = kept & data["is_expert"][:, None]
            sft = -torch.where(expert, logprobs, 0.0).sum() / expert.sum()
            rl = ppo((kept & ~expert).sum())(
                logprobs, logprobs.detach(), data["advantages"][:, None], (kept & ~expert).float()
            )
            mu = mixer.mu
            loss = mixer.mixed_loss(sft_loss=sft, rl_loss=rl)
            torch.testing.assert_close(loss, mu * sft + (1 - mu) * rl)
            mixer.observe_tokens(logprobs.detach(), data["advantages"], data["mask"], data["is_expert"])
            loss.backward()
            mixer.step()
            model.zero_grad()
        assert mixer.metrics()["estimator"] == "coefficient"
        assert mixer.statistics.n_s == 3
        assert mixer.statistics.n_r == 3


@pytest.mark.parametrize("missing", ["sft", "rl"])
def test_mixed_loss_takes_a_plain_zero_for_a_branch_without_data(missing):
    model = policy()
    loss = model(torch.ones(2, HIDDEN)).square().mean()
    parts = {"sft_loss": loss, "rl_loss": loss} | {f"{missing}_loss": torch.zeros(())}
    with gac.patch(model, estimator="coefficient", law="fixed", mu=0.25) as mixer:
        mixer.mixed_loss(**parts).backward()
        weight = 0.75 if missing == "sft" else 0.25
    (expected,) = torch.autograd.grad(weight * model(torch.ones(2, HIDDEN)).square().mean(), [model.weight])
    torch.testing.assert_close(model.weight.grad, expected)


def test_state_continues_exactly():
    model = policy()

    def run(mixed, steps):
        for step in steps:
            loss_of(mixed, model, batch(seed=step)).loss.backward()
            mixed.step()
        return mixed

    straight = run(MixedBatch(follow_optimizer=False), range(6))
    half = run(MixedBatch(follow_optimizer=False), range(3))
    resumed = pickle.loads(pickle.dumps(MixedBatch(follow_optimizer=False)))  # as sent to a worker
    resumed.load_state_dict(half.state_dict())
    assert resumed.state_dict() is not None
    run(resumed, range(3, 6))
    assert torch.equal(straight.mu, resumed.mu)


NONSENSE = [
    (("controller", "state", "mu"), torch.tensor(7.0, dtype=torch.float64), '["mu"] must be a number in [0, 1], got 7'),
    (("controller", "steps"), -5, '["steps"] must be a whole number'),
    (("controller", "law"), "fixed", "of law 'fixed', this controller has 'gac'"),
    (("skipped",), "text", '["skipped"] must be a tensor'),
    (("uncertainty",), {}, "lacks average"),
    (("means",), [{"sft.mean": torch.zeros(3)}], '["means"][0] lacks sft.square, sft.step, sft.weight'),
    (("version",), VERSION + 1, "a newer gac wrote it"),
]


@pytest.mark.parametrize(("place", "value", "message"), NONSENSE)
@pytest.mark.parametrize("begun", [False, True])
def test_a_state_of_nonsense_is_refused_at_once(place, value, message, begun):
    """Before the first loss too, when no mixer is there yet that could refuse it."""
    model, mixed = policy(), MixedBatch(follow_optimizer=False)
    loss_of(mixed, model, batch(seed=0)).loss.backward()
    mixed.step()
    good, bad = mixed.state_dict(), mixed.state_dict()
    part = bad
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    other = MixedBatch(follow_optimizer=False)
    other.load_state_dict(good)
    if begun:
        other.open(torch.device("cpu"))
    before, mu = str(other.state_dict()), float(other.open(torch.device("cpu")).mu) if begun else other.mu
    with pytest.raises((TypeError, ValueError)) as raised:
        other.load_state_dict(bad)
    assert message in str(raised.value)
    assert str(other.state_dict()) == before
    assert float(other.mu) == mu
    assert str(other.state_dict()) == str(good)


def test_a_state_that_was_loaded_is_nobody_elses():
    model, mixed = policy(), MixedBatch(follow_optimizer=False)
    loss_of(mixed, model, batch(seed=0)).loss.backward()
    mixed.step()
    state, other = mixed.state_dict(), MixedBatch(follow_optimizer=False)
    other.load_state_dict(state)
    for holder in (state, other.state_dict()):
        holder["controller"]["state"]["mu"].fill_(7.0)
    assert float(other.open(torch.device("cpu")).mu) == float(mixed.mu)


def test_a_state_from_before_the_first_loss_begins_anew():
    fresh, model, mixed = MixedBatch(), policy(), MixedBatch(follow_optimizer=False)
    loss_of(mixed, model, batch(seed=0)).loss.backward()
    mixed.step()
    assert mixed.metrics()["gac/mu"] != fresh.mu
    mixed.load_state_dict(fresh.state_dict())
    assert mixed.mu == fresh.mu == mixed.metrics()["gac/mu"]
    assert mixed.state_dict() is None


def test_pickled_before_its_first_loss():
    mixed = pickle.loads(pickle.dumps(MixedBatch(law="fixed", mu=0.7)))
    assert mixed.mu == pytest.approx(0.7)
    with pytest.raises(RuntimeError, match="first loss"):
        _ = mixed.mixer


def test_errors():
    with pytest.raises(ValueError, match="follows kl"):
        MixedBatch(law="kl-ctrl")
    data = batch()
    data["is_expert"] = data["is_expert"][:, None]
    with pytest.raises(ValueError, match=r"is_expert must have the shape \(6,\)"):
        loss_of(MixedBatch(), policy(), data, counts=count_step([batch()["mask"]], [batch()["is_expert"]]))


def test_a_mixer_without_a_model():
    mixer = coefficient_mixer("cpu", law="fixed", mu=0.2)
    assert mixer.nbytes == 0
    assert float(mixer.mu) == pytest.approx(0.2)
    mixer.unpatch()


# -- ranks ------------------------------------------------------------------------------------------------------------

STEPS = 4


def rank_batches(step, rank):
    """Rank 0 has no demonstrations in step 1, rank 1 no rollouts in step 2 and nothing at all in a micro-batch of 3."""
    experts = {(1, 0): 0, (2, 1): 4}.get((step, rank), 2)
    parts = [
        batch(rows=4, experts=experts, seed=10 * step + rank),
        batch(rows=4, experts=2, seed=100 + 10 * step + rank),
    ]
    if (step, rank) in ((1, 0), (2, 1)):
        parts[1] = rows_of(parts[1], parts[1]["is_expert"] == (rank == 1))
    if (step, rank) == (3, 1):
        parts[1] = rows_of(parts[1], slice(0, 0))
    return parts


def train(ranks, world, reduce=lambda model: None):
    model, mixed = policy(), MixedBatch(cap=1.0, follow_optimizer=False)
    mus = []
    for step in range(STEPS):
        parts = [part for rank in ranks for part in rank_batches(step, rank)]
        counts = count_step([p["mask"] for p in parts], [p["is_expert"] for p in parts])
        for part in parts:
            scaled = lambda **kw: world * ppo(counts.rl_tokens)(**kw)  # noqa: B023 - used at once
            loss_of(mixed, model, part, counts=counts, policy_loss=scaled, ranks=world).loss.backward()
        reduce(model)
        with torch.no_grad():  # plain descent: importing an optimizer's machinery takes each process seconds
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
        mixed.step()
        mus.append(float(mixed.mu))
    mixed.close()
    return mus, [p.detach() for p in model.parameters()]


def average(model):
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def on_a_rank(rank, world):
    return train([rank], world, average)


@pytest.mark.timeout(60)
def test_two_ranks_with_unequal_branches_equal_one_process(tmp_path: Path):
    (mus, parameters), other = on_ranks(2, tmp_path, on_a_rank, preload=__name__, seconds=50)
    assert mus == other[0]
    assert all(torch.equal(a, b) for a, b in zip(parameters, other[1], strict=True))
    alone, alone_parameters = train([0, 1], 1)
    assert mus == pytest.approx(alone, rel=1e-5)
    for ours, theirs in zip(parameters, alone_parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
