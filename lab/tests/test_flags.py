"""Every flag of the laboratory's programs at odd values: one line, or a value that can be used."""

import pytest

from common import UserError
from lab import ask, eval, fair, flags, prompts, train, when
from tests.test_files import VALUES, Reached
from tests.test_files import flags as flags_of

LARGE = "2147483647"  # of a count
RIGHT = {
    "0": {"--seed", "--seeds", "--temperature"},
    "2147483648": {"--passes", "--rows", "--seeds", "--vocab-size"},  # of lab.run fair
    LARGE: {"--accumulate", "--at-hand", "--base-batch-size", "--batch-size", "--cluster-size",
            "--clusters", "--evaluations", "--max-new-tokens", "--max-steps", "--passes", "--rank",
            "--rows", "--seed", "--seeds", "--top-k", "--vocab-size"},
}


def stop(*_, **__):
    raise Reached


def check(main, flag, arguments):
    """Each value is told to be wrong in one line, or the work begins with it; arguments(i) are the
    others of call i."""
    for i, value in enumerate([*VALUES, LARGE]):
        begun = False
        try:
            main([*arguments(i), f"{flag}={value}"])
        except UserError as error:
            assert "\n" not in error.args[0] and 0 < len(str(error)) < 1000
        except RuntimeError as error:  # `run_cli` has a line for it
            assert value == LARGE and "can't allocate memory" in str(error)
        except Reached:
            begun = True
        else:
            raise AssertionError(f"{flag}={value}: no work was begun, and nothing said why")
        assert not begun or flag in RIGHT.get(value, ()), value


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    return train.main([
        "--dataset", str(corpus), "--size", "tiny", "--vocab-size", "300", "--dtype", "float32",
        "--device", "cpu", "--max-steps", "2", "--evaluations", "1", "--methods", "lora,chameleon",
        "--out", str(tmp_path_factory.mktemp("runs") / "run")])


@pytest.mark.parametrize("flag", flags_of(flags.train_parser()))
@pytest.mark.parametrize("from_scratch", [True, False])
def test_trains(flag, from_scratch, corpus, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", stop)
    base = (["--size", "tiny", "--vocab-size", "300"] if from_scratch
            else ["--base", str(folder / "base.safetensors")])
    check(train.main, flag, lambda i: [
        "--dataset", str(corpus), "--device", "cpu", "--dtype", "float32", "--methods",
        "chameleon", *base, "--out", str(tmp_path / str(i))])


@pytest.mark.parametrize("flag", flags_of(flags.eval_parser()))
@pytest.mark.parametrize("asked", [False, True])
def test_evals(flag, asked, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(eval, "score_run", stop)
    monkeypatch.setattr(prompts, "decode", stop)
    (tmp_path / "p.txt").write_text("the river\na stone\n")
    check(eval.main, flag, lambda i: [
        str(folder), *(["--prompts", str(tmp_path / "p.txt")] if asked else [])])


@pytest.mark.parametrize("flag", flags_of(fair.make_parser()))
def test_fairs(flag, base, few_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(fair, "train_arm", stop)
    check(fair.main, flag, lambda i: [str(base), "--out", str(tmp_path / str(i)), "--rows", "2"])


@pytest.mark.parametrize("program, flag", [
    (program, flag) for program in (when, ask) for flag in flags_of(program.make_parser())])
def test_whens_and_asks(program, flag, base, few_texts, tmp_path, monkeypatch):
    fair.main([str(base), "--out", str(tmp_path / "f"), "--rows", "2", "--passes", "1", "--seeds",
               "0", "--rates", "1e-2", "--arms", ";".join(when.ARMS)])
    monkeypatch.setattr(when, "sweeps", stop)
    monkeypatch.setattr(ask, "continue_rows", stop)
    (tmp_path / "p.txt").write_text("the river\na stone\n")
    more = [str(base), str(tmp_path / "p.txt")] if program is ask else []
    check(program.main, flag, lambda i: [str(tmp_path / "f"), *more])
