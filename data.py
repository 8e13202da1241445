"""Pixels and words become batches.

First what reads data sets: files, `Example`, readers, the table of tasks. Then pictures and videos,
the store of their features, batches. `python data.py --data DIR` says what is there and what is
missing; README shows how DIR is laid out.

Paper: https://arxiv.org/abs/2112.06825, section 4. original: FILE#L is
https://github.com/ylsung/VL_adapter/blob/545fcbb/VL-T5/src/FILE#L.
Needs torch, numpy, pillow, tqdm, for videos av.
"""

import argparse
import codecs
import hashlib
import io
import json
import math
import os
import random
import re
import stat
import sys
import threading
import warnings
import zipfile
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from model import IMAGE_SIZE, VISUAL_SIDE, disguise, fold_norms, load_clip, token_indices
from tokenizer import Tokenizer, vqa_normal_form


# ---- errors and files ----


class DataError(ValueError):
    """The data cannot be used; the message names the file and what was expected."""


def open_regular(path: Path):
    """A file to read bytes of. Raises DataError: no pipe is waited for, no pointer taken for it."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        raise DataError(f"{path} is missing; data.py --data DIR says where to get it") from None
    if not stat.S_ISREG(kind):
        raise DataError(f"{path} is not a regular file")
    file = open(path, "rb")
    if said := disguise(file.peek(200)[:200]):
        file.close()
        raise DataError(f"{path} {said}")
    return file


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path):
    with open_regular(path) as file:
        return JSONFile(path, file).value()


def write_atomically(path: Path, content: bytes):
    """A killed process leaves the old file or the new one, and no process another's half."""
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as problem:  # a full disk's has no name
        unfinished.unlink(missing_ok=True)
        raise OSError(problem.errno, problem.strerror, str(path)) from None


BLOCK = 1 << 20  # bytes read at a time
LONGEST_RECORD = 1 << 26  # characters
LONGEST_TEXT = 10_000
WHITE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


class JSONFile:
    """JSON of any size, a value at a time: `text` from `at` on is read and not yet taken."""

    def __init__(self, path: Path, file, bar=None):
        self.path = path
        self.file = file
        self.bar = bar
        self.digest = hashlib.sha256()
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.at = 0
        self.ended = False
        self.place = 0  # of the record: its number from 1 on, or its id

    def more(self):
        """Reads as much again as is there."""
        block = self.file.read(max(BLOCK, len(self.text) - self.at))
        self.ended = not block
        self.digest.update(block)
        if self.bar is not None:
            self.bar.update(len(block))
        try:
            self.text = self.text[self.at:] + self.decoder.decode(block, self.ended)
        except UnicodeDecodeError:
            raise DataError(f"{self.path} is not UTF-8 text") from None
        self.at = 0

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            self.at = WHITE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at:self.at + 1]
            self.more()

    def value(self):
        self.peek()
        while True:
            reason = ""
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as problem:
                reason = problem.msg
            except (ValueError, RecursionError):
                raise self.broken("nested too deeply, or a number is too long") from None
            if self.ended or len(self.text) - self.at > LONGEST_RECORD:
                raise self.broken(reason)
            self.more()

    def entries(self) -> Iterator[int | str]:
        """The numbers of a list's values, or an object's names; who asks takes the values."""
        end = {"[": "]", "{": "}"}[self.peek()]
        self.at += 1
        number = 0
        while self.peek() != end:
            number += 1
            self.place = number
            if end == "}":
                self.place = self.value()
                if fault(self.place, str) or self.peek() != ":":
                    raise self.broken("expected a name and :")
                self.at += 1
            yield self.place
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != end:
                raise self.broken(f"expected , or {end}")
        self.at += 1

    def records(self, key: str | None) -> Iterator[int | str]:
        """The places of {key: [record, ...]}, of {id: record} (key is "") or of [record, ...] or
        lines (None); who asks takes the records.
        """
        first = self.peek()
        found = 0
        if key and first == "{":
            for name in self.entries():
                if self.peek() != "[":
                    self.value()
                    continue
                found += name == key
                for place in self.entries():
                    if name == key:
                        yield place
                    else:
                        self.value()
        elif not key and first == ("[" if key is None else "{"):
            found = 1
            yield from self.entries()
        elif key is None:
            found = 1
            while self.peek():
                self.place += 1
                yield self.place
        if found != 1:
            form = f"an object with a list {key!r}" if key else "{id: record}"
            raise DataError(f"{self.path} is empty or of another data set: expected {form}")
        if self.peek():
            raise self.broken("something stands behind its end")

    def broken(self, reason: str) -> DataError:
        place = f"record {self.place!s:.80}"
        return DataError(f"{self.path} is truncated or not JSON: {place}, {reason}")


ID = int | str
KINDS = {str: f"text of at most {LONGEST_TEXT:,} whole characters", ID: "a number or text",
         int: "a whole number from 0 on", int | float: "a number from 0 on"}
SURROGATE = re.compile("[\ud800-\udfff]")


def fault(value, kind) -> str:
    """Where a value of JSON is not of a kind, and what is expected there; "" if it is.

    A kind is one of KINDS, a set of values, [kind] of a list, {name: kind} of an object, {str:
    kind} of one with any names, (kind, None) if there may be nothing.

    >>> fault({"id": 3, "said": [{"text": 5}]}, {"id": int, "said": [{"text": str}]})
    '.said[0].text should be text of at most 10,000 whole characters, but is 5'
    """
    if isinstance(kind, dict) and type(value) is dict:
        if str in kind:
            kind = dict.fromkeys(value, kind[str])
            wrong = next(filter(None, (fault(name, str) for name in value)), "")
            if wrong:
                return f": each name{wrong}"
        for name, inner in kind.items():
            x = value.get(name)
            if type(inner) is tuple:
                if x is None:
                    continue
                inner = inner[0]
            if inner is str and type(x) is str and len(x) < LONGEST_TEXT and x.isascii():
                continue  # the commonest, and much faster
            if wrong := fault(x, inner):
                return f".{name}{wrong}"
        return ""
    if isinstance(kind, list) and type(value) is list:
        for i, x in enumerate(value):
            if wrong := fault(x, kind[0]):
                return f"[{i}]{wrong}"
        return ""

    if isinstance(kind, set):
        good = any(type(x) is type(value) and x == value for x in kind)
    elif isinstance(kind, (dict, list)) or isinstance(value, bool):
        good = False
    elif isinstance(value, str):
        good = isinstance(value, kind) and len(value) <= LONGEST_TEXT
        good = good and not SURROGATE.search(value)
    else:
        good = isinstance(value, kind) and 0 <= value < 1 << 63
    if good:
        return ""
    if isinstance(kind, set):
        wish = "one of " + ", ".join(sorted(map(json.dumps, kind)))
    else:
        wish = {dict: "an object", list: "a list"}.get(type(kind)) or KINDS[kind]
    is_a = {dict: "an object", list: "a list", type(None): "missing"}.get(type(value))
    return f" should be {wish}, but is {is_a or json.dumps(value)[:60]}"


class Files:
    """The files of a folder, as readers ask for them. used: what they saw, None: nothing there."""

    def __init__(self, data: Path, bar=None):
        self.data = data
        self.bar = bar
        self.used = {}  # name -> sha256

    def has(self, name: str) -> bool:
        there = (self.data / name).exists()
        if not there:
            self.used[name] = None
        return there

    def records(self, name: str, kind, key: str | None = None) -> Iterator[tuple[int | str, dict]]:
        """The records of a file with their places, each of a kind. Raises DataError."""
        path = self.data / name
        with open_regular(path) as file:
            content = JSONFile(path, file, self.bar)
            for place in content.records(key):
                row = content.value()
                self.check(name, place, row, kind)
                yield place, row
        self.used[name] = content.digest.hexdigest()

    def check(self, name, place, row, kind):
        if wrong := fault(row, kind):
            raise self.error(name, place, wrong.lstrip(". "))

    def error(self, name: str, place, what: str) -> DataError:
        return DataError(f"{self.data / name}, record {place!s:.80}: {what}")


# ---- the official files become examples ----


@dataclass(slots=True)
class Example:
    """One question, statement or picture to describe."""
    id: int | str
    pictures: tuple[str, ...]  # names of files without suffix, or of one video
    text: str
    answers: dict[str, float]  # to learn, with weights
    kind: str = ""  # of question, for blind baselines
    truth: dict = field(default_factory=dict)  # for the metric
    subtitles: str = ""  # of a video: before the text


# original: caption_clip_data.py#L84
KARPATHY = {"karpathy_train": ("train", "restval"), "karpathy_val": ("val",),
            "karpathy_test": ("test",)}
SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # of an answer that 0, 1, 2, 3, 4+ of ten gave

# What records have; see `fault`.
OPTIONAL = (str, None)
PICTURE = {"cocoid": int, "filepath": str, "split": str}
CAPTIONED = PICTURE | {"filename": str, "sentences": [{"sentid": int, "raw": str}]}
VQA_QUESTION = {"question_id": int, "image_id": int, "question": str}
VQA_ANNOTATION = {
    "question_id": int, "image_id": int, "answers": [{"answer": str}],
    "multiple_choice_answer": str, "question_type": OPTIONAL, "answer_type": OPTIONAL}
