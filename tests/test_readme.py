"""What the README says of the code is so."""

import ast
import re

import pytest

from figures import FILES, ROOT, code_lines, figures, taken

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = README.split("## From the paper to the code")[1].split("\n\n")[2]
CELLS = re.findall(r"`(\w+\.py)`: ((?:`[\w.]+`(?:, )?)+)", MAP)
NAMED = [(file, name) for file, names in CELLS for name in re.findall(r"`([\w.]+)`", names)]


def defined(body: list, prefix: str = "") -> set[str]:
    """The names that a file defines at its top, and those of methods as Class.method."""
    names = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= defined(node.body, f"{node.name}.")
        if isinstance(node, ast.Assign):
            names |= {prefix + target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("file, name", NAMED)
def test_the_map_from_paper_to_code_leads_somewhere(file, name):
    assert name in defined(ast.parse((ROOT / file).read_text(encoding="utf-8")).body)


def test_the_map_names_the_methods_and_each_row_names_code():
    rows = MAP.split("\n")[2:]
    assert len(rows) > 10 and all(re.search(r"`\w+\.py`: `", row) for row in rows)
    assert {"Adapter", "HyperNetwork", "KroneckerLinear", "Prompt", "LoRALinear"} <= {name for _, name in NAMED}


def test_the_files_stay_light_and_narrow():
    rows = figures()
    assert set(rows) == set(FILES)
    assert sum(size for size, _, _ in rows.values()) <= 316_000
    assert sum(wide for *_, wide in rows.values()) <= 0.03 * sum(code for _, code, _ in rows.values())
    assert 0 < len(taken("train.py", "evaluate")) <= 8


def test_figures_count_code_and_neither_comments_nor_docstrings(tmp_path):
    path = tmp_path / "short.py"
    path.write_text('"""Two\nlines."""\n\n# why\nx = [\n    1]  # what\n\ndef f():\n    """One."""\n    return """a\nb"""\n')
    assert code_lines(path) == {5, 6, 8, 10, 11}
