"""The built-in miniature world: a fresh clone shows everything without data and without weights.

Coloured shapes, still and moving, in the official formats of the eight data sets. And backbones in
the formats of the real ones, made as those were: CLIP from pictures with captions, BART and T5 from
text alone, by putting masked text right. The adapters must join them.

Everything is drawn from one seed and kept: `world`, at the end, draws and trains what is not there.
Needs torch, numpy, pillow, tqdm, for videos av, and of ours model.py, data.py and tokenizer.py.
"""

import json
import math
import random
import shutil
import struct
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from data import TASKS, choose_from, lock, pad_rows
from model import FAMILIES, CLIPResNet, VLModel, expand, normalise
from tokenizer import byte_symbols, load_tokenizer, merge_pairs, word_pattern

SEED = 20220618  # the day CVPR 2022 began
SIDE = 224  # pixels, as CLIP wants them
COLORS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 200), "yellow": (250, 220, 40),
    "purple": (140, 60, 170), "orange": (255, 140, 20), "black": (25, 25, 25),
    "white": (250, 250, 250)}
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
SIZES = {"small": 17, "large": 30}  # pixels from the middle to the rim
NUMBERS = ["one", "two", "three"]
SIDES = {  # (row, column) of a 3 x 3 grid; the second of each is no corner
    "left": [(0, 0), (1, 0), (2, 0)], "right": [(0, 2), (1, 2), (2, 2)],
    "top": [(0, 0), (0, 1), (0, 2)], "bottom": [(2, 0), (2, 1), (2, 2)]}
PEOPLE = ["Ann", "Bob", "Eva", "Ken", "Liz", "Tom"]  # who speak in videos,
VESSELS = ["bowl", "box", "cup", "oven", "pan", "pot"]  # and of what they speak


# ---- scenes and pictures ----


@dataclass(frozen=True)
class Scene:
    """One to three equal things on one side of the picture."""
    number: int
    size: str
    color: str
    shape: str
    side: str

    def __str__(self):
        things = plural(self.shape, self.number)
        return f"{NUMBERS[self.number - 1]} {self.size} {self.color} {things} on the {self.side}"


def plural(shape: str, number: int) -> str:
    return shape if number == 1 else shape + ("es" if shape == "cross" else "s")


def draw_scene(rng) -> Scene:
    number = rng.randint(1, 3)
    size, color, shape, side = (rng.choice(list(x)) for x in (SIZES, COLORS, SHAPES, SIDES))
    return Scene(number, size, color, shape, side)


def draw_picture(scene: Scene, rng) -> Image.Image:
    """The scene on grey ground, at jittered places and with smooth edges."""
    cells = SIDES[scene.side]
    if scene.number == 1:
        cells = cells[1:2]  # for a corner is on two sides
    else:
        cells = rng.sample(cells, scene.number)
    middles = []
    for row, column in cells:
        x = SIDE / 3 * (column + 0.5) + rng.uniform(-8, 8)
        y = SIDE / 3 * (row + 0.5) + rng.uniform(-8, 8)
        middles.append((x, y))
    return draw_things(scene, middles, SIDE, rng)


def draw_things(scene, middles, side, rng) -> Image.Image:
    scale = 2  # drawn larger and reduced, which smooths the edges
    picture = Image.new("RGB", (side * scale, side * scale), draw_grey(rng))
    pen = ImageDraw.Draw(picture)
    for x, y in middles:
        radius = scale * SIZES[scene.size] * rng.uniform(0.9, 1.1)
        draw_shape(pen, scene.shape, scale * x, scale * y, radius, COLORS[scene.color])
    return picture.reduce(scale)


def draw_grey(rng):
    return tuple(rng.randint(120, 165) for _ in range(3))


def draw_shape(pen, shape, x, y, r, color):
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), color)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), None, color, round(r * 0.45))
    elif shape == "square":
        pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), color)
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), color)
        pen.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), color)
    else:
        corners, dents = {"triangle": (3, 0.55), "star": (5, 0.42)}[shape]
        points = []
        for i in range(2 * corners):
            angle = np.pi * (i / corners - 0.5)
            radius = r * (1.1 if i % 2 == 0 else dents)
            points.append((x + radius * np.cos(angle), y + radius * np.sin(angle)))
        pen.polygon(points, color)


# ---- what is asked about a scene ----