GQA_QUESTION = {
    "imageId": str, "question": str, "isBalanced": ({True, False}, None),
    "types": ({"structural": OPTIONAL, "detailed": OPTIONAL}, None), "entailed": ([str], None)}
STATEMENT = {"identifier": str, "sentence": str}
VLT5_STATEMENT = {"identifier": str, "img0": str, "img1": str, "sent": str}
VLT5_QUESTION = {
    "question_id": ID, "img_id": ID, "sent": str, "question_type": OPTIONAL,
    "answer_type": OPTIONAL, "answers": ([{"answer": str}], None)}
SUBTITLES = {"vid_name": ID, "sub": [{"text": OPTIONAL}]}
CHOICES = {"qid": ID, "q": str, "ts": str, "vid_name": ID, "show_name": OPTIONAL}
MOMENT = {"clip_id": ID, "vid_name": ID, "ts": ([int | float], None)}


def labelled(kind: dict, split: str, **labels) -> dict:
    """Records of a kind with labels, which training needs and other splits may lack."""
    if "train" not in split:
        labels = {name: (label, None) for name, label in labels.items()}
    return kind | labels


def read_vqa(files: Files, *splits: str) -> Iterator[tuple[str, Example]]:
    """VQAv2: Karpathy's parts of train2014 and val2014, weighed by soft scores, or test2015."""
    asked = "vqa/v2_OpenEnded_mscoco_{}_questions.json"
    wanted = {}  # Karpathy's part -> split
    for split in splits:
        converted = f"vqa/{split}.json"
        if split == "test2015":
            for _, r in files.records(asked.format(split), VQA_QUESTION, "questions"):
                picture = f"COCO_{split}_{r['image_id']:012d}"
                yield split, Example(r["question_id"], (picture,), r["question"], {})
        elif files.has(converted) and not files.has(asked.format("train2014")):
            yield from read_converted(files, converted, split, vqa=True)
        else:
            wanted |= dict.fromkeys(KARPATHY[split], split)
    if not wanted:
        return

    # The split and the file of each picture.
    pictures = {}
    coco = "COCO/dataset_coco.json"
    for _, r in files.records(coco, PICTURE, "images"):
        name = f"COCO_{r['filepath']}_{r['cocoid']:012d}"
        pictures[r["cocoid"]] = wanted.get(r["split"]), name

    # Of both years, for what may be learned is counted over all.
    questions = {}  # id -> (picture's id,), of those wanted with text, types and ten answers
    common = Counter()
    same = {}  # answer -> itself, for one is given many times
    for year in "train2014", "val2014":
        file = asked.format(year)
        for place, r in files.records(file, VQA_QUESTION, "questions"):
            number, image = r["question_id"], r["image_id"]
            if number in questions:
                raise files.error(file, place, f"question_id {number} is there twice")
            if image not in pictures:
                raise files.error(file, place, f"image_id {image} is none of {coco}")
            questions[number] = image, r["question"] if pictures[image][0] else ""

        given = f"vqa/v2_mscoco_{year}_annotations.json"
        for place, r in files.records(given, VQA_ANNOTATION, "annotations"):
            number, image = r["question_id"], r["image_id"]
            question = questions.get(number, ())
            if len(question) != 2:
                raise files.error(given, place, f"question_id {number} is there twice, or {file} "
                                  "has no such one: they do not match")
            if question[0] != image:
                raise files.error(given, place, f"image_id {image} is {question[0]} in {file}")
            common[r["multiple_choice_answer"]] += 1
            questions[number] = image,
            if pictures[image][0]:
                people = [same.setdefault(x["answer"], x["answer"]) for x in r["answers"]]
                types = [r.get(name) or "" for name in ("question_type", "answer_type")]
                types = [same.setdefault(name, name) for name in types]
                questions[number] = *question, *types, tuple(people)
        for number, question in questions.items():
            if len(question) == 2:
                raise files.error(file, number, f"it is not in {given}: they do not match")

    # Learned is what the list names, or what is common.
    source = "vqa/trainval_ans2label.json"
    if files.has(source):
        vocabulary = {answer for answer, _ in files.records(source, int, "")}
    else:
        source = given
        vocabulary = vqa_vocabulary(common)
    learned = False
    for number, (image, *more) in questions.items():
        if more:
            text, kind, answer_type, people = more
            split, picture = pictures[image]
            answers = {answer: SOFT_SCORES[min(count, 4)]
                       for answer, count in Counter(people).items() if answer in vocabulary}
            learned |= bool(answers) and split == "karpathy_train"
            truth = {"answers": list(people), "type": answer_type}
            yield split, Example(number, (picture,), text, answers, kind, truth)
    if not learned and "karpathy_train" in wanted.values():
        raise DataError(f"{files.data / source}: none of the answers given may be learned")


def vqa_vocabulary(common: Counter[str]) -> set[str]:
    """The 3,129 answers, in normal form, that are the commonest of nine questions or more.

    Everybody takes these, as trainval_ans2label.json, and the soft scores:
    https://github.com/hengyuan-hu/bottom-up-attention-vqa/blob/978f6d6/tools/compute_softscore.py
    """
    counts = Counter()
    for answer, count in common.items():
        counts[vqa_normal_form(answer).replace(",", "")] += count
    return {answer for answer, count in counts.items() if count >= 9}


def read_gqa(files: Files, *splits: str) -> Iterator[tuple[str, Example]]:
    """GQA: balanced questions of parts ("train,val"), or all of one ("testdev_all") if there."""
    for split in splits:
        for part in split.split(","):
            name = part.removesuffix("_all")
            file = f"GQA/{name}_balanced_questions.json"
            every = f"GQA/{name}_all_questions.json"
            if part != name and (files.has(every) or not files.has(file)):
                file = every
            theirs = {"val": "valid", "submission": "submit"}.get(name, name)
            converted = f"GQA/{theirs}.json"
            if files.has(converted) and not files.has(file):
                yield from read_converted(files, converted, split)
            else:
                for example in read_gqa_file(files, file, split):
                    yield split, example


def read_gqa_file(files, file, split):
    balanced = labels = 0
    for number, r in files.records(file, labelled(GQA_QUESTION, split, answer=str), ""):
        answer = r.get("answer")
        types = r.get("types") or {}
        truth = {"answer": answer, "structural": types.get("structural") or "",
                 "balanced": r.get("isBalanced") is not False, "entailed": r.get("entailed") or ()}
        balanced += truth["balanced"]
        labels += answer is not None
        answers = {} if answer is None else {answer: 1.0}
        yield Example(number, (r["imageId"],), r["question"], answers,
                      types.get("detailed") or "", truth)
    if labels and not balanced:
        raise DataError(f"{files.data / file}: isBalanced is false of all questions, and the score "
                        "is of balanced ones")


def read_nlvr(files: Files, *splits: str) -> Iterator[tuple[str, Example]]:
    """NLVR2: statements on two pictures, left and right. original: nlvr_clip_data.py#L156

    train.json may be the official one or VL-T5's.
    """
    labels = {"True": "true", "False": "false", 1: "true", 0: "false"}
    for split in splits:
        file = f"nlvr/{split}.json"
        theirs = {"dev": "valid", "test1": "test"}.get(split, split)
        converted = f"nlvr/{theirs}.json"
        if files.has(converted) and not files.has(file):
            file = converted
        for place, r in files.records(file, {}):
            vlt5 = "sent" in r
            kind = VLT5_STATEMENT if vlt5 else STATEMENT
            files.check(file, place, r, labelled(kind, split, label={*labels}))
            number = r["identifier"]
            if not re.fullmatch(".+-.+-.+-.+", number) and not (vlt5 and split == "train"):
                raise files.error(file, place, f"identifier should be split-set-pair-sentence, by "
                                  f"which the score groups pairs, but is {number!r:.80}")
            pair = number.rpartition("-")[0]  # the sentence's number goes
            pictures = (r["img0"], r["img1"]) if vlt5 else (f"{pair}-img0", f"{pair}-img1")
            answer = labels.get(r.get("label"))
            answers = {answer: 1.0} if answer else {}
            yield split, Example(number, pictures, r["sent" if vlt5 else "sentence"], answers,
                                 truth={"answer": answer})


def read_converted(files: Files, file: str, split: str,
                   vqa: bool = False) -> Iterator[tuple[str, Example]]:
    """VL-T5's VQAv2 or GQA, where official files are absent.

    original: vqa_clip_data.py#L154, gqa_clip_data.py#L361
    """
    learned = False
    for _, r in files.records(file, labelled(VLT5_QUESTION, split, label={str: int | float})):
        label = r.get("label") or {}  # {answer: weight}
        learned |= any(label.values())
        truth = {"answer": max(label, key=label.get, default=None)}
        if vqa:  # with the answers of ten people
            people = [answer["answer"] for answer in r.get("answers") or ()]
            truth = {"answers": people, "type": r.get("answer_type") or ""}
        yield split, Example(r["question_id"], (str(r["img_id"]),), r["sent"], label,
                             r.get("question_type") or "", truth)
    if not learned and "train" in split:
        raise DataError(f"{files.data / file}: nothing can be learned, every label is empty or 0")


