"""data.py: the official files are read as their owners mean them, and batches are what they should be."""

import json
import random
import shutil
import sys
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (FPS, TASKS, Corpus, DataError, FeatureStore, batch_size, draw, find_files, fit_frames, load_features,
                  load_picture, load_video, mixture, normalise, read_examples, sample, vqa_normal_form, vqa_punctuation,
                  vqa_vocabulary)
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
        "karpathy_train": 16 * 4, "karpathy_val": 6 * 4, "karpathy_test": 6 * 4, "test2015": 2 * 4}
    folders = {e.pictures[0].split("_")[1] for e in splits["karpathy_train"]}
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
    assert find_files([tmp_path / "GQA" / "images", tmp_path / "VG"], ["7", "8"]) == {"7": path}


# ---- batches ------------------------------------------------------------------------------------------------------


def test_a_batch_has_one_shape_and_says_what_was_asked(corpus, tokenizer):
    full, short = corpus.batch(np.arange(8), 8, seed=1), corpus.batch(np.arange(3), 8, seed=1)
    for x in full, short:
        assert x.pop("ids_at").tolist() == (x["ids"].flatten() != tokenizer.pad).nonzero()[:, 0].tolist()
        assert x.pop("labels_at").tolist() == (x["labels"].flatten() != -100).nonzero()[:, 0].tolist()
    assert {name: x.shape for name, x in full.items()} == {name: x.shape for name, x in short.items()}
    assert full["ids"].shape == (8, max(map(len, corpus.text))) and full["features"].shape == (8, 1, 36, 4)
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
    del whole["ids_at"], whole["labels_at"]
    for name, x in whole.items():
        assert torch.equal(torch.stack([half[name] for half in halves], 1).flatten(0, 1), x)


def test_a_pinned_batch_is_the_same(corpus, monkeypatch):
    """In memory that only claims to be pinned: without a GPU there is no other."""
    own = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **more: own(*shape, **more))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    plain, pinned = (corpus.batch(np.arange(5), 8, seed=1, pin=pin) for pin in (False, True))
    assert plain.keys() == pinned.keys() and all(torch.equal(x, pinned[name]) for name, x in plain.items())


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


def mean_colour(loaded):
    """Stands in for CLIP: the mean colour, as 4 tokens of 3 channels."""
    return torch.from_numpy(np.stack(loaded)).float().mean((1, 2))[:, None].expand(-1, 4, -1)


def some_pictures(folder, count):
    for i in range(count):
        Image.new("RGB", (8, 8), (2 * i, 0, 0)).save(folder / f"{i}.png")
    return find_files([folder], map(str, range(count)))


def load(path):
    return load_picture(path, 8)


def test_the_store_keeps_features_and_encodes_only_what_is_new(tmp_path):
    paths, calls = some_pictures(tmp_path, 90), []
    def counting(loaded):
        calls.append(len(loaded))
        return mean_colour(loaded)
    store = FeatureStore(tmp_path / "features", "hash", 4, 3)
    first = dict(list(paths.items())[:70])
    store.add(first, load, counting)
    store.add({name: path for name, path in paths.items() if name not in store.row}, load, counting)
    assert calls == [64, 6, 20]
    again = FeatureStore(tmp_path / "features", "hash", 4, 3)
    assert [again.features[again.row[str(i)], 0, 0] for i in range(90)] == [2 * i for i in range(90)]


def test_a_store_whose_writer_was_killed_goes_on(tmp_path):
    paths, folder = some_pictures(tmp_path, 10), tmp_path / "features"
    store = FeatureStore(folder, "hash", 4, 3)
    store.add({name: paths[name] for name in "0123"}, load, mean_colour)
    with open(folder / "features.f16", "ab") as file:
        file.write(b"half a row")
    store = FeatureStore(folder, "hash", 4, 3)
    store.add({name: paths[name] for name in "456789"}, load, mean_colour)
    assert [store.features[store.row[str(i)], 0, 0] for i in range(10)] == [2 * i for i in range(10)]


