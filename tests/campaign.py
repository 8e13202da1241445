"""Mutated inputs by lot, over all kinds of files and flags: is each refused in one sentence?

    python tests/campaign.py [--seed 0] [--count 900] [--jobs 1] [--only KIND] [--keep DIR]
    python tests/campaign.py --input JSON-17    # one input again, with all that it said

A tiny world is drawn (a minute; --keep DIR keeps it, and what went wrong). Each input is a copy of
it with one file (or flag, or variable) mutated. A forked child of a warm parent, so that most cost
milliseconds, reads it through the functions that the commands use, or through a command's main();
the kind "commands" starts real ones. Hostile weight files come on top, all of them at any --count.

Right is success, or an error of the product's own: one line, with the name of the mutated file, no
words of Python's. Wrong: another exception, a signal, no end in --seconds, more than 4 GB, a
message without the file, a warning, a process or another file that was opened by the input. A line
is printed for each wrong input, a table at the end; exit code 1 if any is wrong. Linux only.
"""

import argparse
import importlib
import io
import json
import math
import operator
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIGABYTES = 4
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")


# ---- the tiny world ----

DRAW = """
import sys; from pathlib import Path
sys.path.insert(0, sys.argv[1]); import toy
count = float(sys.argv[2])
d, w = Path("datasets"), Path("weights"); w.mkdir()
def some(**parts): return {name: max(1, int(n * count)) for name, n in parts.items()}
sizes = some(train=12, restval=3, val=6, test=4, test2014=1, test2015=1)
coco = {part: (toy.COCO_PARTS[part][0], n) for part, n in sizes.items()}
toy.write_coco(d / "COCO", coco); toy.write_vqa(d / "vqa", coco)
toy.write_gqa(d / "GQA", some(train=12, val=4, testdev=6, submission=2))
toy.write_clip(w / "RN-mini.pt", steps=5, count=80)
toy.write_language_model(w / "bart-mini", "bart", steps=5)
if len(sys.argv) > 3:
    sys.exit()
toy.write_nlvr(d / "nlvr", some(train=12, dev=6, test1=4))
toy.write_videos(d / "video", some(train=6, val=3, test=1))
toy.write_language_model(w / "t5-mini", "t5", steps=3)
"""
FILES = ["--data", "datasets", "--weights", "weights", "--vision", "RN-mini", "--device", "cpu"]
RUNS = {  # name: flags
    "pictures": ["--tasks", "vqa,gqa", "--batch", "32"],
    "pairs": ["--tasks", "nlvr,caption", "--batch", "32"],
    "t5": ["--tasks", "gqa", "--batch", "32", "--backbone", "t5-mini"],
    "videos": ["--tasks", "tvqa,how2qa,tvc,yc2c", "--batch", "8"]}


def train_command(*flags: str, out: str = "runs/x", epochs: int = 1) -> list[str]:
    return ["train.py", "--method", "adapter", "--out", out, *FILES, "--epochs", str(epochs),
            "--backbone", "bart-mini", *flags]  # a later flag wins


def quiet(argv: list, folder: Path):
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=folder, env=ENVIRONMENT,
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, argv))[:200]} failed:\n{done.stderr}")


def draw_world(folder: Path):
    """What toy.py draws, four runs, and the other forms of files that the product reads."""
    folder.mkdir(parents=True)
    quiet(["-c", DRAW, ROOT, 1], folder)
    for name, flags in RUNS.items():
        quiet([ROOT / "train.py", *train_command(*flags, out=f"runs/{name}")[1:]], folder)
    for name in "pictures", "videos":
        quiet([ROOT / "evaluate.py", f"runs/{name}", "--device", "cpu"], folder)
    write_converted(folder)
    write_weights(folder / "weights")
    write_pictures(folder / "pictures")
    write_films(folder / "films")
    write_released(folder)


def write_converted(folder: Path):
    """VL-T5's lists in the place of official files."""
    shutil.copytree(folder / "datasets/features", folder / "vlt5/features")
    (folder / "vlt5/vqa").mkdir()
    (folder / "vlt5/GQA").mkdir()
    (folder / "vlt5/nlvr").mkdir()
    for part in "karpathy_train", "karpathy_val", "karpathy_test":
        rows = []
        for e in data.read_examples(folder / "datasets", "vqa", part):
            rows.append({
                "question_id": e.id, "img_id": e.pictures[0], "sent": e.text, "label": e.answers,
                "question_type": e.kind, "answer_type": e.truth["type"],
                "answers": [{"answer": said} for said in e.truth["answers"]]})
        write_json(folder / f"vlt5/vqa/{part}.json", rows)
    for part, theirs in ("train", "train"), ("val", "valid"), ("testdev", "testdev"):
        rows = [{"question_id": e.id, "img_id": e.pictures[0], "sent": e.text, "label": e.answers}
                for e in data.read_examples(folder / "datasets", "gqa", part)]
        write_json(folder / f"vlt5/GQA/{theirs}.json", rows)
    for part, theirs in ("train", "train"), ("dev", "valid"), ("test1", "test"):
        rows = [{"identifier": e.id, "img0": e.pictures[0], "img1": e.pictures[1], "sent": e.text,
                 "label": int(e.truth["answer"] == "true"), "uid": f"x{e.id}"}
                for e in data.read_examples(folder / "datasets", "nlvr", part)]
        write_json(folder / f"vlt5/nlvr/{theirs}.json", rows)


def write_weights(folder: Path):
    """The same BART as safetensors and in torch's old form, CLIP as a .bin, tokenizer.json."""
    for name in "bart-safe", "bart-old", "bart-json":
        shutil.copytree(folder / "bart-mini", folder / name)
    state = torch.load(folder / "bart-mini/pytorch_model.bin", weights_only=True)
    write_safetensors(folder / "bart-safe/model.safetensors", state)
    os.remove(folder / "bart-safe/pytorch_model.bin")
    torch.save(state, folder / "bart-old/pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "clip-bin").mkdir()
    clip = torch.jit.load(str(folder / "RN-mini.pt"), map_location="cpu").state_dict()
    torch.save(dict(clip), folder / "clip-bin/RN-mini.pt")
    os.remove(folder / "bart-json/merges.txt")
    vocabulary = json.loads((folder / "bart-json/vocab.json").read_text())
    os.remove(folder / "bart-json/vocab.json")
    merges = (folder / "bart-mini/merges.txt").read_text().splitlines()[1:]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [line.split(" ") for line in merges]}
    write_json(folder / "bart-json/tokenizer.json", {"version": "1.0", "model": model})


