r"""Text to numbers and back, as the language model learned them; texts as metrics see them.

`BPE` is the byte-level byte-pair encoding of GPT-2 and BART (Sennrich et al. 2016): a word's UTF-8
bytes are merged, two pieces at a time, in the order of merges.txt:

    " newest" -> Ġ n e w e s t -> Ġ n e w es t -> Ġn e w es t -> ... -> Ġnewest

`Unigram` is the unigram language model of sentencepiece and T5 (Kudo 2018, section 3.2): the cut
with the highest sum of the pieces' scores, their log-probabilities. A space is ▁:

    "newest" -> ▁new est (-7.1 - 8.0 = -15.1), for ▁ newest (-2.0 - 13.6 = -15.6) has less

The ids are those of transformers' BartTokenizer and of sentencepiece. Needs Python alone.
original: FILE#L is https://github.com/ylsung/VL_adapter/blob/545fcbb/VL-T5/src/FILE#L
"""

import hashlib
import json
import re
import struct
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from itertools import count, groupby
from math import inf
from pathlib import Path


class VocabularyError(ValueError):
    """A vocabulary file cannot be used."""


def load_tokenizer(folder: str | Path, added: Sequence[str] = ()) -> "Tokenizer":
    """Unigram if the folder has spiece.model, else BPE. Raises VocabularyError.

    `added` tokens get ids behind the vocabulary's, unless they are in it.
    """
    family = Unigram if (Path(folder) / "spiece.model").exists() else BPE
    tokenizer = family(folder, added)
    content = repr([*added]).encode()
    for name in "spiece.model", "vocab.json", "merges.txt", "tokenizer.json":
        if (path := Path(folder) / name).exists():
            content += read_file(path)
    tokenizer.hash = hashlib.sha256(content).hexdigest()
    return tokenizer


class Tokenizer:
    """What BPE and Unigram share; they add cut(text) and decode(ids).

    ids: {piece or token: id}. bos and eos stand around a text (T5's bos is None), pad fills a
    batch, unk is what has no piece. `special` finds tokens that a text spells out.
    hash: sha256 of the files and `added`, "" where they are not known.
    """

    hash = ""

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """bos, pieces, eos; a text that is too long loses pieces, never eos."""
        ids = [] if self.bos is None else [self.bos]
        ids += self.pieces(text)
        ids.append(self.eos)
        if max_length is not None and len(ids) > max_length:
            ids[max_length - 1:] = [self.eos]
        return ids

    def pieces(self, text: str) -> list[int]:
        """The ids without bos and eos."""
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:  # every other part is a token
                ids.append(self.ids[part])
            else:
                ids += self.cut(part)
        return ids


def spelled_out(tokens: Iterable[str]) -> re.Pattern:
    """Splits a text at the tokens and keeps them; if two fit, the longer one."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


# ---- byte-pair encoding: BART ----

NEEDED = "<s>", "<pad>", "</s>", "<unk>"
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s has \x1c-\x1f too


class BPE(Tokenizer):
    """BART's, of vocab.json {piece: id} and merges.txt, or of transformers 5's tokenizer.json.

    <mask> swallows the spaces on its left.
    """

    def __init__(self, folder: str | Path, added: Sequence[str] = ()):
        self.symbols = byte_symbols()
        self.ids, self.ranks = read_bpe(Path(folder), self.symbols)
        self.bos, self.pad, self.eos, self.unk = (self.ids[token] for token in NEEDED)
        for token in added:
            self.ids.setdefault(token, len(self.ids))
        special = {*NEEDED, "<mask>", *added} & self.ids.keys()
        self.special = spelled_out(special)
        self.word = word_pattern()
        self.cache = {}  # word -> ids

        byte_of = {ord(symbol): byte for byte, symbol in enumerate(self.symbols)}
        self.bytes = {i: piece.translate(byte_of).encode("latin-1")  # what an id stands for
                      for piece, i in self.ids.items() if piece not in special}

    def pieces(self, text: str) -> list[int]:
        if "<mask>" in text and "<mask>" in self.ids:
            text = re.sub(r"\s+<mask>", "<mask>", text)
        return super().pieces(text)

    def cut(self, text: str) -> list[int]:
        ids = []
        for word in self.word.findall(text):
            ids += self.cache.get(word) or self.merge(word)
        return ids

    def merge(self, word: str) -> list[int]:
        """The ids of a word, cached. Half a surrogate pair becomes "?"."""
        symbols = [self.symbols[byte] for byte in word.encode("utf-8", "replace")]
        pieces = merge_pairs(symbols, self.ranks)
        self.cache[word] = [self.ids.get(piece, self.unk) for piece in pieces]
        return self.cache[word]

    def decode(self, ids: Iterable[int]) -> str:
        """Without special and added tokens. What is no UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")


