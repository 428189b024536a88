#!/usr/bin/env bash
# GRPO with demonstrations in OpenRLHF: two GPUs of one machine, after `python examples/openrlhf/task.py --out data`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

python "$here/train.py" \
  --actor.model_name_or_path "${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
  --actor.num_nodes 1 \
  --actor.num_gpus_per_node 2 \
  --ref.num_nodes 1 \
  --ref.num_gpus_per_node 2 \
  --vllm.num_engines 2 \
  --vllm.tensor_parallel_size 1 \
  --vllm.gpu_memory_utilization 0.5 \
  --vllm.enable_sleep \
  --ds.enable_sleep \
  --train.colocate_all \
  --train.agent_func_path "$here/agent.py" \
  --algo.advantage.estimator group_norm \
  --algo.kl.init_coef 0 \
  --data.prompt_dataset data/train.jsonl \
  --eval.dataset data/eval.jsonl \
  --data.input_key prompt \
  --data.label_key label \
  --data.apply_chat_template \
  --data.max_len 512 \
  --rollout.batch_size 32 \
  --rollout.n_samples_per_prompt 8 \
  --rollout.max_new_tokens 128 \
  --train.batch_size 256 \
  --train.micro_batch_size 32 \
  "$@"
