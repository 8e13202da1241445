"""data.py: the official files are read as their owners mean them, and batches are what they should be."""

import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (TASKS, Corpus, DataError, FeatureStore, batch_size, draw, find_picture, load_picture, mixture,
                  normalise, read_examples, vqa_normal_form, vqa_punctuation, vqa_vocabulary)
from tokenizer import BPE

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden_vqa.json").read_text())


class Features:
    """A store whose picture in row i has the feature i."""
    def __init__(self, names):
        self.row = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self.features = np.arange(len(self.row), dtype=np.float16)[:, None, None] * np.ones((1, 36, 4), np.float16)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return BPE(tiny / "weights" / "bart-mini")


@pytest.fixture(scope="module")
def corpus(tiny, tokenizer):
    examples = read_examples(tiny / "datasets", "vqa", "karpathy_train")
    return Corpus("vqa", examples, tokenizer, Features(n for e in examples for n in e.pictures))


@pytest.fixture
def world(tiny, tmp_path):
    """A copy of the data sets to spoil."""
    shutil.copytree(tiny / "datasets", tmp_path / "datasets", ignore=shutil.ignore_patterns("features"))
    return tmp_path / "datasets"


# ---- VQAv2 and GQA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["norm"], ids=lambda case: repr(case["in"]))
def test_normal_form_is_the_official_one(case):
    assert vqa_punctuation(case["in"].strip()) == case["punct"]
    assert vqa_normal_form(case["in"]) == case["full"]


def test_an_answer_given_nine_times_may_be_learned(tmp_path):
    said = ["Two kites."] * 5 + ["2 kites"] * 4 + ["a dog"] * 8 + ["1,000"] * 9
    assert vqa_vocabulary(tmp_path, [{"multiple_choice_answer": a} for a in said]) == {"2 kites", "1000"}
    (tmp_path / "trainval_ans2label.json").write_text('{"": 0, "dog": 1}')
    assert vqa_vocabulary(tmp_path, []) == {"", "dog"}


def test_vqa_has_karpathys_parts_and_soft_scores(tiny):
    splits = {split: read_examples(tiny / "datasets", "vqa", split) for split in TASKS["vqa"].counts}
    assert {split: len(examples) for split, examples in splits.items()} == {
        "karpathy_train": 16 * 4, "karpathy_val": 6 * 4, "karpathy_test": 6 * 4}
    folders = {e.pictures[0].split("/")[2] for e in splits["karpathy_train"]}
    assert folders == {"train2014", "val2014"}, "restval belongs to training"
    for example in splits["karpathy_train"]:
        given = Counter(example.truth["answers"])
        assert all(weight == [0, 0.3, 0.6, 0.9, 1][min(4, given[answer])] for answer, weight in example.answers.items())
    assert any("yes" in e.answers for e in splits["karpathy_train"])


def test_gqa_joins_train_and_val(tiny):
    examples = read_examples(tiny / "datasets", "gqa", "train,val")
    assert len(examples) == (8 + 4) * 4 and len(read_examples(tiny / "datasets", "gqa", "testdev")) == 6 * 4
    one = examples[0]
    assert list(one.answers.values()) == [1.0] and one.truth["answer"] in one.answers and one.kind == "directShape"


def test_gqa_pictures_may_be_visual_genomes(tmp_path):
    path = tmp_path / "VG" / "VG_100K_2" / "7.jpg"
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_picture(tmp_path, "GQA/images/7.jpg") == path
    assert find_picture(tmp_path, "GQA/images/8.jpg") is None


# ---- batches ------------------------------------------------------------------------------------------------------