def write_safetensors(path: Path, state: dict):
    header, reached = {}, 0
    for name, tensor in state.items():
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [reached, reached + size]}
        reached += size
    text = json.dumps(header).encode()
    content = b"".join(tensor.float().numpy().tobytes() for tensor in state.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def write_pictures(folder: Path):
    """A picture in each format and mode."""
    folder.mkdir()
    scene = toy.draw_picture(toy.draw_scene(random.Random(0)), random.Random(0)).resize((96, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    scene.save(folder / "rgb.jpg", exif=exif)
    scene.save(folder / "progressive.jpg", progressive=True)
    scene.convert("CMYK").save(folder / "cmyk.jpg")
    for mode in "1", "L", "LA", "P", "RGB", "RGBA":
        scene.convert(mode).save(folder / f"{mode}.png")
    Image.fromarray(np.arange(7680).reshape(80, 96).astype(np.uint16)).save(folder / "16.png")
    scene.save(folder / "still.gif")
    scene.save(folder / "moving.gif", save_all=True, append_images=[scene.rotate(90)] * 3)
    scene.save(folder / "x.bmp")
    scene.save(folder / "x.webp")


def write_films(folder: Path):
    """A video in each container, and one as a folder of frames."""
    folder.mkdir()
    thing = toy.draw_scene(random.Random(1))
    for suffix in "mp4", "mkv", "avi", "mov", "ts":
        toy.film(folder / f"film.{suffix}", thing, 4.5, random.Random(2))
    shutil.copy(folder.parent / "pictures/moving.gif", folder / "film.gif")
    (folder / "frames").mkdir()
    for i in range(6):
        shutil.copy(folder.parent / "pictures/progressive.jpg", folder / f"frames/{i:05d}.jpg")


def write_released(folder: Path):
    """VALUE's features of YC2C's videos, and an archive that becomes very large."""
    video = folder / "datasets/video"
    target = folder / "released/video"
    shutil.copytree(video / "ann", target / "ann")
    features = target / "vis_features/yc2/clip-vit"
    features.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for path in sorted((video / "videos/yc2").glob("*.mp4")):
        np.savez(features / f"{path.stem}.npz",
                 features=numbers.standard_normal((10, 32)).astype(np.float16))
    header = b"{'descr': '<f2', 'fortran_order': False, 'shape': (90000000, 32)}"
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("features.npy", "w", force_zip64=True) as inner:
            inner.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.ljust(117) + b"\n")
            for _ in range(90):
                inner.write(bytes(64 * 10 ** 6))


def write_json(path: Path, content):
    path.write_text(json.dumps(content))


def copy_world(world: Path, folder: Path):
    """Links, but copies of what the product appends to or cuts."""
    def put(source, target):
        written = {"features", "runs", "cache"} & set(Path(source).relative_to(world).parts)
        (shutil.copy2 if written else os.link)(source, target)

    shutil.copytree(world, folder, copy_function=put)


# ---- mutations: (rng, path) -> what was done ----


class NotHere(Exception):
    """The mutation does not suit the file."""


def replace(path: Path, content: bytes):
    path.unlink()  # it is linked
    path.write_bytes(content)


def truncate(rng, path):
    content = path.read_bytes()
    length = rng.randrange(len(content) or 1)
    replace(path, content[:length])
    return f"cut to {length} of {len(content)} bytes"


def empty(rng, path):
    replace(path, b"")
    return "empty"


def flip_byte(rng, path):
    content = bytearray(path.read_bytes())
    i = min(rng.randrange(len(content)), rng.choice([len(content), 64, 1000]) - 1)
    content[i] ^= rng.randrange(1, 256)
    replace(path, content)
    return f"byte {i} flipped"


def flip_block(rng, path, zeros=False):
    content = bytearray(path.read_bytes())
    size = min(len(content), rng.choice([4, 16, 64, 1024]))
    i = rng.randrange(len(content) - size + 1)
    content[i:i + size] = bytes(size) if zeros else rng.randbytes(size)
    replace(path, content)
    return f"{size} bytes from {i} on {'zero' if zeros else 'others'}"


def zero_block(rng, path):
    return flip_block(rng, path, zeros=True)


def drop_block(rng, path):
    content = path.read_bytes()
    i = rng.randrange(len(content))
    size = rng.choice([1, 7, 64, 1000])
    replace(path, content[:i] + content[i + size:])
    return f"{size} bytes from {i} on left out"


def double_block(rng, path):
    content = path.read_bytes()
    i = rng.randrange(len(content))
    size = rng.choice([1, 7, 64, 1000])
    replace(path, content[:i + size] + content[i:])
    return f"{size} bytes from {i} on twice"


def append_bytes(rng, path):
    replace(path, path.read_bytes() + rng.randbytes(rng.choice([1, 2, 100])))
    return "bytes appended"


def change_number(rng, path):
    """Sizes in headers: four bytes of the first 256 become another number."""
    content = bytearray(path.read_bytes())
    i = rng.randrange(min(256, len(content)) - 4)
    value = rng.choice([0, 1, 0xff, 0xffff, 30000, 2 ** 31 - 1, 2 ** 32 - 1])
    content[i:i + 4] = struct.pack(rng.choice("<>") + "I", value)
    replace(path, content)
    return f"bytes {i} to {i + 4} say {value}"


def remove(rng, path):
    path.unlink()
    return "missing"


def folder(rng, path):
    path.unlink()
    path.mkdir()
    return "a folder"


def pipe(rng, path):
    path.unlink()
    os.mkfifo(path)
    return "a pipe"


def unix_socket(rng, path):
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # its address must be short
    socket.socket(socket.AF_UNIX).bind("socket")
    os.rename("socket", path.name)
    os.chdir(here)
    return "a socket"


def device(rng, path):
    path.unlink()
    target = rng.choice(["/dev/zero", "/dev/null", "/dev/urandom"])
    path.symlink_to(target)
    return f"a link to {target}"


def dangling(rng, path):
    path.unlink()
    path.symlink_to("nowhere")
    return "a dangling link"


def loop(rng, path):
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself"


def lfs_pointer(rng, path):
    replace(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"6d" * 32
            + b"\nsize 557709915\n")
    return "an LFS pointer"


def html_page(rng, path):
    head = rng.choice([b"<!DOCTYPE html>\n<html>", b"<html lang=en>", b"\n<!doctype html><html>"])
    replace(path, head + b"<head><title>403 Forbidden</title></head><body>No.</body></html>\n")
    return "an HTML page"


def other_kind(rng, path):
    """A file of the world of another kind, which is whole."""
    here = Path.cwd()
    others = ["pictures/rgb.jpg", "pictures/L.png", "films/film.mp4", "weights/RN-mini.pt",
              "weights/bart-mini/vocab.json", "weights/bart-safe/model.safetensors",
              "weights/t5-mini/spiece.model", "datasets/vqa/v2_mscoco_val2014_annotations.json",
              "runs/pairs/best.pt", "runs/pictures/config.json", "runs/pairs/log.jsonl"]
    source = here / rng.choice([name for name in others if not name.endswith(path.suffix)])
    replace(path, source.read_bytes())
    return f"{source.name} in its place"


def archive(rng, path):
    path.unlink()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(rng.choice(["x", "features.npy", "x/data.pkl", "x/constants.pkl"]), "nothing")
    return "an archive of nothing"


BYTES = [truncate, truncate, empty, flip_byte, flip_byte, flip_block, zero_block, drop_block,
         double_block, append_bytes, change_number]
PLACES = [remove, folder, pipe, unix_socket, device, dangling, loop, lfs_pointer, lfs_pointer,
          html_page, other_kind, archive]
ABSENT = (remove, dangling, loop)
MUST = {lfs_pointer: ("LFS",), html_page: ("HTML", "web page"), pipe: (), unix_socket: (), device: ()}

# Of trees: JSON, and what torch.save keeps.
DEEP, DIGITS = "@deep@", "@digits@"  # become text that json.dumps does not write
ODD = [None, None, 0, -1, 1, 2.5, 10 ** 30, -10 ** 9, math.inf, math.nan, True, False, "", "x",
       " ", "\ud800", "\0", "a\nb", "7", "../../x", "é" * 3000, [], {}, [[]], [None], [1, "x"],
       {"x": None}, [{}], DEEP, DIGITS]


def shown(value) -> str:
    return ascii(value)[:40]


def spot(rng, tree):
    """A container and a key in it, by lot; often a deep one."""
    place = []
    node = tree
    while isinstance(node, (dict, list)) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        full = [key for key in keys if isinstance(node[key], (dict, list)) and node[key]]
        place.append((node, rng.choice(full if full and rng.random() < 0.6 else keys)))
        if rng.random() < 0.12:
            break
        node = place[-1][0][place[-1][1]]
    if not place:
        raise NotHere
    return place[-1]


def read_tree(path):
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text), False
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()], True


def write_tree(path, tree, lines):
    text = "\n".join(map(json.dumps, tree)) if lines else json.dumps(tree)
    text = text.replace(f'"{DEEP}"', "[" * 10 ** 5 + "]" * 10 ** 5)
    replace(path, text.replace(f'"{DIGITS}"', "9" * 5000).encode())


def edit_json(edit):
    def mutate(rng, path):
        tree, lines = read_tree(path)
        said = edit(rng, tree)
        write_tree(path, tree, lines)
        return said
    return mutate


@edit_json
def odd_value(rng, tree):
    node, key = spot(rng, tree)
    node[key] = rng.choice(ODD)
    return f"{key!r} is {shown(node[key])}"


@edit_json
def odd_everywhere(rng, tree):
    """The same field of all records."""
    node, name = spot(rng, tree)
    if not isinstance(node, dict):
        raise NotHere
    value = rng.choice(ODD[:-2])
    queue = [tree]
    while queue:
        one = queue.pop()
        if isinstance(one, dict):
            if name in one:
                one[name] = value
            queue += one.values()
        elif isinstance(one, list):
            queue += one
    return f"each {name!r} is {shown(value)}"


