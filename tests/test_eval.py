"""The table is what it says, controls are other tables, and prompts are answered."""

import json
import math

import pytest
import torch

import eval as evaluation
import train
from common import UserError
from data import Tokenizer, cut, load_documents
from eval import controls
from hypernet import ChameleonHead, cluster_statistics, prompt_means
from train import score

CPU = torch.device("cpu")


def test_what_rows_may_be_told():
    g = torch.Generator().manual_seed(0)
    means, count = torch.randn(40, 6, generator=g), torch.randint(1, 9, (40,), generator=g).float()
    cluster = torch.arange(40) % 7 * 2  # numbers 1, 3 ... have no rows
    head = ChameleonHead(torch.randn(9, 6), 2, 4.0, 1)
    head.center += 3
    document = torch.arange(40) // 18  # two or three rows of each in a cluster
    tables = controls(head, means, count, cluster, document, 0)
    own = cluster_statistics(means, count, cluster)
    assert torch.equal(tables[""], own)
    assert torch.equal(tables["told own prompt"], means)
    assert torch.equal(tables["told nothing"], torch.full((40, 6), 3.0))
    other = tables["told another cluster"]
    for i in range(40):
        same = [torch.equal(other[i], own[j]) for j in range(40)]
        assert any(same) and not any(s for s, k in zip(same, cluster, strict=True)
                                     if k == cluster[i])
    assert len(other.unique(dim=0)) == 7  # each cluster is told to one other
    for i in range(40):  # all of the cluster but what follows in the row's own document
        heard = [j for j in range(40) if cluster[j] == cluster[i]
                 and (document[j] != document[i] or j <= i)]
        expected = (means[heard] * count[heard, None]).sum(dim=0) / count[heard].sum()
        assert torch.allclose(tables["told no later rows"][i], expected, atol=1e-5)
    alone = controls(head, means, count, torch.zeros(40, dtype=torch.int64), document, 0)
    assert "told another cluster" not in alone  # there is no other


def test_the_table_is_what_the_adapters_score(finished_run, capsys):
    entries = {e["name"]: e for e in evaluation.main([str(finished_run), "--device", "cpu"])}
    assert list(entries) == ["frozen", "lora", "lora-match", "chameleon", *(
        f"chameleon, told {what}" for what in ("own prompt", "nothing", "another cluster",
                                               "no later rows"))]
    config = train.read_config(finished_run)
    tokenizer = Tokenizer.load(finished_run / "tokenizer.json")
    documents, _ = load_documents(config["args"]["dataset"], ".")
    rows = cut(documents["test"], tokenizer, 24)
    base = train.load_base(train.base_path(finished_run, config), CPU)
    path = finished_run / "adapters" / "chameleon-seed0.safetensors"
    model, plan = train.load_adapter(base, train.fingerprint(base), path)
    means, count = prompt_means(rows, base.transformer.wte.weight)
    run = train.Run(finished_run, CPU)
    for name, table in (("chameleon, told own prompt", means),
                        ("chameleon", cluster_statistics(means, count, train.held_out_clusters(
                            model.lm_head, means, plan)))):
        nll, n = score(run, model, rows, table)
        entry = entries[name]["test"]
        assert entry["n_tokens"] == int(n.sum()) == int((rows.length - rows.prompt).sum())
        assert entry["loss"] == pytest.approx(float(nll.sum() / n.sum()), abs=1e-6)
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
    assert len({e["test"]["n_tokens"] for e in entries.values()}) == 1
    text = (finished_run / "results.md").read_text()
    assert f"{entries['lora']['test']['loss']:.4f}" in text and text in capsys.readouterr().out
    kept = json.loads((finished_run / "results.json").read_text())["entries"]
    assert kept == list(entries.values())
    for figure in ("loss.png", "clusters.png"):
        assert (finished_run / figure).read_bytes().startswith(b"\x89PNG")


def test_bits_a_byte_count_the_bytes_of_scored_tokens():
    sizes = torch.tensor([1, 2, 3, 0])

    class Three:
        tokens = torch.tensor([[0, 1, 2, 1]])

        def __len__(self):
            return 1

        def batch(self, index):
            return self.tokens, torch.tensor([[-1, 1, 2, 3]])

    assert evaluation.scored_bytes(Three(), sizes) == 5


def test_bits_a_byte_are_of_each_split(finished_run):
    """They divide by the bytes of the split that was scored."""
    entries = evaluation.main([str(finished_run), "--device", "cpu"])
    config = train.read_config(finished_run)
    tokenizer = Tokenizer.load(finished_run / "tokenizer.json")
    documents, _ = load_documents(config["args"]["dataset"], ".")
    sizes = [len(tokenizer._encoding.decode_single_token_bytes(t)) for t in range(299)]
    for split in ("validation", "test"):
        rows, n = cut(documents[split], tokenizer, 24), 0
        for start, length, prompt in zip(rows.start, rows.length, rows.prompt, strict=True):
            n += sum(sizes[t] for t in rows.tokens[start + prompt:start + length].tolist())
        found = entries[0][split]
        assert found["bits_per_byte"] == pytest.approx(found["nll_sum"] / math.log(2) / n)


