"""How long train.py takes to its first step with annotation files of the true sizes.

    python tests/startup.py [--scale 1.0] [--backbone bart|t5] [--processes 1|2] [--product DIR]
                            [--folder /tmp/startup]

Writes once, below --folder, synthetic files of the official forms and sizes: VQAv2's 658,111
questions with ten answers each, 123,287 pictures with captions, GQA's 1,087,640 balanced questions,
NLVR2's 93,355 statements; feature stores as sparse files, so that no picture is needed; the
miniature's CLIP and a tiny backbone. Questions are of templates with 15,000 words, Zipf-like, and
40 of 100 of GQA's repeat one before. The vocabulary is trained on them, for the real ones cannot be
had offline: it has a few thousand pieces, not 50,265 or 32,100, so tokenizing makes longer texts.

Then measures `train.py --method adapter --tasks vqa,gqa,nlvr,caption` up to the first step of the
optimizer: a first start, without what the product keeps beside the data, and a later one. Prints
of each CPU seconds (user and system), wall seconds, the peak of resident memory, and how much of it
is the process's own then (without files that are mapped). --product: another checkout to measure.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TASKS = "vqa,gqa,nlvr,caption"
PARTS = {"train": ("train2014", 82783), "restval": ("val2014", 30504),
         "val": ("val2014", 5000), "test": ("val2014", 5000)}
QUESTIONS = {"train2014": 443757, "val2014": 214354}
GQA = {"train": (943000, 72140), "val": (132062, 10234), "testdev": (12578, 398)}
NLVR = {"train": 86373, "dev": 6982}
TEMPLATES = [
    "What {} is the {} {}?", "What is the {} {} near the {} {}?", "How many {} are there?",
    "Is there a {} {} in the picture?", "Is the {} {} or {}?", "Where is the {}?",
    "On which side of the {} is the {} {}?", "Does the {} {} behind the {} look {}?",
    "Which kind of {} is {}?", "Who is wearing the {} {}?", "Why is the {} {} {}?"]
CAPTIONS = ["A {} {} is {} on a {} {}.", "The {} of a {} {} next to a {}.",
            "Some {} {} with a {} and a {} in the {} {}."]
STATEMENTS = ["There are {} {} in the left image and the {} is {} in the right image.",
              "One image shows a {} {} with {} {}, and the other shows a {}.",
              "At least one {} is {} beside the {} {}."]

# Runs train.py, and at the optimizer's first step says what it took. Arguments: product, its flags.
DRIVER = r"""
import json, os, resource, runpy, sys, time
began = float(os.environ["BEGAN"])
sys.path.insert(0, sys.argv[1])
sys.argv[:] = [sys.argv[1] + "/train.py", *sys.argv[2:]]

def own():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 2 ** 20 for line in lines if line.startswith("RssAnon"))

def stop(self, *_, **__):
    used = resource.getrusage(resource.RUSAGE_SELF)
    row = {"cpu": used.ru_utime + used.ru_stime, "wall": time.time() - began,
           "peak": used.ru_maxrss / 2 ** 20, "own": own()}
    with open("measured." + os.environ.get("RANK", "0"), "w") as file:
        json.dump(row, file)
    raise SystemExit(0)

import torch
torch.optim.AdamW.step = stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# ---- texts ----


class Words:
    """15,000 words, the k-th of them 1/k as often as the first."""

    def __init__(self, rng: random.Random, count: int = 15000):
        first, last = "bcdfghjklmnprstvw", ["", "n", "r", "st", "t", "l", "ck", "m"]
        syllables = [a + b + c for a in first for b in "aeiou" for c in last]
        words = {}
        while len(words) < count:
            words["".join(rng.choices(syllables, k=1 + (len(words) > 300) + (rng.random() < 0.3)))
                  ] = 1
        self.words = list(words)
        self.sums = []
        total = 0.0
        for k in range(count):
            total += 1 / (k + 3)
            self.sums.append(total)
        self.rng = rng
        self.ready = []

    def draw(self) -> str:
        if not self.ready:
            self.ready = self.rng.choices(self.words, cum_weights=self.sums, k=100000)
        return self.ready.pop()

    def fill(self, templates: list[str]) -> str:
        template = self.rng.choice(templates)
        return template.format(*[self.draw() for _ in range(template.count("{}"))])


