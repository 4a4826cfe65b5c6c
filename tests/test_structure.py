"""The house: the core knows nothing of the laboratory, and has nothing that it does not use."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ("common", "data", "model", "cluster", "hypernet", "train", "eval")
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in CORE}
ALL = ast.Module([node for tree in TREES.values() for node in tree.body], [])
MAY_IMPORT = {
    "common": set(), "data": {"common"}, "model": {"common"}, "cluster": set(),
    "hypernet": {"model"}, "train": {"common", "data", "model", "cluster", "hypernet"},
    "eval": {"common", "data", "model", "cluster", "hypernet", "train"},
}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_these_are_all_the_files():
    assert {path.stem for path in ROOT.glob("*.py")} == set(CORE)


@pytest.mark.parametrize("name", CORE)
def test_who_builds_on_whom(name):
    ours = set(CORE) | {"lab", "course", "bench", "tests"}
    assert set(imported(TREES[name])) & ours == MAY_IMPORT[name]


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def names_in(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


@pytest.mark.parametrize("name", CORE)
def test_every_argument_is_used(name):
    for function in functions(TREES[name]):
        given = {a.arg for a in function.args.args + function.args.kwonlyargs} - {"self", "cls"}
        unused = given - names_in(ast.Module(function.body, []))
        # All heads are called alike; those of LoRA are told nothing.
        assert unused <= ({"statistics"} if function.name == "forward" else set()), function.name


def test_every_attribute_is_read_somewhere():
    written, read = set(), set()
    for node in ast.walk(ALL):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            (written if isinstance(node.ctx, ast.Store) and own else read).add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            written.add(node.target.id)  # a dataclass's field
    # The fields of GPTConfig that only its own asdict and ** pass on are read by name elsewhere.
    assert written - read == set()


def test_every_function_and_class_is_used_by_the_core_itself():
    defined = {node.name for tree in TREES.values() for node in tree.body
               if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = names_in(ALL) | {n.attr for n in ast.walk(ALL) if isinstance(n, ast.Attribute)}
    assert defined - used == set()


def test_every_optional_argument_is_given_somewhere_in_the_core():
    calls = [n for n in ast.walk(ALL) if isinstance(n, ast.Call)]
    keywords = {k.arg for call in calls for k in call.keywords}
    longest = {}  # how many positional arguments a function of that name is called with
    for call in calls:
        name = getattr(call.func, "id", getattr(call.func, "attr", None))
        starred = any(isinstance(a, ast.Starred) for a in call.args)
        longest[name] = max(longest.get(name, 0), len(call.args) + 9 * starred)
    for function in functions(ALL):
        arguments = [a.arg for a in function.args.args if a.arg not in ("self", "cls")]
        for place in range(len(arguments) - len(function.args.defaults), len(arguments)):
            by_place = longest.get(function.name, 0) > place or function.name == "forward"
            settled = {"max_steps", "tolerance", "pool", "argv"}  # knobs with one sensible value
            assert by_place or arguments[place] in keywords | settled, (
                function.name, arguments[place])
