"""A run folder's files: damaged, odd, half written, held by another; odd names, odd text."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import eval as evaluation
import train
from common import (UserError, only_writer, printable, read_tensors, read_text, whole_file,
                    write_tensors)
from data import Tokenizer

ROOT = Path(__file__).parents[1]
ODD = [None, "4", -1, [], {}, True, math.nan, math.inf, 10**18, 0.5]


@pytest.fixture
def copy(finished_run, tmp_path):
    """A run folder to spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def refused(read):
    with pytest.raises(UserError) as error:
        read()
    assert "\n" not in error.value.args[0] and len(str(error.value)) < 600


# ---------------------------------------------------------------------------------- checkpoints


def spoil_header(path, change):
    tensors, info = read_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(info, tensors)
    write_tensors(path, tensors, info)


def adapter(folder, name="chameleon"):
    return folder / "adapters" / f"{name}-seed0.safetensors"


def load(folder, name="chameleon"):
    base = train.load_base(folder / "base.safetensors", torch.device("cpu"))
    return train.load_adapter(base, train.fingerprint(base), adapter(folder, name))


PLAN = ["method", "seed", "base", "rank", "alpha", "lr", "steps", "clusters", "cluster_size",
        "batch_size"]
SIZES = ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"]


@pytest.mark.parametrize("part, name", [("plan", n) for n in PLAN] + [("config", n) for n in SIZES]
                         + [("done", n) for n in ("step", "tokens", "seconds", "best")])
def test_a_header_that_cannot_be_is_refused(copy, part, name):
    """No number of a header may be of another kind, out of bounds or too large for its tensors."""
    path = copy / "base.safetensors" if part == "config" else adapter(copy)
    honest = path.read_bytes()
    reals = {"alpha": 0, "lr": 0, "seconds": 0, "cluster_size": 1, "best": -math.inf}
    for value in [*ODD, 0, *([10**9] if name in {"rank", "clusters", "vocab_size",
                                                          "block_size"} else [])]:
        fits = (isinstance(value, float) and math.isfinite(value)) or (
            type(value) is int and value < 2**53)
        if name in reals and fits and value >= reals[name]:
            continue
        if value == 0 and type(value) is int and name in {"seed", "tokens", "step"}:
            continue
        if name == "best" and value is None:  # not evaluated so far
            continue

        def change(info, tensors, value=value):
            of = info["plan"]["config"] if part == "config" else info[part]
            of[name] = value

        path.write_bytes(honest)
        spoil_header(path, change)
        refused(lambda: load(copy))


@pytest.mark.parametrize("change", [
    lambda info, tensors: info.pop("plan"),
    lambda info, tensors: info.update(plan=[]), lambda info, tensors: info.update(done=5),
    lambda info, tensors: info["plan"].update(config=7),
    lambda info, tensors: info["plan"].pop("rank"), lambda info, tensors: info["plan"].pop("alpha"),
    lambda info, tensors: info["plan"].pop("clusters"),
    lambda info, tensors: info["plan"].update(method="lora"),
    lambda info, tensors: tensors.popitem(),
    lambda info, tensors: tensors.update(more=torch.ones(2)),
    lambda info, tensors: tensors.update(dict.fromkeys(list(tensors)[:1], torch.ones(2))),
    lambda info, tensors: next(iter(tensors.values())).fill_(math.nan),
    lambda info, tensors: next(iter(tensors.values())).fill_(math.inf)])
def test_a_checkpoint_that_cannot_be_is_refused(copy, change):
    spoil_header(adapter(copy), change)
    refused(lambda: load(copy))


def test_heads_that_do_not_share_the_width_are_refused(copy):
    spoil_header(copy / "base.safetensors", lambda info, tensors: info["plan"]["config"].update(
        n_head=3))  # of a width of 16
    refused(lambda: load(copy))


def test_an_adapter_under_anothers_name_is_refused(copy):
    shutil.copy(adapter(copy, "lora"), adapter(copy, "lora-match"))
    refused(lambda: load(copy, "lora-match"))
    shutil.copy(copy / "base.safetensors", adapter(copy))
    refused(lambda: load(copy))
    shutil.copy(adapter(copy, "lora"), copy / "base.safetensors")
    refused(lambda: load(copy))