@edit_json
def drop_field(rng, tree):
    node, key = spot(rng, tree)
    del node[key]
    return f"{key!r} is left out"


@edit_json
def rename_field(rng, tree):
    node, key = spot(rng, tree)
    if not isinstance(node, dict):
        raise NotHere
    node[rng.choice(["", "x", key.upper() + "_", "é"])] = node.pop(key)
    return f"{key!r} has another name"


@edit_json
def double_record(rng, tree):
    node, key = spot(rng, tree)
    if isinstance(node, dict):
        node[rng.choice(list(node))] = node[key]
        return f"{key!r} also in the place of another field"
    node.insert(rng.randrange(len(node)), node[key])
    return f"[{key}] twice"


@edit_json
def swap_values(rng, tree):
    (one, a), (two, b) = spot(rng, tree), spot(rng, tree)
    one[a], two[b] = two[b], one[a]
    if one[a] is one or two[b] is two or len(repr(tree)) > 10 ** 7:
        raise NotHere
    try:
        json.dumps(tree)
    except (ValueError, RecursionError):  # one was within the other
        raise NotHere from None
    return f"{a!r} and {b!r} are swapped"


def whole_value(rng, path):
    value = rng.choice(ODD)
    write_tree(path, value, False)
    return f"it is {shown(value)}"


def twice_in_object(rng, path):
    text = path.read_text()
    fields = list(re.finditer(r'"(\w+)": ("[^"]*"|\d+)', text))
    if not fields:
        raise NotHere
    one = rng.choice(fields)
    replace(path, (text[:one.end()] + f', "{one[1]}": null' + text[one.end():]).encode())
    return f"a second {one[1]!r} is null"


def other_coding(rng, path):
    coding = rng.choice(["utf-16", "utf-32", "latin-1", "utf-8-sig"])
    text = path.read_text().replace("e", "é")
    replace(path, text.encode(coding, "replace"))
    return f"é for e, in {coding}"


JSON = [*[odd_value] * 6, *[odd_everywhere] * 2, drop_field, drop_field, rename_field,
        double_record, swap_values, whole_value, twice_in_object, other_coding]


def tensor_kinds(x):
    """What a tensor may become."""
    return {
        "sparse": lambda: x.float().to_sparse(), "meta": lambda: x.to("meta"),
        "NaN": lambda: torch.full_like(x.float(), math.nan),
        "one infinity": lambda: put(x, math.inf), "one NaN": lambda: put(x, math.nan),
        "beyond float16": lambda: put(x, 1e30), "whole numbers": lambda: x.long(),
        "complex": lambda: x.float().to(torch.complex64), "bool": lambda: x > 0,
        "bytes": lambda: x.to(torch.uint8), "half": lambda: x.half(), "double": lambda: x.double(),
        "expanded to 6 GB": lambda: torch.zeros(1).expand(40000, 40000),
        "expanded to its shape": lambda: torch.zeros(1).expand(x.shape),
        "of no numbers": lambda: torch.zeros(0), "flat": lambda: x.flatten(),
        "a number": lambda: torch.tensor(1.5), "one row less": lambda: x[:-1],
        "one axis more": lambda: x[None], "transposed": lambda: x.T.contiguous(),
        "of two numbers": lambda: torch.zeros(2), "of 4000 rows": lambda: torch.zeros(4000, 4),
        "quantized": lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
        "a parameter": lambda: torch.nn.Parameter(x.float()),
        "not contiguous": lambda: x.float().repeat(2, *[1] * (x.ndim - 1))[::2]}


def put(x, value):
    x = x.float().clone()
    x.view(-1)[x.numel() // 2] = value
    return x


def odd_tensor(rng, path):
    state = load_state(path)
    node, key = tensor_spot(rng, state)
    name, make = rng.choice(list(tensor_kinds(node[key]).items()))
    try:
        node[key] = make()
    except (RuntimeError, IndexError):
        raise NotHere from None
    save_state(state, path)
    return f"the tensor {key!r} is {name}"


def odd_tensors(rng, path):
    """All of them."""
    state = load_state(path)
    kind = rng.choice(["whole numbers", "half", "double", "NaN", "meta", "sparse", "a parameter"])
    queue = [state]
    while queue:
        node = queue.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, torch.Tensor):
                node[key] = tensor_kinds(value)[kind]()
            elif isinstance(value, (dict, list)):
                queue.append(value)
    save_state(state, path)
    return f"each tensor is {kind}"


def odd_entry(rng, path):
    """Another value, also of no tensor, anywhere in the tree."""
    state = load_state(path)
    node, key = spot(rng, state)
    value = rng.choice([*ODD[:-2], torch.zeros(1), torch.zeros(3, 3).long()])
    node[key] = value
    save_state(state, path)
    return f"{key!r} is {shown(value)}"


def other_names(rng, path):
    state = load_state(path)
    node, key = spot(rng, state)
    if isinstance(node, dict):
        new = rng.choice([5, "", "x", 1.5, None, True, f"{key}x", f"module.{key}", "\ud800"])
        node[new] = node.pop(key)
        save_state(state, path)
        return f"{key!r} is called {shown(new)}"
    del node[key]
    save_state(state, path)
    return f"[{key}] is left out"


def more_or_less(rng, path):
    state = load_state(path)
    node, key = spot(rng, state)
    if isinstance(node, dict) and rng.random() < 0.5:
        node["more"] = torch.zeros(3)
        said = "an entry more"
    else:
        del node[key]
        said = f"{key!r} is left out"
    save_state(state, path)
    return said


def wrapped(rng, path):
    state = load_state(path)
    how = rng.choice(["state_dict", "model", "weights", "a list", "a tensor", "None", "empty"])
    save_state({"a list": [state], "a tensor": torch.zeros(3), "None": None, "empty": {}}
               .get(how, {how: state}), path)
    return f"wrapped: {how}"


def tensor_spot(rng, state):
    for _ in range(100):
        node, key = spot(rng, state)
        if isinstance(node[key], torch.Tensor):
            return node, key
    raise NotHere


def load_state(path):
    with open(path, "rb") as file:
        return torch.load(file, weights_only=True)


def save_state(state, path):
    path.unlink()
    torch.save(state, path)


TENSORS = [*[odd_tensor] * 6, odd_tensors, odd_tensors, odd_entry, odd_entry, odd_entry,
           other_names, other_names, more_or_less, more_or_less, wrapped]


