"""data.py: official files are read as their owners mean them; batches are what they should be."""

import doctest
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from contextlib import contextmanager
from dataclasses import astuple
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (FPS, TASKS, Corpus, DataError, Example, FeatureStore, batch_size, batches,
                  check_labels, choose_from, find_files, fit_frames, from_clip, is_released,
                  load_features, load_picture, load_video, mixture, open_corpora, read_examples,
                  released_features, resample, sample_answer, steps_per_epoch, text_ids,
                  vqa_vocabulary)
from tokenizer import BPE, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"


class Store:
    """A store whose picture in row i has the feature i."""
    def __init__(self, examples):
        names = dict.fromkeys(name for e in examples for name in e.pictures)
        self.row = {name: i for i, name in enumerate(names)}
        self.features = np.empty((len(names), 36, 4), np.float16)
        self.features[:] = np.arange(len(names))[:, None, None]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return BPE(tiny / "weights" / "bart-mini")


@pytest.fixture(scope="module")
def corpus(tiny, tokenizer):
    examples = read_examples(tiny / "datasets", "vqa", "karpathy_train")
    return Corpus("vqa", examples, tokenizer, Store(examples))


@pytest.fixture(scope="module")
def lottery(tokenizer):
    """64 questions with three answers to draw from."""
    answers = {"red": 0.3, "two": 0.6, "a circle": 0.9}
    examples = [Example(i, (f"{i % 9}",), "Is it? " * (i % 4), answers) for i in range(64)]
    return Corpus("vqa", examples, tokenizer, Store(examples))


@pytest.fixture
def world(tiny, tmp_path):
    """A copy of the data sets to spoil."""
    ignore = shutil.ignore_patterns("features")
    shutil.copytree(tiny / "datasets", tmp_path / "datasets", ignore=ignore)
    return tmp_path / "datasets"


def test_the_examples_in_docstrings_are_true():
    result = doctest.testmod(data)
    assert result.attempted > 0 and result.failed == 0


# ---- VQAv2 and GQA -------------------------------------------------------------------------------


def test_an_answer_given_nine_times_may_be_learned(tmp_path):
    said = {"Two kites.": 5, "2 kites": 4, "a dog": 8, "1,000": 9}
    assert vqa_vocabulary(Counter(said)) == {"2 kites", "1000"}


def test_what_the_list_names_may_be_learned(world):
    (world / "vqa/trainval_ans2label.json").write_text('{"": 0, "yes": 1}')
    learned = [e.answers for e in read_examples(world, "vqa", "karpathy_train")]
    assert set().union(*learned) == {"yes"}


def test_vqa_has_karpathys_parts_and_soft_scores(tiny):
    splits = {name: read_examples(tiny / "datasets", "vqa", name) for name in TASKS["vqa"].counts}
    assert {name: len(examples) for name, examples in splits.items()} == {
        "karpathy_train": 16 * 4, "karpathy_val": 6 * 4, "karpathy_test": 6 * 4, "test2015": 2 * 4}
    trained = splits["karpathy_train"]
    folders = {e.pictures[0].split("_")[1] for e in trained}
    assert folders == {"train2014", "val2014"}, "restval belongs to training"
    for example in trained:
        given = Counter(example.truth["answers"])
        for answer, weight in example.answers.items():
            assert weight == [0, 0.3, 0.6, 0.9, 1][min(4, given[answer])]
    assert any("yes" in e.answers for e in trained)


def test_gqa_joins_train_and_val(tiny):
    examples = read_examples(tiny / "datasets", "gqa", "train,val")
    assert len(examples) == (8 + 4) * 4
    assert len(read_examples(tiny / "datasets", "gqa", "testdev")) == 6 * 4
    one = examples[0]
    assert list(one.answers.values()) == [1.0]
    assert one.truth["answer"] in one.answers and one.kind == "directShape"


def test_gqa_takes_all_questions_where_there_are_all(tmp_path):
    question = {"imageId": "7", "question": "Is it?", "answer": "yes"}
    write(tmp_path / "GQA/testdev_balanced_questions.json", {"1": question})
    assert [e.id for e in read_examples(tmp_path, "gqa", "testdev_all")] == ["1"]
    write(tmp_path / "GQA/testdev_all_questions.json", {"1": question, "2": question})
    assert [e.id for e in read_examples(tmp_path, "gqa", "testdev_all")] == ["1", "2"]
    assert [e.id for e in read_examples(tmp_path, "gqa", "testdev")] == ["1"]


def test_gqa_pictures_may_be_visual_genomes(tmp_path):
    path = tmp_path / "VG" / "VG_100K_2" / "7.jpg"
    path.parent.mkdir(parents=True)
    path.touch()
    folders = [tmp_path / "GQA" / "images", tmp_path / "VG"]
    assert find_files(folders, ["7", "8"]) == {"7": path}


# ---- batches -------------------------------------------------------------------------------------


def test_a_batch_has_one_shape_and_says_what_was_asked(corpus, tokenizer):
    full = corpus.batch(np.arange(8), 8, seed=1)
    short = corpus.batch(np.arange(3), 8, seed=1)
    for x in full, short:
        tokens = x["ids"].flatten() != tokenizer.pad
        assert x.pop("text_indices").tolist() == tokens.nonzero()[:, 0].tolist()
        tokens = x["labels"].flatten() != -100
        assert x.pop("label_indices").tolist() == tokens.nonzero()[:, 0].tolist()
    assert all(x.shape == short[name].shape for name, x in full.items())
    longest = max(len(text_ids(tokenizer, "vqa", e)) for e in corpus.examples)
    assert full["ids"].shape == (8, longest)
    assert full["features"].shape == (8, 1, 36, 4)
    assert tokenizer.decode(full["ids"][0].tolist()) == "vqa: " + corpus.examples[0].text
    for row, e in zip(full["labels"].tolist(), corpus.examples):
        answer = tokenizer.decode([token for token in row if token != -100])
        assert answer in e.answers or (answer == "" and not e.answers)
    for features, e in zip(full["features"], corpus.examples):
        assert (features == corpus.store.row[e.pictures[0]]).all()


