"""Generation as decoders share it: which token is taken, when a sequence ends, and how a model's step is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from warpform.models import M2GPTForCausalLM, MoHDForCausalLM
from warpform.models.common.generation import choose_tokens, continue_by_drafts, continue_texts

FIELDS: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 24}
DECODERS: dict[type, dict[str, Any]] = {
    M2GPTForCausalLM: FIELDS,
    MoHDForCausalLM: {**FIELDS, "num_attention_heads": 2, "intermediate_size": 24, "num_groups": 0},
}


class Counter:
    """A model of 10 tokens that continues each sequence by the next number, and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[list[int]], list[int]]] = []

    def __call__(self, new: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        self.calls.append(([tokens.tolist() for tokens in new], list(rows)))
        last = torch.stack([tokens[-1] for tokens in new])
        return torch.nn.functional.one_hot((last + 1) % 10, 10).float()


def prompts() -> list[Tensor]:
    return [torch.tensor([9, 4]), torch.tensor([2]), torch.tensor([0, 0, 6])]


def test_a_step_has_prompts_first_and_then_single_tokens() -> None:
    model = Counter()
    texts = continue_texts(model, prompts(), 2)
    assert [text.tolist() for text in texts] == [[9, 4, 5, 6], [2, 3, 4], [0, 0, 6, 7, 8]]
    assert model.calls == [([[9, 4], [2], [0, 0, 6]], [0, 1, 2]), ([[5], [3], [7]], [0, 1, 2])]
    assert [text.tolist() for text in continue_texts(model, prompts(), 0)] == [[9, 4], [2], [0, 0, 6]]
    assert len(model.calls) == 2


@pytest.mark.parametrize("drop_ended", [True, False])
def test_each_sequence_ends_by_itself(drop_ended: bool) -> None:
    model = Counter()
    texts = continue_texts(model, prompts(), 9, eos_token_id=7, drop_ended=drop_ended)
    assert [text.tolist() for text in texts] == [[9, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7], [0, 0, 6, 7]]
    rows = [rows for _, rows in model.calls]
    assert rows == ([[0, 1, 2], [0, 1], [0, 1], [1], [1]] if drop_ended else [[0, 1, 2]] * 5)


def test_the_likeliest_token() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose_tokens(logits), logits.argmax(1))
    for temperature in (1e-6, 3.0):
        assert torch.equal(choose_tokens(logits, temperature=temperature, top_k=1), logits.argmax(1))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, 3), (2.0, 50)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_draws_follow_the_softmax(temperature: float, top_k: int | None, dtype: torch.dtype) -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(2)).to(dtype)
    count = 8000
    drawn = choose_tokens(
        logits.expand(count, -1), temperature=temperature, top_k=top_k, generator=torch.Generator().manual_seed(3)
    )
    kept = logits.double().topk(min(top_k or 8, 8))
    expected = torch.zeros(8, dtype=torch.float64).scatter(0, kept.indices, (kept.values / temperature).softmax(0))
    shares = drawn.bincount(minlength=8) / count
    assert drawn.dtype == torch.int64 and (shares - expected).abs().max() < 5 * (expected.max() / count).sqrt()
    assert not shares[expected == 0].any()


@pytest.mark.parametrize("kind", DECODERS)
def test_models_draw_among_the_top_k(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind(kind.config_class(**DECODERS[kind])).eval()
    ids = torch.arange(10).view(2, 5)
    greedy = model.generate(ids, 6)
    one = model.generate(ids, 6, temperature=2.0, top_k=1, generator=torch.Generator().manual_seed(1))
    some, all_of_them = (
        model.generate(ids, 6, temperature=2.0, top_k=k, generator=torch.Generator().manual_seed(1)) for k in (30, None)
    )
    assert all(map(torch.equal, one, greedy)) and all(map(torch.equal, some, all_of_them))
    assert not all(map(torch.equal, some, greedy))
    assert all(map(torch.equal, model.generate(ids, 0), ids))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("wrong", [{"max_new_tokens": -1}, {"temperature": -0.5}, {"top_k": 0}], ids=str)
def test_models_refuse_numbers_that_make_no_sense(kind: Any, wrong: dict[str, Any]) -> None:
    model = kind(kind.config_class(**DECODERS[kind]))
    message = f"{kind.__name__}.generate: max_new_tokens and temperature must be at least 0 and top_k at least 1"
    with pytest.raises(ValueError, match=message):
        model.generate(torch.zeros(1, 3, dtype=torch.int64), **{"max_new_tokens": 2, **wrong})


class Sums:
    """A model whose next token follows from the sum of all tokens before it; its caches are these tokens."""

    def __init__(self, rows: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.verified = 0

    def logits(self, row: int, new: Tensor, off: bool) -> Tensor:
        found = []
        for token in new.tolist():
            self.tokens[row].append(token)
            wrong = off and len(self.tokens[row]) % 3 == 0
            found.append((7 * sum(self.tokens[row]) + 3 + wrong) % 11)
        return torch.eye(11)[found]

    def step(self, new: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        return torch.cat([self.logits(row, one, False)[-1:] for row, one in zip(rows, new, strict=True)])

    def draft(self, new: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        return torch.cat([self.logits(row, one, True)[-1:] for row, one in zip(rows, new, strict=True)])

    def verify(self, new: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        self.verified += 1
        return torch.cat([self.logits(row, one, False) for row, one in zip(rows, new, strict=True)])

    def rewind(self, row: int, length: int) -> None:
        assert length <= len(self.tokens[row])
        del self.tokens[row][length:]


@pytest.mark.parametrize("lengths", ((3,), (3, 7, 1)), ids=("one", "ragged"))
def test_drafts_change_no_token_and_those_that_are_right_save_steps(lengths: tuple[int, ...]) -> None:
    prompts = [torch.randint(11, (length,)) for length in lengths]
    expected = continue_texts(Sums(len(prompts)).step, prompts, 20)
    for draft_length in (1, 4, 30):
        model = Sums(len(prompts))
        steps = (model.step, model.draft, model.verify, model.rewind)
        found = continue_by_drafts(*steps, prompts, 20, draft_length=draft_length)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        if lengths == (3,) and draft_length >= 2:
            # The prompt gives one token. The draft is wrong behind each third token, where the model's own stands: so
            # three tokens come of each step, and the last one makes up the rest.
            assert model.verified == -(-19 // 3)
    end = int(expected[0][lengths[0] + 4])
    model = Sums(len(prompts))
    found = continue_by_drafts(
        model.step, model.draft, model.verify, model.rewind, prompts, 20, draft_length=4, eos_token_id=end
    )
    stopped = continue_texts(Sums(len(prompts)).step, prompts, 20, eos_token_id=end)
    assert all(torch.equal(one, other) for one, other in zip(found, stopped, strict=True))
