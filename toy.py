"""The built-in miniature world, so that a fresh clone shows everything without data and without weights.

Coloured shapes on a grey ground, still and moving, written in the official formats and layouts of the eight data sets:
real JPEG and MP4 files, real annotation files. And miniature backbones in the raw formats of the real ones, made as
those were: the CLIP-ResNet learned from pictures with captions, BART and T5 from text alone, by putting masked text
right. The adapters must join them.

Everything is drawn from one seed and kept: `world` draws and trains once, and then only looks that all is there.
Needs torch, numpy, pillow, av, tqdm and of ours model.py, data.py and tokenizer.py.
"""

import json
import math
import random
import shutil
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from data import TASKS, choose_from, normalise
from model import FAMILIES, CLIPResNet, Model, expand
from tokenizer import byte_symbols, load_tokenizer, word_pattern

SEED = 20220618                                         # the day CVPR 2022 began
SIDE = 224                                              # pixels, as CLIP wants them
COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 200), "yellow": (250, 220, 40),
          "purple": (140, 60, 170), "orange": (255, 140, 20), "black": (25, 25, 25), "white": (250, 250, 250)}
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
SIZES = {"small": 17, "large": 30}                      # pixels from the middle to the rim
NUMBERS = ["one", "two", "three"]
SIDES = {"left": [(0, 0), (1, 0), (2, 0)], "right": [(0, 2), (1, 2), (2, 2)],       # (row, column) of a 3 x 3 grid;
         "top": [(0, 0), (0, 1), (0, 2)], "bottom": [(2, 0), (2, 1), (2, 2)]}       # the second is no corner
PEOPLE = ["Ann", "Bob", "Eva", "Ken", "Liz", "Tom"]     # who speak in videos,
VESSELS = ["bowl", "box", "cup", "oven", "pan", "pot"]  # and of what they speak


# ---- scenes and pictures ------------------------------------------------------------------------------------------


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


def draw_scene(rng: random.Random) -> Scene:
    return Scene(rng.randint(1, 3), rng.choice(list(SIZES)), rng.choice(list(COLORS)), rng.choice(SHAPES),
                 rng.choice(list(SIDES)))


