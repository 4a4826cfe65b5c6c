"""Both programs from their command lines: a run in miniature, and what it leaves behind."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from lab import eval, prompts, study, train
from lab.common import label, load_adapter, open_corpus, open_run, share_trunk
from lab.data import Tokenizer, load_examples
from common import UserError, read_tensors, write_tensors
from lab.flags import ALONE, CONTROLS_OF, METHODS
from lab.scoring import held_out, score, summed
from lab.tests.conftest import rows_of, with_base


@pytest.fixture
def run(arguments, tmp_path, tmp_path_factory, capsys):
    """A run folder, and the command line that made it: trained once, a copy for each test."""
    arguments = [*arguments, "--max-steps", "40", "--base-epochs", "8", "--epochs", "3",
                 "--base-lr", "1e-2", "--seeds", "0,1"]
    kept = tmp_path_factory.getbasetemp() / "kept-run"
    if not kept.exists():
        train.main([*arguments, "--out", str(kept)])
    capsys.readouterr()
    return shutil.copytree(kept, tmp_path / "run"), arguments


def test_a_run_leaves_what_the_readme_promises_and_scores_add_up(run, capsys):
    folder, _ = run
    entries = eval.main([str(folder)])
    names = {entry["name"] for entry in entries}
    controls = {f"{method}, {control}" for method in ("chameleon", "company-cache")
                for control in CONTROLS_OF[method]}
    assert names == {"frozen", "lora", "chameleon", "company-cache", *controls}
    assert len(entries) == 1 + 2 * (3 + len(controls))  # two seeds

    saved = json.loads((folder / "results.json").read_text())
    assert saved["entries"] == json.loads(json.dumps(entries))
    vocabulary = Tokenizer.load(folder / "tokenizer.json").vocab_size
    for split in ("validation", "test"):
        scored = {entry[split]["n_tokens"] for entry in entries}
        assert len(scored) == 1  # the same tokens for every method
        for entry in entries:
            found = entry[split]
            assert found["loss"] == pytest.approx(found["nll_sum"] / found["n_tokens"])
            assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
            assert found["loss"] < 0.7 * math.log(vocabulary)
    by_name = {(entry["name"], entry["seed"]): entry for entry in entries}
    for method in ("lora", "chameleon", "company-cache"):
        for seed in (0, 1):
            path = folder / "adapters" / f"{method}-seed{seed}.safetensors"
            entry, tensors = by_name[method, seed], read_tensors(path)[0]
            assert entry["bytes"] == path.stat().st_size
            trained = sum(t.numel() for name, t in tensors.items()
                          if any(part in name for part in (
                              "lora_", "hyper", "share", "log_t", "trust")))
            assert entry["parameters"] == trained
            assert not any("wte" in name for name in tensors)  # adapter weights only
            # eval.py finds what training found, at its best evaluation
            records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            best = min(r["loss"] for r in records if (r["method"], r["seed"]) == (method, seed))
            assert entry["validation"]["loss"] == pytest.approx(best, rel=1e-6)

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3 * (1 + 2 * 3)
    assert all(list(r) == ["method", "seed", "lr", "trunk", "step", "tokens", "split", "nll_sum",
                           "n_tokens", "loss"] for r in records)
    table = (folder / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("±") > 10 and "| frozen |" in table
    for name in ("loss.png", "pareto.png", "clusters.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    kept = np.load(folder / "losses.npz")  # an example each
    for entry in entries:
        mine = kept[f"joint/{entry['name']}/{entry['seed']}/test"]
        assert mine.sum() == pytest.approx(entry["test"]["nll_sum"])


def test_heads_on_a_shared_trunk_are_compared_pairwise_and_swept(run, capsys):
    folder, arguments = run
    shared = [*arguments, "--trunk", "shared", "--max-steps", "6", "--evaluations", "1"]
    train.main([*shared, "--lr", "1e-3,1e-2",
                "--methods", "lora-match,chameleon,per-sample,library,company-cache"])
    grid = json.loads((folder / "grid.json").read_text())
    assert len(grid) == 5 and all(len(outcomes) == 2 for outcomes in grid.values())
    for seed in (0, 1):  # the rate that is best with the first seed is every seed's
        _, info = read_tensors(folder / "shared" / f"chameleon-seed{seed}.safetensors")
        outcomes = grid["shared chameleon-seed0"]
        assert info["plan"]["lr"] == float(min(outcomes, key=outcomes.get))
    train.main([*shared, "--lr", "1e-2", "--methods", "chameleon", "--told", "shuffled"])
    train.main([*shared, "--lr", "1e-2", "--methods", "company-cache", "--told", ALONE])
    entries = [e for e in eval.main([str(folder)]) if e["trunk"] == "shared"]
    by_name = {e["name"]: e for e in entries}
    match, adapted = by_name["lora-match"], by_name["chameleon"]
    assert abs(match["parameters"] / adapted["parameters"] - 1) < 0.01
    assert by_name["library"]["validation"] != by_name["library, blended"]["validation"]
    assert "chameleon, trained on shuffled" in by_name
    table = (folder / "results.md").read_text()
    assert "95% over articles" in table and eval.TITLES["shared"] in table
    alone = "trained on own prompt only"
    worth = np.mean([e["test"]["loss"] * (1 if e["name"] == "company-cache" else -1) * 2
                     for e in entries if e["name"] in ("company-cache", f"company-cache, {alone}")])
    assert f"| company-cache | {alone} | {worth:+.4f} |" in table
    for kind in ("written", "clusters", "cluster-size", "noise"):
        records = eval.main([str(folder), "--sweep", kind])
        assert (folder / f"sweep-{kind}.png").exists()
        assert {r["method"] for r in records} >= {"company-cache"} | (
            {"chameleon"} if kind != "written" else set())
        if kind == "written":  # of no mate: the table's scores
            same = [e["validation"]["loss"] for name in ("", ", no later rows") for e in entries
                    if (e["name"], e["seed"]) == (f"company-cache{name}", 0)]
            assert {r["method"] for r in records} == {"company-cache"}
            assert [r["loss"] for r in records if r["x"] == 0] == pytest.approx(2 * same, rel=1e-6)
        if kind == "cluster-size":
            for r in (r for r in records if r["x"] == 1):  # of one member: the request itself
                same = [e for e in entries if e["name"] == f"{r['method']}, own prompt only"
                        and (e["trunk"], e["seed"]) == ("shared", r["seed"])]
                assert r["loss"] == pytest.approx(same[0]["validation"]["loss"], rel=1e-6)
    alone = {r["seed"]: r["loss"] for r in records
             if (r["method"], r["variant"], r["x"]) == ("per-sample", "random tokens", 0.5)}
    clean = {r["seed"]: r["loss"] for r in records
             if (r["method"], r["variant"], r["x"]) == ("per-sample", "random tokens", 0.0)}
    assert alone == clean  # nobody else's noise reaches it


def test_what_is_not_trained_to_its_end_is_called_unfinished(run, tmp_path, capsys):
    folder, _ = run
    (folder / "base.last.safetensors").unlink()
    for path in (folder / "adapters").glob("*"):
        if not path.name.startswith("lora-seed0") or ".last." in path.name:
            path.unlink()
    assert [e["name"] for e in eval.main([str(folder)])] == [
        "frozen (unfinished)", "lora (unfinished)"]
    capsys.readouterr()
    (tmp_path / "asked.txt").write_text("The river\n")
    eval.main([str(folder), "--prompts", str(tmp_path / "asked.txt"), "--method", "lora", "--json"])
    out, told = capsys.readouterr()
    assert json.loads(out) and [line.split(" is unfinished")[0] for line in told.splitlines()] == [
        str(folder / name) for name in ("base.safetensors", "adapters/lora-seed0.safetensors")]


def test_what_cannot_be_asked_of_a_run_is_told_in_a_line(run):
    folder, _ = run
    for asked, why in ((["--sweep", "noise", "--seed", "5"], "no adapter with seed 5"),
                       (["--sweep", "noise", "--on", "pydocs"], "not allowed with"),
                       (["--on", ""], "no data set '': neither"),
                       (["--methods", "lora"], "--methods goes with --sweep"),
                       (["--base-only"], "--base-only goes with --prompts"),
                       (["--sweep", "noise", "--generations", "2"], "leave one out"),
                       (["--sweep", "noise", "--inference", "fit"], "leave it out"),
                       (["--max-new-tokens", "5"], "goes with --prompts or --generations"),
                       (["--prompts", "-", "--assign", "--clusters", "2"], "leave one out")):
        with pytest.raises(UserError, match=why):
            eval.main([str(folder), *asked])
    assert not list(folder.glob("sweep-*"))


def test_scores_of_one_text_are_not_written_over_those_of_another(run, tmp_path):
    folder, _ = run
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        text = "\n".join(f"{name} river {i}" for i in range(400))
        (tmp_path / name / "foo.txt").write_text(text)
    eval.main([str(folder), "--on", str(tmp_path / "a" / "foo.txt")])
    before = (folder / "on-foo" / "results.json").read_bytes()
    with pytest.raises(UserError, match="on-foo holds the scores of another text"):
        eval.main([str(folder), "--on", str(tmp_path / "b" / "foo.txt")])
    eval.main([str(folder), "--on", str(tmp_path / "a" / "foo.txt")])
    assert json.loads(before)["data"] in (folder / "on-foo" / "results.json").read_text()


def test_an_adapter_that_has_gone_wrong_leaves_the_others_their_table(run, capsys):
    folder, _ = run
    path = folder / "adapters" / "lora-seed0.safetensors"
    tensors, info = read_tensors(path)
    tensors["lm_head.lora_B"] += 1e6 * torch.randn_like(tensors["lm_head.lora_B"])
    write_tensors(path, tensors, info)
    entries = {(e["name"], e["seed"]): e["test"] for e in eval.main([str(folder)])}
    assert entries["lora", 0]["loss"] > 1000 and entries["lora", 0]["perplexity"] is None
    assert entries["lora", 1]["perplexity"] == math.exp(entries["lora", 1]["loss"])
    assert (folder / "results.md").read_text() in capsys.readouterr().out


def test_requests_are_assigned_where_clusters_are_stored_and_company_cache_is_clustered(run):
    folder, _ = run
    fitted = {(e["name"], e["seed"]): e["test"]["loss"] for e in eval.main([str(folder)])}
    assigned = {(e["name"], e["seed"]): e["test"]["loss"]
                for e in eval.main([str(folder), "--inference", "assign"])}
    assert assigned.keys() == fitted.keys()
    assert {name for name, seed in fitted if fitted[name, seed] != assigned[name, seed]} <= {
        name for name, _ in fitted if name.startswith("chameleon")}
    assert assigned["chameleon", 0] != fitted["chameleon", 0]


def test_a_head_on_the_shared_trunk_scores_as_it_does_on_the_whole_transformer(run):
    """The kept states are what the transformer would have said: float32 here, so to rounding."""
    folder, arguments = run
    train.main([*arguments, "--trunk", "shared", "--max-steps", "6", "--evaluations", "1",
                "--methods", "chameleon"])
    opened, config = open_run(folder, torch.device("cpu"))
    corpus = open_corpus(arguments[1], "data", config)
    opened.examples = load_examples(corpus, opened.tokenizer, 24)
    share_trunk(opened)
    head, plan = load_adapter(opened, folder / "shared" / "chameleon-seed0.safetensors")
    rows = []
    for model, examples in ((head, opened.shared), (study.whole_model(opened, head),
                                                    opened.examples)):
        told = held_out(opened, model, examples["test"], plan, "fit")
        rows.append(score(opened, model, examples["test"], told)[0])
    np.testing.assert_allclose(*rows, rtol=1e-5)


@pytest.mark.parametrize("options, said", [
    (["--methods", "prompt-tuning"], "prompt-tuning needs the transformer"),
    (["--methods", "chameleon", "--out", "elsewhere"], "no base and no trunk"),
])
def test_a_shared_trunk_that_cannot_be_is_told_in_one_line(arguments, tmp_path, options, said):
    options = [str(tmp_path / o) if o == "elsewhere" else o for o in options]
    with pytest.raises(UserError, match=said):
        train.main([*arguments, "--trunk", "shared", *options])


def test_intervals_are_students_and_a_bootstrap_over_articles():
    examples = rows_of(np.zeros(9), np.zeros(3), [3, 3, 3], np.ones(3, dtype=int), [0, 0, 1])
    losses, mine, theirs = {}, {}, {}
    for seed, d in enumerate((-0.1, -0.2, -0.3)):
        for name, shift, entries in (("a", d, mine), ("b", 0, theirs)):
            rows = np.array([4.0, 5.0, 6.0]) + 2 * shift  # two scored tokens each
            entries[seed] = {"name": name, "trunk": "joint", "seed": seed, "parameters": 1,
                             "test": {"loss": rows.sum() / 6}}
            losses[f"joint/{name}/{seed}/test"] = rows
    found = eval.difference(mine, theirs, losses, examples)
    half = scipy.stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert found["mean"] == pytest.approx(-0.2)
    assert found["seeds"] == pytest.approx((-0.2 - half, -0.2 + half), rel=1e-3)
    assert found["articles"] == pytest.approx((-0.2, -0.2))  # every article gains as much
    rises = np.array([0.6, -0.2, 0.1])  # articles that gain unequally, one of two rows
    for seed in mine:
        losses[f"joint/a/{seed}/test"] = losses[f"joint/b/{seed}/test"] + rises
    ratios = [sum(pair) / sum(size) for pair, size in (
        ((0.4, 0.4), (4, 4)), ((0.4, 0.1), (4, 2)), ((0.1, 0.4), (2, 4)), ((0.1, 0.1), (2, 2)))]
    spread = eval.difference(mine, theirs, losses, examples)["articles"]
    assert spread == pytest.approx((min(ratios), max(ratios)))  # each of the four has a quarter
    alone = replace(examples, document=torch.zeros(3))
    assert eval.difference(mine, theirs, losses, alone)["articles"] == (-math.inf, math.inf)
    found = eval.difference(mine, theirs, losses, examples)
    later = [{seed + 1: entry for seed, entry in entries.items()} for entries in (mine, theirs)]
    assert eval.difference(*later, losses, examples) == found  # no seed need be 0
    assert eval.verdict(found) == "-"  # two of three seeds' worth: zero is inside
    assert all(eval.T95[n] == pytest.approx(scipy.stats.t.ppf(0.975, n), abs=1e-3)
               for n in eval.T95)


def test_losses_of_every_method_can_be_drawn(tmp_path):
    records = [{"method": method, "seed": 0, "tokens": 1000, "loss": 1.0} for method in METHODS]
    eval.draw_losses(records, 2.0, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_the_next_call_into_a_folder_reuses_base_and_adapters(run):
    folder, arguments = run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    train.main([*arguments, "--seeds", "0,1,2", "--methods", "lora"])
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())
    assert (folder / "adapters" / "lora-seed2.safetensors").exists()


def test_a_base_of_another_run_is_taken_with_its_tokenizer(run, tmp_path):
    folder, arguments = run
    base, second = folder / "base.safetensors", str(tmp_path / "second")
    train.main([*with_base(arguments, base), "--methods", "lora", "--out", second])
    train.main([*with_base(arguments, base), "--methods", "lora", "--out", second, "--seeds", "2"])
    for name in ("tokenizer.json", "base.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (folder / name).read_bytes()
    frozen, *others = eval.main([second])
    assert {e["seed"] for e in others if e["name"] == "lora"} == {0, 1, 2}
    opened, config = open_run(folder, torch.device("cpu"))
    rows = load_examples(open_corpus(arguments[1], "data", config), opened.tokenizer,
                         24)["validation"]
    assert summed(*score(opened, opened.base, rows)).items() <= frozen["validation"].items()


def test_an_adapter_of_another_base_is_refused(run, tmp_path):
    folder, arguments = run
    other = train.main([*arguments, "--base-lr", "3e-3", "--methods", "frozen",
                        "--out", str(tmp_path / "other")])
    (other / "adapters").mkdir()
    for path in (folder / "adapters").iterdir():
        (other / "adapters" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="another base"):
        eval.main([str(other)])


@pytest.mark.parametrize("scope", ["prompt", "full"])
def test_a_table_pairs_a_control_with_its_method(scope):
    plan = {"method": "chameleon", "stat_scope": scope}
    assert label(plan | {"told": "shuffled"}) == f"{label(plan)}, trained on shuffled"


def test_full_scope_says_that_it_leaks(arguments, tmp_path):
    folder = train.main([*arguments, "--methods", "frozen,chameleon", "--stat-scope", "full",
                         "--inference", "assign", "--head-form", "light"])
    names = [entry["name"] for entry in eval.main([str(folder)])]
    assert all("LEAKS" in name for name in names if name != "frozen")
    assert "LEAKS" in (folder / "results.md").read_text()
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert all("LEAKS" in r["method"] for r in records if r["method"] != "base")


@pytest.mark.parametrize("options", [[], ["--method", "lora"], ["--method", "frozen"],
                                     ["--method", "company-cache"],
                                     ["--inference", "assign", "--seed", "1"]])
def test_prompts_are_clustered_and_continued(run, tmp_path, capsys, options):
    folder, _ = run
    file = tmp_path / "prompts.txt"
    file.write_text("the river of stone\n\nwinter sings quietly\nthe apple and the house\n")
    found = eval.main([str(folder), "--prompts", str(file), "--max-new-tokens", "5",
                       "--temperature", "0", *options])
    again = eval.main([str(folder), "--prompts", str(file), "--max-new-tokens", "5",
                       "--temperature", "0", *options])
    assert len(found) == 3 and found == again and all(0 < len(row) <= 5 for row in found)
    out = capsys.readouterr().out
    assert all(line in out for line in file.read_text().split("\n"))
    file.write_text("alone\n")  # a single request is served too
    assert len(eval.main([str(folder), "--prompts", str(file), *options])) == 1


@pytest.mark.parametrize("text, options, said", [
    ("river " * 200, [], "reads 24 at most"),
    ("\n \n", [], "no prompt"),
    ("river", ["--method", "magic"], "magic"),
    ("river", ["--temperature", "-1"], "--temperature"),
    ("river", ["--temperature", "nan"], "--temperature"),
    (b"\xff\xfe", [], "prompts"),
])
def test_prompts_that_cannot_be_served_are_told_in_one_line(run, tmp_path, text, options, said):
    file = tmp_path / "prompts.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as error:
        eval.main([str(run[0]), "--prompts", str(file), *options])
    assert "\n" not in error.value.args[0]


def test_prompts_need_no_corpus(run, tmp_path, monkeypatch):
    folder, _ = run
    monkeypatch.delattr(eval, "open_corpus")
    (tmp_path / "prompts.txt").write_text("the river\n")
    assert eval.main([str(folder), "--prompts", str(tmp_path / "prompts.txt")])


def test_instructions_are_scored_on_responses_and_asked_as_trained(
    arguments, tmp_path, capsys, monkeypatch
):
    records = [{"instruction": f"say {word} twice", "input": "now" * (i % 2),
                "output": f"{word} {word}" if i else " "}
               for i, word in enumerate(["river", "stone", "apple", "road", "cloud"] * 12)]
    (tmp_path / "tasks.json").write_text(json.dumps(records))
    folder = train.main([*arguments, "--dataset", str(tmp_path / "tasks.json")])
    assert "1 records left out" in capsys.readouterr().out
    entries = eval.main([str(folder)])
    assert {entry["test"]["n_tokens"] for entry in entries} != {0}
    asked = []
    original = prompts.core.generate
    monkeypatch.setattr(prompts.core, "generate", lambda model, given, *rest, **options:
                        asked.extend(given) or original(model, given, *rest, **options))
    (tmp_path / "prompts.txt").write_text("say river\n")
    eval.main([str(folder), "--prompts", str(tmp_path / "prompts.txt")])
    assert Tokenizer.load(folder / "tokenizer.json").decode(asked[0]) == "say river\n\n"


def test_every_method_is_trained_and_scored_jointly_and_alone(
        arguments, tmp_path, monkeypatch, capsys):
    """Each kind of command that a page names, and bench/heads.py on the run that they leave."""
    records = [{"instruction": f"say {word} {i} times", "input": "now" * (i % 2),
                "output": f"{word} {word} {i}"}
               for i, word in enumerate(["river", "stone", "apple", "road", "cloud"] * 16)]
    (tmp_path / "tasks.json").write_text(json.dumps(records))
    arguments = [*arguments, "--dataset", str(tmp_path / "tasks.json"), "--max-steps", "2",
                 "--evaluations", "1", "--accumulate", "2", "--batch-size", "8"]
    folder = train.main([*arguments, "--methods", ",".join(METHODS)])
    train.main([*arguments, "--methods", "company-cache", "--at-hand", "20", "--seeds", "1"])
    alone = [method for method in METHODS if method != "prompt-tuning"]
    train.main([*arguments, "--trunk", "shared", "--methods", ",".join(alone)])
    train.main([*arguments, "--trunk", "shared", "--methods", "chameleon", "--seeds", "1",
                "--condition", "instruction", "--head-form", "light"])
    found = {(e["trunk"], e["name"]) for e in eval.main([str(folder)])}
    assert found >= {("joint", method) for method in METHODS}
    assert found >= {("shared", method) for method in alone}
    (tmp_path / "asked.txt").write_text("say river\nsay stone\n")
    for method in METHODS:
        new = eval.main([str(folder), "--prompts", str(tmp_path / "asked.txt"), "--method", method,
                         "--max-new-tokens", "3"])
        assert len(new) == 2
    monkeypatch.setattr(sys, "argv", ["", str(folder), "--repeats", "1", "--device", "cpu"])
    capsys.readouterr()
    runpy.run_path(Path(__file__).parents[2] / "bench" / "heads.py", run_name="__main__")
    assert "company-cache: " in capsys.readouterr().out


@pytest.mark.parametrize("rows", ["kmeans,step,chameleon,head,decode", None])
def test_the_bench_runs(rows, tmp_path):
    asked = ["--only", rows] if rows else ["--scaling"]
    done = subprocess.run(
        [sys.executable, "bench/speed.py", "--quick", *asked, "--out", str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ("speed.md" if rows else "scaling.png")).exists()


def in_the_laboratory(*arguments, cwd):
    """`python -m lab.run ARGUMENTS`, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "lab.run", *arguments], cwd=cwd, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
                          capture_output=True)


def test_a_folder_without_a_run_is_told_in_one_line_with_status_2(tmp_path):
    for arguments in (["eval", str(tmp_path)], ["train", "--rank", "0"], ["tarin"], []):
        done = in_the_laboratory(*arguments, cwd=tmp_path)
        command = " ".join(["python -m lab.run", *arguments[:len(arguments) > 1]])
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"{command}: error: ")
        assert not list(tmp_path.iterdir())


def test_help_says_how_each_command_is_called(tmp_path):
    for arguments in ([], ["train"], ["eval"]):
        done = in_the_laboratory(*arguments, "--help", cwd=tmp_path)
        assert done.returncode == 0 and not done.stderr
        assert done.stdout.startswith(" ".join(["usage: python -m lab.run", *arguments]))