# ---- files of the official forms ----


def write_list(path: Path, head: str, rows, tail: str = "]}"):
    """Without the whole of it in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        file.write(head)
        for i, row in enumerate(rows):
            file.write(", " * (i > 0) + row)
        file.write(tail)
    print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB", flush=True)


def write_coco(data: Path, words: Words, scale: float) -> dict[str, list[int]]:
    """dataset_coco.json; the numbers of each folder's pictures."""
    pictures = {"train2014": [], "val2014": []}

    def rows():
        number = 0
        for part, (folder, count) in PARTS.items():
            for _ in range(max(8, int(count * scale))):
                number += 1
                pictures[folder].append(number)
                sentences = []
                for i in range(5):
                    raw = words.fill(CAPTIONS)
                    tokens = raw.lower().rstrip(".").split()
                    sentences.append({"tokens": tokens, "raw": raw, "imgid": number - 1,
                                      "sentid": 5 * number + i})
                yield json.dumps({
                    "filepath": folder, "sentids": [s["sentid"] for s in sentences],
                    "filename": f"COCO_{folder}_{number:012d}.jpg", "imgid": number - 1,
                    "split": part, "sentences": sentences, "cocoid": number})

    write_list(data / "COCO/dataset_coco.json", '{"images": [', rows(), '], "dataset": "coco"}')
    return pictures


def write_vqa(data: Path, words: Words, pictures: dict, scale: float):
    """Questions, and annotations with the answers of ten people."""
    rng = words.rng
    answers = ["yes", "no", *words.words[:3000]]
    chances = [8, 6, *(10 / (k + 5) for k in range(3000))]
    kinds = ["what is the", "how many", "is the", "what color is the", "none of the above"]
    for year, count in QUESTIONS.items():
        count = max(40, int(count * scale))
        asked = [(pictures[year][i % len(pictures[year])], 10 ** 7 * (year == "val2014") + i)
                 for i in range(count)]
        write_list(
            data / f"vqa/v2_OpenEnded_mscoco_{year}_questions.json",
            '{"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", '
            '"questions": [',
            (json.dumps({"image_id": image, "question": words.fill(TEMPLATES),
                         "question_id": number}) for image, number in asked))
        right = rng.choices(answers, chances, k=count)
        wrong = rng.choices(answers, chances, k=3 * count)

        def annotation(i):
            image, number = asked[i]
            people = [right[i]] * 10
            for k in range(i % 4):
                people[3 * k] = wrong[3 * i + k]
            listed = [{"answer": said, "answer_confidence": "yes", "answer_id": k}
                      for k, said in enumerate(people, 1)]
            return json.dumps({
                "question_type": kinds[i % 5], "multiple_choice_answer": right[i],
                "answers": listed, "image_id": image, "answer_type": "other",
                "question_id": number})

        write_list(data / f"vqa/v2_mscoco_{year}_annotations.json",
                   '{"info": {"version": "2.0"}, "annotations": [', map(annotation, range(count)))