def test_a_batch_has_one_shape_and_says_what_was_asked(corpus, tokenizer):
    full, short = corpus.batch(np.arange(8), 8, seed=1), corpus.batch(np.arange(3), 8, seed=1)
    assert {name: x.shape for name, x in full.items()} == {name: x.shape for name, x in short.items()}
    assert full["ids"].shape == (8, 20) and full["features"].shape == (8, 1, 36, 4)
    assert tokenizer.decode(full["ids"][0].tolist()) == "vqa: " + corpus.examples[0].text
    answers = [tokenizer.decode([t for t in row if t != -100]) for row in full["labels"].tolist()]
    assert all(a in e.answers or (a == "" and not e.answers) for a, e in zip(answers, corpus.examples))
    assert all(f == corpus.store.row[e.pictures[0]] for f, e in zip(full["features"][:, 0, 0, 0], corpus.examples))


def test_rows_that_fill_up_do_not_count(corpus):
    """mean(weight x loss) over a filled batch is the mean over its real rows, whatever the losses are."""
    short = corpus.batch(np.arange(3), 8, seed=1)
    real = corpus.batch(np.arange(3), 3, seed=1)
    losses = torch.rand(8)
    assert torch.allclose((short["weights"] * losses).mean(), (real["weights"] * losses[:3]).mean())


def test_two_processes_share_a_batch(corpus):
    whole = corpus.batch(np.arange(5), 8, seed=4)
    halves = [corpus.batch(np.arange(5), 8, seed=4, part=slice(rank, None, 2)) for rank in (0, 1)]
    for name, x in whole.items():
        assert torch.equal(torch.stack([half[name] for half in halves], 1).flatten(0, 1), x)


def test_answers_are_drawn_in_proportion_to_their_scores():
    rng = random.Random(0)
    counts = Counter(draw([(0, 0.3), (1, 0.9)], rng) for _ in range(4000))
    assert abs(counts[1, 0.9] / 4000 - 0.75) < 0.03


def test_an_epoch_has_each_example_once_in_an_order_of_its_own(corpus):
    sizes = {"vqa": 10, "gqa": 7}
    first, again, other = (mixture({"vqa": corpus, "gqa": corpus}, sizes, 3, epoch) for epoch in (0, 0, 1))
    assert all(a == b and (x == y).all() for (a, x), (b, y) in zip(first, again))
    for task in sizes:
        seen = np.concatenate([indices for name, indices in first if name == task])
        assert sorted(seen) == list(range(len(corpus)))
        assert max(len(indices) for name, indices in first if name == task) == sizes[task]
    assert [name for name, _ in first] != [name for name, _ in other]


def test_batch_sizes_are_the_originals():
    assert [batch_size(task, 500) for task in ("vqa", "gqa")] == [500, 833]


# ---- pictures and the store ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "1"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.png" if mode in ("RGBA", "P", "1") else "x.jpg")
    Image.new("RGB", (50, 30), (255, 255, 255)).convert(mode).save(path)
    pixels = load_picture(path, 224)
    assert pixels.shape == (224, 224, 3) and pixels.min() > 250
    seen = normalise(torch.from_numpy(pixels)[None])
    assert torch.allclose(seen[0, :, 0, 0], (1 - torch.tensor(data.MEAN)) / torch.tensor(data.STD), atol=0.1)


def encode(pictures):
    """Stands in for CLIP: the mean colour, as 4 tokens of 3 channels."""
    return pictures.float().mean((1, 2))[:, None].expand(-1, 4, -1)


def some_pictures(folder, count):
    (folder / "S" / "images").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (2 * i, 0, 0)).save(folder / "S" / "images" / f"{i}.png")
    return [f"S/images/{i}.png" for i in range(count)]


def test_the_store_keeps_features_and_encodes_only_what_is_new(tmp_path):
    names, calls = some_pictures(tmp_path, 90), []
    def counting(pictures):
        calls.append(len(pictures))
        return encode(pictures)
    store = FeatureStore(tmp_path / "S" / "features" / "x", "hash", 4, 3)
    store.add(store.locate(tmp_path, names[:70]), counting, 8)
    store.add(store.locate(tmp_path, names), counting, 8)
    assert calls == [64, 6, 20]
    again = FeatureStore(tmp_path / "S" / "features" / "x", "hash", 4, 3)
    again.add(again.locate(tmp_path, names), lambda pictures: pytest.fail("encoded twice"), 8)
    assert [again.features[again.row[name], 0, 0] for name in names] == [2 * i for i in range(90)]


