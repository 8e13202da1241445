"""Pixels and words become tensors.

The table of tasks comes first; everything below serves a column of it: readers of the official files, pictures and the
store of their features, batches of one shape. `python data.py --data DIR` says what of all that is there.

Layout of DIR, as the official archives unpack and as the authors' repository has it:

    vqa/   v2_OpenEnded_mscoco_{train2014,val2014}_questions.json   v2_mscoco_{train2014,val2014}_annotations.json
    COCO/  images/{train2014,val2014}/*.jpg   dataset_coco.json
    GQA/   images/*.jpg   {train,val,testdev}_balanced_questions.json          or VG/VG_100K/*.jpg, VG/VG_100K_2/*.jpg

Paper: https://arxiv.org/abs/2112.06825, section 4. Needs torch, numpy, pillow, tqdm and of ours tokenizer.py.
"""

import argparse
import json
import os
import random
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tokenizer import BPE

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # CLIP's, of pixels in 0..1


class DataError(ValueError):
    """The data cannot be used as they are; the message names the file and what was expected."""


@dataclass(slots=True)
class Example:
    """One question, from whatever data set."""
    id: int | str
    pictures: tuple[str, ...]                # file names below the data folder
    text: str
    answers: dict[str, float]                # what may be learned, with weights; empty where there are no labels
    kind: str = ""                           # the kind of question, for blind baselines and tables
    truth: dict = field(default_factory=dict)       # what the metric wants to know


# ---- VQAv2 --------------------------------------------------------------------------------------------------------

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
    """The official processPunctuation: a mark beside a space, or any mark beside a number with a comma, just goes."""
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
    """Karpathy's parts of train2014 and val2014 together; an answer's weight is its soft score."""
    coco = data / "COCO" / "dataset_coco.json"
    parts = {"karpathy_train": ("train", "restval"), "karpathy_val": ("val",), "karpathy_test": ("test",)}[split]
    members = {image["cocoid"]: image["filepath"] for image in records(coco, "images", "cocoid", "filepath", "split")
               if image["split"] in parts}
    annotations, questions = {}, {}
    for year in ("train2014", "val2014"):
        asked = data / "vqa" / f"v2_OpenEnded_mscoco_{year}_questions.json"
        given = data / "vqa" / f"v2_mscoco_{year}_annotations.json"
        questions |= {r["question_id"]: r for r in records(asked, "questions", "question_id", "image_id", "question")}
        annotations |= {r["question_id"]: r for r in records(given, "annotations", "question_id", "image_id", "answers",
                                                             "multiple_choice_answer")}
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
            examples.append(Example(number, (f"COCO/images/{members[image]}/COCO_{members[image]}_{image:012d}.jpg",),
                                    question["question"], answers, annotation.get("question_type", ""),
                                    {"answers": people, "type": annotation.get("answer_type", "")}))
    return examples


# ---- GQA ----------------------------------------------------------------------------------------------------------


def read_gqa(data: Path, split: str) -> list[Example]:
    """The balanced questions of one or more official parts ("train,val")."""
    examples = []
    for part in split.split(","):
        path = data / "GQA" / f"{part}_balanced_questions.json"
        content = read_json(path)
        foreign = DataError(f"{path} is not GQA's: expected an object {{question id: {{imageId, question, ...}}}}")
        if not isinstance(content, dict):
            raise foreign
        for number, record in content.items():
            if not isinstance(record, dict) or not {"imageId", "question"} <= record.keys():
                raise foreign
            types = record.get("types") or {}
            examples.append(Example(number, (f"GQA/images/{record['imageId']}.jpg",), record["question"],
                                    {record["answer"]: 1.0} if "answer" in record else {}, types.get("detailed", ""),
                                    {"answer": record.get("answer"), "structural": types.get("structural", "")}))
    return examples


# ---- the table of tasks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    prompt: str                              # put before the question, so that one adapter can tell the tasks apart
    text: int                                # longest question in tokens
    answer: int                              # longest answer to learn, in tokens
    batch: float                             # size of a batch, relative to --batch
    read: Callable[[Path, str], list[Example]]
    train: str                               # names of splits
    validation: str
    test: str
    counts: dict[str, int]                   # how many examples the official splits have
    metric: str                              # a key of evaluate.METRICS
    pictures: str                            # the data set whose pictures it asks about
    source: str                              # where to get it


TASKS = {  # lengths, batches and splits: multitask.py of the original, whose prompt for GQA is "gpa: ", a slip of the pen
    "vqa": Task("vqa: ", 20, 10, 1, read_vqa, "karpathy_train", "karpathy_val", "karpathy_test",
                {"karpathy_train": 605102, "karpathy_val": 26729, "karpathy_test": 26280}, "vqa", "COCO",
                "https://visualqa.org/download.html, https://cocodataset.org and caption_datasets.zip of "
                "https://cs.stanford.edu/people/karpathy/deepimagesent"),
    "gqa": Task("gqa: ", 20, 10, 5 / 3, read_gqa, "train,val", "testdev", "testdev",
                {"train,val": 1075062, "testdev": 12578}, "gqa", "GQA",
                "https://cs.stanford.edu/people/dorarad/gqa/download.html"),
}
ELSEWHERE = {"GQA/images": ("VG/VG_100K", "VG/VG_100K_2")}     # GQA's pictures, but for testdev, are Visual Genome's


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; `python data.py --data DIR` says where to get what is needed") from None
    except ValueError as problem:
        raise DataError(f"{path} is truncated or not JSON: {problem}") from None


