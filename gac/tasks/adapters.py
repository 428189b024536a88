"""LoRA adapters of PEFT on a pretrained model: added, loaded again, merged."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"


def require_peft(what: str) -> None:
    """Raises ImportError where PEFT is not installed; `what` names the option that needs it."""
    if find_spec("peft") is None:
        raise ImportError(f"{what} needs the package peft: pip install 'peft>=0.15'")


def add_adapters(model: Any, *, rank: int, seed: int) -> Any:
    """The model as a `peft.PeftModel` whose only trainable parameters are LoRA adapters in fp32.

    On every linear layer but the head, scaled by 2 (``lora_alpha = 2 * rank``), without dropout: a step's gradients are
    to differ by their data alone. Before the first step the model computes what it did. The caller's random state is
    left as it was.

    Args:
        model: a causal LM of transformers.
        rank: of the adapters.
        seed: of their first halves.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, options)


def load_adapters(model: Any, folder: Path) -> None:
    """Puts the adapters that `folder` holds into a `peft.PeftModel` that has such ones, in place."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def merged(folder: str, load: Any) -> Any:
    """The base model of an adapter folder with the adapters added to its weights.

    Args:
        folder: with ``adapter_config.json``.
        load: gives the base model for its name or folder.
    """
    from peft import PeftConfig, PeftModel

    base = load(PeftConfig.from_pretrained(folder).base_model_name_or_path)
    return PeftModel.from_pretrained(base, folder).merge_and_unload()
