"""Adapters to trainers that are not built on transformers or TRL; each module imports its trainer where it needs it.

``verl``, ``trinity``, ``swift``, ``openrlhf`` and ``slime``; their pages in docs/trainers say what was tested.
"""
