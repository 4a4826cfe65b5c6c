"""Make the notebook course/tour.ipynb and the page course/tour.md out of course/tour.py.

    python course/make_tour.py             # runs the tour: some minutes
    python course/make_tour.py --no-run    # the notebook alone

tour.py is one script. A line `# %%` begins a cell of code, `# %% [markdown]` a cell of text. The
notebook is plain JSON and holds no output; the page holds the printed output and, in course/tour/,
the figures. To make the page, the cells are executed in order in this process.
"""

import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def cells(source):
    """(is it text, its content) of each cell of a script."""
    found = []
    for part in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        text = "[markdown]" in head
        if text:
            body = "\n".join(re.sub("^# ?", "", line) for line in body.splitlines())
        found.append((text, body.strip("\n")))
    return found


def notebook(found):
    """The notebook, format 4, as JSON; outputs are empty."""
    listed = []
    for text, body in found:
        cell = {"cell_type": "markdown" if text else "code", "metadata": {},
                "source": body.splitlines(keepends=True)}
        listed.append(cell if text else cell | {"execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps({"cells": listed, "metadata": {"kernelspec": kernel,
                                                     "language_info": {"name": "python"}},
                       "nbformat": 4, "nbformat_minor": 4}, indent=1, ensure_ascii=False) + "\n"


def execute(found, folder):
    """Run the cells in order; yields each one's printed output and the names of its figures, which
    are written to `folder`. The value of a last line is not shown."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.show = lambda: None  # figures stay open until they are written
    namespace = {"__name__": "__main__"}
    folder.mkdir(parents=True, exist_ok=True)
    for number, (text, body) in enumerate(found):
        printed, names = io.StringIO(), []
        if not text:
            ast.parse(body)  # a cell that a notebook could not run is an error here too
            with contextlib.redirect_stdout(printed):
                exec(compile(body, f"tour.py, cell {number}", "exec"), namespace)
            for figure in map(plt.figure, plt.get_fignums()):
                names.append(f"{figure.get_label()}.png")
                figure.savefig(folder / names[-1], dpi=110)
            plt.close("all")
        yield printed.getvalue(), names


def page(found, results):
    """tour.md: text, code, what was printed, figures."""
    parts = ["<!-- Made by `python course/make_tour.py`. Change course/tour.py instead. -->"]
    for (text, body), (printed, names) in zip(found, results, strict=True):
        parts.append(body if text else f"```python\n{body}\n```")
        if printed.strip():
            place = re.escape(tempfile.gettempdir()) + r"/\w+"
            parts.append("```text\n" + re.sub(place, "TEMPORARY", printed).rstrip() + "\n```")
        parts += [f"![{Path(name).stem.replace('-', ' ')}](tour/{name})" for name in names]
    return "\n\n".join(parts) + "\n"


def main(arguments, out=HERE):
    """Write the notebook, and unless --no-run is among the arguments the page, to `out`."""
    out = out.resolve()
    found = cells((HERE / "tour.py").read_text(encoding="utf-8"))
    (out / "tour.ipynb").write_text(notebook(found), encoding="utf-8")
    if "--no-run" in arguments:
        return
    os.chdir(HERE.parent)  # where the first cell looks for the six files
    results = []
    for result in execute(found, out / "tour"):
        print(result[0], end="", flush=True)
        results.append(result)
    drawn = {name for _, names in results for name in names}
    for old in (out / "tour").glob("*.png"):
        if old.name not in drawn:
            old.unlink()
    (out / "tour.md").write_text(page(found, results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
