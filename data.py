"""Pixels and words become batches.

First what reads data sets: files, `Example`, readers, the table of tasks. Then pictures and videos,
the store of their features, batches. `python data.py --data DIR` says what is there and what is
missing; README shows how DIR is laid out.

Paper: https://arxiv.org/abs/2112.06825, section 4. original: FILE#L is
https://github.com/ylsung/VL_adapter/blob/545fcbb/VL-T5/src/FILE#L.
Needs torch, numpy, pillow, tqdm, for videos av.
"""

import argparse
import json
import math
import os
import random
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from model import IMAGE_SIZE, VISUAL_SIDE, fold_norms, load_clip, token_indices
from tokenizer import Tokenizer, vqa_normal_form


# ---- errors and files ----


class DataError(ValueError):
    """The data cannot be used; the message names the file and what was expected."""


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except FileNotFoundError:
        raise DataError(f"{path} is missing; data.py --data DIR says where to get it") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text") from None


def parse_json(text: str, source: Path | str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{source} is truncated or not JSON: {problem}") from None


def read_json(path: Path):
    return parse_json(read_text(path), path)


def read_lines(path: Path) -> list:
    """JSON lines, or one JSON list."""
    content = read_text(path)
    if content.lstrip().startswith("["):
        return parse_json(content, path)
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            rows.append(parse_json(line, f"{path}, line {number}"))
    return rows


def records(path: Path, *fields: str, key: str = "") -> list[dict]:
    """The list under `key`, or else JSON lines; each record has the fields."""
    foreign = f"{path} is of another data set"
    if key:
        content = read_json(path)
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise DataError(f"{foreign}: expected an object with a list {key!r}")
    else:
        rows = read_lines(path)
    where = f" of {key!r}" if key else ""
    for row in rows:
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise DataError(f"{foreign}: a record{where} has no {', '.join(missing)}")
    return rows


def write_atomically(path: Path, content: bytes):
    """A killed process leaves the old file or the new one."""
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


def read_vqa(data: Path, split: str) -> list[Example]:
    """VQAv2: Karpathy's parts of train2014 and val2014, weighed by soft scores, or test2015."""
    folder = data / "vqa"
    asked = "v2_OpenEnded_mscoco_{}_questions.json"
    if split == "test2015":
        rows = read_by_id(folder / asked.format(split), "questions", "image_id", "question")
        return [Example(number, (f"COCO_{split}_{r['image_id']:012d}",), r["question"], {})
                for number, r in rows.items()]

    converted = folder / f"{split}.json"
    if converted.exists() and not (folder / asked.format("train2014")).exists():
        return read_converted(converted, "label")

    # The split's pictures, and in which year's folder they lie.
    years = {}
    coco = data / "COCO/dataset_coco.json"
    for image in records(coco, "cocoid", "filepath", "split", key="images"):
        if image["split"] in KARPATHY[split]:
            years[image["cocoid"]] = image["filepath"]

    # Of both years, for what may be learned is counted over all.
    questions, annotations = {}, {}
    for year in ("train2014", "val2014"):
        given = folder / f"v2_mscoco_{year}_annotations.json"
        questions |= read_by_id(folder / asked.format(year), "questions", "image_id", "question")
        annotations |= read_by_id(given, "annotations", "image_id", "answers",
                                  "multiple_choice_answer")
        odd = questions.keys() ^ annotations.keys()
        if odd:
            raise DataError(f"{folder}: the questions and annotations of {year} do not match; "
                            f"question {min(odd)} is in one only")
    vocabulary = vqa_vocabulary(folder, annotations.values())

    examples = []
    for number, question in questions.items():
        image = question["image_id"]
        if image in years:
            r = annotations[number]
            people = [answer["answer"] for answer in r["answers"]]
            answers = {answer: SOFT_SCORES[min(count, 4)]
                       for answer, count in Counter(people).items() if answer in vocabulary}
            examples.append(Example(
                number, (f"COCO_{years[image]}_{image:012d}",), question["question"], answers,
                r.get("question_type", ""),
                {"answers": people, "type": r.get("answer_type", "")}))
    return examples


def read_by_id(path: Path, key: str, *fields: str) -> dict[int, dict]:
    rows = records(path, "question_id", *fields, key=key)
    found = {row["question_id"]: row for row in rows}
    if len(found) < len(rows):
        raise DataError(f"{path} has {len(rows) - len(found):,} question_ids twice")
    return found


def vqa_vocabulary(folder: Path, annotations: Iterable[dict]) -> set[str]:
    """What may be learned: trainval_ans2label.json, or the 3,129 answers, in normal form, that are
    the commonest of nine questions or more. Everybody takes these and the soft scores:
    https://github.com/hengyuan-hu/bottom-up-attention-vqa/blob/978f6d6/tools/compute_softscore.py
    """
    listed = folder / "trainval_ans2label.json"
    if listed.exists():
        return set(read_json(listed))
    counts = Counter(vqa_normal_form(r["multiple_choice_answer"]).replace(",", "")
                     for r in annotations)
    return {answer for answer, count in counts.items() if count >= 9}


def read_gqa(data: Path, split: str) -> list[Example]:
    """GQA: balanced questions of parts ("train,val"), or all of one ("testdev_all") if there."""
    folder = data / "GQA"
    examples = []
    for part in split.split(","):
        name = part.removesuffix("_all")
        path = folder / f"{name}_balanced_questions.json"
        every = folder / f"{name}_all_questions.json"
        if part != name and (every.exists() or not path.exists()):
            path = every
        theirs = {"val": "valid", "submission": "submit"}.get(name, name)
        converted = folder / f"{theirs}.json"
        if converted.exists() and not path.exists():
            examples += read_converted(converted)
            continue

        questions = read_json(path)
        foreign = DataError(f"{path} is not GQA's: expected {{id: {{imageId, question, ...}}}}")
        if not isinstance(questions, dict):
            raise foreign
        for number, r in questions.items():
            if not isinstance(r, dict) or not {"imageId", "question"} <= r.keys():
                raise foreign
            answers = {r["answer"]: 1.0} if "answer" in r else {}
            types = r.get("types") or {}
            truth = {"answer": r.get("answer"), "structural": types.get("structural", ""),
                     "balanced": r.get("isBalanced", True), "entailed": r.get("entailed", ())}
            examples.append(Example(number, (r["imageId"],), r["question"], answers,
                                    types.get("detailed", ""), truth))
    return examples


def read_nlvr(data: Path, split: str) -> list[Example]:
    """NLVR2: statements on two pictures, left and right. original: nlvr_clip_data.py#L156"""
    path = data / f"nlvr/{split}.json"
    theirs = {"dev": "valid", "test1": "test"}.get(split, split)
    converted = data / f"nlvr/{theirs}.json"
    if converted.exists() and not path.exists():
        path = converted
    rows = records(path, "identifier")
    vlt5 = bool(rows) and "sent" in rows[0]  # train.json may be of either form
    labels = {"True": "true", "False": "false", 1: "true", 0: "false", None: None}
    examples = []
    for r in rows:
        number = r["identifier"]
        pair = number.rpartition("-")[0]  # split-set-pair; the sentence's number goes
        pictures = (r["img0"], r["img1"]) if vlt5 else (f"{pair}-img0", f"{pair}-img1")
        sentence = r.get("sent" if vlt5 else "sentence")
        answer = labels.get(r.get("label"), "")
        if not sentence or answer == "":
            raise DataError(f"{path}: {number} should have a sentence and a label True or False")
        answers = {answer: 1.0} if answer else {}
        examples.append(Example(number, pictures, sentence, answers, truth={"answer": answer}))
    return examples


def read_converted(path: Path, *fields: str) -> list[Example]:
    """VL-T5's VQAv2 or GQA, where official files are absent.

    original: vqa_clip_data.py#L154, gqa_clip_data.py#L361
    """
    examples = []
    for r in records(path, "sent", "question_id", "img_id", *fields):
        label = r.get("label") or {}  # {answer: weight}
        truth = {"answer": max(label, key=label.get, default=None)}
        if "label" in fields:  # VQAv2's, with the answers of ten people
            people = [answer["answer"] for answer in r.get("answers", ())]
            truth = {"answers": people, "type": r.get("answer_type", "")}
        examples.append(Example(r["question_id"], (str(r["img_id"]),), r["sent"], label,
                                r.get("question_type", ""), truth))
    return examples


def read_captions(data: Path, split: str) -> list[Example]:
    """COCO: for training one example a caption; elsewhere one a picture, with all.

    Splits are Karpathy's and, for the server, val2014 and test2014.
    original: caption_clip_data.py#L94
    """
    if split == "test2014":
        path = data / "COCO/image_info_test2014.json"
        return [Example(r["id"], (Path(r["file_name"]).stem,), "", {})
                for r in records(path, "id", "file_name", key="images")]
    examples = []
    fields = ("cocoid", "filename", "filepath", "split", "sentences")
    for r in records(data / "COCO/dataset_coco.json", *fields, key="images"):
        if r["split"] not in KARPATHY.get(split, ()) and r["filepath"] != split:
            continue
        pictures = (Path(r["filename"]).stem,)
        captions = [(s["sentid"], s["raw"].strip()) for s in r["sentences"]]
        if split == "karpathy_train":
            for number, caption in captions:
                examples.append(Example(number, pictures, "", {caption: 1.0}))
        else:
            truth = {"references": [caption for _, caption in captions]}
            examples.append(Example(r["cocoid"], pictures, "", {}, truth=truth))
    return examples


def read_choices(choices: int, task: str, videos: str, data: Path, split: str) -> list[Example]:
    """TVQA and How2QA. A moment "NaN-NaN" stays that, as in the original."""
    names = [f"a{i}" for i in range(choices)]
    examples = []
    for r, video in value_records(task, videos, data, split, "qid", "q", "ts", *names):
        right = f"a{r['answer_idx']}" if "answer_idx" in r else None
        if right and right not in names:
            raise DataError(f"{task}'s {split}: {r['qid']} has the answer_idx {r['answer_idx']!r}, "
                            "not one of its answers")
        examples.append(Example(
            r["qid"], text=choose_from(r["q"], r["ts"], [r[name] for name in names]),
            answers={right: 1.0} if right else {}, kind=" ".join(r["q"].split()[:2]).lower(),
            truth={"answer": right, "show": r.get("show_name") or ""}, **video))
    return examples


def read_moments(task: str, videos: str, data: Path, split: str) -> list[Example]:
    """TVC and YC2C: for training one example a description; elsewhere one a clip, with all.

    original: video/tvc_data.py#L108
    """
    examples = []
    for r, video in value_records(task, videos, data, split, "clip_id"):
        text = f"[TS] ({r['ts']})" if "ts" in r else ""
        told = r.get("descs", ())
        if not split.startswith("train"):
            truth = {"references": [d["desc"] for d in told], "video": video["pictures"][0],
                     "ts": r.get("ts")}
            examples.append(Example(r["clip_id"], text=text, answers={}, truth=truth, **video))
        elif told:
            for d in told:
                answers = {d["desc"].strip(): 1.0}
                examples.append(Example(d["desc_id"], text=text, answers=answers, **video))
        else:
            raise DataError(f"{task}'s {split}: clip {r['clip_id']} has no descriptions")
    return examples


def value_records(task, videos, data, split, *fields):
    """VALUE's records, each with what an Example says of its video."""
    folder = data / "video/ann"
    said = {}
    for r in records(folder / f"{videos}_subtitles.jsonl", "vid_name", "sub"):
        said[str(r["vid_name"])] = " ".join(line.get("text", "").strip() for line in r["sub"])
    for r in records(folder / task / f"{task}_{split}.jsonl", *fields, "vid_name"):
        video = str(r["vid_name"])
        yield r, {"pictures": (video,), "subtitles": said.get(video, "")}


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
    read: Callable[[Path, str], list[Example]]  # of (data, split)
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


def read_examples(data: str | Path, task: str, split: str) -> list[Example]:
    """The examples of a split. Raises DataError for missing, broken, empty or doubtful files."""
    place = f"{task}'s {split} below {data}"
    try:
        examples = TASKS[task].read(Path(data), split)
        if not examples:
            raise DataError(f"{place} has no examples")
        number, count = Counter(e.id for e in examples).most_common(1)[0]
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise DataError(f"a record of {place} is not as published: {problem!r}") from None
    if count > 1:
        raise DataError(f"{place} has the id {number} {count} times")
    for e in examples:
        texts = [e.text, e.kind, e.subtitles, *e.pictures, *e.answers]
        texts += e.truth.get("references", ())
        weights = e.answers.values()
        if (not all(isinstance(x, str) for x in texts)
                or not all(isinstance(x, (int, float)) and x >= 0 for x in weights)):
            raise DataError(f"{place}: {e.id} has something else where a text or a weight "
                            f"should be: {e}"[:300])
    return examples


def check_labels(task: str, examples: list[Example]):
    """Raises DataError for examples that cannot be scored."""
    labels = ("answer", "answers", "references")
    hidden = sum(not any(e.truth.get(name) for name in labels) for e in examples)
    if hidden:
        raise DataError(f"{task} cannot be scored: {hidden:,} of {len(examples):,} examples "
                        "have no labels")


# ---- pictures and videos ----

PICTURE_FILES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"}
VIDEO_FILES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".ts", ".gif", ".npz"}
FPS = Fraction(2, 3)  # frames a second, as of VALUE's features
LONGEST = 4 * 3600  # seconds; a time stamp beyond is broken


