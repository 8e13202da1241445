"""Pixels and words become tensors.

Readers of the official files come first and end in the table of tasks; then pictures, videos and the store of their
features, and batches of one shape. `python data.py --data DIR` says what of all that is there.

Layout of DIR, as the official archives unpack and as the authors' repository has it:

    vqa/    v2_OpenEnded_mscoco_{train2014,val2014}_questions.json   v2_mscoco_{train2014,val2014}_annotations.json
    COCO/   images/**/*.jpg   dataset_coco.json
    GQA/    images/*.jpg   {train,val,testdev}_balanced_questions.json          or VG/**/*.jpg for the pictures
    nlvr/   images/**/*.png   {train,dev,test1}.json
    video/  ann/{tvqa,how2qa,tvc,yc2c}/*.jsonl   ann/{tv,how2,yc2}_subtitles.jsonl
            videos/{tv,how2,yc2}/NAME.mp4, or folders NAME/*.jpg at 3 fps
            or, for --vision clip-vit, vis_features/{tv,how2,yc2}/clip-vit/NAME.npz

Paper: https://arxiv.org/abs/2112.06825, section 4. Needs torch, numpy, pillow, av, tqdm and of ours tokenizer.py.
"""

import argparse
import fcntl
import json
import math
import os
import random
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from tokenizer import Tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # CLIP's, of pixels in 0..1
FRAMES, FPS = 64, Fraction(2, 3)                        # visual tokens of a video, frames a second (VALUE's features)


class DataError(ValueError):
    """The data cannot be used as they are; the message names the file and what was expected."""


@dataclass(slots=True)
class Example:
    """One question, statement, picture to describe, ..., from whatever data set."""
    id: int | str
    pictures: tuple[str, ...]                # names of files, without folder and suffix; or of one video
    text: str
    answers: dict[str, float]                # what may be learned, with weights; empty where there are no labels
    kind: str = ""                           # the kind of question, for blind baselines
    truth: dict = field(default_factory=dict)       # what the metric wants to know
    subtitles: str = ""                      # of a video: stands before the text, and is cut where both are too long


# ---- VQAv2 --------------------------------------------------------------------------------------------------------

KARPATHY = {"karpathy_train": ("train", "restval"), "karpathy_val": ("val",), "karpathy_test": ("test",)}
SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)                 # of an answer that 0, 1, 2, 3, or 4 and more of ten people gave
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
    when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in CONTRACTED for i, mark in enumerate(word) if mark == "'"}
CONTRACTIONS |= {"somebody'd": "somebodyd"}             # sic: the official table has it the wrong way round


def vqa_punctuation(text: str) -> str:
    """The official processPunctuation: a mark beside a space, or every mark of a text with a number like 1,000, goes."""
    result, number = text, re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", result)