def test_rows_that_fill_up_do_not_count(lottery):
    """mean(weight x loss) over a filled batch is that over its real rows, whatever the losses."""
    short = lottery.batch(np.arange(3), 8, seed=1)
    real = lottery.batch(np.arange(3), 3, seed=1)
    losses = torch.rand(8)
    ours = (short["weights"] * losses).mean()
    assert torch.allclose(ours, (real["weights"] * losses[:3]).mean())


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("epoch, skip", [(0, 0), (2, 3)])
def test_batches_are_the_rows_that_a_naive_loop_takes(lottery, world, accumulate, epoch, skip):
    """Process r takes rows r, r + world accumulate, ...; its next part those from r + world on."""
    corpora = {"vqa": lottery, "gqa": lottery}
    sizes = {"vqa": 10 * accumulate, "gqa": int(5 / 3 * 10 * accumulate)}
    order = mixture(corpora, sizes, 3, epoch)
    step = epoch * len(order) + skip
    made = [list(batches(corpora, 10, 3, epoch, skip=skip, rank=rank, world=world,
                         accumulate=accumulate)) for rank in range(world)]
    assert all(len(process) == len(order) - skip for process in made)
    stride = world * accumulate
    for number, (task, indices) in enumerate(order[skip:]):
        size = sizes[task]
        while size % stride:
            size += 1
        whole = lottery.batch(indices, size, f"3 {step + number}")
        for rank in range(world):
            name, parts = made[rank][number]
            assert name == task and len(parts) == accumulate
            for i, part in enumerate(parts):
                rows = [row for row in range(size) if row % stride == rank + world * i]
                for key in "ids", "features", "labels", "weights":
                    assert torch.equal(part[key], whole[key][rows])


def test_answers_are_drawn_anew_in_each_epoch_and_alike_after_a_pause(lottery):
    corpora = {"vqa": lottery}
    count = steps_per_epoch(corpora, 10)
    whole = list(batches(corpora, 10, 3, epoch=2))
    assert count == len(whole) == 7
    (_, (later,)), *_ = batches(corpora, 10, 3, epoch=2, skip=4)
    assert torch.equal(later["labels"], whole[4][1][0]["labels"])
    indices = mixture(corpora, {"vqa": 10}, 3, epoch=2)[4][1]
    assert torch.equal(later["labels"], lottery.batch(indices, 10, f"3 {2 * count + 4}")["labels"])
    assert not torch.equal(later["labels"], lottery.batch(indices, 10, "3 4")["labels"])


def test_a_pinned_batch_is_the_same(corpus, monkeypatch):
    """In memory that only claims to be pinned: without a GPU there is no other."""
    own = torch.empty

    def empty(*shape, pin_memory=False, **more):
        return own(*shape, **more)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    plain = corpus.batch(np.arange(5), 8, seed=1)
    pinned = corpus.batch(np.arange(5), 8, seed=1, pin=True)
    assert plain.keys() == pinned.keys()
    assert all(torch.equal(x, pinned[name]) for name, x in plain.items())


def test_answers_are_drawn_in_proportion_to_their_scores():
    rng = random.Random(0)
    counts = Counter(sample_answer([(0, 0.3), (1, 0.9)], rng) for _ in range(4000))
    assert abs(counts[1, 0.9] / 4000 - 0.75) < 0.03


def test_an_epoch_has_each_example_once_in_an_order_of_its_own(corpus):
    corpora = {"vqa": corpus, "gqa": corpus}
    sizes = {"vqa": 10, "gqa": 7}
    first, again, other = (mixture(corpora, sizes, 3, epoch) for epoch in (0, 0, 1))
    assert all(a == b and (x == y).all() for (a, x), (b, y) in zip(first, again))
    for task in sizes:
        seen = [indices for name, indices in first if name == task]
        assert sorted(np.concatenate(seen)) == list(range(len(corpus)))
        assert max(map(len, seen)) == sizes[task]
    assert [name for name, _ in first] != [name for name, _ in other]


def test_batch_sizes_are_the_originals():
    assert [batch_size(task, 500, 10 ** 6) for task in ("vqa", "gqa")] == [500, 833]


def test_a_batch_is_no_larger_than_the_data(corpus):
    """48 examples are 48 rows, whatever --batch says."""
    (_, (batch,)), = batches({"vqa": corpus}, 10 ** 6, 3, epoch=0)
    assert len(batch["ids"]) == len(corpus) and steps_per_epoch({"vqa": corpus}, 10 ** 6) == 1


def test_caption_weights_make_the_mean_over_tokens(tiny, tokenizer):
    examples = read_examples(tiny / "datasets", "caption", "karpathy_train")
    corpus = Corpus("caption", examples, tokenizer, Store(examples))
    batch = corpus.batch(np.arange(5), 8, seed=1)
    real = batch["labels"] != -100
    losses = torch.rand(real.shape) * real
    ours = (batch["weights"] * losses.sum(1) / real.sum(1)).mean()
    assert torch.allclose(ours, losses[:5].sum() / real[:5].sum())


# ---- pictures and the store ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "1"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.png" if mode in ("RGBA", "P", "1") else "x.jpg")
    Image.new("RGB", (50, 30), (255, 255, 255)).convert(mode).save(path)
    pixels = load_picture(path)
    assert pixels.shape == (224, 224, 3) and pixels.min() > 250


def mean_colour(loaded):
    """Stands in for CLIP: the mean colour, as 4 tokens of 3 channels."""
    colours = torch.from_numpy(np.stack(loaded)).float().mean((1, 2))
    return colours[:, None].expand(-1, 4, -1)


def some_pictures(folder, count):
    """Picture i has the red 2 i."""
    for i in range(count):
        Image.new("RGB", (8, 8), (2 * i, 0, 0)).save(folder / f"{i}.png")
    return find_files([folder], map(str, range(count)))


def load(path):
    return load_picture(path, 8)


def reds(store):
    """What the store has of some_pictures."""
    return [store.features[store.row[str(i)], 0, 0] for i in range(len(store.row))]


def test_the_store_keeps_features_and_encodes_only_what_is_new(tmp_path):
    paths = some_pictures(tmp_path, 90)
    calls = []

    def counting(loaded):
        calls.append(len(loaded))
        return mean_colour(loaded)

    store = FeatureStore(tmp_path / "features", "hash", 4, 3)
    store.add(dict(list(paths.items())[:70]), load, counting)
    new = {name: path for name, path in paths.items() if name not in store.row}
    store.add(new, load, counting)
    assert calls == [64, 6, 20]
    again = FeatureStore(tmp_path / "features", "hash", 4, 3)
    assert reds(again) == [2 * i for i in range(90)]


def test_a_store_whose_writer_was_killed_goes_on(tmp_path):
    paths = some_pictures(tmp_path, 10)
    folder = tmp_path / "features"
    store = FeatureStore(folder, "hash", 4, 3)
    store.add({name: paths[name] for name in "0123"}, load, mean_colour)
    with open(folder / "features.f16", "ab") as file:
        file.write(b"half a row")
    store = FeatureStore(folder, "hash", 4, 3)
    store.add({name: paths[name] for name in "456789"}, load, mean_colour)
    assert reds(store) == [2 * i for i in range(10)]


