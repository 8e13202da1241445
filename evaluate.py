"""How good a run is: official metrics, predictions, submissions, your own questions.

    python evaluate.py RUN                 every task on its validation split, or --split test
    python evaluate.py RUN --blind         the commonest answer per kind of question instead
    python evaluate.py RUN --shuffle       every question with the picture of another
    python evaluate.py RUN --submit DIR    what the official servers want
    python evaluate.py RUN --image my.jpg --question "What color is the kite?"
    python evaluate.py RUN --video my.mp4 --question "What does Ann hold?" --choices "a cup|a hat"

RUN is a folder of train.py. The first leaves predictions.html in it, to look at, and
predictions_TASK_SPLIT.jsonl: lines {id, question, answer, truth}, a video's with subtitles.
--predictions FILE scores such lines.

Needs torch, numpy, pillow, tqdm, model.py, adapters.py, tokenizer.py, data.py.
original: FILE#L is https://github.com/ylsung/VL_adapter/blob/545fcbb/VL-T5/src/FILE#L
"""

import argparse
import base64
import html
import io
import json
import math
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from adapters import METHODS, AdapterError, cast_frozen, check_method, install, load, select
from data import (TASKS, Corpus, DataError, Example, Features, check_labels, choose_from,
                  find_files, folders_of, from_clip, is_released, load_video, open_corpora,
                  open_picture, open_regular, prefetch, read_examples, released_features,
                  report_problems, sha256, task_list, text_ids, write_atomically)
from model import ADDED_TOKENS, VLModel, WeightsError, load_backbone, read_json
from tokenizer import Tokenizer, VocabularyError, load_tokenizer, ptb_words, vqa_normal_form


# ---- metrics: strings in, numbers out; copy from here ----
# Needs math, collections, itertools; official only with tokenizer.py's vqa_normal_form, ptb_words.
# vqa_accuracy is in per cent; bleu and rouge_l are from 0 to 1.


def one_line(text: str) -> str:  # as in vqa_normal_form
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(prediction: str, answers: list[str], normal_form) -> float:
    """VQA accuracy in per cent: the mean over people of min(1, others who said so / 3).

    Normal forms are compared, unless all people agree to the letter (vqaEval.py of
    GT-Vision-Lab/VQA).

    >>> round(vqa_accuracy("Two", ["two"] * 3 + ["2"] * 7, str.lower))  # (7 · 1 + 3 · 2/3) / 10
    90
    """
    if len(set(answers)) == 1:
        normal_form = one_line
    prediction = normal_form(prediction)
    answers = [normal_form(answer) for answer in answers]
    said = answers.count(prediction)
    others = [said - (answer == prediction) for answer in answers]
    return 100 * sum(min(1, count / 3) for count in others) / len(answers)


def mean_by(values: list[float], names: list[str]) -> dict[str, float]:
    """The mean of the values under each name but "", in alphabetical order."""
    groups = defaultdict(list)
    for value, name in zip(values, names):
        if name:
            groups[str(name)].append(value)
    return {name: sum(group) / len(group) for name, group in sorted(groups.items())}


def ngrams(words: list[str]) -> Counter[tuple[str, ...]]:
    """How often each sequence of one to four words occurs."""
    shifted = [words[i:] for i in range(4)]
    return Counter(chain(*(zip(*shifted[:n]) for n in range(1, 5))))


