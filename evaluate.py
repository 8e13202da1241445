"""How good a run is: the official metrics, predictions, submissions, and questions about pictures of your own.

    python evaluate.py runs/compacter-vqa-gqa                       every task on its validation split
    python evaluate.py runs/compacter-vqa-gqa --split test
    python evaluate.py runs/compacter-vqa-gqa --blind               the commonest answer per kind of question instead
    python evaluate.py runs/compacter-vqa-gqa --shuffle             every question with the picture of another
    python evaluate.py runs/compacter-vqa-gqa --submit submission   what the official servers want
    python evaluate.py runs/compacter-vqa-gqa --image my.jpg --question "What color is the kite?"
    python evaluate.py runs/adapter-tvqa --video my.mp4 --question "What does Ann hold?" --choices "a cup|a key|a hat"
                                                                    (of a run that saw videos, not released features)

Beside the scores it writes predictions_TASK_SPLIT, in the form of the official submissions, and predictions.html to look
at. Also here, because train.py needs it too: a model with its method and corpora, from the flags of a run.
Needs torch, numpy, pillow, av, tqdm and of ours model.py, adapters.py, data.py, tokenizer.py.
"""

import argparse
import base64
import hashlib
import html
import importlib
import io
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from adapters import install, select, trainable
from data import (FRAMES, TASKS, VIDEOS, Corpus, DataError, Example, FeatureStore, Task, ahead, choose_from, find_files,
                  fit_frames, folders_of, load_features, load_picture, load_video, normalise, open_picture, read_examples,
                  report_problems, task_list, text_ids, vqa_normal_form, write_atomically)
from model import (ADDED_WORDS, VISUAL_SIDE, CLIPResNet, Model, WeightsError, flat_places, fold_norms, generate,
                   load_backbone, load_clip, pool, read_json)
from tokenizer import Tokenizer, VocabularyError, load_tokenizer


FLAGS = {  # of train.py, kept in a run's config.json
    "method": str, "tasks": list, "share": str, "sites": list | None, "sizes": dict, "prompts": bool, "data": str,
    "weights": str, "backbone": str, "vision": str, "epochs": int, "batch": int, "accumulate": int, "lr": float | int,
    "seed": int, "bf16": bool, "compile": bool, "recompute": bool, "allow_missing": bool}


class RunError(ValueError):
    """A run cannot be started, resumed or evaluated; the message says why."""


PROBLEMS = RunError, WeightsError, VocabularyError


# ---- metrics of questions -----------------------------------------------------------------------------------------


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """The official VQA accuracy in per cent: the mean over the ten people of min(1, others who said the same / 3).

    Strings are compared in normal form, unless all ten people agree to the letter: then neither side is touched, as in
    vqaEval.py of GT-Vision-Lab/VQA.
    """
    clean = vqa_normal_form if len(set(answers)) > 1 else lambda text: text.replace("\n", " ").replace("\t", " ").strip()
    prediction, answers = clean(prediction), [clean(answer) for answer in answers]
    others = (answers.count(prediction) - (answer == prediction) for answer in answers)
    return 100 * sum(min(1, count / 3) for count in others) / len(answers)


def mean_by(values: list[float], names: list[str]) -> dict[str, float]:
    groups = defaultdict(list)
    for value, name in zip(values, names):
        groups[str(name or "")].append(value)
    return {name: sum(group) / len(group) for name, group in sorted(groups.items()) if name}