def ask_color(scene, rng):
    return f"What color are the {plural(scene.shape, 2)}?", scene.color


def ask_number(scene, rng):
    return f"How many {plural(scene.shape, 2)} are there?", str(scene.number)


def ask_exists(scene, rng):
    """Yes and no equally often; where it is no, colour or shape is another."""
    color, shape = scene.color, scene.shape
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            color = rng.choice([other for other in COLORS if other != color])
        else:
            shape = rng.choice([other for other in SHAPES if other != shape])
    article = "an" if color == "orange" else "a"
    there = (color, shape) == (scene.color, scene.shape)
    return f"Is there {article} {color} {shape}?", "yes" if there else "no"


def ask_shape(scene, rng):
    return f"What shape are the {scene.color} things?", scene.shape


def ask_side(scene, rng):
    return f"On which side are the {plural(scene.shape, 2)}?", scene.side


def ask_relation(scene, rng):
    """Yes and no equally often."""
    side = scene.side
    if rng.random() >= 0.5:
        side = rng.choice([other for other in SIDES if other != side])
    return f"Are the {scene.color} things on the {side}?", "yes" if side == scene.side else "no"


def state(truth: bool, rng) -> tuple[str, Scene, Scene]:
    """A statement on the colours of two pictures; left and right scenes that make it so."""
    color, other = rng.sample(list(COLORS), 2)
    if rng.random() < 0.5:
        which, has = "Both pictures show", [True, truth]
    else:
        which, has = "One of the pictures shows", [truth, False]
    left_has, right_has = rng.sample(has, 2)
    left = replace(draw_scene(rng), color=color if left_has else other)
    right = replace(draw_scene(rng), color=color if right_has else other)
    return f"{which} {color} things.", left, right


def captions(scene: Scene) -> list[str]:
    number = NUMBERS[scene.number - 1]
    things = plural(scene.shape, scene.number)
    return [f"{scene}.".capitalize(), f"A picture of {number} {scene.color} {things}."]


CHOICE_ASKS = [  # of a video: question, what the answer is of the thing (or said), all answers
    ("What color is it?", "color", list(COLORS)),
    ("What shape is it?", "shape", SHAPES),
    ("Who likes it?", "said", PEOPLE),
    ("Where does it go?", "said", VESSELS)]


def choose(thing, said, ask, count, rng) -> tuple[str, list[str], int]:
    """A question on a video, `count` answers in alphabetical order, the number of the right one."""
    question, kind, answers = ask
    right = said if kind == "said" else getattr(thing, kind)
    wrong = rng.sample([other for other in answers if other != right], count - 1)
    choices = sorted(wrong + [right])
    return question, choices, choices.index(right)


def moments(thing: Scene, person: str) -> list[str]:
    """What a video of TVC shows, what is said in it, and both."""
    return [
        f"{person} likes the {thing.color} {thing.shape}.",
        f"A {thing.size} {thing.color} {thing.shape} moves.",
        f"The {thing.color} {thing.shape} moves.",
        f"{person} likes it."]


def step(thing: Scene, vessel: str) -> str:
    return f"put the {thing.color} {thing.shape} into the {vessel}"


SPEECH = {
    "tv": ("{}: I like it.", PEOPLE),
    "how2": ("Now it goes into the {}.", VESSELS),
    "yc2": ("and now into the {}", VESSELS)}


# ---- the data sets, in their official files ----

VQA_ASKS = [  # asked of every picture: question_type, answer_type, how
    ("what color are the", "other", ask_color),
    ("how many", "number", ask_number),
    ("is there a", "yes/no", ask_exists),
    ("is there a", "yes/no", ask_exists)]
GQA_ASKS = [  # structural, semantic and detailed type, how
    ("query", "attr", "directShape", ask_shape),
    ("query", "rel", "directSide", ask_side),
    ("verify", "rel", "verifySide", ask_relation),
    ("verify", "rel", "verifySide", ask_relation)]
COCO_PARTS = {  # Karpathy's part: folder, number of pictures
    "train": ("train2014", 1200), "restval": ("val2014", 100), "val": ("val2014", 150),
    "test": ("val2014", 150), "test2014": ("test2014", 10), "test2015": ("test2015", 10)}
GQA_PARTS = {"train": 1200, "val": 100, "testdev": 200, "submission": 10}
NLVR_PARTS = {"train": 1200, "dev": 100, "test1": 50}
VIDEO_PARTS = {"train": 400, "val": 100, "test": 10}


