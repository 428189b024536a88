import sys

import torch

from gac.losses import sft_token_loss
from gac.tasks.characters import build_character_tokenizer
from gac.trainers.demonstrations import DemonstrationCollator, EpochSampler
from tests.gac.trainers.conftest import DEMONSTRATIONS, tiny_model
from tests.gac.trainers.ranks import run_here


def run_ranks(folder):
    """Two gloo ranks on this machine; returns what each wrote."""
    run_here([sys.executable, "-m", "tests.gac.trainers.ddp_worker", str(folder)])
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_ranks_agree_and_the_sft_gradient_is_the_token_mean_over_all_of_them(tmp_path):
    ranks = run_ranks(tmp_path)
    # 2 ranks x 2 micro-batches x 4 demonstrations
    model = tiny_model()
    window = DemonstrationCollator(build_character_tokenizer(), DEMONSTRATIONS)(EpochSampler(50, 5).take(0, 16))
    logits = model(input_ids=window.input_ids, attention_mask=window.attention_mask).logits
    sft_token_loss(logits, window.labels).backward()
    for rank in ranks:
        assert rank["sft"]["world"] == 2
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(rank["sft"]["gradients"][0][name], parameter.grad, rtol=1e-4, atol=1e-7)

    left, right = (rank["gac"] for rank in ranks)
    assert torch.equal(left["mu"], right["mu"])
    assert left["statistics"] == right["statistics"]
    assert left["statistics"]["n_s"] == left["statistics"]["n_r"] == 4
    assert all(torch.equal(value, right["weights"][name]) for name, value in left["weights"].items())

    # prompts of the two ranks go different ways, yet every rank runs the same backwards and ends with the same model
    for law in ("hpt", "luffy", "relift"):
        left, right = (rank[law] for rank in ranks)
        assert len(left["gradients"]) == 4
        for one, other in zip(left["gradients"], right["gradients"], strict=True):
            assert all(torch.equal(gradient, other[name]) for name, gradient in one.items())
        assert all(torch.equal(value, right["weights"][name]) for name, value in left["weights"].items())
    assert ranks[0]["relift"]["queues"] == ranks[1]["relift"]["queues"]
    assert ranks[0]["relift"]["queues"][0]
