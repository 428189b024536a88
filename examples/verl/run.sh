#!/usr/bin/env bash
# GRPO with demonstrations in verl: two GPUs of one machine, after `python examples/verl/task.py --out data`.
# On several machines PYTHONPATH and VERL_USE_EXTERNAL_MODULES have to be set on all of them, or in Ray's runtime_env.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export VERL_USE_EXTERNAL_MODULES=gac_verl

python -m verl.trainer.main_ppo \
  algorithm.adv_estimator=grpo \
  data.train_files=data/train.parquet \
  data.val_files=data/val.parquet \
  data.train_batch_size=64 \
  data.max_prompt_length=256 \
  data.max_response_length=128 \
  actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64 \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.agent.agent_loop_config_path="$here/agents.yaml" \
  actor_rollout_ref.rollout.agent.default_agent_loop=demonstrations \
  reward.custom_reward_function.path="$here/task.py" \
  reward.custom_reward_function.name=compute_score \
  trainer.n_gpus_per_node=2 \
  trainer.logger='["console"]' \
  trainer.total_epochs=3 \
  "$@"
