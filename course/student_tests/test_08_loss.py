"""Exercise 8, on numbers that can be worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

import adapters

ROWS = dict(tokens=torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]), start=torch.tensor([0, 5]),
            length=torch.tensor([5, 3]), prompt=torch.tensor([2, 1]), document=torch.tensor([0, 1]))


def test_a_batch_scores_continuations():
    # Row 0 is 1 2 | 3 4 5 and row 1 is 6 | 7 8.
    inputs, targets = adapters.batch(**ROWS, index=torch.tensor([0, 1]), whole=False)
    assert inputs.tolist() == [[1, 2, 3, 4], [6, 7, 8, 0]]
    assert targets.tolist() == [[-1, 3, 4, 5], [7, 8, -1, -1]]


def test_a_base_is_scored_on_prompts_too():
    _, targets = adapters.batch(**ROWS, index=torch.tensor([1, 0]), whole=True)
    assert targets.tolist() == [[7, 8, -1, -1], [2, 3, 4, 5]]


def letters(row):
    document, length, prompt, *tokens = row
    return document, length, prompt, "".join("#" if t == 1000 else chr(t) for t in tokens)


def cut(documents, block_size):
    return [letters(row) for row in adapters.cut(documents, block_size)]


def test_running_text_in_rows_that_share_no_token():
    rows = cut([("", "abcdefghijklm"), ("", "xyz")], block_size=7)  # rows of 8; a quarter is prompt
    assert rows == [(0, 8, 2, "abcdefgh"), (0, 5, 1, "ijklm"), (1, 3, 1, "xyz")]


def test_a_row_without_a_token_to_score_is_left_out():
    assert cut([("", "abcde"), ("", "xy")], block_size=3) == [(0, 4, 1, "abcd"), (1, 2, 1, "xy")]


def test_an_instruction_is_one_row_and_ends_with_the_end_token():
    rows = cut([("ab", "xyz"), ("abcdef", "x"), ("a", "vwxyz")], block_size=5)  # rows of 6
    assert rows == [(0, 6, 2, "abxyz#"), (2, 6, 1, "avwxyz")]


def test_text_without_a_row_is_refused():
    from common import UserError

    with pytest.raises(UserError):
        adapters.cut([("", "a")], 4)


def test_blind_guessing_costs_ln_v_a_token():
    tokens = torch.tensor([[0, 1, 1], [1, 0, 0]])
    targets = torch.tensor([[-1, 1, 1], [0, -1, -1]])
    loss = adapters.losses(torch.zeros(2, 2), tokens, targets)
    assert_close(loss, torch.tensor([2 * math.log(2), math.log(2)]))


def test_a_rows_losses_are_summed():
    # After token 0 the model gives token 1 a probability of 3/4; after token 1, 1/2 each.
    table = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    tokens, targets = torch.tensor([[0, 0, 1]]), torch.tensor([[1, 0, 1]])
    loss = adapters.losses(table, tokens, targets)
    assert_close(loss, torch.tensor([-math.log(3 / 4) - math.log(1 / 4) - math.log(1 / 2)]))
