"""Prompts in, answers out: whom an answer depends on, and what is printed."""

import io
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab import eval, prompts, train
from lab.common import adapter_path, load_adapter, open_run
from lab.data import Corpus, load_examples
from common import UserError, read_tensors, write_tensors
from lab.prompts import adapt_to, rows_of, telling_words
from lab.scoring import held_out, score

TEXTS = ["the river of stone and cloud", "winter sings quietly", "a river under green stone",
         "summer road walks over winter", "the house and the apple"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    out = train.main([
        "--dataset", str(corpus), "--size", "tiny", "--vocab-size", "300", "--dtype", "float32",
        "--device", "cpu", "--base-epochs", "4", "--base-lr", "1e-2", "--lr", "2e-2",
        "--epochs", "2", "--evaluations", "1",
        "--out", str(tmp_path_factory.mktemp("runs") / "pydocs")])
    more = ["--out", str(out), "--max-steps", "2", "--methods"]
    train.main([*more, "per-sample"])
    train.main([*more, "chameleon", "--told", "own prompt only"])
    return out


@pytest.fixture
def ask(folder, tmp_path, capsys):
    """Answers, as JSON has them, to prompts that are asked together."""

    def ask(texts, *options):
        (tmp_path / "prompts.txt").write_text("\n".join(texts), encoding="utf-8")
        capsys.readouterr()
        eval.main([str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--json",
                   "--max-new-tokens", "8", *options])
        return json.loads(capsys.readouterr().out)

    return ask


def adapted(folder, method, texts, **options):
    run, _ = open_run(folder, torch.device("cpu"))
    head, plan = load_adapter(run, adapter_path(run, method, 0))
    return head, adapt_to(run, head, plan, [run.tokenizer.encode(t) for t in texts], **options)


@pytest.mark.parametrize("method", ["chameleon", "company-cache"])
def test_every_prompt_is_in_one_cluster_and_answered_beside_the_others(method, ask):
    said = ask(TEXTS, "--method", method, "--clusters", "2", "--static", "--base-only")
    assert [entry["prompt"] for entry in said["answers"]] == TEXTS
    assert sorted(i for c in said["clusters"] for i in c["prompts"]) == list(range(len(TEXTS)))
    assert len(said["clusters"]) == 2 and said["depends_on_batch_mates"]
    for cluster in said["clusters"]:
        own = " ".join(TEXTS[i] for i in cluster["prompts"])
        assert cluster["words"] and all(word in own for word in cluster["words"])
        assert {said["answers"][i]["cluster"] for i in cluster["prompts"]} == {cluster["cluster"]}
    alone = {name: [entry["continuation"] for entry in ask(TEXTS, "--method", other)["answers"]]
             for name, other in (("static", "lora"), ("base_only", "frozen"))}
    for name, texts in alone.items():
        assert [entry[name] for entry in said["answers"]] == texts
    plain = ask(TEXTS, "--method", "frozen")
    assert plain["clusters"] == [] and {entry["cluster"] for entry in plain["answers"]} == {None}


@pytest.mark.parametrize("method", ["chameleon", "company-cache"])
@pytest.mark.parametrize("temperature", ["0", "1.5"])
def test_assigned_answers_do_not_depend_on_the_others_and_equal_those_alone(
        method, temperature, ask):
    options = ["--method", method, "--temperature", temperature]
    together = ask(TEXTS, *options, "--assign")
    assert not together["depends_on_batch_mates"]
    expected = {entry["prompt"]: entry["continuation"] for entry in together["answers"]}
    for texts in (TEXTS[::-1], TEXTS[2:], TEXTS[:1]):
        for entry in ask(texts, *options, "--assign")["answers"]:
            assert entry["continuation"] == expected[entry["prompt"]]
    said = ask(TEXTS[1:2], *options)
    assert said["answers"][0]["continuation"] == expected[TEXTS[1]]
    assert not said["depends_on_batch_mates"]


def test_assigned_prompts_of_a_head_that_knows_itself_alone_share_no_cluster(ask):
    for options in ([], ["--assign"]):
        said = ask(TEXTS, "--method", "chameleon-own prompt only", *options)
        assert len({entry["cluster"] for entry in said["answers"]}) == len(TEXTS)


def test_heads_that_hear_nobody_say_so(ask):
    for temperature, depends in (("0", False), ("1", True)):  # a draw depends on those before it
        said = ask(TEXTS, "--method", "per-sample", "--temperature", temperature)
        assert said["depends_on_batch_mates"] == depends and said["clusters"]


def test_a_control_is_told_what_it_was_trained_on(folder):
    name = "chameleon-own prompt only"
    _, (together, cluster) = adapted(folder, name, TEXTS, n_clusters=1)
    assert len(cluster.unique()) == len(together) == len(TEXTS)
    for i, text in enumerate(TEXTS):
        _, (alone, _) = adapted(folder, name, [text])
        assert torch.allclose(together[i], alone[0])


def test_a_head_without_centroids_is_fitted_where_others_are_assigned(ask):
    given = [ask(TEXTS, "--method", "company-cache", *options)["answers"]
             for options in ((), ("--inference", "assign"))]
    assert given[0] == given[1]


def test_otherwise_the_update_does_depend_on_batch_mates(folder):
    head, (first, _) = adapted(folder, "chameleon", TEXTS, n_clusters=1)
    _, (other, _) = adapted(folder, "chameleon", [TEXTS[0], *TEXTS[3:]], n_clusters=1)
    found, changed = first[:1], other[:1]
    assert (found - changed).abs().max() > 0
    assert not torch.allclose(head.lm_head.factors(found)[1], head.lm_head.factors(changed)[1])


def test_one_prompt_alone_gets_the_statistic_of_its_nearest_training_cluster(folder):
    adapter, (told, cluster) = adapted(folder, "chameleon", TEXTS[:1])
    head = adapter.lm_head
    run, _ = open_run(folder, torch.device("cpu"))
    mean = run.base.transformer.wte.weight[run.tokenizer.encode(TEXTS[0])].mean(dim=0)
    direction, *known = (torch.nn.functional.normalize(x - head.center, dim=0)
                         for x in (mean, *head.clusters))
    nearest = (torch.stack(known) - direction).square().sum(dim=1).argmin()
    assert cluster.tolist() == [nearest]
    assert torch.equal(told, head.clusters[nearest][None])


def test_prompts_come_from_standard_input_and_a_person_can_read_the_answers(
        folder, monkeypatch, capsys):
    text = "\n".join(TEXTS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    found = eval.main([str(folder), "--prompts", "-", "--clusters", "2", "--static", "--base-only"])
    said = capsys.readouterr().out
    assert len(found) == len(TEXTS) and all(f"\n{prompt}[" in said for prompt in TEXTS)
    assert len(re.findall(r"# cluster \d+: \d prompts?, one update; \w+", said)) == 2
    assert said.count("  static: [") == said.count("  base only: [") == len(TEXTS)
    assert "--assign" in said


def test_an_adapter_that_is_not_there_is_named(ask):
    with pytest.raises(UserError, match="lora-seed7"):
        ask(TEXTS, "--method", "frozen", "--static", "--seed", "7")


def test_telling_words_are_those_that_the_others_do_not_have():
    texts = ["Rivers carry stone", "rivers carry sand", "voters carry hope", "voters win"]
    assert telling_words(texts, [0, 1])[0] == "rivers"
    assert telling_words(texts, [2, 3], n=1) == ["voters"]
    assert telling_words(["a b c"], [0]) == []


# --------------------------------------------------------------------------- generation scores


@pytest.fixture
def instructed(arguments, tmp_path, capsys):
    records = [{"instruction": f"say {word} {i} times", "input": "now" * (i % 2),
                "output": f"{word} {word}"}
               for i, word in enumerate(["river", "stone", "apple", "road", "cloud"] * 16)]
    (tmp_path / "tasks.json").write_text(json.dumps(records))
    arguments = [*arguments, "--dataset", str(tmp_path / "tasks.json")]
    train.main([*arguments, "--methods", "lora,chameleon", "--condition", "instruction"])
    run = train.main([*arguments, "--methods", "company-cache"])
    capsys.readouterr()
    return run


@pytest.mark.filterwarnings("ignore")  # of the metrics, about themselves
def test_generations_are_scored_on_the_same_instructions_again_and_again(instructed, capsys):
    options = ["--generations", "3", "--max-new-tokens", "6"]
    eval.main([str(instructed), *options])
    first = json.loads((instructed / "results.json").read_text())["generations"]
    assert [e["name"] for e in first] == ["frozen", "lora", "chameleon", "company-cache"]
    assert all(e["n"] == 3 and 0 <= e["bleu"] <= 100 and 0 <= e["rouge_l"] <= 100 for e in first)
    assert "| method | seed | BLEU | ROUGE-L |" in (instructed / "results.md").read_text()
    eval.main([str(instructed), *options])
    assert json.loads((instructed / "results.json").read_text())["generations"] == first
    compare = prompts.text_metrics(SimpleNamespace(instructions=True), "some data")
    texts = ["the river runs down to the sea", "a stone lies still in the green grass"]
    assert compare(texts, texts) == pytest.approx({"bleu": 100, "rouge_l": 100})
    assert compare(texts, texts[::-1])["rouge_l"] < 50
    right, wrong = ["今天天气很好，我们去公园。"], ["5 月"]
    asked = ["今天天气很好，我们去 5 号公园。"]
    assert compare(right, right) == pytest.approx({"bleu": 100, "rouge_l": 100})
    near, far = compare(right, asked), compare(wrong, asked)
    assert near["rouge_l"] > 80 > 30 > far["rouge_l"] and near["bleu"] > 50 > 5 > far["bleu"]


def test_missing_metrics_and_missing_instructions_are_told_before_anything_is_scored(
        folder, instructed, monkeypatch):
    monkeypatch.setattr(eval, "score_run", None)
    with pytest.raises(UserError, match="no instructions"):
        eval.main([str(folder), "--generations", "3"])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"sacrebleu.*pip install sacrebleu rouge-score"):
        eval.main([str(instructed), "--generations", "3"])


def test_of_a_prompt_a_condition_shows_what_it_showed_in_training(instructed, tmp_path):
    run, _ = open_run(instructed, torch.device("cpu"))
    draw = random.Random(0)
    texts = ["".join(draw.choices("river stone.,!?\n  '-", k=draw.randint(1, 30))).strip()
             for _ in range(300)]
    texts = list(dict.fromkeys(text for text in texts if text))
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"instruction": text, "output": "a house"} for text in texts]))
    corpus, n = Corpus(str(path), tmp_path), 0
    for split, trained in load_examples(corpus, run.tokenizer, 64).items():
        prompts = [run.tokenizer.encode(document.prompt) for document in corpus.documents(split)]
        rows = rows_of(run, {"condition": "instruction"}, prompts)
        assert torch.equal(rows.prompt, trained.prompt)
        assert torch.equal(rows.instruction, trained.instruction)
        n += len(trained)
    assert n == len(texts) > 200