def folders_of(data: Path, source: str) -> list[Path]:
    return [data / folder for folder in FOLDERS[source]]


def find_files(folders: list[Path], names: Iterable[str], video: bool = False) -> dict[str, Path]:
    """Where the named files lie: anywhere below the folders. A folder may be a video, in frames."""
    wanted = set(names)
    suffixes = VIDEO_FILES if video else PICTURE_FILES
    found = {}
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
    except Exception as problem:  # pillow raises many kinds
        raise DataError(f"{path} is not a readable picture: {problem}") from None


def load_picture(path: Path, resolution: int = IMAGE_SIZE) -> np.ndarray:
    """RGB bytes [resolution, resolution, 3], squeezed to a square. Raises DataError.

    https://github.com/ylsung/VL_adapter/blob/545fcbb/feature_extraction/coco_CLIP.py#L41
    """
    return np.array(open_picture(path).resize((resolution, resolution), Image.Resampling.BICUBIC))


def load_video(path: Path, resolution: int = IMAGE_SIZE) -> np.ndarray:
    """RGB bytes [frames, resolution, resolution, 3], two frames in three seconds.

    The paper took VALUE's features; this is for other videos, by the rules of VALUE's extractor. A
    folder has frames at 3 a second, as TVQA's. Raises DataError.
    https://github.com/linjieli222/HERO_Video_Feature_Extractor/blob/eaf55ce/clip/video_loader.py
    """
    kept = (load_frames if path.is_dir() else decode_video)(path, resolution)
    if not kept:
        raise DataError(f"{path} has no frames")
    return np.stack(kept)