def read_captions(files: Files, *splits: str) -> Iterator[tuple[str, Example]]:
    """COCO: for training one example a caption; elsewhere one a picture, with all.

    Splits are Karpathy's and, for the server, val2014 and test2014.
    original: caption_clip_data.py#L94
    """
    if "test2014" in splits:
        kind = {"id": int, "file_name": str}
        for _, r in files.records("COCO/image_info_test2014.json", kind, "images"):
            yield "test2014", Example(r["id"], (Path(r["file_name"]).stem,), "", {})
    if {*splits} == {"test2014"}:
        return
    for _, r in files.records("COCO/dataset_coco.json", CAPTIONED, "images"):
        pictures = (Path(r["filename"]).stem,)
        captions = [(s["sentid"], s["raw"].strip()) for s in r["sentences"]]
        for split in splits:
            if r["split"] not in KARPATHY.get(split, ()) and r["filepath"] != split:
                continue
            if split == "karpathy_train":
                for number, caption in captions:
                    yield split, Example(number, pictures, "", {caption: 1.0})
            else:
                truth = {"references": [caption for _, caption in captions]}
                yield split, Example(r["cocoid"], pictures, "", {}, truth=truth)


def read_choices(choices: int, task: str, videos: str, files: Files,
                 *splits: str) -> Iterator[tuple[str, Example]]:
    """TVQA and How2QA. A moment "NaN-NaN" stays that, as in the original."""
    names = [f"a{i}" for i in range(choices)]
    kind = CHOICES | dict.fromkeys(names, str)
    labels = {"answer_idx": {*range(choices)}}
    for split, place, r, video in value_records(task, videos, files, splits, kind, labels):
        right = r.get("answer_idx")
        right = None if right is None else names[right]
        yield split, Example(
            r["qid"], text=choose_from(r["q"], r["ts"], [r[name] for name in names]),
            answers={right: 1.0} if right else {}, kind=" ".join(r["q"].split()[:2]).lower(),
            truth={"answer": right, "show": r.get("show_name") or ""}, **video)


def read_moments(task: str, videos: str, files: Files,
                 *splits: str) -> Iterator[tuple[str, Example]]:
    """TVC and YC2C: for training one example a description; elsewhere one a clip, with all.

    original: video/tvc_data.py#L108
    """
    labels = {"descs": [{"desc": str, "desc_id": ID}]}
    for split, place, r, video in value_records(task, videos, files, splits, MOMENT, labels):
        ts = r.get("ts")
        text = "" if ts is None else f"[TS] ({ts})"
        told = r.get("descs") or ()
        if not split.startswith("train"):
            truth = {"references": [d["desc"] for d in told], "video": video["pictures"][0],
                     "ts": ts}
            yield split, Example(r["clip_id"], text=text, answers={}, truth=truth, **video)
        elif not told:
            raise files.error(f"video/ann/{task}/{task}_{split}.jsonl", place,
                              "it has no descriptions, descs is empty")
        for d in told if split.startswith("train") else ():
            yield split, Example(d["desc_id"], text=text, answers={d["desc"].strip(): 1.0}, **video)


def value_records(task, videos, files, splits, kind, labels):
    """VALUE's records, each with its split, its place and what an Example says of its video."""
    said = {}
    for _, r in files.records(f"video/ann/{videos}_subtitles.jsonl", SUBTITLES):
        lines = [(line.get("text") or "").strip() for line in r["sub"]]
        said[str(r["vid_name"])] = " ".join(lines)
    for split in splits:
        file = f"video/ann/{task}/{task}_{split}.jsonl"
        for place, r in files.records(file, labelled(kind, split, **labels)):
            video = str(r["vid_name"])
            yield split, place, r, {"pictures": (video,), "subtitles": said.get(video, "")}


def choose_from(question: str, moment: str, choices: Iterable[str]) -> str:
    """original: video/tvqa_data.py#L193"""
    listed = " ".join(f"a{i}: {choice.strip(' .')}." for i, choice in enumerate(choices))
    return f"[Q] {question} [TS] ({moment}) [Choices] {listed}"


# ---- the table of tasks ----


@dataclass(frozen=True)
class Task:
    prompt: str  # around the text, to tell tasks apart
    text: int  # most tokens, with subtitles
    answer: int  # most tokens
    batch: float  # relative to --batch
    read: Callable[..., Iterator]  # of (files, *splits): (split, Example) as they come
    train: str
    validation: str
    test: str
    counts: dict[str, int]  # of official splits
    metric: str  # a key of evaluate.METRICS
    pictures: str  # a key of FOLDERS
    submission: dict[str, str]  # split -> the official server's file
    source: str
    beams: int = 1
    choices: tuple[str, ...] = ()  # the only answers
    token_mean: bool = False  # the loss is a mean over tokens, not examples

    @property
    def video(self) -> bool:
        return self.pictures in VIDEOS


VIDEOS = ("tv", "how2", "yc2")
FOLDERS = {"COCO": ["COCO/images"], "GQA": ["GQA/images", "VG"], "NLVR2": ["nlvr/images"]}
FOLDERS |= {name: [f"video/videos/{name}"] for name in VIDEOS}
COCO_SOURCE = ("https://cocodataset.org and caption_datasets.zip of "
               "https://cs.stanford.edu/people/karpathy/deepimagesent")
KARPATHY_SPLITS = dict(train="karpathy_train", validation="karpathy_val", test="karpathy_test")


def video_task(name, videos, read, counts, test, metric) -> Task:
    """One of VALUE's. counts: of its splits to train and validate; test: the server's split."""
    train, validation = counts
    form = "json" if metric == "choices" else "jsonl"
    files = {}
    for split in (validation, test):
        files[split] = f"{name}/{name}_{split.removesuffix('_release')}_predictions.{form}"
    return Task(
        prompt=f"{{}} {name}: ", text=600, answer=20, batch=1, read=partial(read, name, videos),
        train=train, validation=validation, test=validation, counts=counts,
        metric=metric, pictures=videos, submission=files,
        source="https://github.com/VALUE-Leaderboard/DataRelease", beams=5)


# The authors', but their "gpa: " for GQA is a slip, and NLVR2 has no longest text there.
# original: multitask.py#L1048, multitask_video.py#L653
TASKS = {
    "vqa": Task(
        **KARPATHY_SPLITS, prompt="vqa: {}", text=20, answer=10, batch=1, read=read_vqa,
        counts={"karpathy_train": 605102, "karpathy_val": 26729, "karpathy_test": 26280,
                "test2015": 447793},
        metric="vqa", pictures="COCO",
        submission={"test2015": "vqa_OpenEnded_mscoco_test2015_vladapter_results.json"},
        source=f"https://visualqa.org/download.html, {COCO_SOURCE}"),
    "gqa": Task(
        prompt="gqa: {}", text=20, answer=10, batch=5 / 3, read=read_gqa,
        train="train,val", validation="testdev", test="testdev_all",
        counts={"train,val": 1075062, "testdev": 12578, "testdev_all": 172174},
        metric="gqa", pictures="GQA", submission={"submission_all": "gqa_submission_all.json"},
        source="https://cs.stanford.edu/people/dorarad/gqa/download.html"),
    "nlvr": Task(
        prompt="nlvr: {}", text=100, answer=10, batch=1 / 3, read=read_nlvr,
        train="train", validation="dev", test="test1",
        counts={"train": 86373, "dev": 6982, "test1": 6967},
        metric="nlvr", pictures="NLVR2", submission={"test1": "nlvr2_test1.csv"},
        source="https://github.com/lil-lab/nlvr, folder nlvr2", choices=("false", "true")),
    "caption": Task(
        **KARPATHY_SPLITS, prompt="caption: {}", text=40, answer=40, batch=5 / 6,
        read=read_captions, metric="caption", pictures="COCO",
        counts={"karpathy_train": 566747, "karpathy_val": 5000, "karpathy_test": 5000},
        submission={"val2014": "captions_val2014_vladapter_results.json",
                    "test2014": "captions_test2014_vladapter_results.json"},
        source=COCO_SOURCE, beams=5, token_mean=True),
    "tvqa": video_task(
        "tvqa", "tv", partial(read_choices, 5), {"train": 122039, "val": 15253},
        "test_release", "choices"),
    "how2qa": video_task(
        "how2qa", "how2", partial(read_choices, 4), {"train_release": 34187, "val_release": 3115},
        "test_public_release", "choices"),
    "tvc": video_task(
        "tvc", "tv", read_moments, {"train_release": 2 * 86603, "val_release": 10841},
        "test_release", "moment"),
    "yc2c": video_task(
        "yc2c", "yc2", read_moments, {"train_release": 10337, "val_release": 3492},
        "test_release", "moment"),
}


