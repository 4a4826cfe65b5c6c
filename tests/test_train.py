"""The loop: its losses and gradients against plain ones, resume after a kill, two processes."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import common
import train
from cluster import kmeans
from common import UserError, choose_device, choose_dtype, read_tensors, whole_file, write_tensors
from data import IGNORE
from hypernet import features, prompt_means
from model import LMHead
from tests.conftest import random_adapter, random_gpt, randomise
from tests.test_hypernet import make_rows
from train import fit, learning_rate, losses, make_adapter, n_trained, score

ROOT = Path(__file__).parents[1]
ROWS = make_rows([9, 13, 4, 7, 13, 2, 10, 5] * 4, [2, 3, 1, 3, 12, 1, 4, 2] * 4)
HELD_OUT = make_rows([8, 6, 12, 5, 13, 3, 7] * 6, [3, 2, 5, 1, 6, 2, 4] * 6)
CPU = torch.device("cpu")


def run_in(folder, dtype=torch.float32):
    return train.Run(Path(folder), CPU, dtype)


def plain_loss(model, rows, index, statistics=None):
    """Summed loss of the continuations' tokens, from whole logits, row by row."""
    total = 0.0
    for i in index.tolist():
        start, n, p = (int(x[i]) for x in (rows.start, rows.length, rows.prompt))
        tokens = rows.tokens[start:start + n].long()
        logits = model(tokens[None, :-1], None if statistics is None else statistics[i:i + 1])[0]
        total = total - logits.log_softmax(dim=1)[torch.arange(n - 1), tokens[1:]][p - 1:].sum()
    return total


@pytest.mark.parametrize("method", ["frozen", *train.RATES])
def test_losses_are_the_plain_ones_whatever_the_batch(gpt, method, monkeypatch):
    model = gpt if method == "frozen" else random_adapter(gpt, method)
    s, everything = torch.randn(len(ROWS), 16).double(), torch.arange(len(ROWS))
    expected = torch.stack([plain_loss(model, ROWS, everything[i:i + 1], s) for i in everything])
    for size in (1, 1 << 9, 1 << 11, 1 << 30):  # logits at a time: one row to all rows
        monkeypatch.setitem(train.LOGITS, "cpu", size)
        nll, count = score(run_in("."), model, ROWS, s)
        assert torch.allclose(nll, expected.detach())
    assert count.tolist() == (ROWS.length - ROWS.prompt).tolist()
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))
    nll = losses(model, *ROWS.batch(order), s[order])
    assert torch.allclose(nll, expected[order])


def test_whole_rows_are_scored_from_their_second_token_on(gpt):
    nll, count = score(run_in("."), gpt, ROWS, whole=True)
    rows = replace(ROWS, prompt=torch.ones_like(ROWS.prompt))  # as if nothing were a prompt
    expected = plain_loss(gpt, rows, torch.arange(len(ROWS)))
    assert nll.sum().item() == pytest.approx(float(expected))
    assert count.tolist() == [n - 1 for n in ROWS.length.tolist()]


@pytest.mark.parametrize("method", ["base", *train.RATES])
@pytest.mark.parametrize("chunk", [1, 1 << 11, 1 << 30])
def test_a_step_in_chunks_has_the_plain_gradients(monkeypatch, method, chunk):
    """In float64: gradients of the chunks add up to those of one plain loss."""
    base, s, index = random_gpt(), torch.randn(len(ROWS), 16).double(), torch.arange(20)
    whole = method == "base"
    model = base.requires_grad_(True) if whole else random_adapter(base, method)
    parameters = [p for p in model.parameters() if p.requires_grad]
    tokens, targets = ROWS.batch(index, whole)
    F.cross_entropy(model(tokens, s[index]).flatten(0, 1), targets.flatten(),
                    ignore_index=IGNORE).backward()
    plain = [p.grad for p in parameters]
    model.zero_grad()
    monkeypatch.setitem(train.LOGITS, "cpu", chunk)
    train.backward(run_in("."), model, ROWS, index, s[index], whole)
    for p, expected in zip(parameters, plain, strict=True):
        assert torch.allclose(p.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7])  # of one row the second process gets none