def header_value(rng, path):
    """An odd value in the header of a safetensors file, or another length of it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    if rng.random() < 0.2:
        length = rng.choice([0, 1, length - 1, length + 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1])
        replace(path, length.to_bytes(8, "little") + content[8:])
        return f"its header's length is {length}"
    node, key = spot(rng, header)
    if not isinstance(node[key], dict) and rng.random() < 0.4:
        node[key] = rng.choice(["F8_E4M3", "I8", [2 ** 40, 2 ** 40], [-1, 4], 2 ** 62, -4, [0, 0]])
    else:
        node[key] = rng.choice(ODD[:-2])
    text = json.dumps(header).encode()
    replace(path, len(text).to_bytes(8, "little") + text + content[8 + length:])
    return f"{key!r} in its header is {shown(node[key])}"


def picture_size(rng, path):
    """Another width and height in the header, with its checksum."""
    content = bytearray(path.read_bytes())
    width, height = rng.choice([(0, 0), (1, 65000), (65000, 1), (13000, 13000), (60000, 60000)])
    if content[:4] == b"\x89PNG":
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif content[:2] == b"BM":
        content[18:26] = struct.pack("<ii", width, height)
    elif content[:3] == b"GIF":
        content[6:10] = struct.pack("<HH", width, height)
    else:
        i = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
        if i < 0:
            raise NotHere
        content[i + 5:i + 9] = struct.pack(">HH", height, width)
    replace(path, content)
    return f"its header says {width} x {height}"


def real_size(rng, path):
    """A picture that is truly large or thin."""
    size = rng.choice([(1, 20000), (20000, 1), (9000, 9000), (13000, 13000), (1, 1)])
    path.unlink()
    Image.new(rng.choice(["1", "L", "RGB"]), size).save(path, "PNG")
    return f"{size[0]} x {size[1]} pixels"


def other_format(rng, path):
    """A file that makes a library start a program or read another file."""
    secret = Path("secret.mp4")
    shutil.copy("films/film.mp4", secret)
    kind, content = rng.choice([
        ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
        ("an HLS list", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n"
         + str(secret.resolve()).encode() + b"\n#EXT-X-ENDLIST\n"),
        ("a concat list", b"ffconcat version 1.0\nfile secret.mp4\n"),
        ("a DASH list", b'<?xml version="1.0"?><MPD type="static" mediaPresentationDuration="PT9S">'
         b'<Period><AdaptationSet mimeType="video/mp4"><Representation id="0" bandwidth="1">'
         b"<BaseURL>secret.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>"),
        ("an SDP", b"v=0\nm=video 5004 RTP/AVP 96\nc=IN IP4 127.0.0.1\na=rtpmap:96 H264/90000\n"),
        ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="secret.mp4"/></svg>')])
    replace(path, content)
    return f"{kind} under its name"


MUST[other_format] = ()


def odd_array(rng, path):
    """An .npz with another array, or none."""
    ones = np.ones((10, 32), np.float16)
    name, arrays = rng.choice(list({
        "no features": {"x": ones}, "one axis": {"features": ones[0]},
        "three axes": {"features": ones[None]}, "no frames": {"features": ones[:0]},
        "no channels": {"features": ones[:, :0]}, "of 16 channels": {"features": ones[:, :16]},
        "whole numbers": {"features": ones.astype(int)}, "bool": {"features": ones > 0},
        "complex": {"features": ones.astype(complex)}, "text": {"features": np.array(["x"])},
        "an object": {"features": np.array([None, {}], object)},
        "NaN": {"features": ones * np.nan}, "infinite": {"features": ones * np.inf},
        "beyond float16": {"features": ones.astype(np.float32) * 1e30},
        "big-endian": {"features": ones.astype(">f4")}, "a number": {"features": np.float32(1)},
        "300,000 frames": {"features": np.ones((300000, 32), np.float16)}}.items()))
    path.unlink()
    np.savez(path, **arrays)
    return name


def npy_header(rng, path):
    """A header that promises another shape or kind."""
    shape, kind = rng.choice([
        ("(40000000, 32)", "<f2"), ("(10, 33)", "<f2"), ("(-10, -32)", "<f2"), ("(10, 32)", "|O"),
        ("(10,)", "<f2"), ("(2**99, 1)", "<f2"), ("__import__('os')", "<f2"), ("(10, 32)", "zz")])
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(640)
    path.unlink()
    with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        file.writestr("features.npy", content)
    return f"its header says {shape} of {kind}"


def inflated(rng, path):
    """An archive that becomes very large."""
    path.unlink()
    os.link("bomb.npz", path)
    return "5.8 GB of zeros when unpacked"


def odd_rows(rng, path):
    """An index whose rows are odd, doubled or beyond the file."""
    index = json.loads(path.read_text())
    names = list(index["pictures"])
    change = rng.choice([99999, -1, 10 ** 30, 1.0, 1.5, "1", None, True, [1], "twice", "fewer",
                         "more", "channels", "tokens", "encoder", "files"])
    if change == "twice":
        index["pictures"][names[0]] = index["pictures"][names[1]]
    elif change == "fewer":
        del index["pictures"][names[-1]]
    elif change == "more":
        index["pictures"]["more"] = len(names)
    elif change in ("channels", "tokens", "encoder", "files"):
        index[change] = rng.choice(ODD[:-2])
    else:
        index["pictures"][rng.choice(names)] = change
    replace(path, json.dumps(index).encode())
    return f"rows: {change}"


def odd_numbers(rng, path):
    """NaN or infinity in a file of float16."""
    content = bytearray(path.read_bytes())
    bits = rng.choice([b"\xff\x7f", b"\x00\x7c", b"\x00\xfc"])
    if rng.random() < 0.5:
        content[:] = bits * (len(content) // 2)
        said = "all of it"
    else:
        i = 2 * rng.randrange(len(content) // 2)
        content[i:i + 2] = bits
        said = f"number {i // 2}"
    replace(path, content)
    return f"{said} is {np.frombuffer(bits, np.float16)[0]}"


def odd_line(rng, path):
    line = rng.choice([b"5", b"{}", b"\xff\xfe", b"[]", b"null", b'{"step": 3}', b'{"epoch": 1}',
                       b'{"step": "x", "epoch": 1, "scores": {}}', b'{"scores": 5, "epoch": 1}',
                       b'{"step": 1, "epoch": null, "scores": {"vqa": {}}}', b"{", b"\0",
                       b'{"step": 1, "epoch": 1, "scores": {"vqa": {"x": "y"}, "gqa": {"x": 1}}}',
                       b'{"step": 1, "epoch": [], "scores": {"vqa": {"x": 1}, "gqa": {"x": 1}}}',
                       b"[" * 10 ** 5, b'{"id": 5, "answer": 5}', b'{"id": [], "answer": "x"}'])
    lines = path.read_bytes().split(b"\n")
    i = rng.randrange(len(lines))
    replace(path, b"\n".join([*lines[:i], line, *lines[i:]]))
    return f"line {i + 1} is {shown(line)}"


def vocabulary_line(rng, path):
    lines = path.read_bytes().split(b"\n")
    i = rng.randrange(len(lines))
    line = rng.choice([b"", b"a", b"a b c", b"\xff \xfe", b" ", b"a  b", b"zz qq", b"x" * 10 ** 6,
                       b"#version: 9", lines[i // 2], "é ü".encode(), b"a b\r"])
    lines[i] = line
    replace(path, b"\n".join(lines))
    return f"line {i + 1} is {shown(line)}"


# ---- gates: what reads a mutated file ----


def read_task(task: str, run: str, top: str = "datasets"):
    """As train.py and evaluate.py do: open, check, batch, score, write."""
    row = TASKS[task]
    _, tokenizer, features, _ = OPENED[run]
    learned, asked = evaluate.open_corpora(
        Path(top), "RN-mini", features, tokenizer, {task: row.train}, {task: row.validation},
        say=no_words)
    seen = data.read_examples(top, task, row.train)
    for split in dict.fromkeys((row.validation, row.test)):
        examples = data.read_examples(top, task, split)
        data.check_labels(task, examples)
        said = evaluate.blind_answers(seen, examples)
        for value in evaluate.score(task, examples, said).values():
            assert math.isfinite(value), f"a score is {value}"
        rows = [{"id": e.id, "question": e.text, "answer": a, "truth": e.truth}
                for e, a in zip(examples, said)]
        "".join(json.dumps(row) + evaluate.card(row, []) for row in rows).encode()
        evaluate.METRICS[row.metric].write(examples, said)
    for corpus in learned[task], asked[task]:
        count = min(8, len(corpus))
        batch = corpus.batch(np.arange(count), count, seed="1")
        assert all(batch[name].isfinite().all() for name in ("features", "weights")), "not finite"


def read_submission(task: str, split: str):
    examples = data.read_examples("datasets", task, split)
    evaluate.METRICS[TASKS[task].metric].write(examples, ["x"] * len(examples)).encode()


def see_picture(path: str):
    pixels = data.load_picture(Path(path), 224)
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
    evaluate.thumbnails(Path(path), False)


def see_video(path: str):
    frames = data.load_video(Path(path), 32)
    assert frames.ndim == 4 and frames.shape[1:] == (32, 32, 3) and frames.dtype == np.uint8


def read_backbone(folder: str, run: str):
    _, tokenizer, features, _ = OPENED[run]
    try_model(evaluate.load_backbone(Path(folder), features.channels, len(tokenizer)), tokenizer)


def try_model(model, tokenizer):
    assert all(x.isfinite().all() for x in model.state_dict().values()), "weights not finite"
    ids = torch.tensor([tokenizer.encode("What color is it?")])
    with torch.no_grad():
        assert model.loss(ids, None, ids[:, :4]).isfinite(), "the loss is not finite"
        tokenizer.decode(model.answer(ids, None, beams=3)[0].tolist())


def read_config(run: str):
    """A backbone's config.json, as a run opens it."""
    run = evaluate.Run.read(Path("runs", run))
    model, tokenizer, _, _ = evaluate.open_run(run, run.hashes(), torch.device("cpu"))
    evaluate.select(model, run.tasks[0])
    try_model(model, tokenizer)