def draw_picture(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene on grey ground, at jittered places and with smooth edges."""
    cells = SIDES[scene.side]
    cells = cells[1:2] if scene.number == 1 else rng.sample(cells, scene.number)      # a corner alone has two sides
    jitter = lambda cell: SIDE / 3 * (cell + 0.5) + rng.uniform(-8, 8)
    return draw_things(scene, [(jitter(column), jitter(row)) for row, column in cells], SIDE, rng)


def draw_things(scene: Scene, places: list[tuple[float, float]], side: int, rng: random.Random) -> Image.Image:
    scale = 2                                           # drawn larger and reduced, which smooths the edges
    picture = Image.new("RGB", (side * scale, side * scale), tuple(rng.randint(120, 165) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for x, y in places:
        radius = scale * SIZES[scene.size] * rng.uniform(0.9, 1.1)
        draw_shape(pen, scene.shape, scale * x, scale * y, radius, COLORS[scene.color])
    return picture.reduce(scale)


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, color: tuple):
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
            angle, radius = np.pi * (i / corners - 0.5), r * (1.1 if i % 2 == 0 else dents)
            points.append((x + radius * np.cos(angle), y + radius * np.sin(angle)))
        pen.polygon(points, color)


# ---- what is asked about a scene ----------------------------------------------------------------------------------


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
    return f"Is there {article} {color} {shape}?", "yes" if (color, shape) == (scene.color, scene.shape) else "no"


def ask_shape(scene, rng):
    return f"What shape are the {scene.color} things?", scene.shape


def ask_side(scene, rng):
    return f"On which side are the {plural(scene.shape, 2)}?", scene.side


def ask_relation(scene, rng):
    """Yes and no equally often."""
    side = scene.side if rng.random() < 0.5 else rng.choice([other for other in SIDES if other != scene.side])
    return f"Are the {scene.color} things on the {side}?", "yes" if side == scene.side else "no"


def state(truth: bool, rng: random.Random) -> tuple[str, Scene, Scene]:
    """A statement on the colours of two pictures, and scenes for left and right that make it true or false."""
    color, other = rng.sample(list(COLORS), 2)
    if rng.random() < 0.5:
        which, has = "Both pictures show", [True, truth]
    else:
        which, has = "One of the pictures shows", [truth, False]
    left, right = (replace(draw_scene(rng), color=color if here else other) for here in rng.sample(has, 2))
    return f"{which} {color} things.", left, right


def captions(scene: Scene) -> list[str]:
    number, things = NUMBERS[scene.number - 1], plural(scene.shape, scene.number)
    return [f"{scene}.".capitalize(), f"A picture of {number} {scene.color} {things}."]


CHOICE_ASKS = [  # of a video: question, right answer by thing and speech, all answers
    ("What color is it?", lambda thing, said: thing.color, list(COLORS)),
    ("What shape is it?", lambda thing, said: thing.shape, SHAPES),
    ("Who likes it?", lambda thing, said: said, PEOPLE), ("Where does it go?", lambda thing, said: said, VESSELS)]


def choose(thing: Scene, said: str, ask: tuple, count: int, rng: random.Random) -> tuple[str, list[str], int]:
    """A question about a video, `count` answers to choose from in alphabetical order, and the number of the right one."""
    question, answer, every = ask
    right = answer(thing, said)
    choices = sorted(rng.sample([other for other in every if other != right], count - 1) + [right])
    return question, choices, choices.index(right)


def moments(thing: Scene, person: str) -> list[str]:
    """What a video of TVC shows, what is said in it, and both."""
    return [f"{person} likes the {thing.color} {thing.shape}.", f"A {thing.size} {thing.color} {thing.shape} moves.",
            f"The {thing.color} {thing.shape} moves.", f"{person} likes it."]


def step(thing: Scene, vessel: str) -> str:
    return f"put the {thing.color} {thing.shape} into the {vessel}"


SPEECH = {"tv": ("{}: I like it.", PEOPLE), "how2": ("Now it goes into the {}.", VESSELS),
          "yc2": ("and now into the {}", VESSELS)}


# ---- the data sets, in their official files -----------------------------------------------------------------------

VQA_ASKS = [  # asked of every picture: question_type, answer_type, how
            ("what color are the", "other", ask_color), ("how many", "number", ask_number),
            ("is there a", "yes/no", ask_exists), ("is there a", "yes/no", ask_exists)]
GQA_ASKS = [  # structural, semantic and detailed type, how
            ("query", "attr", "directShape", ask_shape), ("query", "rel", "directSide", ask_side),
            ("verify", "rel", "verifySide", ask_relation), ("verify", "rel", "verifySide", ask_relation)]
COCO_PARTS = {"train": ("train2014", 1200), "restval": ("val2014", 100), "val": ("val2014", 150),
              "test": ("val2014", 150), "test2014": ("test2014", 10), "test2015": ("test2015", 10)}
GQA_PARTS = {"train": 1200, "val": 100, "testdev": 200, "submission": 10}
NLVR_PARTS = {"train": 1200, "dev": 100, "test1": 50}
VIDEO_PARTS = {"train": 400, "val": 100, "test": 10}


def coco_pictures(parts: dict):
    """What COCO holds: picture id, Karpathy's part, folder, scene."""
    rng, number = random.Random(SEED), 0
    for part, (folder, count) in parts.items():
        for _ in range(count):
            number += 1
            yield number, part, folder, draw_scene(rng)


def gqa_pictures(parts: dict):
    """What GQA holds: part, picture id, scene."""
    rng, number = random.Random(SEED + 1), 2000000
    for part, count in parts.items():
        for _ in range(count):
            number += 1
            yield part, str(number), draw_scene(rng)


def write_coco(folder: Path, parts: dict = COCO_PARTS):
    rng, images = random.Random(SEED), []
    for number, part, where, scene in tqdm(list(coco_pictures(parts)), "drawing COCO", unit=" pictures"):
        name = f"COCO_{where}_{number:012d}.jpg"
        save_picture(draw_picture(scene, rng), folder / "images" / where / name)
        sentences = [{"raw": text, "imgid": number - 1, "sentid": 10 * number + i}
                     for i, text in enumerate(captions(scene))]
        images.append({"filepath": where, "filename": name, "cocoid": number, "imgid": number - 1, "split": part,
                       "sentences": sentences})
    labelled = [image for image in images if not image["split"].startswith("test20")]
    write_json(folder / "dataset_coco.json", {"dataset": "coco", "images": labelled})
    write_json(folder / "image_info_test2014.json", {"images": [
        {"id": image["cocoid"], "file_name": image["filename"]} for image in images if image["split"] == "test2014"]})


def write_vqa(folder: Path, parts: dict = COCO_PARTS):
    """Questions and the answers of ten people, up to three of whom are mistaken."""
    rng = random.Random(SEED)
    questions, annotations = ({year: [] for year in ("train2014", "val2014", "test2015")} for _ in range(2))
    for number, part, where, scene in coco_pictures(parts):
        for i, (kind, answer_type, ask) in enumerate(VQA_ASKS):
            question, answer = ask(scene, rng)
            about = {"question_id": 1000 * number + i, "image_id": number}
            answers = [answer] * 10
            for k in rng.sample(range(10), rng.choice([0, 0, 1, 2, 3])):
                answers[k] = ask(draw_scene(rng), rng)[1]
            if where in questions:
                questions[where].append(about | {"question": question})
                annotations[where].append(about | {
                    "question_type": kind, "answer_type": answer_type, "multiple_choice_answer": answer, "answers": [
                        {"answer": answers[k], "answer_confidence": "yes", "answer_id": k + 1} for k in range(10)]})
    for where in questions:
        top = {"data_type": "mscoco", "data_subtype": where}
        write_json(folder / f"v2_OpenEnded_mscoco_{where}_questions.json",
                   top | {"task_type": "Open-Ended", "questions": questions[where]})
        if where != "test2015":
            write_json(folder / f"v2_mscoco_{where}_annotations.json", top | {"annotations": annotations[where]})


def write_gqa(folder: Path, parts: dict = GQA_PARTS):
    """Each question with an equivalent one, in the files of all questions: entailed, worded otherwise, not balanced."""
    rng, written = random.Random(SEED), {part: {} for part in parts}
    for part, image, scene in tqdm(list(gqa_pictures(parts)), "drawing GQA", unit=" pictures"):
        save_picture(draw_picture(scene, rng), folder / "images" / f"{image}.jpg")
        for structural, semantic, detailed, ask in GQA_ASKS:
            question, answer = ask(scene, rng)
            number = f"{image}{len(written[part]):06d}"
            record = {"imageId": image, "question": question, "answer": answer, "fullAnswer": f"{answer}.",
                      "isBalanced": True, "groups": {"global": None, "local": None}, "equivalent": [number],
                      "entailed": [number, f"{number}x"],
                      "types": {"structural": structural, "semantic": semantic, "detailed": detailed}}
            written[part][number] = record
            written[part][f"{number}x"] = record | {
                "question": f"In this picture, {question[0].lower()}{question[1:]}", "isBalanced": False, "entailed": []}
    for part, questions in written.items():
        if part == "submission":
            fields = "imageId", "question", "isBalanced"
            questions = {number: {name: r[name] for name in fields} for number, r in questions.items()}
        else:
            balanced = {number: r for number, r in questions.items() if r["isBalanced"]}
            write_json(folder / f"{part}_balanced_questions.json", balanced)
        if part in ("testdev", "submission"):
            write_json(folder / f"{part}_all_questions.json", questions)


def write_nlvr(folder: Path, parts: dict = NLVR_PARTS):
    """Of each statement one pair for which it is true and one for which it is not, in the order of a coin."""
    rng = random.Random(SEED + 2)
    for part, count in parts.items():
        lines = []
        for number in tqdm(range(count), f"drawing NLVR2's {part}", unit=" statements"):
            seed = rng.random()
            for pair, truth in enumerate(rng.sample([True, False], 2)):
                sentence, *scenes = state(truth, random.Random(seed))
                folders = ["images", part, *([str(number % 100)] if part == "train" else [])]
                for side, scene in enumerate(scenes):
                    name = f"{part}-{number}-{pair}-img{side}.png"
                    save_picture(draw_picture(scene, rng), folder.joinpath(*folders, name))
                lines.append({"identifier": f"{part}-{number}-{pair}-0", "sentence": sentence, "label": str(truth)}
                             | ({"directory": number % 100} if part == "train" else {}))
        write_lines(folder / f"{part}.json", lines)


def write_videos(folder: Path, parts: dict = VIDEO_PARTS):
    """The videos of TV shows, how-to films and cooking, what is said in them, and the four tasks on them."""
    for i, (show, (speech, people)) in enumerate(SPEECH.items()):
        rng, subtitles, number = random.Random(SEED + 3 + i), [], 0
        for part, count in parts.items():
            rows = defaultdict(list)
            for _ in tqdm(range(count), f"filming {show}'s {part}", unit=" videos"):
                number += 1
                thing, said, seconds = replace(draw_scene(rng), number=1), rng.choice(people), rng.choice([4.5, 6, 7.5])
                name = {"tv": f"s01e{number // 50:02d}_seg{number % 50:02d}_clip_00", "how2": str(number),
                        "yc2": f"a_-{number:04d}_{number % 7}"}[show]
                film(folder / "videos" / show / f"{name}.mp4", thing, seconds, rng)
                subtitles.append({"vid_name": name, "sub": [{"text": speech.format(said), "start": 0.5, "end": 2.0}]})
                about = {"vid_name": name, "duration": seconds}
                if show == "tv":
                    rows["tvqa"] += question_rows(about | {"show_name": rng.choice(["Castle", "House"])}, number, thing,
                                                  said, CHOICE_ASKS[:3], 5, rng)
                    told = moments(thing, said)[:2 if part == "train" else 4]
                    rows["tvc"].append(moment_row(about | {"ts": [0.0, seconds]}, number, told))
                elif show == "how2":
                    rows["how2qa"] += question_rows(about, number, thing, said, [*CHOICE_ASKS[:2], CHOICE_ASKS[3]], 4, rng)
                else:
                    rows["yc2c"].append(moment_row(about, number, [step(thing, said)]))
            for task, lines in rows.items():
                split = {"train": TASKS[task].train, "val": TASKS[task].validation, "test": [*TASKS[task].submission][-1]}
                hidden = ("answer_idx", "descs") if part == "test" else ()
                write_lines(folder / "ann" / task / f"{task}_{split[part]}.jsonl",
                            [{key: row[key] for key in row if key not in hidden} for row in lines])
        write_lines(folder / "ann" / f"{show}_subtitles.jsonl", subtitles)


def question_rows(about: dict, number: int, thing: Scene, said: str, asks: list, count: int, rng) -> list[dict]:
    rows = []
    for i, ask in enumerate(asks):
        question, choices, right = choose(thing, said, ask, count, rng)
        rows.append(about | {"qid": 10 * number + i, "q": question, "ts": f"0.0-{about['duration']}", "answer_idx": right}
                    | {f"a{k}": choice for k, choice in enumerate(choices)})
    return rows


def moment_row(about: dict, number: int, told: list[str]) -> dict:
    return about | {"clip_id": number,
                    "descs": [{"desc": text, "desc_id": 10 * number + i} for i, text in enumerate(told)]}


def film(path: Path, thing: Scene, seconds: float, rng: random.Random):
    """The thing crosses the picture. Videos have two shapes and three rates."""
    (width, height), rate = rng.choice([(112, 112), (144, 112)]), rng.choice([4, 5, 8])
    path.parent.mkdir(parents=True, exist_ok=True)
    radius, y = SIZES[thing.size] / 2, rng.uniform(35, height - 35)
    ground = tuple(rng.randint(120, 165) for _ in range(3))
    begin, end = rng.sample([width / 2 - 24, width / 2 + 24], 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"preset": "ultrafast"}
        for i in range(int(seconds * rate)):
            picture = Image.new("RGB", (width, height), ground)
            x = begin + (end - begin) * i / (seconds * rate)
            draw_shape(ImageDraw.Draw(picture), thing.shape, x, y, radius, COLORS[thing.color])
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))


