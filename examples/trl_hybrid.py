"""TRL's GRPO with demonstrations in the chat format (`messages`) beside the rewards: `HybridGRPOTrainer`.

    python examples/trl_hybrid.py --max-steps 40

Takes about a minute on one CPU core and needs `pip install '.[train]'`. A model of 0.3 M parameters, built on the spot,
learns greatest common divisors: reasoning-gym draws problems and answers, a short supervised start brings the model to
where some samples are right, then both branches train it together. With a model of your own, replace what `small_model`
returns, leave the start out, and drop `use_cpu`. Forty steps show how the parts fit; `gac train` runs four hundred.
"""

import argparse
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback

from gac.tasks.characters import build_character_tokenizer
from gac.tasks.evaluation import accuracy
from gac.tasks.models import build_small_model
from gac.tasks.problems import build_splits, exact_match_reward, parse_task
from gac.tasks.warm_start import warm_start
from gac.trainers import HybridGRPOConfig, HybridGRPOTrainer

TASK = "gcd:numbers=2,max_value=40"
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{{ eos_token if message.role == 'assistant' }}{% endfor %}"
)


def small_model() -> tuple[Any, Any]:
    """A model and its tokenizer, whose chat template puts questions and answers one after another."""
    tokenizer = build_character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return build_small_model(tokenizer), tokenizer


def main() -> None:
    options = argparse.ArgumentParser(description="GRPO with demonstrations in the chat format.")
    options.add_argument("--max-steps", type=int, default=40, help="optimizer steps")
    options.add_argument("--start-steps", type=int, default=100, help="supervised steps before them")
    options.add_argument("--out", default="runs/trl_hybrid", help="folder of the run")
    args = options.parse_args()

    model, tokenizer = small_model()
    problems = build_splits([parse_task(TASK)], heldout=100, demonstrations=100, prompts=300, seed=0)
    ask = lambda problem: {"role": "user", "content": problem.prompt}
    demonstrations = Dataset.from_list(
        [{"messages": [ask(p), {"role": "assistant", "content": p.answer}]} for p in problems.demonstrations]
    )
    prompts = Dataset.from_list([{"prompt": [ask(p)], "answer": p.answer} for p in problems.prompts])
    heldout = [{"prompt": [ask(p)], "answer": p.answer} for p in problems.heldout]
    warm_start(model, tokenizer, demonstrations, steps=args.start_steps, batch_size=16, lr=3e-3, seed=0)
    print(f"held out before: {accuracy(model, tokenizer, heldout, max_new_tokens=4):.0%}")

    trainer = HybridGRPOTrainer(
        model,
        exact_match_reward,
        HybridGRPOConfig(
            output_dir=args.out,
            max_steps=args.max_steps,
            per_device_train_batch_size=32,  # rollouts of four prompts in a micro-batch
            num_generations=8,
            gradient_accumulation_steps=2,
            sft_batch_size=16,
            max_completion_length=4,
            learning_rate=1e-3,
            logging_steps=max(args.max_steps // 4, 1),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=prompts,
        sft_dataset=demonstrations,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # of every number at every log; those asked for are printed below
    trainer.train()
    print(f"held out after: {accuracy(model, tokenizer, heldout, max_new_tokens=4):.0%}")
    for entry in trainer.state.log_history:
        if "gac/mu" in entry:
            print(f"step {entry['step']}: mu {entry['gac/mu']:.3f}, reward {entry['reward']:.2f}")
    print(f"time in GAC {trainer.mixer.metrics()['overhead']:.2%}")


if __name__ == "__main__":
    main()