def records(path: Path, key: str, *fields: str) -> list[dict]:
    """The list under `key` of a JSON object, each of whose records has the fields."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise DataError(f"{path} is of another data set: expected an object with a list {key!r}")
    for record in content[key]:
        missing = [name for name in fields if not isinstance(record, dict) or name not in record]
        if missing:
            raise DataError(f"{path} is of another data set: a record of {key!r} has no {', '.join(missing)}")
    return content[key]


def read_examples(data: str | Path, task: str, split: str) -> list[Example]:
    """The examples of a split. Raises DataError where its files are missing, broken or empty."""
    examples = TASKS[task].read(Path(data), split)
    if not examples:
        raise DataError(f"{task} has no examples for {split} below {data}")
    return examples


# ---- pictures and their features ----------------------------------------------------------------------------------


def find_picture(data: Path, name: str) -> Path | None:
    folder, _, file = name.rpartition("/")
    for place in (folder, *ELSEWHERE.get(folder, ())):
        if (data / place / file).exists():
            return data / place / file
    return None


def load_picture(path: Path, resolution: int) -> np.ndarray:
    """RGB bytes [resolution, resolution, 3], squeezed to a square as the paper's features were. Raises DataError."""
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("RGB").resize((resolution, resolution), Image.Resampling.BICUBIC))
    except Exception as problem:                # pillow raises half a dozen kinds for broken and for hostile files
        raise DataError(f"{path} is not a readable picture: {problem}") from None


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Bytes [B, H, W, 3] to what CLIP sees: [B, 3, H, W], mean 0 and deviation 1 over its training pictures."""
    mean, std = (torch.tensor(x, device=pictures.device) for x in (MEAN, STD))
    return ((pictures / 255 - mean) / std).permute(0, 3, 1, 2)


def load_pictures(paths: list[Path], resolution: int, size: int = 64) -> Iterator[list]:
    """Lists of `size` pictures, or of the DataError in the place of a broken one; threads read ahead."""
    def attempt(path):
        try:
            return load_picture(path, resolution)
        except DataError as problem:
            return problem

    with ThreadPoolExecutor() as threads:
        ahead = deque()
        for i in range(0, len(paths), size):
            ahead.append([threads.submit(attempt, path) for path in paths[i:i + size]])
            if len(ahead) > 2:
                yield [future.result() for future in ahead.popleft()]
        for futures in ahead:
            yield [future.result() for future in futures]


class FeatureStore:
    """The visual tokens of the pictures of one data set, encoded once: float16 [pictures, tokens, channels] in one file.

    folder/features.f16 is memory-mapped, folder/index.json says whose features they are and which picture has which row.
    """

    def __init__(self, folder: Path, encoder_hash: str, tokens: int, channels: int):
        self.folder, self.shape = folder, (tokens, channels)
        self.about = {"encoder": encoder_hash, "tokens": tokens, "channels": channels}
        self.row = {}                           # picture -> row
        if (folder / "index.json").exists():
            index = read_json(folder / "index.json")
            if not isinstance(index, dict) or not isinstance(index.get("pictures"), dict):
                raise DataError(f"{folder / 'index.json'} is no index of features; remove {folder} to encode anew")
            if {key: index.get(key) for key in self.about} != self.about:
                raise DataError(f"{folder} holds features of another encoder; remove that folder to encode anew")
            self.row = index["pictures"]
        self.features = self.open()

    def open(self):
        if not self.row:
            return np.empty((0, *self.shape), np.float16)
        path, rows = self.folder / "features.f16", len(self.row)
        if not path.exists() or path.stat().st_size < rows * 2 * np.prod(self.shape):
            raise DataError(f"{path} has fewer features than its index names; remove {self.folder} to encode anew")
        return np.memmap(path, np.float16, "r", shape=(rows, *self.shape))

    def locate(self, data: Path, names: Iterable[str]) -> dict[str, Path]:
        """Where the pictures are that have no features yet. Raises DataError if any is missing."""
        paths = {name: find_picture(data, name) for name in dict.fromkeys(names) if name not in self.row}
        missing = [name for name, path in paths.items() if path is None]
        if missing:
            raise DataError(f"{len(missing):,} of {len(paths):,} pictures are missing below {data}, "
                            f"the first is {missing[0]}")
        return paths

    def add(self, paths: dict[str, Path], encode: Callable, resolution: int):
        """Encodes pictures; encode takes bytes [B, H, W, 3] and gives [B, tokens, channels].

        What is encoded is kept, also if the run is killed. Raises DataError if some were unreadable, after the others.
        """
        if not paths:
            return
        names = list(paths)
        self.folder.mkdir(parents=True, exist_ok=True)
        broken, size = [], 64
        with open(self.folder / "features.f16", "ab") as file, tqdm(total=len(names), unit=" pictures", desc=(
                f"encoding {self.folder.parts[-3]}")) as bar:
            file.truncate(len(self.row) * 2 * int(np.prod(self.shape)))         # rows a killed run had not indexed
            for i, loaded in enumerate(load_pictures(list(paths.values()), resolution, size)):
                good = [(name, x) for name, x in zip(names[i * size:], loaded) if not isinstance(x, DataError)]
                broken += [x for x in loaded if isinstance(x, DataError)]
                if good:
                    features = encode(torch.from_numpy(np.stack([x for _, x in good])))
                    file.write(features.to(torch.float16).cpu().numpy().tobytes())
                    self.row.update({name: len(self.row) + k for k, (name, _) in enumerate(good)})
                if i % 100 == 99:
                    self.save(file)
                bar.update(len(loaded))
            self.save(file)
        self.features = self.open()
        if broken:
            raise DataError(f"{len(broken):,} of {len(names):,} pictures are unreadable, the first: {broken[0]}")

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
    """The examples of one task and split as integers, and batches of them that all have one shape."""

    def __init__(self, task: str, examples: list[Example], tokenizer: BPE, store: FeatureStore, prompts: bool = True):
        self.task, self.examples, self.store, self.pad = task, examples, store, tokenizer.pad
        row = TASKS[task]
        prompt = row.prompt if prompts else ""
        self.text = fill([tokenizer.encode(prompt + e.text, row.text) for e in examples], row.text, self.pad)
        self.rows = np.array([[store.row[name] for name in e.pictures] for e in examples])
        numbers = {}                            # answer -> number, over all examples
        self.choices = [[(numbers.setdefault(answer, len(numbers)), weight) for answer, weight in e.answers.items()] or
                        [(numbers.setdefault("", len(numbers)), 0.0)] for e in examples]
        self.targets = [tokenizer.encode(answer, row.answer) for answer in numbers]
        self.length = max(map(len, self.targets))

    def __len__(self):
        return len(self.examples)

    def batch(self, indices: np.ndarray, size: int, seed=None, part: slice = slice(None)) -> dict[str, torch.Tensor]:
        """Examples as tensors: ids [size, T], features [size, pictures, tokens, channels]; with a seed labels, weights.

        Each example draws one of its answers with a chance in proportion to its weight, which also weighs its loss.
        Where there are fewer examples than `size`, rows of weight 0 fill up. `part` picks the rows of one process.
        """
        real, indices = len(indices), np.concatenate([indices, np.full(size - len(indices), indices[0])])
        batch = {"ids": torch.from_numpy(self.text[indices[part]].astype(np.int64)),
                 "features": torch.from_numpy(self.store.features[self.rows[indices[part]]])}
        if seed is not None:
            rng = random.Random(seed)
            drawn = [draw(self.choices[i], rng) for i in indices]
            weights = torch.tensor([weight for _, weight in drawn]) * size / real           # the mean is over real rows
            weights[real:] = 0
            labels = fill([self.targets[number] for number, _ in drawn], self.length, -100)
            batch |= {"labels": torch.from_numpy(labels[part].astype(np.int64)), "weights": weights[part]}
        return batch


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
        for split in dict.fromkeys((row.train, row.validation, row.test)):
            try:
                examples = read_examples(data, task, split)
            except DataError as problem:
                print(f"{task:<8}{split:<16}{problem}\n{'':24}get it at {row.source}")
                good = False
                continue
            expected = row.counts[split]
            note = "as published" if len(examples) == expected else f"published: {expected:,}"
            unlabelled = sum(not e.answers for e in examples)
            print(f"{task:<8}{split:<16}{len(examples):>9,} examples ({note}), "
                  f"{unlabelled:,} without an answer to learn")
            pictures.setdefault(row.pictures, {}).update(dict.fromkeys(name for e in examples for name in e.pictures))
    for name, needed in pictures.items():
        paths = {picture: find_picture(data, picture) for picture in needed}
        missing = [picture for picture, path in paths.items() if path is None]
        found, broken = [path for path in paths.values() if path], []
        with tqdm(total=len(found), unit=" pictures", desc=f"looking at {name}") as bar:
            for loaded in load_pictures(found, 32):
                broken += [x for x in loaded if isinstance(x, DataError)]
                bar.update(len(loaded))
        print(f"{name:<8}{len(needed):>9,} pictures, {len(missing):,} missing, {len(broken):,} unreadable")
        for line in missing[:10] + [str(problem) for problem in broken[:10]]:
            print(f"{'':8}{line}")
        good &= not missing and not broken
    return good


def main():
    parser = argparse.ArgumentParser(description="Says which data are there, which are missing and where to get them.",
                                     allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with vqa/, COCO/, GQA/")
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