def vqa_digits_and_articles(text: str) -> str:
    """The official processDigitArticle: number words to digits, no articles, apostrophes put back."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_normal_form(answer: str) -> str:
    """An answer as the official evaluation compares it (vqaEval.py of GT-Vision-Lab/VQA)."""
    return vqa_digits_and_articles(vqa_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def vqa_vocabulary(folder: Path, annotations: Iterable[dict]) -> set[str]:
    """The answers that may be learned: those of trainval_ans2label.json, or else the 3,129 given at least nine times.

    The rule is that of the bottom-up-attention code, which everybody uses: it counts commonest answers in normal form.
    """
    listed = folder / "trainval_ans2label.json"
    if listed.exists():
        return set(read_json(listed))
    counts = Counter(vqa_normal_form(a["multiple_choice_answer"]).replace(",", "") for a in annotations)
    return {answer for answer, count in counts.items() if count >= 9}


def read_vqa(data: Path, split: str) -> list[Example]:
    """Karpathy's parts of train2014 and val2014 together, or test2015; an answer's weight is its soft score."""
    if split == "test2015":
        path = data / "vqa" / "v2_OpenEnded_mscoco_test2015_questions.json"
        return [Example(r["question_id"], (f"COCO_test2015_{r['image_id']:012d}",), r["question"], {})
                for r in records(path, "question_id", "image_id", "question", key="questions")]
    years, listed = ("train2014", "val2014"), data / "vqa" / f"{split}.json"
    asked, given = ([data / "vqa" / name.format(year) for year in years] for name in (
        "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"))
    if listed.exists() and not asked[0].exists():           # VL-T5's list, in the place of the official files
        return [Example(r["question_id"], (r["img_id"],), r["sent"], r["label"], r.get("question_type", ""),
                        {"answers": [a["answer"] for a in r.get("answers", ())], "type": r.get("answer_type", "")})
                for r in records(listed, "question_id", "img_id", "sent", "label",
                                 *(() if split == "karpathy_train" else ["answers"]))]
    coco = data / "COCO" / "dataset_coco.json"
    images = records(coco, "cocoid", "filepath", "split", key="images")
    members = {image["cocoid"]: image["filepath"] for image in images if image["split"] in KARPATHY[split]}
    annotations, questions = {}, {}
    for i, year in enumerate(years):
        questions |= by_id(records(asked[i], "question_id", "image_id", "question", key="questions"), asked[i])
        annotations |= by_id(records(given[i], "question_id", "image_id", "answers", "multiple_choice_answer",
                                     key="annotations"), given[i])
        if questions.keys() != annotations.keys():
            odd = min(questions.keys() ^ annotations.keys())
            raise DataError(f"{data / 'vqa'}: the questions and annotations of {year} do not match; "
                            f"question {odd} is in one of the two files only")
    vocabulary, examples = vqa_vocabulary(data / "vqa", annotations.values()), []
    for number, question in questions.items():
        image = question["image_id"]
        if image in members:
            annotation = annotations[number]
            people = [answer["answer"] for answer in annotation["answers"]]
            answers = {answer: SOFT_SCORES[min(count, 4)] for answer, count in Counter(people).items()
                       if answer in vocabulary}
            examples.append(Example(number, (f"COCO_{members[image]}_{image:012d}",), question["question"], answers,
                                    annotation.get("question_type", ""),
                                    {"answers": people, "type": annotation.get("answer_type", "")}))
    return examples


# ---- GQA ----------------------------------------------------------------------------------------------------------


def read_gqa(data: Path, split: str) -> list[Example]:
    """The balanced questions of one or more official parts ("train,val"), or all questions of one ("testdev_all").

    Where there is no file of all, the balanced ones do; where there is VL-T5's list, as train.json, it does.
    """
    converted, examples = {"val": "valid", "submission": "submit"}, []
    for part in split.split(","):
        part, every = part.removesuffix("_all"), part.endswith("_all")
        balanced, path = (data / "GQA" / f"{part}_{kind}_questions.json" for kind in ("balanced", "all"))
        if not every or not path.exists() and balanced.exists():
            path = balanced
        if not path.exists() and (listed := data / "GQA" / f"{converted.get(part, part)}.json").exists():
            for r in records(listed, "question_id", "img_id", "sent"):
                label = r.get("label") or {}
                examples.append(Example(str(r["question_id"]), (str(r["img_id"]),), r["sent"], label, "",
                                        {"answer": max(label, key=label.get, default=None)}))
            continue
        content = read_json(path)
        foreign = DataError(f"{path} is not GQA's: expected an object {{question id: {{imageId, question, ...}}}}")
        if not isinstance(content, dict):
            raise foreign
        for number, r in content.items():
            if not isinstance(r, dict) or not {"imageId", "question"} <= r.keys():
                raise foreign
            types = r.get("types") or {}
            examples.append(Example(number, (r["imageId"],), r["question"], {r["answer"]: 1.0} if "answer" in r else {},
                                    types.get("detailed", ""),
                                    {"answer": r.get("answer"), "structural": types.get("structural", ""),
                                     "balanced": r.get("isBalanced", True), "entailed": r.get("entailed", ())}))
    return examples


# ---- NLVR2 --------------------------------------------------------------------------------------------------------


def read_nlvr(data: Path, split: str) -> list[Example]:
    """Statements on two pictures, left and right, from the official JSON lines or VL-T5's list."""
    listed = data / "nlvr" / {"dev": "valid.json", "test1": "test.json"}.get(split, f"{split}.json")
    path, examples = data / "nlvr" / f"{split}.json", []
    path = listed if listed.exists() and not path.exists() else path
    for r in records(path, "identifier"):
        if "sent" in r:
            pictures, text, label = (r.get("img0"), r.get("img1")), r["sent"], r.get("label")
        else:
            pair = r["identifier"].rpartition("-")[0]       # split-set-pair, without the number of the sentence
            pictures, text, label = (f"{pair}-img0", f"{pair}-img1"), r.get("sentence"), r.get("label")
        label = {"True": "true", "False": "false", 1: "true", 0: "false", None: None}.get(label, "")
        if not text or label == "" or None in pictures:
            raise DataError(f"{path}: {r['identifier']} should have a sentence and a label True or False")
        examples.append(Example(r["identifier"], pictures, text, {label: 1.0} if label else {}, "", {"answer": label}))
    return examples


# ---- COCO captions ------------------------------------------------------------------------------------------------


def read_captions(data: Path, split: str) -> list[Example]:
    """For training one example a caption; elsewhere one a picture, with all its captions as references.

    Besides Karpathy's splits, for the COCO server: val2014 of dataset_coco.json, test2014 of image_info_test2014.json.
    """
    if split == "test2014":
        path = data / "COCO" / "image_info_test2014.json"
        return [Example(r["id"], (Path(r["file_name"]).stem,), "", {})
                for r in records(path, "id", "file_name", key="images")]
    examples = []
    for r in records(data / "COCO" / "dataset_coco.json", "cocoid", "filename", "filepath", "split", "sentences",
                     key="images"):
        if r["split"] in KARPATHY.get(split, ()) or r["filepath"] == split:
            picture, captions = (Path(r["filename"]).stem,), [(s["sentid"], s["raw"].strip()) for s in r["sentences"]]
            if split == "karpathy_train":
                examples += [Example(number, picture, "", {caption: 1.0}) for number, caption in captions]
            else:
                examples.append(Example(r["cocoid"], picture, "", {}, "", {"references": [text for _, text in captions]}))
    return examples