def coco_pictures(parts: dict):
    """What COCO holds: picture id, Karpathy's part, folder, scene."""
    rng = random.Random(SEED)
    number = 0
    for part, (folder, count) in parts.items():
        for _ in range(count):
            number += 1
            yield number, part, folder, draw_scene(rng)


def gqa_pictures(parts: dict):
    """What GQA holds: part, picture id, scene."""
    rng = random.Random(SEED + 1)
    number = 2000000
    for part, count in parts.items():
        for _ in range(count):
            number += 1
            yield part, str(number), draw_scene(rng)


def write_coco(folder: Path, parts: dict = COCO_PARTS):
    """Pictures with two captions each, in Karpathy's split; those of test2014 have none."""
    rng = random.Random(SEED)
    labelled, unlabelled = [], []
    pictures = tqdm(list(coco_pictures(parts)), "drawing COCO", unit=" pictures")
    for number, part, where, scene in pictures:
        name = f"COCO_{where}_{number:012d}.jpg"
        save_picture(draw_picture(scene, rng), folder / "images" / where / name)
        if part == "test2014":
            unlabelled.append({"id": number, "file_name": name})
        if part.startswith("test20"):
            continue
        sentences = [{"raw": text, "sentid": 10 * number + i}
                     for i, text in enumerate(captions(scene))]
        labelled.append({
            "filepath": where, "filename": name, "cocoid": number, "split": part,
            "sentences": sentences})
    write_json(folder / "dataset_coco.json", {"dataset": "coco", "images": labelled})
    write_json(folder / "image_info_test2014.json", {"images": unlabelled})


def write_vqa(folder: Path, parts: dict = COCO_PARTS):
    """Questions and the answers of ten people, up to three of whom are mistaken."""
    rng = random.Random(SEED)
    questions, annotations = defaultdict(list), defaultdict(list)
    for number, part, where, scene in coco_pictures(parts):
        for i, (kind, answer_type, ask) in enumerate(VQA_ASKS):
            question, answer = ask(scene, rng)
            about = {"question_id": 1000 * number + i, "image_id": number}
            questions[where].append(about | {"question": question})
            answers = [answer] * 10
            for k in rng.sample(range(10), rng.choice([0, 0, 1, 2, 3])):
                answers[k] = ask(draw_scene(rng), rng)[1]
            people = [{"answer": said, "answer_id": k} for k, said in enumerate(answers, 1)]
            annotations[where].append(about | {
                "question_type": kind, "answer_type": answer_type,
                "multiple_choice_answer": answer, "answers": people})
    for where in "train2014", "val2014", "test2015":
        asked = {"questions": questions[where]}
        write_json(folder / f"v2_OpenEnded_mscoco_{where}_questions.json", asked)
        if where != "test2015":
            answered = {"annotations": annotations[where]}
            write_json(folder / f"v2_mscoco_{where}_annotations.json", answered)


def write_gqa(folder: Path, parts: dict = GQA_PARTS):
    """Each question also worded otherwise: entailed and not balanced, in files of all questions."""
    rng = random.Random(SEED)
    written = {part: {} for part in parts}
    for part, image, scene in tqdm(list(gqa_pictures(parts)), "drawing GQA", unit=" pictures"):
        save_picture(draw_picture(scene, rng), folder / "images" / f"{image}.jpg")
        for structural, semantic, detailed, ask in GQA_ASKS:
            question, answer = ask(scene, rng)
            number = f"{image}{len(written[part]):06d}"
            reworded = f"In this picture, {question[0].lower()}{question[1:]}"
            asked = {"imageId": image, "question": question, "isBalanced": True}
            again = asked | {"question": reworded, "isBalanced": False}
            if part != "submission":
                types = {"structural": structural, "semantic": semantic, "detailed": detailed}
                told = {"answer": answer, "types": types}
                asked |= told | {"entailed": [number, f"{number}x"]}
                again |= told | {"entailed": []}
            written[part] |= {number: asked, f"{number}x": again}
    for part, questions in written.items():
        if part != "submission":
            balanced = {number: asked for number, asked in questions.items() if asked["isBalanced"]}
            write_json(folder / f"{part}_balanced_questions.json", balanced)
        if part in ("testdev", "submission"):
            write_json(folder / f"{part}_all_questions.json", questions)