def test_a_second_run_waits_for_the_first_and_takes_over_its_features(tmp_path):
    paths, folder = some_pictures(tmp_path, 6), tmp_path / "features"
    first, second = (FeatureStore(folder, "hash", 4, 3) for _ in range(2))
    backwards, calls = dict(sorted(paths.items(), reverse=True)), []
    other = threading.Thread(target=second.add, args=(backwards, load, lambda loaded: calls.append(len(loaded)) or mean_colour(loaded)))
    def meanwhile(loaded):
        other.start()
        other.join(0.2)
        assert other.is_alive() and not calls, "it waits"
        return mean_colour(loaded)
    first.add({name: paths[name] for name in "0123"}, load, meanwhile)
    other.join(10)
    assert calls == [2], "only what the first had not"
    for store in FeatureStore(folder, "hash", 4, 3), second:
        assert [store.features[store.row[str(i)], 0, 0] for i in range(6)] == [2 * i for i in range(6)]


def test_a_store_of_another_encoder_is_refused(tmp_path):
    FeatureStore(tmp_path / "features", "one", 4, 3).add(some_pictures(tmp_path, 2), load, mean_colour)
    with pytest.raises(DataError, match="features of another encoder"):
        FeatureStore(tmp_path / "features", "two", 4, 3)


def test_broken_pictures_are_told_after_the_others_are_kept(tmp_path):
    paths = some_pictures(tmp_path, 5)
    paths["1"].write_bytes(paths["1"].read_bytes()[:40])
    paths["3"].write_text("no picture")
    broken = FeatureStore(tmp_path / "features", "hash", 4, 3).add(paths, load, mean_colour)
    assert sorted(str(x).partition(" is not a readable picture")[0][-5:] for x in broken) == ["1.png", "3.png"]
    assert set(FeatureStore(tmp_path / "features", "hash", 4, 3).row) == {"0", "2", "4"}


# ---- the other readers, on files as their owners publish them -----------------------------------------------------


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(*rows):
    """JSON lines with a blank one, the last without its newline, as some of the official files are."""
    return "\n\n".join(map(json.dumps, rows))


def test_nlvr2_has_two_pictures_named_by_the_identifier(tmp_path):
    row = {"identifier": "train-17-2-0", "sentence": "One image shows exactly two cups.", "label": "False", "directory": 67,
           "left_url": "http://a", "right_url": "http://b", "writer": "9", "validation": {"4": "False"}}
    write(tmp_path / "nlvr/train.json", lines(row, row | {"identifier": "train-17-3-0", "label": "True"}))
    one, two = read_examples(tmp_path, "nlvr", "train")
    assert one.pictures == ("train-17-2-img0", "train-17-2-img1") and two.pictures[1] == "train-17-3-img1"
    assert (one.text, one.answers, two.answers) == ("One image shows exactly two cups.", {"false": 1.0}, {"true": 1.0})
    for place in ("train/67", "train", "."):                            # numbered folders, flat ones, and one for all
        file = tmp_path / place / "nlvr/images" / place / "train-17-2-img0.png"
        write(file, "")
        assert find_files([tmp_path / place / "nlvr/images"], one.pictures) == {"train-17-2-img0": file}


def test_a_png_that_is_none_is_opened_by_its_content(tmp_path):
    Image.new("RGB", (9, 9), (200, 0, 0)).save(tmp_path / "x.png", "GIF")
    assert load_picture(tmp_path / "x.png", 4)[0, 0, 0] == 200


def test_captions_are_examples_in_training_and_references_elsewhere(tmp_path):
    def image(number, split, *texts):
        return {"filepath": "val2014", "filename": f"COCO_val2014_{number:012d}.jpg", "cocoid": number, "imgid": 0, "split": split,
                "sentences": [{"raw": text, "tokens": [], "sentid": 10 * number + i} for i, text in enumerate(texts)]}
    write(tmp_path / "COCO/dataset_coco.json", {"dataset": "coco", "images": [
        image(1, "restval", " A boy flies a kite. ", "A kite."), image(2, "val", "Cups.", "Two cups."), image(3, "test", "A")]})
    write(tmp_path / "COCO/image_info_test2014.json", {"images": [{"id": 7, "file_name": "COCO_test2014_000000000007.jpg"}]})
    trained = read_examples(tmp_path, "caption", "karpathy_train")
    assert [e.answers for e in trained] == [{"A boy flies a kite.": 1.0}, {"A kite.": 1.0}]
    assert {e.pictures for e in trained} == {("COCO_val2014_000000000001",)}
    val, = read_examples(tmp_path, "caption", "karpathy_val")
    assert (val.id, val.text, val.truth["references"]) == (2, "", ["Cups.", "Two cups."])
    assert [e.id for e in read_examples(tmp_path, "caption", "val2014")] == [1, 2, 3]
    assert [e.pictures for e in read_examples(tmp_path, "caption", "test2014")] == [("COCO_test2014_000000000007",)]


