"""No prediction may depend on a token that it is scored on, or on a later one; nor on the
continuation of any other row. Proved for every method, and shown to fail where it should."""

import numpy as np
import pytest
import torch

from lab import cache
from lab.common import Run, adapt
from lab.data import SPLITS, Corpus, Tokenizer, load_examples
from lab.flags import CONTROLS, METHODS
from lab.model import GPT, GPTConfig
from lab.scoring import Company, Told, held_out, score
from lab.tests.conftest import all_logits, fitted, rows_of

V, T, N = 40, 16, 6
PROMPT = np.array([4, 2, 3, 1, 4, 5])  # as many prompt tokens in each row: lengths differ


def run_of(base):
    return Run(None, torch.device("cpu"), torch.float32, base=base)


def tiny_base():
    torch.manual_seed(0)
    base = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=8))
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return base.eval()


def trained(base, method, form="full", scope="prompt", examples=None):
    """A model whose adapters do something, and the plan that goes with it."""
    plan = {"method": method, "rank": 2, "alpha": 4.0, "head_form": form, "clusters": 2,
            "stat_scope": scope, "cluster_size": 2, "seed": 0}
    torch.manual_seed(1)
    if method == "frozen":
        return base, plan
    model = adapt(base, plan).eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    fitted(run_of(base), model, plan, examples)
    return model, plan


def table(tokens):
    """(N, T + 1) tokens as Examples."""
    rows = np.arange(N)
    return rows_of(tokens.reshape(-1), rows * (T + 1), np.full(N, T + 1), PROMPT.copy(), rows)


def said(base, model, plan, tokens, inference, control):
    examples = table(tokens)
    told = held_out(run_of(base), model, examples, plan, inference, control)
    return all_logits(model, examples, told)


def check_no_leak(method, form="full", scope="prompt", inference="fit", control=None):
    base, tokens = tiny_base(), np.random.default_rng(0).integers(0, V, (N, T + 1))
    model, plan = trained(base, method, form, scope, table(tokens))
    before = said(base, model, plan, tokens, inference, control)
    for row in range(N):
        for place in range(PROMPT[row], T + 1):  # every token of the continuation
            changed = tokens.copy()
            changed[row, place] = (changed[row, place] + 1) % V
            after = said(base, model, plan, changed, inference, control)
            others = [i for i in range(N) if i != row]
            # logits[:, t] predict token t + 1: those of the changed token and of earlier ones
            assert torch.equal(before[row, :place], after[row, :place]), (row, place)
            assert torch.equal(before[others], after[others]), (row, place)
            assert place == T or not torch.equal(before[row, place:], after[row, place:])


CASES = [*((m, "full") for m in METHODS if m != "company-cache"), ("chameleon", "light")]
PAPERS = [("frozen", "full"), ("lora", "full"), ("chameleon", "full"), ("chameleon", "light")]


@pytest.mark.parametrize("method, form", CASES)
@pytest.mark.parametrize("inference", ["fit", "assign"])
def test_no_logit_depends_on_its_own_or_a_later_token_or_on_another_rows_continuation(
    method, form, inference
):
    check_no_leak(method, form, inference=inference)


@pytest.mark.parametrize("control", CONTROLS)
def test_the_controls_do_not_leak_either(control):
    check_no_leak("chameleon", control=control)


@pytest.mark.parametrize("method, form", [*PAPERS[-2:], ("company-cache", "full")])
def test_full_scope_leaks_and_the_test_above_notices(method, form):
    with pytest.raises(AssertionError, match=r"^\(\d+, \d+\)"):  # (row, place) of a leak
        check_no_leak(method, form, scope="full")


@pytest.mark.parametrize("control", [None, *CONTROLS])
def test_in_the_prompt_scope_nothing_leaks_from_continuations(control):
    check_no_leak("company-cache", control=control)


@pytest.mark.parametrize("control", [None, "own prompt only", "shuffled", "other articles"])
@pytest.mark.parametrize("together", [0, cache.TOGETHER])  # row by row, as in training, and at once
def test_the_running_scope_moves_only_logits_that_are_made_later(control, together, monkeypatch):
    """The continuations of a cluster are decoded in step: a token may move its mates' logits, and
    its own row's, from the next position on."""
    monkeypatch.setattr(cache, "TOGETHER", together)
    base, tokens = tiny_base(), np.random.default_rng(0).integers(0, V, (N, T + 1))
    model, plan = trained(base, "company-cache", scope="running", examples=table(tokens))
    before = said(base, model, plan, tokens, "fit", control)
    mates = 0
    for row in range(N):
        for place in range(PROMPT[row], T + 1):
            changed = tokens.copy()
            changed[row, place] = (changed[row, place] + 1) % V
            after = said(base, model, plan, changed, "fit", control)
            for other, end in enumerate(PROMPT - PROMPT[row] + place):  # as far as that step
                assert torch.equal(before[other, : max(0, end)], after[other, : max(0, end)])
            others = [i for i in range(N) if i != row]
            mates += not torch.equal(before[others, place:], after[others, place:])
    assert (mates > 0) == (control != "own prompt only")