def merge_pairs(pieces: Iterable[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merges neighbours again and again: those of the lowest rank, wherever they stand.

    >>> merge_pairs("newest", {("e", "s"): 1, ("n", "e"): 2, ("es", "t"): 3})
    ['ne', 'w', 'est']
    """
    pieces = list(pieces)
    while len(pieces) > 1:
        pair = min(zip(pieces, pieces[1:]), key=lambda pair: ranks.get(pair, inf))
        if pair not in ranks:
            break
        i = 0
        while i + 1 < len(pieces):
            if (pieces[i], pieces[i + 1]) == pair:
                pieces[i:i + 2] = ["".join(pair)]
            i += 1
    return pieces


def byte_symbols() -> list[str]:
    """GPT-2's visible character for each byte: its own in Latin-1, if visible, else from U+0100."""
    shown = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
    others = count(256)
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def word_pattern() -> re.Pattern:
    r"""GPT-2's pattern of a word, for `re`:

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    `re` has no \p{L} and \p{N}; its \s and \w are other sets. So they are written as ranges.
    """
    ranges = {"L": "", "N": ""}
    end = 0x40000  # no letter or number from here on
    for kind, codes in groupby(range(end), lambda i: unicodedata.category(chr(i))[0]):
        if kind in ranges:
            codes = list(codes)
            ranges[kind] += f"{chr(codes[0])}-{chr(codes[-1])}"
    letter, number = ranges.values()
    return re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letter}]+| ?[{number}]+| ?[^{SPACE}{letter}"
                      f"{number}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")


# ---- unigram language model: T5 ----


class Unigram(Tokenizer):
    """T5's, of spiece.model. Of special tokens only `added` are found; "</s>" is text."""

    def __init__(self, folder: str | Path, added: Sequence[str] = ()):
        path = Path(folder) / "spiece.model"
        pieces, settings = read_model(path)
        self.ids = {text: i for i, (text, score, kind) in enumerate(pieces)}
        self.bos = None
        self.pad = self.ids["<pad>"]
        self.eos = self.ids["</s>"]
        self.unk = [kind for text, score, kind in pieces].index(UNKNOWN)
        self.unknown_text = settings["unk_surface"].decode("utf-8", "replace")
        self.normalizer = Normalizer(settings, path)

        scored = {}
        self.texts = {}  # id -> what it stands for
        for i, (text, score, kind) in enumerate(pieces):
            if kind == NORMAL:
                scored[text] = score, i
            if kind in (NORMAL, UNUSED):
                self.texts[i] = text
        self.trie = make_trie(scored)
        self.known = self.trie.keys() & scored.keys()  # characters that are pieces

        # Of an unknown character: 10 below the worst piece.
        lowest = min((score for score, _ in scored.values()), default=0.0)
        self.unknown_score = array("f", [lowest - 10])[0]
        highest = max((score for score, _ in scored.values()), default=0.0)
        self.by_word = highest <= 0 and not any("▁" in text[1:] for text in scored)
        self.cache = {}  # word -> see cut_word
        for token in added:
            i = self.ids.setdefault(token, len(self.ids))
            self.texts.pop(i, None)
        self.special = spelled_out(added)

    def cut(self, text: str) -> list[int]:
        """The ids; unknown characters in a row are one <unk>."""
        text = self.normalizer(text)
        for c in {*text} - self.known:  # becomes a piece with <unk>'s id
            self.trie.setdefault(c, {})[""] = self.unknown_score, self.unk
            self.known.add(c)
        ids = self.cut_words(text) if self.by_word else None
        if ids is None:
            ids = best_cut(text, self.trie)
        return [i for before, i in zip([None, *ids], ids) if not before == i == self.unk]

    def cut_words(self, text: str) -> list[int] | None:
        """What best_cut gives, from the cuts of known words; None where rounding may decide."""
        ids = []
        before = 0.0
        for word in re.findall("▁?[^▁]+|▁", text):  # no piece goes on behind a ▁
            if word not in self.cache:
                self.cache[word] = cut_word(word, self.trie, -self.unknown_score)
            word_ids, weight, limit = self.cache[word]
            if before > limit:
                return None
            ids += word_ids
            before += weight
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """As BPE's, without spaces in front."""
        text = ""
        strip = self.normalizer.prefix or self.normalizer.squeeze
        for i in map(int, ids):
            piece = self.texts.get(i, "")
            if strip and not text and piece.startswith("▁"):
                piece = piece[1:]
                strip = self.normalizer.squeeze  # else only one space goes
            text += self.unknown_text if i == self.unk else piece.replace("▁", " ")
        return text