def test_what_could_be_scored_is_kept_when_an_adapter_is_damaged(copy, capsys):
    spoil_header(adapter(copy, "lora"), lambda info, tensors: next(
        iter(tensors.values())).fill_(math.nan))
    with pytest.raises(UserError, match=r"not scored: .*lora-seed0.*not finite"):
        evaluation.main([str(copy), "--device", "cpu"])
    names = {e["name"] for e in json.loads((copy / "results.json").read_text())["entries"]}
    assert {"frozen", "lora-match", "chameleon"} <= names and "lora" not in names
    assert (copy / "loss.png").stat().st_size > 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["plan", "done", "config", "method", "seed", "rank", "step"]) | st.text(),
        inner, max_size=4), max_leaves=12)


@given(info=json_values)
def test_any_header_is_read_or_refused(tmp_path_factory, info):
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, info)
    try:
        train.read_checkpoint(path)
    except UserError as error:
        assert 0 < len(str(error)) < 1000


@given(part=st.sampled_from(["plan", "done", "whole"]), draw=st.data(), value=json_values)
def test_any_value_in_an_honest_header_is_read_or_refused(
        finished_run, tmp_path_factory, part, draw, value):
    tensors, info = read_tensors(adapter(finished_run))
    of = info if part == "whole" else info[part]
    of[draw.draw(st.sampled_from(sorted(of)))] = value
    path = tmp_path_factory.mktemp("header") / "chameleon-seed0.safetensors"
    write_tensors(path, tensors, info)
    base = train.load_base(finished_run / "base.safetensors", torch.device("cpu"))
    try:
        model, _ = train.load_adapter(base, train.fingerprint(base), path)
    except UserError as error:
        assert 0 < len(str(error)) < 1000
    else:
        assert set(train.weights(model)) == set(tensors)


# ------------------------------------------------------------------------------------ text files

SPOILT = ["", "[", "[" * 100_000, "null", "{}", "5", "[]", '"x"', '{"args": 5}', "\0\0", "{" * 9]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", SPOILT)
def test_spoilt_text_files_are_refused(copy, name, text):
    (copy / name).write_text(text)
    refused(lambda: evaluation.main([str(copy), "--device", "cpu"]))
    (copy / name).write_bytes(b"\xff\xfe{}")
    refused(lambda: evaluation.main([str(copy), "--device", "cpu"]))


def test_a_setting_that_no_flag_could_have_is_refused(copy):
    path = copy / "config.json"
    honest = json.loads(path.read_text())
    for name in honest["args"]:
        for value in [*ODD, 0, "nonsense", ["nonsense"]]:
            spoilt = json.loads(json.dumps(honest))
            spoilt["args"][name] = value
            path.write_text(json.dumps(spoilt))
            try:
                read = train.read_config(copy)["args"][name]
            except UserError as error:
                assert "\n" not in error.args[0]
            else:  # a flag may be that: a name, a rate, nothing where nothing is the default
                assert isinstance(read, str) or name in {"lr", "epochs", "base_epochs", "alpha",
                                                         "base_lr"} or read == 0
    for name in ("data", "base", "read", "instructions"):
        path.write_text(json.dumps(honest | {name: 5}))
        refused(lambda: train.read_config(copy))


@given(draw=st.data(), value=json_values)
def test_any_setting_is_read_or_refused(finished_run, tmp_path_factory, draw, value):
    config = json.loads((finished_run / "config.json").read_text())
    of = draw.draw(st.sampled_from([config, config["args"]]))
    of[draw.draw(st.sampled_from(sorted(of)))] = value
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(config))
    try:
        assert json.dumps(train.read_config(folder)) == json.dumps(config)  # NaN is not NaN
    except UserError as error:
        assert 0 < len(str(error)) < 1000


def test_another_block_size_is_not_scored(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["args"]["block_size"] //= 2
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="was trained on rows of 24 tokens, not 12"):
        evaluation.main([str(copy), "--device", "cpu"])


def test_another_tokenizer_is_refused(copy):
    Path(copy / "tokenizer.json").write_text(json.dumps(Tokenizer.learn(["a b c"], 260).spec))
    refused(lambda: evaluation.main([str(copy), "--device", "cpu"]))
    (copy / "p.txt").write_text("the river\n")
    refused(lambda: evaluation.main([str(copy), "--prompts", str(copy / "p.txt")]))


@given(spec=json_values)
def test_any_tokenizer_file_is_read_or_refused(tmp_path_factory, spec):
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    path.write_text(json.dumps(spec))
    refused(lambda: Tokenizer.load(path))


records = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["text", "instruction", "input", "output", "prompt", "completion", "messages", "role",
         "content", "method", "seed", "step", "tokens", "loss", "context", "response"]),
        inner, max_size=5), max_leaves=12)