def test_without_later_rows_an_article_is_read_in_its_order():
    base, tokens = tiny_base(), np.random.default_rng(0).integers(0, V, (N, T + 1))
    rows = table(tokens)
    model, _ = trained(base, "company-cache", scope="running", examples=rows)
    rows.article[:] = 7  # all of one article

    def losses():
        cluster = torch.zeros(N, dtype=torch.int64)
        company = Company(cluster, "no later rows", article=rows.article)
        return score(run_of(base), model, rows, Told(cluster, company))[0]

    before = losses()
    for row in range(N):
        rows.tokens[row * (T + 1)] += 1  # of its prompt
        after = losses()
        assert torch.equal(before[:row], after[:row])
        assert (before[row:] != after[row:]).all()
        before = after


def test_another_prompt_does_matter():
    """Else the tests above would pass for a head that ignores its statistics."""
    base, tokens = tiny_base(), np.random.default_rng(0).integers(0, V, (N, T + 1))
    model, plan = trained(base, "chameleon", examples=table(tokens))
    plan["cluster_size"] = N  # one cluster: everybody is everybody's company
    before = said(base, model, plan, tokens, "fit", None)
    tokens[0, 0] = (tokens[0, 0] + 1) % V
    after = said(base, model, plan, tokens, "fit", None)
    assert all(not torch.equal(before[row], after[row]) for row in range(N))


@pytest.mark.parametrize("method, form", PAPERS)
@pytest.mark.parametrize("scope", ["prompt", "full"])
def test_an_edited_word_moves_no_score_of_another_row(method, form, scope, tmp_path):
    """The same on text: edited, tokenised and cut again, through the metric itself."""
    words = "river stone cloud house green seven light apple".split()
    draw = np.random.default_rng(0)
    lines = [" ".join(draw.choice(words, 30)) for _ in range(60)]
    folder = tmp_path / "text"
    folder.mkdir()
    for split, part in zip(SPLITS, (lines[:40], lines[40:50], lines[50:]), strict=True):
        (folder / f"{split}.txt").write_text("\n".join(part) + "\n")

    def losses():
        corpus = Corpus(str(folder), tmp_path)
        tokenizer = Tokenizer.learn((d.text for d in corpus.documents("train")), 300)
        found = load_examples(corpus, tokenizer, T)["validation"]
        torch.manual_seed(0)
        base = GPT(GPTConfig(T, tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=8)).eval()
        model, plan = trained(base, method, form, scope, found)
        plan["cluster_size"] = 5
        told = held_out(run_of(base), model, found, plan, "fit")
        rows, _ = found.read(torch.arange(len(found)))
        return score(run_of(base), model, found, told)[0], rows, found.prompt

    before, rows, prompt = losses()
    text = (folder / "validation.txt").read_text()
    for place in range(len(text) // 2, len(text)):  # the first edit that falls in a continuation
        if text[place : place + 7] in (" river ", " stone "):
            edited = {" river ": " stone ", " stone ": " river "}[text[place : place + 7]]
            (folder / "validation.txt").write_text(text[:place] + edited + text[place + 7 :])
            after, rows_now, _ = losses()
            moved = (rows != rows_now) if rows.shape == rows_now.shape else None
            if moved is None or moved.any(dim=1).sum() != 1:
                continue
            row = int(moved.any(dim=1).nonzero())
            if moved[row].nonzero()[0] >= prompt[row]:
                break
    else:
        raise AssertionError("no edit fell inside one row's continuation: the test tests nothing")
    others = torch.arange(len(before)) != row
    assert before[row] != after[row]
    if method == "chameleon" and scope == "full":
        assert (before[others] != after[others]).any()
    else:
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize("condition", ["instruction", "instruction+input"])
def test_under_a_condition_statistics_and_clusters_do_not_see_the_input(condition):
    base, tokens = tiny_base(), np.random.default_rng(0).integers(0, V, (N, T + 1))
    model, plan = trained(base, "chameleon", examples=table(tokens))
    plan["condition"] = condition
    told = []
    for _ in range(2):
        rows = table(tokens)
        rows.prompt[:] = T // 2  # of which the input is the second half
        rows.instruction = torch.full((N,), T // 4)
        found = held_out(run_of(base), model, rows, plan, "fit")
        told.append((found.cluster, found.table))
        tokens[:, T // 4 : T // 2] = (tokens[:, T // 4 : T // 2] + 1) % V
    (cluster, before), (again, after) = told
    same = torch.equal(cluster, again) and torch.equal(before, after)
    assert same == (condition == "instruction")