def make_trie(scored: dict[str, tuple[float, int]]) -> dict:
    """A tree of characters; where a piece ends, "" has its score and id."""
    trie = {}
    for text, score_and_id in scored.items():
        node = trie
        for c in text:
            node = node.setdefault(c, {})
        node[""] = score_and_id
    return trie


def best_cut(text: str, trie: dict) -> list[int]:
    """The ids of the pieces with the highest sum of scores (Viterbi); of equals, the first found.

    Rounding decides which are equal: as in sentencepiece, sums have 32 bits and run through the
    whole text, not word by word.

    >>> pieces = {"▁new": (-7.1, 3), "est": (-8.0, 4), "▁": (-2.0, 5), "newest": (-13.6, 6)}
    >>> best_cut("▁newest", make_trie(pieces))  # sums[4] = -7.1, sums[7] = -15.1
    [3, 4]
    """
    sums = array("f", [0, *[-inf] * len(text)])  # [end]: the best of text[:end]
    last = [(0, 0)] * (len(text) + 1)  # [end]: start and id of its last piece
    for start in range(len(text)):
        node = trie
        before = sums[start]
        for end in range(start + 1, len(text) + 1):
            node = node.get(text[end - 1])
            if node is None:
                break
            if "" in node:
                score, i = node[""]
                highest = sums[end]
                if before + score > highest:
                    sums[end] = before + score
                    if sums[end] > highest:  # also when rounded
                        last[end] = start, i
    ids = []
    end = len(text)
    while end:
        end, i = last[end]
        ids.append(i)
    return ids[::-1]


def cut_word(word: str, trie: dict, worst: float) -> tuple[list[int], float, float]:
    """The ids of a word's best cut, its sum, and behind which sum best_cut finds the same; signs
    are left out.

    best_cut's sum is at least any cut's own rounded sum, for rounding keeps order. It rounds n
    times, each time by 2^-24 (before + n worst) at most. So the best cut wins if it is ahead of
    the second by 2 n 2^-24 (before + n worst); here it is to be by twice that.
    """
    if len(word) > 50:
        return [], 0.0, -1.0
    cuts = [[(0.0, [])], *([] for _ in word)]  # [end]: the two best of word[:end]
    for start in range(len(word)):
        node = trie
        for end in range(start + 1, len(word) + 1):
            node = node.get(word[end - 1])
            if node is None:
                break
            if "" in node:
                score, i = node[""]
                longer = [(total + score, [*ids, i]) for total, ids in cuts[start]]
                cuts[end] = sorted(cuts[end] + longer, reverse=True)[:2]
    (best, ids), *others = cuts[-1]
    ahead = best - others[0][0] if others else inf
    return ids, -best, ahead * 2 ** 22 / len(word) - len(word) * worst