# ---- videos: TVQA, How2QA, TVC, YC2C as the VALUE benchmark publishes them ----------------------------------------


def read_subtitles(data: Path, videos: str) -> dict[str, str]:
    """All that is said in each video, joined."""
    path = data / "video" / "ann" / f"{videos}_subtitles.jsonl"
    return {str(r["vid_name"]): " ".join(line.get("text", "").strip() for line in r["sub"])
            for r in records(path, "vid_name", "sub")}


def choose_from(question: str, moment: str, choices: Iterable[str]) -> str:
    """A question with its moment and its numbered answers, to be answered by "a2"."""
    listed = " ".join(f"a{i}: {choice.strip(' .')}." for i, choice in enumerate(choices))
    return f"[Q] {question} [TS] ({moment}) [Choices] {listed}"


def read_choices(task: str, videos: str, choices: int, data: Path, split: str) -> list[Example]:
    """TVQA and How2QA. A moment that is "NaN-NaN" stays that, as in the original."""
    said, names, examples = read_subtitles(data, videos), [f"a{i}" for i in range(choices)], []
    for r in records(data / "video" / "ann" / task / f"{task}_{split}.jsonl", "qid", "q", "ts", "vid_name", *names):
        right = f"a{r['answer_idx']}" if "answer_idx" in r else None
        if right and right not in names:
            raise DataError(f"{task}'s {split}: {r['qid']} has the answer_idx {r['answer_idx']!r}, not one of its answers")
        video, text = str(r["vid_name"]), choose_from(r["q"], r["ts"], [r[name] for name in names])
        examples.append(Example(r["qid"], (video,), text, {right: 1.0} if right else {},
                                " ".join(r["q"].split()[:2]).lower(),
                                {"answer": right, "show": r.get("show_name") or ""}, said.get(video, "")))
    return examples


def read_moments(task: str, videos: str, data: Path, split: str) -> list[Example]:
    """TVC and YC2C: for training one example a description; elsewhere one a clip, with all its descriptions."""
    said, examples = read_subtitles(data, videos), []
    for r in records(data / "video" / "ann" / task / f"{task}_{split}.jsonl", "clip_id", "vid_name"):
        video, descriptions = str(r["vid_name"]), r.get("descs", ())
        about = dict(pictures=(video,), text=f"[TS] ({r['ts']})" if "ts" in r else "", subtitles=said.get(video, ""))
        if split.startswith("train"):
            if not descriptions:
                raise DataError(f"{task}'s {split}: clip {r['clip_id']} has no descriptions to learn from")
            examples += [Example(id=d["desc_id"], answers={d["desc"].strip(): 1.0}, **about) for d in descriptions]
        else:
            truth = {"references": [d["desc"] for d in descriptions], "video": video, "ts": r.get("ts")}
            examples.append(Example(id=r["clip_id"], answers={}, truth=truth, **about))
    return examples


# ---- the table of tasks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    prompt: str                              # around the text, so that one adapter can tell the tasks apart
    text: int                                # longest question in tokens, with its subtitles
    answer: int                              # longest answer to learn, in tokens
    batch: float                             # size of a batch, relative to --batch
    read: Callable[[Path, str], list[Example]]
    train: str                               # names of splits
    validation: str
    test: str
    counts: dict[str, int]                   # how many examples the official splits have
    metric: str                              # a key of evaluate.METRICS
    pictures: str                            # a key of FOLDERS: whose pictures or videos it asks about
    submission: dict[str, str]               # split -> file that the official server wants
    source: str                              # where to get it
    beams: int = 1                           # of beam search, in evaluation
    choices: tuple[str, ...] = ()            # the only answers there are: the likeliest by its first token
    token_mean: bool = False                 # the loss is a mean over the tokens of the batch, not over its examples

    @property
    def video(self) -> bool:
        return self.pictures in VIDEOS