def read_clip(path: str):
    encoder = model_py.load_clip(Path(path))
    with torch.no_grad():
        grid = encoder.encode_images(torch.zeros(1, 224, 224, 3, dtype=torch.uint8))
    assert grid.isfinite().all(), "its features are not finite"


def read_vocabulary(folder: str):
    tokenizer = evaluate.load_tokenizer(Path(folder), ["<extra_id_0>"])
    for text in "What color are the 2 circles?", "Ünï ☃\ud800 \0 \n<mask>", "", "x" * 300:
        ids = tokenizer.encode(text)
        assert all(0 <= i < len(tokenizer) for i in ids), "an id beyond the vocabulary"
        tokenizer.decode(ids)


def read_adapters(run: str, path: str):
    model, *_ = OPENED[run]
    adapters.load(model, Path(path))
    assert all(x.isfinite().all() for x in model.state_dict().values()), "weights not finite"


def command(*argv: str):
    """A command's main(), in this process."""
    sys.argv = list(argv)
    module = {"train.py": train, "evaluate.py": evaluate, "data.py": data}[argv[0]]
    problems = () if argv[0] == "data.py" else evaluate.PROBLEMS
    data.report_problems(module.main, *problems)


def no_words(*_):
    pass


# ---- what is mutated, and how it is read ----


@dataclass
class Input:
    name: str
    kind: str
    file: str  # that is mutated, below the world; "" for flags
    gate: object
    mutations: list
    names: tuple = ()  # one of them must be in a message
    argv: list | None = None  # of the gate, where it is a command
    real: bool = False  # the command is started
    said: str = ""  # what was mutated
    must: bool = False  # it may not be taken
    words: tuple = ()  # one of them must be in a message
    absent: bool = False  # the message may name what else could stand in its place
    environment: dict = field(default_factory=dict)


EVALUATE = ["evaluate.py", "runs/pictures", "--device", "cpu"]
GO_ON = ["train.py", "--resume", "runs/pictures", "--device", "cpu"]
ANNOTATIONS = {  # task: files
    "vqa": ["vqa/v2_*_train2014_*.json", "vqa/v2_*_val2014_*.json", "COCO/dataset_coco.json"],
    "gqa": ["GQA/train_balanced*", "GQA/val_balanced*", "GQA/testdev*"],
    "nlvr": ["nlvr/train.json", "nlvr/dev.json", "nlvr/test1.json"],
    "caption": ["COCO/dataset_coco.json"],
    **{task: [f"video/ann/{task}/*_train*", f"video/ann/{task}/*_val*", f"video/ann/{videos}_sub*"]
       for task, videos in (("tvqa", "tv"), ("how2qa", "how2"), ("tvc", "tv"), ("yc2c", "yc2"))}}
SUBMISSIONS = [
    ("vqa", "test2015", "vqa/v2_OpenEnded_mscoco_test2015_questions.json"),
    ("gqa", "submission_all", "GQA/submission_all_questions.json"),
    ("caption", "test2014", "COCO/image_info_test2014.json"),
    ("caption", "val2014", "COCO/dataset_coco.json"),
    ("tvqa", "test_release", "video/ann/tvqa/tvqa_test_release.jsonl"),
    ("how2qa", "test_public_release", "video/ann/how2qa/how2qa_test_public_release.jsonl"),
    ("tvc", "test_release", "video/ann/tvc/tvc_test_release.jsonl")]
RUN_OF = {"vqa": "pictures", "gqa": "pictures", "nlvr": "pairs", "caption": "pairs"}


def choose(rng, world: Path, *patterns: str) -> str:
    found = [p for pattern in patterns for p in sorted(world.glob(pattern)) if p.is_file()]
    return str(rng.choice(found).relative_to(world))


def annotations(rng, world):
    task = rng.choice(list(ANNOTATIONS))
    mutations = [*JSON * 3, *BYTES, *PLACES]
    if rng.random() < 0.12:
        task, split, file = rng.choice(SUBMISSIONS)
        return f"datasets/{file}", mutations, partial(read_submission, task, split), {}
    run = RUN_OF.get(task, "videos")
    if rng.random() < 0.25 and task in ("vqa", "gqa", "nlvr"):
        file = choose(rng, world, f"vlt5/{task if task != 'gqa' else 'GQA'}/*.json")
        return file, mutations, partial(read_task, task, run, "vlt5"), {}
    file = choose(rng, world, *(f"datasets/{pattern}" for pattern in ANNOTATIONS[task]))
    return file, mutations, partial(read_task, task, run), {}


def pictures(rng, world):
    file = choose(rng, world, "pictures/*")
    mutations = [*BYTES * 2, *PLACES, *[picture_size] * 4, *[real_size] * 2, other_format]
    return file, mutations, partial(see_picture, file), {}


def videos(rng, world):
    file = choose(rng, world, "films/film.*", "films/frames/00002.jpg")  # is read
    mutations = [*BYTES * 3, *PLACES, *[other_format] * 3]
    whole = "films/frames" if "frames" in file else file
    if "frames" in file:
        mutations = [*BYTES, *PLACES, picture_size, real_size]
    return file, mutations, partial(see_video, whole), {}


def released(rng, world):
    file = choose(rng, world, "released/video/vis_features/yc2/clip-vit/*.npz")
    mutations = [*BYTES, *PLACES, *[odd_array] * 12, *[npy_header] * 6, inflated]
    if rng.random() < 0.4:
        gate = ["train.py", *train_command("--tasks", "yc2c", "--data", "released", "--vision",
                                           "clip-vit", "--batch", "8")[1:]]
        return file, mutations, None, {"argv": gate, "also": remove_released_store}
    return file, mutations, partial(data.load_features, Path(file)), {}


def remove_released_store():
    shutil.rmtree("released/features", ignore_errors=True)


def stores(rng, world):
    folder = rng.choice(["COCO", "GQA"])
    name = rng.choice(["index.json", "index.json", "features.f16"])
    file = f"datasets/features/{folder}/RN-mini/{name}"
    mutations = [*JSON, *BYTES, *PLACES, *[odd_rows] * 16]
    if file.endswith("f16"):
        mutations = [*BYTES, *PLACES, *[odd_numbers] * 6]
    argv = [*EVALUATE, "--tasks", "vqa" if folder == "COCO" else "gqa"]
    return file, mutations, None, {"argv": argv, "names": ("index.json", "features.f16")}


def weights(rng, world):
    folder, run = rng.choice([("bart-mini", "pictures"), ("bart-old", "pictures"),
                              ("bart-safe", "pictures"), ("t5-mini", "t5"), ("clip", ""),
                              ("clip-bin", "")])
    if folder.startswith("clip"):
        file = "weights/RN-mini.pt" if folder == "clip" else "weights/clip-bin/RN-mini.pt"
        mutations = [*BYTES * 2, *PLACES, *(TENSORS if folder == "clip-bin" else [])]
        return file, mutations, partial(read_clip, file), {}
    file = f"weights/{folder}/pytorch_model.bin"
    mutations = [*BYTES, *PLACES, *TENSORS * 2]
    if folder == "bart-safe":
        file = f"weights/{folder}/model.safetensors"
        mutations = [*BYTES, *PLACES, *[header_value] * 20]
    return file, mutations, partial(read_backbone, f"weights/{folder}", run), {}


def vocabularies(rng, world):
    file = rng.choice(["bart-mini/vocab.json", "bart-mini/merges.txt", "t5-mini/spiece.model",
                       "bart-json/tokenizer.json"])
    mutations = [*BYTES * 2, *PLACES]
    if file.endswith("json"):
        mutations += JSON * 2
    if file.endswith("txt"):
        mutations += [vocabulary_line] * 12
    path = Path("weights", file)
    names = (path.name,) if file != "bart-json/tokenizer.json" else ("tokenizer.json", "vocab.json")
    return str(path), mutations, partial(read_vocabulary, str(path.parent)), {"names": names}


def configs(rng, world):
    folder, run = rng.choice([("bart-mini", "pictures"), ("t5-mini", "t5")])
    file = f"weights/{folder}/config.json"
    mutations = [*JSON * 3, *[config_field] * 30, *BYTES, *PLACES]
    more = {}
    if rng.random() < 0.3:
        file = f"weights/{folder}/generation_config.json"
        more = {"also": partial(write_generation_config, file)}
    return file, mutations, partial(read_config, run), more