LEAF, HAS_LEAF, LABEL = 1 << 31, 1 << 8, 1 << 31 | 0xff  # bits of a unit
LONGEST_RULE = 256  # bytes; a damaged file may lead in a circle


class Normalizer:
    """What sentencepiece does to a text before it is cut.

    Rules replace characters, a space is put in front (`prefix`), of spaces in a row one stays and
    none at the ends (`squeeze`), and a space is written as ▁.

    The rules are a number, a trie over UTF-8 bytes of that size, and the replacements, each with a
    zero byte behind. The trie is a double array (darts-clone): from unit `i` a byte leads to unit
    `bases[i] ^ byte`, say 98 ^ 97 = 3 for "a", if that has the byte as its label. Where a rule
    ends, the unit has a leaf, at its base: where the replacement begins.
    """

    def __init__(self, settings: dict, path: Path):
        self.prefix = settings["add_dummy_prefix"]
        self.squeeze = settings["remove_extra_whitespaces"]
        # No rules: a root whose 255 neighbours fit no byte.
        no_rules = struct.pack("<257I", 1024, 1 << 10, *[LEAF] * 255)
        rules = settings["precompiled_charsmap"] or no_rules
        size = int.from_bytes(rules[:4], "little")
        if size % 1024 or not 0 < size <= len(rules) - 4:  # base ^ byte stays in its 256
            raise VocabularyError(f"{path} has truncated normalization rules")
        self.units = struct.unpack(f"<{size // 4}I", rules[4:4 + size])
        # darts-clone: 22 bits, times 256 if bit 9 is set.
        self.bases = [i ^ (unit >> 10 << (unit >> 6 & 8)) for i, unit in enumerate(self.units)]
        self.replacements = rules[4 + size:] + b"\0"
        for i, (unit, base) in enumerate(zip(self.units, self.bases)):
            if i and unit >= LEAF:  # unit 0 is the root
                continue
            inside = base < size // 4
            if inside and unit & HAS_LEAF:
                leaf = self.units[base] % LEAF
                inside = self.replacements.find(0, leaf, leaf + LONGEST_RULE) >= 0
            if not inside:
                raise VocabularyError(f"{path}: normalization rules point outside of their table")

        # For speed what no rule knows is copied; a non-ASCII mark behind may join.
        plain = bytes(filter(self.is_plain, range(33, 127)))
        run = b"[%b]+(?![\x80-\xff])" % re.escape(plain) if plain else b"(?!)"
        self.plain_run = re.compile(run)

    def is_plain(self, byte: int) -> bool:
        """Whether no rule is this ASCII character, or begins with it and another ASCII one."""
        node = self.bases[0] ^ byte
        if self.units[node] & LABEL != byte:
            return True
        base = self.bases[node]
        longer = any(self.units[base ^ second] & LABEL == second for second in range(128))
        return not longer and not self.units[node] & HAS_LEAF

    def __call__(self, text: str) -> str:
        """Half a surrogate pair becomes "?"."""
        data = text.encode("utf-8", "replace")
        out = bytearray()
        i = 0
        while i < len(data):
            if run := self.plain_run.match(data, i):
                chunk = run[0]
                i = run.end()
            else:
                chunk, i = self.replace(data, i)
            if self.squeeze and (not out or out.endswith(b" ")):
                chunk = chunk.lstrip(b" ")
            out += chunk
        normal = out.decode("utf-8", "replace").replace(" ", "▁")
        if self.prefix and text:
            normal = "▁" + normal
        return normal.rstrip("▁") if self.squeeze else normal

    def replace(self, data: bytes, start: int) -> tuple[bytes, int]:
        """The longest rule's replacement, or the next byte; where what it replaces ends."""
        base = self.bases[0]
        chunk = data[start:start + 1]
        end = start + 1
        for i in range(start, min(start + LONGEST_RULE, len(data))):
            node = base ^ data[i]
            if self.units[node] & LABEL != data[i]:
                break
            base = self.bases[node]
            if self.units[node] & HAS_LEAF:
                leaf = self.units[base] % LEAF
                chunk = self.replacements[leaf:self.replacements.index(0, leaf)]
                end = i + 1
        return chunk, end


