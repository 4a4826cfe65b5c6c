"""The pages' tables say what results/ holds, and results/ agrees with its losses per example."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from lab import ask, fair, when
from lab.eval import of_method, spread
from lab.flags import parse_eval, train_parser

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "results/README.md", "lab/README.md", "lab/ANATOMY.md", "lab/EXPERIMENTS.md",
    "bench/README.md")}
PAGE = PAGES["results/README.md"]
FOLDERS = sorted(path.parent for path in RESULTS.rglob("results.json")
                 # those are the core's, and the fair test's: see test_fair.py
                 if not path.parent.name.startswith("python")
                 and "asked" not in json.loads(path.read_text()))
# the page's names, where they are not those of results.json
NAMES = {"frozen base": "frozen", "no head adapter": "frozen",
         "told another cluster": "shuffled", "told its own history alone": "own prompt only",
         "trained without company": "trained on own prompt only"}
CONTROLS = {"itself, told another cluster": ", shuffled",
            "itself, told its own history alone": ", own prompt only",
            "itself, told its cluster without its own article": ", other articles",
            "itself, told its cluster without later rows of its article": ", no later rows",
            "the same head, trained without company": ", trained on own prompt only"}


def entries_of(folder, trunk=None):
    entries = json.loads((folder / "results.json").read_text(encoding="utf-8"))["entries"]
    return [e for e in entries if trunk in (None, e["trunk"])]


def tables(text, head):
    """Rows of cells, of each table in markdown whose first cell is `head`."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif inside:
            found[-1].append(cells)
        elif cells[0] == head:
            found.append([cells])
            inside = True
    return [[rows[0], *rows[2:]] for rows in found]


def name_of(cell):
    first, _, rest = cell.replace("`", "").replace(" (one seed)", "").partition(", ")
    return ", ".join(filter(None, (NAMES.get(first, first), NAMES.get(rest, rest))))


def words(folder, second, nth):
    """The word that ends each row of results.md's nth table whose second column is `second`, by
    the method, or by the method and its control."""
    text = (folder / "results.md").read_text(encoding="utf-8")
    table = [t for t in tables(text, "method") if t[0][1] == second][nth]
    return {row[0] if second == "seeds" else tuple(row[:2]): row[-1] for row in table[1:]}


def test_the_folders_are_there():
    assert {"wikitext2", "alpaca", "cpu", "wikitext2-medium"} <= {path.name for path in FOLDERS}


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (f / "losses.npz").exists()],
                         ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_results_agree_with_their_losses_per_example(folder):
    losses, compared = np.load(folder / "losses.npz"), 0
    for e in entries_of(folder):
        for split in ("validation", "test"):
            key = f"{e['trunk']}/{e['name']}/{e['seed']}/{split}"
            if key in losses:
                found, compared = e[split], compared + 1
                assert losses[key].sum() / found["n_tokens"] == pytest.approx(found["loss"])
    assert compared == len(losses.files) > 1


@pytest.mark.parametrize("nth, trunk, place, column", [
    (0, "joint", "wikitext2", 2), (0, "joint", "alpaca", 4),
    (1, "shared", "wikitext2", 2), (1, "shared", "alpaca/100-steps", 4),
])
def test_the_tables_of_methods(nth, trunk, place, column):
    table = [t for t in tables(PAGE, "method") if t[0][1] == "trained parameters"][nth]
    folder, shown = RESULTS / place, set()
    entries, word = entries_of(folder, trunk), words(folder, "seeds", nth)
    for row in table[1:]:
        name = name_of(row[0])
        mine = of_method(entries, name)
        loss = row[column].removesuffix(" (one seed)")
        assert loss == (spread([e["test"]["loss"] for e in mine.values()], 4) if mine else "")
        if mine:
            assert row[1] == f"{next(iter(mine.values()))['parameters']:,}"
            assert row[column + 1] == word[name]
            shown.add(name)
    left_out = {e["name"] for e in entries} - shown
    assert all(", " in name for name in left_out)  # controls, which have a table of their own


