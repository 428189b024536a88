"""What the command line trains on: reasoning-gym problems, a character tokenizer, small models, greedy evaluation.

Modules: `problems` (tasks, splits, exact-match reward), `characters` (tokenizer), `models` (from a config or a
checkpoint), `pretrained` (by the name that a user gives), `gguf_files`, `adapters` (LoRA), `chat` (problems as
conversations), `evaluation` (held-out accuracy), `warm_start` (short SFT phase). Nothing is imported here, so that the
command line can list task names without loading a model library.
"""
