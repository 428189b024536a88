"""An agent loop of verl that now and then returns a demonstration where a rollout was asked for, and labels both.

`agents.yaml` names it, `run.sh` makes it the default one. The demonstration of a prompt is the text
`extra_info["demonstration"]` of its row; a row without one, as those of validation are, has rollouts alone.
"""

import random
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


class DemonstrationAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn loop, with demonstrations in a share of the answers.

    Args:
        share: of the answers that are demonstrations; 1/8 gives each prompt about one where `rollout.n` is 8.
    """

    def __init__(self, *args: Any, share: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share = share

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        text = (kwargs.get("extra_info") or {}).get("demonstration")
        if text and random.random() < self.share:
            output = await self.demonstrate(text, sampling_params, kwargs["raw_prompt"])
        else:
            output = await super().run(sampling_params, **kwargs)
            output.extra_fields["is_expert"] = False
        return output

    async def demonstrate(self, text: str, sampling_params: dict[str, Any], messages: Any) -> AgentLoopOutput:
        """The demonstration as if the model had written it, end token included."""
        prompt = await self.ct_build_initial_tokens(list(messages))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        ids = ids[: self.response_length]
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=ids,
            response_mask=[1] * len(ids),
            response_logprobs=[0.0] * len(ids) if sampling_params.get("logprobs") else None,  # no loss reads them
            num_turns=2,
            metrics={},
            extra_fields={"is_expert": True, "turn_scores": [], "tool_rewards": []},
        )
