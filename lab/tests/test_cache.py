import copy
import math

import numpy as np
import pytest
import torch

from lab import cache, scoring
from lab.cache import NEVER, CacheHead, CompanyCacheHead, diffuse, generate, losses
from lab.common import Run, adapt
from lab.data import IGNORE
from lab.model import GPT, GPTConfig
from lab.scoring import Company, Told, company_batch, held_out, score
from lab.tests.conftest import all_logits, rows_of
from lab.turns import linear_cross_entropy
from model import LMHead

V, C = 12, 5


def examples_of(lengths, prompts, seed=0):
    lengths = np.array(lengths)
    tokens = np.random.default_rng(seed).integers(0, V, lengths.sum())
    start = np.cumsum(lengths) - lengths
    return rows_of(tokens, start, lengths, prompts, np.arange(len(lengths)))


EXAMPLES = examples_of([14, 9, 14, 5, 11, 2], [4, 3, 6, 1, 2, 1])
CLUSTER = torch.tensor([0, 1, 0, 1, 0, 2])


def head_of(scope="running"):
    torch.manual_seed(0)
    head = CompanyCacheHead(torch.randn(V, C), 2, 4.0, scope)
    for p in head.parameters():
        if p is not head.weight:
            torch.nn.init.normal_(p)
    head.trust.data /= 10
    head.share.data /= 10
    return head


def model_of(head):
    """A model whose last hidden states are a table look-up: two calls give the same."""
    torch.manual_seed(1)
    states = torch.nn.Embedding(V, C)
    model = torch.nn.Module()
    model.lm_head, model.hidden = head, states
    return model


def everywhere(head, hidden, statistics, knows):
    """Log-probabilities (B, T, V) of all places."""
    wanted = torch.ones(hidden.shape[:2], dtype=torch.bool)
    return head(hidden, statistics, knows, wanted).view(*hidden.shape[:2], -1)


def test_parameters_are_loras_and_a_few():
    head = CompanyCacheHead(torch.empty(50257, 768, device="meta"), 4, 8.0)
    trained = sum(p.numel() for p in head.parameters() if p is not head.weight)
    assert trained == 4 * (50257 + 768) + 2 * 768 + 5
    cache = CacheHead(torch.empty(50257, 768, device="meta"))
    assert sum(p.numel() for p in cache.parameters() if p is not cache.weight) == 2


def slow_loss(head, states, i, control=None):
    """Row i's loss, from one remembered token after the other; states (V, C), of each token."""
    tokens = EXAMPLES.tokens[EXAMPLES.start[i] :][: EXAMPLES.length[i]]
    prompt, total = EXAMPLES.prompt[i], 0.0
    for t in range(prompt, len(tokens)):
        h, remembered = states[tokens[t - 1]], ([], [])  # by itself, by its mates
        for j in range(len(EXAMPLES)):
            if j != i and (control or CLUSTER[j] != CLUSTER[i]):
                continue
            mate = EXAMPLES.tokens[EXAMPLES.start[j] :][: EXAMPLES.length[j]]
            for u in range(1, len(mate)):
                offset = u - EXAMPLES.prompt[j]
                limit = {"prompt": 0, "running": t - prompt, "full": NEVER}[head.scope]
                if offset < limit:
                    likeness = head.log_t.exp() / math.sqrt(C) * (h @ states[mate[u - 1]])
                    remembered[j != i].append((mate[u], likeness))
        logits = LMHead.forward(head, h) + head.lora_B @ (head.scale * head.lora_A @ h)
        parts, gates = [logits.log_softmax(dim=0)[tokens[t]]], [h.new_zeros(())]
        for memory, said in enumerate(remembered):
            if said:
                total_of = torch.stack([likeness for _, likeness in said]).logsumexp(dim=0)
                match = 10 * head.trust[memory] * (total_of - math.log(len(said)))
                gates.append(h @ head.share_of[memory] + 10 * head.share[memory] + match)
                parts += [gates[-1] + likeness - total_of for token, likeness in said
                          if token == tokens[t]]
        total = total - torch.stack(parts).logsumexp(dim=0) + torch.stack(gates).logsumexp(dim=0)
    return total