def load_frames(folder, side):
    files = [file for file in folder.iterdir()
             if file.suffix.lower() in PICTURE_FILES and file.name[0] != "."]
    files.sort(key=lambda file: (len(file.stem), file.stem))  # 2.jpg before 10.jpg
    timed = [(Fraction(i, 3), Fraction(1, 3), file) for i, file in enumerate(files)]
    frames = []
    for file in list(resample(timed, FPS)) or files[-1:]:
        picture = open_picture(file)
        width, height, left, top = scale_and_crop(picture.size, side)
        pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
        frames.append(pixels[top:top + side, left:left + side])
    return frames


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
    width, height = (int(length * side / short) for length in size)
    return width, height, (width - side) // 2, (height - side) // 2


def decode_video(path, side):
    try:
        import av
    except ImportError:
        raise DataError(f"{path} can be read with PyAV only: pip install av") from None
    try:
        with av.open(str(path)) as container:
            return decode(path, container, side)
    except DataError:
        raise
    except (av.FFmpegError, OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise DataError(f"{path} is empty, truncated or not a readable video: {reason}") from None


def decode(path, container, side):
    """What `resample` keeps, by the frames' time stamps; only that is turned into RGB."""
    if not container.streams.video:
        kinds = ", ".join(dict.fromkeys(stream.type for stream in container.streams)) or "nothing"
        raise DataError(f"{path} has no pictures, only {kinds}")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    start = Fraction(container.start_time or 0, 1_000_000)  # ffmpeg's are microseconds
    length = Fraction(container.duration or 0, 1_000_000)
    step = 1 / (stream.average_rate or Fraction(25))
    fps = Fraction(2) if 0 < length < Fraction(16, 10) else FPS  # as the extractor's

    packets = decoded = 0
    last = None
    reached = Fraction(0)  # seconds, the end of what was read

    def timed():
        nonlocal packets, decoded, last, reached
        for packet in container.demux():  # of sound, too: what a cut file ends with
            if packet.pts is not None:
                reached = max(reached, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream is not stream:
                continue
            packets += packet.size > 0
            for last in packet.decode():
                time = decoded * step
                if last.pts is not None:
                    time = last.pts * last.time_base - start
                if time > LONGEST:
                    raise DataError(f"{path} has a time stamp of {float(time):,.0f} seconds")
                decoded += 1
                yield time, last.duration * last.time_base if last.duration else step, last

    kept = [crop_frame(frame, side) for frame in resample(timed(), fps)]
    truncated = reached < length * Fraction(9, 10)
    if stream.frames:  # a file with an index knows how many it has
        truncated = packets < stream.frames * 0.9
    if truncated:
        raise DataError(f"{path} is truncated at {float(reached):.1f} of {float(length):.1f} s")
    if not kept and last is not None:
        kept = [crop_frame(last, side)]
    return kept


def crop_frame(frame, side):
    """[side, side, 3], by swscale's bicubic; upright, where a phone was not."""
    width, height, left, top = scale_and_crop((frame.width, frame.height), side)
    pixels = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    return np.rot90(pixels[top:top + side, left:left + side], frame.rotation // 90)


# ---- features and their store ----

FRAMES = 64  # visual tokens of a video


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
        pixels = torch.from_numpy(np.concatenate(loaded) if video else np.stack(loaded))
        tokens = torch.cat([encode_part(part.to(device)) for part in pixels.split(64)])
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
    example = next(top.glob(f"*/{name}/*.npz"), None)
    if example is None:
        raise DataError(f"{top}/*/{name} is empty")

    def encode(loaded):
        return torch.stack([fit_frames(torch.from_numpy(x.astype(np.float32))) for x in loaded])

    return Features(name, load_features(example).shape[1],
                    lambda data, source: [data / "video/vis_features" / source / name],
                    load_features, encode)


def load_features(path: Path) -> np.ndarray:
    """The array "features" [frames, channels] of one of VALUE's .npz files. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x = file["features"]
        if x.ndim != 2 or not x.size or x.dtype.kind != "f" or not np.isfinite(x).all():
            raise ValueError(f"it has {x.dtype} {list(x.shape)}, or not finite")
        return x
    except Exception as problem:
        raise DataError(f"{path} is not a file of VALUE's features: {problem}") from None


def fit_frames(features: torch.Tensor, frames: int = FRAMES) -> torch.Tensor:
    """Features [T, C] to [frames, C]: zeros behind, or a max pool.

    original: video/tvqa_data.py#L34

    >>> fit_frames(torch.tensor([[1.], [5.], [2.], [3.]]), 2).T
    tensor([[5., 3.]])
    """
    if len(features) <= frames:
        return F.pad(features, (0, 0, 0, frames - len(features)))
    return F.adaptive_max_pool1d(features.T[None], frames)[0].T


class FeatureStore:
    """The visual tokens of one data set's pictures or videos, encoded once.

    features.f16 is memory-mapped float16 [items, tokens, channels]; index.json says whose they are
    and which item has which row.
    """

    def __init__(self, folder: Path, encoder_hash: str, tokens: int, channels: int):
        self.folder = folder
        self.shape = (tokens, channels)
        self.about = {"encoder": encoder_hash, "tokens": tokens, "channels": channels}
        self.row = self.read_index()  # name of a picture or video -> row
        self.features = self.open()

    def read_index(self) -> dict[str, int]:
        path = self.folder / "index.json"
        if not path.exists():
            return {}
        index = read_json(path)
        ours = isinstance(index, dict) and index.items() >= self.about.items()
        if not ours or not isinstance(index.get("pictures"), dict):
            raise DataError(f"{path} is broken or has features of another encoder; "
                            f"remove {self.folder} to encode anew")
        return index["pictures"]

    def open(self) -> np.ndarray:
        if not self.row:
            return np.empty((0, *self.shape), np.float16)
        path = self.folder / "features.f16"
        try:
            return np.memmap(path, np.float16, "r", shape=(len(self.row), *self.shape))
        except (FileNotFoundError, ValueError):
            raise DataError(f"{path} has fewer features than its index names; "
                            f"remove {self.folder} to encode anew") from None

    def add(self, paths: dict[str, Path], load: Callable, encode: Callable,
            size: int = 64) -> list[DataError]:
        """Encodes files, `size` at a time. Returns a DataError for each unreadable one.

        What is encoded is kept if it is killed. A second process waits for the first and uses it.
        """
        if not paths:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.features = None  # Windows cuts no file that is mapped
        broken = []
        with open(self.folder / "features.f16", "ab") as file, tqdm(
                total=len(paths), unit=" files", desc=f"encoding {self.folder.parent.name}") as bar:
            lock(file)
            self.row = self.read_index()
            # A killed run leaves rows that it had not indexed.
            file.truncate(len(self.row) * math.prod(self.shape) * 2)
            names = [name for name in paths if name not in self.row]
            bar.update(len(paths) - len(names))
            loaded = load_ahead([paths[name] for name in names], load, 3 * size)
            for i in range(0, len(names), size):
                part = dict(zip(names[i:i + size], loaded))
                broken += [x for x in part.values() if isinstance(x, DataError)]
                good = {name: x for name, x in part.items() if not isinstance(x, DataError)}
                if good:
                    self.append(file, list(good), encode([*good.values()]))
                if i // size % 100 == 99:
                    self.save(file)
                bar.update(len(part))
            self.save(file)
        self.features = self.open()
        return broken

    def append(self, file, names: list[str], features: torch.Tensor):
        if features.shape[1:] != self.shape:
            raise DataError(f"features of {names[0]} have the shape {list(features.shape[1:])}, "
                            f"expected {list(self.shape)}")
        features = features.to(torch.float16)
        if not features.isfinite().all():
            raise DataError(f"features of {names[0]} or one of the next {len(names) - 1} "
                            "are beyond float16")
        file.write(features.cpu().numpy().tobytes())
        for name in names:
            self.row[name] = len(self.row)

    def save(self, file):
        file.flush()
        os.fsync(file.fileno())
        index = json.dumps(self.about | {"pictures": self.row})
        write_atomically(self.folder / "index.json", index.encode())


def lock(file):
    """Waits for other processes; on Windows it cannot: encode with one at a time."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX)


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
                 say: Callable = print) -> list[dict[str, "Corpus"]]:
    """For each {task: split} a {task: corpus}. The store lies in data/features/SOURCE/NAME.

    Missing files raise DataError before any is encoded, or, allow_missing, are left out.
    """
    def refuse(bad, names, source, what):
        if bad and not allow_missing:
            raise DataError(f"{len(bad):,} of {len(names):,} {media(source)} are {what}, the first:"
                            f" {bad[0]} (--allow-missing goes on without them)")

    opened = []
    needed = defaultdict(dict)  # source -> names of its pictures, in order
    for part in splits:
        opened.append({task: read_examples(data, task, split) for task, split in part.items()})
        for task, examples in opened[-1].items():
            needed[TASKS[task].pictures].update(pictures_of(examples))

    # Find what no store has yet, then encode it.
    stores, found = {}, {}
    for source, names in needed.items():
        tokens = FRAMES if source in VIDEOS else VISUAL_SIDE ** 2
        folder = data / "features" / source / name
        store = FeatureStore(folder, features.hash, tokens, features.channels)
        new = [name for name in names if name not in store.row]
        folders = features.folders(data, source)
        below = " and ".join(map(str, folders))
        found[source] = find_files(folders, new, source in VIDEOS) if new else {}
        lost = [name for name in new if name not in found[source]]
        refuse(lost, names, source, f"missing below {below}")
        stores[source] = store
    for source, store in stores.items():
        broken = store.add(found[source], features.load, features.encode,
                           size=4 if source in VIDEOS else 64)
        refuse(broken, found[source], source, "unreadable")

    # A corpus of the examples whose pictures are there.
    corpora = []
    for part, read in zip(splits, opened):
        corpora.append({})
        for task, examples in read.items():
            place = f"{task}, {part[task]}"
            store = stores[TASKS[task].pictures]
            there = [e for e in examples if all(name in store.row for name in e.pictures)]
            if len(there) < len(examples):
                say(f"{place}: {len(there):,} of {len(examples):,} examples have their "
                    f"pictures, {100 * len(there) / len(examples):.1f} %")
            if not there:
                raise DataError(f"{place}: no example has its pictures")
            silent = sum(not e.subtitles for e in there)
            if silent and TASKS[task].video:
                say(f"{place}: {silent:,} of {len(there):,} examples have no subtitles")
            corpora[-1][task] = Corpus(task, there, tokenizer, store, prompts)
    return corpora


def pictures_of(examples):
    return dict.fromkeys(name for e in examples for name in e.pictures)


def media(source):
    return "videos" if source in VIDEOS else "pictures"


class Corpus:
    """The examples of a task's split as integers, in batches."""

    def __init__(self, task: str, examples: list[Example], tokenizer: Tokenizer,
                 store: FeatureStore, prompts: bool = True):
        self.task = task
        self.examples = examples
        self.store = store
        self.pad = tokenizer.pad
        texts = [text_ids(tokenizer, task, e, prompts) for e in examples]
        self.text = pad_rows(texts, max(map(len, texts)), self.pad)  # [examples, length]
        rows = [[store.row[name] for name in e.pictures] for e in examples]
        self.rows = np.array(rows)  # [examples, pictures]

        numbers = {}  # answer -> its number
        self.choices = []  # per example [(an answer's number, weight), ...]
        for e in examples:
            learned = [pair for pair in e.answers.items() if pair[1] > 0] or [("", 0.0)]
            self.choices.append([(numbers.setdefault(answer, len(numbers)), weight)
                                 for answer, weight in learned])
        self.targets = [tokenizer.encode(answer, TASKS[task].answer) for answer in numbers]
        self.length = max(map(len, self.targets))

    def __len__(self):
        return len(self.examples)

    def batch(self, indices: np.ndarray, size: int, seed=None, part: slice = slice(None),
              pin: bool = False) -> dict[str, torch.Tensor]:
        """Examples as the tensors that `VLModel.loss` takes, or without a seed only its inputs.

        Rows of weight 0 fill up to `size`. part: rows of one process. text_indices and
        label_indices say what is no padding, so that the device need not be asked.
        """
        real = len(indices)
        indices = np.concatenate([indices, np.full(size - real, indices[0])])
        ids = torch.from_numpy(self.text[indices[part]]).long()
        rows = self.rows[indices[part]]
        if pin:  # modes but "clip" copy once more
            shape = (*rows.shape, *self.store.features.shape[1:])
            features = torch.empty(*shape, dtype=torch.float16, pin_memory=True)
            np.take(self.store.features, rows, axis=0, out=features.numpy(), mode="clip")
        else:
            features = torch.from_numpy(self.store.features[rows])
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
        answers = [sample_answer(self.choices[i], rng) for i in indices]
        labels = pad_rows([self.targets[number] for number, _ in answers], self.length, -100)
        weights = np.array([weight for _, weight in answers])
        if TASKS[self.task].token_mean:
            tokens = (labels != -100).sum(1)
            weights = weights * tokens / tokens[:real].mean()
        weights = weights * len(indices) / real
        weights[real:] = 0
        return labels, weights


def text_ids(tokenizer: Tokenizer, task: str, example: Example, prompts: bool = True) -> list[int]:
    """The text with its prompt. Of a long one the subtitles are cut.

    The original cuts on the right, where the question is: video/tvqa_data.py#L206
    """
    row = TASKS[task]
    text = row.prompt.format(example.text) if prompts else example.text
    if not row.video:
        return tokenizer.encode(text, row.text)
    said = f"[Subs] {example.subtitles}".rstrip()
    ids = tokenizer.encode(f"{said} {text.lstrip()}")
    return cut(ids, len(tokenizer.encode(said)) - 1, row.text)


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
    sizes = {task: batch_size(task, batch * accumulate) for task in corpora}
    mixed = mixture(corpora, sizes, seed, epoch)
    first = epoch * len(mixed) + skip  # its number over all epochs, for seeds
    stride = world * accumulate
    parts = [slice(rank + world * i, None, stride) for i in range(accumulate)]

    def make(job):
        number, (task, indices) = job
        padded = -(-sizes[task] // stride) * stride
        return task, [corpora[task].batch(indices, padded, f"{seed} {number}", part, pin)
                      for part in parts]

    return prefetch(make, enumerate(mixed[skip:], first), 3, threads=2)


def batch_size(task: str, batch: int) -> int:
    """A task's share of --batch."""
    return max(1, int(TASKS[task].batch * batch))


def steps_per_epoch(corpora: dict[str, Corpus], batch: int) -> int:
    """batch: of a step, so --batch times --accumulate."""
    return sum(-(-len(corpus) // batch_size(task, batch)) for task, corpus in corpora.items())


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
    """Runs a command. DataError, OSError and `problems` end it in one sentence, exit code 2."""
    try:
        main()
    except (DataError, OSError, *problems) as problem:
        print(f"\n{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


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
        try:
            examples = read_examples(data, task, split)
        except DataError as problem:
            advice = f"get it at {row.source}" if split in needed else "needed for submissions only"
            print(f"{task:<8}{split:<20}{problem}\n{'':28}{advice}")
            good &= split not in needed
            continue
        published = row.counts.get(split)
        note = f" (published: {published:,})" if published else ""
        if len(examples) == published:
            note = " (as published)"
        without = sum(not (e.subtitles if row.video else e.answers) for e in examples)
        what = "subtitles" if row.video else "an answer to learn"
        print(f"{task:<8}{split:<20}{len(examples):>9,} examples{note}, {without:,} without {what}")
        if split in needed:
            pictures.update(pictures_of(examples))
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
            return load_features(path)
        return load_video(path, 32) if video else load_picture(path, 32)

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