COCO_SOURCE = "https://cocodataset.org and caption_datasets.zip of https://cs.stanford.edu/people/karpathy/deepimagesent"
VALUE_SOURCE = "https://github.com/VALUE-Leaderboard/DataRelease"
TASKS = {  # lengths, batches, beams and splits: multitask.py and multitask_video.py of the original, whose prompt for GQA
    # is "gpa: ", a slip of the pen; NLVR2 has no longest text there
    "vqa": Task("vqa: {}", 20, 10, 1, read_vqa, "karpathy_train", "karpathy_val", "karpathy_test",
                {"karpathy_train": 605102, "karpathy_val": 26729, "karpathy_test": 26280, "test2015": 447793}, "vqa",
                "COCO", {"test2015": "vqa_OpenEnded_mscoco_test2015_vladapter_results.json"},
                f"https://visualqa.org/download.html, {COCO_SOURCE}"),
    "gqa": Task("gqa: {}", 20, 10, 5 / 3, read_gqa, "train,val", "testdev", "testdev_all",
                {"train,val": 1075062, "testdev": 12578, "testdev_all": 172174}, "gqa", "GQA",
                {"submission_all": "gqa_submission_all.json"},
                "https://cs.stanford.edu/people/dorarad/gqa/download.html"),
    "nlvr": Task("nlvr: {}", 100, 10, 1 / 3, read_nlvr, "train", "dev", "test1",
                 {"train": 86373, "dev": 6982, "test1": 6967}, "nlvr", "NLVR2", {"test1": "nlvr2_test1.csv"},
                 "https://github.com/lil-lab/nlvr, folder nlvr2", choices=("false", "true")),
    "caption": Task("caption: {}", 40, 40, 5 / 6, read_captions, "karpathy_train", "karpathy_val", "karpathy_test",
                    {"karpathy_train": 566747, "karpathy_val": 5000, "karpathy_test": 5000}, "caption", "COCO",
                    {f"{part}2014": f"captions_{part}2014_vladapter_results.json" for part in ("val", "test")},
                    COCO_SOURCE, beams=5, token_mean=True),
    "tvqa": Task("{} tvqa: ", 600, 20, 1, partial(read_choices, "tvqa", "tv", 5), "train", "val", "val",
                 {"train": 122039, "val": 15253}, "choices", "tv",
                 {"val": "tvqa/tvqa_val_predictions.json", "test_release": "tvqa/tvqa_test_predictions.json"},
                 VALUE_SOURCE, beams=5),
    "how2qa": Task("{} how2qa: ", 600, 20, 1, partial(read_choices, "how2qa", "how2", 4), "train_release", "val_release",
                   "val_release", {"train_release": 34187, "val_release": 3115}, "choices", "how2",
                   {"val_release": "how2qa/how2qa_val_predictions.json",
                    "test_public_release": "how2qa/how2qa_test_public_predictions.json"}, VALUE_SOURCE, beams=5),
    "tvc": Task("{} tvc: ", 600, 20, 1, partial(read_moments, "tvc", "tv"), "train_release", "val_release", "val_release",
                {"train_release": 2 * 86603, "val_release": 10841}, "moment", "tv",
                {f"{part}_release": f"tvc/tvc_{part}_predictions.jsonl" for part in ("val", "test")},
                VALUE_SOURCE, beams=5),
    "yc2c": Task("{} yc2c: ", 600, 20, 1, partial(read_moments, "yc2c", "yc2"), "train_release", "val_release",
                 "val_release", {"train_release": 10337, "val_release": 3492}, "moment", "yc2",
                 {f"{part}_release": f"yc2c/yc2c_{part}_predictions.jsonl" for part in ("val", "test")},
                 VALUE_SOURCE, beams=5),
}
FOLDERS = {"COCO": ["COCO/images"], "GQA": ["GQA/images", "VG"], "NLVR2": ["nlvr/images"],      # GQA's are also in VG
           "tv": ["video/videos/tv"], "how2": ["video/videos/how2"], "yc2": ["video/videos/yc2"]}
VIDEOS = "tv", "how2", "yc2"


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")     # with or without a byte order mark
    except FileNotFoundError:
        raise DataError(f"{path} is missing; `python data.py --data DIR` says where to get what is needed") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text") from None


def read_json(path: Path):
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(f"{path} is truncated or not JSON: {problem}") from None


def read_lines(path: Path) -> list:
    """JSON lines, or one JSON list."""
    content, found = read_text(path), []
    if content.lstrip().startswith("["):
        return read_json(path)
    for number, line in enumerate(content.split("\n"), 1):
        try:
            if line.strip():
                found.append(json.loads(line))
        except (ValueError, RecursionError) as problem:
            raise DataError(f"{path}, line {number} is truncated or not JSON: {problem}") from None
    return found


def records(path: Path, *fields: str, key: str | None = None) -> list[dict]:
    """The list under `key` of a JSON object, or else JSON lines; each record has the fields."""
    content = read_lines(path) if key is None else read_json(path)
    if key is not None:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path} is of another data set: expected an object with a list {key!r}")
        content = content[key]
    for record in content:
        missing = [name for name in fields if not isinstance(record, dict) or name not in record]
        if missing:
            raise DataError(f"{path} is of another data set: a record{f' of {key!r}' if key else ''} has no "
                            f"{', '.join(missing)}")
    return content


def read_examples(data: str | Path, task: str, split: str) -> list[Example]:
    """The examples of a split. Raises DataError where its files are missing, broken or empty, or name an id twice."""
    where = f"{task}'s {split} below {data}"
    try:
        examples = TASKS[task].read(Path(data), split)
        if not examples:
            raise DataError(f"{where} has no examples")
        number, count = Counter(e.id for e in examples).most_common(1)[0]
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(f"a record of {where} is not as published: {problem!r}") from None
    if count > 1:
        raise DataError(f"{where} has the id {number} {count} times")
    for e in examples:
        texts = (e.text, e.kind, e.subtitles, *e.pictures, *e.answers, *e.truth.get("references", ()))
        weights = e.answers.values()
        if not all(isinstance(x, str) for x in texts) or not all(isinstance(w, (int, float)) and w >= 0 for w in weights):
            raise DataError(f"{where}: {e.id} has something else where a text or a weight should be: {e}"[:300])
    return examples


def by_id(rows: list[dict], path: Path) -> dict:
    """Rows by their question_id, which must differ."""
    found = {row["question_id"]: row for row in rows}
    if len(found) < len(rows):
        raise DataError(f"{path} has {len(rows) - len(found):,} question_ids twice")
    return found


