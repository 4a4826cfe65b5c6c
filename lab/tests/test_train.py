import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import train as core
from common import UserError, read_tensors, write_tensors
from hypernet import prompt_means
from lab import eval, scoring, train, turns
from lab.cache import CacheHead, CompanyCacheHead
from lab.common import Run, adapt, open_run, read_records
from lab.data import IGNORE
from lab.flags import METHODS, read_json
from lab.model import GPT, GPTConfig
from lab.scoring import company_batch, held_out, score
from lab.tests.conftest import fitted, rows_of, with_base
from lab.train import learning_rate, shuffled
from lab.turns import linear_cross_entropy

# ------------------------------------------------------------------------------------- batches


def test_batches_of_an_epoch_are_the_same_again_and_of_others_are_not():
    as_lists = [[b.tolist() for b in shuffled(50, 8, seed, epoch)]
                for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert as_lists[0] == as_lists[1]
    assert as_lists[0] != as_lists[2] != as_lists[3] != as_lists[0]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(1, 6), st.integers(1, 4))
def test_a_step_has_the_rows_of_its_batches_with_like_lengths_together(lengths, size, accumulate):
    length, N = torch.tensor(lengths), len(lengths)
    run = Run(Path(), torch.device("cpu"), examples={"train": SimpleNamespace(length=length)})
    per_epoch = -(-N // (size * accumulate))
    plan = {"steps": per_epoch, "steps_per_epoch": per_epoch, "accumulate": accumulate,
            "batch_size": size, "seed": 0}
    drawn = shuffled(N, size, 0, 0)
    steps = list(train.upcoming(run, plan, 0, lambda index: index, length - 1, None))
    assert len(steps) == per_epoch
    for step, (n_scored, n_read, loaded) in enumerate(steps):
        asked = drawn[step * accumulate : (step + 1) * accumulate]
        found = [index for _, index in loaded]
        rows = torch.cat(found).tolist()
        assert sorted(rows) == sorted(torch.cat(asked).tolist())
        assert len(found) == len(asked) and max(map(len, found)) <= size
        assert n_read == sum(lengths[i] for i in rows) == n_scored + len(rows)
        if len(asked) == 1:  # as drawn
            assert rows == asked[0].tolist()
        else:
            assert [lengths[i] for i in rows] == sorted(lengths[i] for i in rows)


# --------------------------------------------------------------------------------------- metric

V, C, T = 30, 8, 12


@pytest.mark.parametrize("bytes_at_a_time", [1, 4 * 11 * 2, 1 << 20])
def test_the_hand_written_backward_passes_gradcheck(bytes_at_a_time, monkeypatch):
    monkeypatch.setattr(turns, "LOGITS_BYTES", bytes_at_a_time)
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 5), (11, 5), (9, 2), (11, 2)]
    hidden, weight, z, B = (torch.randn(shape, generator=generator, dtype=torch.float64,
                                        requires_grad=True) for shape in shapes)
    targets = torch.randint(11, (9,), generator=generator)
    torch.autograd.gradcheck(
        lambda h, W, z, B: linear_cross_entropy(h, W, targets, [(z, B)])[0],
        (hidden, weight, z, B))
    torch.autograd.gradcheck(
        lambda h, W: linear_cross_entropy(h, W, targets)[0], (hidden, weight))
    each = F.cross_entropy(hidden @ weight.T + z @ B.T, targets, reduction="none")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, [(z, B)])[1],
                               each.detach())


def test_no_table_of_all_logits_is_made(monkeypatch):
    monkeypatch.setattr(turns, "LOGITS_BYTES", 4 * V * 20)  # of 72 tokens
    hidden = torch.randn(6 * T, C, requires_grad=True)
    z, B = (torch.randn(n, 2, requires_grad=True) for n in (6 * T, V))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and V in out.shape:
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, torch.randn(V, C), torch.randint(V, (6 * T,)),
                             [(z, B)])[0].backward()
    assert largest == 20 * V