def score_vqa(examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """VQA accuracy in per cent, overall and by type of answer."""
    values = [vqa_accuracy(p, e.truth["answers"]) for e, p in zip(examples, predictions)]
    return {"accuracy": sum(values) / len(values), **mean_by(values, [e.truth["type"] for e in examples])}


def score_gqa(examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """Exact match in per cent, overall, of open questions (structural type query) and of binary ones (all others).

    Where not only the balanced questions were asked, also consistency: how often the questions that are entailed by one
    that was answered right are answered right too. Like the rest it is a mean over the balanced questions.
    """
    right = {e.id: 100.0 * (p == e.truth["answer"]) for e, p in zip(examples, predictions)}
    balanced = [e for e in examples if e.truth.get("balanced", True)]
    kinds = [{"": "", "query": "open"}.get(e.truth.get("structural", ""), "binary") for e in balanced]
    values = [right[e.id] for e in balanced]
    scores = {"accuracy": sum(values) / len(values), **mean_by(values, kinds)}
    if len(balanced) < len(examples):
        entailed = [[right[i] for i in e.truth["entailed"] if i != e.id and i in right]
                    for e in balanced if right[e.id]]
        shares = [sum(others) / len(others) for others in entailed if others]
        scores |= {"consistency": sum(shares) / len(shares)} if shares else {}
    return scores


def score_nlvr(examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """Accuracy in per cent, and consistency: the share of statements judged right beside each of their pairs."""
    groups = defaultdict(list)
    for e, p in zip(examples, predictions):
        pictures, _, sentence = e.id.rsplit("-", 2)                     # split-set-pair-sentence, without the pair
        groups[pictures, sentence].append(100.0 * (p == e.truth["answer"]))
    values = [value for group in groups.values() for value in group]
    return {"accuracy": sum(values) / len(values), "consistency": sum(map(min, groups.values())) / len(groups)}


def score_choices(examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """Accuracy in per cent, overall and per show."""
    values = [100.0 * (p == e.truth["answer"]) for e, p in zip(examples, predictions)]
    return {"accuracy": sum(values) / len(values), **mean_by(values, [e.truth["show"] for e in examples])}


# ---- metrics of captions ------------------------------------------------------------------------------------------

ABBREVIATIONS = """a.k.a adj adm adv al ala alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig
    bros calif capt cf cie cmdr cos? col colo comdr conn corp cpl ct dak dec dept det drs? ed.d elec ens esq est etc
    ext feb fla fri ft ga gen govs? hon inc ind insp intl invt jan jos jr jul jun kans? ky lieut lt ltd maj mar md
    messrs mich minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph ph.d plc pres
    profs? pvt rd reps? rev rt sens? sept? seq sfc sgt spc sq sr ste? supts? sys tel tenn thu thurs treas tues? univ
    va vs vt wed wisc? wm wyo"""
LETTER, ALNUM, MARK = r"[^\W\d_¹²³¼½¾⅓⅔]", r"[^\W_¹²³¼½¾⅓⅔]", "['’]"
CLITIC = rf"(?i:'(?:[dms]|ll|re|ve)(?!{LETTER}))"
NUMBER = r"(?:\d+(?:[.:,]\d+)+|(?:[.,]\d+)+)"
PTB_TOKEN = re.compile("|".join((           # the first that fits, so the longer come first; punctuation fits none
    rf"(?=(?i:cannot|gonna|gotta|gimme|lemme|wanna)(?![-/]?{ALNUM}|{CLITIC}))...",          # can not, gon na
    r"[a-z]+(?!\S)",                                                                        # most words; for speed
    r"</?[A-Za-z][\w:.-]*/?>|(?i:https?)://[^\s\"<>|(){}]+[^\s\"<>|.!?(){},-]",             # <unk>, https://a.com
    r"(?:www\.[\w.-]*|[a-z]+(?:\.[a-z]+)*\.)(?:com|net|org|edu)/[^\s\"<>|()]+[^\s\"<>|.!?(){},-]",
    rf"[\w.%+-]+@[A-Za-z\d][A-Za-z\d.-]*[A-Za-z\d]|@[A-Za-z_]\w*|#{LETTER}\w*",             # a@b.com, @user, #tag
    r"(?:\(\d{2,3}\) ?|(?:\d{2,4}[- ])?\d{2,4}[- ])\d{3,4}[- ]?\d{3,5}",                    # (555) 123-4567
    r"\d{1,4}[- ]\d{1,4}/\d{1,4}",                                                          # 5 1/2
    r"[A-Za-z\d]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z\d]+(?:-[A-Za-z]+){0,2}){1,2}",              # he/she, 1/2
    rf"{ALNUM}(?:{ALNUM}|[.,])*(?:-(?:(?:[A-Za-z]\.){{2,}}|{ALNUM}+(?:\.\d+)?))+",          # well-known, U.S.-led
    rf"{CLITIC}|(?i:n['’`]t(?!{LETTER}))",                                                  # 's, n't
    rf"[A-Za-z]*[A-MO-Za-mo-z](?=(?i:n['’`]t))|{LETTER}{ALNUM}*(?={CLITIC})",               # what stands before them
    rf"(?i:'t(?=is|was)|y['’](?={LETTER}))|{MARK}(?i:n(?:{MARK}|(?!{LETTER}))|em|till?|cause|[2-9]0s|\d\d(?!\S))",
    rf"[dDoOlL]{MARK}{ALNUM}+|[A-HJ-XZn]{MARK}{LETTER}{{2,}}",                              # o'clock, K'Nex
    rf"{LETTER}+[aeiouyAEIOUY]{MARK}[aeiouA-Z]{LETTER}*|(?i:c'mon|dunkin'|li'l|ol'|s'mores)",    # ma'am
    rf"(?i:(?:[a-z]\.)+|(?:{'|'.join(ABBREVIATIONS.split())})\.)(?!{LETTER})",              # p.m., Dr.
    r"(?=[A-Z])(?i:ark|az|del|ill|la|mass|miss|ore|pa|tex|wash)\.(?![^\W\d_])",             # states, with a capital
    r"(?i:art|ca|figs?|nos?|op|pp|prop)\.(?=\s?\d)",                                        # No. 5
    r"(?i:c\+\+|[cf]#)|[A-Z]+(?:[+&][A-Z]+)+",                                              # AT&T
    rf"{ALNUM}+(?:[-_](?:{NUMBER}|{ALNUM}+))+",                                             # snow_board
    rf"{LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)*(?:\.(?=[,;:]))?",                         # a word; cup.Then is one
    rf"(?:(?<!-)[-+](?:{NUMBER}|\d+)|{NUMBER}|{ALNUM}+)(?:[-_](?:{NUMBER}|{ALNUM}+))*",     # -5, 3.5, 5:30, 3rd
    rf"[<>]?[:;=][-o*']?[()DPdpO\\{{@|[\]](?!{ALNUM})|[-^=~]_[-^=~]",                       # :-)
    r"[?!]{2,}|-{5,}|<<|>>|@+|#+|_+|\*+|[A-Z]*\$|[()[\]{}%&+/<=>\\^|~¡-©¬®-¸¼-¿×÷†-•‰-‸€™⅓⅔←-⯿]")))
PTB_NAMES = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "¢": "cents", "£": "#",
             "€": "$", "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}


def ptb_words(text: str) -> str:
    """The words of a caption in lower case, joined by single spaces, as the official evaluation counts them.

    They are those of Stanford's PTBTokenizer (CoreNLP 3.4.1, -preserveLines -lowerCase) without the tokens that are one
    mark of punctuation, -- or ... (ptbtokenizer.py of tylin/coco-caption). Brackets stay, as -lrb- and so on. The space
    in a token such as 5 1/2 becomes a no-break space. tests/compare_ptb.py counts where the two tokenizers differ.
    """
    text = re.sub(rf"’(?=(?:[dmst]|ll|re|ve)(?!{LETTER}))", "'", text.replace("&amp;", "&"), flags=re.IGNORECASE)
    words = (PTB_NAMES.get(word, word.replace(" ", "\xa0")) for word in PTB_TOKEN.findall(text))
    return " ".join(words).replace("(", "-lrb-").replace(")", "-rrb-").lower()


def ngrams(words: list[str]) -> Counter[tuple[str, ...]]:
    """How often each sequence of one to four words occurs."""
    shifted = [words[i:] for i in range(4)]
    return Counter(chain(*(zip(*shifted[:n]) for n in range(1, 5))))


def bleu(hypotheses: list[str], references: list[list[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002), words separated by spaces, several references a hypothesis.

    BLEU-n = min(1, exp(1 - r / c)) · (p_1 · ... · p_n)^(1/n). p_n is the share of the corpus's n-grams which are in a
    reference, each counted at most as often as in the one that has it most often. c is the length of all hypotheses,
    r that of the references nearest in length, of two equally near the shorter. The tiny numbers are coco-caption's.
    """
    matches, totals, length, nearest = [0] * 4, [0] * 4, 0, 0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        words, others = hypothesis.split(), [text.split() for text in texts]
        length += len(words)
        nearest += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        most = Counter()
        for other in others:
            most |= ngrams(other)
        for gram, count in (ngrams(words) & most).items():
            matches[len(gram) - 1] += count
        totals = [total + max(0, len(words) - n) for n, total in enumerate(totals)]
    ratio, product, scores = (length + 1e-15) / (nearest + 1e-9), 1.0, []
    for n in range(4):
        product *= (matches[n] + 1e-15) / (totals[n] + 1e-9)
        scores.append(product ** (1 / (n + 1)) * math.exp(min(0, 1 - 1 / ratio)))
    return scores


def common_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)                                # of the words of a so far with the first j of b
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(hypotheses: list[str], references: list[list[str]]) -> float:
    """ROUGE-L (Lin 2004): F = (1 + β²) · P · R / (R + β² · P), β = 1.2, averaged over the hypotheses.

    P and R are the longest common subsequence over the length of the hypothesis and of the reference; as in
    coco-caption each is the greatest over the references, and an empty text is one empty word.
    """
    total = 0.0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        words, others = hypothesis.split(" "), [text.split(" ") for text in texts]
        common = [common_length(words, other) for other in others]
        p, r = max(common) / len(words), max(c / len(other) for c, other in zip(common, others))
        total += (1 + 1.2 ** 2) * p * r / (r + 1.2 ** 2 * p) if p and r else 0
    return total / len(hypotheses)


def cider(hypotheses: list[str], references: list[list[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015), from 0 to 10, averaged over the images; coco-caption calls it CIDEr.

    An n-gram weighs count · ln(N / images in whose references it is), N images in all. For n from 1 to 4 compare a
    hypothesis of weights h with a reference of weights r: Σ min(h, r) · r / (|h| · |r|) · exp(-d² / (2 · 6²)), d being
    the difference of their numbers of bigrams. The score is 10 times the mean over n and references. With a single
    image all weights are 0, and so is the score.
    """
    documents = Counter()
    for texts in references:
        documents.update(set().union(*(ngrams(text.split()) for text in texts)))

    def vector(text: str) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        """Weights, their norm for each n, number of bigrams."""
        words, weights, squares = text.split(), {}, [0.0] * 4
        for gram, count in ngrams(words).items():
            weights[gram] = weight = count * math.log(len(references) / documents.get(gram, 1))
            squares[len(gram) - 1] += weight * weight
        return weights, [math.sqrt(square) for square in squares], max(0, len(words) - 1)

    total = 0.0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        ours, our_norms, our_bigrams = vector(hypothesis)
        for theirs, norms, bigrams in map(vector, texts):
            products = [0.0] * 4
            for gram in ours.keys() & theirs.keys():
                products[len(gram) - 1] += min(ours[gram], theirs[gram]) * theirs[gram]
            cosines = (product / (a * b) for product, a, b in zip(products, our_norms, norms) if a and b)
            total += sum(cosines) * math.exp(-(our_bigrams - bigrams) ** 2 / 72) / 4 / len(texts)
    return 10 * total / len(hypotheses)


def caption_words(examples: list[Example], predictions: list[str], ascii_only: bool) -> tuple[list, list]:
    """Predictions and references in words; with ascii_only, as VALUE has it, other characters are spaces."""
    clean = (lambda text: "".join(c if c < "\x80" else " " for c in text)) if ascii_only else str
    return ([ptb_words(clean(text)) for text in predictions],
            [[ptb_words(clean(text)) for text in e.truth["references"]] for e in examples])


def score_captions(examples: list[Example], predictions: list[str], ascii_only: bool = False) -> dict[str, float]:
    """CIDEr, BLEU and ROUGE-L in per cent."""
    said, references = caption_words(examples, predictions, ascii_only)
    scores = {"CIDEr": cider(said, references)}
    scores |= {f"BLEU-{n}": score for n, score in enumerate(bleu(said, references), 1)}
    return {name: 100 * score for name, score in (scores | {"ROUGE-L": rouge_l(said, references)}).items()}


def java_scores(examples: list[Example], predictions: list[str], ascii_only: bool) -> dict[str, float]:
    """METEOR and SPICE in per cent, by the Java programs in pycocoevalcap; what cannot be had is said and left out."""
    said, references = caption_words(examples, predictions, ascii_only)
    said, references, scores = {i: [text] for i, text in enumerate(said)}, dict(enumerate(references)), {}
    for name, module, scorer in ("METEOR", "meteor.meteor", "Meteor"), ("SPICE", "spice.spice", "Spice"):
        try:
            scorer = getattr(importlib.import_module(f"pycocoevalcap.{module}"), scorer)()
            scores[name] = 100 * float(scorer.compute_score(references, said)[0])
        except Exception as problem:                        # no package, no Java, another Java, no network for SPICE
            print(f"{name} is left out: {' '.join(str(problem).split())[:120]}")
    return scores


# ---- predictions in the forms of the official servers -------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    score: Callable[[list[Example], list[str]], dict[str, float]]       # in per cent, the headline first
    suffix: str                                                         # of a file of predictions
    write: Callable[[list[Example], list[str]], str]                    # the content of such a file
    read: Callable[[str], list[tuple]]                                  # the content to (id, answer)


def one_list(key: str, value: str):
    """[{key: id, value: answer}, ...]"""
    return (".json", lambda examples, answers: json.dumps([{key: e.id, value: a} for e, a in zip(examples, answers)]),
            lambda text: [(r[key], r[value]) for r in json.loads(text)])


def lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def write_moments(examples: list[Example], answers: list[str]) -> str:
    """VALUE's lines; TVC's name the moment, too."""
    moment = lambda e: {"video_id": e.truth["video"]} if e.truth["ts"] is None else {
        "vid_name": e.truth["video"], "ts": e.truth["ts"]}
    return "".join(json.dumps(moment(e) | {"clip_id": e.id, "descs": [{"desc": a}]}) + "\n"
                   for e, a in zip(examples, answers))


METRICS = {
    "vqa": Metric(score_vqa, *one_list("question_id", "answer")),
    "gqa": Metric(score_gqa, *one_list("questionId", "prediction")),
    "caption": Metric(score_captions, *one_list("image_id", "caption")),
    "nlvr": Metric(score_nlvr, ".csv",
                   lambda examples, answers: "".join(f"{e.id},{a.capitalize()}\n" for e, a in zip(examples, answers)),
                   lambda text: [(line.split(",")[0], {"True": "true", "False": "false"}[line.split(",")[1].strip()])
                                 for line in lines(text)]),
    "choices": Metric(score_choices, ".json",               # 0 where the answer is none, as in the original
                      lambda examples, answers: json.dumps({str(e.id): int(a[1]) if a[1:].isdecimal() else 0
                                                            for e, a in zip(examples, answers)}),
                      lambda text: [(number, f"a{[0, 1, 2, 3, 4].index(choice)}")
                                    for number, choice in json.loads(text).items()]),
    "moment": Metric(partial(score_captions, ascii_only=True), ".jsonl", write_moments,
                     lambda text: [(r["clip_id"], r["descs"][0]["desc"]) for r in map(json.loads, lines(text))]),
}


def read_predictions(path: Path, task: str, examples: list[Example]) -> list[str]:
    """The answers of a file in the official form, in the order of the examples. Raises RunError."""
    try:
        pairs = METRICS[TASKS[task].metric].read(path.read_text("utf-8-sig"))
        said = {str(number): answer for number, answer in pairs}
        if not all(isinstance(answer, str) for answer in said.values()) or len(said) < len(pairs):
            raise ValueError("an answer is no text, or an id is there twice")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as problem:
        raise RunError(f"{path} is no file of predictions for {task} in the official form: {problem!r}") from None
    missing = sum(str(e.id) not in said for e in examples)
    if missing:
        raise RunError(f"{path} is incomplete or for another split: it has no answer for {missing:,} of "
                       f"{len(examples):,} examples")
    return [said[str(e.id)] for e in examples]


# ---- a model and its data, from the flags of a run ----------------------------------------------------------------


def weight_path(flags: dict, name: str) -> Path:
    """The file or folder of pre-trained weights that a flag names: --backbone bart-base, --vision RN101."""
    folder = Path(flags["weights"])
    for path in (folder / name, folder / f"{name}.pt"):
        if path.exists():
            return path
    there = sorted(path.name.removesuffix(".pt") for path in folder.glob("*"))
    hint = " nor features in video/vis_features; for your own videos: --vision RN101" if name == "clip-vit" else ""
    raise RunError(f"no weights called {name} in {folder}{hint} "
                   f"(there: {', '.join(there[:8]) or 'nothing'}{', ...' if there[8:] else ''})")


def file_hash(path: Path) -> str:
    """sha256 of a weight file, or of the weight file in a folder."""
    if path.is_dir():
        path = next((path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()), path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weight_hashes(flags: dict) -> dict[str, str]:
    """What tells the pre-trained weights of a run from others."""
    vision = flags["vision"] if released(flags) else file_hash(weight_path(flags, flags["vision"]))
    return {"backbone_sha256": file_hash(weight_path(flags, flags["backbone"])), "vision_sha256": vision}


def check_weights(run: Path, flags: dict):
    """Raises RunError if the pre-trained weights are not those with which the run was begun."""
    about = json.loads((run / "config.json").read_text(encoding="utf-8"))
    for name, digest in weight_hashes(flags).items():
        if about.get(name) != digest:
            raise RunError(f"{run} was begun with other weights: the {name} of its config.json has changed")


def family(folder: Path) -> str:
    """bart or t5, as the config.json of a backbone says."""
    return read_json(folder / "config.json").get("model_type", "")


def build_model(flags: dict, feature_dim: int) -> tuple[Model, Tokenizer, int]:
    """The pre-trained backbone with the run's method installed, its tokenizer, and how many places were filled."""
    folder = weight_path(flags, flags["backbone"])
    added = [f"<{kind}_{i}>" for kind in ("extra_id", "vis_extra_id") for i in reversed(range(ADDED_WORDS // 2))]
    tokenizer = load_tokenizer(folder, added)
    torch.manual_seed(flags["seed"])                        # for the visual part, the added words and what is put in
    model = load_backbone(folder, feature_dim, len(tokenizer))
    try:
        filled = install(model, flags["method"], model.config.d_model, flags["tasks"], flags["share"],
                         flags["sites"], backbone=family(folder), **flags["sizes"])
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as problem:     # sizes and sites of no use
        raise RunError(f"--method {flags['method']} cannot be installed: {problem}") from None
    return model, tokenizer, filled


class Eye:
    """CLIP as the project uses it: pictures become 36 tokens of its grid, the frames of a video its pooled outputs."""

    def __init__(self, flags: dict, device: torch.device):
        path = weight_path(flags, flags["vision"])
        self.hash, self.device = file_hash(path), device
        self.encoder: CLIPResNet = fold_norms(load_clip(path)).to(device, memory_format=torch.channels_last)
        self.resolution = 224                               # the paper's, whatever CLIP was trained on: a 7 x 7 grid

    def channels(self, video: bool) -> int:
        return self.encoder.output_dim if video else self.encoder.feature_dim

    def folders(self, data: Path, name: str) -> list[Path]:
        return folders_of(data, name)

    def load(self, video: bool) -> Callable[[Path], np.ndarray]:
        return partial(load_video if video else load_picture, resolution=self.resolution)

    @torch.no_grad()
    def encode(self, loaded: list[np.ndarray], video: bool) -> torch.Tensor:
        """Pictures [H, W, 3] to [B, 36, channels], videos [frames, H, W, 3] to [B, 64, channels]."""
        pictures = torch.from_numpy(np.concatenate(loaded) if video else np.stack(loaded))
        seen = torch.cat([self.see(part.to(self.device), video) for part in pictures.split(64)])
        return torch.stack([fit_frames(x) for x in seen.split([len(x) for x in loaded])]) if video else seen

    def see(self, pictures: torch.Tensor, pooled: bool) -> torch.Tensor:
        pixels = normalise(pictures).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            grid = self.encoder(pixels)
            return (self.encoder.attnpool(grid) if pooled else pool(grid)).float()


class Released:
    """The features of video frames that VALUE's authors gave out, in the place of an encoder: --vision clip-vit."""

    def __init__(self, flags: dict):
        self.hash = flags["vision"]
        self.example = next((Path(flags["data"]) / "video" / "vis_features").glob(f"*/{self.hash}/*.npz"), None)
        if self.example is None:
            raise RunError(f"{flags['data']}/video/vis_features/*/{self.hash} is empty")

    def channels(self, video: bool) -> int:
        return load_features(self.example).shape[1]

    def folders(self, data: Path, name: str) -> list[Path]:
        return [data / "video" / "vis_features" / name / self.hash]

    def load(self, video: bool) -> Callable[[Path], np.ndarray]:
        return load_features

    def encode(self, loaded: list[np.ndarray], video: bool) -> torch.Tensor:
        return torch.stack([fit_frames(torch.from_numpy(x.astype(np.float32))) for x in loaded])


def released(flags: dict) -> bool:
    """Whether --vision names a folder of VALUE's features."""
    return any((Path(flags["data"]) / "video" / "vis_features").glob(f"*/{flags['vision']}"))


def open_eye(flags: dict, device: torch.device) -> tuple[Eye | Released, int]:
    """What sees for a run, and how many channels its features have. Raises RunError for tasks of unlike sight."""
    videos = {TASKS[task].video for task in flags["tasks"]}
    if len(videos) > 1:
        raise RunError("tasks with pictures (vqa, gqa, nlvr, caption) and tasks with videos (tvqa, how2qa, tvc, yc2c) "
                       "see features of different kinds: train them apart, as the paper does")
    eye = Released(flags) if released(flags) else Eye(flags, device)
    if isinstance(eye, Released) and videos == {False}:
        raise RunError(f"--vision {flags['vision']} are features of videos, but {flags['tasks'][0]} has pictures")
    return eye, eye.channels(*videos)


def open_corpora(flags: dict, tokenizer: Tokenizer, eye: Eye | Released, *splits: dict[str, str],
                 say: Callable[[str], None] = print) -> list[dict[str, Corpus]]:
    """For each {task: split} a {task: corpus}.

    All files are read and all pictures found before the first is encoded, so what is missing stops a run at its start;
    or, with --allow-missing, is left out with the examples that need it, and the share of what is left is said.
    """
    data, needed, stores, paths = Path(flags["data"]), defaultdict(dict), {}, {}
    examples = [{task: read_examples(data, task, split) for task, split in part.items()} for part in splits]
    for part in examples:
        for task, asked in part.items():
            needed[TASKS[task].pictures].update(dict.fromkeys(name for e in asked for name in e.pictures))
    for source, names in needed.items():
        video, folders = source in VIDEOS, eye.folders(data, source)
        store = stores[source] = FeatureStore(data / "features" / source / flags["vision"], eye.hash,
                                              FRAMES if video else VISUAL_SIDE ** 2, eye.channels(video))
        new = [name for name in names if name not in store.row]
        paths[source] = find_files(folders, new, video) if new else {}
        lost = [name for name in new if name not in paths[source]]
        if lost and not flags["allow_missing"]:
            raise DataError(f"{len(lost):,} of {len(names):,} {'videos' if video else 'pictures'} are missing below "
                            f"{' and '.join(map(str, folders))}, the first is {lost[0]} "
                            "(--allow-missing goes on without them)")
    for source, store in stores.items():
        video, found = source in VIDEOS, paths[source]
        broken = store.add(found, eye.load(video), partial(eye.encode, video=video), 4 if video else 64)
        if broken and not flags["allow_missing"]:
            raise DataError(f"{len(broken):,} of {len(found):,} {'videos' if video else 'pictures'} are unreadable, "
                            f"the first: {broken[0]} (--allow-missing goes on without them)")
    corpora = []
    for part, split in zip(examples, splits):
        corpora.append({})
        for task, asked in part.items():
            store = stores[TASKS[task].pictures]
            there = [e for e in asked if all(name in store.row for name in e.pictures)]
            if len(there) < len(asked):
                say(f"{task}, {split[task]}: {len(there):,} of {len(asked):,} examples have their pictures, "
                    f"{100 * len(there) / len(asked):.1f} %")
            if not there:
                raise DataError(f"{task} has no example in {split[task]} whose pictures are there")
            silent = sum(not e.subtitles for e in there) if TASKS[task].video else 0
            if silent:
                say(f"{task}, {split[task]}: {silent:,} of {len(there):,} examples have no subtitles")
            corpora[-1][task] = Corpus(task, there, tokenizer, store, flags["prompts"])
    return corpora


def run_weights(model: Model) -> dict[str, torch.Tensor]:
    """What belongs to a run: all that it trains, and the added words, random and frozen, which number visual tokens."""
    weights = {name: parameter.detach() for name, parameter in trainable(model).items()}
    # A copy: torch.save writes the whole table behind a slice of it.
    return weights | {"added_words": model.words.weight[-ADDED_WORDS:].detach().clone()}


def keep_in_bf16(model: Model):
    """Frozen Linears and words in the precision they are used in, or autocast would convert them at every step."""
    for module in [module for module in model.modules() if isinstance(module, torch.nn.Linear)] + [model.words]:
        for weight in module.parameters(recurse=False):
            if not weight.requires_grad:
                weight.data = weight.data.bfloat16()


def load_run_weights(model: Model, weights: dict[str, torch.Tensor], source: Path):
    ours = run_weights(model)
    odd = [n for n in ours.keys() ^ weights.keys()] or [n for n in ours if ours[n].shape != weights[n].shape]
    if odd:
        raise RunError(f"{source} does not fit its config.json: {min(odd)} is missing, unknown or of another shape")
    for name, tensor in trainable(model).items():
        tensor.data.copy_(weights[name])
    model.words.weight.data[-ADDED_WORDS:] = weights["added_words"]


def check_flags(flags: dict):
    """Raises RunError for flags that are not of their kind, or numbers that make no run."""
    for name, kind in FLAGS.items():
        if not isinstance(flags[name], kind):
            raise RunError(f"{name} is {flags[name]!r}, expected {getattr(kind, '__name__', kind)}")
    if min(flags["batch"], flags["accumulate"], flags["epochs"]) < 1 or not 0 < flags["lr"] < float("inf"):
        raise RunError("--batch, --accumulate, --epochs and --lr are positive numbers")
    if not 0 <= flags["seed"] < 2 ** 31:
        raise RunError("--seed is a number from 0 to 2147483647")


def read_run(folder: Path) -> dict:
    """The flags of a run."""
    try:
        flags = json.loads((folder / "config.json").read_text(encoding="utf-8"))["flags"]
        check_flags(flags)
        task_list(",".join(flags["tasks"]))
        return {name: flags[name] for name in FLAGS}
    except FileNotFoundError:
        raise RunError(f"{folder} is not a run: it has no config.json") from None
    except (ValueError, KeyError, TypeError, argparse.ArgumentTypeError) as problem:
        raise RunError(f"{folder / 'config.json'} is not the config.json of a run: {problem!r}") from None


def load_state(path: Path) -> dict:
    """A file that train.py saved: tensors and numbers, nothing that runs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"weights", "step", "best"} <= state.keys():
            raise ValueError("it lacks the weights or the step")
        return state
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run was stopped before it first saved") from None
    except Exception as problem:
        raise RunError(f"{path} is truncated or not a saved run: {' '.join(str(problem).split())[:120]}") from None


# ---- answering ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def decide(model: Model, tokenizer: Tokenizer, choices: tuple[str, ...], ids, features) -> list[str]:
    """Of a few answers the one whose first token is likeliest, the first in a tie: how the original judges NLVR2."""
    words = [tokenizer.pieces(choice)[0] for choice in choices]
    before = tokenizer.encode(choices[0])
    before = [model.config.start, *before[:before.index(words[0])]]                         # BART's answers begin with <s>
    memory, mask = model.encode(ids, features, flat_places(ids != model.config.pad))
    logits = model.logits(model.decode(ids.new_tensor(before).expand(len(ids), -1), memory, mask)[:, -1])
    return [choices[i] for i in logits[:, words].argmax(1).tolist()]


def answer(model: Model, tokenizer: Tokenizer, corpus: Corpus, device: torch.device, batch: int, bf16: bool = False,
           part: slice = slice(None), quiet: bool = False, decode=None) -> list[str]:
    """The model's answers to the questions of a corpus, or a part of them, in order. decode: see `generate`."""
    model.eval()
    select(model, corpus.task)
    row, asked, answers = TASKS[corpus.task], np.arange(len(corpus))[part], []
    batches = [asked[i:i + batch] for i in range(0, len(asked), batch)]
    made = ahead(lambda indices: corpus.batch(indices, batch, pin=device.type == "cuda"), batches, 2, threads=1)
    with tqdm(total=len(asked), desc=f"answering {corpus.task}", unit=" examples", leave=False, disable=quiet) as bar:
        for indices, x in zip(batches, made):
            said = reply(model, tokenizer, row, x["ids"].to(device), x["features"].to(device), bf16, decode)
            answers += said[:len(indices)]
            bar.update(len(indices))
    return answers


def reply(model: Model, tokenizer: Tokenizer, row: Task, ids, features, bf16: bool, decode=None) -> list[str]:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        if row.choices:
            return decide(model, tokenizer, row.choices, ids, features)
        said = generate(model, ids, features, row.beams, decode=decode)
    return [tokenizer.decode(words).strip() for words in said.tolist()]


def blind_answers(seen: list[Example], asked: list[Example]) -> list[str]:
    """The commonest answer per kind of question in the training split: what can be had without looking."""
    counts = defaultdict(Counter)
    for example in seen:
        for kind in (example.kind, None):                   # None: over all, for kinds that training never had
            counts[kind].update(example.answers)
    best = {kind: count.most_common(1)[0][0] for kind, count in counts.items() if count}
    return [best.get(example.kind, best.get(None, "")) for example in asked]


def shuffle_pictures(corpus: Corpus, seed: int = 0):
    """Gives every question the pictures of another one."""
    order = list(range(len(corpus)))
    random.Random(seed).shuffle(order)
    corpus.rows[order] = corpus.rows[order[1:] + order[:1]]


def score(task: str, examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """The official scores of a task, the headline first. Raises RunError for examples without labels."""
    check_labels(task, examples)
    return METRICS[TASKS[task].metric].score(examples, predictions)


def check_labels(task: str, examples: list[Example]):
    hidden = sum(not any(e.truth.get(name) for name in ("answer", "answers", "references")) for e in examples)
    if hidden:
        raise RunError(f"{task} cannot be scored: {hidden:,} of {len(examples):,} examples have no labels")


def print_scores(scores: dict[str, dict[str, float]], title: str):
    """One line a task: the headline number in per cent, then its parts."""
    print(f"\n{title:<24}{'score':>8}")
    for task, parts in scores.items():
        headline, *others = parts.items()
        print(f"{task:<24}{headline[1]:>8.2f}    " + "  ".join(f"{name} {value:.2f}" for name, value in others))
        if headline == ("CIDEr", 0.0):
            print(f"{'':24}CIDEr weighs a word by how few of the pictures have it: of one picture alone it is always 0")


def save_predictions(path: Path, task: str, examples: list[Example], predictions: list[str]):
    """A file in the form of the official server."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, METRICS[TASKS[task].metric].write(examples, predictions).encode())


def save_gallery(path: Path, data: Path, corpora: dict[str, Corpus], predictions: dict[str, list[str]]):
    """A page of pictures, pairs and frames of videos with question, answer and truth: 48 of every task, drawn by lot."""
    cards = []
    for task, corpus in corpora.items():
        drawn = sorted(random.Random(0).sample(range(len(corpus)), min(48, len(corpus))))
        names = [name for i in drawn for name in corpus.examples[i].pictures]
        paths = find_files(folders_of(data, TASKS[task].pictures), names, TASKS[task].video)
        wide = TASKS[task].video or len(corpus.rows[0]) > 1
        cards.append(f'<h2>{task}</h2><main class="{"wide" if wide else ""}">')
        for i in drawn:
            e, said = corpus.examples[i], predictions[task][i]
            people = Counter(e.truth.get("references") or e.truth.get("answers") or [e.truth["answer"]])
            truth = " / ".join(f"{text} ({count})" if "answers" in e.truth else str(text)
                               for text, count in people.most_common())
            images = "".join(f'<img src="{source}" alt="">' for name in e.pictures if name in paths
                             for source in thumbnails(paths[name], TASKS[task].video))
            text = re.sub(r" (?=\[(TS|Choices)\]|a\d: )", "<br>", html.escape(e.text.removeprefix("[Q] ")))
            spoken = f"<p>“{html.escape(e.subtitles)}”</p>" if e.subtitles else ""
            cards.append(f'<figure class="{verdict(e, said)}"><div>{images}</div><figcaption>{spoken}<b>{text}</b>'
                         f'<p class="said">{html.escape(said) or "(nothing)"}</p><p>truth: {html.escape(truth)}</p>'
                         '</figcaption></figure>')
        cards.append("</main>")
    style = """body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 1200px; background: #fafafa; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 16px }
main.wide { grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)) } figure div { display: flex; gap: 2px }
figure { margin: 0; background: #fff; border-radius: 8px; overflow: hidden; border-top: 5px solid #bbb }
figure.right { border-color: #2a9d4a } figure.wrong { border-color: #d1495b }
img { flex: 1; min-width: 0; display: block } figcaption { padding: 10px } p { margin: 4px 0 0; color: #666 }
.said { font-size: 1.2em; color: #222 } .right .said { color: #1b7a36 } .wrong .said { color: #b02a3d }"""
    page = (f'<!doctype html><meta charset="utf-8"><title>Predictions</title><style>{style}</style><h1>Predictions</h1>'
            '<p>Green: right, for at least half of the points. Red: wrong. Grey: a caption, neither right nor wrong.</p>'
            + "".join(cards))
    write_atomically(path, page.encode())


def verdict(example: Example, said: str) -> str:
    """How a card of the gallery is coloured; a caption has no right and wrong."""
    truth = example.truth
    if "references" in truth:
        return ""
    right = vqa_accuracy(said, truth["answers"]) >= 50 if "answers" in truth else said == truth["answer"]
    return "right" if right else "wrong"


def thumbnails(path: Path, video: bool) -> list[str]:
    """A picture, or four frames of a video, as data: addresses, so that the page is one file."""
    if video:
        frames = load_video(path, 160)
        chosen = np.linspace(0, len(frames) - 1, min(4, len(frames))).astype(int)
        pictures = [Image.fromarray(frames[i]) for i in chosen]
    else:
        pictures = [open_picture(path)]
    addresses = []
    for picture in pictures:
        picture.thumbnail((240, 240))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        addresses.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return addresses


# ---- python evaluate.py -------------------------------------------------------------------------------------------


def pick_device(name: str | None) -> torch.device:
    """A device by its name; cuda is this process's GPU; None: that, or the CPU. Raises RunError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as problem:
        raise RunError(f"device {name!r} cannot be used: {str(problem).splitlines()[0]}") from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Scores a run, or asks it a question.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--tasks", type=task_list, metavar="A,B", help="default: those it was trained on")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--data", metavar="DIR", help="default: where they were when it was trained")
    parser.add_argument("--weights", metavar="DIR", help="pre-trained weights (default: where they were)")
    parser.add_argument("--allow-missing", action="store_true", default=None,
                        help="leave out examples whose pictures are missing or broken")
    parser.add_argument("--java", action="store_true", help="METEOR and SPICE too, by pycocoevalcap's Java programs")
    parser.add_argument("--weights-of", choices=("best", "last"), default="best", help="of which epoch (default: best)")
    parser.add_argument("--batch", type=int, default=200, metavar="N")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                        help="bfloat16 autocast (default: on CUDA, if the run was trained with it)")
    instead = parser.add_argument_group("instead of scoring the run").add_mutually_exclusive_group()
    instead.add_argument("--blind", action="store_true", help="score the commonest answer per kind of question")
    instead.add_argument("--shuffle", action="store_true", help="shuffle the pictures among the questions")
    instead.add_argument("--predictions", type=Path, metavar="FILE", help="score a file in the official form")
    instead.add_argument("--submit", type=Path, metavar="DIR", help="write the files that the official servers want")
    instead.add_argument("--image", type=Path, nargs="+", metavar="P", help="a picture to ask about (nlvr: two)")
    instead.add_argument("--video", type=Path, metavar="P", help="a video to ask about")
    asked = parser.add_argument_group("about --image and --video, as an example of the first of --tasks")
    asked.add_argument("--question", default="", metavar="Q", help="what to ask; captions need no question")
    asked.add_argument("--choices", metavar="A|B|C", help="possible answers, for tvqa and how2qa")
    asked.add_argument("--subtitles", default="", metavar="TEXT", help="what is said in the video")
    args = parser.parse_args()
    if args.batch < 1:
        parser.error("--batch is a number from 1 on")
    if (args.question or args.choices or args.subtitles) and not args.image and not args.video:
        parser.error("--question, --choices and --subtitles go with --image or --video")
    return args


def ask(args: argparse.Namespace, model: Model, tokenizer: Tokenizer, eye: Eye | Released, task: str, prompts: bool,
        bf16: bool) -> str:
    """The answer to --question about --image or --video."""
    row, paths = TASKS[task], [args.video] if args.video else args.image
    if row.video != bool(args.video):
        raise RunError(f"{task} needs {'--video' if row.video else '--image'}")
    if isinstance(eye, Released):
        raise RunError("this run has only learned from released features; train with --vision RN101 to ask about a video")
    if len(paths) != (2 if task == "nlvr" else 1):
        raise RunError(f"{task} needs {'two pictures' if task == 'nlvr' else 'one picture'}, not {len(paths)}")
    if not args.question and row.metric not in ("caption", "moment"):
        raise RunError(f"{task} needs a --question")
    if (args.choices is None) == (row.metric == "choices"):
        raise RunError(f"{task} {'needs' if args.choices is None else 'has no'} --choices")
    choices = (args.choices or "").split("|")
    text = choose_from(args.question, "", choices) if args.choices else args.question
    features = eye.encode([eye.load(row.video)(path) for path in paths], row.video)[None]   # [1, pictures, tokens, C]
    ids = text_ids(tokenizer, task, Example(0, (), text, {}, subtitles=args.subtitles), prompts)
    select(model, task)
    said, = reply(model, tokenizer, row, torch.tensor([ids], device=features.device), features, bf16)
    return dict((f"a{i}", choice.strip()) for i, choice in enumerate(choices)).get(said, said)


def main():
    args = parse()
    flags, device = read_run(args.run), pick_device(args.device)
    flags |= {name: getattr(args, name) for name in ("data", "weights", "allow_missing") if getattr(args, name)}
    tasks = args.tasks or flags["tasks"]
    for task in tasks:
        if task not in flags["tasks"]:
            raise RunError(f"{args.run} was trained on {', '.join(flags['tasks'])}, not on {task}")
    splits = {task: getattr(TASKS[task], args.split) for task in tasks}
    if args.blind or args.predictions:
        if args.predictions and len(tasks) > 1:
            raise RunError(f"--predictions is a file of one task; choose one with --tasks: {', '.join(tasks)}")
        scores = {}
        for task, split in splits.items():
            asked = read_examples(flags["data"], task, split)
            said = (read_predictions(args.predictions, task, asked) if args.predictions else
                    blind_answers(read_examples(flags["data"], task, TASKS[task].train), asked))
            scores[task] = score(task, asked, said)
        print_scores(scores, f"{args.split}, {'blind' if args.blind else args.predictions.name}")
        return

    check_weights(args.run, flags)
    eye, channels = open_eye(flags, device)
    model, tokenizer, _ = build_model(flags, channels)
    path = args.run / f"{args.weights_of}.pt"
    load_run_weights(model, load_state(path)["weights"], path)
    model.to(device).eval()
    bf16 = flags["bf16"] and device.type == "cuda" if args.bf16 is None else args.bf16
    if bf16:
        keep_in_bf16(model)
    if args.image or args.video:
        print(ask(args, model, tokenizer, eye, tasks[0], flags["prompts"], bf16))
        return
    answer_all = partial(answer, model, tokenizer, device=device, batch=args.batch, bf16=bf16)
    if args.submit:
        submit(args.submit, flags, tokenizer, eye, tasks, answer_all)
        return

    corpora, = open_corpora(flags, tokenizer, eye, splits)
    predictions = {}
    for task, corpus in corpora.items():
        if args.shuffle:
            shuffle_pictures(corpus)
        predictions[task] = answer_all(corpus=corpus)
    scores = {task: score(task, corpus.examples, predictions[task]) for task, corpus in corpora.items()}
    captioned = [task for task in scores if "CIDEr" in scores[task]]
    for task in captioned if args.java else ():
        scores[task] |= java_scores(corpora[task].examples, predictions[task], TASKS[task].video)
    print_scores(scores, f"{args.split}{', shuffled' * args.shuffle}")
    if captioned and not args.java:
        print(f"{'':24}METEOR and SPICE are left out; --java adds them where pycocoevalcap and Java are installed")
    if not args.shuffle:
        for task, corpus in corpora.items():
            path = args.run / f"predictions_{task}_{args.split}{METRICS[TASKS[task].metric].suffix}"
            save_predictions(path, task, corpus.examples, predictions[task])
        save_gallery(args.run / "predictions.html", Path(flags["data"]), corpora, predictions)
        print(f"\npredictions are in {args.run}; look at {args.run / 'predictions.html'}")


def submit(folder: Path, flags: dict, tokenizer: Tokenizer, eye: Eye | Released, tasks: list[str], answer_all: Callable):
    """The files of the official servers, complete: a file or picture that is missing ends it before the first answer."""
    files = [(task, split, name) for task in tasks for split, name in TASKS[task].submission.items()]
    opened = open_corpora(flags | {"allow_missing": False}, tokenizer, eye, *({task: split} for task, split, _ in files))
    for (task, split, name), corpora in zip(files, opened):
        corpus = corpora[task]
        save_predictions(folder / name, task, corpus.examples, answer_all(corpus=corpus))
        published = TASKS[task].counts.get(split, len(corpus))
        note = "" if published == len(corpus) else f" (published: {published:,})"
        print(f"{folder / name}: {len(corpus):,} answers{note}")


if __name__ == "__main__":
    report_problems(main, *PROBLEMS)
