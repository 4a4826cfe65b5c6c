from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab import study
from lab.common import Run, adapt
from lab.model import GPT, GPTConfig
from lab.scoring import Company, Told, held_out, score
from lab.tests.conftest import rows_of

V, END = 12, 11
# The last one's prompt leaves the model no room to write in.
LENGTH, PROMPT = np.array([13, 9, 13, 5, 11, 14]), np.array([4, 3, 6, 1, 2, 13])
ARTICLE = np.array([0, 0, 1, 1, 0, 2])
ARGS = SimpleNamespace(seed=0, temperature=1.0, top_k=5)


def examples_of(rows):
    length = np.array([len(row) for row in rows])
    return rows_of(np.concatenate(rows), length.cumsum() - length, length, PROMPT[: len(rows)],
                   ARTICLE[: len(rows)])


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


def slow_loss(asked, continuations, share, control):
    """Row after row: its own text is true, and that of the mates that are drawn is another."""
    run, model, plan, rows = asked
    cluster = held_out(run, model, examples_of(rows), plan, "fit").cluster
    other = torch.randperm(6, generator=torch.Generator().manual_seed(0)) < round(share * 6)
    total = 0
    for i in range(6):
        heard = [np.append(row[:n], text).astype(int) if other[j] and j != i else row
                 for j, (row, n, text) in enumerate(zip(rows, PROMPT, continuations, strict=True))]
        examples = examples_of(heard)
        chosen = torch.arange(6) == i
        company = Company(cluster, control, None, examples.article)
        nll, _ = score(run, model, examples, Told(cluster, company), chosen=chosen)
        assert not nll[~chosen].any()
        total += nll.sum()
    return float(total) / (LENGTH - PROMPT).sum()


def test_what_mates_are_heard_to_have_written_equals_a_slow_reference(asked, monkeypatch):
    run, model, plan, rows = asked
    draw, found = np.random.default_rng(1), {}
    texts = [draw.integers(END, size=n).tolist() for n in (3, 9, 6, 1, 0, 5)]
    room = LENGTH - PROMPT

    def generate(model, prompts, most, knows, stop_token, **options):
        places = [next(i for i in range(6) if rows[i][: PROMPT[i]].tolist() == p) for p in prompts]
        assert knows.shape == (len(prompts), len(prompts)) and knows.all()
        assert most == room[places].max() and stop_token == END and 5 not in places
        return [texts[i][:most] for i in places]

    monkeypatch.setattr(study, "generate", generate)
    for kind, share, loss in study.sweep_written(run, model, plan, examples_of(rows), ARGS):
        found[kind, share] = loss
    # What is shorter than what was asked for has been ended, and the end is heard as well.
    kept = [[*text, END][:n] for text, n in zip(texts[:5], room, strict=False)] + [[]]
    for kind, continuations in (("written by the model", kept), ("not known", [[]] * 6)):
        for control in (None, "no later rows"):
            for share in study.WRITTEN:
                name = kind + f", {control}" * bool(control)
                expected = slow_loss(asked, continuations, share, control)
                assert found.pop((name, share)) == pytest.approx(expected, rel=1e-5)
    assert not found


def test_mates_who_write_what_is_true_are_as_good_as_true(asked, monkeypatch):
    run, model, plan, rows = asked
    true = {tuple(row[:n]): row[n:].tolist() for row, n in zip(rows, PROMPT, strict=True)}
    monkeypatch.setattr(study, "generate", lambda model, prompts, most, knows, **options: [
        true[tuple(prompt)] for prompt in prompts])
    examples = examples_of(rows[:5])  # all that can be written
    swept = list(study.sweep_written(run, model, plan, examples, ARGS))
    for kind, _, loss in swept:
        if kind == "written by the model":
            assert loss == pytest.approx(swept[0][2], rel=1e-6)


def test_the_model_writes_in_the_room_that_a_row_has_and_the_same_again(asked):
    run, model, _, rows = asked
    examples, cluster = examples_of(rows), torch.tensor([0, 1, 0, 1, 0, 1])
    prompts = [row[:n].tolist() for row, n in zip(rows, PROMPT, strict=True)]
    first, second = (study.write(run, model, prompts, examples, cluster, ARGS) for _ in range(2))
    assert first == second and len(first) == 6 and first[5] == []
    for i, text in enumerate(first[:5]):
        room = min(LENGTH[i], 13) - PROMPT[i]  # its own, and what the context leaves
        assert len(text) == room or (text[-1] == END and len(text) < room)