def save_picture(picture: Image.Image, path: Path):
    """JPEG, whatever the name says: many of NLVR2's .png files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "JPEG", quality=92)


def write_lines(path: Path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_json(path: Path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


# ---- the backbones, in their raw files ----------------------------------------------------------------------------

class MiniClip(nn.Module):
    """CLIP for captions that are bags of words: OpenAI's names, and a text half that is only a table."""

    def __init__(self, words: int):
        super().__init__()
        self.visual = CLIPResNet((1, 1, 1, 1), width=8, side=7, output_dim=64)
        self.token_embedding = nn.Embedding(words, 64)

    def forward(self, pictures):
        return self.visual(pictures)


def write_clip(path: Path, steps: int = 200, count: int = 4000, batch: int = 64, side: int = 96):
    """CLIP's contrast of pictures with captions, on small pictures of one thing; saved like OpenAI's, in half precision.

    Small pictures are enough because the grid sees locally, and the pool's positions are resized.
    """
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    words = [*SIZES, *COLORS, *SHAPES]
    scenes, pictures = [draw_scene(rng) for _ in range(count)], []
    for scene in scenes:
        place = (rng.uniform(24, side - 24), rng.uniform(24, side - 24))
        pictures.append(np.asarray(draw_things(scene, [place], side, rng)))
    captions = torch.tensor([[words.index(w) for w in (s.size, s.color, s.shape)] for s in scenes])
    pictures = normalise(torch.from_numpy(np.stack(pictures))).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(SEED)
    clip = MiniClip(len(words)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(clip.parameters(), weight_decay=0.01)
    for _ in schedule(optimizer, 3e-3, steps, "teaching CLIP to match pictures with captions"):
        rows = torch.randint(len(scenes), (batch,), generator=generator)
        seen = F.normalize(clip.visual.attnpool(clip.visual(pictures[rows])), dim=-1)       # [batch, 64]
        said = F.normalize(clip.token_embedding(captions[rows]).sum(1), dim=-1)
        same = (captions[rows][:, None] == captions[rows]).all(-1).float()                  # equal captions all match
        target, logits = same / same.sum(1, keepdim=True), 15 * seen @ said.T
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)).backward()
        optimizer.step()
    archive = torch.jit.trace(clip.eval(), torch.zeros(1, 3, SIDE, SIDE), check_trace=False).half()
    archive.save(str(path))