def write_gqa(data: Path, words: Words, scale: float) -> list[str]:
    """Balanced questions, with all fields of the official files; the names of the pictures."""
    rng = words.rng
    answers = words.words[:1800]
    asked = []
    names = []
    for part, (count, pictures) in GQA.items():
        first = 2300000 + len(names)
        pictures = max(8, int(pictures * scale))
        names += [str(first + i) for i in range(pictures)]

        def rows():
            for i in range(max(40, int(count * scale))):
                repeat = asked and rng.random() < 0.4
                question = rng.choice(asked) if repeat else words.fill(TEMPLATES)
                asked.append(question)
                number = f"{part[0]}{i:08d}"
                thing, other = words.draw(), words.draw()
                answer = answers[int(len(answers) * rng.random() ** 3)]
                boxes = str(rng.randrange(10 ** 6, 10 ** 7))
                row = {
                    "semantic": [
                        {"operation": "select", "dependencies": [],
                         "argument": f"{thing} ({boxes})"},
                        {"operation": "relate", "dependencies": [0],
                         "argument": f"{other},near,s ({boxes})"},
                        {"operation": "query", "dependencies": [1], "argument": "name"}],
                    "entailed": [f"{part[0]}{i + k:08d}" for k in range(i % 4)],
                    "equivalent": [number], "question": question,
                    "imageId": names[-1 - i % pictures], "isBalanced": True,
                    "groups": {"global": None if i % 3 else thing, "local": f"{i % 12}-{thing}"},
                    "answer": answer,
                    "semanticStr": f"select: {thing} ({boxes})->relate: {other},near,s ({boxes})->"
                                   "query: name [1]",
                    "annotations": {"answer": {"0": boxes}, "question": {"2": boxes, "4": boxes},
                                    "fullAnswer": {"1": boxes, "5": boxes}},
                    "types": {"detailed": f"rel{i % 9}", "semantic": "rel", "structural": "query"},
                    "fullAnswer": f"The {thing} is near the {other}, which is {answer}."}
                yield f'"{number}": {json.dumps(row)}'

        write_list(data / f"GQA/{part}_balanced_questions.json", "{", rows(), "}")
    return names


def write_nlvr(data: Path, words: Words, scale: float) -> list[str]:
    """JSON lines; the names of the pictures."""
    names = {}
    for part, count in NLVR.items():
        (data / "nlvr").mkdir(exist_ok=True)
        with open(data / f"nlvr/{part}.json", "w") as file:
            for i in range(max(40, int(count * scale))):
                if i % 4 == 0:
                    sentence = words.fill(STATEMENTS)
                pair = f"{part}-{i // 4}-{i % 4}"
                names |= {f"{pair}-img0": 1, f"{pair}-img1": 1}
                row = {"identifier": f"{pair}-0", "sentence": sentence,
                       "label": "True" if i % 2 else "False", "synset": "acorn", "query": "acorns0",
                       "left_url": f"https://example.org/{pair}-left.jpg",
                       "right_url": f"https://example.org/{pair}-right.jpg"}
                if part == "train":
                    row["directory"] = i % 100
                file.write(json.dumps(row) + "\n")
    return list(names)


def write_store(data: Path, source: str, names: list[str], digest: str, channels: int):
    """A sparse file of zeros, and its index."""
    folder = data / "features" / source / "RN-mini"
    folder.mkdir(parents=True)
    with open(folder / "features.f16", "wb") as file:
        file.truncate(len(names) * 36 * channels * 2)
    index = {"encoder": digest, "tokens": 36, "channels": channels,
             "pictures": {name: row for row, name in enumerate(names)}}
    (folder / "index.json").write_text(json.dumps(index))


# ---- the backbone ----


def write_backbone(folder: Path, family: str, texts: list[str]) -> int:
    """A tiny one, with a vocabulary trained on the texts; how many pieces that has."""
    import torch
    import toy
    from model import FAMILIES, VLModel, expand
    folder.mkdir(parents=True)
    if family == "bart":
        from tokenizers import ByteLevelBPETokenizer
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            texts, 8000, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            show_progress=False)
        tokenizer.save_model(str(folder))
    else:
        import sentencepiece
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(folder / "spiece"), vocab_size=8000,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
            minloglevel=2)
        os.remove(folder / "spiece.vocab")
    from tokenizer import load_tokenizer
    added = [] if family == "bart" else [f"<extra_id_{i}>" for i in reversed(range(100))]
    pieces = len(load_tokenizer(folder, added))
    config = toy.config_json(family, pieces)
    (folder / "config.json").write_text(json.dumps(config))
    preset, table = FAMILIES[family]
    torch.manual_seed(0)
    model = VLModel(preset(config, feature_dim=1))
    state = model.state_dict()
    state = {theirs[0]: state[ours] for ours, theirs in expand(table, model.config).items()}
    state.pop("lm_head.bias", None)
    torch.save({name: x.float() for name, x in state.items()}, folder / "pytorch_model.bin")
    return pieces