def write_generation_config(file):
    write_json(Path(file), {
        "eos_token_id": 2 if "bart" in file else 1, "no_repeat_ngram_size": 3,
        "length_penalty": 1.0, "early_stopping": True, "forced_bos_token_id": None,
        "transformers_version": "4.57.6"})


def config_field(rng, path):
    """A field of the config as the real ones have them, of another value."""
    config = json.loads(path.read_text())
    name = rng.choice([
        *config, "forced_bos_token_id", "length_penalty", "early_stopping", "layer_norm_epsilon",
        "num_decoder_layers", "relative_attention_max_distance", "scale_embedding", "torch_dtype",
        "activation_function", "tie_word_embeddings", "feed_forward_proj", "dropout", "num_beams"])
    config[name] = rng.choice([*ODD, 30000, 3, 7, 10 ** 9, [2], [2, 3], [], "gelu", -0.5, 1e-400])
    replace(path, b"")
    write_tree(path, config, False)
    return f"{name} is {shown(config[name])}"


def runs(rng, world):
    name = rng.choice(["config.json", "config.json", "log.jsonl", "last.pt", "last.pt", "best.pt",
                       "predictions"])
    file = f"runs/pictures/{name}"
    mutations = [*BYTES, *PLACES]
    more = {"argv": GO_ON}
    if name == "config.json":
        mutations += JSON * 4
        more["argv"] = rng.choice([GO_ON, [*EVALUATE, "--tasks", "gqa"],
                                   [*EVALUATE, "--blind"]])
    elif name == "log.jsonl":
        mutations += [*JSON, *[odd_line] * 12]
    elif name.endswith(".pt"):
        mutations += TENSORS * 3
        if name == "best.pt":
            more["argv"] = [*EVALUATE, "--tasks", "gqa"]
        elif rng.random() < 0.7:
            more["also"] = partial(edit_flags, epochs=2)
    else:
        file = "runs/pictures/predictions_gqa_validation.jsonl"
        mutations += [*JSON, *[odd_line] * 8]
        more["argv"] = [*EVALUATE, "--tasks", "gqa", "--predictions", file]
    return file, mutations, None, more


def edit_flags(**flags):
    path = Path("runs/pictures/config.json")
    content = json.loads(path.read_text())
    content["flags"].update(flags)
    write_json(path, content)


def caches(rng, world):
    """Files beside the stores that the product made for itself; none, where it makes none."""
    made = [str(p.relative_to(world)) for p in sorted((world / "datasets/features").rglob("*"))
            if p.is_file() and p.name not in ("index.json", "features.f16")]
    if not made:
        raise NotHere
    file = rng.choice(made)
    mutations = [*BYTES, *PLACES, *(JSON if file.endswith("json") else [])]
    argv = train_command("--tasks", "vqa,gqa", "--batch", "32")
    if "video" in file or any(f"/{name}" in file for name in ("tv", "how2", "yc2")):
        argv = train_command("--tasks", "tvqa,how2qa,tvc,yc2c", "--batch", "8")
    return file, mutations, None, {"argv": argv}


ODD_ARGUMENTS = [
    "", " ", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "9" * 40, "x", "é☃", "\udcff", "None",
    "/dev/null", "/dev/zero", "/dev/null/x", "/proc/x", ".", "..", "a" * 5000, "[]", "{}", ",", "=",
    "a,b", "k=v", "vqa,vqa", "gqa,tvqa", "vqa,", "a b", "pipe", "nowhere", "reduction=0",
    "rank=1e9", "reduction=-1", "n=3", "reduction=null", "length=9999999", "d_model=5", "adapter",
    "+", "meta", "adapter+lora", "adapter+adapter", "lora+lora", "half", "multiple", "cuda:9",
    "cuda", "cpu:5", "mps", "encoder", "decoder.ffn", "encoder.x", "1000000", "100000000000",
    "RN-mini", "bart-mini", "weights", "datasets", "runs/pictures", "pictures/rgb.jpg",
    "films/film.mp4"]
TRAIN_FLAGS = ["method", "tasks", "sharing", "sites", "sizes", "data", "weights", "backbone",
               "vision", "batch", "accumulate", "lr", "seed", "out", "device", "cache"]
EVALUATE_FLAGS = ["tasks", "split", "data", "weights", "weights-of", "batch", "device", "cache",
                  "predictions", "submit", "image", "video", "question", "choices", "subtitles"]
PATH_FLAGS = ["data", "weights", "out", "cache", "predictions", "submit", "image", "video"]
VARIABLES = ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"]


def lines(rng, world):
    """A command with an odd flag, two, or an odd variable."""
    value = rng.choice(ODD_ARGUMENTS)
    what = rng.random()
    if what < 0.08:
        name = rng.choice(VARIABLES)
        environment = {name: rng.choice(["", "2", "x", "-1", "0", "99999999999"])}
        more = {"argv": train_command("--tasks", "gqa", "--batch", "32"), "names": VARIABLES}
        return "", [], None, more | {"environment": environment, "said": f"variables {environment}"}
    if what < 0.55:
        name = rng.choice(TRAIN_FLAGS)
        method = rng.choice(["adapter", "adapter", "lora", "compacter", "prompt", "hyperformer"])
        argv = train_command("--tasks", "gqa", "--batch", "32", "--method", method)
    elif what < 0.9:
        name = rng.choice(EVALUATE_FLAGS)
        argv = [*EVALUATE, "--tasks", "gqa"]
        if name in ("question", "choices", "subtitles"):
            argv += ["--image", "pictures/rgb.jpg"]
        if name in ("image", "video") and rng.random() < 0.8:
            argv += ["--question", "What is it?"]
    else:
        name = rng.choice(["data", "tasks"])
        argv = ["data.py", "--data", "datasets", "--tasks", "gqa"]
    argv = [*argv, rng.choice([f"--{name}={value}", f"--{name}={value}", f"--{name}"])]
    if not argv[-1].endswith(f"={value}"):
        argv += [value]
    names = ("",)  # of a flag that is no path any sentence will do
    if name in PATH_FLAGS:
        names = (name, value.strip()[:40] or name, repr(value)[1:-1], "--")
    said = f"{argv[0]} ... {shown(' '.join(argv[-2:]))}"
    return "", [], None, {"argv": argv, "names": names, "also": partial(os.mkfifo, "pipe"),
                          "said": said}


def commands(rng, world):
    """An input of another kind, read by a command that is started."""
    task = rng.choice(list(ANNOTATIONS))
    draw = rng.choice([annotations, stores, runs, lines, weights, configs, vocabularies])
    if draw is annotations:
        file = choose(rng, world, *(f"datasets/{pattern}" for pattern in ANNOTATIONS[task]))
        batch = "8" if task in ("tvqa", "how2qa", "tvc", "yc2c") else "32"
        argv = train_command("--tasks", task, "--batch", batch)
        if rng.random() < 0.3:
            argv = ["data.py", "--data", "datasets", "--tasks", task]
        return file, [*JSON * 3, *BYTES, *PLACES], None, {"argv": argv}
    file, mutations, gate, more = draw(rng, world)
    if "argv" not in more:
        where = Path(file).parent.name
        backbone = where if where.startswith(("bart", "t5")) else "bart-mini"
        if "clip" in where:
            raise NotHere
        more["argv"] = train_command("--tasks", "gqa", "--batch", "32", "--backbone", backbone)
    return file, mutations, None, more


KINDS = {  # name: how it is drawn, share of the inputs
    "JSON": (annotations, 30), "pictures": (pictures, 10), "videos": (videos, 8),
    "features": (released, 6), "stores": (stores, 8), "weights": (weights, 12),
    "vocabularies": (vocabularies, 8), "configs": (configs, 7), "runs": (runs, 12),
    "caches": (caches, 4), "lines": (lines, 12), "commands": (commands, 5)}