def test_a_sweep_without_noise_scores_as_eval_does_under_a_condition(instructed):
    path = instructed / "adapters" / "chameleon-seed0.safetensors"
    tensors, info = read_tensors(path)
    torch.nn.init.normal_(tensors["lm_head.hypernetwork.4.weight"])  # let it listen
    write_tensors(path, tensors, info)
    swept = eval.main([str(instructed), "--sweep", "noise"])
    run, config = open_run(instructed, torch.device("cpu"))
    corpus = Corpus(config["args"]["dataset"], "data")
    rows = load_examples(corpus, run.tokenizer, 24)["validation"]
    model, plan = load_adapter(run, path)
    nll, n = score(run, model, rows, held_out(run, model, rows, plan, "fit"))
    order = np.random.default_rng(0).permutation(len(rows))[len(rows) // 2 :]
    clean = [r["loss"] for r in swept if (r["method"], r["x"]) == ("chameleon", 0.0)]
    assert clean == pytest.approx(2 * [float(nll[order].sum() / n[order].sum())], rel=1e-6)


# ---------------------------------------------------------------------------------------- README


def test_the_python_in_readme_runs_as_written(folder, tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Use it from Python"):]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pydocs").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, len(names["prompts"][-1]), 300)
    assert torch.isfinite(names["logits"]).all()
