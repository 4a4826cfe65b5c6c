from types import SimpleNamespace

import numpy as np
import pytest
import torch

import study
from common import Run, adapt
from data import Examples
from model import GPT, GPTConfig
from scoring import Company, held_out_company, score

V, END = 12, 11
LENGTH, PROMPT = np.array([13, 9, 13, 5, 11, 4]), np.array([4, 3, 6, 1, 2, 1])
ARGS = SimpleNamespace(seed=0, batch_size=4, temperature=1.0, top_k=5)


def examples_of(rows):
    length = np.array([len(row) for row in rows])
    return Examples(np.concatenate(rows), length.cumsum() - length, length, PROMPT, np.arange(6))


@pytest.fixture
def asked():
    """A run, a company-cache that listens, its plan, and six true rows."""
    torch.manual_seed(0)
    base = GPT(GPTConfig(block_size=13, vocab_size=V, n_layer=1, n_head=1, n_embd=8))
    plan = {"method": "company-cache", "rank": 2, "alpha": 4.0, "stat_scope": "running", "seed": 0,
            "cluster_size": 3, "inference": "fit"}
    model = adapt(base, plan)
    for p in model.lm_head.parameters():
        torch.nn.init.normal_(p)
    draw = np.random.default_rng(0)
    rows = [draw.integers(END, size=n) for n in LENGTH]
    run = Run(None, torch.device("cpu"), tokenizer=SimpleNamespace(end=END), base=base)
    return run, model, plan, rows


def slow_loss(asked, continuations, share):
    """Row after row: its own text is true, and that of the mates that are drawn is another."""
    run, model, plan, rows = asked
    cluster = held_out_company(run, model, examples_of(rows), plan, "fit").cluster
    other = torch.randperm(6, generator=torch.Generator().manual_seed(0)) < round(share * 6)
    total = 0
    for i in range(6):
        heard = [np.append(row[:n], text).astype(int) if other[j] and j != i else row
                 for j, (row, n, text) in enumerate(zip(rows, PROMPT, continuations, strict=True))]
        examples = examples_of(heard)
        chosen = torch.arange(6) == i
        nll, _ = score(run, model, examples, 6, Company(model.lm_head, examples, cluster),
                       chosen=chosen)
        assert not nll[~chosen].any()
        total += nll.sum()
    return total / (LENGTH - PROMPT).sum()


def test_what_mates_are_heard_to_have_written_equals_a_slow_reference(asked, monkeypatch):
    run, model, plan, rows = asked
    draw, found = np.random.default_rng(1), {}
    texts = [draw.integers(END, size=n).tolist() for n in (3, 9, 6, 1, 0, 5)]
    room = LENGTH - PROMPT

    def generate(model, prompts, most, cluster, stop_token, **options):
        places = [next(i for i in range(6) if rows[i][: PROMPT[i]].tolist() == p) for p in prompts]
        assert cluster.shape == (len(prompts), len(prompts)) and cluster.all()
        assert most == room[places].max() and stop_token == END
        return [texts[i] for i in places]

    monkeypatch.setattr(study, "generate", generate)
    for kind, share, loss in study.sweep_written(run, model, plan, examples_of(rows), ARGS):
        found[kind, share] = loss
    kept = [text[:n] for text, n in zip(texts, room, strict=True)]
    for kind, continuations in (("written by the model", kept), ("not known", [[]] * 6)):
        for share in study.WRITTEN:
            expected = slow_loss(asked, continuations, share)
            assert found[kind, share] == pytest.approx(expected, rel=1e-5)
    assert len(set(found.values())) == 2 * len(study.WRITTEN) - 1  # at 0 both hear the truth


def test_mates_who_write_what_is_true_are_as_good_as_true(asked, monkeypatch):
    run, model, plan, rows = asked
    true = {tuple(row[:n]): row[n:].tolist() for row, n in zip(rows, PROMPT, strict=True)}
    monkeypatch.setattr(study, "generate", lambda model, prompts, most, **options: [
        true[tuple(prompt)] for prompt in prompts])
    swept = list(study.sweep_written(run, model, plan, examples_of(rows), ARGS))
    for kind, _, loss in swept:
        if kind == "written by the model":
            assert loss == pytest.approx(swept[0][2], rel=1e-6)


def test_the_model_writes_within_each_rows_room_and_the_same_again(asked):
    run, model, plan, rows = asked
    first, second = (list(study.sweep_written(run, model, plan, examples_of(rows), ARGS))
                     for _ in range(2))
    assert first == second
    assert all(np.isfinite(loss) for _, _, loss in first)