@pytest.fixture
def value(tmp_path):
    """VALUE's layout with its oddities: a NaN moment, stray spaces, names that are no numbers, missing subtitles."""
    ann = tmp_path / "video/ann"
    write(ann / "tv_subtitles.jsonl", lines(
        {"vid_name": "s02e03_seg01_clip_04", "sub": [{"text": "Hi.", "start": 0.3, "end": 1.2}, {"text": " Ann! ", "start": 2}]},
        {"vid_name": "friends_s01e01_seg01_clip_00", "sub": []}))
    asked = {"qid": 901, "q": "What does Ann hold?", "a0": "A cup.", "a1": "A book", "a2": "Her keys ", "a3": "Nothing.",
             "a4": "A hat", "answer_idx": 2, "ts": "10.2-15.07", "vid_name": "s02e03_seg01_clip_04", "show_name": "Castle"}
    write(ann / "tvqa/tvqa_val.jsonl", lines(
        asked, asked | {"qid": 902, "ts": "NaN-NaN", "vid_name": "friends_s01e01_seg01_clip_00"}, asked | {"qid": 903, "vid_name": "x"}))
    write(ann / "tvqa/tvqa_test_release.jsonl", lines({k: v for k, v in asked.items() if k != "answer_idx"}))
    write(ann / "how2_subtitles.jsonl", "")
    write(ann / "how2qa/how2qa_val_release.jsonl", lines(
        {"vid_name": "e_367c", "ts": "3.1-9.87", "qid": 1, "q": "Why?", "a0": "a", "a1": "b", "a2": "c", "a3": "d", "answer_idx": 3}))
    clip = {"vid_name": "s02e03_seg01_clip_04", "duration": 88.4, "ts": [12.0, 17.55], "clip_id": 501}
    told = [{"desc": f"Kate does {i}. ", "desc_id": 10 + i, "type": "v", "from_retrieval": False} for i in range(4)]
    write(ann / "tvc/tvc_train_release.jsonl", lines(clip | {"descs": told[:2]}))
    write(ann / "tvc/tvc_val_release.jsonl", lines(clip | {"descs": told}))
    write(ann / "tvc/tvc_test_release.jsonl", lines(clip))
    write(ann / "yc2_subtitles.jsonl", "")
    write(ann / "yc2c/yc2c_val_release.jsonl", lines({"vid_name": "abCdEf-1_23_4", "clip_id": 13001, "duration": 12,
                                                      "descs": [{"desc": "add salt", "desc_id": 1}]}))
    return tmp_path


def test_videos_are_asked_about_in_the_originals_words(value, tokenizer):
    one, nan, silent = read_examples(value, "tvqa", "val")
    text = tokenizer.decode(data.text_ids(tokenizer, "tvqa", one))
    assert text == ("[Subs] Hi. Ann! [Q] What does Ann hold? [TS] (10.2-15.07) [Choices] a0: A cup. a1: A book. a2: Her keys. "
                    "a3: Nothing. a4: A hat. tvqa: ")
    assert (one.answers, one.truth) == ({"a2": 1.0}, {"answer": "a2", "show": "Castle"})
    assert "[TS] (NaN-NaN)" in nan.text and nan.subtitles == "" == silent.subtitles
    assert read_examples(value, "tvqa", "test_release")[0].answers == {}
    how, = read_examples(value, "how2qa", "val_release")
    assert how.pictures == ("e_367c",) and how.answers == {"a3": 1.0} and "a4:" not in how.text