# ---- normal forms of the official evaluations ----

# VQAv2: vqaEval.py of GT-Vision-Lab/VQA, original: vqa_clip_data.py#L495

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_WORDS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(DIGIT_WORDS)}
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've"""
CONTRACTIONS = {word[:i] + word[i + 1:]: word  # one apostrophe is missing
                for word in CONTRACTED.split() for i, mark in enumerate(word) if mark == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # sic


def vqa_normal_form(answer: str) -> str:
    """An answer as the official evaluation compares it.

    >>> vqa_normal_form("The two dogs; theyre 1,000 m. away")
    "2 dogs they're 1000 m away"
    """
    line = answer.replace("\n", " ").replace("\t", " ").strip()
    return vqa_digits_and_articles(vqa_punctuation(line))


def vqa_punctuation(text: str) -> str:
    """original: vqa_clip_data.py#L661

    A mark that stands beside a space anywhere, or any in a text with a number like 1,000, goes
    everywhere; others become a space. A period goes unless a digit follows.
    """
    result = text
    number = re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if number or beside_space else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)  # sic: re.UNICODE, 32, lands in count


def vqa_digits_and_articles(text: str) -> str:
    """Digits, no articles, apostrophes put back. original: vqa_clip_data.py#L673"""
    words = []
    for word in text.lower().split():
        word = DIGITS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


# Captions: Stanford's PTBTokenizer (CoreNLP 3.4.1) as coco-caption runs it,
# original: caption_clip_data.py#L394

ABBREVIATIONS = """a.k.a adj adm adv al ala alex apr ariz assn assoc asst attys? aug ave bancorp bhd
    bldg blvd brig bros calif capt cf cie cmdr cos? col colo comdr conn corp cpl ct dak dec dept det
    drs? ed.d elec ens esq est etc ext feb fla fri ft ga gen govs? hon inc ind insp intl invt jan
    jos jr jul jun kans? ky lieut lt ltd maj mar md messrs mich minn mlle mme mo mon mont mr mrs ms
    msgr mt natl neb nev nov oct okla penn pfc ph ph.d plc pres profs? pvt rd reps? rev rt sens?
    sept? seq sfc sgt spc sq sr ste? supts? sys tel tenn thu thurs treas tues? univ va vs vt wed
    wisc? wm wyo"""