# ---- pictures and videos ------------------------------------------------------------------------------------------

PICTURE_FILES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"}
VIDEO_FILES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".ts", ".gif", ".npz"}
LONGEST = 4 * 3600                                      # seconds of a video; a time stamp beyond is a broken one


def folders_of(data: Path, name: str) -> list[Path]:
    """Where the pictures or videos of a data set are looked for."""
    return [data / folder for folder in FOLDERS[name]]


def find_files(folders: Iterable[Path], names: Iterable[str], video: bool = False) -> dict[str, Path]:
    """Where the named pictures and videos lie: anywhere below the folders, numbered ones or flat, with any suffix.

    A folder that has the name of a video is that video, in frames.
    """
    wanted, found, suffixes = set(names), {}, VIDEO_FILES if video else PICTURE_FILES
    for top in folders:
        for folder, inner, files in os.walk(top, followlinks=True):
            for name in wanted.intersection(inner) if video else ():
                found.setdefault(name, Path(folder, name))
                inner.remove(name)
            for name in files:
                stem, suffix = os.path.splitext(name)
                if stem in wanted and suffix.lower() in suffixes:
                    found.setdefault(stem, Path(folder, name))
    return found


def open_picture(path: Path) -> Image.Image:
    """A picture in RGB, whatever its suffix says. Raises DataError."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except Exception as problem:                # pillow raises half a dozen kinds for broken and for hostile files
        raise DataError(f"{path} is not a readable picture: {problem}") from None


def load_picture(path: Path, resolution: int) -> np.ndarray:
    """RGB bytes [resolution, resolution, 3], squeezed to a square as the paper's features were. Raises DataError."""
    return np.array(open_picture(path).resize((resolution, resolution), Image.Resampling.BICUBIC))


def sample(frames: Iterable[tuple[Fraction, Fraction, object]], fps: Fraction) -> Iterator:
    """Of (time, duration, frame) the frames that ffmpeg's filter fps keeps, with which VALUE's features were made.

    A frame at time t is for output round(t fps). Output k is the last frame that is for k or an earlier one; so at 30
    frames a second and fps 2/3 frames 22, 67, 112, ... are kept. Gaps repeat a frame, short videos may keep none.
    """
    near = lambda time: math.floor(time * fps + Fraction(1, 2))
    last = output = None
    for time, duration, frame in frames:
        output = near(time) if output is None else output
        while output < near(time):
            yield last
            output += 1
        last, end = frame, near(time + duration)
    while last is not None and output < end:
        yield last
        output += 1