def test_processes_have_the_gradients_of_one_as_their_mean(n):
    base, index, s = random_gpt(), torch.arange(n), torch.randn(len(ROWS), 16).double()

    def gradients(rank, world):
        model = random_adapter(base, "chameleon")
        train.backward(train.Run(Path("."), CPU, rank=rank, world=world), model, ROWS, index,
                       s[index], False)
        return [p.grad for p in model.parameters() if p.requires_grad]

    whole, parts = gradients(0, 1), (gradients(0, 2), gradients(1, 2))
    for alone, *each in zip(whole, *parts, strict=True):
        assert torch.allclose(sum(each) / 2, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a peak there")
def test_the_peak_of_a_step_is_a_quarter_of_materialised_logits_at_most():
    """At GPT-2's vocabulary, in processes of their own: 8 rows of 128 tokens."""
    code = """
import sys, torch, train
from data import IGNORE, Rows
from model import GPT, GPTConfig
torch.set_num_threads(1)
model = GPT(GPTConfig(128, 50257, n_layer=1, n_head=1, n_embd=16))
n = torch.arange(8)
rows = Rows(torch.randint(50257, (8 * 129,)).int(), n * 129, n * 0 + 129, n * 0 + 32, n * 0)
def peak():  # getrusage's begins with that of the process that started this one
    return int(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1])
before = peak()
if sys.argv[1] == "plain":
    tokens, targets = rows.batch(n)
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(),
                                      ignore_index=IGNORE).backward()
else:
    run = train.Run(None, torch.device("cpu"))
    train.backward(run, model, rows, n, None, False)
print(peak() - before)
"""
    grown = {how: int(subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, check=True,
                                     capture_output=True, text=True).stdout)
             for how in ("plain", "chunks")}
    assert grown["chunks"] < grown["plain"] / 4


class BiasHead(LMHead):
    """A head that somebody else wrote: it overrides forward, and nothing else."""

    def __init__(self, weight):
        super().__init__(weight)
        self.bias = torch.nn.Parameter(torch.zeros(len(weight)))
        self.modes = []

    def forward(self, hidden, statistics=None):
        self.modes.append(self.training)
        return super().forward(hidden) + self.bias


def test_a_head_with_its_own_forward_is_trained_and_scored(tmp_path):
    base = random_gpt().float()
    model = make_adapter(base, {"method": "lora", "rank": 1, "alpha": 1.0})
    model.lm_head = BiasHead(model.lm_head.weight)
    before = score(run_in(tmp_path), model, ROWS)[0].sum()
    plan = {"method": "lora", "seed": 0, "lr": 0.1, "steps": 5, "steps_per_epoch": 1,
            "evaluations": 1}
    model.lm_head.modes.clear()
    fit(run_in(tmp_path), tmp_path / "a.safetensors", model, plan, ROWS,
        lambda epoch: [torch.arange(len(ROWS))], lambda i: None,
        lambda: score(run_in(tmp_path), model, ROWS))
    assert model.lm_head.modes == [True] * 5 + [False]  # a dropout of its own would know
    assert model.lm_head.bias.abs().min() > 0.01  # every word stands in the batch's logits
    assert score(run_in(tmp_path), model, ROWS)[0].sum() < before
    model.lm_head.bias.data[:] = 0
    model.lm_head.bias.data[5] = 50.0  # then nearly all is on word 5
    nll, _ = score(run_in(tmp_path), model, ROWS)
    assert nll.sum() > before + 10


@pytest.mark.parametrize("killed", [False, True])
def test_the_best_weights_are_kept_where_the_loss_rises_again(tmp_path, killed):
    """Also by a training that goes on after its best step."""
    plan = {"method": "lora", "seed": 0, "lr": 0.1, "steps": 4, "steps_per_epoch": 1,
            "evaluations": 4}
    seen, losses_of = {}, [3.0, 1.0, 2.0, 2.5]

    def attempt(stop_before):
        model = make_adapter(random_gpt().float(), {"method": "lora", "rank": 1, "alpha": 1.0})

        def evaluate():
            n = len(seen)
            if n == stop_before:
                raise KeyboardInterrupt
            seen[n] = {name: p.detach().clone() for name, p in train.weights(model).items()}
            return torch.tensor([losses_of[n]]), torch.tensor([1])

        torch.manual_seed(0)
        fit(run_in(tmp_path), tmp_path / "a.safetensors", model, plan, ROWS,
            lambda epoch: [torch.arange(len(ROWS))], lambda i: None, evaluate)

    if killed:
        with pytest.raises(KeyboardInterrupt):
            attempt(3)
    attempt(None)
    kept, info = read_tensors(tmp_path / "a.safetensors")
    assert info["done"]["best"] == 1.0
    assert all(torch.equal(t, seen[1][name]) for name, t in kept.items())
    assert any(not torch.equal(t, seen[3][name]) for name, t in kept.items())


