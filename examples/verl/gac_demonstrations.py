"""An agent loop of verl that now and then returns a demonstration where a rollout was asked for, and labels both.

`agents.yaml` names it, `run.sh` makes it the default one. The demonstration of a prompt is the text
`extra_info["demonstration"]` of its row; a row without one, as those of validation are, has rollouts alone.
"""

import random
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.workers.rollout.replica import TokenOutput


class Demonstrator:
    """Answers in the place of verl's server, so that a demonstration goes the way of every answer.

    Args:
        ids: tokens of the demonstration, end token included.
        step: whose weights count as having written it; None: verl did not tell.
    """

    def __init__(self, ids: list[int], step: int | None) -> None:
        self.ids = ids
        self.steps = dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), step)

    async def generate(self, *, sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        logprobs = [0.0] * len(self.ids) if sampling_params.get("logprobs") else None  # no loss reads them
        return TokenOutput(token_ids=self.ids, log_probs=logprobs, stop_reason="completed", extra_fields=self.steps)


class DemonstrationAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn loop, with demonstrations in a share of the answers. verl makes one for each answer.

    Args:
        share: of the answers that are demonstrations; 1/8 gives each prompt about one where `rollout.n` is 8.
    """

    def __init__(self, *args: Any, share: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share = share

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        text = (kwargs.get("extra_info") or {}).get("demonstration")
        demonstrated = bool(text) and random.random() < self.share
        if demonstrated:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
            step = kwargs.get("global_steps")
            self.server_manager = Demonstrator(ids, None if step is None else step - 1)
        output = await super().run(sampling_params, **kwargs)
        output.extra_fields["is_expert"] = demonstrated
        return output