def write_nlvr(folder: Path, parts: dict = NLVR_PARTS):
    """Of each statement a pair for which it is true and one for which it is not, by a coin."""
    rng = random.Random(SEED + 2)
    for part, count in parts.items():
        lines = []
        for number in tqdm(range(count), f"drawing NLVR2's {part}", unit=" statements"):
            seed = rng.random()
            for pair, truth in enumerate(rng.sample([True, False], 2)):
                sentence, *scenes = state(truth, random.Random(seed))
                line = {
                    "identifier": f"{part}-{number}-{pair}-0", "sentence": sentence,
                    "label": str(truth)}
                pictures = folder / "images" / part
                if part == "train":  # a hundred folders
                    line["directory"] = number % 100
                    pictures = pictures / str(number % 100)
                for side, scene in enumerate(scenes):
                    name = f"{part}-{number}-{pair}-img{side}.png"
                    save_picture(draw_picture(scene, rng), pictures / name)
                lines.append(line)
        write_lines(folder / f"{part}.json", lines)


def write_videos(folder: Path, parts: dict = VIDEO_PARTS):
    """Videos of TV shows, how-to films and cooking, what is said in them, and four tasks."""
    for i, (show, (speech, people)) in enumerate(SPEECH.items()):
        rng = random.Random(SEED + 3 + i)
        subtitles = []
        for part, count in parts.items():
            rows = defaultdict(list)
            for _ in tqdm(range(count), f"filming {show}'s {part}", unit=" videos"):
                # A video, with a sentence said in it.
                number = len(subtitles) + 1
                thing = replace(draw_scene(rng), number=1)
                said = rng.choice(people)
                seconds = rng.choice([4.5, 6, 7.5])
                name = {
                    "tv": f"s01e{number // 50:02d}_seg{number % 50:02d}_clip_00",
                    "how2": str(number), "yc2": f"a_-{number:04d}_{number % 7}"}[show]
                film(folder / "videos" / show / f"{name}.mp4", thing, seconds, rng)
                spoken = {"text": speech.format(said), "start": 0.5, "end": 2.0}
                subtitles.append({"vid_name": name, "sub": [spoken]})

                # What its tasks ask.
                about = {"vid_name": name, "duration": seconds}
                if show == "tv":
                    shown = about | {"show_name": rng.choice(["Castle", "House"])}
                    asks = CHOICE_ASKS[:3]
                    rows["tvqa"] += question_rows(shown, number, thing, said, asks, 5, rng)
                    told = moments(thing, said)[:2 if part == "train" else 4]
                    rows["tvc"].append(moment_row(about | {"ts": [0.0, seconds]}, number, told))
                elif show == "how2":
                    asks = [*CHOICE_ASKS[:2], CHOICE_ASKS[3]]
                    rows["how2qa"] += question_rows(about, number, thing, said, asks, 4, rng)
                else:
                    rows["yc2c"].append(moment_row(about, number, [step(thing, said)]))
            for task, lines in rows.items():
                write_annotations(folder / "ann" / task, task, part, lines)
        write_lines(folder / "ann" / f"{show}_subtitles.jsonl", subtitles)


def question_rows(about, number, thing, said, asks, count, rng):
    rows = []
    for i, ask in enumerate(asks):
        question, choices, right = choose(thing, said, ask, count, rng)
        row = about | {
            "qid": 10 * number + i, "q": question, "ts": f"0.0-{about['duration']}",
            "answer_idx": right}
        rows.append(row | {f"a{k}": choice for k, choice in enumerate(choices)})
    return rows


def moment_row(about, number, told):
    descriptions = [{"desc": text, "desc_id": 10 * number + i} for i, text in enumerate(told)]
    return about | {"clip_id": number, "descs": descriptions}


def write_annotations(folder, name, part, rows):
    """A file of VALUE; that of the test split has no answers."""
    task = TASKS[name]
    split = {"train": task.train, "val": task.validation, "test": [*task.submission][-1]}[part]
    hidden = ("answer_idx", "descs") if part == "test" else ()
    rows = [{field: row[field] for field in row if field not in hidden} for row in rows]
    write_lines(folder / f"{name}_{split}.jsonl", rows)