def examples_of(lengths, prompts, seed=0):
    lengths = np.array(lengths)
    tokens = np.random.default_rng(seed).integers(0, V, lengths.sum())
    start = np.cumsum(lengths) - lengths
    return rows_of(tokens, start, lengths, prompts, np.arange(len(lengths)))


def run_with(base):
    return Run(None, torch.device("cpu"), torch.float32, base=base)


@torch.no_grad()
def slow_score(model, examples, told, whole):
    """One row at a time, unpadded, one token at a time."""
    losses = []
    for i in range(len(examples)):
        n = int(examples.length[i])
        row = examples.tokens[int(examples.start[i]):][:n]
        if isinstance(model.lm_head, CacheHead):
            inputs, _, *heard = company_batch(
                model.lm_head, examples, told.company, torch.tensor([i]))
            wanted = torch.zeros(inputs.shape, dtype=torch.bool)
            wanted[0, : n - 1] = True
            log_p = model.lm_head(model.hidden(inputs), *heard, wanted)
        else:
            statistic = told and told.table[i:i + 1]
            log_p = model(row[None, :-1], statistic)[0].log_softmax(-1)
        first = 1 if whole else int(examples.prompt[i])
        losses.append(-sum(log_p[t - 1, row[t]].item() for t in range(first, n)))
    return np.array(losses)


@pytest.mark.parametrize("method, whole", [
    *((method, False) for method in METHODS), ("frozen", True), ("lora", True)])
@torch.no_grad()
def test_scores_do_not_depend_on_batch_size_or_padding_and_equal_a_slow_loop(
        method, whole, monkeypatch):
    torch.manual_seed(0)
    base = GPT(GPTConfig(T, V, n_layer=1, n_head=2, n_embd=C))
    plan = {"method": method, "rank": 2, "alpha": 4.0, "head_form": "full", "clusters": 2,
            "stat_scope": "running" if "cache" in method else "prompt",
            "cluster_size": 3, "seed": 0}
    model = base if method == "frozen" else adapt(base, plan)
    model.eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    examples = examples_of([13, 5, 2, 9, 13, 7, 4], [3, 1, 1, 8, 3, 2, 3])
    fitted(run_with(base), model, plan, examples)
    told = held_out(run_with(base), model, examples, plan, "fit")
    expected = slow_score(model, examples, told, whole)
    first = 1 if whole else examples.prompt
    for rows in (1, 3, 100):
        monkeypatch.setattr(scoring, "ROWS", rows)
        monkeypatch.setitem(core.LOGITS, "cpu", rows * T * V)
        nll, counts = score(run_with(base), model, examples, told, whole=whole)
        np.testing.assert_allclose(nll, expected, rtol=1e-4)
        assert torch.equal(counts, examples.length - first)


def test_controls_change_the_statistics_and_nothing_else():
    torch.manual_seed(0)
    base = GPT(GPTConfig(T, V, n_layer=1, n_head=2, n_embd=C))
    plan = {"method": "chameleon", "rank": 2, "alpha": 4.0, "head_form": "full", "clusters": 3,
            "stat_scope": "prompt", "cluster_size": 4, "seed": 0}
    model = adapt(base, plan)
    examples = examples_of([13] * 12, [3] * 12)
    run = run_with(base)
    fitted(run, model, plan, examples)
    real, *controls = (held_out(run, model, examples, plan, "fit", control)
                       for control in (None, "own prompt only", "shuffled", "constant"))
    own, shuffled, constant = controls
    assert torch.equal(shuffled.cluster, real.cluster)
    assert torch.equal(constant.cluster, real.cluster)
    means, _ = prompt_means(examples, base.transformer.wte.weight)
    torch.testing.assert_close(own.table, means)
    for k in range(3):  # each cluster is told what another one is
        mine, other = (told.table[real.cluster == k] for told in (real, shuffled))
        assert len(mine.unique(dim=0)) == len(other.unique(dim=0)) == 1
        assert not torch.equal(mine[0], other[0])
    assert {tuple(row.tolist()) for row in shuffled.table} == {
        tuple(row.tolist()) for row in real.table}
    assert torch.equal(constant.table, model.lm_head.center.expand_as(real.table))