def test_a_second_run_waits_for_the_first_and_takes_over_its_features(tmp_path):
    paths = some_pictures(tmp_path, 6)
    folder = tmp_path / "features"
    first, second = (FeatureStore(folder, "hash", 4, 3) for _ in range(2))
    calls = []

    def counting(loaded):
        calls.append(len(loaded))
        return mean_colour(loaded)

    backwards = dict(sorted(paths.items(), reverse=True))
    other = threading.Thread(target=second.add, args=(backwards, load, counting))

    def meanwhile(loaded):
        other.start()
        other.join(0.2)
        assert other.is_alive() and not calls, "it waits"
        return mean_colour(loaded)

    first.add({name: paths[name] for name in "0123"}, load, meanwhile)
    other.join(10)
    assert calls == [2], "only what the first had not"
    for store in FeatureStore(folder, "hash", 4, 3), second:
        assert reds(store) == [0, 2, 4, 6, 8, 10]


def test_a_store_of_another_encoder_is_refused(tmp_path):
    store = FeatureStore(tmp_path / "features", "one", 4, 3)
    store.add(some_pictures(tmp_path, 2), load, mean_colour)
    with pytest.raises(DataError, match="features of another encoder; remove .*features to encode"):
        FeatureStore(tmp_path / "features", "two", 4, 3)


def test_features_that_do_not_fit_are_told(tmp_path):
    paths = some_pictures(tmp_path, 2)
    with pytest.raises(DataError, match=r"of 0 have the shape \[4, 3\], expected \[5, 3\]"):
        FeatureStore(tmp_path / "features", "hash", 5, 3).add(paths, load, mean_colour)
    with pytest.raises(DataError, match="features of 0 are beyond float16"):
        FeatureStore(tmp_path / "features", "hash", 4, 3).add(
            paths, load, lambda loaded: 1e6 * (mean_colour(loaded) + 1))


def test_broken_pictures_are_told_after_the_others_are_kept(tmp_path):
    paths = some_pictures(tmp_path, 5)
    paths["1"].write_bytes(paths["1"].read_bytes()[:40])
    paths["3"].write_text("no picture")
    broken = FeatureStore(tmp_path / "features", "hash", 4, 3).add(paths, load, mean_colour)
    told = sorted(str(x).partition(" is not a readable picture")[0][-5:] for x in broken)
    assert told == ["1.png", "3.png"]
    assert set(FeatureStore(tmp_path / "features", "hash", 4, 3).row) == {"0", "2", "4"}


WITHOUT = """
import sys
sys.modules["av"] = sys.modules["fcntl"] = None         # to import them is an ImportError
from pathlib import Path
import torch
import data
import tokenizer
folder, weights = map(Path, sys.argv[1:])
clip = data.from_clip(weights / "RN-mini.pt", "hash", False, torch.device("cpu"))
words = tokenizer.load_tokenizer(weights / "bart-mini")
corpora, = data.open_corpora(folder, "RN-mini", clip, words, {"nlvr": "dev"})
task, (batch,) = next(data.batches(corpora, 24, seed=0, epoch=0))
print(task, list(batch["features"].shape), float(batch["features"].abs().sum()) > 0)
try:
    data.load_video(folder / "x.mp4")
except data.DataError as problem:
    print(problem)
"""


def test_pictures_need_neither_pyav_nor_locks(world, tiny):
    """As on Windows, which has no fcntl."""
    words = [sys.executable, "-c", WITHOUT, world, tiny / "weights"]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=Path(data.__file__).parent)
    first, second = ended.stdout.splitlines()[-2:]
    assert first.startswith("nlvr [8, 2, 36, ") and first.endswith(" True"), ended.stderr
    assert second.endswith("x.mp4 can be read with PyAV only: pip install av")


def test_features_of_pictures_and_videos_are_clips(tiny):
    """Encoded together they are those encoded alone, by CLIP's own rules for grids and frames."""
    path = tiny / "weights" / "RN-mini.pt"
    one, two = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    pictures = from_clip(path, "hash", False, torch.device("cpu"))
    both = pictures.encode([one, two])
    assert both.shape == (2, 36, pictures.channels)
    assert torch.allclose(both[1:], pictures.encode([two]), atol=1e-5)
    videos = from_clip(path, "hash", True, torch.device("cpu"))
    short, long = videos.encode([np.stack([one]), np.stack([two, one])])
    assert short.shape == (64, videos.channels) and not short[1:].any() and not long[2:].any()
    assert torch.allclose(short[0], long[1], atol=1e-5)


def test_released_features_are_padded_and_found_by_their_name(tmp_path):
    top = tmp_path / "video" / "vis_features"
    with pytest.raises(DataError, match="clip-vit is empty"):
        released_features(tmp_path, "clip-vit")
    assert not is_released(tmp_path, "clip-vit")
    (top / "tv" / "clip-vit").mkdir(parents=True)
    x = np.random.randn(20, 512).astype(np.float16)
    np.savez(top / "tv" / "clip-vit" / "a.npz", features=x)
    assert is_released(tmp_path, "clip-vit")
    features = released_features(tmp_path, "clip-vit")
    assert (features.hash, features.channels) == ("clip-vit", 512)
    assert features.folders(tmp_path, "how2") == [top / "how2" / "clip-vit"]
    tokens, = features.encode([features.load(top / "tv" / "clip-vit" / "a.npz")])
    assert tokens.shape == (64, 512) and (tokens[:20].numpy() == x).all() and not tokens[20:].any()


def test_missing_and_unreadable_pictures_end_a_run_or_are_left_out(world, tokenizer):
    images = world / "nlvr" / "images"
    first, second = sorted({e.pictures[0] for e in read_examples(world, "nlvr", "dev")})[:2]
    find_files([images], [first])[first].unlink()
    features = data.Features("hash", 3, data.folders_of, load,
                             lambda loaded: mean_colour(loaded)[:, :1].expand(-1, 36, -1))

    def opened(**more):
        said = []
        corpora = open_corpora(world, "colour", features, tokenizer, {"nlvr": "dev"},
                               say=said.append, **more)
        return corpora[0]["nlvr"], said

    with pytest.raises(DataError, match=f"1 of .* pictures are missing below .*images, .*{first}"):
        opened()
    find_files([images], [second])[second].write_text("no picture")
    corpus, said = opened(allow_missing=True)
    wanted = [e for e in read_examples(world, "nlvr", "dev")
              if not {first, second} & set(e.pictures)]
    assert corpus.examples == wanted
    assert said[0].startswith(f"nlvr, dev: {len(wanted)} of ") and said[0].endswith(" %")
    Image.new("RGB", (8, 8)).save(images / f"{first}.png")
    with pytest.raises(DataError, match=f"1 of .* pictures are unreadable, .*{second}"):
        opened()


# ---- the other readers, on files as their owners publish them ------------------------------------


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(*rows):
    """JSON lines with a blank one, the last without its newline, as some official files are."""
    return "\n\n".join(map(json.dumps, rows))