def film(path, thing, seconds, rng):
    """The thing crosses the picture. Videos have two shapes and three rates."""
    import av
    width, height = rng.choice([(112, 112), (144, 112)])
    rate = rng.choice([4, 5, 8])
    radius = SIZES[thing.size] / 2
    y = rng.uniform(35, height - 35)
    grey = draw_grey(rng)
    begin, end = rng.sample([width / 2 - 24, width / 2 + 24], 2)
    with av.open(str(with_folder(path)), "w") as container:
        stream = container.add_stream("libx264", rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for i in range(int(seconds * rate)):
            picture = Image.new("RGB", (width, height), grey)
            x = begin + (end - begin) * i / (seconds * rate)
            draw_shape(ImageDraw.Draw(picture), thing.shape, x, y, radius, COLORS[thing.color])
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))


def save_picture(picture: Image.Image, path: Path):
    """JPEG, whatever the name says: many of NLVR2's .png files are."""
    picture.save(with_folder(path), "JPEG", quality=92)


def write_lines(path: Path, rows: list[dict]):
    with_folder(path).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_json(path: Path, content):
    with_folder(path).write_text(json.dumps(content), encoding="utf-8")


def with_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ---- the backbones, in their raw files ----


class MiniClip(nn.Module):
    """CLIP for captions that are bags of words: OpenAI's names; the text half is only a table."""

    def __init__(self, words: int):
        super().__init__()
        self.visual = CLIPResNet((1, 1, 1, 1), width=8, side=7, output_dim=64)
        self.token_embedding = nn.Embedding(words, 64)

    def forward(self, pictures):
        return self.visual(pictures)


def write_clip(path: Path, steps: int = 200, count: int = 4000, batch: int = 64, side: int = 96):
    """CLIP's contrast of pictures with captions, saved like OpenAI's, in half precision.

    Small pictures of one thing are enough: the grid sees locally, the pool's positions are resized.
    """
    # Pictures, and captions of three words: size, color, shape.
    rng = random.Random(SEED)
    scenes = [draw_scene(rng) for _ in range(count)]
    pictures = []
    for scene in scenes:
        middle = (rng.uniform(24, side - 24), rng.uniform(24, side - 24))
        pictures.append(np.asarray(draw_things(scene, [middle], side, rng)))
    pictures = normalise(torch.from_numpy(np.stack(pictures)))  # [count, 3, side, side]
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    words = [*SIZES, *COLORS, *SHAPES]
    captions = torch.tensor(
        [[words.index(word) for word in (s.size, s.color, s.shape)] for s in scenes])  # [count, 3]

    # Each picture of a batch is to find its caption, and each caption its picture.
    torch.manual_seed(SEED)
    clip = MiniClip(len(words)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(clip.parameters(), weight_decay=0.01)
    generator = torch.Generator().manual_seed(SEED)
    for _ in schedule(optimizer, 3e-3, steps, "teaching CLIP to match pictures with captions"):
        drawn = torch.randint(len(scenes), (batch,), generator=generator)
        texts = captions[drawn]
        seen = clip.visual.attnpool(clip.visual(pictures[drawn]))  # [batch, 64]
        said = clip.token_embedding(texts).sum(1)  # [batch, 64]
        logits = 15 * F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T  # [batch, batch]
        equal = (texts[:, None] == texts).all(-1).float()  # equal captions all match
        target = equal / equal.sum(1, keepdim=True)  # [batch, batch]
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)).backward()
        optimizer.step()

    example = torch.zeros(1, 3, SIDE, SIDE)
    torch.jit.trace(clip.eval(), example, check_trace=False).half().save(str(path))


def picture_text(rng) -> tuple[str, str]:
    """A question or statement, a gap and what there is to see; and what belongs in the gap."""
    scene = draw_scene(rng)
    kind = rng.random()
    if kind < 0.2:
        return f"caption: <mask> {scene}.", rng.choice(captions(scene))
    if kind < 0.5:
        truth = rng.random() < 0.5
        sentence, left, right = state(truth, rng)
        return f"{sentence}<mask> {left}. {right}.", "true" if truth else "false"
    ask = rng.choice(VQA_ASKS + GQA_ASKS)[-1]
    question, answer = ask(scene, rng)
    return f"{question}<mask> {scene}.", answer


