"""The verl adapter, with a stand-in that has the signatures of verl 0.9.1, and with verl itself where it is importable.

Signatures from verl/workers/utils/losses.py (``ppo_loss``), verl/workers/utils/padding.py (``no_padding_2_padding``),
verl/workers/engine_workers.py (``TrainingWorker``, ``ActorRolloutRefWorker``), verl/utils/tensordict_utils.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from gac.files import DamagedFile
from gac.trainers.adapters import verl as adapter
from gac.trainers.mixed_batch import MixedBatch
from tests.gac.test_files import Malicious
from tests.gac.trainers.adapters.samples import (
    RESPONSE,
    Policy,
    clipped,
    losses_by_hand,
    row_gradients,
    row_mean,
    samples,
    token_mean,
)

INSTALLED = importlib.util.find_spec("verl") is not None and importlib.util.find_spec("tensordict") is not None
PROMPT = 3


class Batch(dict):
    """As much of a TensorDict as the adapter touches."""

    def select(self, *keys):
        return Batch({key: self[key] for key in keys})

    def to_padded_tensor(self):
        return Batch(self)

    def copy(self):
        return Batch(self)


class Engine:
    def get_data_parallel_group(self):
        return None


class TrainingWorker:
    """Takes a step as verl does: counts, micro-batches, one backward each."""

    def __init__(self, config=None):
        self.engine, self.loss_fn = Engine(), None

    def set_loss_fn(self, loss_fn):
        self.loss_fn = loss_fn

    def train_batch(self, data):
        self.seen = data
        return data

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        return None

    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False):
        return None


class ActorRolloutRefWorker:
    actor_worker_cls = TrainingWorker


def ppo_loss(config, model_output, data, dp_group=None):
    """Clipped loss, summed over the response tokens, over the tokens of the global batch."""
    fields = data.select("response_mask", "old_log_probs", "advantages").to_padded_tensor()
    mask = fields["response_mask"]
    losses = clipped(model_output["log_probs"], fields["old_log_probs"], fields["advantages"])
    loss = (losses * mask).sum() / data["batch_num_tokens"] * data["dp_size"]
    return loss, {"actor/pg_loss": float(loss.detach())}


def assign_non_tensor(tensor_dict, **kwargs):
    tensor_dict.update(kwargs)


class StandIn:
    worker_cls, actor_cls = TrainingWorker, ActorRolloutRefWorker

    def __init__(self, package):
        package(
            {
                "verl.utils.tensordict_utils": {
                    "assign_non_tensor": assign_non_tensor,
                    "get": lambda tensordict, key, default=None: tensordict.get(key, default),
                },
                "verl.utils.device": {"get_device_id": lambda: "cpu"},
                "verl.workers.utils.padding": {"no_padding_2_padding": lambda tensor, data: tensor},
                "verl.workers.engine_workers": {
                    "TrainingWorker": TrainingWorker,
                    "ActorRolloutRefWorker": ActorRolloutRefWorker,
                },
            }
        )
        self.loss = partial(ppo_loss, config=None)

    def batch(self, s):
        """Fields of a mini-batch, and the model's output for it."""
        return Batch(
            response_mask=s.mask,
            old_log_probs=s.old_logprobs,
            advantages=s.advantages,
            is_expert=s.is_expert.tolist(),
            dp_size=1,
            batch_num_tokens=float(s.mask.sum()),
            global_batch_size=len(s.mask),
        )

    def output(self, s):
        return {"log_probs": s.logprobs}