def stream_examples(files: Files, task: str, *splits: str) -> Iterator[tuple[str, Example]]:
    """The examples of splits, each with its split, as they are read.

    Raises DataError for missing, broken, empty or doubtful files.
    """
    hashes = {split: array("q") for split in splits}
    hidden = Counter()
    for split, e in TASKS[task].read(files, *splits):
        hashes[split].append(hash(e.id))
        hidden[split] += split != TASKS[task].train and not has_label(e)
        yield split, e
    names = ", ".join(name for name, digest in files.used.items() if digest)
    for split in splits:
        place = f"{task}'s {split} below {files.data} ({names})"
        count = len(hashes[split])
        if not count:
            raise DataError(f"{place} has no examples")
        if 0 < hidden[split] < count:
            raise DataError(f"{place}: {hidden[split]:,} of {count:,} have no labels")
        values, counts = np.unique(hashes[split], return_counts=True)
        if counts.max() > 1:
            twice = values[counts.argmax()]
            number = next(e.id for _, e in TASKS[task].read(files, split) if hash(e.id) == twice)
            raise DataError(f"{place} has the id {number} {counts.max()} times")


def read_examples(data: str | Path, task: str, split: str) -> list[Example]:
    """The examples of a split. Raises DataError."""
    return [e for _, e in stream_examples(Files(Path(data)), task, split)]


def has_label(e: Example) -> bool:
    return any(e.truth.get(name) for name in ("answer", "answers", "references"))


def check_labels(task: str, examples: list[Example]):
    """Raises DataError for examples that cannot be scored."""
    hidden = sum(not has_label(e) for e in examples)
    if hidden:
        raise DataError(f"{task} cannot be scored: {hidden:,} of {len(examples):,} examples "
                        "have no labels")


# ---- pictures and videos ----

PICTURE_FILES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"}
VIDEO_FILES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".ts", ".gif", ".npz"}
# Others may start programs and open files, as PostScript and playlists do.
PICTURE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,gif,ogg,flv"
MOST_PIXELS = 190_000_000  # of a picture, 2 GB while it is read
MOST_FRAME_PIXELS = 2 ** 25  # of a video: 8K
MOST_FRAMES = 2400  # to keep of a video: an hour, 360 MB
FPS = Fraction(2, 3)  # frames a second, as of VALUE's features
LONGEST = 4 * 3600  # seconds; a time stamp or a length beyond is broken

Image.MAX_IMAGE_PIXELS = None  # open_picture has a limit of its own
warnings.filterwarnings("ignore", module="PIL")  # it warns of odd EXIF blocks
large = threading.Lock()  # held by the one thread that reads something large
# EXIF's orientation -> what makes it upright.
TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
         5: Image.TRANSPOSE, 6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}


def folders_of(data: Path, source: str) -> list[Path]:
    return [data / folder for folder in FOLDERS[source]]


def find_files(folders: list[Path], names: Iterable[str], video: bool = False) -> dict[str, Path]:
    """Where the named files lie: anywhere below the folders, the first in order of names.

    Each folder is walked once, whatever links there are. A folder with pictures may be a video, in
    frames, if there is no file of that name.
    COCO of 2017 has the pictures of 2014 and 2015 without what stands before their number.
    """
    wanted = set(names)
    numbers = defaultdict(set)
    for name in wanted:
        if re.fullmatch(r"COCO_\w+_\d{12}", name):
            numbers[name[-12:]].add(name)
    suffixes = VIDEO_FILES if video else PICTURE_FILES
    found, frames, seen = {}, {}, set()
    waiting = [*map(str, reversed(folders))]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # absent, or not ours to read
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        inner = []
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            # By itself is_dir raises OSError for a link to itself.
            if entry.is_dir(follow_symlinks=False) or (
                    entry.is_symlink() and os.path.isdir(entry.path)):
                inner.append(entry.path)
            elif suffix.lower() in suffixes:
                for wish in numbers.get(stem, set()) | (wanted & {stem}):
                    found.setdefault(wish, Path(entry.path))
            if video and suffix.lower() in PICTURE_FILES:
                frames.setdefault(os.path.basename(folder), Path(folder))
        waiting += reversed(inner)
    return {name: path for name, path in (frames | found).items() if name in wanted}


def open_picture(path: Path, use: Callable = lambda picture: picture):
    """A picture in RGB, upright, whatever its suffix says, or what use(picture) makes of it.

    Of 16 bits the upper 8 are taken. What is transparent has the colour that is stored there, as in
    the original. Of an animation it is the first picture. Raises DataError.
    """
    try:
        with open_regular(path) as file:
            picture = Image.open(file, formats=PICTURE_FORMATS)
            pixels = math.prod(picture.size)
            if pixels > MOST_PIXELS:
                raise ValueError(f"it has {pixels:,} pixels; scale it down, or raise MOST_PIXELS "
                                 "in data.py")
            with large if pixels > 2 ** 24 else nullcontext():
                picture.load()
                turn = TURNS.get(orientation(picture))
                if picture.mode[0] == "I":
                    picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
                picture = picture.convert("RGB")
                return use(picture if turn is None else picture.transpose(turn))
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        reason = f"it is none of {', '.join(PICTURE_FORMATS)}"
    except Exception as problem:  # pillow raises many kinds
        reason = problem
    raise DataError(f"{path} is not a readable picture: {reason}")


def orientation(picture):
    try:
        return picture.getexif().get(274)
    except Exception:  # a broken block says nothing
        return None


def load_picture(path: Path, resolution: int = IMAGE_SIZE) -> np.ndarray:
    """RGB bytes [resolution, resolution, 3], squeezed to a square. Raises DataError.

    https://github.com/ylsung/VL_adapter/blob/545fcbb/feature_extraction/coco_CLIP.py#L41
    """
    size = (resolution, resolution)
    return open_picture(path, lambda picture: np.array(picture.resize(size, Image.BICUBIC)))


def load_video(path: Path, resolution: int = IMAGE_SIZE) -> np.ndarray:
    """RGB bytes [frames, resolution, resolution, 3], two frames in three seconds.

    The paper took VALUE's features; this is for other videos, by the rules of VALUE's extractor. A
    folder has frames at 3 a second, as TVQA's. Raises DataError.
    https://github.com/linjieli222/HERO_Video_Feature_Extractor/blob/eaf55ce/clip/video_loader.py
    """
    frames = bytearray()
    for frame in (load_frames if path.is_dir() else decode_video)(path, resolution):
        frames += frame.tobytes()
        if len(frames) > MOST_FRAMES * 3 * resolution ** 2:
            raise DataError(f"{path} is longer than {MOST_FRAMES:,} frames, an hour; cut it")
    if not frames:
        raise DataError(f"{path} has no frames")
    return np.frombuffer(frames, np.uint8).reshape(-1, resolution, resolution, 3)


def load_frames(folder, side):
    def square(picture):
        width, height, left, top = scale_and_crop(picture.size, side)
        scaled = picture.resize((width, height), Image.BICUBIC)
        return np.array(scaled.crop((left, top, left + side, top + side)))

    files = [file for file in folder.iterdir()
             if file.suffix.lower() in PICTURE_FILES and file.name[0] != "."]
    files.sort(key=lambda file: (len(file.stem), file.stem))  # 2.jpg before 10.jpg
    timed = [(Fraction(i, 3), Fraction(1, 3), file) for i, file in enumerate(files)]
    for file in list(resample(timed, FPS)) or files[-1:]:
        yield open_picture(file, square)


def resample(frames, fps):
    """Of (time, duration, frame) the frames that ffmpeg's filter fps keeps.

    Output k is the last frame at a time t with round(t fps) <= k: gaps repeat a frame, and a short
    video may keep none. Six seconds at 30 a second:

    >>> frames = [(Fraction(i, 30), Fraction(1, 30), i) for i in range(180)]
    >>> list(resample(frames, Fraction(2, 3)))
    [22, 67, 112, 157]
    """
    def output_of(time):
        return math.floor(time * fps + Fraction(1, 2))

    last = output = None
    for time, duration, frame in frames:
        if output is None:
            output = output_of(time)
        while output < output_of(time):
            yield last
            output += 1
        last = frame
        end = output_of(time + duration)
    while last is not None and output < end:
        yield last
        output += 1


def scale_and_crop(size, side):
    """Width and height once the shorter is `side`; left and top of the square in their middle."""
    short = min(size)
    if max(size) > 100 * short:
        raise ValueError(f"{size[0]:,} x {size[1]:,} is too thin for a square")
    width, height = (int(length * side / short) for length in size)
    return width, height, (width - side) // 2, (height - side) // 2


def decode_video(path, side):
    """Yields what `resample` keeps, squares of that side. Nothing but the file is opened."""
    try:
        import av
    except ImportError:
        raise DataError(f"{path} can be read with PyAV only: pip install av") from None
    limits = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "none",
              "max_pixels": str(MOST_FRAME_PIXELS)}
    try:
        with open_regular(path) as file, av.open(file, options=limits) as container:
            yield from decode(path, container, side, limits)
    except DataError:
        raise
    except AttributeError:
        raise DataError(f"{path} needs PyAV 15 or later: pip install -U av") from None
    except Exception as problem:  # PyAV raises many kinds
        reason = getattr(problem, "strerror", None) or problem
        raise DataError(f"{path} is empty, truncated or not a readable video: {reason}") from None