@pytest.mark.parametrize("scope", ["prompt", "running", "full"])
@pytest.mark.parametrize("control", [None, "own prompt only"])
@pytest.mark.parametrize("share", [(0.1, -0.1), (15.0, 14.9)])  # e^150 is past float32
@pytest.mark.parametrize("together", [0, cache.TOGETHER])
def test_the_loss_equals_remembering_one_token_at_a_time(scope, control, share, together,
                                                         monkeypatch):
    monkeypatch.setattr(cache, "TOGETHER", together)
    head = head_of(scope)
    head.share.data = torch.tensor(share)
    model, index = model_of(head), torch.tensor([4, 1, 0, 5])
    batch = company_batch(head, EXAMPLES, Company(CLUSTER, control), index)
    rows = losses(model, *batch)[1]
    assert len(rows) == len(batch[0]) and torch.equal(rows[4:], torch.zeros(len(rows) - 4))
    states = model.hidden(torch.arange(V))
    for b, i in enumerate(index.tolist()):
        expected = slow_loss(head, states, i, control)
        torch.testing.assert_close(rows[b], expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", ["prompt", "running"])
@pytest.mark.parametrize("together", [0, cache.TOGETHER])
def test_sharp_memories_have_the_loss_and_the_gradients_of_float64(scope, together, monkeypatch):
    monkeypatch.setattr(cache, "TOGETHER", together)
    head = head_of(scope)
    head.log_t.data.fill_(5.0)  # e^score is past float32, and scores are hundreds apart
    head.trust.data /= 100  # which would make the gates as large
    model = model_of(head)
    states = model.hidden(torch.arange(V)).detach()
    scores = head.log_t.exp() / math.sqrt(C) * states @ states.T
    assert scores.max() > 88 and (scores.amax(dim=1) - scores.amin(dim=1)).min() > 70
    trained = [p for p in head.parameters() if p is not head.weight]
    batch = company_batch(head, EXAMPLES, Company(CLUSTER), torch.arange(6))
    total, rows = losses(model, *batch)
    found = torch.autograd.grad(total, trained)
    exact = copy.deepcopy(head).double()
    exact.weight = head.weight.double()
    expected = torch.stack([slow_loss(exact, states.double(), i) for i in range(6)])
    torch.testing.assert_close(rows.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    trained = [p for p in exact.parameters() if p is not exact.weight]
    for a, b in zip(found, torch.autograd.grad(expected.sum(), trained), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("together", [0, cache.TOGETHER])
def test_log_probabilities_agree_with_the_loss_and_sum_to_one(together, monkeypatch):
    monkeypatch.setattr(cache, "TOGETHER", together)
    head = head_of()
    model, index = model_of(head), torch.arange(6)
    inputs, targets, statistics, knows = company_batch(head, EXAMPLES, Company(CLUSTER), index)
    log_p = everywhere(head, model.hidden(inputs), statistics, knows)
    torch.testing.assert_close(log_p.exp().sum(dim=2), torch.ones(log_p.shape[:2]))
    nll = -log_p.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0] * (targets != IGNORE)
    rows = losses(model, inputs, targets, statistics, knows)[1]
    torch.testing.assert_close(nll.sum(dim=1).detach(), rows)


@pytest.mark.parametrize("together", [0, cache.TOGETHER])
def test_what_is_not_known_has_no_say_whatever_it_is(together, monkeypatch):
    monkeypatch.setattr(cache, "TOGETHER", together)
    head, mine = head_of(), torch.tensor([0, 2, 4])
    inputs, _, statistics, knows = company_batch(
        head, EXAMPLES, Company(CLUSTER), torch.arange(6))
    hidden = model_of(head).hidden(inputs).detach()
    before = everywhere(head, hidden, statistics, knows)
    hidden[1], hidden[0, -1] = math.nan, math.nan  # of another cluster, and the latest of this one
    after = everywhere(head, hidden, statistics, knows)
    real = statistics[mine, :-1, 1] < NEVER
    assert torch.equal(before[mine, :-1][real], after[mine, :-1][real])


def test_the_gradients_are_those_of_the_log_probabilities():
    head = head_of()
    model = model_of(head)
    batch = company_batch(head, EXAMPLES, Company(CLUSTER), torch.arange(6))
    inputs, targets, statistics, knows = batch
    trained = [p for p in head.parameters() if p is not head.weight]
    found = torch.autograd.grad(losses(model, *batch)[0], trained)
    hidden = model.hidden(inputs)
    log_p = everywhere(head, hidden.detach(), statistics, knows)
    nll = -log_p.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
    expected = torch.autograd.grad(nll[targets != IGNORE].sum(), trained)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [3.0, 9.0, 30.0])  # of weights e^30 to e^300
def test_a_share_that_rounds_to_one_leaves_loss_and_gradients_finite(share):
    head = head_of()
    head.share.data.fill_(share)
    batch = company_batch(head, EXAMPLES, Company(CLUSTER), torch.arange(6))
    total, rows = losses(model_of(head), *batch)
    trained = [p for p in head.parameters() if p is not head.weight]
    assert rows.isfinite().all()
    assert all(d.isfinite().all() for d in torch.autograd.grad(total, trained))


def test_what_memories_add_to_the_loss_pass_gradcheck():
    torch.manual_seed(0)
    hidden, weight, z, B = (torch.randn(*shape, dtype=torch.float64, requires_grad=True)
                            for shape in ((7, C), (V, C), (7, 2), (V, 2)))
    log_extra = torch.rand(7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (7,))

    def loss(hidden, weight, z, B, log_extra):
        return linear_cross_entropy(hidden, weight, targets, [(z, B)], log_extra)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, z, B, log_extra))
    p = (hidden @ weight.T + z @ B.T).softmax(dim=1)[torch.arange(7), targets]
    expected = -(p + log_extra.exp()).log().sum()
    torch.testing.assert_close(loss(hidden, weight, z, B, log_extra), expected)