class Installed:
    """verl's own loss, batches and worker class; no engine, which needs a GPU."""

    def __init__(self, monkeypatch, **options):
        import verl.utils.device
        from verl.workers.config import FSDPActorConfig
        from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
        from verl.workers.utils.losses import ppo_loss

        monkeypatch.setattr(verl.utils.device, "get_device_id", lambda: "cpu")
        monkeypatch.setattr(TrainingWorker, "__init__", lambda self, config=None: setattr(self, "engine", Engine()))
        monkeypatch.setattr(TrainingWorker, "train_batch", lambda self, data: setattr(self, "seen", data))
        for name in ("save_checkpoint", "load_checkpoint"):
            monkeypatch.setattr(TrainingWorker, name, lambda self, *args, **kwargs: None)
        self.worker_cls, self.actor_cls = TrainingWorker, ActorRolloutRefWorker
        monkeypatch.setattr(ActorRolloutRefWorker, "actor_worker_cls", TrainingWorker)
        config = FSDPActorConfig(
            strategy="fsdp",
            ppo_micro_batch_size_per_gpu=2,
            rollout_n=1,
            ppo_mini_batch_size=4,
            clip_ratio_c=1e9,
            **options,
        )
        self.loss = partial(ppo_loss, config=config)

    def batch(self, s):
        from tensordict import TensorDict
        from verl.utils import tensordict_utils as tu
        from verl.workers.utils.padding import left_right_2_no_padding

        rows = len(s.mask)
        attention = torch.cat([torch.ones(rows, PROMPT), s.mask], 1).long()
        ids = torch.arange(rows * (PROMPT + RESPONSE)).reshape(rows, -1)
        data = TensorDict(
            {
                "input_ids": ids,
                "attention_mask": attention,
                "position_ids": attention.cumsum(1) - 1,
                "prompts": ids[:, :PROMPT],
                "responses": ids[:, PROMPT:],
                "response_mask": s.mask,
                "old_log_probs": s.old_logprobs,
                "advantages": s.advantages,
            },
            batch_size=rows,
        )
        tu.assign_non_tensor_stack(data, "extra_fields", [{"is_expert": bool(e)} for e in s.is_expert])
        data = left_right_2_no_padding(data)
        data["attention_mask"] = attention
        tu.assign_non_tensor(
            data, dp_size=1, batch_num_tokens=float(s.mask.sum()), global_batch_size=rows, temperature=1.0
        )
        return data

    def output(self, s):
        """Log-probabilities as the engines give them: packed, token t at the position before it."""
        packed, lengths = [], []
        for row, mask in zip(s.logprobs, s.mask, strict=True):
            n = int(mask.sum())
            packed.append(torch.cat([torch.zeros(PROMPT - 1), row[:n], torch.zeros(1)]))
            lengths.append(PROMPT + n)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        return {"log_probs": torch.nested.nested_tensor_from_jagged(torch.cat(packed), offsets)}


@pytest.fixture(params=["stand-in", *(["verl"] if INSTALLED else [])])
def verl(request, package, monkeypatch):
    return StandIn(package) if request.param == "stand-in" else Installed(monkeypatch)


def worker(verl, **options):
    made = adapter.training_worker(**options)()
    made.set_loss_fn(verl.loss)
    return made


def step(verl, made, s, cuts):
    """A mini-batch in micro-batches of the rows in ``cuts``; returns the losses."""
    data = verl.batch(s)
    made.train_batch(data)
    losses = []
    for rows in cuts:
        micro = verl.batch(s.rows(rows))
        for key in adapter._COUNTS.values():
            assign(verl, micro, key, made.seen[key])
        loss, metrics = made.loss_fn(model_output=verl.output(s.rows(rows)), data=micro, dp_group=None)
        loss.backward()
        losses.append(loss.detach())
    return sum(losses), metrics


def assign(verl, data, key, value):
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor(data, **{key: value})


@pytest.mark.parametrize("cuts", [[[0, 1, 2, 3]], [[0, 3], [1, 2]], [[0], [1], [2], [3]]], ids=["one", "two", "four"])
def test_both_branches_are_token_means_of_the_whole_step(verl, cuts):
    made, s = worker(verl, law="fixed", mu=0.3), samples()
    loss, metrics = step(verl, made, s, cuts)
    other = samples()
    sft, rl = losses_by_hand(other)
    expected = 0.3 * token_mean(sft) + 0.7 * token_mean(rl)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(s.logprobs.grad, other.logprobs.grad)
    assert metrics["gac/mu"] == pytest.approx(0.3)
    assert any("pg_loss" in key for key in metrics), "verl's own metrics are passed on"


def test_mu_follows_the_optimizer(verl):
    made, s = worker(verl), samples()
    step(verl, made, s, [[0, 1], [2, 3]])
    before = float(made._mixed.mu)
    torch.optim.SGD([s.logprobs], lr=0.0).step()
    assert float(made._mixed.mu) != before
    assert made._mixed.mixer.statistics.n_s == 2
    made._mixed.close()


