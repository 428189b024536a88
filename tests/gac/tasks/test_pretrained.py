"""Models by the name that a user gives: their chat format, their adapters, and what is refused."""

import pytest
import torch

from gac.tasks.adapters import load_adapters
from gac.tasks.characters import build_character_tokenizer
from gac.tasks.evaluation import accuracy, generate_greedily
from gac.tasks.models import build_small_model, load_model
from gac.tasks.pretrained import load_pretrained
from tests.gac.tasks.tiny import END, TEMPLATE, save_chat_model

QUESTION = [{"role": "user", "content": "1+1"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def test_a_model_speaks_its_own_chat_format(folder, tmp_path):
    model, tokenizer = load_pretrained(str(folder))
    assert model.dtype == torch.float32
    assert (tokenizer.chat_template, tokenizer.eos_token) == (TEMPLATE, END)
    other = tmp_path / "template.jinja"
    other.write_text("Be brief.\n" + TEMPLATE)
    _, tokenizer = load_pretrained(str(folder), chat_template=str(other))
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False).startswith("Be brief.\n<|im_start|>user\n1+1")
    _, tokenizer = load_pretrained(str(folder), chat_template="none")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (None, "<eos>")


def test_replies_end_where_the_template_ends_them(folder):
    model, tokenizer = load_pretrained(str(folder))
    weight = torch.zeros_like(model.lm_head.weight)
    end, letter = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("7")
    model.lm_head.weight = torch.nn.Parameter(weight)
    seen = []

    def head(module, inputs, logits):  # a 7, then the end
        seen.append(logits.shape[1])
        chosen = torch.zeros_like(logits)
        chosen[..., letter if len(seen) == 1 else end] = 1.0
        return chosen

    model.lm_head.register_forward_hook(head)
    assert generate_greedily(model, tokenizer, [QUESTION], max_new_tokens=6) == ["7"]
    assert len(seen) == 2
    seen.clear()
    rows = [{"prompt": QUESTION, "answer": "7."}]  # as a reader takes it; plain prompts are held to the letter
    assert accuracy(model, tokenizer, rows, max_new_tokens=6) == 1.0
    seen.clear()
    assert accuracy(model, tokenizer, [{"prompt": "1+1", "answer": "7."}], max_new_tokens=6) == 0.0


def test_a_character_tokenizer_needs_no_chat_format(tmp_path):
    tokenizer = build_character_tokenizer()
    build_small_model(tokenizer, hidden_size=16, layers=1, heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_pretrained(str(tmp_path))[1].chat_template is None


def test_adapters_begin_as_the_model_and_are_all_that_is_trained(folder, tmp_path):
    base, tokenizer = load_pretrained(str(folder))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    model, _ = load_pretrained(str(folder), lora=2, seed=3)
    again, _ = load_pretrained(str(folder), lora=2, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    ids = tokenizer("12345", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, base(ids).logits)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7  # seven linear layers in the block; the head has none
    assert all("lora_" in name and 2 in p.shape and p.dtype == torch.float32 for name, p in trained.items())
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in trained.items())

    for number, parameter in enumerate(trained.values()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    changed = model(ids).logits.detach().clone()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load_adapters(again, tmp_path)
    assert torch.equal(again(ids).logits, changed)
    whole, _ = load_model(str(tmp_path))  # merged: each product is rounded once more in fp32
    assert not hasattr(whole, "peft_config")
    torch.testing.assert_close(whole(ids).logits, changed, rtol=1e-4, atol=1e-4 * changed.abs().max().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer that can be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model that can be loaded"),
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template, so that nothing says how it is asked"),
        (
            lambda f: (f / "chat_template.jinja").write_text(TEMPLATE.replace(END, ".")),
            "ends a reply with no special token, so that a completion would have no end; give another with --chat-t",
        ),
    ],
)
def test_a_folder_that_lacks_something_is_named(tmp_path, change, message):
    change(save_chat_model(tmp_path / "m"))
    with pytest.raises(ValueError, match=r"^--model ") as error:
        load_pretrained(str(tmp_path / "m"))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["./absent", "/absent/x", "~/gac-absent", "a/b/c", "absent.gguf"])
def test_a_path_that_leads_nowhere(name):
    with pytest.raises(ValueError, match=r"^--model .*: there is no such file or folder"):
        load_pretrained(name)
