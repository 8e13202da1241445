r"""Text to numbers and back, as the language model learned them.

`BPE` is the byte-level byte-pair encoding of GPT-2 and BART. The text is cut into words, each word into its UTF-8
bytes, and the bytes of a word are merged, two pieces at a time, in the order of merges.txt:

    " newest" -> Ġ n e w e s t -> Ġ n e w es t -> Ġn e w es t -> Ġn e w est -> Ġn ew est -> Ġnew est -> Ġnewest

The rest of the project uses `encode`, `pieces`, `decode`, len() and the ids `start`, `pad`, `end` and `unknown`.
This file needs Python and nothing else; copy it as it is.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import count, groupby
from math import inf
from pathlib import Path

NEEDED = "<s>", "<pad>", "</s>", "<unk>"
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"    # re's own \s has \x1c-\x1f besides


class VocabularyError(ValueError):
    """A vocabulary file cannot be used; the message names the file and what was expected."""


class BPE:
    """The tokenizer of a folder with BART's vocab.json {piece: id} and merges.txt.

    The special tokens, and those of `added`, which get the ids after the vocabulary, become their id wherever a text
    spells them out. <mask> swallows the spaces on its left, as it does in transformers.
    """

    def __init__(self, folder: str | Path, added: Sequence[str] = ()):
        self.symbols = byte_symbols()
        self.ids = read_vocabulary(Path(folder) / "vocab.json", self.symbols)
        self.ranks = read_merges(Path(folder) / "merges.txt", self.ids)
        self.start, self.pad, self.end, self.unknown = (self.ids[token] for token in NEEDED)
        for token in added:
            self.ids.setdefault(token, len(self.ids))
        special = {*NEEDED, "<mask>", *added} & self.ids.keys()
        self.cache = {token: [self.ids[token]] for token in special}    # word -> ids; it grows with every new word

        byte_of = {ord(symbol): byte for byte, symbol in enumerate(self.symbols)}
        self.bytes = {i: piece.translate(byte_of).encode("latin-1")
                      for piece, i in self.ids.items() if piece not in special}
        longest_first = sorted(special, key=len, reverse=True)          # if two fit, the longer one
        self.special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.word_pattern = word_pattern()

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """<s>, the pieces and </s>; of a text that is too long the last pieces are missing, never </s>."""
        ids = [self.start, *self.pieces(text), self.end]
        if max_length is not None and len(ids) > max_length:
            ids[max_length - 1:] = [self.end]
        return ids

    def pieces(self, text: str) -> list[int]:
        """The ids of a text without <s> and </s> around them."""
        if "<mask>" in text and "<mask>" in self.cache:
            text = re.sub(r"\s+<mask>", "<mask>", text)
        ids = []
        for i, part in enumerate(self.special_pattern.split(text)):     # odd places: special tokens, all in the cache
            for word in [part] if i % 2 else self.word_pattern.findall(part):
                ids += self.cache.get(word) or self.merge(word)
        return ids

    def merge(self, word: str) -> list[int]:
        """The ids of one word, kept in the cache. Half a surrogate pair, which no UTF-8 can hold, becomes "?"."""
        pieces = [self.symbols[byte] for byte in word.encode("utf-8", "replace")]
        while len(pieces) > 1:
            pair = min(zip(pieces, pieces[1:]), key=lambda pair: self.ranks.get(pair, inf))
            if pair not in self.ranks:
                break
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == pair:
                    pieces[i:i + 2] = ["".join(pair)]
                i += 1
        self.cache[word] = [self.ids.get(piece, self.unknown) for piece in pieces]
        return self.cache[word]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special and added tokens have none; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")


def byte_symbols() -> list[str]:
    """The visible character that stands for each byte in GPT-2's files: Latin-1 where it shows, else from 256 on."""
    shown, others = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}, count(256)
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def word_pattern() -> re.Pattern:
    r"""GPT-2's pattern of a word, 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+, for `re`.

    `re` has no \p{L} and \p{N}, and its \w and \d are other sets: the classes are spelled out in ranges.
    """
    ranges = {"L": "", "N": ""}
    for kind, codes in groupby(range(0x40000), lambda code: unicodedata.category(chr(code))[0]):    # none lies above
        if kind in ranges:
            codes = list(codes)
            ranges[kind] += f"{chr(codes[0])}-{chr(codes[-1])}"
    letter, number = ranges["L"], ranges["N"]
    return re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letter}]+| ?[{number}]+| ?[^{SPACE}{letter}{number}]+|"
                      f"[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise VocabularyError(f"{path} is missing") from None
    except UnicodeDecodeError:
        raise VocabularyError(f"{path} is not UTF-8 text") from None


def read_vocabulary(path: Path, symbols: list[str]) -> dict[str, int]:
    """The pieces of vocab.json, written in `symbols`, and their ids."""
    try:
        vocabulary = json.loads(read_text(path))
    except json.JSONDecodeError as problem:
        raise VocabularyError(f"{path} is truncated or not JSON: {problem}") from None
    if not isinstance(vocabulary, dict) or {*map(repr, vocabulary.values())} != {*map(repr, range(len(vocabulary)))}:
        raise VocabularyError(f"{path} should be one JSON object that numbers its pieces from 0 on without a gap")
    missing = [token for token in NEEDED if token not in vocabulary]
    if missing:
        raise VocabularyError(f"{path} has no {' '.join(missing)}")
    strange = set("".join(vocabulary)).difference(symbols)
    if strange:
        raise VocabularyError(f"{path} has {min(strange)!r}, which stands for no byte")
    return vocabulary


def read_merges(path: Path, vocabulary: dict[str, int]) -> dict[tuple[str, str], int]:
    """The pairs of merges.txt and their ranks: the lowest is merged first. A first line `#version` is none."""
    pairs = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line or number == 1 and line.startswith("#version"):
            continue
        pair = tuple(line.split())
        if len(pair) != 2:
            raise VocabularyError(f"{path}, line {number}: expected two pieces, found {line!r}")
        if "".join(pair) not in vocabulary:
            raise VocabularyError(f"{path}, line {number}: {''.join(pair)!r} is not in vocab.json")
        pairs[pair] = number
    return pairs
