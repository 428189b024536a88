"""What cannot be combined is refused when the trainer is made, in one line that names the option."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOTrainer

from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS

SHOWN = [{"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "1+1"}]}]
WITH_IMAGES = [row | {"image": None} for row in PROMPTS]
ADAPTERS = {"r": 2, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": WITH_IMAGES}, "train_dataset has images in column 'image'"),
        ({"prompts": [{"prompt": SHOWN}]}, "train_dataset has images in column 'prompt'"),
        ({"eval_dataset": {"one": Dataset.from_list(WITH_IMAGES)}}, "eval_dataset has images in column 'image'"),
        (
            {"sft_dataset": [row | {"images": []} for row in DEMONSTRATIONS]},
            "sft_dataset has images in column 'images'",
        ),
        ({"sft_dataset": [{"messages": SHOWN}]}, "sft_dataset has images in column 'messages'"),
    ],
)
def test_images(trainer, options, words):
    line = f"^{words}: image inputs are not served; use text alone, or trl.GRPOTrainer$"
    with pytest.raises(ValueError, match=line):
        trainer(**options)


@pytest.mark.parametrize(("law", "given"), [("gac", DEMONSTRATIONS), ("hpt", None)])
def test_images_that_come_later(trainer, monkeypatch, law, given):
    """From a stream, a tool or an environment."""
    score = GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(
        GRPOTrainer, "_generate_and_score_completions", lambda self, rows: score(self, rows) | {"num_images": [1]}
    )
    run = trainer(prompts=[row | {"demonstration": "1"} for row in PROMPTS], law=law, sft_dataset=given)
    with pytest.raises(ValueError, match="brought images: image inputs are not served"):
        run.train()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_vllm": True}, ImportError, "vLLM is not available and `use_vllm`"),
        ({"sync_ref_model": True}, ValueError, "sync_ref_model=True` while `beta=0.0`"),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            ValueError,
            "fused_linear_cross_entropy.*is not supported",
        ),
        (
            {"sync_ref_model": True, "beta": 0.1, "peft_config": LoraConfig(target_modules=["q_proj"], **ADAPTERS)},
            NotImplementedError,
            "sync_ref_model=True` while using a PEFT",
        ),
        (
            {"peft_config": LoraConfig(target_modules=["lm_head"], **ADAPTERS)},
            ValueError,
            "adapter to `lm_head` is not",
        ),
    ],
)
def test_what_trl_refuses_stays_refused(trainer, options, error, message):
    with pytest.raises(error, match=message):
        trainer(**options)
