r"""Text to numbers and back, as the language model learned them.

`BPE` is the byte-level byte-pair encoding of GPT-2 and BART. The text is cut into words, each word into its UTF-8
bytes, and the bytes of a word are merged, two pieces at a time, in the order of merges.txt:

    " newest" -> Ġ n e w e s t -> Ġ n e w es t -> Ġn e w es t -> Ġn e w est -> Ġn ew est -> Ġnew est -> Ġnewest

`Unigram` is sentencepiece's unigram language model, as in T5. Each piece of spiece.model has a score, the logarithm of
its probability. Of all ways to cut a text into pieces, the one with the highest sum is taken. A space is written as ▁:

    "newest" -> ▁new est (-7.1 - 8.0 = -15.1), for ▁ newest (-2.0 - 13.6) and ▁ne west (-8.3 - 10.9) have less

`load_tokenizer` takes the one that a folder has the files of. The rest of the project uses `encode`, `pieces`,
`decode`, len() and the ids `start`, `pad`, `end` and `unknown`.
This file needs Python and nothing else; copy it as it is.
"""

import json
import re
import struct
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from itertools import count, groupby
from math import inf
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6            # the kinds of pieces in spiece.model
VARINT, BYTES, FLOAT = 0, 2, 5                                          # the wire types of protobuf
SETTINGS = {                                    # field of the model, field in it, wire type, default
    "model_type": (2, 3, VARINT, 1), "treat_whitespace_as_suffix": (2, 24, VARINT, 0),
    "byte_fallback": (2, 35, VARINT, 0), "unk_surface": (2, 44, BYTES, " ⁇ ".encode()),
    "precompiled_charsmap": (3, 2, BYTES, b""), "add_dummy_prefix": (3, 3, VARINT, 1),
    "remove_extra_whitespaces": (3, 4, VARINT, 1), "escape_whitespaces": (3, 5, VARINT, 1),
    "denormalizer_charsmap": (5, 2, BYTES, b"")}
FIXED = "model_type", "treat_whitespace_as_suffix", "escape_whitespaces", "denormalizer_charsmap"
LEAF, HAS_LEAF, LABEL = 1 << 31, 1 << 8, 1 << 31 | 0xff                 # bits of a double array's units
NO_RULES = struct.pack("<257I", 1024, 1 << 10, *[LEAF] * 255)           # a root without units that it leads to
LONGEST_RULE = 256                              # in bytes; for the units of a damaged file may lead in a circle
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