def test_inference_is_left_alone(verl):
    made, s = worker(verl), samples()
    with torch.no_grad():
        loss, _ = made.loss_fn(model_output=verl.output(s), data=verl.batch(s), dp_group=None)
        expected, _ = verl.loss(model_output=verl.output(s), data=verl.batch(s))
    torch.testing.assert_close(loss, expected)


def test_checkpoint(verl, tmp_path):
    made, s = worker(verl), samples()
    step(verl, made, s, [[0, 1, 2, 3]])
    made._mixed.step()
    made.save_checkpoint(str(tmp_path), None, 1, None)
    other = worker(verl)
    other.load_checkpoint(str(tmp_path))
    step(verl, other, samples(), [[0, 1, 2, 3]])
    assert torch.equal(other._mixed.mu, made._mixed.mu)
    with pytest.warns(UserWarning, match="mu starts anew"):
        worker(verl).load_checkpoint(str(tmp_path / "none"))


@pytest.mark.parametrize("damage", ["cut short", "malicious", "nonsense"])
def test_a_damaged_checkpoint_is_refused_before_the_engine_loads(verl, tmp_path, monkeypatch, damage):
    made, mark = worker(verl), tmp_path / "ran"
    step(verl, made, samples(), [[0, 1, 2, 3]])
    made._mixed.step()
    made.save_checkpoint(str(tmp_path), None, 1, None)
    path = tmp_path / adapter.STATE_FILE.format(rank=0)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        state = torch.load(path, weights_only=True)
        state["skipped"] = Malicious(mark) if damage == "malicious" else torch.tensor(-1.0)
        torch.save(state, path)
    other, loads = worker(verl), []
    monkeypatch.setattr(type(other).__mro__[1], "load_checkpoint", lambda *a, **k: loads.append(1), raising=False)
    with pytest.raises(DamagedFile, match="load another checkpoint") as raised:
        other.load_checkpoint(str(tmp_path))
    assert str(path) in str(raised.value)
    assert not loads
    assert not mark.exists()
    assert other._mixed.state_dict() is None


def test_install(verl):
    adapter.install(law="fixed", mu=0.2)
    adapter.install(law="fixed", mu=0.4)
    made = verl.actor_cls.actor_worker_cls
    assert made.__bases__ == (verl.worker_cls,), "once, with the newest options"
    verl.actor_cls.actor_worker_cls = verl.worker_cls


def test_rows_are_labelled_in_extra_fields_or_not_at_all():
    assert adapter.expert_rows({"extra_fields": [{"is_expert": True}, {}]}).tolist() == [True, False]
    assert adapter.expert_rows({"is_expert": torch.tensor([[0], [1]])}).tolist() == [False, True]
    with pytest.raises(KeyError, match="extra_fields"):
        adapter.expert_rows({"responses": torch.zeros(2)})


def test_without_counts(verl):
    s = samples()
    loss = adapter.MixedPpoLoss(verl.loss, MixedBatch())
    with pytest.raises(ValueError, match="token counts"):
        loss(verl.output(s), verl.batch(s))


def test_wrong_options_are_reported_at_once():
    with pytest.raises(TypeError, match="half_lif"):
        adapter.training_worker(SimpleNamespace, half_lif=2)