def test_a_store_whose_writer_was_killed_goes_on(tmp_path):
    names, folder = some_pictures(tmp_path, 10), tmp_path / "S" / "features" / "x"
    store = FeatureStore(folder, "hash", 4, 3)
    store.add(store.locate(tmp_path, names[:4]), encode, 8)
    with open(folder / "features.f16", "ab") as file:
        file.write(b"half a row")
    store = FeatureStore(folder, "hash", 4, 3)
    store.add(store.locate(tmp_path, names), encode, 8)
    assert [store.features[store.row[name], 0, 0] for name in names] == [2 * i for i in range(10)]


def test_a_store_of_another_encoder_is_refused(tmp_path):
    names, folder = some_pictures(tmp_path, 2), tmp_path / "S" / "features" / "x"
    store = FeatureStore(folder, "one", 4, 3)
    store.add(store.locate(tmp_path, names), encode, 8)
    with pytest.raises(DataError, match="features of another encoder"):
        FeatureStore(folder, "two", 4, 3)


def test_missing_pictures_stop_before_and_broken_ones_after_the_others(tmp_path):
    names, folder = some_pictures(tmp_path, 5), tmp_path / "S" / "features" / "x"
    store = FeatureStore(folder, "hash", 4, 3)
    with pytest.raises(DataError, match=r"1 of 6 pictures are missing .*nowhere.png"):
        store.locate(tmp_path, [*names, "S/images/nowhere.png"])
    assert not store.row
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:40])
    (tmp_path / names[3]).write_text("no picture")
    with pytest.raises(DataError, match=r"2 of 5 pictures are unreadable, the first: .*1.png is not a readable picture"):
        store.add(store.locate(tmp_path, names), encode, 8)
    assert len(FeatureStore(folder, "hash", 4, 3).row) == 3, "the others are kept"


# ---- bad files ----------------------------------------------------------------------------------------------------


def spoil(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


VAL = "vqa/v2_OpenEnded_mscoco_val2014_questions.json"
BAD_FILES = {
    "absent": (lambda w: (w / VAL).unlink(), "vqa", "val2014_questions.json is missing"),
    "no dataset_coco": (lambda w: (w / "COCO/dataset_coco.json").unlink(), "vqa", "dataset_coco.json is missing"),
    "truncated": (lambda w: (w / VAL).write_text((w / VAL).read_text()[:500]), "vqa", "truncated or not JSON"),
    "of another data set": (lambda w: shutil.copy(w / "GQA/val_balanced_questions.json", w / VAL), "vqa",
                            "of another data set: expected an object with a list 'questions'"),
    "without a field": (lambda w: spoil(w / VAL, lambda c: c["questions"][5].pop("image_id")), "vqa", "has no image_id"),
    "not matching": (lambda w: spoil(w / VAL, lambda c: c["questions"].pop()), "vqa", "do not match; question"),
    "of no objects": (lambda w: spoil(w / VAL, lambda c: c.update(questions=[1])), "vqa", "a record of 'questions' has no"),
    "gqa of another data set": (lambda w: shutil.copy(w / VAL, w / "GQA/val_balanced_questions.json"), "gqa", "is not GQA's"),
    "gqa empty": (lambda w: [(w / f"GQA/{p}_balanced_questions.json").write_text("{}") for p in ("train", "val")], "gqa",
                  "gqa has no examples for train,val"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_told_in_one_sentence(world, name):
    change, task, message = BAD_FILES[name]
    change(world)
    with pytest.raises(DataError) as problem:
        read_examples(world, task, TASKS[task].train)
    assert message in str(problem.value) and "\n" not in str(problem.value)


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
    assert "karpathy_train         64 examples (published: 605,102)" in said
    assert "28 pictures, 1 missing, 1 unreadable" in said and pictures[0].name in said and pictures[1].name in said
    assert "train_balanced_questions.json is missing" in said and "get it at https://cs.stanford.edu" in said
