import pytest
import torch
from transformers import AutoTokenizer

from gac.tasks.characters import build_character_tokenizer, is_character_tokenizer
from gac.tasks.evaluation import accuracy, generate_greedily
from gac.tasks.models import build_small_model, build_small_model_and_tokenizer, load_model
from gac.tasks.warm_start import warm_start

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a in range(4) for b in range(4)]


@pytest.fixture
def tokenizer():
    return build_character_tokenizer()


def test_tokenizer_round_trip_and_padding(tokenizer, tmp_path):
    text = "Hello, 12 + 3 =\n\tx"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("a b")["input_ids"]) == 3
    batch = tokenizer(["1", "123"], padding=True)
    assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert loaded.padding_side == "left"


def test_tokenizer_learns_other_characters_in_any_order():
    first, second = build_character_tokenizer(["éß", "x"]), build_character_tokenizer(["x", "ßé"])
    assert first.get_vocab() == second.get_vocab()
    assert first.decode(first("éß")["input_ids"]) == "éß"


def test_small_model_size_and_seed(tokenizer):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    models = [build_small_model(tokenizer, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert 250_000 < sum(p.numel() for p in models[0].parameters()) < 450_000
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_checkpoint_round_trip_and_a_name_that_leads_nowhere(tokenizer, tmp_path):
    model = build_small_model(tokenizer, hidden_size=16, layers=1, heads=2)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded, again = load_model(str(tmp_path / "m"))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    text = "two words\nand é"  # transformers' class for this architecture would drop what is between words
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert is_character_tokenizer(again)
    with pytest.raises(ValueError, match="neither a model folder nor"):
        load_model(str(tmp_path / "absent"))


def test_a_small_model_and_its_tokenizer_know_the_texts():
    model, tokenizer = build_small_model_and_tokenizer(["é"], seed=0, hidden_size=16, layers=1)
    assert tokenizer("é")["input_ids"] != [tokenizer.unk_token_id]
    assert model.config.vocab_size == len(tokenizer)


def test_warm_start_is_deterministic_and_learns(tokenizer):
    losses = []
    models = [build_small_model(tokenizer, hidden_size=32, layers=1, heads=2) for _ in range(2)]
    state = torch.random.get_rng_state()
    for model in models:
        losses.clear()
        warm_start(
            model, tokenizer, ROWS, steps=120, batch_size=16, lr=1e-2, seed=0, on_step=lambda _, x: losses.append(x)
        )
    assert torch.equal(state, torch.random.get_rng_state())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert accuracy(models[0], tokenizer, ROWS, max_new_tokens=3, batch_size=5) > 0.8


def test_a_warm_start_in_pieces_takes_the_same_steps(tokenizer):
    found = []
    for pieces in (None, 5):  # of 16, so that the last is shorter; rows have one or two tokens and an end
        model = build_small_model(tokenizer, hidden_size=16, layers=1, heads=2).double()
        loss = warm_start(model, tokenizer, ROWS, steps=3, batch_size=16, lr=1e-2, seed=0, rows_at_once=pieces)
        found.append([torch.tensor(loss), *(p.detach() for p in model.parameters())])
    for whole, piece in zip(*found, strict=True):
        torch.testing.assert_close(piece, whole, rtol=1e-6, atol=1e-9)


def test_batched_generation_with_cache_equals_one_by_one_without(tokenizer):
    model = build_small_model(tokenizer, hidden_size=32, layers=2, heads=2).train()
    model.config.use_cache = False
    prompts = ["1+2=", "1234+99=", "7="]
    batched = generate_greedily(model, tokenizer, prompts, max_new_tokens=6)
    assert model.training
    assert model.config.use_cache is False
    for prompt, text in zip(prompts, batched, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(6):
                token = model(ids, use_cache=False).logits[0, -1].argmax()
                ids = torch.cat([ids, token.view(1, 1)], dim=1)
                if token == tokenizer.eos_token_id:
                    break
        assert tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True) == text


def test_accuracy_needs_problems(tokenizer):
    with pytest.raises(ValueError, match="no held-out problems"):
        accuracy(None, tokenizer, [], max_new_tokens=3)
