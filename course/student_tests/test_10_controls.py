"""Exercise 10, on numbers that can be worked out by hand."""

import torch
from torch.testing import assert_close

import adapters

# Rows 0 and 1 make one cluster, (1 + 3) / 2 = 2, and rows 2 and 3 another, (5 + 3 * 7) / 4 = 6.5.
ROWS = dict(center=torch.tensor([9.0]), means=torch.tensor([[1.0], [3.0], [5.0], [7.0]]),
            count=torch.tensor([1.0, 1.0, 1.0, 3.0]), cluster=torch.tensor([0, 0, 1, 1]),
            document=torch.tensor([0, 0, 1, 1]))


def told(name, **other):
    return adapters.controls(**(ROWS | other), seed=0)[name]


def column(*numbers):
    return torch.tensor(numbers)[:, None]


def test_the_method_itself():
    assert_close(told(""), column(2.0, 2.0, 6.5, 6.5))


def test_own_prompt_and_nothing():
    assert_close(told("told own prompt"), ROWS["means"])
    assert_close(told("told nothing"), column(9.0, 9.0, 9.0, 9.0))


def test_another_cluster_of_two_is_the_other():
    assert_close(told("told another cluster"), column(6.5, 6.5, 2.0, 2.0))


def test_another_cluster_is_never_the_own():
    means, cluster = torch.arange(6.0)[:, None] ** 2, torch.tensor([0, 1, 2, 7, 7, 2])
    for seed in range(20):
        tables = adapters.controls(torch.zeros(1), means, torch.ones(6), cluster,
                                   torch.arange(6), seed)
        assert (tables["told another cluster"] != tables[""]).all()


def test_with_one_cluster_there_is_no_other():
    tables = adapters.controls(**(ROWS | {"cluster": torch.zeros(4, dtype=torch.int64)}), seed=0)
    assert "told another cluster" not in tables


def test_no_later_rows_of_the_same_document():
    # Row 1 is row 0's sequel, so row 0 hears itself alone; row 1 hears both.
    assert_close(told("told no later rows"), column(1.0, 2.0, 5.0, 6.5))


def test_later_rows_of_other_documents_are_heard():
    table = told("told no later rows", document=torch.tensor([0, 1, 2, 3]))
    assert_close(table, column(2.0, 2.0, 6.5, 6.5))