def test_the_figure_shows_losses_and_what_is_left_of_them_over_lora(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(evaluation, "save", lambda figure, path: figures.append(figure))
    evaluation.draw_losses(
        [{"method": method, "seed": seed, "step": step, "tokens": step * 10**6,
          "loss": {"lora": 5.0, "chameleon": 4.0}[method] - step + seed / 10}
         for method in ("lora", "chameleon") for seed in (0, 1) for step in (1, 2)], 6.0, tmp_path)
    left, right = figures[0].axes
    shown = {line.get_label(): list(map(float, line.get_ydata())) for line in right.lines}
    assert shown["lora, 2 seeds"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert shown["chameleon, 2 seeds"] == pytest.approx([0, -1, -1], abs=1e-6)
    shown = {line.get_label(): list(map(float, line.get_ydata())) for line in left.lines}
    assert shown["chameleon, 2 seeds"] == pytest.approx([6, 3.05, 2.05], abs=1e-6)


def test_the_table_has_mean_and_deviation_over_seeds():
    def entry(seed, loss):
        split = {"loss": loss, "perplexity": 1.0, "bits_per_byte": 2.0}
        return {"name": "lora", "seed": seed, "parameters": 1234, "lr": 1e-3,
                "validation": split, "test": split}

    table = evaluation.make_table([entry(0, 1.0), entry(1, 2.0), entry(2, 3.0)])
    assert "| lora | 3 | 1,234 | 0.001 | 2.0000 ± 1.0000 |" in table


# ------------------------------------------------------------------------------------- prompts


@pytest.fixture
def ask(finished_run, tmp_path, capsys):
    def answers(texts, *flags):
        (tmp_path / "p.txt").write_text("\n".join(texts))
        new = evaluation.main([str(finished_run), "--prompts", str(tmp_path / "p.txt"),
                               "--max-new-tokens", "6", "--device", "cpu", *flags])
        return new, capsys.readouterr().out

    return answers


TEXTS = ["the river and a stone", "summer road", "green house", "winter walks quietly"]


def test_prompts_are_continued_by_cluster(ask):
    new, shown = ask(TEXTS, "--clusters", "2", "--temperature", "0")
    assert len(new) == 4 and all(len(tokens) == 6 for tokens in new)
    assert shown.count("# cluster") == 2 and "depend on each other" in shown
    assert all(text + "[" in shown for text in TEXTS)


def test_assigned_answers_depend_on_no_other_prompt(ask):
    together, shown = ask(TEXTS, "--assign")
    assert "depend on each other" not in shown
    alone = [ask([text])[0][0] for text in TEXTS]
    assert ask(["a"])[0]  # a single token is a prompt too
    reverse, _ = ask(TEXTS[::-1], "--assign")
    assert together == alone == reverse[::-1]


def test_assigned_prompts_are_told_their_nearest_training_cluster(ask, finished_run, monkeypatch):
    told = []

    def generate(model, prompts, n, statistics, *rest):
        told.append((model.lm_head.clusters, model.lm_head.center, statistics[0], prompts[0],
                     model.transformer.wte.weight))
        return [[] for _ in prompts]

    monkeypatch.setattr(evaluation, "generate", generate)
    ask(TEXTS, "--assign")
    picked = set()
    for known, center, statistic, prompt, embedding in told:
        x = embedding[torch.tensor(prompt)].mean(dim=0)
        alike = [float(torch.cosine_similarity(x - center, k - center, dim=0)) for k in known]
        best = alike.index(max(alike))
        assert torch.allclose(statistic, known[best])
        picked.add(best)
    assert len(told) == 4 and len(picked) > 1


def test_other_methods_and_the_same_seed(ask):
    for method in ("frozen", "lora", "lora-match"):
        first, shown = ask(TEXTS, "--method", method)
        assert "# cluster" not in shown
        assert ask(TEXTS, "--method", method)[0] == first
    assert ask(TEXTS, "--seed", "0")[0] == ask(TEXTS)[0]


@pytest.mark.parametrize("texts, flags, message", [
    ([" "], [], "there is no prompt"), (["river " * 40], [], "shorten it"),
    (["a"], ["--seed", "5"], "does not exist; there is lora-seed0"),
    (["a"], ["--top-k", "0"], "must be a number")])
def test_prompts_that_cannot_be_answered(ask, texts, flags, message):
    with pytest.raises(UserError, match=message):
        ask(texts, *flags)


def test_a_folder_without_a_run_and_changed_text_are_refused(finished_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no run"):
        evaluation.main([str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not what this"):
        evaluation.main([str(tmp_path)])
    monkeypatch.setattr(evaluation, "load_documents", lambda *_: ({}, "other"))
    with pytest.raises(UserError, match="other text than when"):
        evaluation.main([str(finished_run)])