def decode(path, container, side, limits):
    """By the frames' time stamps; only what is kept is turned into RGB.

    What a header says of counts and lengths may be wrong: it is believed of a cut file only.
    """
    import av
    attached = av.stream.Disposition.attached_pic
    covers = [s for s in container.streams if attached in s.disposition]
    shown = [s for s in container.streams.video if s not in covers]
    if not shown:
        kinds = [stream.type for stream in container.streams if stream not in covers]
        raise DataError(f"{path} has no pictures, only "
                        f"{', '.join(dict.fromkeys(kinds)) or 'nothing'}")
    stream = shown[0]
    context = stream.codec_context
    if context is None:
        raise ValueError("its codec is unknown")
    pixels = context.width * context.height
    context.options = limits  # a frame may be larger than the header says
    context.thread_type = "SLICE" if pixels > 2 ** 23 else "AUTO"
    start = Fraction(container.start_time or 0, 1_000_000)  # ffmpeg's are microseconds
    length = Fraction(container.duration or 0, 1_000_000)
    step = 1 / (stream.average_rate or Fraction(25))
    fps = Fraction(2) if 0 < length < Fraction(16, 10) else FPS  # as the extractor's

    packets = damaged = 0
    last = None
    reached = seen = Fraction(0)  # seconds, the end of what was read and of its pictures

    def decoded():
        nonlocal packets, damaged, reached, seen
        for packet in chain(container.demux(), [None]):  # of sound, too: what a cut file ends with
            if packet is not None:
                if packet.pts is not None:
                    end = (packet.pts + (packet.duration or 0)) * packet.time_base
                    reached = max(reached, end)
                    seen = max(seen, end) if packet.stream is stream else seen
                if packet.stream is not stream or not packet.size:  # an empty one would be the end
                    continue
                packets += 1
            try:
                yield from context.decode(packet)
            except av.FFmpegError:
                damaged += packet is not None

    def timed():
        nonlocal last
        end = shift = Fraction(0)
        for number, last in enumerate(decoded()):
            time = number * step
            if last.pts is not None:
                time = last.pts * stream.time_base - start + shift
            if time < end - 1:  # the clock starts again
                shift += end - time
                time = end
            if abs(time) > LONGEST:
                raise DataError(f"{path} has a time stamp of {float(time):,.0f} seconds")
            duration = last.duration * stream.time_base if last.duration else step
            end = time + duration
            yield time, duration, last

    with large if pixels > 2 ** 23 else nullcontext():
        shown = square = None
        for frame in resample(timed(), fps):
            if frame is not shown:  # a gap repeats one
                shown, square = frame, crop_frame(frame, side)
            yield square
        if square is None and last is not None:
            yield crop_frame(last, side)

    short = length * Fraction(9, 10)
    if stream.frames:  # a file with an index knows how many it has
        truncated = packets < stream.frames * 0.9 and seen < short
    else:
        truncated = reached < short
    if truncated and length < LONGEST:
        raise DataError(f"{path} is truncated at {float(reached):.1f} of {float(length):.1f} s")
    if last is None and damaged or damaged > max(1, 0.1 * packets):
        raise DataError(f"{path} is damaged, or its frames have more than {MOST_FRAME_PIXELS:,} "
                        f"pixels: {damaged:,} of {packets:,} packets are unreadable")


def crop_frame(frame, side):
    """[side, side, 3], by swscale's bicubic; upright and not mirrored, where a phone was."""
    width, height, left, top = scale_and_crop((frame.width, frame.height), side)
    pixels = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    pixels = pixels[top:top + side, left:left + side]
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # Column x and row y are shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels = pixels.swapaxes(0, 1)
        a, d = c, b
    return pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


# ---- features and their store ----

FRAMES = 64  # visual tokens of a video
MOST_FEATURES = 2 ** 27  # bytes of a .npz: of an hour they are 27 MB


@dataclass(frozen=True)
class Features:
    """What makes visual tokens of files: CLIP, or VALUE's features of videos."""
    hash: str
    channels: int
    folders: Callable[[Path, str], list[Path]]  # of (data, source)
    load: Callable[[Path], np.ndarray]  # raises DataError
    encode: Callable[[list[np.ndarray]], torch.Tensor]  # loaded -> [B, tokens, channels]


def from_clip(path: Path, digest: str, video: bool, device: torch.device) -> Features:
    """By CLIP's weight file, whose sha256 is `digest`. Raises WeightsError.

    Of a picture the pooled grid, as in the paper (section 4.1), of a frame CLIP's output.
    """
    encoder = fold_norms(load_clip(path)).to(device, memory_format=torch.channels_last)
    encode_part = encoder.encode_frames if video else encoder.encode_images

    @torch.no_grad()
    def encode(loaded):
        pictures = chain.from_iterable(loaded) if video else iter(loaded)
        parts = []
        while part := list(islice(pictures, 64)):
            parts.append(encode_part(torch.from_numpy(np.stack(part)).to(device)))
        tokens = torch.cat(parts)
        if not video:
            return tokens  # [B, 36, channels]
        videos = tokens.split([len(frames) for frames in loaded])
        return torch.stack([fit_frames(frames) for frames in videos])  # [B, 64, channels]

    channels = encoder.output_dim if video else encoder.feature_dim
    return Features(digest, channels, folders_of, load_video if video else load_picture, encode)


def is_released(data: Path, name: str) -> bool:
    """Whether --vision names VALUE's released features."""
    return any((data / "video/vis_features").glob(f"*/{name}"))


