"""How good a run is: the official metrics, predictions, and a question about one picture of your own.

    python evaluate.py runs/compacter-vqa-gqa                       every task on its validation split
    python evaluate.py runs/compacter-vqa-gqa --split test
    python evaluate.py runs/compacter-vqa-gqa --blind               the commonest answer per kind of question instead
    python evaluate.py runs/compacter-vqa-gqa --shuffle             every question with the picture of another
    python evaluate.py runs/compacter-vqa-gqa --image my.jpg --question "What color is the kite?"

Beside the scores it writes predictions_TASK_SPLIT.json, in the form of the official submissions, and predictions.html to
look at. Also here, because train.py needs it too: a model with its method and corpora, from the flags of a run.
Needs torch, numpy, pillow, tqdm and of ours model.py, adapters.py, data.py, tokenizer.py.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from adapters import install, select, trainable
from data import (TASKS, Corpus, Example, FeatureStore, find_picture, load_picture, normalise, read_examples,
                  report_problems, task_list, vqa_normal_form, write_atomically)
from model import ADDED_WORDS, VISUAL_SIDE, CLIPResNet, Model, WeightsError, generate, load_backbone, load_clip, pool
from tokenizer import BPE, VocabularyError


FLAGS = ("method", "tasks", "share", "sites", "sizes", "prompts", "data", "weights", "backbone", "vision", "epochs",
         "batch", "lr", "seed", "bf16", "compile")          # of train.py, kept in a run's config.json


class RunError(ValueError):
    """A run cannot be started, resumed or evaluated; the message says why."""


PROBLEMS = RunError, WeightsError, VocabularyError


# ---- metrics ------------------------------------------------------------------------------------------------------


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
        groups[name].append(value)
    return {name: sum(group) / len(group) for name, group in sorted(groups.items()) if name}


def score_vqa(examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """VQA accuracy in per cent, overall and by type of answer."""
    values = [vqa_accuracy(p, e.truth["answers"]) for e, p in zip(examples, predictions)]
    return {"accuracy": sum(values) / len(values), **mean_by(values, [e.truth["type"] for e in examples])}


def score_gqa(examples: list[Example], predictions: list[str]) -> dict[str, float]:
    """Exact match in per cent, overall, of open questions (structural type query) and of binary ones (all others)."""
    values = [100.0 * (p == e.truth["answer"]) for e, p in zip(examples, predictions)]
    kinds = ["open" if e.truth["structural"] == "query" else "binary" for e in examples]
    return {"accuracy": sum(values) / len(values), **mean_by(values, kinds)}


METRICS: dict[str, Callable[[list[Example], list[str]], dict[str, float]]] = {"vqa": score_vqa, "gqa": score_gqa}
RECORDS = {  # how the official servers want one prediction
    "vqa": lambda e, answer: {"question_id": e.id, "answer": answer},
    "gqa": lambda e, answer: {"questionId": e.id, "prediction": answer},
}


# ---- a model and its data, from the flags of a run ----------------------------------------------------------------


def weight_path(flags: dict, name: str) -> Path:
    """The file or folder of pre-trained weights that a flag names: --backbone bart-base, --vision RN101."""
    folder = Path(flags["weights"])
    for path in (folder / name, folder / f"{name}.pt"):
        if path.exists():
            return path
    there = ", ".join(sorted(path.name.removesuffix(".pt") for path in folder.glob("*")))
    raise RunError(f"no weights called {name} in {folder} (there: {there or 'nothing'})")


def file_hash(path: Path) -> str:
    """sha256 of a weight file, or of the weight file in a folder."""
    if path.is_dir():
        path = next((path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()), path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_weights(run: Path, flags: dict):
    """Raises RunError if the pre-trained weights are not those with which the run was begun."""
    about = json.loads((run / "config.json").read_text(encoding="utf-8"))
    for name in ("backbone", "vision"):
        if about.get(f"{name}_sha256") != file_hash(weight_path(flags, flags[name])):
            raise RunError(f"{run} was begun with other weights: the {name} of its config.json has changed")


def build_model(flags: dict, feature_dim: int) -> tuple[Model, BPE, int]:
    """The pre-trained backbone with the run's method installed, its tokenizer, and how many places were filled."""
    folder = weight_path(flags, flags["backbone"])
    added = [f"<{kind}_{i}>" for kind in ("extra_id", "vis_extra_id") for i in reversed(range(ADDED_WORDS // 2))]
    tokenizer = BPE(folder, added)
    torch.manual_seed(flags["seed"])                        # for the visual part, the added words and what is put in
    model = load_backbone(folder, feature_dim)
    if len(tokenizer) != model.config.vocab_size:
        raise RunError(f"{folder}: {len(tokenizer):,} words in vocab.json and added, "
                       f"but config.json makes {model.config.vocab_size:,} rows")
    try:
        filled = install(model, flags["method"], model.config.d_model, flags["tasks"], flags["share"],
                         flags["sites"], **flags["sizes"])
    except (ValueError, TypeError, ZeroDivisionError) as problem:      # the latter two: --sizes that are no such numbers
        raise RunError(f"--method {flags['method']} cannot be installed: {problem}") from None
    return model, tokenizer, filled


class Eye:
    """CLIP as the project uses it: bytes of pictures to visual tokens."""

    def __init__(self, flags: dict, device: torch.device):
        path = weight_path(flags, flags["vision"])
        self.hash, self.device = file_hash(path), device
        self.encoder: CLIPResNet = load_clip(path).to(device, memory_format=torch.channels_last)
        self.resolution = 224                               # the paper's, whatever CLIP was trained on: a 7 x 7 grid

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B, H, W, 3] bytes to [B, 36, feature_dim]."""
        pixels = normalise(pictures.to(self.device)).contiguous(memory_format=torch.channels_last)
        return pool(self.encoder(pixels))


def open_corpora(flags: dict, tokenizer: BPE, eye: Eye, *splits: dict[str, str]) -> list[dict[str, Corpus]]:
    """For each {task: split} a {task: corpus}.

    All files are read and all pictures found before the first is encoded, so what is missing stops a run at its start.
    """
    data, needed = Path(flags["data"]), {}
    examples = [{task: read_examples(data, task, split) for task, split in part.items()} for part in splits]
    for part in examples:
        for task, asked in part.items():
            needed.setdefault(TASKS[task].pictures, []).extend(picture for e in asked for picture in e.pictures)
    stores = {name: FeatureStore(data / name / "features" / flags["vision"], eye.hash, VISUAL_SIDE ** 2,
                                 eye.encoder.feature_dim) for name in needed}
    paths = {name: store.locate(data, needed[name]) for name, store in stores.items()}
    for name, store in stores.items():
        store.add(paths[name], eye, eye.resolution)
    return [{task: Corpus(task, asked, tokenizer, stores[TASKS[task].pictures], flags["prompts"])
             for task, asked in part.items()} for part in examples]


def run_weights(model: Model) -> dict[str, torch.Tensor]:
    """What belongs to a run: all that it trains, and the added words, random and frozen, which number visual tokens."""
    weights = {name: parameter.detach() for name, parameter in trainable(model).items()}
    # A copy: torch.save writes the whole table behind a slice of it.
    return weights | {"added_words": model.words.weight[-ADDED_WORDS:].detach().clone()}


def load_run_weights(model: Model, weights: dict[str, torch.Tensor], source: Path):
    ours = run_weights(model)
    odd = [n for n in ours.keys() ^ weights.keys()] or [n for n in ours if ours[n].shape != weights[n].shape]
    if odd:
        raise RunError(f"{source} does not fit its config.json: {min(odd)} is missing, unknown or of another shape")
    for name, tensor in trainable(model).items():
        tensor.data.copy_(weights[name])
    model.words.weight.data[-ADDED_WORDS:] = weights["added_words"]


def read_run(folder: Path) -> dict:
    """The flags of a run."""
    try:
        flags = json.loads((folder / "config.json").read_text(encoding="utf-8"))["flags"]
        return {name: flags[name] for name in FLAGS}
    except FileNotFoundError:
        raise RunError(f"{folder} is not a run: it has no config.json") from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{folder / 'config.json'} is not the config.json of a run") from None


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


def answer(model: Model, tokenizer: BPE, corpus: Corpus, device: torch.device, batch: int, bf16: bool = False,
           quiet: bool = False) -> list[str]:
    """The model's answer to every question of a corpus, in order."""
    model.eval()
    select(model, corpus.task)
    answers = []
    with tqdm(total=len(corpus), desc=f"answering {corpus.task}", unit=" questions", leave=False, disable=quiet) as bar:
        for i in range(0, len(corpus), batch):
            indices = np.arange(i, min(i + batch, len(corpus)))
            x = corpus.batch(indices, batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                words = generate(model, x["ids"].to(device), x["features"].to(device).float())
            answers += [tokenizer.decode(row).strip() for row in words[:len(indices)].tolist()]
            bar.update(len(indices))
    return answers


def blind_answers(seen: list[Example], asked: list[Example]) -> list[str]:
    """The commonest answer per kind of question in the training split: what can be had without looking."""
    counts = defaultdict(Counter)
    for example in seen:
        for kind in (example.kind, None):                   # None: over all, for kinds that training never had
            counts[kind].update(example.answers)
    best = {kind: count.most_common(1)[0][0] for kind, count in counts.items() if count}
    return [best.get(example.kind, best[None]) for example in asked]


def shuffle_pictures(corpus: Corpus, seed: int = 0):
    """Gives every question the pictures of another one."""
    order = list(range(len(corpus)))
    random.Random(seed).shuffle(order)
    corpus.rows[order] = corpus.rows[order[1:] + order[:1]]


def print_scores(scores: dict[str, dict[str, float]], title: str):
    """One line a task: the headline number in per cent, then its parts."""
    print(f"\n{title:<24}{'score':>8}")
    for task, parts in scores.items():
        headline, *others = parts.items()
        print(f"{task:<24}{headline[1]:>8.2f}    " + "  ".join(f"{name} {value:.2f}" for name, value in others))


def save_predictions(folder: Path, split: str, corpora: dict[str, Corpus], predictions: dict[str, list[str]]):
    """predictions_TASK_SPLIT.json for each task."""
    for task, corpus in corpora.items():
        listed = [RECORDS[task](e, p) for e, p in zip(corpus.examples, predictions[task])]
        write_atomically(folder / f"predictions_{task}_{split}.json", json.dumps(listed).encode())


def save_gallery(path: Path, data: Path, corpora: dict[str, Corpus], predictions: dict[str, list[str]]):
    """A page of pictures with question, answer and truth: 48 of every task, drawn by lot."""
    cards = []
    for task, corpus in corpora.items():
        cards.append(f"<h2>{task}</h2><main>")
        for i in sorted(random.Random(0).sample(range(len(corpus)), min(48, len(corpus)))):
            e, said = corpus.examples[i], predictions[task][i]
            score = METRICS[TASKS[task].metric]([e], [said])["accuracy"]
            people = Counter(e.truth["answers"] if "answers" in e.truth else [e.truth["answer"]])
            truth = ", ".join(f"{text} ({count})" if len(people) > 1 else text for text, count in people.most_common())
            paths = [find_picture(data, name) for name in e.pictures]
            images = "".join(f'<img src="{thumbnail(path)}" alt="">' for path in paths if path)
            cards.append(f'<figure class="{"right" if score >= 50 else "wrong"}">{images}<figcaption>'
                         f'<b>{html.escape(e.text)}</b><p class="said">{html.escape(said) or "(nothing)"}</p>'
                         f'<p>truth: {html.escape(truth)}</p></figcaption></figure>')
        cards.append("</main>")
    style = """body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 1200px; background: #fafafa; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 16px }
figure { margin: 0; background: #fff; border-radius: 8px; overflow: hidden; border-top: 5px solid }
figure.right { border-color: #2a9d4a } figure.wrong { border-color: #d1495b }
img { width: 100%; display: block } figcaption { padding: 10px } p { margin: 4px 0 0; color: #666 }
.said { font-size: 1.2em } .right .said { color: #1b7a36 } .wrong .said { color: #b02a3d }"""
    page = (f'<!doctype html><meta charset="utf-8"><title>Predictions</title><style>{style}</style><h1>Predictions</h1>'
            f'<p>Green: right, for at least half of the points. Red: wrong.</p>{"".join(cards)}')
    write_atomically(path, page.encode())


def thumbnail(path: Path) -> str:
    """A picture as a data: address, so that the page is one file."""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((240, 240))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- python evaluate.py -------------------------------------------------------------------------------------------


def pick_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as problem:
        raise RunError(f"device {name!r} cannot be used: {str(problem).splitlines()[0]}") from None


def main():
    parser = argparse.ArgumentParser(description="Scores a run, or asks it a question.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--tasks", type=task_list, metavar="A,B", help="default: those it was trained on")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--data", metavar="DIR", help="default: where they were when it was trained")
    parser.add_argument("--weights", metavar="DIR", help="pre-trained weights (default: where they were)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--blind", action="store_true", help="score the commonest answer per kind of question instead")
    instead.add_argument("--shuffle", action="store_true", help="shuffle the pictures among the questions")
    instead.add_argument("--image", type=Path, metavar="P", help="a picture to ask about, as a question of the first task")
    parser.add_argument("--question", metavar="Q", help="what to ask")
    parser.add_argument("--weights-of", choices=("best", "last"), default="best", help="best or last epoch (default: best)")
    parser.add_argument("--batch", type=int, default=200, metavar="N")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    args = parser.parse_args()
    if (args.image is None) != (args.question is None):
        parser.error("--image and --question go together")
    if args.batch < 1:
        parser.error("--batch is a number from 1 on")

    flags, device = read_run(args.run), pick_device(args.device)
    flags |= {name: getattr(args, name) for name in ("data", "weights") if getattr(args, name)}
    tasks = args.tasks or flags["tasks"]
    for task in tasks:
        if task not in flags["tasks"]:
            raise RunError(f"{args.run} was trained on {', '.join(flags['tasks'])}, not on {task}")
    splits = {task: getattr(TASKS[task], args.split) for task in tasks}
    if args.blind:
        asked = {task: read_examples(flags["data"], task, split) for task, split in splits.items()}
        seen = {task: read_examples(flags["data"], task, TASKS[task].train) for task in tasks}
        scores = {task: METRICS[TASKS[task].metric](asked[task], blind_answers(seen[task], asked[task])) for task in tasks}
        print_scores(scores, f"{args.split}, blind")
        return

    check_weights(args.run, flags)
    eye = Eye(flags, device)
    model, tokenizer, _ = build_model(flags, eye.encoder.feature_dim)
    path = args.run / f"{args.weights_of}.pt"
    load_run_weights(model, load_state(path)["weights"], path)
    model.to(device).eval()

    if args.image is not None:
        features = eye(torch.from_numpy(load_picture(args.image, eye.resolution))[None])[None]
        select(model, tasks[0])
        prompt = TASKS[tasks[0]].prompt if flags["prompts"] else ""
        ids = torch.tensor([tokenizer.encode(prompt + args.question, TASKS[tasks[0]].text)], device=device)
        print(tokenizer.decode(generate(model, ids, features.to(device))[0].tolist()).strip())
        return

    corpora, = open_corpora(flags, tokenizer, eye, splits)
    predictions, bf16 = {}, flags["bf16"] and device.type == "cuda"
    for task, corpus in corpora.items():
        if args.shuffle:
            shuffle_pictures(corpus)
        predictions[task] = answer(model, tokenizer, corpus, device, args.batch, bf16)
    scores = {task: METRICS[TASKS[task].metric](corpus.examples, predictions[task]) for task, corpus in corpora.items()}
    print_scores(scores, f"{args.split}{', shuffled' * args.shuffle}")
    if not args.shuffle:
        save_predictions(args.run, args.split, corpora, predictions)
        save_gallery(args.run / "predictions.html", Path(flags["data"]), corpora, predictions)
        print(f"\npredictions are in {args.run}; look at {args.run / 'predictions.html'}")


if __name__ == "__main__":
    report_problems(main, *PROBLEMS)