def test_moments_have_four_references_and_whole_videos(value, tokenizer):
    assert [e.answers for e in read_examples(value, "tvc", "train_release")] == [{"Kate does 0.": 1.0}, {"Kate does 1.": 1.0}]
    clip, = read_examples(value, "tvc", "val_release")
    assert clip.id == 501 and len(clip.truth["references"]) == 4
    assert tokenizer.decode(data.text_ids(tokenizer, "tvc", clip)) == "[Subs] Hi. Ann! [TS] ([12.0, 17.55]) tvc: "
    assert read_examples(value, "tvc", "test_release")[0].truth["references"] == []
    recipe, = read_examples(value, "yc2c", "val_release")
    assert tokenizer.decode(data.text_ids(tokenizer, "yc2c", recipe)) == "[Subs] yc2c: " and recipe.pictures == ("abCdEf-1_23_4",)


def test_of_a_long_text_the_subtitles_are_cut(tokenizer):
    example = data.Example(1, ("x",), data.choose_from("Who?", "0-1", ["Ann", "Bob"]), {}, subtitles="so it is " * 500)
    ids = data.text_ids(tokenizer, "tvqa", example)
    assert len(ids) == 600 and ids[-1] == tokenizer.end
    text = tokenizer.decode(ids)
    assert text.startswith("[Subs] so it is so") and text.endswith(" [Q] Who? [TS] (0-1) [Choices] a0: Ann. a1: Bob. tvqa: ")


def test_vl_t5s_lists_are_read_in_the_place_of_the_official_files(tmp_path):
    write(tmp_path / "vqa/karpathy_val.json", [{"question_id": 42003, "img_id": "COCO_val2014_000000000042", "sent": "What?",
          "question_type": "what", "answer_type": "other", "label": {"kite": 1.0, "toy": 0.3}, "answers": [{"answer": "kite"}] * 10}])
    write(tmp_path / "GQA/train.json", [{"question_id": "071", "img_id": "23", "sent": "Is it?", "label": {"yes": 1.0}}])
    write(tmp_path / "GQA/valid.json", [{"question_id": "072", "img_id": "n24", "sent": "Is it?", "label": {"no": 1.0}}])
    write(tmp_path / "nlvr/valid.json", [{"identifier": "dev-1-0-0", "img0": "dev-1-0-img0", "img1": "dev-1-0-img1", "label": 1,
                                          "sent": "Cups.", "uid": "nlvr2_valid_0"}])
    vqa, = read_examples(tmp_path, "vqa", "karpathy_val")
    assert (vqa.pictures, vqa.answers, len(vqa.truth["answers"])) == (("COCO_val2014_000000000042",), {"kite": 1.0, "toy": 0.3}, 10)
    assert [(e.id, e.pictures, e.truth["answer"]) for e in read_examples(tmp_path, "gqa", "train,val")] == [
        ("071", ("23",), "yes"), ("072", ("n24",), "no")]
    nlvr, = read_examples(tmp_path, "nlvr", "dev")
    assert (nlvr.pictures, nlvr.answers) == (("dev-1-0-img0", "dev-1-0-img1"), {"true": 1.0})


def test_caption_weights_make_the_mean_over_tokens(tiny, tokenizer):
    examples = read_examples(tiny / "datasets", "caption", "karpathy_train")
    corpus = Corpus("caption", examples, tokenizer, Features(n for e in examples for n in e.pictures))
    batch = corpus.batch(np.arange(5), 8, seed=1)
    real = batch["labels"] != -100
    losses = torch.rand(real.shape) * real
    ours = (batch["weights"] * losses.sum(1) / real.sum(1)).mean()
    assert torch.allclose(ours, losses[:5].sum() / real[:5].sum())


# ---- videos -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads((Path(__file__).parent / "golden" / "golden_fps.json").read_text())["cases"],
                         ids=lambda case: case["rate"])
def test_frames_are_picked_as_ffmpegs_filter_picks_them(case):
    step = 1 / Fraction(case["rate"])                       # the files were Matroska, which keeps milliseconds
    frames = [(Fraction(round(1000 * i * step), 1000), step, i) for i in range(case["frames"])]
    assert list(sample(frames, FPS)) == case["picks"]


def make_video(path, times, codec="mpeg4", size=(64, 48), audio=False, **options):
    """A video whose i-th frame, at times[i] in milliseconds, is as grey as i."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, 1000)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), i % 250, np.uint8), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def filtered(path):
    """How grey the frames are that PyAV's own filter graph keeps; the ffmpeg program lets a file begin at 0."""
    with av.open(str(path)) as container:
        stream, graph, kept = container.streams.video[0], av.filter.Graph(), []
        start = round(container.start_time / av.time_base / stream.time_base)
        source = graph.add_buffer(template=stream)
        fps, sink = graph.add("fps", "2/3"), graph.add("buffersink")
        source.link_to(fps)
        fps.link_to(sink)
        graph.configure()
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