# \w has ¹ and ½, Java's letters do not.
LETTER = r"[^\W\d_¹²³¼½¾⅓⅔]"
ALNUM = r"[^\W_¹²³¼½¾⅓⅔]"
QUOTE = "['’]"
CLITIC = rf"(?i:'(?:[dms]|ll|re|ve)(?!{LETTER}))"
NUMBER = r"(?:\d+(?:[.:,]\d+)+|(?:[.,]\d+)+)"  # with points or commas inside
JOINABLE = r"[A-Za-z\d]+(?:-[A-Za-z]+){0,2}"
LINK_END = r"[^\s\"<>|.!?(){},-]"
PTB_WORD = re.compile("|".join((  # the first that fits; what none fits is dropped
    # The first half of can not, gon na
    rf"(?=(?i:cannot|gonna|gotta|gimme|lemme|wanna)(?![-/]?{ALNUM}|{CLITIC}))...",
    r"[a-z]+(?!\S)",  # for speed
    r"</?[A-Za-z][\w:.-]*/?>",  # <unk>
    rf"(?i:https?)://[^\s\"<>|(){{}}]+{LINK_END}",  # http://a.com
    rf"(?:www\.[\w.-]*|[a-z]+(?:\.[a-z]+)*\.)(?:com|net|org|edu)/[^\s\"<>|()]+{LINK_END}",
    r"[\w.%+-]+@[A-Za-z\d][A-Za-z\d.-]*[A-Za-z\d]",  # a@b.com
    rf"@[A-Za-z_]\w*|#{LETTER}\w*",  # #tag
    r"(?:\(\d{2,3}\) ?|(?:\d{2,4}[- ])?\d{2,4}[- ])\d{3,4}[- ]?\d{3,5}",  # (555) 123-4567
    r"\d{1,4}[- ]\d{1,4}/\d{1,4}",  # 5 1/2
    rf"{JOINABLE}(?:/{JOINABLE}){{1,2}}",  # he/she
    # U.S.-led
    rf"{ALNUM}(?:{ALNUM}|[.,])*(?:-(?:(?:[A-Za-z]\.){{2,}}|{ALNUM}+(?:\.\d+)?))+",
    rf"{CLITIC}|(?i:n['’`]t(?!{LETTER}))",  # 's, n't
    r"[A-Za-z]*[A-MO-Za-mo-z](?=(?i:n['’`]t))",  # before n't
    rf"{LETTER}{ALNUM}*(?={CLITIC})",  # before 's
    rf"(?i:'t(?=is|was)|y['’](?={LETTER}))",  # y' all
    # 'em
    rf"{QUOTE}(?i:n(?:{QUOTE}|(?!{LETTER}))|em|till?|cause|[2-9]0s|\d\d(?!\S))",
    rf"[dDoOlL]{QUOTE}{ALNUM}+|[A-HJ-XZn]{QUOTE}{LETTER}{{2,}}",  # K'Nex
    rf"{LETTER}+[aeiouyAEIOUY]{QUOTE}[aeiouA-Z]{LETTER}*",  # ma'am
    r"(?i:c'mon|dunkin'|li'l|ol'|s'mores)",
    rf"(?i:(?:[a-z]\.)+|(?:{'|'.join(ABBREVIATIONS.split())})\.)(?!{LETTER})",  # Dr.
    # "Miss." but "I miss."
    r"(?=[A-Z])(?i:ark|az|del|ill|la|mass|miss|ore|pa|tex|wash)\.(?![^\W\d_])",
    r"(?i:art|ca|figs?|nos?|op|pp|prop)\.(?=\s?\d)",  # No. 5
    r"(?i:c\+\+|[cf]#)|[A-Z]+(?:[+&][A-Z]+)+",  # AT&T
    rf"{ALNUM}+(?:[-_](?:{NUMBER}|{ALNUM}+))+",  # snow_board
    rf"{LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)*(?:\.(?=[,;:]))?",  # cup.Then
    # 5:30
    rf"(?:(?<!-)[-+](?:{NUMBER}|\d+)|{NUMBER}|{ALNUM}+)(?:[-_](?:{NUMBER}|{ALNUM}+))*",
    rf"[<>]?[:;=][-o*']?[()DPdpO\\{{@|[\]](?!{ALNUM})|[-^=~]_[-^=~]",  # :-)
    r"[?!]{2,}|-{5,}|<<|>>|@+|#+|_+|\*+|[A-Z]*\$",
    r"[()[\]{}%&+/<=>\\^|~¡-©¬®-¸¼-¿×÷†-•‰-‸€™⅓⅔←-⯿]")))
PTB_NAMES = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "¢": "cents", "£": "#",
             "€": "$", "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}


