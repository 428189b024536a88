"""OpenRLHF's own `train_ppo_ray`, with actors that mix demonstrations and rollouts. Takes its options; see run.sh.

An actor class of Ray cannot be inherited from, the class that Ray made it of can. The command then runs as it stands,
with this actor in the place of OpenRLHF's.
"""

import runpy
from typing import Any

import ray
from openrlhf.trainer.ray import ppo_actor

from gac.trainers.adapters import openrlhf

LAW = {"law": "gac"}  # further options of gac.trainers.mixed_batch.MixedBatch


class MixedActor(ppo_actor.PolicyModelActor.__ray_metadata__.modified_class):
    """OpenRLHF's actor, whose trainer mixes both losses and whose checkpoints hold what mu follows."""

    def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().init_model_from_pretrained(*args, **kwargs)
        self.mixed = openrlhf.attach(self.trainer, **LAW)
        state = self.checkpoint_states.pop("gac", None)
        if state is not None:
            self.mixed.load_state_dict(state)

    def save_checkpoint(self, tag: str, client_states: dict | None = None, **kwargs: Any) -> None:
        states = (client_states or {}) | {"gac": self.mixed.state_dict()}
        super().save_checkpoint(tag, client_states=states, **kwargs)


def main() -> None:
    ppo_actor.PolicyModelActor = ray.remote(num_gpus=1)(MixedActor)
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")


if __name__ == "__main__":
    main()