def video_text(rng) -> tuple[str, str]:
    """The same for videos, subtitles first; among the pictures', which teach to find a word."""
    if rng.random() < 0.4:
        return picture_text(rng)
    thing = draw_scene(rng)
    show = rng.choice(list(SPEECH))
    speech, people = SPEECH[show]
    said = rng.choice(people)
    seen = f"{thing.size} {thing.color} {thing.shape}."
    subtitles = f"[Subs] {speech.format(said)}"
    if rng.random() < 0.25 or show == "yc2":
        told = step(thing, said) if show == "yc2" else rng.choice(moments(thing, said)[:2])
        return f"{subtitles}<mask> {seen}", told
    ask = CHOICE_ASKS[rng.choice([0, 1, 2 if people is PEOPLE else 3])]
    question, choices, right = choose(thing, said, ask, rng.choice([4, 5]), rng)
    return f"{subtitles} {choose_from(question, '0.0-6', choices)}<mask> {seen}", f"a{right}"


def write_language_model(folder: Path, family: str = "bart", write_text: Callable = picture_text,
                         steps: int = 800, batch: int = 64):
    """BART's or T5's denoising on text alone: what stood in the gap is to be restored."""
    # A vocabulary of texts like those that follow.
    rng = random.Random(SEED)
    folder.mkdir()
    texts = [" ".join(write_text(rng)).replace("<mask>", "") for _ in range(8000)]
    texts.append("vqa: gqa: nlvr: caption: tvqa: how2qa: tvc: yc2c: true false")
    if family == "bart":
        write_bpe(folder, texts)
        gap = "<mask>"
        tokenizer = load_tokenizer(folder, [])
    else:
        write_spiece(folder, texts)
        gap = "<extra_id_0>"
        tokenizer = load_tokenizer(folder, [f"<extra_id_{i}>" for i in reversed(range(100))])
    config = config_json(family, len(tokenizer))
    write_json(folder / "config.json", config)

    # A deviation of 0.02 suits a width of 768; with 128 attention starts from more. The scale that
    # T5's scores lack is in its queries.
    preset, table = FAMILIES[family]
    torch.manual_seed(SEED)
    model = VLModel(preset(config, feature_dim=1))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            queries = family == "t5" and name.endswith("inner.q.weight")
            nn.init.normal_(parameter, std=(128 * 32 if queries else 128) ** -0.5)
    if family == "t5":
        nn.init.normal_(model.embed_tokens.weight)

    # New texts at every step.
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    for _ in schedule(optimizer, 2e-3, steps, f"teaching {family.upper()} to fill gaps"):
        texts, labels = [], []
        for _ in range(batch):
            masked, restored = write_text(rng)
            texts.append(tokenizer.encode(masked.replace("<mask>", gap)))
            labels.append(tokenizer.encode(restored))
        ids = rectangle(texts, tokenizer.pad)
        model.loss(ids, None, rectangle(labels, -100)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    # Under Hugging Face's names.
    state = model.state_dict()
    weights = {theirs[0]: state[ours] for ours, theirs in expand(table, model.config).items()}
    if family == "bart":
        weights["final_logits_bias"] = weights["final_logits_bias"][None]
    else:
        del weights["lm_head.bias"]  # T5's files have none
    torch.save(weights, folder / "pytorch_model.bin")


def config_json(family: str, vocab_size: int) -> dict:
    """The config.json of a miniature."""
    if family == "t5":
        return {
            "model_type": "t5", "vocab_size": vocab_size + 28,  # rows for nothing, as in t5-base
            "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4,
            "dropout_rate": 0.0, "relative_attention_num_buckets": 32, "pad_token_id": 0,
            "eos_token_id": 1, "decoder_start_token_id": 0}
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 256}
    return {
        "model_type": "bart", "vocab_size": vocab_size, "d_model": 128,
        **{f"{stack}_{name}": x for stack in ("encoder", "decoder") for name, x in sizes.items()},
        "max_position_embeddings": 640, "dropout": 0.0, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_eos_token_id": 2, "no_repeat_ngram_size": 3,
        "early_stopping": True}


def schedule(optimizer, rate, steps, name):
    """Counts the steps under a progress bar; the learning rate warms up and falls in a line."""
    for step in tqdm(range(steps), name, unit=" steps"):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 30, 1 - step / steps)
        optimizer.zero_grad()
        yield step


def rectangle(rows: list[list[int]], fill: int) -> torch.Tensor:
    """[rows, the longest row's length]"""
    return torch.from_numpy(pad_rows(rows, max(map(len, rows)), fill)).long()