def picture_text(rng: random.Random) -> tuple[str, str]:
    """Text with a gap, and what belongs there: a question, a statement or nothing, the gap, and what there is to see."""
    scene, kind = draw_scene(rng), rng.random()
    if kind < 0.2:
        return f"caption: <mask> {scene}.", rng.choice(captions(scene))
    if kind < 0.5:
        truth = rng.random() < 0.5
        sentence, left, right = state(truth, rng)
        return f"{sentence}<mask> {left}. {right}.", "true" if truth else "false"
    question, answer = rng.choice(VQA_ASKS + GQA_ASKS)[-1](scene, rng)
    return f"{question}<mask> {scene}.", answer


def video_text(rng: random.Random) -> tuple[str, str]:
    """The same for videos, whose subtitles come first; among the picture's, from which finding a word is learned."""
    if rng.random() < 0.4:
        return picture_text(rng)
    thing, show = draw_scene(rng), rng.choice(list(SPEECH))
    speech, people = SPEECH[show]
    said = rng.choice(people)
    seen, subtitles = f"{thing.size} {thing.color} {thing.shape}.", f"[Subs] {speech.format(said)}"
    if rng.random() < 0.25 or show == "yc2":
        told = step(thing, said) if show == "yc2" else rng.choice(moments(thing, said)[:2])
        return f"{subtitles}<mask> {seen}", told
    ask = CHOICE_ASKS[rng.choice([0, 1, 2 if people is PEOPLE else 3])]
    question, choices, right = choose(thing, said, ask, rng.choice([4, 5]), rng)
    return f"{subtitles} {choose_from(question, '0.0-6', choices)}<mask> {seen}", f"a{right}"