class Unigram:
    """The tokenizer of a folder with T5's spiece.model: its ids and texts are those of sentencepiece.

    Tokens of `added` get the ids after the vocabulary and become their id wherever a text spells them out; what lies
    between them is tokenized part by part. All else is text, even "</s>". Nothing comes before a text: `start` is None.
    """

    def __init__(self, folder: str | Path, added: Sequence[str] = ()):
        path = Path(folder) / "spiece.model"
        pieces, settings = read_model(path)
        self.ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
        bytes_needed = [f"<0x{byte:02X}>" for byte in range(256)] if settings["byte_fallback"] else []
        missing = [piece for piece in ("<pad>", "</s>", *bytes_needed) if piece not in self.ids]
        unknown = [i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN]
        scores = [score for _, score, kind in pieces if kind == NORMAL] or [0.0]
        for wrong, problem in (
                (missing or not unknown, f"no {missing[0] if missing else 'piece for unknown characters'}"),
                ("" in self.ids or len(self.ids) < len(pieces), "a piece that is empty or there twice"),
                (not all(abs(score) < 1e6 for score in scores), "a score that is not the logarithm of a probability")):
            if wrong:
                raise VocabularyError(f"{path} has {problem}")

        self.start, self.pad, self.end, self.unknown = None, self.ids["<pad>"], self.ids["</s>"], unknown[0]
        self.byte_ids = [self.ids[piece] for piece in bytes_needed]
        self.normalizer = Normalizer(path, settings, [piece for piece, _, kind in pieces if kind == USER_DEFINED])
        self.bytes = {i: bytes([byte]) for byte, i in enumerate(self.byte_ids)}
        self.unknown_score = array("f", [min(scores) - 10])[0]
        self.unknown_text = settings["unk_surface"].decode("utf-8", "replace")
        self.texts = {i: piece for i, (piece, _, kind) in enumerate(pieces) if kind not in (UNKNOWN, CONTROL, BYTE)}
        self.longest, self.trie = max(map(len, self.ids)), {}       # character -> trie after it; "" -> score, id
        for i, (piece, score, kind) in enumerate(pieces):
            if kind in (NORMAL, USER_DEFINED):
                node = self.trie
                for c in piece:
                    node = node.setdefault(c, {})
                node[""] = score if kind == NORMAL else array("f", [0.1 * (len(piece.encode()) - 1)])[0], i
        self.known = {c for c, node in self.trie.items() if "" in node}         # `cut` adds the unknown characters

        for token in added:
            self.texts.pop(self.ids.setdefault(token, len(self.ids)), None)
        longest_first = sorted(added, key=len, reverse=True)            # if two fit, the longer one
        self.added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """The pieces and </s>; of a text that is too long the last pieces are missing, never </s>."""
        ids = [*self.pieces(text), self.end]
        if max_length is not None and len(ids) > max_length:
            ids[max_length - 1:] = [self.end]
        return ids

    def pieces(self, text: str) -> list[int]:
        """The ids of a text without </s> after them."""
        ids = []
        for i, part in enumerate(self.added_pattern.split(text)):       # odd places: added tokens
            ids += [self.ids[part]] if i % 2 else self.cut(self.normalizer(part))
        return ids

    def cut(self, text: str) -> list[int]:
        """The ids of the best way to cut a normalized text (Viterbi); of equally good ways, the first found.

        Rounding decides which are equal, so the sums have 32 bits as in sentencepiece. They run through the whole text:
        a word that is cut by itself, to be remembered, would have others.
        """
        for c in {*text} - self.known:
            self.trie.setdefault(c, {})[""] = self.unknown_score, self.unknown
            self.known.add(c)
        sums, best = array("f", [0, *[-inf] * len(text)]), [None] * (len(text) + 1)     # of the ways to each place
        for start in range(len(text)):
            node, before = self.trie, sums[start]
            for end, c in enumerate(text[start:start + self.longest], start + 1):
                node = node.get(c)
                if node is None:
                    break
                if "" in node:
                    (score, i), highest = node[""], sums[end]
                    if before + score > highest:
                        sums[end] = before + score
                        if sums[end] > highest:                         # also when rounded
                            best[end] = start, i
        ids, end = [], len(text)
        while end:
            start, i = best[end]
            if i == self.unknown and self.byte_ids:
                ids += [self.byte_ids[byte] for byte in reversed(text[start:end].encode())]
            elif i != self.unknown or ids[-1:] != [i]:                  # a run of unknown characters is one <unk>
                ids.append(i)
            end = start
        return ids[::-1]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Control and added tokens have none; a byte that is not UTF-8 becomes U+FFFD."""
        text, strip = "", self.normalizer.prefix or self.normalizer.squeeze
        for is_byte, run in groupby(map(int, ids), self.bytes.__contains__):
            if is_byte:
                part = b"".join(map(self.bytes.get, run)).decode("utf-8", "surrogateescape")
                text += re.sub("[\udc80-\udcff]", "\ufffd", part)
                continue
            for i in run:
                piece = self.texts.get(i, "")
                if strip and not text and piece.startswith("▁"):
                    piece, strip = piece[1:], self.normalizer.squeeze
                text += self.unknown_text if i == self.unknown else piece.replace("▁", " ")
        return text


class Normalizer:
    """What sentencepiece does to a text before it is cut: rules of the model replace characters, a space is put in
    front, runs of spaces become one, and every space is written as ▁.

    The rules are a trie over UTF-8 bytes, stored as a double array (darts-clone): unit `i` leads to the units at
    `bases[i] ^ byte` whose label is that byte. A leaf points into the replacements. The longest rule applies. The
    pieces of `verbatim` come before all rules and stay as they are.
    """

    def __init__(self, path: Path, settings: dict, verbatim: Sequence[str]):
        self.prefix, self.squeeze = settings["add_dummy_prefix"], settings["remove_extra_whitespaces"]
        rules = settings["precompiled_charsmap"] or NO_RULES
        size = int.from_bytes(rules[:4], "little")
        if size % 1024 or not 0 < size <= len(rules) - 4:               # a look-up stays within a block of 256 units
            raise VocabularyError(f"{path} has truncated normalization rules")
        self.units, self.replacements = struct.unpack(f"<{size // 4}I", rules[4:4 + size]), rules[4 + size:] + b"\0"
        self.bases = [i ^ (unit >> 10) << (unit >> 6 & 8) for i, unit in enumerate(self.units)]
        for i, (unit, base) in enumerate(zip(self.units, self.bases)):
            if (i == 0 or unit < LEAF) and (base >= len(self.units) or unit & HAS_LEAF and
                                            self.units[base] % LEAF >= len(self.replacements)):
                raise VocabularyError(f"{path} has normalization rules that point outside of their table")
        plain = bytes(filter(self.is_plain, range(33, 127)))            # most of a text: copied by the run
        longest_first = sorted(map(str.encode, verbatim), key=len, reverse=True)
        self.copied = re.compile(b"|".join(map(re.escape, longest_first)) or
                                 (b"[%b]+(?![\x80-\xff])" % re.escape(plain) if plain else b"(?!)"))

    def is_plain(self, byte: int) -> bool:
        """Whether no rule is this ASCII character, or begins with it and another one."""
        node = self.bases[0] ^ byte
        return self.units[node] & LABEL != byte or not self.units[node] & HAS_LEAF and all(
            self.units[self.bases[node] ^ second] & LABEL != second for second in range(128))

    def __call__(self, text: str) -> str:
        """The normalized text. Half a surrogate pair, which no UTF-8 can hold, becomes "?"."""
        data, out, i = text.encode("utf-8", "replace"), bytearray(), 0
        while i < len(data):
            match = self.copied.match(data, i)
            chunk, i = (match[0], match.end()) if match else self.replace(data, i)
            if self.squeeze and (not out or out.endswith(b" ")):
                chunk = chunk.lstrip(b" ")
            out += chunk
        text = ("▁" if self.prefix and text else "") + out.decode("utf-8", "replace").replace(" ", "▁")
        return text.rstrip("▁") if self.squeeze else text

    def replace(self, data: bytes, start: int) -> tuple[bytes, int]:
        """What stands for the bytes from `start` on, and where they end. Without a rule it is the next byte itself."""
        base, chunk, end = self.bases[0], data[start:start + 1], start + 1
        for i in range(start, min(start + LONGEST_RULE, len(data))):
            node = base ^ data[i]
            if self.units[node] & LABEL != data[i]:
                break
            base = self.bases[node]
            if self.units[node] & HAS_LEAF:
                leaf = self.units[base] % LEAF
                chunk, end = self.replacements[leaf:self.replacements.index(0, leaf)], i + 1
        return chunk, end


Tokenizer = BPE | Unigram


def load_tokenizer(folder: str | Path, added: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a folder: Unigram if it has spiece.model, else BPE."""
    return (Unigram if (Path(folder) / "spiece.model").exists() else BPE)(folder, added)


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