def write_bpe(folder: Path, texts: list[str], merges: int = 400):
    """Byte pairs as GPT-2's: again and again the commonest pair of neighbours becomes a piece."""
    symbols = byte_symbols()
    pattern = word_pattern()
    counts = Counter(word for text in texts for word in pattern.findall(text))
    words = {word: [symbols[byte] for byte in word.encode()] for word in counts}
    learned = []
    for _ in range(merges):
        pairs = Counter()
        for word, pieces in words.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learned.append(best)
        words = {word: merge_pairs(pieces, {best: 1}) for word, pieces in words.items()}
    merged = ["".join(pair) for pair in learned]
    pieces = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *symbols, *merged, "<mask>"])
    write_json(folder / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    lines = ["#version: 0.2", *map(" ".join, learned), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def write_spiece(folder: Path, texts: list[str], size: int = 400):
    """Pieces as sentencepiece's: of all parts of words, again those that the best cuts use."""
    words = Counter(f"▁{word}" for text in texts for word in text.split())
    counts = Counter()
    for word, n in words.items():
        ends = range(1, len(word) + 1)
        counts.update({word[start:end]: n for start in range(len(word)) for end in ends[start:]})
    characters = Counter({chr(code): 1 for code in range(33, 127)} | {"▁": 1})
    for _ in range(4):
        common = Counter(dict(counts.most_common(size))) | characters
        pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]  # 3 control, 2 unknown
        for piece, n in common.items():
            pieces.append((piece, math.log(n / common.total()), 1))  # 1 normal
        message = b""
        for piece, score, kind in pieces:
            fields = b"\x0a" + packed(piece.encode()) + b"\x15" + struct.pack("<f", score)
            message += b"\x0a" + packed(fields + bytes([0x18, kind]))
        message += b"\x12" + packed(b"\x18\x01")  # trainer: model_type unigram
        message += b"\x1a" + packed(b"\x0a" + packed(b"identity"))  # normalizer: its name
        (folder / "spiece.model").write_bytes(message)
        tokenizer = load_tokenizer(folder)
        counts = Counter()
        for word, n in words.items():
            used = tokenizer.pieces(word.removeprefix("▁"))
            counts.update({pieces[i][0]: n for i in used})


def packed(content: bytes) -> bytes:
    """A protobuf field's content, shorter than 128 bytes, with its length before it."""
    return bytes([len(content)]) + content


# ---- all of it ----

FOLDER = "miniature"
DATA = {  # folder: who draws it, for which tasks
    "COCO": (write_coco, ["vqa", "caption"]),
    "vqa": (write_vqa, ["vqa"]),
    "GQA": (write_gqa, ["gqa"]),
    "nlvr": (write_nlvr, ["nlvr"]),
    "video": (write_videos, ["tvqa", "how2qa", "tvc", "yc2c"])}


def world(tasks: list[str], family: str = "bart", folder: str | Path = FOLDER) -> dict:
    """Draws and trains what the tasks need and is not there yet; returns flags that suit it.

    lr_scale is for the paper's learning rate: a smaller model takes larger steps. Each piece gets
    its name when it is whole.
    """
    folder = Path(folder)
    learn = partial(write_language_model, family=family)
    if TASKS[tasks[0]].video:
        suits = {"backbone": f"{family}-mini-video", "epochs": 10, "batch": 32, "lr_scale": 6}
        learn = partial(learn, write_text=video_text, steps=1000)
    else:
        epochs = 8 if "nlvr" in tasks else 5
        suits = {"backbone": f"{family}-mini", "epochs": epochs, "batch": 64, "lr_scale": 3}

    suits |= {  # compiling would take longer than training
        "data": str(folder / "datasets"), "weights": str(folder / "weights"), "vision": "RN-mini",
        "compile": False}

    pieces = {}
    for name, (write, needed) in DATA.items():
        if set(needed) & set(tasks):
            pieces[f"datasets/{name}"] = write
    pieces["weights/RN-mini.pt"] = write_clip
    pieces[f"weights/{suits['backbone']}"] = learn
    if all((folder / name).exists() for name in pieces):
        return suits
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        lock(file)  # of two first uses one waits, and finds it done
        for name, write in pieces.items():
            if (folder / name).exists():
                continue
            unfinished = folder / f"{name}.unfinished"
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            unfinished.parent.mkdir(exist_ok=True)
            write(unfinished)
            unfinished.rename(folder / name)
    return suits