def write_language_model(folder: Path, family: str = "bart", write_text: Callable = picture_text, steps: int = 800,
                         batch: int = 64):
    """BART's or T5's denoising on text alone: what stood in the place of the gap is to be restored."""
    rng = random.Random(SEED)
    folder.mkdir()
    write_vocabulary = {"bart": write_bpe, "t5": write_spiece}[family]
    write_vocabulary(folder, [" ".join(write_text(rng)).replace("<mask>", "") for _ in range(8000)] + [
        "vqa: gqa: nlvr: caption: tvqa: how2qa: tvc: yc2c: true false"])
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))] if family == "t5" else []
    tokenizer, gap = load_tokenizer(folder, sentinels), "<extra_id_0>" if family == "t5" else "<mask>"
    config = config_json(family, len(tokenizer))
    write_json(folder / "config.json", config)

    preset, table = FAMILIES[family]
    torch.manual_seed(SEED)
    model = Model(preset(config, feature_dim=1, words=config["vocab_size"]))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:             # 0.02 suits a width of 768; with 128 attention starts from more. T5 has no
            queries = family == "t5" and name.endswith("inner.q.weight")           # scale in its scores, but in queries
            nn.init.normal_(parameter, std=(128 * 32 if queries else 128) ** -0.5)
    if family == "t5":
        nn.init.normal_(model.words.weight)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    no_picture = torch.zeros(batch, 0, 1, 1)
    for _ in schedule(optimizer, 2e-3, steps, f"teaching {family.upper()} to put masked text right"):
        masked, gaps = zip(*(write_text(rng) for _ in range(batch)))
        ids = pad_rows([tokenizer.encode(text.replace("<mask>", gap)) for text in masked], tokenizer.pad)
        labels = pad_rows(map(tokenizer.encode, gaps), -100)
        model.loss(ids, no_picture, labels, torch.ones(batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    weights = {theirs[0]: model.state_dict()[ours] for ours, theirs in expand(table, model.config).items()}
    weights.pop("lm_head.bias", None)                   # a row of our table that T5's files do not have
    torch.save(weights, folder / "pytorch_model.bin")


def config_json(family: str, words: int) -> dict:
    """The config.json of a miniature, with the fields of the real one."""
    if family == "t5":
        return {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": words + 28,
                "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
                "relative_attention_num_buckets": 32, "feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6,
                "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}      # 28 rows for nothing, as t5-base
    return {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "vocab_size": words,
            "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
            "max_position_embeddings": 640, "activation_function": "gelu", "scale_embedding": False, "dropout": 0.0,
            "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
            "forced_eos_token_id": 2, "no_repeat_ngram_size": 3, "early_stopping": True, "num_beams": 4}


def schedule(optimizer, rate: float, steps: int, name: str):
    """Counts the steps under a progress bar; the learning rate warms up and falls in a line."""
    for step in tqdm(range(steps), name, unit=" steps"):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 30, 1 - step / steps)
        optimizer.zero_grad()
        yield step


def pad_rows(rows: Iterable[list[int]], fill: int) -> torch.Tensor:
    rows = list(rows)
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def write_bpe(folder: Path, texts: list[str], merges: int = 400):
    """Learns byte pairs as GPT-2's authors did: again and again the commonest pair of neighbours becomes a piece."""
    symbols, pattern = byte_symbols(), word_pattern()
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
        for pieces in words.values():
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i:i + 2] = ["".join(best)]
                i += 1
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *symbols, *("".join(pair) for pair in learned), "<mask>"]
    write_json(folder / "vocab.json", {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in learned), encoding="utf-8")