def draw(seed: int, name: str, kind: str, world: Path) -> Input | None:
    """The input of a name: the same for a seed, whatever else is drawn."""
    rng = random.Random(f"{seed} {name}")
    for _ in range(50):
        try:
            file, mutations, gate, more = KINDS[kind][0](rng, world)
        except NotHere:
            continue
        more = dict(more)
        also = more.pop("also", None)
        names = tuple(more.pop("names", ())) or (Path(file).name,)
        one = Input(name, kind, file, gate, mutations, names, real=kind == "commands", **more)
        one.prepare = partial(mutate, one, rng, also)
        return one
    return None


def mutate(one: Input, rng: random.Random, also):
    """In the copy of the world, which is the current folder."""
    if also:
        also()
    for _ in range(50 if one.mutations else 0):
        chosen = rng.choice(one.mutations)
        try:
            one.said = chosen(rng, Path(one.file))
        except NotHere:
            continue
        except (ValueError, OSError, IndexError, RuntimeError):
            if not Path(one.file).exists():
                raise
            continue
        kept = one.file.endswith(("log.jsonl",)) or one.kind == "caches"
        one.absent = chosen in ABSENT
        one.must = chosen in MUST and not kept
        one.words = MUST.get(chosen, ()) if not kept else ()
        break


# ---- hostile weight files ----


class Calls:
    """A pickle of it calls a function when it is loaded."""
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_files(canary: str) -> dict[str, bytes]:
    touch = f"touch {canary}"
    python = f"open({canary!r}, 'w').close()"
    payloads = {
        "os.system": Calls(os.system, touch), "eval": Calls(eval, python),
        "exec": Calls(exec, python), "Popen": Calls(subprocess.Popen, ["touch", canary]),
        "a chain": Calls(operator.methodcaller("system", touch),
                         Calls(importlib.import_module, "os")),
        "open": Calls(open, canary, "w"), "torch.save": Calls(torch.save, 1, canary),
        "runpy": Calls(exec, f"import os; os.system({touch!r})"),
        "an import": Calls(__import__, "antigravity")}
    files = {}
    for name, payload in payloads.items():
        try:
            state = {"weights": {"x": payload}, "visual.conv1.weight": payload}
            files[f"{name}, old form"] = pickle.dumps(state)
            buffer = io.BytesIO()
            torch.save(state, buffer)
            files[f"{name}, archive"] = buffer.getvalue()
            again = io.BytesIO()
            with zipfile.ZipFile(again, "w") as file:  # as TorchScript's
                file.writestr("x/constants.pkl", pickle.dumps(()))
                file.writestr("x/data.pkl", pickle.dumps(state, 2))
                file.writestr("x/version", "3\n")
            files[f"{name}, TorchScript's pickle"] = again.getvalue()
        except (pickle.PicklingError, AttributeError, TypeError):
            continue
    files["GLOBAL posix system"] = b"cposix\nsystem\n(S'" + touch.encode() + b"'\ntR."
    files["INST os system"] = b"(S'" + touch.encode() + b"'\nios\nsystem\n."
    files["TorchScript's code"] = scripted(canary)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("../" * 20 + canary.lstrip("/"), "x")
        file.writestr("x/data.pkl", pickle.dumps({}))
    files["a path out of its archive"] = buffer.getvalue()
    return files


def scripted(canary: str) -> bytes:
    """A module whose code writes a file when it is loaded."""
    source = f"""
import torch
from typing import Tuple
class Hostile(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.zeros(1)
    @torch.jit.export
    def __getstate__(self):
        return (self.x, self.training)
    @torch.jit.export
    def __setstate__(self, state: Tuple[torch.Tensor, bool]):
        self.x = state[0]
        self.training = state[1]
        torch.save(state[0], {canary!r})
    def forward(self, x):
        return x
"""
    path = Path("hostile_module.py")
    path.write_text(source)
    sys.path.insert(0, str(path.parent.resolve()))
    import hostile_module
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(hostile_module.Hostile()), buffer)
    return buffer.getvalue()


# ---- one input ----

STARTS = ("os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "os.spawn", "os.fork",
          "os.startfile", "pty.spawn", "socket.connect", "webbrowser.open")
PYTHON = re.compile(
    r"Traceback|\w(Error|Exception|Warning)\(|<class|object at 0x|'NoneType'|has no attribute|"
    r"object is not|not supported between|unexpected keyword|index out of range|unhashable|"
    r"must be (str|real|an int|a str|bytes)|positional argument|not iterable|invalid literal|"
    r"dictionary update|could not convert|unpack|can only concatenate|weights_only|KeyError")
WARNED = re.compile(r"\w*Warning: |^\[\w[\w,]*( @ 0x\w+)?\] |libpng|Corrupt JPEG", re.M)


