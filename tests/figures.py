"""How heavy and how wide the seven files are: python tests/figures.py. test_readme.py holds them to the limits."""

import ast
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ["model.py", "adapters.py", "tokenizer.py", "data.py", "evaluate.py", "train.py", "toy.py"]
COLUMNS = 100
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENCODING, tokenize.ENDMARKER}


def code_lines(path: Path) -> set[int]:
    """The numbers of the lines that hold code: neither blank, nor comment, nor docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    lines = set()
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in NO_CODE:
                lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def taken(importer: str, imported: str) -> list[str]:
    """The names that one file imports from another."""
    tree = ast.parse((ROOT / importer).read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in froms if node.module == imported for alias in node.names]


def figures() -> dict[str, tuple[int, int, int]]:
    """Of each file: bytes, lines of code, and how many of these are wider than COLUMNS."""
    rows = {}
    for name in FILES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8").split("\n")
        code = code_lines(path)
        wide = [number for number in code if len(text[number - 1]) > COLUMNS]
        rows[name] = path.stat().st_size, len(code), len(wide)
    return rows


def main():
    rows = figures()
    rows["together"] = tuple(map(sum, zip(*rows.values())))
    print(f"{'':<14}{'KB':>8}{'lines of code':>16}{f'past {COLUMNS} columns':>20}")
    for name, (size, code, wide) in rows.items():
        print(f"{name:<14}{size / 1000:>8.1f}{code:>16,}{wide:>12} {100 * wide / code:>6.1f} %")
    names = taken("train.py", "evaluate")
    print(f"\ntrain.py takes {len(names)} names from evaluate.py: {', '.join(names)}")


if __name__ == "__main__":
    main()