def write_spiece(folder: Path, texts: list[str], size: int = 400):
    """Learns pieces as sentencepiece's unigram model does: of all parts of words, again those that the best cuts use."""
    words = Counter(f"▁{word}" for text in texts for word in text.split())
    counts = Counter()
    for word, n in words.items():
        counts.update({word[i:j]: n for i in range(len(word)) for j in range(i + 1, len(word) + 1)})
    characters = Counter({chr(code): 1 for code in range(33, 127)} | {"▁": 1})
    for _ in range(4):
        pieces = Counter(dict(counts.most_common(size))) | characters
        names = ["<pad>", "</s>", "<unk>", *pieces]
        scores = [0.0] * 3 + [math.log(n / pieces.total()) for n in pieces.values()]
        kinds = [3, 3, 2] + [1] * len(pieces)           # control, control, unknown, normal
        message = b"".join(b"\x0a" + packed(b"\x0a" + packed(name.encode()) + b"\x15" + struct.pack("<f", score)
                                           + bytes([0x18, kind])) for name, score, kind in zip(names, scores, kinds))
        trainer, normalizer = b"\x18\x01", b"\x0a" + packed(b"identity")             # model_type unigram, name
        (folder / "spiece.model").write_bytes(message + b"\x12" + packed(trainer) + b"\x1a" + packed(normalizer))
        tokenizer, counts = load_tokenizer(folder), Counter()
        for word, n in words.items():
            counts.update({names[i]: n for i in tokenizer.pieces(word.removeprefix("▁"))})