@pytest.mark.parametrize("control", [None, "own prompt only", "shuffled", "other articles"])
def test_scores_do_not_depend_on_the_batches(control, monkeypatch):
    torch.manual_seed(0)
    base = GPT(GPTConfig(block_size=13, vocab_size=V, n_layer=1, n_head=1, n_embd=8))
    plan = {"method": "company-cache", "rank": 2, "alpha": 4.0, "stat_scope": "running"}
    model = adapt(base, plan)
    for p in model.lm_head.parameters():
        torch.nn.init.normal_(p)
    run = Run(None, torch.device("cpu"), base=base)
    generator = torch.Generator().manual_seed(0)
    article = torch.tensor([0, 0, 1, 1, 2, 2])
    told = Told(CLUSTER, Company(CLUSTER, control, generator, article))
    whole = score(run, model, EXAMPLES, told)[0]
    for size in (1, 2, 4):
        monkeypatch.setattr(scoring, "ROWS", size)
        torch.testing.assert_close(score(run, model, EXAMPLES, told)[0], whole, rtol=1e-5, atol=0)


def test_who_is_told_of_whom_under_each_control():
    cluster, article = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 0, 1, 0, 1, 2])
    told = {"other articles": [[0, 2, 4, 5], [1, 2, 4, 5], [0, 1, 2, 3, 5], [2, 3, 4, 5],
                               [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
            "no later rows": [[0, 2, 4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5],
                              [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
            "own prompt only": [[i] for i in range(6)], None: [list(range(6))] * 6}
    for control, expected in told.items():
        company = Company(cluster, control, None, article)
        for i, mates in enumerate(expected):
            assert company.kept(torch.tensor([i]))[1].tolist() == mates
    shuffled = Company(torch.tensor([0, 5, 0, 5, 2, 2]), "shuffled",  # 3 and others have no member
                       torch.Generator().manual_seed(0))
    groups = [shuffled.kept(torch.tensor([i]))[1].tolist() for i in range(6)]
    assert sorted(groups[:2] + groups[4:5]) == [[0, 2], [1, 3], [4, 5]]
    assert all(i not in mates for i, mates in enumerate(groups))


@pytest.mark.parametrize("words, width", [(4, 4096), (300, 128)])  # of a topic; 128: projected
def test_topics_are_grouped(words, width, monkeypatch):
    monkeypatch.setattr(cache, "WIDTH", width)
    draw, rows = np.random.default_rng(0), []
    for topic in draw.permutation(np.repeat(range(3), 10)):
        rows.append(topic * words + draw.integers(words, size=12 * words))
    tokens, column, n = np.concatenate(rows), np.arange(30), 12 * words
    examples = rows_of(tokens, n * column, np.full(30, n), np.full(30, 8 * words), column)
    head = CompanyCacheHead(torch.zeros(3 * words, 8), 2, 4.0)
    cluster = head.fit_clusters(examples, 3, torch.Generator().manual_seed(0))
    topic = torch.from_numpy(tokens[::n] // words)
    assert torch.equal(cluster[:, None] == cluster, topic[:, None] == topic)


def test_training_requests_are_clustered_among_those_at_hand():
    draw = np.random.default_rng(0)
    tokens, column = draw.integers(12, size=12 * 50), np.arange(50)
    examples = rows_of(tokens, 12 * column, np.full(50, 12), np.full(50, 8), column)
    head = CompanyCacheHead(torch.zeros(12, 8), 2, 4.0, at_hand=20)
    cluster = head.fit_clusters(examples, 9, torch.Generator().manual_seed(0))
    parts = cluster.tensor_split(3)  # as even as can be: 17, 17, 16
    assert [len(part.unique()) for part in parts] == [3, 3, 3]
    assert len(cluster.unique()) == int(cluster.max()) + 1 == 9
    alone = head.group(examples, 3, torch.Generator().manual_seed(0), torch.arange(17))
    assert torch.equal(parts[0], alone)


def test_diffused_features_equal_a_slow_loop():
    features = torch.nn.functional.normalize(torch.rand(40, 6, dtype=torch.float64), dim=1)
    found = diffuse(features, "cpu", torch.float64, neighbours=3, rounds=2)
    similarity = features @ features.T
    graph = torch.zeros_like(similarity)
    for i in range(40):
        for j in similarity[i].argsort(descending=True)[:4]:  # itself and 3 more
            graph[i, j] = similarity[i, j]
    expected = features
    for _ in range(2):
        expected = torch.nn.functional.normalize(graph @ expected, dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context, seed", [(20, 0), (7, 135)])  # 135: the end of a row matters
def test_decoding_in_step_equals_scoring_what_was_decoded(context, seed):
    torch.manual_seed(seed)
    base = GPT(GPTConfig(block_size=context, vocab_size=V, n_layer=1, n_head=1, n_embd=8)).eval()
    plan = {"method": "company-cache", "rank": 2, "alpha": 4.0, "stat_scope": "running"}
    model = adapt(base, plan).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    prompts, steps, stop = [[1, 2, 3, 4, 1], [2, 3], [5, 1, 2]], 6, 7
    knows = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    found = generate(model, prompts, steps, knows, stop_token=stop)
    rows = [list(prompt) for prompt in prompts]

    def goes_on(row):
        return stop not in row and len(row) < context

    for _ in range(steps):  # every step anew, from rows that end with a token yet to be predicted
        length = np.array([len(row) + goes_on(row) for row in rows])
        tokens = [token for row in rows for token in [*row, *[0] * goes_on(row)]]
        examples = rows_of(np.array(tokens), length.cumsum() - length, length,
                           [len(p) for p in prompts], np.arange(3))
        company = Company(torch.tensor([0, 0, 1]))
        heard = company_batch(model.lm_head, examples, company, torch.arange(3))[3]
        assert torch.equal(heard, knows)
        log_p = all_logits(model, examples, Told(company.cluster, company))
        for row, p, n in zip(rows, log_p, length, strict=True):
            if goes_on(row):
                row.append(int(p[n - 2].argmax()))
    assert found == [row[len(p) :][: row.index(stop) - len(p)] if stop in row else row[len(p) :]
                     for row, p in zip(rows, prompts, strict=True)]
    assert len({tuple(row) for row in found}) > 1
    assert (max(map(len, rows)) == context) == (context == 7)  # one row has had to end there


def test_decoding_knows_no_token_that_is_yet_to_come():
    """Not in the scope that leaks either: what is not there cannot be remembered."""
    found = {}
    for scope in ("running", "full"):
        torch.manual_seed(0)
        base = GPT(GPTConfig(block_size=20, vocab_size=V, n_layer=1, n_head=1, n_embd=8)).eval()
        plan = {"method": "company-cache", "rank": 2, "alpha": 4.0, "stat_scope": scope}
        model = adapt(base, plan).eval()
        torch.nn.init.normal_(model.lm_head.share_of)
        model.lm_head.share.data.fill_(2.0)  # nothing but memories
        knows = torch.ones(2, 2, dtype=torch.bool)
        found[scope] = generate(model, [[7, 1, 2, 3], [4, 5]], 8, knows)
    assert found["running"] == found["full"]


def test_all_processes_draw_the_same_wrong_clusters():
    """Clusters are made by the first one alone, and with them go the draws that these take."""
    torch.manual_seed(0)
    base = GPT(GPTConfig(block_size=20, vocab_size=V, n_layer=1, n_head=1, n_embd=8))
    plan = {"method": "company-cache", "rank": 2, "alpha": 4.0, "stat_scope": "running",
            "seed": 0, "cluster_size": 1.5}
    model, made, drawn = adapt(base, plan), [], []
    for rank in range(2):
        run = Run(None, torch.device("cpu"), base=base, rank=rank)
        run.from_first = lambda make, rank=rank: made[0] if rank else made.append(make()) or made[0]
        company = held_out(run, model, EXAMPLES, plan, "fit", "shuffled").company
        drawn.append([members.tolist() for members in company.members])
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4