RNG = random.Random(3)
RATES = {str(rate): [round(1000 * i / rate) for i in range(max(4, int(12 * rate)))] for rate in (60, 30, 29.97, 25, 23.976, 15, 8, 3, 1, 0.5)}
RATES |= {f"variable {k}": sorted(RNG.sample(range(0, 12000), 90)) for k in range(3)}
RATES |= {"from 0.7 s on": [700 + 40 * i for i in range(300)], "with a gap": [40 * i for i in range(60)] + [9000 + 40 * i for i in range(60)]}


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("name", RATES)
def test_frames_of_files_are_those_of_pyavs_filter(tmp_path, name, suffix):
    path = make_video(tmp_path / f"x.{suffix}", RATES[name])
    ours = [int(frame.mean()) for frame in load_video(path, 32)]
    theirs = filtered(path)
    assert len(ours) == len(theirs) and np.abs(np.subtract(ours, theirs)).max() <= 20, (ours, theirs)


@pytest.mark.parametrize("name", ["{:05d}.jpg", "{}.jpg"])
def test_frames_of_tvqa_are_a_folder_at_three_a_second(tmp_path, name):
    (tmp_path / "._1.jpg").write_text("what a Mac leaves behind")
    for i in range(30):
        Image.new("RGB", (40, 20), (8 * i, 0, 0)).save(tmp_path / name.format(i + 1))
    assert [round(int(frame[0, 0, 0]) / 8) for frame in load_video(tmp_path, 16)] == [2, 6, 11, 15, 20, 24, 29]


def test_frames_are_scaled_and_cropped_not_squeezed(tmp_path):
    picture = np.zeros((50, 100, 3), np.uint8)
    picture[:, 25:75] = 255                                              # the square in the middle is white
    Image.fromarray(picture).save(tmp_path / "1.png")
    assert load_video(tmp_path, 32)[0, :, 1:-1].min() > 200