def test_nlvr2_has_two_pictures_named_by_the_identifier(tmp_path):
    sentence = "One image shows exactly two cups."
    row = {"identifier": "train-17-2-0", "sentence": sentence, "label": "False", "directory": 67,
           "left_url": "http://a", "right_url": "http://b", "validation": {"4": "False"}}
    other = row | {"identifier": "train-17-3-0", "label": "True"}
    write(tmp_path / "nlvr/train.json", lines(row, other))
    one, two = read_examples(tmp_path, "nlvr", "train")
    assert one.pictures == ("train-17-2-img0", "train-17-2-img1")
    assert two.pictures[1] == "train-17-3-img1"
    assert (one.text, one.answers, two.answers) == (sentence, {"false": 1.0}, {"true": 1.0})
    for place in ("train/67", "train", "."):        # numbered folders, flat ones, and one for all
        folder = tmp_path / place / "nlvr/images"
        file = folder / place / "train-17-2-img0.png"
        write(file, "")
        assert find_files([folder], one.pictures) == {"train-17-2-img0": file}


def test_a_png_that_is_none_is_opened_by_its_content(tmp_path):
    Image.new("RGB", (9, 9), (200, 0, 0)).save(tmp_path / "x.png", "GIF")
    assert load_picture(tmp_path / "x.png", 4)[0, 0, 0] == 200


def test_captions_are_examples_in_training_and_references_elsewhere(tmp_path):
    def image(number, split, *texts):
        sentences = [{"raw": text, "tokens": [], "sentid": 10 * number + i}
                     for i, text in enumerate(texts)]
        return {"filepath": "val2014", "filename": f"COCO_val2014_{number:012d}.jpg",
                "cocoid": number, "imgid": 0, "split": split, "sentences": sentences}

    write(tmp_path / "COCO/dataset_coco.json", {"dataset": "coco", "images": [
        image(1, "restval", " A boy flies a kite. ", "A kite."),
        image(2, "val", "Cups.", "Two cups."),
        image(3, "test", "A")]})
    test = "COCO_test2014_000000000007"
    write(tmp_path / "COCO/image_info_test2014.json",
          {"images": [{"id": 7, "file_name": f"{test}.jpg"}]})
    trained = read_examples(tmp_path, "caption", "karpathy_train")
    assert [e.answers for e in trained] == [{"A boy flies a kite.": 1.0}, {"A kite.": 1.0}]
    assert {e.pictures for e in trained} == {("COCO_val2014_000000000001",)}
    val, = read_examples(tmp_path, "caption", "karpathy_val")
    assert (val.id, val.text, val.truth["references"]) == (2, "", ["Cups.", "Two cups."])
    assert [e.id for e in read_examples(tmp_path, "caption", "val2014")] == [1, 2, 3]
    assert [e.pictures for e in read_examples(tmp_path, "caption", "test2014")] == [(test,)]


def test_examples_without_labels_cannot_be_scored():
    examples = [Example(i, (), "", {}, truth=truth) for i, truth in enumerate(
        [{"answer": "yes"}, {"answers": ["a"]}, {"references": ["b"]}, {"answer": None}, {}])]
    check_labels("vqa", examples[:3])
    with pytest.raises(DataError, match="vqa cannot be scored: 2 of 5 examples have no labels"):
        check_labels("vqa", examples)


def test_labels_are_there_of_all_examples_or_of_none(tmp_path):
    rows = [{"identifier": f"test1-0-{i}-0", "sentence": "Two dogs.", "label": "True"} for i in "abc"]
    hidden = [{**row, "label": None} for row in rows]
    path = tmp_path / "nlvr/test1.json"
    for good in rows, hidden:
        write(path, good)
        assert len(read_examples(tmp_path, "nlvr", "test1")) == 3
    write(path, [*rows[:2], hidden[2]])
    with pytest.raises(DataError, match=r"nlvr/test1.json\): 1 of 3 have no labels"):
        read_examples(tmp_path, "nlvr", "test1")


@pytest.fixture
def value(tmp_path):
    """VALUE's layout and oddities: a NaN moment, stray spaces, odd names, missing subtitles."""
    ann = tmp_path / "video/ann"
    castle, friends = "s02e03_seg01_clip_04", "friends_s01e01_seg01_clip_00"
    said = [{"text": "Hi.", "start": 0.3, "end": 1.2}, {"text": " Ann! ", "start": 2}]
    write(ann / "tv_subtitles.jsonl",
          lines({"vid_name": castle, "sub": said}, {"vid_name": friends, "sub": []}))
    asked = {"qid": 901, "q": "What does Ann hold?", "a0": "A cup.", "a1": "A book",
             "a2": "Her keys ", "a3": "Nothing.", "a4": "A hat", "answer_idx": 2,
             "ts": "10.2-15.07", "vid_name": castle, "show_name": "Castle"}
    write(ann / "tvqa/tvqa_val.jsonl", lines(
        asked,
        asked | {"qid": 902, "ts": "NaN-NaN", "vid_name": friends},
        asked | {"qid": 903, "vid_name": "x"}))
    unanswered = {key: asked[key] for key in asked if key != "answer_idx"}
    write(ann / "tvqa/tvqa_test_release.jsonl", lines(unanswered))

    write(ann / "how2_subtitles.jsonl", "")
    write(ann / "how2qa/how2qa_val_release.jsonl", lines(
        {"vid_name": "e_367c", "ts": "3.1-9.87", "qid": 1, "q": "Why?", "a0": "a", "a1": "b",
         "a2": "c", "a3": "d", "answer_idx": 3}))

    clip = {"vid_name": castle, "duration": 88.4, "ts": [12.0, 17.55], "clip_id": 501}
    told = [{"desc": f"Kate does {i}. ", "desc_id": 10 + i, "type": "v", "from_retrieval": False}
            for i in range(4)]
    write(ann / "tvc/tvc_train_release.jsonl", lines(clip | {"descs": told[:2]}))
    write(ann / "tvc/tvc_val_release.jsonl", lines(clip | {"descs": told}))
    write(ann / "tvc/tvc_test_release.jsonl", lines(clip))

    write(ann / "yc2_subtitles.jsonl", "")
    write(ann / "yc2c/yc2c_val_release.jsonl", lines(
        {"vid_name": "abCdEf-1_23_4", "clip_id": 13001, "duration": 12,
         "descs": [{"desc": "add salt", "desc_id": 1}]}))
    return tmp_path


def text_of(tokenizer, task, example):
    return tokenizer.decode(text_ids(tokenizer, task, example))