def ptb_words(text: str) -> str:
    """A caption's words as the official evaluation counts them, joined by spaces.

    Punctuation is left out, brackets stay; 5 1/2 gets a no-break space.

    >>> ptb_words("A U.S. team's coach (in red) can't play, cannot run.")
    "a u.s. team 's coach -lrb- in red -rrb- ca n't play can not run"
    """
    text = text.replace("&amp;", "&")
    text = re.sub(rf"’(?=(?:[dmst]|ll|re|ve)(?!{LETTER}))", "'", text, flags=re.IGNORECASE)
    words = (PTB_NAMES.get(word, word.replace(" ", "\xa0")) for word in PTB_WORD.findall(text))
    # ( and ) here, for smileys have them, too.
    return " ".join(words).replace("(", "-lrb-").replace(")", "-rrb-").lower()


# ---- vocabulary files ----


LARGEST = 1 << 24  # bytes of a file; the largest have a fourth


@contextmanager
def reading(path: Path, kind: str):
    """Turns errors of reading into a VocabularyError."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise VocabularyError(f"{path} is truncated or not {kind}") from None


def read_file(path: Path) -> bytes:
    """A regular file's bytes. Raises VocabularyError."""
    said = ""
    if not path.is_file():
        said = "is not a regular file" if path.exists() else "is missing"
    elif path.stat().st_size > LARGEST:
        said = f"has more than {LARGEST:,} bytes"
    else:
        content = path.read_bytes()
        head = content[:99].lstrip().lower()
        if head.startswith(b"version https://git-lfs"):
            said = "is a Git LFS pointer, not the file itself"
        if head.startswith((b"<!doctype", b"<html", b"<?xml")):
            said = "is a web page, not the file itself"
    if said:
        raise VocabularyError(f"{path} {said}")
    return content


def read_bpe(folder: Path, symbols: list[str]) -> tuple[dict[str, int], dict]:
    """{piece: id} and the ranks of pairs."""
    path, merges, both = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if both.exists() and not path.exists() and not merges.exists():
        path = merges = both
    content = read_file(path)
    with reading(path, "JSON in UTF-8"):
        vocabulary = json.loads(content.decode())
    if path == both:
        with reading(path, "a tokenizer of transformers"):
            model, added = vocabulary["model"], vocabulary["added_tokens"]
            bart = model["type"] == "BPE"
            if bart:
                vocabulary = model["vocab"] | {token["content"]: token["id"] for token in added}
                lines = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
        if not bart:
            raise VocabularyError(f"{path} is not BART's; T5 needs spiece.model, which "
                                  "transformers 5 no longer writes")
    else:
        content = read_file(merges)
        with reading(merges, "text in UTF-8"):
            lines = content.decode().split("\n")
    check_vocabulary(vocabulary, path, symbols)
    return vocabulary, read_merges(lines, merges, vocabulary)


def check_vocabulary(vocabulary: dict[str, int], path: Path, symbols: list[str]):
    ids = vocabulary.values() if isinstance(vocabulary, dict) else [None]
    if {*map(type, ids)} != {int} or {*ids} != {*range(len(ids))}:
        raise VocabularyError(f"{path} should be a JSON object {{piece: id}}, from 0 without a gap")
    missing = [token for token in NEEDED if token not in vocabulary]
    if missing:
        raise VocabularyError(f"{path} has no {' '.join(missing)}")
    strange = set("".join(vocabulary)).difference(symbols)
    if strange:
        raise VocabularyError(f"{path} has {min(strange)!r}, which stands for no byte")


def read_merges(lines: list[str], path: Path, vocabulary: dict[str, int]) -> dict:
    ranks = {}
    for number, line in enumerate(lines, 1):
        if not line or number == 1 and line.startswith("#version"):
            continue
        pair = tuple(line.split())
        if len(pair) != 2 or "".join(pair) not in vocabulary:
            vocab = "it" if path.stem == "tokenizer" else "vocab.json"
            raise VocabularyError(f"{path}: merge {number} should be two pieces that make a third "
                                  f"in {vocab}")
        ranks[pair] = number
    return ranks


