"""The anatomy against slow loops: what each flaw changes, and that it changes nothing else."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lab import anatomy, eval, train
from lab.anatomy import FLAWS, SCORING, CachedRows, Laboratory, make_head, under
from lab.common import Run, n_trained
from lab.data import IGNORE, Document, Tokenizer
from common import UserError
from lab.model import GPT, GPTConfig, HeadAlone
from lab.scoring import held_out, score, summed
from lab.tests.conftest import WORDS

NONE, T = frozenset(), 16
ARGS = {"rank": 2, "alpha": 4.0, "batch_size": 5, "lr": 1e-3}


class Lines:
    """A corpus of lines with 1 to 20 words, blank ones among them."""

    def documents(self, split):
        draw = random.Random(split)
        for i in range(4):
            lines = (" ".join(draw.choices(WORDS, k=draw.randrange(21))) for _ in range(12))
            yield Document(str(i), "\n".join(lines))


@pytest.fixture
def run():
    torch.manual_seed(0)
    tokenizer = Tokenizer.learn((" ".join(WORDS * 3) for _ in range(3)), 300)
    base = GPT(GPTConfig(T, tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=8)).eval()
    for p in base.requires_grad_(False).parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Run(None, torch.device("cpu"), tokenizer=tokenizer, base=base)


@pytest.fixture
def lab(run, monkeypatch):
    monkeypatch.setattr(anatomy, "GRID", (1e-3, 1e-2))
    monkeypatch.setattr(anatomy, "SEEDS", (0, 1))
    torch.manual_seed(1)
    adapted = GPT(run.base.config).eval().requires_grad_(False)
    return Laboratory(run, ARGS, Lines(), adapted)


def random_head(run, arm):
    head = make_head(arm, NONE, run.base.transformer.wte.weight, 2, 4.0, 3)
    for p in head.parameters():
        if p is not head.weight:
            torch.nn.init.normal_(p, std=0.3)
    if arm == "chameleon":
        head.spread.fill_(0.5)
    return head


def subsets(names):
    return [frozenset(c) for n in range(len(names) + 1) for c in itertools.combinations(names, n)]


def test_a_row_is_a_line_cut_or_padded_and_padding_moves_no_real_state(run, lab):
    rows = lab.rows["train"]
    lines = [line for d in Lines().documents("train") for line in d.text.split("\n")]
    encoded = [run.tokenizer.encode(line)[:T] for line in lines]
    encoded = sorted(line for line in encoded if len(line) > 1)
    table = rows.tokens.reshape(-1, T)
    found = [row[:n].tolist() for row, n in zip(table, rows.length, strict=True)]
    assert sorted(found) == encoded
    assert {len(row) for row in found} > {T}  # some are cut, some are padded
    for i, row in enumerate(found):
        assert (table[i, len(row) :] == run.tokenizer.end).all()
        alone = run.base.hidden(torch.tensor([row]))[0]
        torch.testing.assert_close(lab.states["train", "frozen"][i, : len(row)], alone)


def test_an_instruction_is_one_row_whose_response_is_scored(run):
    documents = [Document("", "cloud", "river\nstone\n\n"), Document("", "house", "river " * 40),
                 Document("", "green\nseven", "apple\n\n")]
    padded, rows = anatomy.short_rows(documents, run.tokenizer, T, 10)
    assert len(padded) == 2  # a prompt that fills the row leaves nothing to score
    encode, end = run.tokenizer.encode, run.tokenizer.end
    for prompt, response in (("river\nstone\n\n", "cloud"), ("apple\n\n", "green\nseven")):
        wanted = encode(prompt) + encode(response) + [end]
        i = [row[: len(wanted)] for row in padded.tolist()].index(wanted)
        assert (rows.prompt[i], rows.length[i]) == (len(encode(prompt)), len(wanted))


def test_what_is_scored_equals_a_slow_loop(lab):
    rows, states = lab.rows["validation"], lab.states["validation", "frozen"]
    tokens = rows.tokens.reshape(-1, T)
    for flaws in subsets(FLAWS):
        wanted = np.full((len(rows), T), IGNORE)
        for i in range(len(rows)):
            end = T if "padding" in flaws else rows.length[i]
            if "last" in flaws:
                wanted[i, end - 1] = tokens[i, end - 1]  # the token that was just read
            else:
                for t in range(rows.prompt[i], end):
                    wanted[i, t - 1] = tokens[i, t]
        seen = under(flaws, rows, states)
        assert np.array_equal(seen.targets, wanted)
        assert seen.states is states and np.array_equal(seen.prompt, rows.prompt)


@torch.no_grad()
@pytest.mark.parametrize("arm", ["lora", "chameleon"])
def test_the_honest_rule_is_the_projects_own(run, lab, arm):
    run.base.lm_head = head = random_head(run, arm)
    plan = {"method": arm, "cluster_size": ARGS["batch_size"], "seed": 3}
    rows = lab.rows["validation"]
    told = held_out(run, run.base, rows, plan, "fit")
    wanted = summed(*score(run, run.base, rows, told))["loss"]  # the transformer runs again
    assert lab.score(head, frozenset({"head only"}), 3) == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("flaws", subsets(sorted(SCORING)))
def test_scores_under_flaws_equal_a_slow_loop(run, lab, flaws):
    head, flaws = random_head(run, "chameleon"), flaws | {"head only"}
    seen = lab.see("validation", flaws)
    tokens, wte = seen.tokens.view(-1, T), run.base.transformer.wte.weight
    used = seen.length if "statistics" in flaws else seen.prompt
    plan = {"method": "chameleon", "cluster_size": ARGS["batch_size"], "seed": 0,
            "stat_scope": anatomy.scope(flaws)}
    cluster = held_out(run, HeadAlone(run.base.config, head), seen, plan, "fit").cluster
    total = n = 0
    for i in range(len(seen)):
        mates = [j for j in range(len(seen)) if cluster[j] == cluster[i]]
        statistic = torch.cat([wte[tokens[j, : used[j]]] for j in mates]).mean(dim=0)
        logits = head(run.base.hidden(tokens[i : i + 1]), statistic[None])[0]
        total += F.cross_entropy(logits, seen.targets[i], ignore_index=IGNORE, reduction="sum")
        n += (seen.targets[i] != IGNORE).sum()
    assert lab.score(head, flaws, 0) == pytest.approx(float(total / n), rel=1e-4)


def test_each_flaw_changes_what_it_should_and_nothing_else(run, lab):
    def heard(arm, flaws):
        return lab.loss(arm, frozenset(flaws), frozenset(flaws), 1)

    honest = {arm: heard(arm, NONE) for arm in ("lora", "chameleon")}
    assert heard("lora", {"statistics"}) == honest["lora"]
    assert heard("chameleon", {"parameters"}) == honest["chameleon"]
    changed = {"statistics": {"chameleon"}, "last": honest, "padding": honest,
               "head only": honest, "parameters": {"lora"}, "rate": set()}
    for flaw, arms in changed.items():
        for arm in arms:
            assert heard(arm, {flaw}) != honest[arm], (flaw, arm)
    for arm in honest:  # the rate is chosen with seed 0, by the rule of the row
        for flaws in (NONE, frozenset({"last"})):
            best = min((lab.loss(arm, flaws, flaws, 0, lr), lr) for lr in anatomy.GRID)[1]
            assert lab.rate(arm, flaws) == best
            assert lab.rate(arm, flaws | {"rate"}) == anatomy.RATE
    assert lab.see("train", NONE).states is lab.states["train", "adapted"]
    assert lab.see("train", {"head only"}).states is lab.states["train", "frozen"]


@pytest.mark.parametrize("arm, flaws", [("lora", NONE), ("chameleon", NONE),
                                        ("lora", frozenset({"last", "padding"}))])
def test_training_lowers_what_it_is_trained_on_and_knows_no_other_seed(
    run, lab, monkeypatch, arm, flaws
):
    monkeypatch.setattr(anatomy, "EPOCHS", 8)
    untrained = make_head(arm, flaws, run.base.lm_head.weight, 2, 4.0, 3)
    trained = lab.loss(arm, flaws, flaws, 0, 1e-2)
    assert trained < lab.score(untrained, flaws, 0) - 0.1
    torch.manual_seed(5)
    assert lab.score(lab.train(arm, flaws, 0, 1e-2), flaws, 0) == trained


@pytest.mark.parametrize("V, C, r", [(4096, 16, 2), (4096, 192, 4), (50257, 768, 4)])
def test_parameters_are_matched_within_one_per_cent_or_33_times_fewer(V, C, r):
    heads = [make_head(arm, flaws, torch.empty(V, C, device="meta"), r, 1.0, 1)
             for arm, flaws in (("chameleon", ()), ("lora", ()), ("lora", ("parameters",)))]
    chameleon, matched, small = map(n_trained, heads)
    assert abs(matched / chameleon - 1) < 0.01
    assert small == r * (V + C) and 33 <= chameleon / small < 36


@pytest.fixture
def tiny_run(arguments, monkeypatch, capsys):
    for name, value in (("GRID", (1e-3, 1e-2)), ("SEEDS", (0, 1)), ("EPOCHS", 1),
                        ("LIMITS", {"train": 40, "validation": 20})):
        monkeypatch.setattr(anatomy, name, value)
    folder = train.main([*arguments, "--methods", "lora"])
    capsys.readouterr()
    return folder


def test_a_run_is_dissected_from_the_command_line(tiny_run, capsys):
    before = {p: p.read_bytes() for p in tiny_run.rglob("*") if p.is_file()}
    found = eval.main([str(tiny_run), "--anatomy"])
    assert list(found) == ["none (honest)", *FLAWS.values(),
                           "last position and one learning rate", "the first five", "all six"]
    saved = json.loads((tiny_run / "anatomy.json").read_text())
    assert saved["cases"] == json.loads(json.dumps(found))
    table, out = (tiny_run / "anatomy.md").read_text(), capsys.readouterr().out
    assert all(part in out for part in table.split("\n\n"))
    assert table.count("\n| ") == 1 + len(found) and "±" in table
    assert (tiny_run / "anatomy.png").read_bytes().startswith(b"\x89PNG")
    assert all(p.read_bytes() == content for p, content in before.items())
    honest = found["none (honest)"]
    assert honest["reported gain"] == honest["gain left"] == honest["re-scored"]["reported gain"]
    for case in found.values():
        for key, a, b in (("reported gain", case["lora"], case["chameleon"]),
                          ("gain left", honest["lora"], case["chameleon by the honest rule"])):
            assert case[key] == pytest.approx([x - y for x, y in zip(a, b, strict=True)])


def test_without_a_joint_lora_the_table_says_so(tiny_run):
    for path in (tiny_run / "adapters").iterdir():
        path.unlink()
    assert FLAWS["head only"] not in eval.main([str(tiny_run), "--anatomy"])
    assert "no joint LoRA" in (tiny_run / "anatomy.md").read_text()


def test_what_cannot_be_dissected_is_told_in_one_line(tiny_run, run, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        eval.main([str(tmp_path / "nothing"), "--anatomy"])
    with pytest.raises(UserError, match="no line") as error:
        anatomy.short_rows([Document("", "a\nb\n\n")], run.tokenizer, T, 10)
    assert "\n" not in error.value.args[0]
    assert issubclass(CachedRows, anatomy.Examples)