def test_videos_are_asked_about_in_the_originals_words(value, tokenizer):
    one, nan, silent = read_examples(value, "tvqa", "val")
    assert text_of(tokenizer, "tvqa", one) == (
        "[Subs] Hi. Ann! [Q] What does Ann hold? [TS] (10.2-15.07) "
        "[Choices] a0: A cup. a1: A book. a2: Her keys. a3: Nothing. a4: A hat. tvqa: ")
    assert (one.answers, one.truth) == ({"a2": 1.0}, {"answer": "a2", "show": "Castle"})
    assert "[TS] (NaN-NaN)" in nan.text and nan.subtitles == "" == silent.subtitles
    assert read_examples(value, "tvqa", "test_release")[0].answers == {}
    how, = read_examples(value, "how2qa", "val_release")
    assert how.pictures == ("e_367c",) and how.answers == {"a3": 1.0} and "a4:" not in how.text


def test_moments_have_four_references_and_whole_videos(value, tokenizer):
    trained = read_examples(value, "tvc", "train_release")
    assert [e.answers for e in trained] == [{"Kate does 0.": 1.0}, {"Kate does 1.": 1.0}]
    clip, = read_examples(value, "tvc", "val_release")
    assert clip.id == 501 and len(clip.truth["references"]) == 4
    assert text_of(tokenizer, "tvc", clip) == "[Subs] Hi. Ann! [TS] ([12.0, 17.55]) tvc: "
    assert read_examples(value, "tvc", "test_release")[0].truth["references"] == []
    recipe, = read_examples(value, "yc2c", "val_release")
    assert text_of(tokenizer, "yc2c", recipe) == "[Subs] yc2c: "
    assert recipe.pictures == ("abCdEf-1_23_4",)


def test_of_a_long_text_the_subtitles_are_cut(tokenizer):
    text = choose_from("Who?", "0-1", ["Ann", "Bob"])
    example = Example(1, ("x",), text, {}, subtitles="so it is " * 500)
    ids = text_ids(tokenizer, "tvqa", example)
    assert len(ids) == 600 and ids[-1] == tokenizer.eos
    said = tokenizer.decode(ids)
    assert said.startswith("[Subs] so it is so")
    assert said.endswith(" [Q] Who? [TS] (0-1) [Choices] a0: Ann. a1: Bob. tvqa: ")


def test_vl_t5s_lists_are_read_in_the_place_of_the_official_files(tmp_path):
    write(tmp_path / "vqa/karpathy_val.json", [
        {"question_id": 42003, "img_id": "COCO_val2014_000000000042", "sent": "What?",
         "question_type": "what", "answer_type": "other", "label": {"kite": 1.0, "toy": 0.3},
         "answers": [{"answer": "kite"}] * 10}])
    write(tmp_path / "GQA/train.json", [
        {"question_id": "071", "img_id": "23", "sent": "Is it?", "label": {"yes": 1.0}}])
    write(tmp_path / "GQA/valid.json", [
        {"question_id": "072", "img_id": "n24", "sent": "Is it?", "label": {"no": 1.0}}])
    row = {"img0": "dev-1-0-img0", "img1": "dev-1-0-img1", "label": 1, "sent": "Cups.",
           "identifier": "dev-1-0-0", "uid": "nlvr2_valid_0"}
    write(tmp_path / "nlvr/valid.json", [row])
    write(tmp_path / "nlvr/train.json", [row | {"label": 0}])

    vqa, = read_examples(tmp_path, "vqa", "karpathy_val")
    assert vqa.pictures == ("COCO_val2014_000000000042",)
    assert vqa.answers == {"kite": 1.0, "toy": 0.3}
    assert vqa.truth == {"answers": ["kite"] * 10, "type": "other"}
    gqa = read_examples(tmp_path, "gqa", "train,val")
    assert [(e.id, e.pictures, e.truth["answer"]) for e in gqa] == [
        ("071", ("23",), "yes"), ("072", ("n24",), "no")]
    for split, answer in ("dev", "true"), ("train", "false"):
        nlvr, = read_examples(tmp_path, "nlvr", split)
        assert nlvr.pictures == ("dev-1-0-img0", "dev-1-0-img1")
        assert (nlvr.answers, nlvr.truth) == ({answer: 1.0}, {"answer": answer})


# ---- videos --------------------------------------------------------------------------------------


FRAME_CASES = json.loads((GOLDEN / "golden_fps.json").read_text())["cases"]


@pytest.mark.parametrize("case", FRAME_CASES, ids=lambda case: case["rate"])
def test_frames_are_picked_as_ffmpegs_filter_picks_them(case):
    step = 1 / Fraction(case["rate"])
    frames = []
    for i in range(case["frames"]):         # the files were Matroska, which keeps milliseconds
        frames.append((Fraction(round(1000 * i * step), 1000), step, i))
    assert list(resample(frames, FPS)) == case["picks"]