@pytest.mark.parametrize("dataset, column", [("wikitext2", 1), ("alpaca", 3)])
def test_the_table_of_one_seed_on_two_cores(dataset, column):
    table = next(t for t in tables(PAGE, "method") if t[0][2] == "seeds")
    entries = entries_of(RESULTS / dataset / "cpu")
    for row in table[1:]:
        mine = of_method(entries, name_of(row[0]))
        assert row[column] == spread([e["test"]["loss"] for e in mine.values()], 4)
        assert (row[column + 1] or "1") == str(len(mine))


def test_the_table_of_what_company_is_worth():
    table, = tables(PAGE, "`company-cache` less")
    columns = [("wikitext2", "joint", 0), ("wikitext2", "shared", 1), ("alpaca", "joint", 0),
               ("alpaca/400-steps", "shared", 0)]
    for column, (folder, trunk, nth) in enumerate(columns, 1):
        entries = entries_of(RESULTS / folder, trunk)
        word = words(RESULTS / folder, "less its control", nth)
        own = of_method(entries, "company-cache")
        for row in table[1:]:
            told = of_method(entries, "company-cache" + CONTROLS[row[0]])
            if not told:
                assert row[column] == ""
                continue
            d = [own[seed]["test"]["loss"] - told[seed]["test"]["loss"] for seed in own]
            said = word["company-cache", CONTROLS[row[0]].removeprefix(", ")]
            assert row[column] == f"{np.mean(d):+.4f} {said}"


@pytest.mark.parametrize("folder, seeds, sentence", [
    ("400-steps", (0, 1, 2), "it was open ({low} to {high})"),
    ("400-steps", (5, 6, 7), "say {mean} again ({low} to {high})"),
    ("400-steps", range(8), "make {mean} over 8 seeds ({low} to {high}, over records"),
])
def test_the_intervals_of_company_on_alpaca(folder, seeds, sentence):
    entries = entries_of(RESULTS / "alpaca" / folder, "shared")
    own, without = (of_method(entries, f"company-cache{told}")
                    for told in ("", ", trained on own prompt only"))
    d = [own[seed]["test"]["loss"] - without[seed]["test"]["loss"] for seed in seeds]
    low, high = scipy.stats.t.interval(0.95, len(d) - 1, np.mean(d), scipy.stats.sem(d))
    found = {"mean": np.mean(d), "low": low, "high": high}
    said = sentence.format(**{name: f"{value:+.4f}" for name, value in found.items()})
    assert said in " ".join(PAGE.split())


def test_the_table_of_bases():
    table, = tables(PAGE, "data")
    assert len(table) == 8
    for link, size, _, steps, match, own_history, company, word, wrong in table[1:]:
        folder = RESULTS / re.search(r"\((.*)/results.md\)", link)[1]
        entries = entries_of(folder, "shared")
        n, = re.findall(r"base of ([\d,]+) parameters", (folder / "results.md").read_text("utf-8"))
        assert float(size.removesuffix(" million")) == pytest.approx(
            int(n.replace(",", "")) / 1e6, rel=0.02)
        assert {e["plan"].get("steps", int(steps)) for e in entries} == {int(steps)}
        lora, with_it, without, shuffled = (
            {seed: e["test"]["loss"] for seed, e in of_method(entries, name).items()}
            for name in ("lora-match", "company-cache", "company-cache, trained on own prompt only",
                         "company-cache, shuffled"))
        d = [with_it[seed] - without[seed] for seed in with_it]
        low, high = scipy.stats.t.interval(0.95, len(d) - 1, np.mean(d), scipy.stats.sem(d))
        assert match == spread(list(lora.values()), 4)
        assert own_history == f"{np.mean([without[seed] - lora[seed] for seed in lora]):+.4f}"
        assert company == f"{np.mean(d):+.4f} ({low:+.4f} to {high:+.4f})"
        assert wrong == f"{np.mean([with_it[seed] - shuffled[seed] for seed in with_it]):+.4f}"
        said = words(folder, "less its control", -1)
        assert said["company-cache", "trained on own prompt only"] == word