def test_64_frames_by_zeros_or_by_the_greatest(tmp_path):
    x = torch.randn(150, 5)
    assert torch.equal(fit_frames(x[:64]), x[:64])
    assert torch.equal(fit_frames(x[:10])[:10], x[:10]) and not fit_frames(x[:10])[10:].any()
    naive = [x[i * 150 // 64:-(-(i + 1) * 150 // 64)].max(0).values for i in range(64)]
    assert torch.equal(fit_frames(x), torch.stack(naive))
    recorded = np.load(Path(__file__).parent / "golden" / "downsample.npz")
    for name in (key for key in recorded if key.startswith("resize/in_")):
        ours = fit_frames(torch.from_numpy(recorded[name]).squeeze())
        assert torch.allclose(ours, torch.from_numpy(recorded[name.replace("in_", "out_")]).squeeze()), name


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
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def cut(path, share):
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


TEN_SECONDS = [40 * i for i in range(250)]
BAD_VIDEOS = {
    "empty": (lambda p: p.write_bytes(b""), "mp4", "is empty, truncated or not a readable video"),
    "no video": (lambda p: p.write_text("no video"), "mp4", "is empty, truncated or not a readable video"),
    "without its index": (lambda p: cut(make_video(p, TEN_SECONDS), 0.6), "mp4", "is empty, truncated or not a readable video"),
    "cut short, mp4": (lambda p: cut(make_video(p, TEN_SECONDS, options={"movflags": "faststart"}), 0.6), "mp4", "truncated"),
    "cut short, mkv": (lambda p: cut(make_video(p, TEN_SECONDS), 0.6), "mkv", "is truncated"),
    "audio only": (audio_only, "mp4", "has no pictures, only audio"),
    "a wrong time stamp": (lambda p: make_video(p, [0, 40, 80, 10 ** 9], "ffv1"), "mkv", "has a time stamp of 1,000,000 seconds"),
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
    path = tmp_path / "x.h264"                                          # a bare stream, whose frames have no times
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", 25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(250):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), i, np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    assert np.abs([int(f.mean()) - k for f, k in zip(load_video(path, 32), [18, 56, 93, 131, 168, 206, 243])]).max() < 5


def test_a_cut_that_hides_frames_is_not_taken_for_truncated(tmp_path):
    """Two seconds cut out by copying packets: more are in the file than its edit list shows."""
    with av.open(str(make_video(tmp_path / "whole.mp4", TEN_SECONDS))) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        whole.seek(4_000_000)
        for packet in whole.demux(video=0):
            if packet.dts is not None and packet.pts * packet.time_base < 6:
                packet.pts, packet.dts = packet.pts - round(4 / packet.time_base), packet.dts - round(4 / packet.time_base)
                packet.stream = stream
                cut.mux(packet)
    assert len(load_video(tmp_path / "cut.mp4", 32)) >= 1


def test_pictures_behind_links_are_found(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "7.jpg").touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train2014").symlink_to(tmp_path / "elsewhere")
    assert find_files([tmp_path / "images"], ["7"]) == {"7": tmp_path / "images" / "train2014" / "7.jpg"}


def test_a_short_video_has_a_frame(tmp_path):
    assert len(load_video(make_video(tmp_path / "x.mkv", [0, 40, 80]), 32)) >= 1


# ---- bad files ----------------------------------------------------------------------------------------------------


def spoil(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def spoil_line(path, **fields):
    """Changes fields of the last of JSON lines."""
    *rows, last = path.read_text().splitlines()
    path.write_text("\n".join([*rows, json.dumps(json.loads(last) | fields)]))


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
    "line not JSON": (lambda w: (w / "nlvr/train.json").write_text('{"identifier": "a"}\n{"ident'), "nlvr",
                      "train.json, line 2 is truncated or not JSON"),
    "nlvr2 of another data set": (lambda w: shutil.copy(w / VAL, w / "nlvr/train.json"), "nlvr", "a record has no identifier"),
    "label unknown": (lambda w: spoil_line(w / "nlvr/train.json", label="maybe"), "nlvr", "should have a sentence and a label True or False"),
    "the same id twice": (lambda w: spoil_line(w / "nlvr/train.json", identifier="train-0-0-0"), "nlvr",
                          "has the id train-0-0-0 2 times"),
    "caption without text": (lambda w: spoil(w / "COCO/dataset_coco.json", lambda c: c["images"][0]["sentences"][0].pop("raw")),
                             "caption", "a record of caption's karpathy_train"),
    "an answer's number that is none": (lambda w: spoil_line(w / "video/ann/tvqa/tvqa_train.jsonl", answer_idx=7), "tvqa",
                                        "has the answer_idx 7, not one of its answers"),
    "no descriptions": (lambda w: spoil_line(w / "video/ann/tvc/tvc_train_release.jsonl", descs=[]), "tvc", "has no descriptions"),
    "a question that is no text": (lambda w: spoil(w / VAL, lambda c: [q.update(question=5) for q in c["questions"]]), "vqa",
                                   "has something else where a text or a weight should be"),
    "a question twice": (lambda w: spoil(w / VAL, lambda c: c["questions"].append(c["questions"][0])), "vqa", "1 question_ids twice"),
    "nested without end": (lambda w: (w / VAL).write_text("[" * 100_000), "vqa", "truncated or not JSON"),
    "subtitles missing": (lambda w: (w / "video/ann/tv_subtitles.jsonl").unlink(), "tvqa", "tv_subtitles.jsonl is missing"),
    "an answer missing": (lambda w: spoil_line(w / "video/ann/tvqa/tvqa_train.jsonl", a4=None), "tvqa", "a record of tvqa's train"),
    "gqa of another data set": (lambda w: shutil.copy(w / VAL, w / "GQA/val_balanced_questions.json"), "gqa", "is not GQA's"),
    "gqa empty": (lambda w: [(w / f"GQA/{p}_balanced_questions.json").write_text("{}") for p in ("train", "val")], "gqa",
                  "gqa's train,val below"),
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
    assert "karpathy_train             64 examples (published: 605,102)" in said
    assert "28 pictures, 1 missing, 1 unreadable" in said and pictures[0].stem in said and pictures[1].name in said
    assert "train_balanced_questions.json is missing" in said and "get it at https://cs.stanford.edu" in said