def make_video(path, times, codec="mpeg4", size=(64, 48), **options):
    """A video whose i-th frame, at times[i] in milliseconds, is as grey as i."""
    width, height = size
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, 1000)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            grey = np.full((height, width, 3), i % 250, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, "rgb24")
            frame.pts = time
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def filtered(path):
    """How grey the frames are that PyAV's own filter graph keeps; a file begins at 0 for ffmpeg."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        start = round(container.start_time / av.time_base / stream.time_base)
        graph = av.filter.Graph()
        source = graph.add_buffer(template=stream)
        fps, sink = graph.add("fps", "2/3"), graph.add("buffersink")
        source.link_to(fps)
        fps.link_to(sink)
        graph.configure()
        kept = []
        for frame in [*container.decode(stream), None]:
            if frame is not None:
                frame.pts -= start
            graph.push(frame)
            while True:
                try:
                    kept.append(int(graph.pull().to_ndarray(format="gray").mean()))
                except (av.BlockingIOError, av.EOFError):
                    break
        return kept


def every(step, end, start=0):
    """Times in milliseconds."""
    return [start + round(step * i) for i in range(int(end / step))]


RNG = random.Random(3)
RATES = {}
for rate in (60, 30, 29.97, 25, 23.976, 15, 8, 3, 1, 0.5):
    RATES[str(rate)] = [round(1000 * i / rate) for i in range(max(4, int(12 * rate)))]
for number in range(3):
    RATES[f"variable {number}"] = sorted(RNG.sample(range(0, 12000), 90))
RATES["from 0.7 s on"] = every(40, 12000, start=700)
RATES["with a gap"] = every(40, 2400) + every(40, 2400, start=9000)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("name", RATES)
def test_frames_of_files_are_those_of_pyavs_filter(tmp_path, name, suffix):
    path = make_video(tmp_path / f"x.{suffix}", RATES[name])
    ours = [int(frame.mean()) for frame in load_video(path, 32)]
    theirs = filtered(path)
    assert len(ours) == len(theirs)
    assert np.abs(np.subtract(ours, theirs)).max() <= 20, (ours, theirs)


@pytest.mark.parametrize("name", ["{:05d}.jpg", "{}.jpg"])
def test_frames_of_tvqa_are_a_folder_at_three_a_second(tmp_path, name):
    (tmp_path / "._1.jpg").write_text("what a Mac leaves behind")
    for i in range(30):
        Image.new("RGB", (40, 20), (8 * i, 0, 0)).save(tmp_path / name.format(i + 1))
    numbers = [round(int(frame[0, 0, 0]) / 8) for frame in load_video(tmp_path, 16)]
    assert numbers == [2, 6, 11, 15, 20, 24, 29]


def test_frames_are_scaled_and_cropped_not_squeezed(tmp_path):
    picture = np.zeros((50, 100, 3), np.uint8)
    picture[:, 25:75] = 255                 # the square in the middle is white
    Image.fromarray(picture).save(tmp_path / "1.png")
    assert load_video(tmp_path, 32)[0, :, 1:-1].min() > 200


def test_64_frames_by_zeros_or_by_the_greatest():
    x = torch.randn(150, 5)
    assert torch.equal(fit_frames(x[:64]), x[:64])
    assert torch.equal(fit_frames(x[:10])[:10], x[:10]) and not fit_frames(x[:10])[10:].any()
    naive = [x[i * 150 // 64:-(-(i + 1) * 150 // 64)].max(0).values for i in range(64)]
    assert torch.equal(fit_frames(x), torch.stack(naive))
    recorded = np.load(GOLDEN / "downsample.npz")
    names = [name for name in recorded if name.startswith("resize/in_")]
    assert names
    for name in names:
        ours = fit_frames(torch.from_numpy(recorded[name]).squeeze())
        theirs = torch.from_numpy(recorded[name.replace("in_", "out_")]).squeeze()
        assert torch.allclose(ours, theirs), name


def test_values_features_are_read_as_they_are(tmp_path):
    features = np.random.randn(20, 512).astype(np.float16)
    np.savez(tmp_path / "x.npz", features=features)
    assert (load_features(tmp_path / "x.npz") == features).all()
    np.savez(tmp_path / "y.npz", other=features)
    (tmp_path / "z.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:300])
    for name in "yz":
        with pytest.raises(DataError, match=f"{name}.npz is not a file of VALUE's features"):
            load_features(tmp_path / f"{name}.npz")


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", 16000)
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            frame.pts = 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def cut_short(path, **options):
    make_video(path, TEN_SECONDS, **options)
    path.write_bytes(path.read_bytes()[:int(0.6 * path.stat().st_size)])


TEN_SECONDS = every(40, 10000)
INDEX_FIRST = {"options": {"movflags": "faststart"}}
WRONG_TIME = [0, 40, 80, 10 ** 9]
UNREADABLE = "is empty, truncated or not a readable video"
BAD_VIDEOS = {
    "empty": (lambda p: p.write_bytes(b""), "mp4", UNREADABLE),
    "no video": (lambda p: p.write_text("no video"), "mp4", UNREADABLE),
    "without its index": (cut_short, "mp4", UNREADABLE),
    "cut short, mp4": (lambda p: cut_short(p, **INDEX_FIRST), "mp4", "truncated"),
    "cut short, mkv": (cut_short, "mkv", "is truncated"),
    "audio only": (audio_only, "mp4", "has no pictures, only audio"),
    "a wrong time stamp": (
        lambda p: make_video(p, WRONG_TIME, "ffv1"), "mkv",
        "has a time stamp of 1,000,000 seconds"),
    "of no length": (lambda p: make_video(p, []), "mkv", "x.mkv"),
    "an empty folder": (Path.mkdir, "", "has no frames"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_videos_are_told_in_one_sentence(tmp_path, name):
    spoil, suffix, message = BAD_VIDEOS[name]
    path = tmp_path / f"x.{suffix}".rstrip(".")
    spoil(path)
    with pytest.raises(DataError) as problem:
        load_video(path, 32)
    assert message in str(problem.value) and "\n" not in str(problem.value)


def test_a_video_without_time_stamps_goes_by_its_rate(tmp_path):
    path = tmp_path / "x.h264"              # a bare stream, whose frames have no times
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", 25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(250):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), i, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    greys = [int(frame.mean()) for frame in load_video(path, 32)]
    assert np.abs(np.subtract(greys, [18, 56, 93, 131, 168, 206, 243])).max() < 5


def test_a_cut_that_hides_frames_is_not_taken_for_truncated(tmp_path):
    """Two seconds cut out by copying packets: more are in the file than its edit list shows."""
    whole = make_video(tmp_path / "whole.mp4", TEN_SECONDS)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        source.seek(4_000_000)
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.pts * packet.time_base < 6:
                four = round(4 / packet.time_base)
                packet.pts -= four
                packet.dts -= four
                packet.stream = stream
                target.mux(packet)
    assert len(load_video(tmp_path / "cut.mp4", 32)) >= 1


def test_pictures_behind_links_are_found(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "7.jpg").touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train2014").symlink_to(tmp_path / "elsewhere")
    path = tmp_path / "images" / "train2014" / "7.jpg"
    assert find_files([tmp_path / "images"], ["7"]) == {"7": path}


def test_a_short_video_has_a_frame(tmp_path):
    assert len(load_video(make_video(tmp_path / "x.mkv", [0, 40, 80]), 32)) >= 1


# ---- bad files -----------------------------------------------------------------------------------


def remove(name):
    return lambda world: (world / name).unlink()


def put(name, text):
    return lambda world: (world / name).write_text(text)


def copy(source, name):
    return lambda world: shutil.copy(world / source, world / name)


def change(name, edit):
    """Lets edit(content) change what a JSON file has."""
    def spoil(world):
        content = json.loads((world / name).read_text())
        edit(content)
        (world / name).write_text(json.dumps(content))
    return spoil


def change_line(name, **fields):
    """Changes fields of the last of JSON lines."""
    def spoil(world):
        *rows, last = (world / name).read_text().splitlines()
        last = json.dumps(json.loads(last) | fields)
        (world / name).write_text("\n".join([*rows, last]))
    return spoil


def cut_text(world):
    (world / VAL).write_text((world / VAL).read_text()[:500])


def empty_gqa(world):
    for part in ("train", "val"):
        (world / f"GQA/{part}_balanced_questions.json").write_text("{}")


VAL = "vqa/v2_OpenEnded_mscoco_val2014_questions.json"
GIVEN = "vqa/v2_mscoco_val2014_annotations.json"
COCO = "COCO/dataset_coco.json"
GQA_VAL = "GQA/val_balanced_questions.json"
NLVR = "nlvr/train.json"
TVQA = "video/ann/tvqa/tvqa_train.jsonl"
BAD_FILES = {
    "absent": (remove(VAL), "vqa", "val2014_questions.json is missing"),
    "no dataset_coco": (remove(COCO), "vqa", "dataset_coco.json is missing"),
    "truncated": (cut_text, "vqa", "truncated or not JSON"),
    "of another data set": (
        copy(GQA_VAL, VAL), "vqa",
        "of another data set: expected an object with a list 'questions'"),
    "without a field": (
        change(VAL, lambda c: c["questions"][5].pop("image_id")), "vqa",
        "val2014_questions.json, record 6: image_id should be a whole number from 0 on, but is "),
    "not matching": (
        change(VAL, lambda c: c["questions"].pop()), "vqa", "they do not match"),
    "an annotation less": (
        change(GIVEN, lambda c: c["annotations"].pop()), "vqa", "they do not match"),
    "of no objects": (
        change(VAL, lambda c: c.update(questions=[1])), "vqa",
        "record 1: should be an object, but is 1"),
    "two lists": (
        put(VAL, '{"questions": [], "questions": []}'), "vqa", "expected an object with a list"),
    "line not JSON": (
        put(NLVR, '{"identifier": "a-0-0-0", "sentence": "", "label": "True"}\n{"ident'), "nlvr",
        "train.json is truncated or not JSON: record 2, Unterminated string"),
    "nlvr2 of another data set": (
        copy(VAL, NLVR), "nlvr", "train.json, record 1: identifier should be text"),
    "label unknown": (
        change_line(NLVR, label="maybe"), "nlvr",
        'record 12: label should be one of "False", "True", 0, 1, but is "maybe"'),
    "label a list": (change_line(NLVR, label=["True"]), "nlvr", "label should be one of"),
    "no pairs": (
        change_line(NLVR, identifier="train"), "nlvr", "identifier should be split-set-pair-sent"),
    "the same id twice": (
        change_line(NLVR, identifier="train-0-0-0"), "nlvr", "has the id train-0-0-0 2 times"),
    "caption without text": (
        change(COCO, lambda c: c["images"][0]["sentences"][0].pop("raw")), "caption",
        "dataset_coco.json, record 1: sentences[0].raw should be text"),
    "an answer's number that is none": (
        change_line(TVQA, answer_idx=7), "tvqa",
        "tvqa_train.jsonl, record 18: answer_idx should be one of 0, 1, 2, 3, 4, but is 7"),
    "an answer's number that is a float": (
        change_line(TVQA, answer_idx=2.0), "tvqa", "answer_idx should be one of 0, 1, 2, 3, 4"),
    "no descriptions": (
        change_line("video/ann/tvc/tvc_train_release.jsonl", descs=[]), "tvc", "descs is empty"),
    "a question that is no text": (
        change(VAL, lambda c: [q.update(question=5) for q in c["questions"]]), "vqa",
        "record 1: question should be text of at most 10,000 whole characters, but is 5"),
    "half a character": (
        change(VAL, lambda c: c["questions"][2].update(question="\ud800")), "vqa",
        'record 3: question should be text of at most 10,000 whole characters, but is "\\ud800"'),
    "a book for a question": (
        change(VAL, lambda c: c["questions"][2].update(question="x" * 20_000)), "vqa",
        "record 3: question should be text of at most 10,000"),
    "a question twice": (
        change(VAL, lambda c: c["questions"].append(c["questions"][0])), "vqa", "is there twice"),
    "of no picture": (
        change(VAL, lambda c: c["questions"][3].update(image_id=99)), "vqa",
        "val2014_questions.json, record 4: image_id 99 is none of COCO/dataset_coco.json"),
    "of two pictures": (
        change(GIVEN, lambda c: c["annotations"][3].update(image_id=1)), "vqa",
        "val2014_annotations.json, record 4: image_id 1 is"),
    "nobody's answer": (
        change(GIVEN, lambda c: c["annotations"][0]["answers"][9].update(answer=None)), "vqa",
        "val2014_annotations.json, record 1: answers[9].answer should be text"),
    "nothing to learn": (
        put("vqa/trainval_ans2label.json", '{"nothing": 1}'), "vqa", "ans2label.json: none of"),
    "nested without end": (
        put(VAL, '{"a": ' + "[" * 100_000), "vqa", "not JSON: record 1, nested too deeply"),
    "a number of 5000 digits": (put(VAL, '{"a": ' + "9" * 5000 + "}"), "vqa", "number is too long"),
    "infinite": (put(VAL, '{"questions": [{"question_id": 1e999}]}'), "vqa", "but is Infinity"),
    "empty": (put(VAL, ""), "vqa", "is empty or of another data set"),
    "of zeros": (put(VAL, "\0" * 100), "vqa", "is empty or of another data set"),
    "two objects": (put(GQA_VAL, "{} {}"), "gqa", "something stands behind its end"),
    "a pointer": (put(VAL, "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"),
                  "vqa", "val2014_questions.json is a Git LFS pointer"),
    "a web page": (put(VAL, "<!DOCTYPE html><html>"), "vqa", "questions.json is a web page"),
    "a folder": (lambda world: [remove(VAL)(world), (world / VAL).mkdir()], "vqa",
                 "questions.json is not a regular file"),
    "a pipe": (lambda world: [remove(VAL)(world), os.mkfifo(world / VAL)], "vqa",
               "questions.json is not a regular file"),
    "not UTF-8": (lambda world: (world / VAL).write_bytes(b'{"questions": "\xff"}'), "vqa",
                  "questions.json is not UTF-8 text"),
    "subtitles missing": (
        remove("video/ann/tv_subtitles.jsonl"), "tvqa", "tv_subtitles.jsonl is missing"),
    "subtitles a number": (
        change_line("video/ann/tv_subtitles.jsonl", sub=5), "tvqa", "sub should be a list, but is"),
    "an answer missing": (change_line(TVQA, a4=None), "tvqa", "record 18: a4 should be text"),
    "gqa of another data set": (
        copy(VAL, GQA_VAL), "gqa", "record questions: should be an object, but is a list"),
    "gqa without an answer": (
        change(GQA_VAL, lambda c: next(iter(c.values())).pop("answer")), "gqa",
        "val_balanced_questions.json, record 2000009000000: answer should be text"),
    "types in a list": (
        change(GQA_VAL, lambda c: next(iter(c.values())).update(types=[])), "gqa",
        "types should be an object, but is a list"),
    "entailed a number": (
        change(GQA_VAL, lambda c: next(iter(c.values())).update(entailed=[5])), "gqa",
        "entailed[0] should be text of at most 10,000 whole characters, but is 5"),
    "not balanced": (
        change(GQA_VAL, lambda c: [r.update(isBalanced=False) for r in c.values()]), "gqa",
        "val_balanced_questions.json: isBalanced is false"),
    "gqa empty": (empty_gqa, "gqa", "gqa's train,val below"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_told_in_one_sentence(world, name):
    spoil, task, message = BAD_FILES[name]
    spoil(world)
    with pytest.raises(DataError) as problem:
        read_examples(world, task, TASKS[task].train)
    assert message in str(problem.value) and "\n" not in str(problem.value)


FORMS = {  # text, key: places and records
    '{"info": {"a": [1]}, "rows": [{"a": "é\\u00e9"}, {"b": [12, -3.5e2]}], "n": 12345}': "rows",
    ' {"x": {"a": 1}, "y": {"a": "]}"}} ': "",
    '[{"a": 1},\n {"b": "\\\\\\""}]': None,
    '{"a": 1}\n\n{"b": [2]}\n12345': None,
}


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_records_come_one_by_one_wherever_a_block_ends(tmp_path, monkeypatch, text, block):
    monkeypatch.setattr(data, "BLOCK", block)
    (tmp_path / "x.json").write_text("\ufeff" + text, encoding="utf-8")
    key = FORMS[text]
    if key is None and text[0] == "{":
        rows = [json.loads(line) for line in text.split("\n") if line]
    else:
        rows = json.loads(text)[key] if key else json.loads(text)
    told = [*rows.items()] if isinstance(rows, dict) else [*enumerate(rows, 1)]
    with open(tmp_path / "x.json", "rb") as file:
        content = data.JSONFile(tmp_path / "x.json", file)
        assert [(place, content.value()) for place in content.records(key)] == told


def test_a_file_of_any_size_is_read_in_little_memory(tmp_path):
    record = '{"question_id": %d, "image_id": 1, "question": "' + "x" * 900 + '"},\n'
    with open(tmp_path / "x.json", "w") as file:
        file.write('{"questions": [')
        file.writelines(record % i for i in range(60_000))
        file.write('{"question_id": 60000, "image_id": 1, "question": ""}]}')
    tracemalloc.start()
    rows = data.Files(tmp_path).records("x.json", data.VQA_QUESTION, "questions")
    assert sum(1 for _ in rows) == 60_001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6 < (tmp_path / "x.json").stat().st_size / 6


def test_training_without_any_answer_in_vl_t5s_lists(tmp_path):
    row = {"question_id": 1, "img_id": "x", "sent": "What?", "label": {"red": 1}}
    for label, told in [({"red": float("inf")}, "label.red should be a number from 0 on, but is"),
                        ({"red": -1}, "label.red should be"), (["red"], "label should be an obj"),
                        ({"red": 0}, "nothing can be learned"), (None, "but is missing")]:
        write(tmp_path / "vqa/karpathy_train.json", [row | {"label": label}])
        with pytest.raises(DataError, match="karpathy_train.json.*" + told):
            read_examples(tmp_path, "vqa", "karpathy_train")


def test_coco_of_2017_has_the_same_pictures(tmp_path):
    path = tmp_path / "train2017" / "000000123456.jpg"
    path.parent.mkdir()
    path.touch()
    names = ["COCO_train2014_000000123456", "COCO_test2015_000000000007"]
    assert find_files([tmp_path], names) == {names[0]: path}


# ---- what is kept ----


PICTURES = data.Features(
    "hash", 3, data.folders_of, lambda path: np.zeros(3),
    lambda loaded: torch.from_numpy(np.stack(loaded))[:, None].expand(-1, 36, -1))


def start(world, tokenizer, task="vqa", **more):
    """Training's first batch, and what validation asks."""
    row = TASKS[task]
    train, validation = open_corpora(world, "x", PICTURES, tokenizer, {task: row.train},
                                     {task: row.validation}, **more)
    (_, (batch,)), *_ = batches(train, 8, 3, epoch=0)
    assert train[task].examples is None
    return [x.tolist() for x in batch.values()], validation[task].examples