def test_an_overridden_forward_counts_in_training_and_in_scores():
    """What is trained and scored is what a head's own `forward` says."""
    torch.manual_seed(0)
    base = GPT(GPTConfig(T, V, n_layer=1, n_head=2, n_embd=C))
    plan = {"method": "chameleon", "rank": 2, "alpha": 4.0, "head_form": "full", "clusters": 2,
            "stat_scope": "prompt", "cluster_size": 3, "seed": 0}
    model, run = adapt(base, plan), run_with(base)
    examples = examples_of([13, 5, 9], [3, 1, 4])
    fitted(run, model, plan, examples)
    told = held_out(run, model, examples, plan, "fit")
    model.lm_head.forward = lambda hidden, statistics: torch.zeros(*hidden.shape[:2], V)
    nll, n = score(run, model, examples, told)
    torch.testing.assert_close(nll, n.double() * math.log(V), rtol=1e-6, atol=0)
    load = train.in_parts(run, model, examples, lambda index: told.table[index])
    total = sum(train.Objective(run, model)(*part) for part in load(torch.arange(3)))
    assert float(total) == pytest.approx(float(nll.sum()))


# --------------------------------------------------------------------------- interrupt and resume


def run_of(arguments, out):
    return [*arguments[:-1], str(out)]


def contents(folder):
    """Bytes of every file of a run, but for its cache and the seconds that training took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "cache" not in path.parts and path.name != "lock":
            name = str(path.relative_to(folder))
            if path.suffix == ".safetensors":
                tensors, info = train.read_tensors(path)
                info["done"].pop("seconds")
                found[name] = (info, {k: t.numpy().tobytes() for k, t in tensors.items()})
            else:
                found[name] = path.read_bytes()
    return found


def made_once(tmp_path_factory, name, arguments):
    folder = tmp_path_factory.getbasetemp() / name
    if not folder.exists():
        train.main(run_of(arguments, folder))
    return folder


@pytest.fixture
def uninterrupted(arguments, tmp_path_factory):
    return contents(made_once(tmp_path_factory, "whole", arguments))


@pytest.mark.parametrize("state", range(1, 13))  # 3 of each of base, lora, chameleon, counts
def test_interrupted_after_any_evaluation_and_resumed_a_run_ends_the_same(
    state, arguments, uninterrupted, tmp_path, monkeypatch
):
    write, count = train.write_tensors, 0

    def write_then_interrupt(path, *rest):
        nonlocal count
        write(path, *rest)
        count += str(path).endswith(".state.safetensors")
        if count == state and str(path).endswith(".state.safetensors"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_tensors", write_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments)
    train.main(["--resume", "--out", arguments[-1]])
    assert contents(tmp_path / "run") == uninterrupted


def test_interrupted_between_evaluations_twice_a_run_ends_the_same(
    arguments, uninterrupted, tmp_path, monkeypatch
):
    original = train.learning_rate
    for at in (4, 7):  # steps into this call: what came after the last evaluation comes again
        steps = iter(range(1000))

        def interrupt(*args, at=at, steps=steps):
            if next(steps) == at:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(train, "learning_rate", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train.main(run_of(arguments, tmp_path / "run") if at == 4 else
                           ["--resume", "--out", arguments[-1]])
    train.main(["--resume", "--out", arguments[-1]])
    assert contents(tmp_path / "run") == uninterrupted


def test_killed_between_a_record_and_its_checkpoint_no_record_is_doubled(
    arguments, uninterrupted, tmp_path, monkeypatch
):
    write, count = train.write_tensors, 0

    def die(path, *rest):
        nonlocal count
        count += str(path).endswith(".state.safetensors")
        if count == 2:
            raise ZeroDivisionError  # stands for kill -9: nothing below gets to clean up
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_tensors", die)
        with pytest.raises(ZeroDivisionError):
            train.main(arguments)
    train.main(["--resume", "--out", arguments[-1]])
    assert contents(tmp_path / "run") == uninterrupted


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("flags, said", [
    (["--rank", "0"], "--rank"), (["--clusters", "0"], "--clusters"),
    (["--batch-size", "-1"], "--batch-size"), (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--epochs", "x"], "--epochs"), (["--methods", "lora,magic"], "magic"),
    (["--seeds", "1,b"], "--seeds"), (["--dataset", "nowhere"], "nowhere"),
    (["--seeds", "9" * 20], "--seeds"),
    (["--dataset", ""], "known name"), (["--epochs", "1e308"], "--epochs"),
    (["--size", "huge"], "--size"),
    (["--vocab-size", "100"], "--vocab-size"), (["--block-size", "3"], "--block-size"),
    (["--base", "nowhere.safetensors"], "nowhere.safetensors"), (["--no-such-flag"], "no-such"),
    (["--resume"], "holds no run"), (["--device", "mps"], "--device mps"),
    (["--stat-scope", "running"], "leave chameleon out"),
    (["--inference", "assign"], "keeps no centroids"),
])
def test_bad_arguments_are_told_in_one_line(flags, said, arguments, tmp_path):
    with pytest.raises(UserError) as error:
        train.main([*arguments[:-2], *flags, "--out", arguments[-1]])
    assert said in str(error.value) and "\n" not in error.value.args[0]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.fixture
def finished(arguments, tmp_path, tmp_path_factory):
    kept = made_once(tmp_path_factory, "finished", ["--methods", "frozen,lora", *arguments])
    return shutil.copytree(kept, tmp_path / "run")


@pytest.mark.parametrize("flags, said", [
    (["--block-size", "12"], "--block-size 24, not 12"),
    (["--vocab-size", "280"], "--vocab-size 300, not 280"),
    (["--dataset", "pydocs"], "--dataset"),
    (["--base-epochs", "2"], "--base-epochs"),
    (["--rank", "3"], "rank = 4, not 3"),
])
def test_a_run_of_other_settings_is_refused_and_nothing_is_overwritten(
    flags, said, arguments, finished
):
    before = contents(finished)
    with pytest.raises(UserError, match=said) as error:
        train.main([*arguments, "--methods", "lora", *flags])
    assert "\n" not in error.value.args[0]
    assert contents(finished) == before


def test_another_text_in_the_same_place_is_refused(arguments, finished, tmp_path, corpus):
    other = tmp_path / "other"
    other.mkdir()
    for path in corpus.glob("*.txt"):
        (other / path.name).write_text(path.read_text().replace("river", "ocean"))
    config = json.loads((finished / "config.json").read_text())
    config["args"]["dataset"] = str(other)
    (finished / "config.json").write_text(json.dumps(config))
    before = contents(finished)
    with pytest.raises(UserError, match="another text"):
        train.main([*arguments, "--dataset", str(other)])
    assert contents(finished) == before


def test_a_folder_of_something_else_is_left_alone(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        train.main(arguments)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"args": {}}', "{"])
def test_a_damaged_config_is_named(text, arguments, finished):
    (finished / "config.json").write_text(text)
    before = contents(finished)
    with pytest.raises(UserError, match="config"):
        train.main(arguments)
    assert contents(finished) == before


@pytest.mark.parametrize("name, value", [
    ("size", 5), ("block_size", "many"), ("lr", [0.001, "fast"]), ("seeds", {}), ("methods", 1),
    ("dropout", [1, 2]), ("compile", "yes"), ("dtype", "int8"), ("rank", -1), ("a_flag", "?"),
    ("epochs", None), ("dtype", None),
])
def test_a_setting_that_was_damaged_is_told(name, value, arguments, finished):
    config = json.loads((finished / "config.json").read_text())
    config["args"][name] = value
    (finished / "config.json").write_text(json.dumps(config))
    before = contents(finished)
    for main, argv in ((train.main, arguments), (train.main, [*arguments, "--resume"]),
                       (eval.main, [str(finished)])):
        with pytest.raises(UserError, match=r"config\.json is not what lab\.run train") as error:
            main(argv)
        assert "\n" not in error.value.args[0] and name.replace("_", "-") in str(error.value)
    assert contents(finished) == before


def test_a_setting_that_an_older_run_does_not_have_is_the_default(arguments, finished):
    config = json.loads((finished / "config.json").read_text())
    del config["args"]["rank"], config["args"]["at_hand"]
    (finished / "config.json").write_text(json.dumps(config))
    known = open_run(finished, torch.device("cpu"))[1]["args"]
    assert (known["rank"], known["at_hand"]) == (4, None)
    assert known.keys() == config["args"].keys() | {"rank", "at_hand"}


def test_lora_is_matched_whatever_chameleon_is_told(arguments, finished):
    """It is told nothing itself, and so does not mind that there is no other cluster."""
    ranks = []
    for told in ([], ["--told", "shuffled"]):
        train.main([*arguments, "--methods", "lora-match", "--cluster-size", "100000", "--seeds",
                    str(len(told)), *told])
        path = finished / "adapters" / f"lora-match-seed{len(told)}.safetensors"
        ranks.append(read_tensors(path)[1]["plan"]["rank"])
    assert ranks[0] == ranks[1] > 4


def test_another_tokenizer_is_refused(arguments, finished):
    path = finished / "tokenizer.json"
    spec = json.loads(path.read_text())
    path.write_text(json.dumps(spec | {"ranks": spec["ranks"][:-1]}))
    with pytest.raises(UserError, match="another tokenizer"):
        train.main(arguments)


@pytest.mark.parametrize("base, said", [
    ("", "holds no GPT-2"), ("adapters/lora-seed0.safetensors", "holds no base"),
])
def test_what_is_no_base_is_refused(base, said, arguments, finished, tmp_path):
    with pytest.raises(UserError, match=said):
        train.main([*with_base(arguments, finished / base), "--out", str(tmp_path / "new")])


@pytest.mark.parametrize("flag", [["--tokenizer", "gpt2"], ["--size", "small"],
                                  ["--vocab-size", "300"]])
def test_what_another_runs_base_has_decided_is_not_asked_for_in_vain(flag, finished, tmp_path):
    asked = ["--base", str(finished / "base.safetensors"), "--out", str(tmp_path / "new")]
    with pytest.raises(UserError, match=f"{flag[0]} is for a base from scratch"):
        train.main([*asked, *flag])
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_no_number_stops_the_training_and_keeps_the_last_good_state(
    arguments, tmp_path, monkeypatch
):
    original = core.losses
    calls = iter(range(1000))

    def poisoned(*args, **kinds):
        return original(*args, **kinds) * (float("nan") if next(calls) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(core, "losses", poisoned)
        with pytest.raises(UserError, match="--base-lr"):
            train.main(arguments)
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in records and len(records.splitlines()) == 1
    train.main(["--resume", "--out", arguments[-1]])  # from before it went wrong


def test_a_deleted_adapter_is_trained_anew_and_ends_the_same(arguments, finished):
    before = contents(finished)
    (finished / "adapters" / "lora-seed0.safetensors").unlink()
    train.main([*arguments, "--methods", "frozen,lora"])
    assert contents(finished) == before


def test_a_damaged_record_costs_no_other(arguments, finished):
    log = finished / "metrics.jsonl"
    first, second, *rest = log.read_text().splitlines()
    log.write_bytes("\n".join([first, second[:20], *rest]).encode() + b"\n{}\n\xff\n")
    train.main([*arguments, "--methods", "scaled"])
    assert log.read_text().splitlines()[: 1 + len(rest)] == [first, *rest]


def test_cut_states_of_a_trunk_are_made_again(arguments, finished):
    shared = [*arguments, "--trunk", "shared", "--methods", "lora"]
    train.main(shared)
    before = {path: path.read_bytes() for path in (finished / "cache").glob("*.float32")}
    for path in before:
        path.write_bytes(before[path][:-10])
    train.main(shared)
    assert len(before) == 3 and all(path.read_bytes() == before[path] for path in before)


def test_a_full_disk_leaves_no_half_of_a_trunks_states(arguments, finished, monkeypatch):
    def full(file, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="No space"):
        train.main([*arguments, "--trunk", "shared", "--methods", "lora"])
    assert not [p for p in (finished / "cache").iterdir() if "float32" in p.name]


def test_a_torn_record_is_mended(
    arguments, uninterrupted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(train, "is_finished", lambda *a: True)  # the base alone is trained
        train.main(arguments)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"method": "lo')
    train.main(arguments)
    assert contents(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("name", ["base.safetensors", "adapters/lora-seed0.safetensors"])
def test_a_truncated_checkpoint_is_named(name, arguments, finished):
    path = finished / name
    path.write_bytes(path.read_bytes()[:-100])
    before = path.read_bytes()
    with pytest.raises(UserError, match=path.name) as error:
        train.main([*arguments, "--methods", "frozen,lora"])
    assert "is damaged" in str(error.value) and "\n" not in error.value.args[0]
    assert path.read_bytes() == before


def interrupted_at(step):
    """In the place of `learning_rate`: Ctrl-C at a step, after the first evaluation."""

    def rate(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return 1e-3

    return rate


def test_an_unfinished_run_asks_for_resume(arguments, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupted_at(5))
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="--resume"):
        train.main(arguments)
    assert contents(tmp_path / "run") == before


# ----------------------------------------------------------------------------------- processes

PROCESS = """
import sys
from lab import flags, model, train
model.SIZES["tiny"] = dict(n_layer=2, n_head=2, n_embd=16, block_size=24)
flags.SIZES = ("tiny",)
train.main(sys.argv[1:])
"""


def together(n_processes, arguments):
    """What torchrun does: the same program n times, told its rank; stdout of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = Path(train.__file__).parents[1]
    processes = []
    for rank in range(n_processes):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_processes,
                "LOCAL_WORLD_SIZE": n_processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        env = os.environ | {key: str(value) for key, value in told.items()}
        processes.append(subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], env=env,
                                          cwd=root, text=True, stdout=subprocess.PIPE))
    out = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * n_processes
    return out