def child(one: Input, folder: Path):
    """Mutates, reads, and writes what came of it into ../outcome.json."""
    outcome = {"end": "broken", "said": "?"}
    write_json(folder.parent / "outcome.json", outcome)
    started = []
    try:
        os.setsid()
        said = os.open(folder.parent / "said", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(folder)
        with warnings.catch_warnings():  # of the libraries that mutate
            warnings.simplefilter("ignore")
            one.prepare()
        outcome |= {"said": one.said, "must": one.must, "words": one.words,
                    "absent": one.absent}
        write_json(folder.parent / "outcome.json", outcome | {"end": "killed"})
        if one.real:
            os._exit(0)
        os.environ.update(one.environment)
        warm_threads()
        own = address_space()
        resource.setrlimit(resource.RLIMIT_AS, (own + 9 * 10 ** 9,) * 2)

        def watch(event, arguments):
            if event in STARTS and "git" not in str(arguments):
                started.append(f"{event} {str(arguments)[:80]}")

        sys.addaudithook(watch)
        outcome |= attempt(one)
    except BaseException:  # of the mutation
        outcome["text"] = traceback.format_exc()
    outcome["started"] = started
    write_json(folder.parent / "outcome.json", outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def warm_threads():
    """A fork leaves torch's pool of threads broken; asking twice makes a new one."""
    for _ in range(3):
        try:
            torch.set_num_threads(1)
        except RuntimeError:
            continue


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def attempt(one: Input) -> dict:
    try:
        command(*one.argv) if one.argv else one.gate()
        return {"end": "taken"}
    except SystemExit as end:
        return {"end": "taken" if not end.code else "refused" if end.code == 2
                else f"exit code {end.code}"}
    except (*evaluate.PROBLEMS, data.DataError) as problem:
        return {"end": "refused", "text": str(problem)}
    except MemoryError:
        return {"end": "memory", "text": traceback.format_exc()}
    except AssertionError as problem:
        return {"end": "silent", "text": str(problem)}
    except OSError as problem:
        return {"end": "refused", "text": str(problem)}
    except BaseException:
        text = traceback.format_exc()
        full = "can't allocate memory" in text or "Cannot allocate memory" in text
        return {"end": "memory" if full else "traceback", "text": text}


def judge(one: Input, outcome: dict, status: int, peak: float, hung: bool, said: str) -> tuple:
    """(refused or taken or "", what is wrong or "", its column)."""
    end = outcome["end"]
    text = outcome.get("text", "")
    if end == "broken":
        return "", f"the mutation failed: {text[-300:]}", "broken"
    if hung:
        return "", "no end", "hangs"
    if peak > GIGABYTES or end == "memory":
        return "", f"{peak:.1f} GB {' '.join(text.split())[-150:]}", "over 4 GB"
    if status < 0 or end == "killed":
        return "", f"signal {-status}", "tracebacks"
    if "Traceback (most recent call last)" in said:
        end, text = "traceback", said[said.rindex("Traceback"):]
    if end == "traceback":
        calls = re.findall(r'File ".*?(\w+\.py)", line (\d+)', text)
        where = ":".join(next((c for c in reversed(calls) if (ROOT / c[0]).exists()), ("", "")))
        return "", f"{where} {text.strip().splitlines()[-1][:160]}", "tracebacks"
    if end.startswith("exit code"):
        return "", f"{end} {said[-200:]}", "tracebacks"
    if outcome.get("started"):
        return "", f"started {outcome['started'][0]}", "started"
    if end == "silent":
        return "taken", f"taken, but {text}", "odd words"
    if warned := WARNED.search(said):
        return "", f"a warning: {said[warned.start():][:150]!r}", "odd words"
    if end == "taken":
        if outcome.get("must"):
            return "taken", "taken, but should be refused", "odd words"
        return "taken", "", ""

    # Refused: is it one sentence that names the file?
    if one.argv and not text:
        *_, text = said.replace("\r", "\n").rpartition("error: ")
        text = text.strip()
        if one.argv[0] == "data.py" and "error: " not in said:
            text = " ".join(said.split())
    if "\n" in text:
        return "refused", f"several lines: {text[:200]!r}", "odd words"
    if odd := PYTHON.search(text):
        return "refused", f"Python's words, {odd[0]!r}: {text[:200]}", "odd words"
    if len(text) > 700 and one.file and "data.py" not in (one.argv or ()):
        return "refused", f"{len(text)} characters: {text[:200]}", "odd words"
    missing = "missing below" in text and one.kind in ("JSON", "commands", "caches")
    stem = Path(one.file).stem
    missing |= outcome.get("absent", False) and ("missing" in text or f" {stem} " in text)
    if not any(name in text for name in one.names) and not missing:
        return "refused", f"without the file: {text[:200]}", "without file"
    words = outcome.get("words", ())
    if words and not any(word in text for word in words):
        return "refused", f"does not say {words[0]}: {text[:200]}", "odd words"
    return "refused", "", ""


class Job:
    """A forked child with its copy of the world."""

    def __init__(self, one: Input, world: Path, work: Path, seconds: float):
        self.one = one
        self.top = work / one.name
        shutil.rmtree(self.top, ignore_errors=True)
        copy_world(world, self.top / "in/here")
        sys.stdout.flush()
        self.began = time.monotonic()
        self.seconds = seconds
        self.hung = False
        self.pid = os.fork()
        if not self.pid:
            child(one, self.top / "in/here")

    def ended(self) -> tuple | None:
        """(verdict, fault, column), when it has ended."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if not pid:
            if time.monotonic() - self.began > self.seconds and not self.hung:
                self.hung = True
                os.killpg(self.pid, signal.SIGKILL)
            return None
        outcome = json.loads((self.top / "in/outcome.json").read_text())
        self.one.said = outcome["said"] or self.one.said
        said = (self.top / "in/said").read_bytes().decode("utf-8", "replace")
        code = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss / 1e6
        if self.one.real and outcome["end"] != "broken":
            outcome, code, peak, said = self.start(outcome)
        self.output = said + outcome.get("text", "")
        return judge(self.one, outcome, code, peak, self.hung, said)

    def start(self, outcome) -> tuple:
        """The command itself, which waits for its end."""
        argv = self.one.argv
        with open(self.top / "said", "w+b") as said:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / argv[0]), *argv[1:]], cwd=self.top / "in/here",
                env=ENVIRONMENT | self.one.environment, stdin=subprocess.DEVNULL, stdout=said,
                stderr=said, start_new_session=True)
            began = time.monotonic()
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                if time.monotonic() - began > 2 * self.seconds and not self.hung:
                    self.hung = True
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(0.02)
            said.seek(0)
            text = said.read().decode("utf-8", "replace")
        process.returncode = code = os.waitstatus_to_exitcode(status)
        end = {0: "taken", 2: "refused"}.get(code, f"exit code {code}")
        return outcome | {"end": end}, code if code < 0 else 0, usage.ru_maxrss / 1e6, text


# ---- all of them ----


def hostile(work: Path) -> list[Input]:
    """Every hostile file through every loader."""
    canary = str((work / "canary").resolve())
    here = os.getcwd()
    os.chdir(work)
    files = hostile_files(canary)
    os.chdir(here)
    gates = {
        "weights/bart-mini/pytorch_model.bin": partial(
            read_backbone, "weights/bart-mini", "pictures"),
        "weights/RN-mini.pt": partial(read_clip, "weights/RN-mini.pt"),
        "runs/pictures/best.pt": partial(read_adapters, "pictures", "runs/pictures/best.pt")}
    inputs = []
    for name, content in files.items():
        for file, gate in gates.items():
            one = Input(f"hostile-{len(inputs)}", "hostile", file, gate, [], (Path(file).name,))
            one.said = name
            one.prepare = partial(put_hostile, one, content)
            inputs.append(one)
    return inputs


def put_hostile(one: Input, content: bytes):
    replace(Path(one.file), content)
    one.must = True


def planned(args, world: Path, work: Path) -> list[Input]:
    kinds = [kind for kind in KINDS if args.only in (None, kind)]
    total = sum(KINDS[kind][1] for kind in kinds)
    inputs = []
    for kind in kinds:
        for number in range(-(-args.count * KINDS[kind][1] // total)):
            if one := draw(args.seed, f"{kind}-{number}", kind, world):
                inputs.append(one)
    if args.only in (None, "hostile"):
        inputs += hostile(work)
    return [one for one in inputs if args.input in (None, one.name)]


def main():
    parser = argparse.ArgumentParser(description="Tries mutated inputs.", allow_abbrev=False)
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--count", type=int, default=900, help="inputs, without the hostile ones (default: 900)")
    add("--jobs", type=int, default=1, help="at a time (default: 1)")
    add("--only", choices=(*KINDS, "hostile"), help="one kind")
    add("--keep", type=Path, metavar="DIR", help="the world, and copies that went wrong")
    add("--seconds", type=float, default=60, help="a try may take (default: 60)")
    add("--all", action="store_true", help="a line also for each that was right")
    add("--input", metavar="KIND-N", help="only this; shows all that it said")
    args = parser.parse_args()

    work = (args.keep or Path(tempfile.mkdtemp(prefix="campaign-"))).resolve()
    world = work / "world"
    if not world.exists():
        print("drawing the tiny world", flush=True)
        unfinished = work / "world.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        draw_world(unfinished)
        unfinished.rename(world)
    open_world(world)
    inputs = planned(args, world, work)
    counts = defaultdict(Counter)
    try:
        wrong = run_all(inputs, world, work, args, counts)
    finally:
        if not args.keep:
            shutil.rmtree(work)
    print_table(counts)
    sys.exit(bool(wrong))


def open_world(world: Path):
    """What the forked children share: models, tokenizers, CLIP."""
    here = os.getcwd()
    os.chdir(world)
    for name in RUNS:
        run = evaluate.Run.read(Path("runs", name))
        OPENED[name] = evaluate.open_run(run, run.hashes(), torch.device("cpu"))
    os.chdir(here)


def run_all(inputs: list[Input], world: Path, work: Path, args, counts) -> int:
    canary = work / "canary"
    waiting = list(reversed(inputs))
    running = []
    wrong = 0
    while waiting or running:
        while waiting and len(running) < args.jobs:
            running.append(Job(waiting.pop(), world, work, args.seconds))
        time.sleep(0.002)
        for job in list(running):
            result = job.ended()
            if result is None:
                continue
            running.remove(job)
            one = job.one
            verdict, fault, column = result
            if canary.exists():
                canary.unlink()
                fault, column = "it was run", "started"
            row = counts[one.kind]
            row["inputs"] += 1
            row[verdict] += 1
            row[column] += bool(fault)
            wrong += bool(fault)
            if fault or args.all:
                line = (f"{'WRONG' if fault else 'right'} {one.name}: {one.file or 'flags'}: "
                        f"{one.said}: {fault or verdict}")
                print(line.encode("utf-8", "backslashreplace").decode(), flush=True)
            if args.input:
                print(f"{one.file} {one.said} {one.argv}: {result}\n{job.output}")
            if fault and args.keep:
                shutil.rmtree(work / "wrong" / job.top.name, ignore_errors=True)
                shutil.move(job.top, work / "wrong" / job.top.name)
            else:
                shutil.rmtree(job.top)
    return wrong


COLUMNS = ["inputs", "refused", "taken", "tracebacks", "hangs", "over 4 GB", "without file",
           "odd words", "started", "broken"]


def print_table(counts: dict):
    print(f"\n{'kind':<14}" + "".join(f"{name:>14}" for name in COLUMNS))
    together = Counter()
    for kind, row in [*counts.items(), ("together", together)]:
        print(f"{kind:<14}" + "".join(f"{row[name]:>14,}" for name in COLUMNS))
        together.update(row)


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

sys.path.insert(0, str(ROOT))
import numpy as np
import torch
from PIL import Image

import adapters
import data
import evaluate
import model as model_py
import toy
import train
from data import TASKS

OPENED = {}  # run: (model, tokenizer, features, filled)

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