@pytest.fixture
def loaded(tiny):
    return load_tokenizer(tiny / "weights" / "bart-mini")


@pytest.mark.parametrize("task", ["vqa", "gqa", "nlvr", "caption"])
def test_a_later_start_reads_no_annotations_and_has_the_same(world, loaded, monkeypatch, task):
    first = start(world, loaded, task)
    monkeypatch.setattr(data, "stream_examples", None)
    again = start(world, loaded, task)
    assert first[0] == again[0]
    for one, other in zip(first[1], again[1], strict=True):
        assert json.dumps(astuple(one)) == json.dumps(astuple(other))
        assert type(other) is Example and type(other.pictures) is tuple


def test_what_has_changed_is_read_anew(world, loaded):
    first = start(world, loaded)
    change(VAL, lambda c: [q.update(question="What?") for q in c["questions"]])(world)
    changed = start(world, loaded)
    assert {e.text for e in changed[1]} == {"What?"} != {e.text for e in first[1]}
    (world / "vqa/trainval_ans2label.json").write_text('{"yes": 1}')
    assert start(world, loaded)[1][0].answers.keys() <= {"yes"}


@pytest.mark.parametrize("spoil", [
    lambda content: content[:1000], lambda content: b"", lambda content: b"x" * 5000,
    lambda content: content[:900] + b"\xff" + content[901:]], ids=range(4))