def test_two_processes_train_as_one_does_with_the_same_batches(arguments, tmp_path):
    """Also where an epoch's last step leaves a process without a batch."""
    arguments = [*arguments[:-2], "--epochs", "3", "--batch-size", "110"]
    train.main([*arguments, "--accumulate", "2", "--out", str(tmp_path / "one")])
    out = together(2, [*arguments, "--out", str(tmp_path / "two")])
    assert "2 processes" in out[0] and out[1] == ""  # one prints
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    records = [read_records(tmp_path / name) for name in ("one", "two")]
    assert len(records[0]) == len(records[1]) == 12
    for mine, theirs in zip(*records, strict=True):
        assert mine.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-5)
        assert mine.pop("nll_sum") == pytest.approx(theirs.pop("nll_sum"), rel=1e-5)
        assert mine == theirs
    plan = one["adapters/chameleon-seed0.safetensors"][0]["plan"]
    assert plan["steps"] == 3 * plan["steps_per_epoch"] == 3 * 2  # 3 batches in an epoch


def test_two_processes_choose_a_rate_together(arguments, finished):
    """The one that chooses is slow to write; the other must not train what it does not find."""
    out = together(2, [*arguments, "--methods", "scaled", "--lr", "1e-2,3e-2", "--seeds", "7,8",
                       "--max-steps", "2", "--evaluations", "1", "--accumulate", "1"])
    assert "done" in out[0] and out[1] == ""
    assert all((finished / "adapters" / f"scaled-seed{n}.last.safetensors").exists()
               for n in (7, 8))