def released_features(data: Path, name: str) -> Features:
    """VALUE's, in video/vis_features/*/NAME. Raises DataError without any."""
    top = data / "video/vis_features"
    files = sorted(top.glob(f"*/{name}/*.npz"))
    if not files:
        raise DataError(f"{top}/*/{name} is empty")
    counts = Counter()  # what most of some have is right
    for path in files[::-(-len(files) // 9)]:
        try:
            counts[load_features(path).shape[1]] += 1
        except DataError:
            pass
    if not counts:
        load_features(files[0])
    (channels, _), = counts.most_common(1)

    def encode(loaded):
        return torch.stack([fit_frames(torch.from_numpy(x.astype(np.float32))) for x in loaded])

    return Features(name, channels,
                    lambda data, source: [data / "video/vis_features" / source / name],
                    partial(load_features, channels=channels), encode)


def load_features(path: Path, channels: int | None = None) -> np.ndarray:
    """The array "features" [frames, channels] of one of VALUE's .npz files. Raises DataError."""
    found = ""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            with archive.open("features.npy") as member:
                np.lib.format.read_magic(member)
                shape, by_column, dtype = np.lib.format.read_array_header_1_0(member)
                found = f", not {dtype} {list(shape)}"
                size = math.prod(shape) * dtype.itemsize
                if (len(shape) == 2 and dtype.kind == "f" and 0 < size < MOST_FEATURES
                        and channels in (None, shape[1])):
                    # To its end, where its sum is checked.
                    x = np.frombuffer(member.read(size + 1), dtype)
                    x = x.reshape(shape, order="F" if by_column else "C")
                    if float(np.abs(x).max()) < 65520:  # of float16; false for NaN
                        return x
                    found = ", not NaN or numbers beyond float16"
    except DataError:
        raise
    except Exception:  # many kinds
        pass
    raise DataError(f"{path} is not a file of VALUE's features: expected features.npy, floats "
                    f"[frames, {channels or 'channels'}]{found}")


def fit_frames(features: torch.Tensor, frames: int = FRAMES) -> torch.Tensor:
    """Features [T, C] to [frames, C]: zeros behind, or a max pool.

    original: video/tvqa_data.py#L34

    >>> fit_frames(torch.tensor([[1.], [5.], [2.], [3.]]), 2).T
    tensor([[5., 3.]])
    """
    if len(features) <= frames:
        return F.pad(features, (0, 0, 0, frames - len(features)))
    pooled = F.adaptive_max_pool1d(features.cpu().T[None], frames)[0].T  # MPS has other windows
    return pooled.to(features.device)


class FeatureStore:
    """The visual tokens of one data set's pictures or videos, encoded once.

    features.f16 is memory-mapped float16 [rows, tokens, channels]; index.json says whose they are,
    which row an item has and what its file was; new.jsonl says it of those encoded since. Rows only
    come behind the others, which other processes may be reading.
    """

    def __init__(self, folder: Path, encoder_hash: str, tokens: int, channels: int):
        self.folder = folder
        self.path = folder / "features.f16"
        self.shape = (tokens, channels)
        self.row_size = 2 * tokens * channels
        self.about = {"encoder": encoder_hash, "tokens": tokens, "channels": channels}
        self.read_index()
        self.map()

    def read_index(self):
        """Sets row and files: a name's row; size and time of the file that it was."""
        index, new = self.folder / "index.json", self.folder / "new.jsonl"
        self.row, self.files = {}, {}
        self.count = 0  # of rows
        size, lines = 0, []
        if new.exists():
            with open_regular(new) as file:
                lines = file.read().split(b"\n")[:-1]  # a killed run leaves half a line
        if self.path.exists():
            with open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
        if not index.exists():
            return
        broken = DataError(f"{index} or {new.name} is broken or has features of another "
                           f"encoder; remove {self.folder} to encode anew")
        content = read_json(index)
        if not isinstance(content, dict) or not content.items() >= self.about.items():
            raise broken
        try:
            for part in content, *map(json.loads, lines):
                self.row |= part["pictures"]
                self.files |= part.get("files", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise broken from None

        self.count = size // self.row_size
        rows = self.row.values()
        good = {row for row in rows if type(row) is int and 0 <= row < self.count}
        if len(good) < len(rows):
            raise DataError(f"{index} has a row twice, or one that is none of the {self.count:,} "
                            f"in {self.path}; remove {self.folder} to encode anew")

    def map(self):
        self.features = np.empty((0, *self.shape), np.float16)
        if self.row:
            self.features = np.memmap(self.path, np.float16, "r", shape=(self.count, *self.shape))

    def wanting(self, paths: dict[str, Path]) -> list[str]:
        """The names that have no features, or those of another file than is there."""
        return [name for name, path in paths.items()
                if name not in self.row or self.files.get(name) not in (None, stamp(path))]

    def add(self, paths: dict[str, Path], load: Callable, encode: Callable, size: int = 64,
            say: Callable = print) -> list[DataError]:
        """Encodes what is wanting, `size` files at a time. Returns a DataError for each broken one.

        What is encoded is kept if it is killed. A second process waits for the first and uses it.
        """
        if not self.wanting(paths):
            return []
        self.features = None  # Windows cuts no file that is mapped
        broken = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                lock(file)
                self.read_index()
                # A killed run leaves half a row, and half a line of new.jsonl.
                file.truncate(self.count * self.row_size)
                if self.count:
                    self.save()
                names = self.wanting(paths)
                stamps = {name: stamp(paths[name]) for name in names}
                changed = sum(name in self.row for name in names)
                if changed:
                    say(f"{changed:,} files of {self.folder.parent.name} have changed since they "
                        "were encoded; they are encoded anew")
                loaded = load_ahead([paths[name] for name in names], load, size)
                with tqdm(total=len(paths), initial=len(paths) - len(names), unit=" files",
                          desc=f"encoding {self.folder.parent.name}") as bar:
                    for i in range(0, len(names), size):
                        part = names[i:i + size]
                        broken += self.encode(file, part, loaded, encode, stamps)
                        bar.update(len(part))
                if self.count:
                    self.save()
        except OSError as problem:
            raise DataError(f"{self.path} cannot be written: {problem.strerror or problem}; "
                            "--cache DIR keeps features elsewhere") from None
        self.map()
        return broken

    def encode(self, file, names, loaded, encode, stamps):
        part = dict(zip(names, loaded))
        good = [name for name, x in part.items() if not isinstance(x, DataError)]
        for name in part.keys() - good:
            self.row.pop(name, None)
        if good:
            features = encode([part[name] for name in good])
            if features.shape[1:] != self.shape:
                raise DataError(f"features of {good[0]} have the shape {list(features.shape[1:])}, "
                                f"expected {list(self.shape)}")
            features = features.to(torch.float16).cpu().numpy()
            for name, x in zip(good, features):
                if not all_finite(x):
                    raise DataError(f"features of {name} are beyond float16")
            if not self.count:
                self.save()  # new.jsonl needs an index
            file.write(features.tobytes())
            file.flush()
            os.fsync(file.fileno())
            new = {"pictures": {name: self.count + i for i, name in enumerate(good)},
                   "files": {name: stamps[name] for name in good}}
            with open(self.folder / "new.jsonl", "ab") as journal:
                journal.write(json.dumps(new).encode() + b"\n")
            self.count += len(good)
            self.row |= new["pictures"]
            self.files |= new["files"]
        return [x for x in part.values() if isinstance(x, DataError)]

    def save(self):
        index = self.about | {"pictures": self.row, "files": self.files}
        write_atomically(self.folder / "index.json", json.dumps(index).encode())
        with open(self.folder / "new.jsonl", "wb"):
            pass  # it is empty, not absent, lest another process be looking for it


def all_finite(x: np.ndarray) -> bool:
    """Of float16. As integers, infinity and NaN are greatest: ten times faster than np.isfinite."""
    return x.view(np.int16).max() < 0x7C00 and x.view(np.uint16).max() < 0xFC00


def stamp(path):
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


@cache
def warn_of_no_lock():
    print("no file locks here: encode with one process at a time", file=sys.stderr)


def lock(file):
    """Waits for other processes, where the system and the disk can."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        warn_of_no_lock()


def load_ahead(paths, load, depth):
    """The loaded files, or the DataError in the place of a broken one."""
    def attempt(path):
        try:
            return load(path)
        except DataError as problem:
            return problem

    return prefetch(attempt, paths, depth)


def prefetch(work, items, depth, threads=None):
    """work(item) of each item, in order, by threads that are up to `depth` items ahead."""
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        jobs = deque(pool.submit(work, item) for item in islice(items, depth))
        while jobs:
            yield jobs.popleft().result()
            jobs.extend(pool.submit(work, item) for item in islice(items, 1))


# ---- examples become batches ----


def open_corpora(data: Path, name: str, features: Features, tokenizer: Tokenizer,
                 *splits: dict[str, str], prompts: bool = True, allow_missing: bool = False,
                 say: Callable = print, cache: Path | None = None,
                 first: Callable = nullcontext) -> list[dict[str, "Corpus"]]:
    """For each {task: split} a {task: corpus}. What is made lies in `cache`, or else in `data`: the
    store in features/SOURCE/NAME, examples as integers in corpora/.

    Missing files raise DataError before any is encoded, or, allow_missing, are left out. first() is
    a context in which one process goes before the others: it encodes, they find it done.
    """
    def refuse(bad, names, source, what):
        if bad and not allow_missing:
            raise DataError(f"{len(bad):,} of {len(names):,} {media(source)} are {what}, the first:"
                            f" {bad[0]} (--allow-missing goes on without them)")

    made = cache or data
    kept = Shelf(data, made / "corpora", tokenizer, prompts, say)
    encoded = {}  # (task, split) -> Encoded
    for task in dict.fromkeys(task for part in splits for task in part):
        theirs = dict.fromkeys(part[task] for part in splits if task in part)
        for split, examples in kept.get(task, *theirs).items():
            encoded[task, split] = examples
    needed = defaultdict(dict)  # source -> names of its pictures, in order
    for part in splits:
        for pair in part.items():
            needed[TASKS[pair[0]].pictures].update(dict.fromkeys(encoded[pair].names))

    with first():
        # Find what no store has yet, then encode it.
        stores, found = {}, {}
        for source, names in needed.items():
            tokens = FRAMES if source in VIDEOS else VISUAL_SIDE ** 2
            folder = made / "features" / source / name
            store = FeatureStore(folder, features.hash, tokens, features.channels)
            folders = features.folders(data, source)
            below = " and ".join(map(str, folders))
            found[source] = find_files(folders, names, source in VIDEOS)
            known = store.row.keys() | found[source].keys()
            lost = [name for name in names if name not in known]
            refuse(lost, names, source, f"missing below {below}")
            stores[source] = store
        for source, store in stores.items():
            broken = store.add(found[source], features.load, features.encode,
                               size=4 if source in VIDEOS else 64, say=say)
            refuse(broken, found[source], source, "unreadable")

    # A corpus of the examples whose pictures are there.
    corpora = []
    for part in splits:
        corpora.append({})
        for task, split in part.items():
            place = f"{task}, {split}"
            examples = encoded[task, split]
            corpus = Corpus(task, examples, tokenizer, stores[TASKS[task].pictures], prompts)
            count = len(examples.arrays["text"])
            if len(corpus) < count:
                say(f"{place}: {len(corpus):,} of {count:,} examples have their "
                    f"pictures, {100 * len(corpus) / count:.1f} %")
            if not len(corpus):
                raise DataError(f"{place}: no example has its pictures")
            if corpus.silent and TASKS[task].video:
                say(f"{place}: {corpus.silent:,} of {len(corpus):,} examples have no subtitles")
            corpora[-1][task] = corpus
    return corpora


def media(source):
    return "videos" if source in VIDEOS else "pictures"


# Of an Encoded, by name: what array.array calls the numbers. Rows of different lengths lie one
# behind the other, row i from ends[i] to ends[i + 1].
ARRAYS = {
    "text": "i",  # [examples], the number of its text
    "pictures": "i",  # [examples x pictures], numbers of names
    "silent": "b",  # [examples], whether it has no subtitles
    "ids": "i", "ids_ends": "q",  # a row for each text
    "drawn": "i", "weights": "d", "drawn_ends": "q",  # for each example: answers, their weights
    "targets": "i", "targets_ends": "q"}  # for each answer


@dataclass
class Encoded:
    """The examples of a split as integers: each text, name and answer once, all others numbers."""
    arrays: dict[str, np.ndarray]
    names: list[str]  # of pictures
    examples: list[Example] | None  # None where they are not needed, for they take memory


class Encoder:
    """Makes an `Encoded`, an example at a time."""

    def __init__(self, task: str, tokenizer: Tokenizer, prompts: bool = True, keep: bool = True):
        self.task = task
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.arrays = {name: array(kind) for name, kind in ARRAYS.items()}
        for name in "ids_ends", "drawn_ends", "targets_ends":
            self.arrays[name].append(0)
        self.texts, self.names, self.answers = {}, {}, {}  # each -> its number
        self.examples = [] if keep else None

    def add(self, e: Example):
        text = (e.text, e.subtitles) if e.subtitles else e.text
        number = self.texts.setdefault(text, len(self.texts))
        if number == len(self.arrays["ids_ends"]) - 1:
            self.append("ids", text_ids(self.tokenizer, self.task, e, self.prompts))
        self.arrays["text"].append(number)
        self.arrays["silent"].append(not e.subtitles)
        for name in e.pictures:
            self.arrays["pictures"].append(self.names.setdefault(name, len(self.names)))

        learned = {answer: weight for answer, weight in e.answers.items() if weight > 0}
        for answer, weight in (learned or {"": 0.0}).items():
            number = self.answers.setdefault(answer, len(self.answers))
            if number == len(self.arrays["targets_ends"]) - 1:
                row = TASKS[self.task]
                self.append("targets", self.tokenizer.encode(answer, row.answer))
            self.arrays["weights"].append(weight)
            self.arrays["drawn"].append(number)
        self.append("drawn", ())
        if self.examples is not None:
            self.examples.append(e)

    def append(self, name, row):
        self.arrays[name].extend(row)
        self.arrays[name + "_ends"].append(len(self.arrays[name]))

    def encoded(self) -> Encoded:
        arrays = {name: np.array(x) for name, x in self.arrays.items()}
        return Encoded(arrays, [*self.names], self.examples)


class Shelf:
    """Keeps what is `Encoded`, for reading 2 GB of annotations takes a minute.

    A file is used if its annotations, the tokenizer and this code have the hashes they had, and so
    has the file; else it is made anew. Process 0 writes, all read.
    """

    def __init__(self, data: Path, folder: Path, tokenizer: Tokenizer, prompts: bool,
                 say: Callable):
        self.data = data
        self.folder = folder
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.say = say
        self.hashes = {}  # of annotations
        code = [sha256(Path(__file__).with_name(name)) for name in ("data.py", "tokenizer.py")]
        self.key = [*code, sys.version, tokenizer.hash, prompts]

    def get(self, task: str, *splits: str) -> dict[str, Encoded]:
        """Splits of a task, of which those that are not kept are read."""
        found = {split: self.load(task, split) for split in splits}
        new = [split for split in splits if not found[split]]
        if not new:
            return found
        others = os.environ.get("RANK", "0") != "0"  # torchrun's
        with tqdm(desc=f"reading {task}", unit="B", unit_scale=True, leave=False,
                  disable=others) as bar:
            files = Files(self.data, bar)
            encoders = {split: Encoder(task, self.tokenizer, self.prompts,
                                       keep=split != TASKS[task].train) for split in new}
            for split, e in stream_examples(files, task, *new):
                encoders[split].add(e)
        for split in new:
            found[split] = encoders.pop(split).encoded()
            if not others:
                self.save(task, split, found[split], files.used)
        return found

    def path(self, task, split):
        prompts = "" if self.prompts else "_without_prompts"
        return self.folder / f"{task}_{split}_{self.tokenizer.hash[:12]}{prompts}.npz"

    def save(self, task, split, encoded, used):
        row = TASKS[task]
        if not self.tokenizer.hash or split not in (row.train, row.validation, row.test):
            return
        about = {"key": self.key, "used": used, "names": encoded.names, "examples": None}
        if encoded.examples is not None:
            about["examples"] = [list(map(partial(getattr, e), Example.__slots__))
                                 for e in encoded.examples]
        content = io.BytesIO()
        text = json.dumps(about).encode()
        np.savez(content, about=np.frombuffer(text, np.uint8), **encoded.arrays)
        digest = hashlib.sha256(content.getbuffer()).digest()
        content.write(digest)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path(task, split), content.getbuffer())
        except OSError as problem:
            self.say(f"{self.folder} cannot be written ({problem.strerror}): {task}'s {split} will "
                     "be read again by each start")

    def load(self, task, split) -> Encoded | None:
        try:
            with open_regular(self.path(task, split)) as file:
                content = memoryview(file.read())
        except (OSError, DataError):
            return None
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            return None
        with np.load(io.BytesIO(content[:-32]), allow_pickle=False) as archive:
            arrays = dict(archive)
        about = json.loads(arrays.pop("about").tobytes())
        if about["key"] != self.key or not all(map(self.same, *zip(*about["used"].items()))):
            return None
        examples = about["examples"]
        if examples is not None:
            examples = [Example(number, tuple(pictures), *more)
                        for number, pictures, *more in examples]
        return Encoded(arrays, about["names"], examples)

    def same(self, name: str, digest: str | None) -> bool:
        """Whether a file of annotations is what it was, or is still not there."""
        if name not in self.hashes:
            path = self.data / name
            self.hashes[name] = sha256(path) if path.exists() else None
        return self.hashes[name] == digest


class Corpus:
    """The examples of a task's split that have their pictures, as integers, in batches."""

    def __init__(self, task: str, examples: list[Example] | Encoded, tokenizer: Tokenizer,
                 store: FeatureStore, prompts: bool = True):
        if not isinstance(examples, Encoded):
            encoder = Encoder(task, tokenizer, prompts)
            for e in examples:
                encoder.add(e)
            examples = encoder.encoded()
        self.task = task
        self.store = store
        self.pad = tokenizer.pad
        a = examples.arrays
        rows = np.array([store.row.get(name, -1) for name in examples.names])
        rows = rows[a["pictures"]].reshape(len(a["text"]), -1)
        there = (rows >= 0).all(1)
        self.rows = rows[there]  # [examples, pictures]
        self.arrays = a
        self.numbers = np.flatnonzero(there)  # [examples], which of a's they are
        self.silent = int(a["silent"][there].sum())
        self.examples = examples.examples and [examples.examples[i] for i in self.numbers]

        # The longest text and answer of those that are there.
        drawn = a["drawn"][np.repeat(there, np.diff(a["drawn_ends"]))]
        self.width = np.diff(a["ids_ends"])[a["text"][there]].max(initial=0)
        self.length = np.diff(a["targets_ends"])[drawn].max(initial=0)

    def __len__(self):
        return len(self.rows)

    def row(self, name: str, i: int) -> np.ndarray:
        ends = self.arrays["drawn_ends" if name == "weights" else name + "_ends"]
        return self.arrays[name][ends[i]:ends[i + 1]]


    def batch(self, indices: np.ndarray, size: int, seed=None, part: slice = slice(None),
              pin: bool = False) -> dict[str, torch.Tensor]:
        """Examples as the tensors that `VLModel.loss` takes, or without a seed only its inputs.

        Rows of weight 0 fill up to `size`. part: rows of one process. text_indices and
        label_indices say what is no padding, so that the device need not be asked.
        """
        real = len(indices)
        indices = np.concatenate([indices, np.full(size - real, indices[0])])
        texts = [self.row("ids", i) for i in self.arrays["text"][self.numbers[indices[part]]]]
        ids = torch.from_numpy(pad_rows(texts, self.width, self.pad)).long()
        rows = self.rows[indices[part]]
        if pin:  # modes but "clip" copy once more
            shape = (*rows.shape, *self.store.features.shape[1:])
            features = torch.empty(*shape, dtype=torch.float16, pin_memory=True)
            np.take(self.store.features, rows, axis=0, out=features.numpy(), mode="clip")
        else:
            features = torch.from_numpy(self.store.features[rows])
        if not all_finite(features.numpy()):
            raise DataError(f"{self.store.path} has numbers that are not finite; "
                            f"remove {self.store.folder} to encode anew")
        batch = {"ids": ids,  # [batch, length]
                 "features": features}  # [batch, pictures, tokens, channels]
        if seed is not None:
            labels, weights = self.sample(indices, real, seed)
            labels = torch.from_numpy(labels[part].astype(np.int64))
            weights = torch.from_numpy(weights[part].astype(np.float32))
            batch |= {"labels": labels,  # [batch, answer length], -100 behind
                      "weights": weights,  # [batch]
                      "text_indices": token_indices(ids != self.pad),
                      "label_indices": token_indices(labels != -100)}
        return {name: x.pin_memory() for name, x in batch.items()} if pin else batch

    def sample(self, indices, real, seed):
        """Labels and weights of a whole batch, so that all processes draw the same answers.

        The loss is the mean over the batch of weight x mean over tokens. A weight is an answer's
        score, 0 from row `real` on; for captions it makes a mean over all tokens.
        original: vqa_model.py#L221, caption_model.py#L82
        """
        rng = random.Random(seed)
        answers = []
        for i in self.numbers[indices]:
            choices = zip(self.row("drawn", i).tolist(), self.row("weights", i).tolist())
            answers.append(sample_answer([*choices], rng))
        targets = [self.row("targets", number) for number, _ in answers]
        labels = pad_rows(targets, self.length, -100)
        weights = np.array([weight for _, weight in answers])
        if TASKS[self.task].token_mean:
            tokens = (labels != -100).sum(1)
            weights = weights * tokens / tokens[:real].mean()
        weights = weights * len(indices) / real
        weights[real:] = 0
        return labels, weights


def text_ids(tokenizer: Tokenizer, task: str, example: Example, prompts: bool = True,
             length: int | None = None) -> list[int]:
    """The text with its prompt. Of one longer than `length`, or the task's, the subtitles are cut.

    The original cuts on the right, where the question is: video/tvqa_data.py#L206
    """
    row = TASKS[task]
    length = length or row.text
    text = row.prompt.format(example.text) if prompts else example.text
    if not row.video:
        return tokenizer.encode(text, length)
    said = f"[Subs] {example.subtitles}".rstrip()
    ids = tokenizer.encode(f"{said} {text.lstrip()}")
    return cut(ids, len(tokenizer.encode(said)) - 1, length)


def cut(ids, end, length):
    """At most `length` ids: those just before `end` go; if too few, those before the last.

    Of <s> 11 12 13 14 21 22 </s>, where 11 to 14 are subtitles:

    >>> cut([0, 11, 12, 13, 14, 21, 22, 2], 5, 6)
    [0, 11, 12, 21, 22, 2]
    """
    if len(ids) > length:
        begin = max(1, end - (len(ids) - length))
        ids = ids[:begin] + ids[end:]
    return ids if len(ids) <= length else [*ids[:length - 1], ids[-1]]


def sample_answer(choices, rng):
    """One answer and its weight, with a chance in proportion to it.

    original: vqa_clip_data.py#L258
    """
    if len(choices) == 1:
        return choices[0]
    return rng.choices(choices, [weight for _, weight in choices])[0]


def pad_rows(rows: list[list[int]], length: int, value: int) -> np.ndarray:
    """int32 [rows, length].

    >>> pad_rows([[5, 6, 7], [8]], 4, -100).tolist()
    [[5, 6, 7, -100], [8, -100, -100, -100]]
    """
    padded = np.full((len(rows), length), value, np.int32)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = row
    return padded


def batches(corpora: dict[str, Corpus], batch: int, seed: int, epoch: int, skip: int = 0,
            rank: int = 0, world: int = 1, accumulate: int = 1,
            pin: bool = False) -> Iterator[tuple[str, list[dict]]]:
    """The batches of an epoch from number `skip` on: (task, the parts of this process).

    A batch has a task's share of `batch` x `accumulate` examples over all processes and is filled
    up: of every world x accumulate rows a part has one. Threads are ahead by three.

    >>> class Rows(list):  # its batches are the numbers of its examples
    ...     def batch(self, indices, size, seed, part, pin):
    ...         return [*indices.tolist(), *[-1] * (size - len(indices))][part]
    >>> corpora = {"vqa": Rows(range(7))}
    >>> mixture(corpora, {"vqa": 8}, seed=0, epoch=0)
    [('vqa', array([3, 2, 0, 1, 4, 6, 5]))]
    >>> list(batches(corpora, 4, seed=0, epoch=0, rank=1, world=2, accumulate=2))
    [('vqa', [[2, 6], [1, -1]])]
    """
    sizes = {task: batch_size(task, batch * accumulate, len(corpus))
             for task, corpus in corpora.items()}
    mixed = mixture(corpora, sizes, seed, epoch)
    first = epoch * len(mixed) + skip  # its number over all epochs, for seeds

    def make(job):
        number, (task, indices) = job
        parts = min(accumulate, -(-sizes[task] // world))  # each has a row
        stride = world * parts
        padded = -(-sizes[task] // stride) * stride
        return task, [corpora[task].batch(indices, padded, f"{seed} {number}",
                                          slice(rank + world * i, None, stride), pin)
                      for i in range(parts)]

    return prefetch(make, enumerate(mixed[skip:], first), 3, threads=2)


def batch_size(task: str, batch: int, count: int) -> int:
    """A task's share of --batch, at most all of its `count` examples."""
    return max(1, min(int(TASKS[task].batch * batch), count))


def steps_per_epoch(corpora: dict[str, Corpus], batch: int) -> int:
    """batch: of a step, so --batch times --accumulate."""
    return sum(-(-len(corpus) // batch_size(task, batch, len(corpus)))
               for task, corpus in corpora.items())


def mixture(corpora: dict[str, Corpus], sizes: dict[str, int], seed: int,
            epoch: int) -> list[tuple[str, np.ndarray]]:
    """The batches of an epoch, each of one task; by seed and epoch alone, for resuming.

    original: multitask_data.py#L33

    >>> mixture({"vqa": range(3), "gqa": range(3)}, {"vqa": 2, "gqa": 3}, seed=0, epoch=0)
    [('vqa', array([1, 2])), ('gqa', array([2, 1, 0])), ('vqa', array([0]))]
    """
    mixed = []
    for task, corpus in corpora.items():
        rng = random.Random(f"{seed} {epoch} {task}")
        order = np.array(rng.sample(range(len(corpus)), len(corpus)))
        mixed += [(task, order[i:i + sizes[task]]) for i in range(0, len(order), sizes[task])]
    random.Random(f"{seed} {epoch}").shuffle(mixed)
    return mixed


# ---- the command line ----


def report_problems(main: Callable, *problems: type):
    """Runs a command. What a user can mend ends it in one sentence, exit code 2."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal cannot show
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except Exception as problem:
        if lack := out_of_memory(problem):
            problem = (f"{lack}: try a smaller --batch, in training with --accumulate, or "
                       "--recompute")
        elif not isinstance(problem, (DataError, OSError, *problems)):
            raise
        print(f"\n{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
        sys.exit(2)


def out_of_memory(problem: BaseException) -> str:
    """What there is too little of, if that is the problem, or ""."""
    text = str(problem) if isinstance(problem, RuntimeError) else ""
    if isinstance(problem, torch.OutOfMemoryError) or re.search("out of mem|ALLOC_FAILED", text):
        return "out of GPU memory"
    if isinstance(problem, MemoryError) or re.search("not enough mem|can't allocate mem", text):
        return "out of memory"
    return ""


def task_list(text: str) -> list[str]:
    tasks = text.split(",")
    for task in tasks:
        if task not in TASKS:
            raise argparse.ArgumentTypeError(
                f"unknown task: {task!r}; known are {', '.join(TASKS)}")
    return list(dict.fromkeys(tasks))


def report_examples(data, task, pictures):
    """A line a split: what is there or where to get it. Adds needed pictures."""
    row = TASKS[task]
    needed = (row.train, row.validation, row.test)
    good = True
    for split in dict.fromkeys((*needed, *row.submission)):
        count = without = 0
        seen = {}
        try:
            for _, e in stream_examples(Files(data), task, split):
                count += 1
                without += not (e.subtitles if row.video else e.answers)
                seen.update(dict.fromkeys(e.pictures))
        except (DataError, OSError) as problem:
            advice = f"get it at {row.source}" if split in needed else "needed for submissions only"
            print(f"{task:<8}{split:<20}{problem}\n{'':28}{advice}")
            good &= split not in needed
            continue
        published = row.counts.get(split)
        note = f" (published: {published:,})" if published else ""
        if count == published:
            note = " (as published)"
        what = "subtitles" if row.video else "an answer to learn"
        print(f"{task:<8}{split:<20}{count:>9,} examples{note}, {without:,} without {what}")
        if split in needed:
            pictures.update(seen)
    return good


def report_files(data, source, names):
    """How many pictures or videos, or released features, are there and readable."""
    video = source in VIDEOS
    places = [folders_of(data, source)]
    released = (data / "video/vis_features" / source).glob("*")
    places += [[folder] for folder in sorted(released)]
    tried = [(folders, find_files(folders, names, video)) for folders in places]
    folders, found = max(tried, key=lambda pair: len(pair[1]))
    missing = [name for name in names if name not in found]

    def probe(path):
        if path.suffix == ".npz":
            load_features(path)
        else:
            (load_video if video else load_picture)(path, 32)

    loaded = tqdm(load_ahead(found.values(), probe, 192), f"looking at {source}", len(found),
                  unit=" files")
    broken = [str(x) for x in loaded if isinstance(x, DataError)]
    print(f"{source:<8}{len(names):>9,} {media(source)}, {len(missing):,} missing, "
          f"{len(broken):,} unreadable below {' and '.join(map(str, folders))}")
    for line in missing[:10] + broken[:10]:
        print(" " * 8 + line)
    return not missing and not broken


def main():
    parser = argparse.ArgumentParser(
        description="Says which data are there and where to get the others.", allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR",
                        help="folder with vqa/, COCO/, GQA/, ...")
    parser.add_argument("--tasks", type=task_list, default=list(TASKS), metavar="A,B",
                        help="default: all")
    args = parser.parse_args()
    needed = defaultdict(dict)  # source -> names of its pictures
    good = [report_examples(args.data, task, needed[TASKS[task].pictures]) for task in args.tasks]
    good += [report_files(args.data, source, names) for source, names in needed.items() if names]
    if not all(good):
        sys.exit(2)


if __name__ == "__main__":
    report_problems(main)