def bleu(hypotheses: list[str], references: list[list[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002).

    BLEU-n = min(1, exp(1 - r / c)) · (p_1 · ... · p_n)^(1/n). p_n is the share of n-grams that are
    in a reference, each at most as often as in the one that has most of it. c is the length of all
    hypotheses, r that of the references nearest in length (of two, the shorter).
    """
    matches = [0] * 4  # [n - 1]
    totals = [0] * 4
    length = 0
    nearest = 0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        words = hypothesis.split()
        refs = [text.split() for text in texts]
        length += len(words)
        nearest += min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]

        # The greatest count of each n-gram in one reference.
        most = Counter()
        for ref in refs:
            most |= ngrams(ref)
        for gram, count in (ngrams(words) & most).items():
            matches[len(gram) - 1] += count
        for i in range(4):
            totals[i] += max(0, len(words) - i)

    # The tiny numbers are coco-caption's.
    ratio = (length + 1e-15) / (nearest + 1e-9)
    brevity = math.exp(min(0, 1 - 1 / ratio))
    product = 1.0
    scores = []
    for n in range(1, 5):
        product *= (matches[n - 1] + 1e-15) / (totals[n - 1] + 1e-9)
        scores.append(brevity * product ** (1 / n))
    return scores


def common_length(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence.

    >>> common_length(["a", "red", "cat", "runs"], ["the", "red", "dog", "runs"])
    2
    """
    row = [0] * (len(b) + 1)  # [j]: of the words of a so far with the first j of b
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            best = diagonal + 1 if word == other else max(row[j], row[j - 1])
            diagonal = row[j]
            row[j] = best
    return row[-1]


def rouge_l(hypotheses: list[str], references: list[list[str]]) -> float:
    """ROUGE-L (Lin 2004): F = (1 + β²) · P · R / (R + β² · P), β = 1.2, averaged over hypotheses.

    P and R are the longest common subsequence over the lengths of hypothesis and reference, each
    the greatest of all references. An empty text is one empty word.
    """
    total = 0.0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        words = hypothesis.split(" ")
        refs = [text.split(" ") for text in texts]
        common = [common_length(words, ref) for ref in refs]
        p = max(common) / len(words)
        r = max(count / len(ref) for count, ref in zip(common, refs))
        if p and r:
            total += (1 + 1.2 ** 2) * p * r / (r + 1.2 ** 2 * p)
    return total / len(hypotheses)


def cider(hypotheses: list[str], references: list[list[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015), from 0 to 10, averaged over images; coco-caption's CIDEr.

    An n-gram weighs count · ln(N / images in whose references it is) for N images (of one alone all
    weights are 0); an n-gram of no reference counts as in one. Hypothesis h and reference r score
    Σ min(h, r) · r / (|h| · |r|) · exp(-d² / (2 · 6²)) for each n from 1 to 4, d being the
    difference of their lengths; 10 times the mean over n and references is CIDEr.
    """
    images_with = Counter()
    for texts in references:
        images_with.update(set().union(*(ngrams(text.split()) for text in texts)))

    def weigh(words: list[str]) -> list[dict]:
        weights = [{}, {}, {}, {}]  # [n - 1]
        for gram, count in ngrams(words).items():
            rarity = math.log(len(references) / images_with.get(gram, 1))
            weights[len(gram) - 1][gram] = count * rarity
        return weights

    total = 0.0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        words = hypothesis.split()
        weights = weigh(words)
        for text in texts:
            ref = text.split()
            cosines = 0.0
            for h, r in zip(weights, weigh(ref)):
                norms = math.hypot(*h.values()) * math.hypot(*r.values())
                products = [min(h[gram], r[gram]) * r[gram] for gram in h.keys() & r.keys()]
                if norms:
                    cosines += sum(products) / norms
            d = len(words) - len(ref)
            total += cosines / 4 / len(texts) * math.exp(-d ** 2 / 72)
    return 10 * total / len(hypotheses)


# ---- to here ----


# ---- the scores of each task, and what its official server wants ----


def score_vqa(examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """VQA accuracy, overall and by type of answer."""
    truths = [e.truth["answers"] for e in examples]
    values = [vqa_accuracy(p, truth, vqa_normal_form) for p, truth in zip(predictions, truths)]
    types = [e.truth["type"] for e in examples]
    return {"accuracy": sum(values) / len(values), **mean_by(values, types)}


def score_gqa(examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """Exact match of balanced questions, of open ones (structural type query) and of the rest.

    If others were asked, too, also consistency: how often what a right answer entails is right.
    original: gqa_data.py#L425-L432 (accuracy)
    """
    right = {e.id: 100.0 * (p == e.truth["answer"]) for e, p in zip(examples, predictions)}
    balanced = [e for e in examples if e.truth.get("balanced", True)]
    values = [right[e.id] for e in balanced]
    kinds = {"": "", "query": "open"}  # all other structural types: binary
    names = [kinds.get(e.truth.get("structural", ""), "binary") for e in balanced]
    scores = {"accuracy": sum(values) / len(values), **mean_by(values, names)}
    if len(balanced) == len(examples):
        return scores

    shares = []
    for e in balanced:
        entailed = [right[i] for i in e.truth["entailed"] if i != e.id and i in right]
        if right[e.id] and entailed:
            shares.append(sum(entailed) / len(entailed))
    if shares:
        scores["consistency"] = sum(shares) / len(shares)
    return scores


def score_nlvr(examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """Accuracy, and consistency: the share of statements judged right on every pair.

    original: nlvr_data.py#L443-L467
    """
    groups = defaultdict(list)
    for e, p in zip(examples, predictions):
        split_set, pair, sentence = e.id.rsplit("-", 2)
        groups[split_set, sentence].append(100.0 * (p == e.truth["answer"]))
    values = list(chain(*groups.values()))
    return {"accuracy": sum(values) / len(values),
            "consistency": sum(map(min, groups.values())) / len(groups)}


def score_choices(examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """Accuracy, overall and per show."""
    values = [100.0 * (p == e.truth["answer"]) for e, p in zip(examples, predictions)]
    shows = [e.truth["show"] for e in examples]
    return {"accuracy": sum(values) / len(values), **mean_by(values, shows)}


def score_captions(examples: list[Example], predictions: list[str],
                   ascii_only: bool = False) -> dict[str, float]:
    """CIDEr, BLEU and ROUGE-L. ascii_only: other characters are spaces, as in VALUE."""
    def words(text: str) -> str:
        if ascii_only:
            text = re.sub(r"[^\0-\x7f]", " ", text)
        return ptb_words(text)

    said = [words(text) for text in predictions]
    references = [[words(text) for text in e.truth["references"]] for e in examples]
    names = ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    values = [cider(said, references), *bleu(said, references), rouge_l(said, references)]
    return {name: 100 * value for name, value in zip(names, values)}


def write_list(key: str, value: str, examples: list[Example], answers: list[str]) -> str:
    return json.dumps([{key: e.id, value: answer} for e, answer in zip(examples, answers)])


def write_statements(examples: list[Example], answers: list[str]) -> str:
    """Lines: test1-0-1-0,True"""
    return "".join(f"{e.id},{answer.capitalize()}\n" for e, answer in zip(examples, answers))


def write_choices(examples: list[Example], answers: list[str]) -> str:
    """{id: number of the answer, or 0}. original: multitask_video.py#L444-L451"""
    numbers = [int(answer[1]) if answer[1:].isdecimal() else 0 for answer in answers]
    return json.dumps({e.id: number for e, number in zip(examples, numbers)})


def write_moments(examples: list[Example], answers: list[str]) -> str:
    """VALUE's JSON lines; TVC's name the moment."""
    lines = []
    for e, answer in zip(examples, answers):
        if e.truth["ts"] is None:
            moment = {"video_id": e.truth["video"]}
        else:
            moment = {"vid_name": e.truth["video"], "ts": e.truth["ts"]}
        lines.append(json.dumps(moment | {"clip_id": e.id, "descs": [{"desc": answer}]}) + "\n")
    return "".join(lines)


@dataclass(frozen=True)
class Metric:
    score: Callable  # (examples, predictions) -> {name: per cent}, the headline first
    write: Callable  # (examples, answers) -> the official server's file


METRICS = {  # by TASKS[task].metric
    "vqa": Metric(score_vqa, partial(write_list, "question_id", "answer")),
    "gqa": Metric(score_gqa, partial(write_list, "questionId", "prediction")),
    "nlvr": Metric(score_nlvr, write_statements),
    "caption": Metric(score_captions, partial(write_list, "image_id", "caption")),
    "choices": Metric(score_choices, write_choices),
    "moment": Metric(partial(score_captions, ascii_only=True), write_moments),
}


def score(task: str, examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """The official scores, headline first. Raises DataError for hidden labels."""
    check_labels(task, examples)
    return METRICS[TASKS[task].metric].score(examples, predictions)


def print_scores(scores: dict[str, dict[str, float]], title: str):
    print(f"\n{title:<24}{'score':>8}")
    for task, parts in scores.items():
        headline, *rest = parts.items()
        listed = "  ".join(f"{name} {value:.2f}" for name, value in rest)
        print(f"{task:<24}{headline[1]:>8.2f}    {listed}")
        if headline == ("CIDEr", 0.0):
            print(f"{'':24}CIDEr weighs words by rarity: of one picture alone it is always 0")


# ---- a run: its flags and its model ----


class RunError(ValueError):
    """A run cannot be started, resumed or evaluated."""


PROBLEMS = RunError, WeightsError, VocabularyError, AdapterError


def flag(default, text: str, **parsing):
    """A field of `Run`: its default, copied (it may be a list), and what argparse needs."""
    return field(default_factory=partial(copy, default), metadata={"help": text} | parsing)


def read_sizes(text: str) -> dict:
    """"reduction=4,shared_phm_rule=true" is {"reduction": 4, "shared_phm_rule": True}."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name: json.loads(value) for name, value in pairs}
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"expected K=4,K=true,... not {text!r}") from None


LIMITS = {"epochs": (1, 2 ** 31), "batch": (1, 2 ** 31), "accumulate": (1, 2 ** 31),
          "lr": (1e-30, 1e30), "seed": (0, 2 ** 31 - 1)}
HEADINGS = {  # groups of --help, by their first flag
    "method": "what is trained",
    "data": "files (default: a built-in miniature)",
    "epochs": "how",
}


def is_path(text: str) -> bool:
    """Whether a file may have such a name."""
    try:
        return "\0" not in text and bool(os.fsencode(text))
    except UnicodeEncodeError:
        return False


# What a run's config.json has besides what only people read.
CONFIG = {"flags": dict, "examples": dict, "id": str, "backbone_sha256": str, "vision_sha256": str}


@dataclass
class Run:
    """The flags of train.py, kept in RUN/config.json. train.py fills in None; `sites` None: all."""
    method: str = flag("adapter", f"{', '.join(METHODS)}, or two joined by + (default: adapter)")
    tasks: list = flag(["vqa", "gqa", "nlvr", "caption"], f"of {', '.join(TASKS)} (default: the "
                       "first four)", metavar="A,B", type=task_list)
    sharing: str = flag("single", "one adapter for all tasks (default) or per task (multiple); "
                        "half: only down projections per task",
                        choices=("single", "half", "multiple"))
    sites: list | None = flag(None, "only these: ffn, encoder, decoder.cross_attn, ... "
                              "(default: all)", metavar="S,S", type=lambda text: text.split(","))
    sizes: dict = flag({}, "such as reduction=4", metavar="K=V,K=V", type=read_sizes)
    prompts: bool = flag(True, "begin questions with their task's name (default)")

    data: str = flag(None, "data sets; `python data.py` looks at them")
    weights: str = flag(None, "pre-trained weights: WEIGHTS/bart-base/, WEIGHTS/RN101.pt")
    backbone: str = flag(None, "folder in --weights (default: bart-base; miniature: bart, t5)")
    vision: str = flag(None, "CLIP in --weights, or features in DATA/video/vis_features/*/ "
                       "(default: RN101; videos: clip-vit)")
    allow_missing: bool = flag(False, "leave out examples without a readable picture")
    cache: str | None = flag(None, "where features are kept (default: DATA)", type=str)

    epochs: int = flag(None, "default: 20; videos: 7")
    batch: int = flag(None, "examples a step of all processes (default: 500, T5 300; video 50, 30)")
    accumulate: int = flag(1, "batches a step (default: 1)")
    recompute: bool = flag(False, "less memory, a third more time")
    lr: float | int = flag(None, "highest rate (default: the first method's)", type=float)
    seed: int = flag(9595, "default: 9595, as the authors'")
    bf16: bool = flag(None, "bfloat16 autocast (default: on CUDA)")
    compile: bool = flag(None, "torch.compile (default: on CUDA)")

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser):
        """A flag that is not given is None."""
        for row in fields(cls):
            if row.name in HEADINGS:
                group = parser.add_argument_group(HEADINGS[row.name])
            on_off = {"action": argparse.BooleanOptionalAction}
            kind = on_off if row.type is bool else {"type": row.type}
            group.add_argument("--" + row.name.replace("_", "-"), **kind | row.metadata)

    def check(self, complete: bool = True):
        """Raises RunError; None passes unless complete."""
        for row in fields(self):
            value = getattr(self, row.name)
            if value is None and not complete:
                continue
            kind = row.type.__name__ if isinstance(row.type, type) else row.type
            good = isinstance(value, row.type) and (type(value) is not bool or row.type is bool)
            if row.name in LIMITS:
                least, most = LIMITS[row.name]
                kind = f"a number from {least:,} to {most:,}"
                good = good and least <= value <= most
            if not good or isinstance(value, str) and not is_path(value):
                raise RunError(f"{row.name} is {value!r}, expected {kind}")

        try:
            check_method(self.method, self.sharing, self.sizes)
        except AdapterError as problem:
            raise RunError(f"--method {self.method} cannot be installed: {problem}") from None
        known = list(TASKS)  # a list, for what has no hash
        tasks = self.tasks
        if not tasks or any(task not in known or tasks.count(task) > 1 for task in tasks):
            raise RunError(f"tasks are {tasks}, expected some of {', '.join(TASKS)}")
        if len({TASKS[task].video for task in tasks}) > 1:
            raise RunError("pictures and videos see features of different kinds: train them apart")
        if self.sites == [] or any(not isinstance(site, str) for site in self.sites or ()):
            raise RunError(f"sites are {self.sites}, expected words, or none")

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """The run in a folder. Raises RunError."""
        config = cls.read_config(folder)
        flags = {"cache": None} | config["flags"]  # older runs have none
        try:
            run = cls(**{row.name: flags[row.name] for row in fields(cls)})
            run.check()
            return run
        except KeyError as name:
            problem = f"its flags lack {name}"
        except RunError as odd:
            problem = odd
        raise RunError(f"{folder / 'config.json'} is not the config.json of a run: {problem}")

    @staticmethod
    def read_config(folder: Path) -> dict:
        """config.json of a run. Raises RunError."""
        path = folder / "config.json"
        if not path.exists():
            raise RunError(f"{folder} is not a run: it has no config.json")
        config = {"examples": {}, "id": ""} | read_json(path)  # older runs have neither
        for name, kind in CONFIG.items():
            if not isinstance(config.get(name), kind):
                raise RunError(f"{path} is not the config.json of a run: {name} is "
                               f"{config.get(name)!r}, expected {kind.__name__}")
        return config

    @staticmethod
    def load_weights(model: VLModel, folder: Path, name: str) -> dict:
        """best.pt or last.pt into the model; returns what else is in it. Raises RunError.

        Weights of another run may fit, too: so each file knows the id of its run.
        """
        others = load(model, folder / name)
        if others.get("run", "") != Run.read_config(folder)["id"]:
            raise RunError(f"{folder / name} is of another run than {folder / 'config.json'}")
        return others

    @property
    def video(self) -> bool:
        return TASKS[self.tasks[0]].video

    def weight_path(self, name: str) -> Path:
        """The file or folder in --weights. Raises RunError."""
        folder = Path(self.weights)
        for path in (folder / name, folder / f"{name}.pt"):
            if path.exists():
                return path
        there = sorted(path.name.removesuffix(".pt") for path in folder.glob("*"))
        listed = ", ".join(there[:8] + ["..."] * (len(there) > 8)) or "nothing"
        hint = ""
        if name == "clip-vit":
            hint = " nor in video/vis_features; for your own videos: --vision RN101"
        raise RunError(f"no weights called {name} in {folder}{hint} (there: {listed})")

    def reading(self) -> dict:
        """How `open_corpora` reads."""
        return {"prompts": self.prompts, "allow_missing": self.allow_missing,
                "cache": Path(self.cache) if self.cache else None}

    def family(self) -> str:
        """model_type of the backbone's config.json: bart or t5."""
        return read_json(self.weight_path(self.backbone) / "config.json").get("model_type", "")

    def hashes(self) -> dict[str, str]:
        """sha256 of the pre-trained weights; of released features the name."""
        vision = self.vision
        if not is_released(Path(self.data), vision):
            vision = file_hash(self.weight_path(vision))
        return {"backbone_sha256": file_hash(self.weight_path(self.backbone)),
                "vision_sha256": vision}

    def check_hashes(self, folder: Path, hashes: dict[str, str]):
        """Raises RunError unless the run in a folder has them."""
        config = self.read_config(folder)
        for name, digest in hashes.items():
            if config[name] != digest:
                raise RunError(f"{folder} was begun with other weights than these: {name} differs "
                               "from its config.json")


def file_hash(path: Path) -> str:
    """sha256 of a weight file, or of the one in a folder."""
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.exists():
            path = path.with_name("pytorch_model.bin")
    if not path.exists():
        raise RunError(f"{path} is missing")
    return sha256(path)


def open_run(run: Run, hashes: dict[str, str],
             device: torch.device) -> tuple[VLModel, Tokenizer, Features, int]:
    """The model with the run's method, not yet on the device; its tokenizer; what encodes pictures,
    on the device; how many sites were filled.
    """
    if is_released(Path(run.data), run.vision):
        if not run.video:
            raise RunError(f"--vision {run.vision} is of videos, but {run.tasks[0]} has pictures")
        features = released_features(Path(run.data), run.vision)
    else:
        path = run.weight_path(run.vision)
        features = from_clip(path, hashes["vision_sha256"], run.video, device)

    # VL-T5's added tokens: no text has them; the last ones' embeddings are the places in the grid.
    # original: multitask.py#L88-L93
    numbers = range(ADDED_TOKENS // 2 - 1, -1, -1)
    added = [f"<{kind}_{i}>" for kind in ("extra_id", "vis_extra_id") for i in numbers]
    folder = run.weight_path(run.backbone)
    tokenizer = load_tokenizer(folder, added)

    torch.manual_seed(run.seed)  # for visual part, added tokens, method
    model = load_backbone(folder, features.channels, len(tokenizer))
    for name, theirs, ours in (("pad_token_id", model.config.pad, tokenizer.pad),
                               ("eos_token_id", model.config.eos, tokenizer.eos)):
        if theirs != ours:
            raise RunError(f"{folder / 'config.json'}: {name} is {theirs}, but the tokenizer's "
                           f"is {ours}")
    try:
        filled = install(model, run.method, model.config.d_model, run.tasks, run.sharing, run.sites,
                         backbone=run.family(), **run.sizes)
    except AdapterError as problem:
        raise RunError(f"--method {run.method} cannot be installed: {problem}") from None
    return model, tokenizer, features, filled


def pick_device(name: str | None) -> torch.device:
    """cuda is this process's GPU; None: that, or the CPU. Raises RunError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        used = torch.zeros(1, device=name)
        used.item()  # meta has no numbers
        return used.device
    except Exception as problem:  # each kind of device has its own
        reason = str(problem).split("\n")[0]
        raise RunError(f"device {name!r} cannot be used: {reason}") from None


# ---- answers, and the two baselines ----


def answer(model: VLModel, tokenizer: Tokenizer, corpus: Corpus, device: torch.device, batch: int,
           bf16: bool = False, part: slice = slice(None), quiet: bool = False,
           decode=None) -> list[str]:
    """The model's answers to a corpus, or to a part of it, in order.

    bf16: under autocast. decode: a compiled `model.decode`. Of 5 examples and batch 2 the batches
    are [0, 1], [2, 3] and [4], filled up to 2 rows; of one example and batch 2 it is [0].
    """
    model.eval()
    select(model, corpus.task)
    asked = np.arange(len(corpus))[part]
    batch = max(1, min(batch, len(asked)))
    batches = [asked[i:i + batch] for i in range(0, len(asked), batch)]
    make = partial(corpus.batch, size=batch, pin=device.type == "cuda")
    answers = []
    made_ahead = zip(batches, prefetch(make, batches, depth=2, threads=1))
    for indices, made in tqdm(made_ahead, f"answering {corpus.task}", len(batches), leave=False,
                              disable=quiet, unit=" batches"):
        ids = made["ids"].to(device)
        features = made["features"].to(device)
        said = reply(model, tokenizer, corpus.task, ids, features, bf16, decode)
        answers += said[:len(indices)]
    return answers


def reply(model: VLModel, tokenizer: Tokenizer, task: str, ids, features, bf16: bool,
          decode=None) -> list[str]:
    """A text for each row of ids [batch, length], features [batch, pictures, tokens, channels]."""
    row = TASKS[task]
    choices = [tokenizer.encode(choice) for choice in row.choices] or None
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        said = model.answer(ids, features, row.beams, choices, decode=decode)  # [batch, length]
    return [tokenizer.decode(tokens).strip() for tokens in said.tolist()]


def blind_answers(seen: list[Example], asked: list[Example]) -> list[str]:
    """The answer of most weight per kind of question in the training split."""
    counts = defaultdict(Counter)
    for example in seen:
        counts[example.kind].update(example.answers)
        counts[None].update(example.answers)  # for kinds that training never had
    best = {kind: count.most_common(1)[0][0] for kind, count in counts.items() if count}
    return [best.get(example.kind, best.get(None, "")) for example in asked]


def shuffle_pictures(corpus: Corpus, seed: int = 0):
    """In the order 2, 0, 1 question 2 gets the pictures of 0, 0 those of 1, 1 those of 2."""
    order = list(range(len(corpus)))
    random.Random(seed).shuffle(order)
    corpus.rows[order] = corpus.rows[order[1:] + order[:1]]  # [examples, pictures]


# ---- predictions, and a page to look at ----


def read_predictions(path: Path, task: str) -> dict[str, str]:
    """{id: answer} of JSON lines. Raises RunError."""
    answers = {}
    with open_regular(path) as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, said = str(row["id"]), row["answer"]
            if not isinstance(said, str) or name in answers:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RunError(f"{path} is no file of predictions for {task}: line {number} should be "
                           '{"id": ..., "answer": "..."}, each id once') from None
        answers[name] = said
    return answers


def save_gallery(path: Path, data: Path, corpora: dict[str, Corpus], rows: dict[str, list[dict]]):
    """Shows 48 rows of a task, by lot."""
    parts = []
    for task, corpus in corpora.items():
        drawn = sorted(random.Random(0).sample(range(len(corpus)), min(48, len(corpus))))
        pictures = {i: corpus.examples[i].pictures for i in drawn}
        video = TASKS[task].video
        files = find_files(folders_of(data, TASKS[task].pictures), chain(*pictures.values()), video)
        style = "wide" if video or corpus.rows.shape[1] > 1 else ""
        parts.append(f'<h2>{task}</h2><main class="{style}">')
        for i in drawn:
            there = [thumbnails(files[name], video) for name in pictures[i] if name in files]
            parts.append(card(rows[task][i], chain(*there)))
        parts.append("</main>")
    write_atomically(path, PAGE.replace("CARDS", "".join(parts)).encode(errors=ESCAPE))


def card(row: dict, images: Iterable[str]) -> str:
    """Right is what has half of the points; a caption is neither."""
    truth = row["truth"]
    said = row["answer"]
    if "references" in truth:
        people = truth["references"]
        verdict = ""
    elif "answers" in truth:
        people = truth["answers"]
        points = vqa_accuracy(said, people, vqa_normal_form)
        verdict = "right" if points >= 50 else "wrong"
    else:
        people = [truth["answer"]]
        verdict = "right" if said in people else "wrong"

    known = " / ".join(f"{text} ({count})" if count > 1 else text
                       for text, count in Counter(people).most_common())
    subtitles = f"<p>“{html.escape(row['subtitles'])}”</p>" if "subtitles" in row else ""
    question = html.escape(row["question"].removeprefix("[Q] "))
    question = re.sub(r" (?=\[(TS|Choices)\]|a\d: )", "<br>", question)  # each choice on a line
    pictures = "".join(f'<img src="{image}" alt="">' for image in images)
    return (f'<figure class="{verdict}"><div>{pictures}</div><figcaption>{subtitles}'
            f'<b>{question}</b><p class="said">{html.escape(said) or "(nothing)"}</p>'
            f'<p>truth: {html.escape(known)}</p></figcaption></figure>\n')


def thumbnails(path: Path, video: bool) -> list[str]:
    """A picture, or four frames of a video, as data: URLs; none of a broken one."""
    try:
        if video:
            frames = load_video(path, 160)  # [frames, 160, 160, 3]
            pictures = [Image.fromarray(frame) for frame in frames[::len(frames) // 4 or 1][:4]]
        else:
            pictures = [open_picture(path)]
    except DataError:
        return []
    urls = []
    for picture in pictures:
        picture.thumbnail((240, 240))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        encoded = base64.b64encode(buffer.getvalue()).decode()
        urls.append(f"data:image/jpeg;base64,{encoded}")
    return urls


# ---- python evaluate.py ----


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Scores or asks a run.", allow_abbrev=False)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of train.py")
    add("--tasks", type=task_list, metavar="A,B", help="default: as in training")
    add("--split", choices=("validation", "test"), default="validation",
        help="test of videos: validation again")
    add("--data", help="default: as in training")
    add("--weights", help="default: as in training")
    add("--cache", help="where features are kept (default: DATA)")
    add("--allow-missing", action="store_true", default=None, help="as in train.py")
    add("--weights-of", choices=("best", "last"), default="best", help="default: best")
    add("--batch", type=int, default=200)
    add("--device", help="cpu, cuda, cuda:1, ...")
    add("--bf16", action=argparse.BooleanOptionalAction, help="default: on CUDA, if trained so")

    instead = parser.add_argument_group("instead of scoring the run")
    add = instead.add_mutually_exclusive_group().add_argument
    add("--blind", action="store_true", help="commonest answers")
    add("--shuffle", action="store_true", help="shuffle the pictures")
    add("--predictions", type=Path, help='lines {"id": ..., "answer": ...}')
    add("--submit", type=Path, help="folder for the servers' files")
    add("--image", type=Path, nargs="+", help="a picture to ask about (nlvr: two)")
    add("--video", type=Path, help="a video to ask about")

    add = parser.add_argument_group("with --image or --video, of the first task").add_argument
    add("--question", default="", help="not for captions")
    add("--choices", metavar="A|B|C", help="for tvqa and how2qa")
    add("--subtitles", default="", help="of the video")
    args = parser.parse_args()
    if args.batch < 1:
        parser.error("--batch is a number from 1 on")
    if (args.question or args.choices) and not args.image and not args.video:
        parser.error("--question and --choices go with --image or --video")
    if args.subtitles and not args.video:
        parser.error("--subtitles go with --video")
    return args


def main():
    args = parse()
    run = Run.read(args.run)
    device = pick_device(args.device)
    for name in ("data", "weights", "cache", "allow_missing"):
        if getattr(args, name):
            setattr(run, name, getattr(args, name))
    tasks = args.tasks or run.tasks
    for task in tasks:
        if task not in run.tasks:
            raise RunError(f"{args.run} was trained on {', '.join(run.tasks)}, not on {task}")
    splits = {task: getattr(TASKS[task], args.split) for task in tasks}
    if args.blind or args.predictions:
        score_without_model(args, run, splits)
        return
    if args.image or args.video:
        check_question(args, run, tasks[0])
    name = f"{args.weights_of}.pt"
    if not (args.run / name).exists():
        raise RunError(f"{args.run / name} is missing: the run was stopped before it saved")

    hashes = run.hashes()
    run.check_hashes(args.run, hashes)
    model, tokenizer, features, _ = open_run(run, hashes, device)
    Run.load_weights(model, args.run, name)
    model.to(device).eval()
    bf16 = args.bf16
    if bf16 is None:
        bf16 = run.bf16 and device.type == "cuda"
    if bf16:
        cast_frozen(model)

    if args.image or args.video:
        print(ask(args, tasks[0], run.prompts, model, tokenizer, features, bf16))
        return
    answer_all = partial(answer, model, tokenizer, device=device, batch=args.batch, bf16=bf16)
    if args.submit:
        submit(args.submit, run, tokenizer, features, tasks, answer_all)
        return

    corpora, = open_corpora(Path(run.data), run.vision, features, tokenizer, splits,
                            **run.reading())
    del features  # and CLIP with them
    scores = {}
    rows = {}
    for task, corpus in corpora.items():
        if args.shuffle:
            shuffle_pictures(corpus)
        answers = answer_all(corpus=corpus)
        scores[task] = score(task, corpus.examples, answers)
        rows[task] = []
        for e, said in zip(corpus.examples, answers):
            row = {"id": e.id, "question": e.text, "answer": said, "truth": e.truth}
            if e.subtitles:
                row["subtitles"] = e.subtitles
            rows[task].append(row)
    print_scores(scores, f"{args.split}{', shuffled' if args.shuffle else ''}")
    if args.shuffle:
        return
    for task in rows:
        lines = "".join(json.dumps(row) + "\n" for row in rows[task])
        write_atomically(args.run / f"predictions_{task}_{args.split}.jsonl", lines.encode())
    save_gallery(args.run / "predictions.html", Path(run.data), corpora, rows)
    print(f"\nlook at {args.run / 'predictions.html'}")


def score_without_model(args: argparse.Namespace, run: Run, splits: dict[str, str]):
    """--blind and --predictions."""
    if args.predictions and len(splits) > 1:
        raise RunError(f"--predictions is one task's; choose one with --tasks: {', '.join(splits)}")
    scores = {}
    for task, split in splits.items():
        asked = read_examples(run.data, task, split)
        if args.predictions:
            answers = read_predictions(args.predictions, task)
            answered = [e for e in asked if str(e.id) in answers]
            if len(answered) < len(asked):
                lack = (f"{args.predictions} has no answer for {len(asked) - len(answered):,} of "
                        f"{len(asked):,} examples")
                if not answered or not run.allow_missing:
                    raise RunError(f"{lack}: for another split, or see --allow-missing")
                print(f"{lack}; they are left out")
            asked = answered
            said = [answers[str(e.id)] for e in asked]
        else:
            said = blind_answers(read_examples(run.data, task, TASKS[task].train), asked)
        scores[task] = score(task, asked, said)
    print_scores(scores, f"{args.split}, {'blind' if args.blind else args.predictions.name}")


def submit(folder: Path, run: Run, tokenizer: Tokenizer, features: Features, tasks: list[str],
           answer_all: Callable):
    """What is missing ends it before the first answer."""
    files = [(task, *file) for task in tasks for file in TASKS[task].submission.items()]
    opened = open_corpora(Path(run.data), run.vision, features, tokenizer,
                          *({task: split} for task, split, _ in files),
                          **run.reading() | {"allow_missing": False})
    for (task, split, name), corpora in zip(files, opened):
        corpus = corpora[task]
        text = METRICS[TASKS[task].metric].write(corpus.examples, answer_all(corpus=corpus))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode(errors=ESCAPE))
        published = TASKS[task].counts.get(split, len(corpus))
        note = "" if published == len(corpus) else f" (published: {published:,})"
        print(f"{path}: {len(corpus):,} answers{note}")


def check_question(args: argparse.Namespace, run: Run, task: str):
    """Raises RunError before anything is loaded."""
    row = TASKS[task]
    if row.video != bool(args.video):
        raise RunError(f"{task} needs {'--video' if row.video else '--image'}")
    if is_released(Path(run.data), run.vision):
        raise RunError("the run has released features; train with --vision RN101 to ask")
    pictures = 2 if task == "nlvr" else 1
    if args.image and len(args.image) != pictures:
        raise RunError(f"{task} needs {pictures} of --image, not {len(args.image)}")
    if not args.question.strip() and row.metric not in ("caption", "moment"):
        raise RunError(f"{task} needs a --question")
    if (args.choices is None) == (row.metric == "choices"):
        raise RunError(f"{task} {'needs' if args.choices is None else 'has no'} --choices")
    if args.choices is not None:
        args.choices = [choice.strip() for choice in args.choices.split("|")]
        if "" in args.choices or len(set(args.choices)) < max(2, len(args.choices)):
            raise RunError('--choices are two or more different texts: "a cup|a hat"')


def ask(args: argparse.Namespace, task: str, prompts: bool, model: VLModel, tokenizer: Tokenizer,
        features: Features, bf16: bool) -> str:
    choices = args.choices or []
    text = choose_from(args.question, "", choices) if choices else args.question
    example = Example(0, (), text, {}, subtitles=args.subtitles)
    ids = text_ids(tokenizer, task, example, prompts)
    whole = text_ids(tokenizer, task, example, prompts, length=sys.maxsize)
    if len(whole) > len(ids):
        print(f"the text has {len(whole):,} tokens, but {task} takes {len(ids)}: the end of "
              f"{'the subtitles' if args.subtitles else 'it'} was cut", file=sys.stderr)
    paths = [args.video] if args.video else args.image
    seen = features.encode([features.load(path) for path in paths])  # [pictures, tokens, channels]
    select(model, task)
    ids = torch.tensor([ids], device=seen.device)  # [1, length]
    said, = reply(model, tokenizer, task, ids, seen[None], bf16)
    names = {f"a{i}": choice for i, choice in enumerate(choices)}
    return names.get(said, said)


ESCAPE = "backslashreplace"  # what a question has of half a character
PAGE = """<!doctype html><meta charset="utf-8"><title>Predictions</title><style>
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 1200px; background: #fafafa }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 16px }
main.wide { grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)) }
figure { margin: 0; background: #fff; border-top: 5px solid #bbb } figcaption { padding: 10px }
div { display: flex; gap: 2px } img { flex: 1; min-width: 0 } p { margin: 4px 0; color: #666 }
.said { color: #222 } .right { border-color: #2a9d4a } .right .said { color: #1b7a36 }
.wrong { border-color: #d1495b } .wrong .said { color: #b02a3d }
</style><h1>Predictions</h1>
<p>Green: at least half of the points. Red: less. Grey: a caption.</p>
CARDS
"""


if __name__ == "__main__":
    report_problems(main, *PROBLEMS)