def test_training_equals_a_plain_loop(arguments, tmp_path, monkeypatch):
    """AdamW with weight decay on matrices alone, clipped gradients, the schedule, the batches."""
    built, GPT = [], train.GPT
    monkeypatch.setattr(train, "GPT", lambda config: built.append(GPT(config)) or built[-1])
    run = train.main([*arguments, "--methods", "frozen", "--base-lr", "0.05"])
    last, info = read_tensors(run / "base.last.safetensors")
    torch.manual_seed(0)
    model = GPT(GPTConfig(**info["plan"]["config"]))
    examples = load_run_examples(run, arguments)
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) == wanted]
                        for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95))
    norms = []
    for step, index in zip(range(9), shuffled(len(examples), 16, 0, 0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 9, 0.05)
        tokens, targets = examples.batch(index, whole=True)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(),
                        ignore_index=IGNORE).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    assert max(norms) > 1.1  # there was something to clip
    for name, p in model.named_parameters():
        if name.endswith("c_attn.bias"):  # that of k changes no attention: its gradient is noise
            continue
        # Rounding, which AdamW enlarges where gradients are small, makes 1e-4; a training without
        # the clipping, or with another weight decay or momentum, 1e-2 and more.
        assert (last[name] - p.data).norm() < 2e-3 * p.data.norm(), name