def test_what_is_left_of_company_where_the_model_writes():
    folder = RESULTS / "pydocs"
    swept = {(r["variant"], r["x"]): r["loss"]
             for r in json.loads((folder / "sweep-written.json").read_text(encoding="utf-8"))}
    table, = (t for t in tables(PAGE, "`company-cache` on pydocs, told its own history alone "
                                "4.8425"))
    known = [("not known", 0.0), ("not known", 1.0), ("written by the model", 1.0)]
    for row, (variant, x) in zip(table[1:], known, strict=True):
        assert row[1:] == [f"{swept[variant + later, x]:.4f}" for later in ("", ", no later rows")]
    alone, = (e["validation"]["loss"] for e in entries_of(folder)
              if e["name"] == "company-cache, own prompt only")
    assert f"{alone:.4f}" == "4.8425"
    worth, left = (alone - swept[key] for key in (
        ("not known", 0.0), ("written by the model, no later rows", 1.0)))
    assert f"Of {worth:.4f} that these weights lose without company, {left:.4f} are" in " ".join(
        PAGE.split())
    assert left / worth == pytest.approx(1 / 4, abs=0.02)  # "a quarter of it is left"
    experiments = PAGES["lab/EXPERIMENTS.md"]
    table, = tables(experiments[experiments.index("## What mates write"):], "share of mates")
    for variant, *cells in table[1:]:
        assert cells == [f"{swept[variant, x]:.4f}" for x in (0.0, 0.5, 1.0)]


def test_how_many_rows_do_not_notice_a_wrong_cluster():
    shares = []
    for dataset in ("wikitext2", "alpaca"):
        losses = np.load(RESULTS / dataset / "cpu" / "losses.npz")
        shares += [(losses[f"joint/chameleon/{seed}/test"]
                    == losses[f"joint/chameleon, shuffled/{seed}/test"]).mean()
                   for seed in range(3)]
    said = f"{100 * min(shares):.0f} to {max(shares):.0%} of the test rows"
    assert said in " ".join(PAGE.split())


def test_the_anatomy_is_the_committed_one():
    table, = tables(PAGES["lab/ANATOMY.md"], "flaw")
    made, = tables((RESULTS / "wikitext2" / "anatomy.md").read_text(encoding="utf-8"), "flaw")
    assert table == made and len(table) > 5


def test_every_mean_with_its_spread_is_one_of_results():
    known = set()
    for folder in FOLDERS:
        entries = entries_of(folder)
        for name, trunk in {(e["name"], e["trunk"]) for e in entries}:
            mine = [e for e in entries if (e["name"], e["trunk"]) == (name, trunk)]
            known |= {spread([e[split]["loss"] for e in mine], 4) for split in
                      ("validation", "test")}
    said = re.findall(r"[1-9]\.\d{4} ± \d\.\d{4}", PAGE)
    assert len(said) > 40 and set(said) <= known


def anchors(text):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text = re.sub(r"```.*?```", "", PAGES[name], flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 2
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        there = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert there.exists(), link
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_understood(name):
    """Every `python -m lab.run` of a block, with the variables that the block has set."""
    n = 0
    for block in re.findall(r"```sh\n(.*?)```", PAGES[name], re.DOTALL):
        known = {}
        for line in block.replace("\\\n", "").splitlines():
            for variable, value in known.items():
                line = line.replace(f"${variable}", value)
            if found := re.fullmatch(r'(\w+)="(.*)"( *#.*)?', line):
                known[found[1]] = found[2]
            words = shlex.split(line, comments=True)
            if words[:3] == ["python", "-m", "lab.run"]:
                parse = {"train": train_parser().parse_args, "eval": parse_eval,
                         "fair": fair.make_parser().parse_args,
                         "when": when.make_parser().parse_args,
                         "ask": ask.make_parser().parse_args}[words[3]]
                parse(words[4:])
                n += 1
    assert n > 0 or name in ("results/README.md", "bench/README.md")
