"""No prediction depends on a token that it is scored on, or on a later one: for every method.

Every continuation token of one row is changed, and then: no logit of that row before the change
moves, no logit of any other row moves, and no row is told anything else or put into another
cluster. That the test can fail is shown by statistics of whole rows, as in the published code.
"""

import pytest
import torch

from cluster import kmeans
from data import Rows
from eval import controls
from hypernet import cluster_statistics, features, prompt_means
from tests.conftest import random_adapter
from train import RATES, held_out_clusters

N, W, P = 12, 10, 4


def make_rows(prompt=P):
    tokens = torch.randint(31, (N * W,), generator=torch.Generator().manual_seed(3)).int()
    return Rows(tokens, torch.arange(N) * W, torch.full((N,), W), torch.full((N,), prompt),
                torch.zeros(N, dtype=torch.int64))


def logits_of(adapted, rows, table):
    tokens = rows.read(torch.arange(N))[0]
    return adapted(tokens, table)  # (N, W, V); at place t they predict token t + 1


def change(rows, row, place):
    """The same rows, one of which has other tokens from `place` on."""
    tokens = rows.tokens.clone()
    part = slice(row * W + place, (row + 1) * W)
    tokens[part] = (tokens[part] + 7) % 31
    return Rows(tokens, rows.start, rows.length, rows.prompt, rows.document)


def tables(gpt, adapted, rows, method):
    if method != "chameleon":
        return {"": None}
    means, count = prompt_means(rows, gpt.transformer.wte.weight)
    plan = {"cluster_size": 3, "seed": 0}
    cluster = held_out_clusters(adapted.lm_head, means, plan)
    return controls(adapted.lm_head, means, count, cluster, rows.document, 0)


def moved(gpt, method, rows, row, place):
    """Names of what is told, for which a logit moves that may not."""
    adapted, found = random_adapter(gpt, method), set()
    changed = change(rows, row, place)
    before, after = (tables(gpt, adapted, r, method) for r in (rows, changed))
    for name in before:
        a, b = (logits_of(adapted, r, t[name]) for r, t in ((rows, before), (changed, after)))
        same = torch.isclose(a, b).all(dim=2)  # (N, W)
        assert not same[row, place:].all()  # what comes after the change may move, and does
        same[row, place:] = True
        if not same.all():
            found.add(name)
    return found


@pytest.mark.parametrize("method", RATES)
@pytest.mark.parametrize("place", [P, P + 3])
def test_no_logit_depends_on_its_own_or_a_later_token_or_on_another_rows_continuation(
        gpt, method, place):
    for row in range(N):
        assert moved(gpt, method, make_rows(), row, place) == set()


def test_statistics_of_whole_rows_leak_and_the_test_sees_it(gpt):
    whole = make_rows(prompt=W)  # as if the continuation were prompt too
    assert "" in moved(gpt, "chameleon", whole, 5, P)


def test_training_statistics_see_prompts_alone(gpt):
    embedding = gpt.transformer.wte.weight
    results = []
    for rows in (make_rows(), change(make_rows(), 5, P)):
        means, count = prompt_means(rows, embedding)
        points = features(means, means.mean(dim=0))
        cluster = kmeans(points, 4, torch.Generator().manual_seed(0))[1]
        results.append((cluster, cluster_statistics(means, count, cluster)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_scored_tokens_are_predicted_from_what_stands_before_them():
    rows = make_rows()
    tokens, targets = rows.batch(torch.arange(N))
    whole = rows.read(torch.arange(N))[0]
    assert torch.equal(tokens, whole[:, :-1])
    scored = targets != -1
    assert torch.equal(targets[scored], whole[:, 1:][scored])  # the next token, not the one read
    assert scored.sum(dim=1).tolist() == [W - P] * N