def test_damaged_files_are_made_anew(world, loaded, spoil):
    first = start(world, loaded)
    paths = sorted((world / "corpora").iterdir())
    whole = [path.read_bytes() for path in paths]
    for path, content in zip(paths, whole):
        path.write_bytes(spoil(content))
    assert start(world, loaded)[0] == first[0]
    assert [path.read_bytes()[-32:] for path in paths] == [content[-32:] for content in whole]


def test_where_nothing_can_be_written_it_is_read_each_time(world, loaded):
    (world / "corpora").write_text("in the way")
    said = []
    first = start(world, loaded, say=said.append)
    assert start(world, loaded, say=said.append) == first
    assert len(said) == 4 and "corpora cannot be written" in said[0]


def test_what_is_made_lies_in_the_cache_and_one_process_goes_first(world, loaded, tmp_path):
    entered = []

    @contextmanager
    def first():
        assert (tmp_path / "cache" / "corpora").exists(), "reading waits for nobody"
        assert not (tmp_path / "cache" / "features").exists()
        entered.append(1)
        yield

    start(world, loaded, cache=tmp_path / "cache", first=first)
    assert entered and not (world / "corpora").exists() and not (world / "features").exists()
    assert (tmp_path / "cache/features/COCO/x/index.json").exists()


def test_the_report_counts_what_is_there_and_what_is_not(world, monkeypatch, capsys):
    pictures = sorted((world / "COCO/images/train2014").iterdir())
    pictures[0].unlink()
    pictures[1].write_text("no picture")
    (world / "GQA/train_balanced_questions.json").unlink()
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", str(world)])
    with pytest.raises(SystemExit) as end:
        data.main()
    said = capsys.readouterr().out
    assert end.value.code == 2
    assert "karpathy_train             64 examples (published: 605,102)" in said
    assert "28 pictures, 1 missing, 1 unreadable" in said
    assert pictures[0].stem in said and pictures[1].name in said
    assert "train_balanced_questions.json is missing" in said
    assert "get it at https://cs.stanford.edu" in said