def packed(content: bytes) -> bytes:
    """A protobuf field's content with its length before it, seven bits a byte."""
    length, head = len(content), b""
    while length > 127:
        head, length = head + bytes([length & 127 | 128]), length >> 7
    return head + bytes([length]) + content


# ---- all of it ----------------------------------------------------------------------------------------------------

FOLDER = "miniature"
DATA = {  # who draws it, for which tasks
    "COCO": (write_coco, ["vqa", "caption"]), "vqa": (write_vqa, ["vqa"]), "GQA": (write_gqa, ["gqa"]),
    "nlvr": (write_nlvr, ["nlvr"]), "video": (write_videos, ["tvqa", "how2qa", "tvc", "yc2c"])}


def world(tasks: list[str], family: str = "bart", folder: str | Path = FOLDER) -> dict:
    """Draws and trains what the tasks need and is not there yet; returns the flags of train.py that suit this world.

    Of those, `faster` is what the paper's learning rate is multiplied by: a smaller model takes larger steps. Compiling
    one takes longer than training it. Each piece is made under another name and moved into place when it is whole, so a
    killed run leaves no half of one.
    """
    folder, video = Path(folder), TASKS[tasks[0]].video
    suits = {"backbone": f"{family}-mini", "epochs": 8 if "nlvr" in tasks else 5, "batch": 64, "faster": 3}
    learn = partial(write_language_model, family=family)
    if video:
        suits = {"backbone": f"{family}-mini-video", "epochs": 10, "batch": 32, "faster": 6}
        learn = partial(learn, write_text=video_text, steps=1000)
    pieces = {f"datasets/{name}": write for name, (write, needed) in DATA.items() if set(needed) & set(tasks)}
    for name, write in (pieces | {"weights/RN-mini.pt": write_clip, f"weights/{suits['backbone']}": learn}).items():
        if not (folder / name).exists():
            unfinished = folder / f"{name}.unfinished"
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            unfinished.rename(folder / name)
    return {"data": str(folder / "datasets"), "weights": str(folder / "weights"), "vision": "RN-mini",
            "compile": False} | suits


if __name__ == "__main__":
    print(world(["vqa", "gqa", "nlvr", "caption"]), world(["tvqa"]))