def write_all(folder: Path, scale: float):
    """Everything that is read; made.json names it."""
    import toy
    from model import load_clip
    data = folder / "datasets"
    words = Words(random.Random(0))
    (folder / "weights").mkdir(parents=True)
    toy.write_clip(folder / "weights/RN-mini.pt", steps=1, count=64)
    clip = folder / "weights/RN-mini.pt"
    digest = hashlib.sha256(clip.read_bytes()).hexdigest()
    channels = load_clip(clip).feature_dim
    pictures = write_coco(data, words, scale)
    write_vqa(data, words, pictures, scale)
    names = [f"COCO_{year}_{i:012d}" for year, numbers in pictures.items() for i in numbers]
    write_store(data, "COCO", names, digest, channels)
    write_store(data, "GQA", write_gqa(data, words, scale), digest, channels)
    write_store(data, "NLVR2", write_nlvr(data, words, scale), digest, channels)
    texts = [words.fill(TEMPLATES + CAPTIONS + STATEMENTS) for _ in range(60000)]
    texts += ["vqa: gqa: nlvr: caption: true false"] * 100
    for family in "bart", "t5":
        count = write_backbone(folder / f"weights/{family}-tiny", family, texts)
        print(f"{family}: trained {count:,} pieces on the synthetic texts", flush=True)
    made = [str(p.relative_to(folder)) for p in sorted(data.rglob("*")) if p.is_file()]
    (folder / "made.json").write_text(json.dumps(made))


def forget(folder: Path):
    """Removes what a product has made beside the data."""
    made = set(json.loads((folder / "made.json").read_text()))
    for path in (folder / "datasets").rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in made:
            path.unlink()
    shutil.rmtree(folder / "runs", ignore_errors=True)


# ---- measuring ----


def measure(folder: Path, product: Path, family: str, processes: int, out: str) -> list[dict]:
    """Of each process what it took to the first step."""
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    flags = ["--method", "adapter", "--tasks", TASKS, "--data", "datasets", "--weights", "weights",
             "--backbone", f"{family}-tiny", "--vision", "RN-mini", "--device", "cpu",
             "--no-compile", "--out", f"runs/{out}"]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    for path in folder.glob("measured.*"):
        path.unlink()
    done = subprocess.run(
        [*launcher, str(driver), str(product), *flags], cwd=folder, text=True,
        capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1", BEGAN=str(time.time())))
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("measured.*"))]
    if len(rows) < processes:
        sys.exit(f"train.py came to no step:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return rows


def main():
    parser = argparse.ArgumentParser(description="Measures train.py's start.", allow_abbrev=False)
    add = parser.add_argument
    add("--scale", type=float, default=1.0, help="share of the true sizes (default: 1)")
    add("--backbone", choices=("bart", "t5"), default="bart")
    add("--processes", type=int, choices=(1, 2), default=1)
    add("--product", type=Path, default=ROOT, metavar="DIR", help="default: this checkout")
    add("--folder", type=Path, default=Path("/tmp/startup"), metavar="DIR")
    args = parser.parse_args()
    folder, product = args.folder.resolve(), args.product.resolve()
    sys.path.insert(0, str(product))
    if not (folder / "made.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_all(folder, args.scale)
    else:
        print(f"{folder} is there; --scale is what it was written with")
    forget(folder)
    print(f"\n{product}, {args.backbone} (vocabulary trained on synthetic texts)")
    line = "{:<10}{:>10}{:>14}{:>14}{:>12}{:>12}"
    print(line.format("start", "process", "CPU seconds", "wall seconds", "peak GiB", "own GiB"))
    for start in "first", "later":
        measured = measure(folder, product, args.backbone, args.processes, start)
        for number, row in enumerate(measured):
            print(line.format(start, number, f"{row['cpu']:.1f}", f"{row['wall']:.1f}",
                              f"{row['peak']:.2f}", f"{row['own']:.2f}"), flush=True)


if __name__ == "__main__":
    main()
