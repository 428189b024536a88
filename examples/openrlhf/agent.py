"""OpenRLHF asks this executor for every answer: now and then it gives a demonstration; it rewards and labels them all.

`--train.agent_func_path` names this file. A prompt's label is JSON: `answer` and, in training rows, `demonstration`.
"""

import json
import random
from typing import Any

from openrlhf.utils.agent import SingleTurnAgentExecutor

from gac.tasks.chat import chat_match

SHARE = 0.125
"""Of the answers that are demonstrations: about one a prompt with `--rollout.n_samples_per_prompt 8`."""


class AgentExecutor(SingleTurnAgentExecutor):
    """OpenRLHF's single-turn executor, with demonstrations in a share of the answers."""

    async def execute(
        self,
        prompt: str,
        label: str,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        wanted = json.loads(label)
        text = wanted.get("demonstration")
        demonstrated = bool(text) and random.random() < SHARE
        if demonstrated:
            output = self.demonstrate(prompt, label, text, sampling_params, max_length, hf_tokenizer)
        else:
            output = await super().execute(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images)
        begin, end = output["action_ranges"][-1]
        reply = hf_tokenizer.decode(output["observation_tokens"][begin:end], skip_special_tokens=True)
        reward = chat_match(reply, wanted["answer"])
        # what stands in extra_logs reaches the actor as experience.info, where the adapter looks for is_expert
        return output | {"reward": reward, "scores": reward, "extra_logs": {"is_expert": float(demonstrated)}}

    def demonstrate(
        self, prompt: str, label: str, text: str, sampling_params: Any, max_length: int, hf_tokenizer: Any
    ) -> dict[str, Any]:
        """The demonstration as if the model had written it, end token included."""
        encode = lambda part: list(hf_tokenizer(part, add_special_tokens=False)["input_ids"])
        begin = encode(prompt)
        tokens = (begin + encode(text) + [hf_tokenizer.eos_token_id])[:max_length]
        return {
            "prompt": prompt,
            "label": label,
            "images": None,
            "mm_train_inputs": None,
            "observation_tokens": tokens,
            "action_ranges": [(len(begin), len(tokens))],
            # no loss reads them
            "rollout_log_probs": None if sampling_params.logprobs is None else [0.0] * len(tokens),
            "truncated": False,
        }