@pytest.mark.parametrize("method", ["base", "lora"])
def test_training_takes_the_steps_of_adamw(tmp_path, method):
    """In float64, against its formulas (Loshchilov & Hutter 2019): moments, decay, clipping, rates,
    each epoch's own batches."""
    base, whole = random_gpt(), method == "base"
    model = base.requires_grad_(True) if whole else random_adapter(base, method)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    plan = {"method": method, "seed": 0, "lr": 0.01, "steps": 5, "steps_per_epoch": 2,
            "evaluations": 1}

    def batches(epoch):
        return torch.arange(len(ROWS)).roll(5 * epoch)[:16].split(8)

    fit(run_in(tmp_path), tmp_path / "a.safetensors", model, plan, ROWS, batches, lambda i: None,
        lambda: (torch.tensor([1.0]), torch.tensor([1])))
    found = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    parameters, norms = dict(model.named_parameters()), []
    for name, value in start.items():
        parameters[name].data.copy_(value)
    m, v = ({n: torch.zeros_like(p) for n, p in start.items()} for _ in range(2))
    for t in range(1, 6):
        tokens, targets = ROWS.batch(batches((t - 1) // 2)[(t - 1) % 2], whole)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        g = dict(zip(start, torch.autograd.grad(loss, [parameters[n] for n in start]), strict=True))
        norms.append(sum(x.square().sum() for x in g.values()).sqrt())
        lr = learning_rate(t - 1, 5, 0.01)
        for n, grad in g.items():
            grad = grad * min(1.0, 1.0 / norms[-1])
            decay = 0.1 if whole and grad.dim() > 1 else 0.0
            m[n] = 0.9 * m[n] + 0.1 * grad
            v[n] = 0.95 * v[n] + 0.05 * grad * grad
            step = m[n] / (1 - 0.9 ** t) / ((v[n] / (1 - 0.95 ** t)).sqrt() + 1e-8)
            parameters[n].data.mul_(1 - lr * decay).sub_(lr * step)
    assert max(norms) > 1.1  # one was clipped
    for n, value in found.items():
        assert torch.allclose(value, parameters[n], rtol=1e-6, atol=1e-7), n


def test_each_evaluation_is_recorded_once_also_when_a_kill_comes_before_its_state(
        tmp_path, monkeypatch):
    plan = {"method": "lora", "seed": 0, "lr": 0.1, "steps": 4, "steps_per_epoch": 2,
            "evaluations": 4}
    others = [{"method": "base", "seed": 0, "step": 9, "tokens": 5, "loss": 2.0},
              {"method": "lora", "seed": 1, "step": 9, "tokens": 5, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in others))
    batches = torch.arange(len(ROWS)).split(len(ROWS) // 2)
    real = train.write_tensors

    def killed(path, tensors, info):
        if info["done"]["step"] == 3:
            raise KeyboardInterrupt
        real(path, tensors, info)

    def attempt():
        model = make_adapter(random_gpt().float(), {"method": "lora", "rank": 1, "alpha": 1.0})
        fit(run_in(tmp_path), tmp_path / "a.safetensors", model, plan, ROWS, lambda epoch: batches,
            lambda i: None, lambda: (torch.tensor([3.0]), torch.tensor([2])))

    monkeypatch.setattr(train, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert [r["step"] for r in train.read_records(tmp_path)] == [9, 9, 1, 2, 3]
    monkeypatch.setattr(train, "write_tensors", real)
    attempt()
    read = [int(ROWS.length[index].sum()) for index in batches * 2]
    assert train.read_records(tmp_path) == others + [
        {"method": "lora", "seed": 0, "step": i + 1, "tokens": sum(read[:i + 1]), "loss": 1.5}
        for i in range(4)]


def test_a_state_is_kept_every_minute(tmp_path, monkeypatch):
    clock, kept, real = iter(range(10**9)), [], train.write_tensors
    monkeypatch.setattr(train.time, "perf_counter", lambda: 10.0 * next(clock))

    def write(path, tensors, info):
        kept.append(info["done"]["step"])
        real(path, tensors, info)

    monkeypatch.setattr(train, "write_tensors", write)
    plan = {"method": "lora", "seed": 0, "lr": 0.1, "steps": 20, "steps_per_epoch": 1,
            "evaluations": 1}
    model = make_adapter(random_gpt().float(), {"method": "lora", "rank": 1, "alpha": 1.0})
    fit(run_in(tmp_path), tmp_path / "a.safetensors", model, plan, ROWS,
        lambda epoch: [torch.arange(8)], lambda i: None,
        lambda: (torch.tensor([1.0]), torch.tensor([1])))
    assert kept[-2:] == [20, 20]  # the last state, the result
    gaps = [b - a for a, b in itertools.pairwise([0, *kept[:-2]])]
    assert 1 < min(gaps) <= max(gaps) <= 4  # a step reads the clock two or three times


def test_no_frozen_parameter_moves(tmp_path):
    base = random_gpt().float()
    model = make_adapter(base, {"method": "chameleon", "rank": 2, "alpha": 4.0, "clusters": 2})
    model.lm_head.spread += 1
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    plan = {"method": "chameleon", "seed": 0, "lr": 0.1, "steps": 3, "steps_per_epoch": 1,
            "evaluations": 1}
    s = torch.randn(len(ROWS), 16)
    fit(run_in(tmp_path), tmp_path / "a.safetensors", model, plan, ROWS,
        lambda epoch: [torch.arange(len(ROWS))], lambda i: s[i],
        lambda: score(run_in(tmp_path), model, ROWS, s))
    now = dict(model.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in frozen.items())
    assert not any(torch.equal(p, now[n]) for n, p in trained.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {*trained, "lm_head.center", "lm_head.spread",
                                    "lm_head.clusters"}


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.4) and rates[4] == rates[5] == 2.0 == max(rates)
    assert rates[99] == pytest.approx(0.2, abs=0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))
    assert learning_rate(0, 1, 2.0) == 2.0


def test_lists_hold_nothing_twice():
    args = train.parse(["--seeds", "3,0,3", "--methods", "lora,chameleon,lora"])
    assert args.seeds == [3, 0] and args.methods == ["lora", "chameleon"]


def test_draws_are_each_seeds_and_epochs_own_and_the_same_again():
    drawn = {(seed, epoch): tuple(torch.rand(4, generator=train.generator(seed, epoch)).tolist())
             for seed in range(4) for epoch in range(9)}
    assert len(set(drawn.values())) == len(drawn)
    assert torch.rand(4, generator=train.generator(3, 8)).tolist() == list(drawn[3, 8])


@pytest.mark.parametrize("rows, batch, epochs, limit, expected", [
    (40, 8, 1, 99, (5, 5)), (41, 8, 1, 99, (6, 6)), (41, 8, 2.5, 99, (15, 6)),
    (41, 8, 2, 7, (7, 6)), (3, 8, 0.1, 99, (1, 1))])
def test_the_steps_of_a_training(rows, batch, epochs, limit, expected):
    plan = train.plan_steps(rows, batch, epochs, 4, limit)
    assert (plan["steps"], plan["steps_per_epoch"]) == expected
    assert plan["evaluations"] == min(4, plan["steps"])


def test_clusters_have_as_many_rows_as_asked_on_average():
    args = train.parse(["--cluster-size", "8"])
    plan = train.adapter_plan(args, random_gpt().float(), "", "chameleon", 0, n_rows=103)
    assert (plan["clusters"], plan["cluster_size"]) == (13, 8)


def test_lora_match_has_chameleons_parameters(finished_run):
    run = {}
    base = train.load_base(finished_run / "base.safetensors", CPU)
    for name in train.RATES:
        path = finished_run / "adapters" / f"{name}-seed0.safetensors"
        model, _plan = train.load_adapter(base, train.fingerprint(base), path)
        run[name] = n_trained(model)
        assert not any(module.training for module in model.modules())
    assert run["lora"] < run["lora-match"]
    assert abs(run["lora-match"] - run["chameleon"]) <= run["lora"] / 4  # within half a rank, of 4
    heads = {name: train.load_adapter(base, train.fingerprint(base), finished_run / "adapters" /
                                      f"{name}-seed0.safetensors")[0].lm_head
             for name in ("lora", "lora-match")}
    assert heads["lora"].scale == heads["lora-match"].scale == 2.0  # alpha rises with the rank


def test_a_loss_in_16_bits_is_that_of_its_logits_in_32():
    logits = (torch.randn(1, 7, 500, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, statistics=None, start=0):
            return logits[:, start:]

    targets = torch.arange(7)[None] * 60
    found = losses(Model(), torch.zeros(1, 7).long(), targets)
    exact = F.cross_entropy(logits[0].double(), targets[0], reduction="sum")
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("batches", ["shuffled", "clustered"])
def test_chameleons_batches_and_what_their_rows_are_told(tmp_path, monkeypatch, batches):
    """The paper's come from one cluster, and hear of its rows in the batch alone; else any rows
    come together, each told of its whole cluster."""
    taken = {}
    monkeypatch.setattr(train, "fit", lambda run, path, model, plan, rows, drawn, told, evaluate:
                        taken.update(batches=drawn(0), told=told, model=model, score=evaluate))
    base = random_gpt().float()
    plan = {"method": "chameleon", "seed": 0, "rank": 2, "alpha": 4.0, "clusters": 3,
            "cluster_size": 12, "batch_size": 4, "batches": batches}
    train.train_adapter(run_in(tmp_path), tmp_path / "a.safetensors", base, plan, ROWS, HELD_OUT)
    means, count = prompt_means(ROWS, base.transformer.wte.weight)
    points = features(means, means.mean(dim=0))
    cluster = kmeans(points, 3, train.generator(0))[1]
    assert sorted(torch.cat(taken["batches"]).tolist()) == list(range(len(ROWS)))
    pure = [len(cluster[index].unique()) == 1 for index in taken["batches"]]
    assert sum(pure) >= len(pure) - 3 if batches == "clustered" else not all(pure)
    for index in taken["batches"]:
        for i, told in zip(index.tolist(), taken["told"](index), strict=True):
            there = index if batches == "clustered" else torch.arange(len(ROWS))
            heard = there[cluster[there] == cluster[i]]
            expected = (means[heard] * count[heard, None]).sum(dim=0) / count[heard].sum()
            assert torch.allclose(told, expected, atol=1e-5)

    # Held-out rows are clustered among themselves, beside the training's mean.
    randomise(taken["model"].lm_head.hypernetwork)
    theirs, their_count = prompt_means(HELD_OUT, base.transformer.wte.weight)
    cluster = kmeans(features(theirs, means.mean(dim=0)), round(len(HELD_OUT) / 12),
                     train.generator(0))[1]
    expected = torch.stack([
        (theirs[c] * their_count[c, None]).sum(dim=0) / their_count[c].sum()
        for c in (cluster == own for own in cluster)])
    nll, count = taken["score"]()
    assert torch.allclose(nll, score(run_in("."), taken["model"], HELD_OUT, expected)[0], rtol=1e-5)
    assert not torch.allclose(nll, score(run_in("."), taken["model"], HELD_OUT, theirs)[0],
                              rtol=1e-5)


def test_a_base_reads_and_is_validated_on_whole_rows(tmp_path, monkeypatch):
    taken = {}
    monkeypatch.setattr(train, "fit", lambda run, path, model, plan, rows, drawn, told, evaluate:
                        taken.update(rows=rows, drawn=drawn, told=told, count=evaluate()[1]))
    config = {"block_size": 12, "vocab_size": 31, "n_layer": 1, "n_head": 1, "n_embd": 8}
    train.train_base(run_in(tmp_path), tmp_path / "base.safetensors",
                     {"seed": 0, "batch_size": 4, "config": config}, ROWS, HELD_OUT)
    assert taken["count"].tolist() == (HELD_OUT.length - 1).tolist()
    epochs = [torch.cat(taken["drawn"](epoch)).tolist() for epoch in (0, 1)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(
        range(len(ROWS)))
    assert taken["rows"] is ROWS and taken["told"](torch.arange(2)) is None


def test_an_adapter_fits_no_other_base(finished_run):
    base = train.load_base(finished_run / "base.safetensors", CPU)
    assert not any(p.requires_grad for p in base.parameters())
    before, found = train.fingerprint(base), set()
    for p in base.parameters():  # any number of any of them counts
        p.data.view(-1)[-1] += 1
        found.add(train.fingerprint(base))
    assert len(found | {before}) == len(list(base.parameters())) + 1
    with pytest.raises(UserError, match="not an adapter of this base"):
        train.load_adapter(base, train.fingerprint(base),
                           finished_run / "adapters" / "lora-seed0.safetensors")


# --------------------------------------------------------------------------------- whole programs


def contents(folder):
    """What a run has made, to the last bit: tensors, and records without times."""
    found = {p.name: {n: t.tolist() for n, t in read_tensors(p)[0].items()}
             for p in sorted(folder.rglob("*.safetensors"))}
    return found, train.read_records(folder)


def test_resume_after_a_kill_at_any_step_ends_as_if_nothing_had_happened(
        arguments, tmp_path, monkeypatch):
    whole = contents(train.main([*arguments[:-1], str(tmp_path / "whole")]))
    clock, real = iter(range(10**9)), train.learning_rate
    monkeypatch.setattr(train.time, "perf_counter", lambda: 50.0 * next(clock))  # a state a step
    calls = 0

    def killed(step, total, peak):
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise KeyboardInterrupt
        return real(step, total, peak)

    monkeypatch.setattr(train, "learning_rate", killed)
    kills = 0
    while True:
        try:
            train.main([*arguments, *(["--resume"] if kills else [])])
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 5
    assert contents(tmp_path / "run") == whole
    assert not list((tmp_path / "run").rglob("*.state"))


def test_an_interrupted_training_is_not_written_over(arguments, monkeypatch):
    real = train.write_tensors

    def full(path, tensors, info):
        if path.suffix == ".safetensors" and "adapters" in str(path):
            raise OSError("No space left on device")
        real(path, tensors, info)

    monkeypatch.setattr(train, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        train.main(arguments)
    monkeypatch.setattr(train, "write_tensors", real)
    with pytest.raises(UserError, match="interrupted training; add --resume"):
        train.main(arguments)
    with pytest.raises(UserError, match=r"state was made with rank = 4, not 3"):
        train.main([*arguments, "--resume", "--rank", "3"])
    train.main([*arguments, "--resume"])


def test_more_methods_and_seeds_use_the_base_that_is_there(arguments, capsys):
    out = train.main([*arguments, "--methods", "lora"])
    before = (out / "base.safetensors").read_bytes()
    train.main([*arguments, "--methods", "lora,chameleon", "--seeds", "0,1"])
    assert (out / "base.safetensors").read_bytes() == before
    assert "lora-seed0.safetensors: trained before" in capsys.readouterr().out
    names = sorted(p.name for p in (out / "adapters").iterdir())
    assert names == [f"{m}-seed{s}.safetensors" for m in ("chameleon", "lora") for s in (0, 1)]
    kept = (out / "config.json").read_bytes()
    for change in (["--rank", "3"], ["--base-lr", "1e-4"], ["--block-size", "12"],
                   ["--base-dataset", "pymanual"]):
        with pytest.raises(UserError, match="was made with"):
            train.main([*arguments, *change])
    assert (out / "config.json").read_bytes() == kept  # a run that is refused changes nothing


def test_a_run_on_other_text_or_another_base_is_refused(finished_run, corpus, tmp_path):
    text = Path(shutil.copytree(corpus, tmp_path / "text"))
    arguments = ["--dataset", str(text), "--block-size", "24", "--methods", "lora", "--max-steps",
                 "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    train.main([*arguments, "--base", str(finished_run / "base.safetensors")])
    other = Path(shutil.copytree(finished_run, tmp_path / "other"))
    with pytest.raises(UserError, match="a run on another base"):
        train.main([*arguments, "--base", str(other / "base.safetensors"), "--methods",
                    "chameleon"])
    with open(text / "text0.txt", "a", encoding="utf-8") as file:
        file.write("a word more\n")
    with pytest.raises(UserError, match="a run on other text"):
        train.main([*arguments, "--base", str(finished_run / "base.safetensors"), "--methods",
                    "chameleon"])


def test_the_state_of_a_finished_training_is_cleared(arguments, capsys):
    out = train.main([*arguments, "--methods", "lora"])
    path = out / "adapters" / "lora-seed0.safetensors"
    shutil.copy(path, path.with_suffix(".state"))  # as a kill between the last two steps leaves it
    capsys.readouterr()
    train.main([*arguments, "--methods", "lora"])
    assert "trained before" in capsys.readouterr().out
    assert not path.with_suffix(".state").exists()


def test_adapters_of_a_base_that_is_gone_are_refused(arguments):
    out = train.main([*arguments, "--methods", "lora"])
    (out / "base.safetensors").unlink()
    with pytest.raises(UserError, match="adapters of a base that is gone"):
        train.main([*arguments, "--methods", "lora"])
    shutil.rmtree(out / "adapters")
    train.main([*arguments, "--methods", "lora"])


def test_one_table_has_one_setting_but_rates(arguments):
    train.main([*arguments, "--methods", "lora"])
    train.main([*arguments, "--methods", "lora-match", "--lr", "1e-4", "--cluster-size", "20"])
    for change in (["--max-steps", "8"], ["--rank", "3"], ["--batch-size", "8"]):
        with pytest.raises(UserError, match=r"lora-seed0\.safetensors was made with"):
            train.main([*arguments, "--methods", "chameleon", *change])


def test_an_interrupted_start_leaves_no_setting_behind(arguments, monkeypatch):
    """What --vocab-size says is what the tokenizer has, and a trained base's does not change."""
    monkeypatch.setattr(train, "train_base", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.main([*arguments, "--vocab-size", "270"])
    monkeypatch.undo()
    out = train.main([*arguments, "--methods", "lora"])
    assert train.Tokenizer.load(out / "tokenizer.json").vocab_size == 300
    with pytest.raises(UserError, match="asked_vocab_size"):
        train.main([*arguments, "--resume", "--vocab-size", "290"])


def test_a_runs_folder_is_a_base_and_tells_what_it_has_read(
        finished_run, corpus, tmp_path, monkeypatch):
    small = ["--dataset", str(corpus), "--block-size", "24", "--max-steps", "2", "--device", "cpu"]
    monkeypatch.chdir(finished_run.parent)
    out = train.main([*small, "--base", finished_run.name, "--methods", "lora",
                      "--out", str(tmp_path / "r")])
    assert train.read_config(out)["read"] == train.read_config(finished_run)["read"]
    monkeypatch.chdir(tmp_path)  # its relative name leads nowhere from here
    train.main(["--resume", "--out", "r", "--methods", "lora,chameleon"])
    with pytest.raises(UserError, match="is a folder of text"):
        train.main([*small, "--out", str(corpus)])


def test_all_files_of_a_run_can_be_read_by_the_same_people(finished_run):
    modes = {p.stat().st_mode for p in finished_run.rglob("*") if p.is_file()}
    assert len(modes) == 1


def test_the_share_of_each_kind_is_said(arguments, corpus, capsys):
    names = [str(corpus), str(corpus / "text1.txt")]  # 8 equal files, and one of them
    train.main([*arguments, "--dataset", ",".join(names), "--methods", "lora"])
    said = capsys.readouterr().out.split("of which ")[1].splitlines()[0]
    found = dict(part.rsplit(" ", 1) for part in said.split(", "))
    assert list(found) == names
    assert 80 < float(found[names[0]].rstrip("%")) < 93
    short = Path(arguments[-1]).parent / "short.jsonl"  # many rows of few tokens
    short.write_text("".join(json.dumps({"prompt": f"the {i}", "completion": "road"}) + "\n"
                             for i in range(99)))
    train.main([*arguments[:-1], str(short.parent / "other"), "--dataset",
                f"{corpus},{short}", "--methods", "lora"])
    assert float(capsys.readouterr().out.split(f"{short} ")[1].split("%")[0]) < 15


@pytest.mark.parametrize("batches", ["shuffled", "clustered"])
def test_another_runs_base_and_both_kinds_of_batches(finished_run, corpus, tmp_path, batches):
    out = train.main(["--dataset", str(corpus), "--base", str(finished_run / "base.safetensors"),
                      "--block-size", "24", "--methods", "chameleon", "--batches", batches,
                      "--max-steps", "8", "--evaluations", "2", "--dtype", "float32",
                      "--lr", "3e-3", "--device", "cpu", "--cluster-size", "16",
                      "--out", str(tmp_path / "r")])
    first, last = [r["loss"] for r in train.read_records(out)]
    assert last < first
    assert not (out / "base.safetensors").exists()


def test_a_gpt2_folder_is_a_base(tmp_path, corpus, monkeypatch):
    transformers = pytest.importorskip("transformers")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "weights")
    learn = train.Tokenizer.learn(["the river runs under the stone " * 9], 300)
    # GPT-2's own vocabulary needs a file from the network: another stands in for it
    monkeypatch.setattr(train, "Tokenizer", lambda spec: learn)
    small = ["--dataset", str(corpus), "--base", str(tmp_path / "weights"), "--methods", "lora",
             "--max-steps", "2", "--device", "cpu", "--out", str(tmp_path / "r")]
    learn.vocab_size = 301
    with pytest.raises(UserError, match="the tokenizer knows"):
        train.main([*small, "--block-size", "24"])
    learn.vocab_size = 300
    with pytest.raises(UserError, match="--block-size is 256"):
        train.main(small)
    assert (train.main([*small, "--block-size", "24"]) / "adapters").exists()


def test_auto_takes_gpt2_where_there_is_a_gpu_and_says_why(tmp_path, monkeypatch):
    def chosen(dataset, device):
        args = train.parse(["--dataset", dataset, "--data-dir", str(tmp_path)])
        return train.choose_base(args, torch.device(device))

    assert chosen("python", "cuda")[0] == "scratch"
    assert chosen("wikitext2", "cpu") == ("scratch", "there is no GPU")
    monkeypatch.setattr(train, "find_gpt2", lambda name, folder: tmp_path)
    assert chosen("wikitext2", "cuda")[0] == "gpt2"
    assert chosen("python", "cuda") == ("scratch", "the default for --dataset python")

    def fail(name, folder):
        raise UserError("cannot be reached")

    monkeypatch.setattr(train, "find_gpt2", fail)
    assert chosen("wikitext2", "cuda") == ("scratch", "cannot be reached")


def test_two_processes_train_what_one_does(arguments, tmp_path):
    whole = train.main([*arguments[:-1], str(tmp_path / "one")])
    script = tmp_path / "go.py"
    script.write_text("import model, train, sys\nif __name__ == '__main__':\n"
                      "    model.SIZES['tiny'] = dict(n_layer=2, n_head=2, n_embd=16)\n"
                      "    train.main(sys.argv[1:])\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_port=29671", str(script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("done; the table") == 1  # one speaks for both
    one, two = train.read_records(whole), train.read_records(tmp_path / "run")
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], abs=2e-4)
    assert [(r["method"], r["step"]) for r in two] == [(r["method"], r["step"]) for r in one]


def test_a_loss_that_is_no_number_ends_in_a_line(arguments):
    with pytest.raises(UserError, match="the loss is nan at step 3; lower --lr"):
        train.main([*arguments, "--lr", "100", "--alpha", "1e9", "--methods", "lora"])


@pytest.mark.parametrize("extra, message", [
    (["--methods", "lora,nonsense"], "'nonsense' is not one of lora"),
    (["--rank", "0"], "must be a number from 1"), (["--lr", "x"], "must be a number"),
    (["--nonsense"], "see --help"), (["--device", "cuda"], "has none"),
    (["--base", "nowhere"], "--base nowhere: neither"), (["--seeds", "0,-1"], "from 0"),
    (["--resume"], "holds no run; train one first"),
    (["--base", "README.md"], "README.md is damaged"),
    (["--dataset", "nowhere"], "no data set 'nowhere'"),
])
def test_bad_arguments_are_told_in_one_line(arguments, extra, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        train.run_cli(lambda: train.main([*arguments, *extra]))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and message in told
    assert told.startswith("train.py: error: ") and told.count("\n") == 1


def test_the_program_itself_ends_with_status_2(tmp_path):
    for program in ("train.py", "eval.py"):
        done = subprocess.run([sys.executable, program, "--nonsense"], cwd=ROOT, text=True,
                              capture_output=True, timeout=120)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")


@pytest.mark.parametrize("error, status, message", [
    (KeyboardInterrupt(), 130, "--resume goes on"), (OSError(28, "No space left"), 2, "No space"),
    (RuntimeError("CUDA out of memory"), 2, "--batch-size needs less"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--batch-size needs less")])
def test_how_a_program_ends(error, status, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        train.run_cli(main)
    assert ended.value.code == status and message in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a mistake of ours"):  # is not hidden
        train.run_cli(lambda: (_ for _ in ()).throw(RuntimeError("a mistake of ours")))


def printing(text, **options):
    code = f"import common; common.run_cli(lambda: print({text!r} * 99))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120,
                          stderr=subprocess.PIPE, **options)


def test_output_that_nobody_reads_ends_the_program_quietly():
    read, write = os.pipe()
    os.close(read)
    done = printing("x", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_output_that_knows_ascii_alone_is_spelt_out():
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = printing("\u6771", stdout=subprocess.PIPE, env=env)
    assert (done.returncode, done.stderr) == (0, b"") and b"\\u6771\\u6771" in done.stdout


# --------------------------------------------------------------------------------------- common


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_tensors_of_any_layout_come_back(tmp_path):
    tensors = {"a": torch.arange(12.0).view(3, 4).T, "b": torch.ones((), dtype=torch.int32)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"x": 1})
    found, info = read_tensors(tmp_path / "a.safetensors")
    assert info == {"x": 1} and all(torch.equal(found[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("spoil", ["cut", "header", "missing", "no info", "a list", "deep"])
def test_damaged_tensors_are_told_in_one_line(tmp_path, spoil):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {"plan": {}})
    assert read_tensors(path)[0]["a"].tolist() == [1, 1, 1]
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif spoil == "header":
        path.write_bytes(b"\0" * 64)
    elif spoil in ("no info", "a list", "deep"):
        info = {"no info": None, "a list": {"info": "[]"}, "deep": {"info": "[" * 100_000}}[spoil]
        save_file({"a": torch.ones(3)}, path, metadata=info)
    else:
        path.unlink()
    with pytest.raises(UserError) as error:
        read_tensors(path)
    assert "\n" not in error.value.args[0]


def test_a_torn_last_record_does_not_count(tmp_path):
    record = {"method": "lora", "seed": 0, "step": 1, "tokens": 2, "loss": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + '\n5\n{}\n{"st')
    assert train.read_records(tmp_path) == [record]


@pytest.mark.parametrize("seconds, expected", [((1, 3), torch.bfloat16), ((3, 1), torch.float32),
                                               ((1, 1.2), torch.float32)])
def test_the_type_of_products_on_a_cpu_is_the_faster_one(monkeypatch, seconds, expected):
    # bfloat16, float32, in turns
    clock = itertools.accumulate(itertools.cycle([0, seconds[0], 0, seconds[1]]))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    assert choose_dtype("auto", CPU)[0] == expected


@pytest.mark.parametrize("cuda, mps, chosen", [(True, False, "cuda"), (True, True, "cuda"),
                                               (False, True, "mps"), (False, False, "cpu")])
def test_the_device_is_the_first_that_is_here(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto")[0].type == chosen
    for name, there in (("cuda", cuda), ("mps", mps), ("cpu", True)):
        if there:
            assert choose_device(name)[0].type == name
        else:
            with pytest.raises(UserError, match="has none"):
                choose_device(name)


def test_a_gpu_computes_in_bfloat16_where_it_has_it_itself(monkeypatch):
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True, has_it=has_it:
                            has_it or including_emulation)
        assert choose_dtype("auto", torch.device("cuda"))[0] == dtype
    assert choose_dtype("auto", torch.device("mps"))[0] == torch.float32


def test_the_type_of_products_is_chosen_and_said():
    dtype, why = choose_dtype("auto", CPU)
    assert dtype in (torch.float32, torch.bfloat16) and "times as fast" in why
    assert choose_dtype("bfloat16", CPU) == (torch.bfloat16, "asked for")


def test_bfloat16_scores_what_float32_does_nearly(gpt):
    model = random_gpt().float()
    exact = score(run_in("."), model, ROWS)[0].sum()
    low = score(run_in(".", torch.bfloat16), model, ROWS)[0].sum()
    assert low != exact and math.isclose(low, exact, rel_tol=0.02)
