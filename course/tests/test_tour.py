"""The notebook is the script's, holds no output, and runs from top to bottom."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import make_tour
import pytest

COURSE = Path(__file__).resolve().parents[1]
FOUND = make_tour.cells((COURSE / "tour.py").read_text(encoding="utf-8"))
DRAWN = sorted(f"{a or b}.png" for a, b in re.findall(
    r'num="(.*?)"|draw_bars\("(.*?)"', "\n".join(body for _, body in FOUND)))


def test_the_notebook_is_that_of_the_script():
    text = (COURSE / "tour.ipynb").read_text(encoding="utf-8")
    assert text == make_tour.notebook(FOUND), "run python course/make_tour.py --no-run"
    for cell in json.loads(text)["cells"]:
        assert cell["cell_type"] == "markdown" or cell["outputs"] == []
        assert cell.get("execution_count") is None


def test_every_line_of_the_script_is_in_a_cell():
    source = (COURSE / "tour.py").read_text(encoding="utf-8")
    assert source.startswith("# %% [markdown]\n")
    assert source.count("# %%") == len(FOUND)


def test_the_page_shows_every_figure_and_the_code_that_stands_in_the_script():
    text = (COURSE / "tour.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[.*?\]\(tour/(.*?)\)", text)
    assert sorted(shown) == sorted(path.name for path in (COURSE / "tour").glob("*.png"))
    assert sorted(shown) == DRAWN
    for _, body in FOUND:
        assert body in text, "run python course/make_tour.py"
    assert "/tmp" not in text and "/home" not in text


@pytest.mark.parametrize("folder", [COURSE, COURSE.parent])
def test_the_first_cell_finds_the_six_files(folder):
    """As a notebook is started: from the root, or from its own folder."""
    done = subprocess.run([sys.executable, "-c", next(body for text, body in FOUND if not text)],
                          cwd=folder, capture_output=True, text=True, check=False,
                          env=os.environ | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_tour_runs_from_top_to_bottom(tmp_path):
    code = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import make_tour; " \
           "make_tour.main([], pathlib.Path(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", code, str(COURSE), str(tmp_path)],
                          cwd=COURSE.parent, capture_output=True, text=True, check=False,
                          env=os.environ | {"TOUR_SMALL": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    figures = sorted(path.name for path in (tmp_path / "tour").glob("*.png"))
    assert figures == DRAWN
    assert "prompts only: a logit moves by 0.0000" in done.stdout
    assert (tmp_path / "tour.ipynb").read_text("utf-8") == make_tour.notebook(FOUND)