@given(found=st.lists(records, max_size=4), lines=st.booleans())
def test_any_records_are_read_or_refused(tmp_path_factory, found, lines):
    folder = tmp_path_factory.mktemp("r")
    for name in ("x.json", "x.jsonl", "metrics.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, found)) if lines
                                   else json.dumps(found))
    for name in ("x.json", "x.jsonl"):
        try:
            documents = list(data.read_records(folder / name))
        except UserError as error:
            assert 0 < len(str(error)) < 1000
        else:
            assert all(isinstance(d.text, str) and isinstance(d.prompt, str) for d in documents)
    for record in train.read_records(folder):
        assert record["loss"] + record["tokens"] + record["step"] + record["seed"] is not None


@given(content=st.binary(max_size=80) | st.text(max_size=80).map(lambda t: t.encode("utf-8")))
def test_any_file_of_prompts_is_answered_or_refused(finished_run, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("p") / "prompts.txt"
    path.write_bytes(content)
    try:
        answers = evaluation.main([str(finished_run), "--device", "cpu", "--prompts", str(path),
                                   "--max-new-tokens", "1"])
    except UserError as error:
        assert 0 < len(str(error)) < 1000
    else:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert len(answers) == sum(bool(line.strip()) for line in lines)


# ------------------------------------------------------------------------------- writers, kills


def test_a_folder_has_one_writer(arguments, tmp_path):
    """While a process holds the folder another gets one line that names it; death lets go."""
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time\nfrom common import only_writer\n"
         f"with only_writer({str(folder)!r}):\n print('held', flush=True)\n time.sleep(60)"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"written by process {holder.pid}, started 20"):
        train.main(arguments)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert train.main([*arguments, "--methods", "lora"]) == folder


def test_a_folder_that_nothing_came_of_is_gone(arguments, tmp_path):
    with pytest.raises(UserError):
        train.main([*arguments, "--dataset", "nowhere"])
    assert not (tmp_path / "run").exists()


def test_what_a_kill_leaves_is_cleared(arguments, tmp_path):
    folder = tmp_path / "run"
    (folder / "adapters").mkdir(parents=True)
    for name in (".config.json.tmp", ".metrics.jsonl.tmp", "adapters/.lora-seed7.state.tmp",
                 "adapters/.chameleon-seed0.safetensors.tmp"):
        (folder / name).write_text("half")
    train.main([*arguments, "--methods", "lora"])
    assert not list(folder.rglob(".*"))
    assert not list(folder.rglob("*.state"))


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "kept").write_text("something")
    (tmp_path / "lock").symlink_to(tmp_path / "kept")
    with pytest.raises(UserError, match="is a link"), only_writer(tmp_path):
        pass
    assert (tmp_path / "kept").read_text() == "something"


def test_a_place_without_locks_is_said(tmp_path, monkeypatch, capsys):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    with only_writer(tmp_path):
        pass
    assert "cannot be locked" in capsys.readouterr().out