def load_run_examples(run, arguments):
    tokenizer = train.Tokenizer.load(run / "tokenizer.json")
    corpus = train.open_corpus(arguments[1], "data", None)
    return train.load_examples(corpus, tokenizer, 24)["train"]


def test_scored_bytes_are_those_of_the_continuations(arguments, finished):
    tokenizer = train.Tokenizer.load(finished / "tokenizer.json")
    examples = load_run_examples(finished, arguments)
    tokens = [token for a, n, p in zip(examples.start, examples.length, examples.prompt,
                                       strict=True) for token in examples.tokens[a + p : a + n]]
    found = scoring.scored_bytes(examples, tokenizer.bytes_per_token())
    assert found == len(tokenizer.decode(tokens).encode()) > 0


def test_accumulated_batches_train_as_one_large_batch(
    arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "shuffled", lambda n, size, *rest: torch.arange(n).split(size))
    clip, norms = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *args: norms.append(clip(*args).item()))
    arguments = [*arguments[:-2], "--methods", "frozen,lora"]
    runs = [train.main([*arguments, *flags, "--out", str(tmp_path / flags[1])]) for flags in (
        ["--batch-size", "8", "--base-batch-size", "8", "--accumulate", "2"],
        ["--batch-size", "16", "--base-batch-size", "16"])]
    losses = [[record["loss"] for record in read_records(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert norms[:18] == pytest.approx(norms[18:], rel=1e-4)  # before the optimizer rescales them


def test_a_grid_of_other_settings_is_refused_before_anything_is_written(arguments, finished):
    grid = [*arguments, "--methods", "scaled", "--lr", "1e-3,1e-2"]
    train.main(grid)
    before = (finished / "config.json").read_bytes()
    with pytest.raises(UserError, match="was made with rank = 4, not 2"):
        train.main([*grid, "--rank", "2"])
    assert (finished / "config.json").read_bytes() == before


def test_a_place_that_is_taken_is_refused_before_a_grid_is_trained(arguments, finished):
    with pytest.raises(UserError, match=r"lora-seed0\.safetensors was trained at"):
        train.main([*arguments, "--methods", "lora", "--lr", "1e-3,1e-2"])
    assert not (finished / "grid").exists()


def test_of_a_grid_a_rate_that_diverges_loses(arguments, finished, monkeypatch):
    losses = core.losses

    def diverging(model, *batch, **kinds):
        calls[path] = calls.get(path, 0) + 1  # the second evaluation is the first to see it
        late = path.stem.endswith("0.1") and calls[path] > 4
        return losses(model, *batch, **kinds) * (float("nan") if late else 1)

    def fit(run, at, *rest):
        nonlocal path
        path = at
        return original(run, at, *rest)

    original, path, calls = train.fit, None, {}
    monkeypatch.setattr(core, "losses", diverging)
    monkeypatch.setattr(train, "fit", fit)
    grid = [*arguments, "--methods", "scaled", "--seeds", "3"]
    train.main([*grid, "--lr", "1e-1,1e-3"])
    outcome = read_json(finished / "grid.json")["joint scaled-seed3"]
    assert list(outcome) == ["0.001"] and math.isfinite(outcome["0.001"])
    train.main([*grid, "--lr", "1e-1,1e-3"])  # again: the rate that is missing is no hindrance
    with pytest.raises(UserError, match="no rate"):
        train.main([*grid[:-1], "4", "--lr", "10.1,0.1"])


def counting(function, calls):
    return lambda *rest: calls.append(function) or function(*rest)


@pytest.mark.parametrize("method", ["company-cache", "masks"])
def test_a_grid_clusters_once_and_trains_what_each_rate_alone_would(
        method, arguments, finished, tmp_path, monkeypatch):
    clustered = []
    for place, name in ((CompanyCacheHead, "fit_clusters"), (train, "cluster_training")):
        monkeypatch.setattr(place, name, counting(getattr(place, name), clustered))
    alone = tmp_path / "alone"
    shutil.copytree(finished, alone)
    train.main([*arguments, "--methods", method, "--lr", "1e-3,1e-2"])
    assert len(clustered) == 1
    for rate in ("0.01", "0.001"):
        train.main([*arguments, "--methods", method, "--lr", rate, "--out", str(alone)])
        made = alone / "adapters" / f"{method}-seed0.safetensors"
        expected = read_tensors(made)[0]
        found = read_tensors(finished / "grid" / f"joint-{method}-seed0-lr{rate}.safetensors")[0]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        made.unlink()


def test_what_is_unfinished_is_told_at_the_end(arguments, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train, "is_finished", lambda *a: True)  # the base alone is trained
        train.main(arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupted_at(5))
        with pytest.raises(KeyboardInterrupt):
            train.main([*arguments, "--methods", "chameleon"])
    capsys.readouterr()
    train.main([*arguments, "--methods", "lora"])
    assert "chameleon-seed0.state.safetensors is unfinished" in capsys.readouterr().out


def test_what_would_be_another_method_under_its_name_is_refused(arguments):
    for flags, why in ((["--methods", "task-embedding"], "has no instructions"),
                       (["--told", "shuffled", "--cluster-size", "9999"], "one cluster alone")):
        with pytest.raises(UserError, match=why):
            train.main([*arguments, *flags])


def test_a_condition_needs_instructions_and_adapters_of_before_had_none(arguments, finished):
    for method, why in (("chameleon", "has no instructions"), ("company-cache", "remembers all")):
        with pytest.raises(UserError, match=why):
            train.main([*arguments, "--condition", "instruction", "--methods", method])
    train.main([*arguments, "--methods", "chameleon"])
    path = finished / "adapters" / "chameleon-seed0.safetensors"
    tensors, info = read_tensors(path)
    del info["plan"]["condition"]
    write_tensors(path, tensors, info)
    before = path.read_bytes()
    train.main([*arguments, "--methods", "chameleon"])  # found as it was, not trained again
    assert path.read_bytes() == before