if INSTALLED:

    def test_counts_and_labels_reach_verls_micro_batches(monkeypatch):
        from verl.utils import tensordict_utils as tu
        from verl.workers.engine.utils import prepare_micro_batches

        verl = Installed(monkeypatch)
        made, s, other = worker(verl, law="fixed", mu=0.3), samples(), samples()
        data = verl.batch(s)
        made.train_batch(data)
        tu.assign_non_tensor(made.seen, use_dynamic_bsz=False, micro_batch_size_per_gpu=2, sp_size=1)
        micro_batches, _ = prepare_micro_batches(made.seen)
        assert len(micro_batches) == 2
        total = 0.0
        for k, micro in enumerate(micro_batches):
            output = verl.output(s.rows(slice(2 * k, 2 * k + 2)))
            loss, _ = made.loss_fn(model_output=output, data=micro, dp_group=None)
            total = total + loss
        sft, rl = losses_by_hand(other)
        torch.testing.assert_close(total, 0.3 * token_mean(sft) + 0.7 * token_mean(rl))

    def test_sequence_means_are_over_the_rollouts_rows(monkeypatch):
        verl = Installed(monkeypatch, loss_agg_mode="seq-mean-token-mean")
        made, s = worker(verl, law="fixed", mu=0.3), samples()
        loss, _ = step(verl, made, s, [[0, 3], [1, 2]])
        sft, rl = losses_by_hand(s)
        torch.testing.assert_close(loss, (0.3 * token_mean(sft) + 0.7 * row_mean(rl)).detach())

    def test_imported_by_verl(tmp_path):
        (tmp_path / "gac_verl.py").write_text("from gac.trainers.adapters import verl\n\nverl.install(law='gac')\n")
        code = (
            "import verl; from verl.workers.engine_workers import ActorRolloutRefWorker as W;"
            "print(W.actor_worker_cls.__name__)"
        )
        paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "VERL_USE_EXTERNAL_MODULES": "gac_verl"}
        found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert found.stdout.split()[-1:] == ["MixedTrainingWorker"], found.stderr


# -- gradients of sequences -------------------------------------------------------------------------------------------


def packed_batch(s, ids, **options):
    """Rows packed end to end, as the engines call the model; the fields that tell of it."""
    rows = list(torch.cat([ids, ids.new_zeros(len(ids), 0)], 1))
    return Batch(StandIn.batch(None, s), input_ids=torch.nested.nested_tensor(rows, layout=torch.jagged), **options)


def test_sequences_are_measured_in_the_packed_pass(package):
    verl, model, s = StandIn(package), Policy(), samples(rows=7)
    s.is_expert = torch.tensor([True, False, False, True, False, False, True])
    ids = torch.randint(0, 60, (7, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(1))
    made = worker(verl, estimator="sequence", sketch_size=64, law="fixed", mu=0.3)
    made.engine.module = model
    uid = ["x", "a", "b", "y", "b", "a", "z"]
    data = packed_batch(s, ids, uid=uid)
    made.train_batch(data)
    logprobs = model(data["input_ids"].values()[None])[0].view(7, -1)[:, -RESPONSE:]
    micro = packed_batch(s, ids, uid=uid, **{key: made.seen[key] for key in adapter._COUNTS.values()})
    loss, _ = made.loss_fn(model_output={"log_probs": logprobs}, data=micro, dp_group=None)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    found = made._mixed.mixer.statistics
    tokens = s.mask.sum(1)
    gradients = row_gradients(s, ids, (tokens[s.is_expert].sum(), tokens[~s.is_expert].sum()))
    rl = torch.stack([gradients[1] + gradients[5], gradients[2] + gradients[4]])
    assert (float(found.n_s), float(found.n_r)) == (3, 2)
    assert float(found.sigma_r2) == pytest.approx(float(2 * rl.var(0).sum()), rel=1e-4)
    total = sum(gradients[k] for k in (0, 3, 6))
    assert float(found.distance2) == pytest.approx(float((total - rl.sum(0)).square().sum()), rel=1e-4)
    made._mixed.close()


def test_engines_and_options_whose_layers_do_not_tell_are_refused(package):
    verl, s = StandIn(package), samples()
    made = worker(verl, estimator="sequence")
    with pytest.raises(ValueError, match=r"not with Engine.*coefficient"):
        made.train_batch(verl.batch(s))
    made.engine.module, made.engine.engine_config = Policy(), SimpleNamespace(ulysses_sequence_parallel_size=2)
    with pytest.raises(ValueError, match="ulysses_sequence_parallel_size=2"):
        made.train_batch(verl.batch(s))
    made.engine.engine_config.ulysses_sequence_parallel_size = 1
    made.train_batch(verl.batch(s))
    micro = verl.batch(s) | {key: made.seen[key] for key in adapter._COUNTS.values()}
    with pytest.raises(ValueError, match="use_fused_kernels"):
        made.loss_fn(model_output=verl.output(s), data=Batch(micro, use_fused_kernels=True), dp_group=None)
    made._mixed.close()