NORMAL, UNKNOWN, CONTROL, UNUSED = 1, 2, 3, 5  # kinds of pieces
PIECES, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5  # fields of spiece.model
VARINT, BYTES, FLOAT = 0, 2, 5  # wire types of protobuf
SETTINGS = {  # message, field, wire type, default
    "model_type": (TRAINER, 3, VARINT, 1),
    "treat_whitespace_as_suffix": (TRAINER, 24, VARINT, 0),
    "byte_fallback": (TRAINER, 35, VARINT, 0),
    "unk_surface": (TRAINER, 44, BYTES, " ⁇ ".encode()),
    "precompiled_charsmap": (NORMALIZER, 2, BYTES, b""),
    "add_dummy_prefix": (NORMALIZER, 3, VARINT, 1),
    "remove_extra_whitespaces": (NORMALIZER, 4, VARINT, 1),
    "escape_whitespaces": (NORMALIZER, 5, VARINT, 1),
    "denormalizer_charsmap": (DENORMALIZER, 2, BYTES, b"")}
FREE = "unk_surface", "precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces"


def read_model(path: Path) -> tuple[list[tuple[str, float, int]], dict]:
    """The pieces (text, score, kind) and the SETTINGS; all but the FREE ones have to be T5's."""
    content = read_file(path)
    with reading(path, "a sentencepiece model"):
        model = read_message(content)
        pieces = [read_piece(message) for message in model[PIECES, BYTES]]
        model.setdefault((DENORMALIZER, BYTES), [b""])
        messages = {field: read_message(model[field, BYTES][-1])
                    for field in (TRAINER, NORMALIZER, DENORMALIZER)}
    settings = {}
    for name, (message, number, wire, default) in SETTINGS.items():
        settings[name] = messages[message].get((number, wire), [default])[-1]
        if name not in FREE and settings[name] != default:
            raise VocabularyError(f"{path} is no model like T5's: its {name} should be {default}")
    check_pieces(pieces, path)
    return pieces, settings


def check_pieces(pieces: list[tuple[str, float, int]], path: Path):
    texts, _, kinds = map(set, zip(*pieces))
    for token in "<pad>", "</s>":
        if token not in texts:
            raise VocabularyError(f"{path} has no {token}")
    if UNKNOWN not in kinds:
        raise VocabularyError(f"{path} has no piece for unknown characters")
    if "" in texts or len(texts) < len(pieces):
        raise VocabularyError(f"{path} has a piece that is empty or there twice")
    if max(map(len, texts)) > LONGEST_RULE or sum(map(len, texts)) > 1 << 22:
        raise VocabularyError(f"{path} has pieces that are too long")
    for text, score, kind in pieces:
        if kind not in (NORMAL, UNKNOWN, CONTROL, UNUSED):
            raise VocabularyError(f"{path}: its piece {text!r} is user-defined or a byte")
        if kind == NORMAL and not abs(score) < 1e6:
            raise VocabularyError(f"{path}: {text!r} has {score}, not the logarithm of a "
                                  "probability")


def read_piece(message: bytes) -> tuple[str, float, int]:
    fields = read_message(message)
    text = fields[1, BYTES][-1].decode()
    score, = struct.unpack("<f", fields.get((2, FLOAT), [bytes(4)])[-1])
    return text, score, fields.get((3, VARINT), [NORMAL])[-1]


def read_message(message: bytes) -> dict[tuple[int, int], list]:
    """A protobuf message's values by field and wire type: numbers for VARINT, else bytes."""
    fields = {}
    i = 0
    while i < len(message):
        key, i = read_varint(message, i)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, i = read_varint(message, i)
        else:
            if wire == BYTES:
                size, i = read_varint(message, i)
            else:
                size = {1: 8, FLOAT: 4}[wire]
            value = message[i:i + size]
            i += size
        fields.setdefault((number, wire), []).append(value)
    if i > len(message):
        raise ValueError("the last field is cut off")
    return fields


def read_varint(message: bytes, i: int) -> tuple[int, int]:
    """The number at `i`, seven bits a byte, lowest first (ac 02: 300); the place after."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[i]
        i += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, i
    raise ValueError("a number of more than ten bytes")