def scale_and_crop(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Width and height once the shorter is `side`, and the left and upper edge of the square in their middle."""
    short = min(size)
    width, height = (side if length == short else int(length * side / short) for length in size)
    return width, height, (width - side) // 2, (height - side) // 2


def load_video(path: Path, resolution: int) -> np.ndarray:
    """RGB bytes [frames, resolution, resolution, 3], two frames in three seconds, scaled and cropped. Raises DataError.

    A folder has the video's frames at 3 a second, as TVQA's owners give them out.
    """
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in PICTURE_FILES and file.name[0] != "."]
        files.sort(key=lambda file: (len(file.stem), file.stem))                # 2.jpg before 10.jpg
        timed = ((Fraction(i, 3), Fraction(1, 3), file) for i, file in enumerate(files))
        kept = [crop_picture(open_picture(file), resolution) for file in list(sample(timed, FPS)) or files[-1:]]
    else:
        try:
            kept = decode_video(path, resolution)
        except (av.FFmpegError, OSError, ValueError) as problem:
            if isinstance(problem, DataError):
                raise
            reason = getattr(problem, "strerror", None) or problem
            raise DataError(f"{path} is empty, truncated or not a readable video: {reason}") from None
    if not kept:
        raise DataError(f"{path} has no frames")
    return np.stack(kept)


def crop_picture(picture: Image.Image, side: int) -> np.ndarray:
    width, height, left, top = scale_and_crop(picture.size, side)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(picture.crop((left, top, left + side, top + side)))


def decode_video(path: Path, side: int) -> list[np.ndarray]:
    """The frames kept of a video file, by their time stamps; only these are turned into RGB."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            kinds = ", ".join(dict.fromkeys(stream.type for stream in container.streams)) or "nothing"
            raise DataError(f"{path} has no pictures, only {kinds}")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        start, step = Fraction(container.start_time or 0, av.time_base), 1 / (stream.average_rate or Fraction(25))
        length = Fraction(container.duration or 0, av.time_base)
        # The extractor of VALUE's features takes at least about two frames of a short video.
        fps = Fraction(2, max(int(length), 1)) if 0 < length < Fraction(16, 10) else FPS
        read, decoded, last, reached = 0, 0, None, Fraction(0)

        def timed():
            nonlocal read, decoded, last, reached
            for packet in container.demux():            # of sound, too: what a file cut short ends with
                if packet.pts is not None:
                    reached = max(reached, (packet.pts + (packet.duration or 0)) * packet.time_base)
                read += packet.stream is stream and packet.size > 0
                for frame in packet.decode() if packet.stream is stream else ():
                    time = decoded * step if frame.pts is None else frame.pts * frame.time_base - start
                    if time > LONGEST:
                        raise DataError(f"{path} has a time stamp of {float(time):,.0f} seconds, which must be wrong")
                    decoded, last = decoded + 1, frame
                    yield time, frame.duration * frame.time_base if frame.duration else step, frame

        kept = [crop_frame(frame, side) for frame in sample(timed(), fps)]
        if read < stream.frames * 0.9 if stream.frames else reached < length * Fraction(9, 10):
            raise DataError(f"{path} is truncated: {float(reached):.1f} of {float(length):.1f} seconds are there")
        return kept or [crop_frame(last, side)] * (last is not None)


def crop_frame(frame: av.VideoFrame, side: int) -> np.ndarray:
    """As the extractor of VALUE's features: swscale's bicubic; upright, where a phone held its camera otherwise."""
    width, height, left, top = scale_and_crop((frame.width, frame.height), side)
    pixels = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    return np.rot90(pixels[top:top + side, left:left + side], frame.rotation // 90)


def fit_frames(features: torch.Tensor) -> torch.Tensor:
    """Features of any number of frames [T, C] to [64, C]: zeros behind, or an adaptive max pool over time."""
    if len(features) <= FRAMES:
        return F.pad(features, (0, 0, 0, FRAMES - len(features)))
    return F.adaptive_max_pool1d(features.T[None], FRAMES)[0].T


def load_features(path: Path) -> np.ndarray:
    """VALUE's released features of a video's frames: the array "features" [T, C] of an .npz file. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            features = file["features"]
        if features.ndim != 2 or not features.size or features.dtype.kind != "f" or not np.isfinite(features).all():
            raise ValueError(f"its features are {list(features.shape)} of {features.dtype} or not finite")
        return features
    except Exception as problem:
        raise DataError(f"{path} is not a file of VALUE's features: {problem}") from None


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Bytes [B, H, W, 3] to what CLIP sees: [B, 3, H, W], mean 0 and deviation 1 over its training pictures."""
    mean, std = (torch.tensor(x, device=pictures.device) for x in (MEAN, STD))
    return ((pictures / 255 - mean) / std).permute(0, 3, 1, 2)


def ahead(work: Callable, items: Iterable, depth: int, threads: int | None = None) -> Iterator:
    """work(item) of each item, in order, done by threads that are up to `depth` items ahead."""
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        jobs = deque(pool.submit(work, item) for item in islice(items, depth))
        while jobs:
            yield jobs.popleft().result()
            jobs.extend(pool.submit(work, item) for item in islice(items, 1))


def load_ahead(paths: Iterable[Path], load: Callable[[Path], np.ndarray], size: int) -> Iterator[list]:
    """Lists of `size` loaded files, or of the DataError in the place of a broken one."""
    def attempt(path):
        try:
            return load(path)
        except DataError as problem:
            return problem

    loaded = ahead(attempt, paths, 3 * size)
    while part := list(islice(loaded, size)):
        yield part


# ---- the store of features ----------------------------------------------------------------------------------------


class FeatureStore:
    """The visual tokens of the pictures or videos of one data set, encoded once: float16 [items, tokens, channels].

    folder/features.f16 is memory-mapped, folder/index.json says whose features they are and which item has which row.
    """

    def __init__(self, folder: Path, encoder_hash: str, tokens: int, channels: int):
        self.folder, self.shape = folder, (tokens, channels)
        self.about = {"encoder": encoder_hash, "tokens": tokens, "channels": channels}
        self.row = self.read_index()            # name of a picture or video -> row
        self.features = self.open()

    def read_index(self) -> dict[str, int]:
        path = self.folder / "index.json"
        if not path.exists():
            return {}
        index = read_json(path)
        if not isinstance(index, dict) or not isinstance(index.get("pictures"), dict):
            raise DataError(f"{path} is no index of features; remove {self.folder} to encode anew")
        if {key: index.get(key) for key in self.about} != self.about:
            raise DataError(f"{self.folder} holds features of another encoder; remove that folder to encode anew")
        return index["pictures"]

    def open(self):
        if not self.row:
            return np.empty((0, *self.shape), np.float16)
        path, rows = self.folder / "features.f16", len(self.row)
        if not path.exists() or path.stat().st_size < rows * 2 * np.prod(self.shape):
            raise DataError(f"{path} has fewer features than its index names; remove {self.folder} to encode anew")
        return np.memmap(path, np.float16, "r", shape=(rows, *self.shape))

    def add(self, paths: dict[str, Path], load: Callable[[Path], np.ndarray], encode: Callable, size: int = 64) -> list:
        """Encodes files, `size` at a time; encode takes a list of what load gave and returns [B, tokens, channels].

        What is encoded is kept, also if the run is killed. A second process waits for the first and takes over what that
        has encoded. Returns a DataError for each file that is unreadable.
        """
        if not paths:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "features.f16", "ab") as file, tqdm(total=len(paths), unit=" files", desc=(
                f"encoding {self.folder.parent.name}")) as bar:
            fcntl.flock(file, fcntl.LOCK_EX)                                    # gone with this process, however it ends
            self.row = self.read_index()
            names, broken = [name for name in paths if name not in self.row], []
            bar.update(len(paths) - len(names))
            loads = load_ahead([paths[name] for name in names], load, size)
            file.truncate(len(self.row) * 2 * int(np.prod(self.shape)))         # rows a killed run had not indexed
            for i, loaded in enumerate(loads):
                good = [(name, x) for name, x in zip(names[i * size:], loaded) if not isinstance(x, DataError)]
                broken += [x for x in loaded if isinstance(x, DataError)]
                if good:
                    features = encode([x for _, x in good])
                    if features.shape[1:] != self.shape:
                        raise DataError(f"features of {good[0][0]} have the shape {list(features.shape[1:])}, "
                                        f"expected {list(self.shape)}")
                    features = features.to(torch.float16)
                    if not features.isfinite().all():
                        raise DataError(f"features of {good[0][0]} or one of the next {len(good) - 1} are beyond float16")
                    file.write(features.cpu().numpy().tobytes())
                    self.row.update({name: len(self.row) + k for k, (name, _) in enumerate(good)})
                if i % 100 == 99:
                    self.save(file)
                bar.update(len(loaded))
            self.save(file)
        self.features = self.open()
        return broken

    def save(self, file):
        file.flush()
        os.fsync(file.fileno())
        write_atomically(self.folder / "index.json", json.dumps(self.about | {"pictures": self.row}).encode())


def write_atomically(path: Path, content: bytes):
    """The file is either the old or the new one, whenever the run is killed."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


# ---- batches ------------------------------------------------------------------------------------------------------


class Corpus:
    """The examples of one task and split as integers, and batches of them; only ids_at and labels_at differ in length."""

    def __init__(self, task: str, examples: list[Example], tokenizer: Tokenizer, store: FeatureStore, prompts: bool = True):
        self.task, self.examples, self.store, self.pad = task, examples, store, tokenizer.pad
        row = TASKS[task]
        texts = [text_ids(tokenizer, task, e, prompts) for e in examples]
        self.text = fill(texts, max(map(len, texts)), self.pad)
        self.rows = np.array([[store.row[name] for name in e.pictures] for e in examples])
        numbers = {}                            # answer -> number, over all examples
        self.choices = [[(numbers.setdefault(answer, len(numbers)), weight) for answer, weight in e.answers.items()
                         if weight > 0] or [(numbers.setdefault("", len(numbers)), 0.0)] for e in examples]
        self.targets = [tokenizer.encode(answer, row.answer) for answer in numbers]
        self.length = max(map(len, self.targets))

    def __len__(self):
        return len(self.examples)

    def batch(self, indices: np.ndarray, size: int, seed=None, part: slice = slice(None),
              pin: bool = False) -> dict[str, torch.Tensor]:
        """Examples as tensors: ids [size, T], features [size, pictures, tokens, channels]; with a seed what
        `Model.loss` takes besides.

        Each example draws one of its answers with a chance in proportion to its weight, which also weighs its loss.
        Where there are fewer examples than `size`, rows of weight 0 fill up. `part` picks the rows of one process.
        ids_at and labels_at say what is no padding, so that the device need not be asked. pin: in pinned memory.
        """
        real, indices = len(indices), np.concatenate([indices, np.full(size - len(indices), indices[0])])
        ids, rows = torch.from_numpy(self.text[indices[part]].astype(np.int64)), self.rows[indices[part]]
        if pin:                                 # filled directly; any mode but "clip" would make a copy more
            features = torch.empty(*rows.shape, *self.store.features.shape[1:], dtype=torch.float16, pin_memory=True)
            np.take(self.store.features, rows, axis=0, out=features.numpy(), mode="clip")
        else:
            features = torch.from_numpy(self.store.features[rows])
        batch = {"ids": ids, "features": features}
        if seed is not None:
            rng = random.Random(seed)
            drawn = [draw(self.choices[i], rng) for i in indices]
            labels = fill([self.targets[number] for number, _ in drawn], self.length, -100)
            weights = np.array([weight for _, weight in drawn])
            if TASKS[self.task].token_mean:
                weights = weights * (labels != -100).sum(1) / (labels[:real] != -100).sum(1).mean()
            weights = weights * size / real                                     # the mean is over real rows
            weights[real:] = 0
            labels = torch.from_numpy(labels[part].astype(np.int64))
            batch |= {"labels": labels, "weights": torch.from_numpy(weights[part].astype(np.float32)),
                      "ids_at": (ids != self.pad).flatten().nonzero()[:, 0],
                      "labels_at": (labels != -100).flatten().nonzero()[:, 0]}
        return {name: x.pin_memory() for name, x in batch.items()} if pin else batch


def text_ids(tokenizer: Tokenizer, task: str, example: Example, prompts: bool = True) -> list[int]:
    """An example's text as ids, with the prompt of its task; of a text too long the subtitles are cut, if it has any.

    The original cuts on the right, where a video's question, its answers and the prompt stand.
    """
    row = TASKS[task]
    text = row.prompt.format(example.text) if prompts else example.text
    if not row.video:
        return tokenizer.encode(text, row.text)
    said = f"[Subs] {example.subtitles}".rstrip()
    ids = tokenizer.encode(f"{said} {text.lstrip()}")
    if len(ids) > row.text:
        end = len(tokenizer.encode(said)) - 1                                   # without </s>
        ids[max(1, end - len(ids) + row.text):end] = []                         # not BART's <s>
    return ids if len(ids) <= row.text else [*ids[:row.text - 1], ids[-1]]


def draw(choices: list[tuple[int, float]], rng: random.Random) -> tuple[int, float]:
    if len(choices) == 1:
        return choices[0]
    return rng.choices(choices, [weight for _, weight in choices])[0]


def fill(rows: list[list[int]], length: int, value: int) -> np.ndarray:
    filled = np.full((len(rows), length), value, np.int32)
    for i, row in enumerate(rows):
        filled[i, :len(row)] = row
    return filled


def batch_size(task: str, batch: int) -> int:
    """How many examples of a task are trained at once over all processes: its share of --batch."""
    return max(1, int(TASKS[task].batch * batch))


def mixture(corpora: dict[str, Corpus], sizes: dict[str, int], seed: int, epoch: int) -> list[tuple[str, np.ndarray]]:
    """The batches of one epoch: each example of each task once, each batch of one task, tasks in random turns.

    The same on every process, and a function of seed and epoch alone, so that a run can go on anywhere.
    """
    batches = []
    for task, corpus in corpora.items():
        order = np.array(random.Random(f"{seed} {epoch} {task}").sample(range(len(corpus)), len(corpus)))
        batches += [(task, order[i:i + sizes[task]]) for i in range(0, len(order), sizes[task])]
    random.Random(f"{seed} {epoch}").shuffle(batches)
    return batches


# ---- the command line -----------------------------------------------------------------------------------------------


def report_problems(main: Callable, *problems: type):
    """Runs a command. What its user can mend (DataError, OSError and `problems`) ends it in one sentence, exit code 2."""
    try:
        main()
    except (DataError, OSError, *problems) as problem:
        print(f"\n{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


# ---- python data.py -----------------------------------------------------------------------------------------------


def report(data: Path, tasks: list[str]) -> bool:
    """Prints what is there, what is missing and where to get it. True if nothing is wrong."""
    good, pictures = True, {}
    for task in tasks:
        row = TASKS[task]
        for split in dict.fromkeys((row.train, row.validation, row.test, *row.submission)):
            needed = split in (row.train, row.validation, row.test)
            try:
                examples = read_examples(data, task, split)
            except DataError as problem:
                where = f"get it at {row.source}" if needed else "needed for submissions only"
                print(f"{task:<8}{split:<20}{problem}\n{'':28}{where}")
                good &= not needed
                continue
            published = row.counts.get(split)
            note = "" if published is None else " (as published)" if len(examples) == published else (
                f" (published: {published:,})")
            without = f"{sum(not e.answers for e in examples):,} without an answer to learn"
            if row.video:
                without = f"{sum(not e.subtitles for e in examples):,} without subtitles"
            print(f"{task:<8}{split:<20}{len(examples):>9,} examples{note}, {without}")
            if needed:
                pictures.setdefault(row.pictures, {}).update(dict.fromkeys(n for e in examples for n in e.pictures))
    for name, needed in pictures.items():
        video, kinds = name in VIDEOS, [folders_of(data, name)]
        if video:                                       # videos themselves, or one kind of features
            kinds += [[folder] for folder in sorted((data / "video" / "vis_features" / name).glob("*"))]
        folders, found = max(((kind, find_files(kind, needed, video)) for kind in kinds), key=lambda pair: len(pair[1]))
        missing, broken = [item for item in needed if item not in found], []
        with tqdm(total=len(found), unit=" files", desc=f"looking at {name}") as bar:
            for loaded in load_ahead(found.values(), partial(look, video), 64):
                broken += [x for x in loaded if isinstance(x, DataError)]
                bar.update(len(loaded))
        print(f"{name:<8}{len(needed):>9,} {'videos' if video else 'pictures'}, {len(missing):,} missing, "
              f"{len(broken):,} unreadable below {' and '.join(map(str, folders))}")
        for line in missing[:10] + [str(problem) for problem in broken[:10]]:
            print(f"{'':8}{line}")
        good &= not missing and not broken
    return good


def look(video: bool, path: Path) -> np.ndarray:
    """A picture, video or file of features as small as will show whether it can be read."""
    return load_features(path) if path.suffix == ".npz" else load_video(path, 32) if video else load_picture(path, 32)


def main():
    parser = argparse.ArgumentParser(description="Says which data are there, which are missing and where to get them.",
                                     allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with vqa/, COCO/, GQA/, ...")
    parser.add_argument("--tasks", type=task_list, default=list(TASKS), metavar="A,B", help="default: all")
    args = parser.parse_args()
    if not report(args.data, args.tasks):
        sys.exit(2)


def task_list(text: str) -> list[str]:
    """A flag's comma-separated tasks. argparse shows the error."""
    tasks = text.split(",")
    for task in tasks:
        if task not in TASKS:
            raise argparse.ArgumentTypeError(f"unknown task: {task!r}; known are {', '.join(TASKS)}")
    return list(dict.fromkeys(tasks))


if __name__ == "__main__":
    report_problems(main)