def test_a_full_disk_is_told_with_the_files_name(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left"):
        with whole_file(tmp_path / "a.txt") as temporary:
            os.symlink(full, temporary)
            temporary.write_text("x")





# ------------------------------------------------------------------------------- names and text


@given(st.text())
def test_what_is_shown_cannot_steer_a_terminal(text):
    steering = {chr(i) for i in (*range(9), *range(11, 32), *range(127, 160), 0x61C, 0x200E, 0x200F,
                                 *range(0x2028, 0x202F), *range(0x2066, 0x206A))}
    shown = printable(text + "\x1b\u202e")
    assert not steering & set(shown) and shown.encode()  # and half a surrogate is spelt out
    assert printable(shown) == shown
    told = str(UserError(f"a{text}\n\x1bb"))
    assert "\n" not in told and not steering & set(told)


def test_each_character_that_steers_is_spelt_out():
    for code in (*range(9), *range(11, 32), *range(127, 160), 0x61C, 0x200E, 0x200F, 0xD800, 0xDFFF,
                 *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xE0041, 0xFFFF):
        assert printable(f"a{chr(code)}b").isascii(), hex(code)


def test_a_mark_of_the_byte_order_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read_text(tmp_path / "a.txt") == "one"


def test_what_is_no_danger_is_shown_as_it_is():
    text = "prix : 10\xa0%, 東京\u3000大, نمی\u200cخواهم, 👩\u200d💻\n\tend"
    assert printable(text) == text


def test_prompts_and_answers_are_shown_escaped(finished_run, tmp_path, capsys):
    prompt = "the \x1b]0;owned\x07 river \u202egnp"
    (tmp_path / "p.txt").write_text(prompt)
    evaluation.main([str(finished_run), "--prompts", str(tmp_path / "p.txt"), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07" in shown and "\\u202e" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


def test_a_name_that_is_not_utf8_is_refused_before_any_work(arguments, corpus, tmp_path):
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff")
    shutil.copytree(corpus, name)
    with pytest.raises(UserError, match="not UTF-8"):
        train.main([*arguments, "--dataset", name])
    shutil.copytree(corpus, tmp_path / "good" / os.path.basename(name))  # within a folder it may be
    assert train.main([*arguments, "--dataset", str(tmp_path / "good"), "--methods", "lora"])


def test_a_run_goes_on_where_its_text_has_moved(arguments, corpus, tmp_path):
    folder = train.main([*arguments, "--methods", "lora"])
    moved = shutil.copytree(corpus, tmp_path / "moved")
    train.main(["--out", str(folder), "--resume", "--dataset", str(moved), "--base-dataset",
                str(moved), "--methods", "lora,chameleon"])
    assert adapter(folder).exists()


def test_a_run_of_spaces_is_encoded(finished_run):
    tokenizer = Tokenizer.load(finished_run / "tokenizer.json")
    for text in (" " * 300_000, "a" + "\n" * 50_000 + "b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_console_that_is_no_file(arguments, monkeypatch):
    """A notebook's has no descriptor."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    assert train.main([*arguments, "--methods", "lora"])
    assert "done; the table" in sys.stdout.getvalue()


def test_help_with_a_closed_output():
    done = subprocess.run(f"{sys.executable} train.py --help >&-", shell=True, cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert "Traceback" not in done.stderr


def test_a_loss_worse_than_guessing_is_said(arguments, capsys):
    train.main([*arguments, "--methods", "lora", "--lr", "30"])
    assert "worse than blind guessing" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- flags

VALUES = ["0", "-1", "2147483648", "1e400", "nan", "text", "", "1,1,x", "\x1b[31m"]
FREE = {"--out", "--data-dir"}  # any name of a folder will do


def flags(parser):
    return sorted({option for action in parser._actions for option in action.option_strings
                   if action.nargs != 0 and option.startswith("--")} - FREE)


class Reached(Exception):
    """All was checked: the work would begin."""


@pytest.mark.parametrize("flag", flags(train.make_parser()))
def test_odd_values_of_trains_flags(finished_run, corpus, tmp_path, monkeypatch, flag):
    """Each is refused in one line, or is a value that the work can begin with."""
    def reached(*arguments, **named):
        raise Reached

    monkeypatch.setattr(train, "fit", reached)
    arguments = ["--dataset", str(corpus), "--base", str(finished_run / "base.safetensors"),
                 "--block-size", "24", "--device", "cpu"]
    for i, value in enumerate(VALUES):
        out = tmp_path / str(i)
        try:
            train.main([*arguments, "--out", str(out), f"{flag}={value}"])
        except UserError as error:
            assert "\n" not in error.args[0] and "Traceback" not in str(error)
            assert not out.exists()  # what is refused leaves nothing
        except Reached:
            accepted = {"0": {"--seeds"}, "-1": set(), "text": set(), "": set(), "nan": set(),
                        "1e400": set(), "1,1,x": set(), "\x1b[31m": set()}
            free = {"--base-dataset"}  # not read here: the base is another run's
            assert flag in accepted.get(value, {flag}) | free, value
        except (RuntimeError, MemoryError) as error:  # a rank of two thousand millions
            assert "allocate" in str(error)


@pytest.mark.parametrize("flag", flags(evaluation.make_parser()))
def test_odd_values_of_evals_flags(finished_run, tmp_path, monkeypatch, capsys, flag):
    def reached(*arguments, **named):
        raise Reached

    monkeypatch.setattr(evaluation, "generate", reached)
    (tmp_path / "p.txt").write_text("the river\na stone\n")
    for value in VALUES:
        given = [str(finished_run), "--device", "cpu", "--prompts", str(tmp_path / "p.txt"),
                 f"{flag}={value}"]
        try:
            evaluation.main(given)
        except UserError as error:
            assert "\n" not in error.args[0]
        except Reached:
            accepted = {"0": {"--seed", "--temperature"},
                        "2147483648": {"--clusters", "--top-k", "--max-new-tokens"}}
            assert flag in accepted.get(value, set()), value