def read_model(path: Path) -> tuple[list[tuple[str, float, int]], dict]:
    """The pieces of spiece.model with their scores and kinds, and the SETTINGS."""
    try:
        model = read_message(path.read_bytes())
        pieces = [(piece[1, BYTES][-1].decode(), struct.unpack("<f", piece.get((2, FLOAT), [bytes(4)])[-1])[0],
                   piece.get((3, VARINT), [NORMAL])[-1]) for piece in map(read_message, model[1, BYTES])]
        specs = {2: read_message(model[2, BYTES][-1]), 3: read_message(model[3, BYTES][-1]),
                 5: read_message(model.get((5, BYTES), [b""])[-1])}
    except FileNotFoundError:
        raise VocabularyError(f"{path} is missing") from None
    except (ValueError, LookupError):
        raise VocabularyError(f"{path} is truncated or not a sentencepiece model") from None
    settings = {name: specs[spec].get((number, wire), [default])[-1]
                for name, (spec, number, wire, default) in SETTINGS.items()}
    for name in FIXED:
        if settings[name] != SETTINGS[name][-1]:
            raise VocabularyError(f"{path} is no unigram model of T5's kind: its {name} should be {SETTINGS[name][-1]}")
    return pieces, settings


def read_message(message: bytes) -> dict[tuple[int, int], list]:
    """The values of a protobuf message by field number and wire type: numbers for VARINT, else bytes."""
    fields, i = {}, 0
    while i < len(message):
        key, i = read_varint(message, i)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, i = read_varint(message, i)
        else:
            size, i = read_varint(message, i) if wire == BYTES else ({1: 8, FLOAT: 4}[wire], i)
            value, i = message[i:i + size], i + size
        fields.setdefault((number, wire), []).append(value)
    if i > len(message):
        raise ValueError("the last field is cut off")
    return fields


def read_varint(message: bytes, i: int) -> tuple[int, int]:
    """The number at place `i`, seven bits a byte, the lowest first, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (message[i] & 127) << shift
        i += 1
        if message[i - 1] < 128:
            return value, i
    raise ValueError("a number of more than ten bytes")
