"""evaluate.py: scores are the official ones, and its commands say what they should."""

import json
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from data import Example, read_examples, report_problems
from evaluate import (PROBLEMS, bleu, blind_answers, cider, ptb_words, rouge_l, score_captions, score_choices, score_gqa,
                      score_nlvr, score_vqa, shuffle_pictures, vqa_accuracy)

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "golden_vqa.json").read_text())
TOKENS = [json.loads(line) for line in (FOLDER / "golden_ptb.jsonl").read_text(encoding="utf-8").splitlines()]
SCORES = json.loads((FOLDER / "golden_caption.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["acc"], ids=lambda case: repr(case["pred"]))
def test_vqa_accuracy_is_the_official_one(case):
    assert round(vqa_accuracy(case["pred"], case["gt"]), 2) == case["acc"]


def test_vqa_scores_by_type_of_answer():
    asked = [Example(1, (), "", {}, "", {"answers": ["2"] * 10, "type": "number"}),
             Example(2, (), "", {}, "", {"answers": ["yes"] * 7 + ["no"] * 3, "type": "yes/no"})]
    scores = score_vqa(asked, ["2", "no"])
    assert {name: round(value, 6) for name, value in scores.items()} == {"accuracy": 95, "number": 100, "yes/no": 90}


def test_gqa_scores_open_and_binary_questions():
    asked = [Example(i, (), "", {}, "", {"answer": a, "structural": s}) for i, (a, s) in enumerate(
        [("cat", "query"), ("dog", "query"), ("yes", "verify"), ("no", "logical"), ("left", "choose")])]
    scores = score_gqa(asked, ["cat", "Dog", "yes", "yes", "left"])
    assert scores == {"accuracy": 60, "binary": pytest.approx(200 / 3), "open": 50}


def test_blind_answers_are_the_commonest_of_their_kind():
    seen = [Example(0, (), "", {"red": 1.0}, "color")] * 3 + [Example(0, (), "", {"blue": 0.3, "red": 0.9}, "color"),
            Example(0, (), "", {"2": 1.0}, "count"), Example(0, (), "", {}, "empty")]
    asked = [Example(0, (), "", {}, kind) for kind in ("color", "count", "never seen", "empty")]
    assert blind_answers(seen, asked) == ["red", "2", "red", "red"]


def test_shuffling_gives_every_question_another_row():
    class Some:
        rows = np.arange(50)[:, None]
        def __len__(self):
            return 50
    corpus = Some()
    shuffle_pictures(corpus)
    assert (corpus.rows[:, 0] != np.arange(50)).all() and set(corpus.rows[:, 0]) == set(range(50))


def test_gqa_consistency_is_the_mean_over_right_answers_of_what_they_entail():
    def question(number, answer, balanced, *entailed):
        return Example(number, (), "", {}, "", {"answer": answer, "structural": "query", "balanced": balanced, "entailed": entailed})
    asked = [question("1", "cat", True, "1", "3", "4"), question("2", "dog", True, "3"), question("3", "yes", False),
             question("4", "no", False), question("5", "red", True)]
    scores = score_gqa(asked, ["cat", "cow", "yes", "yes", "red"])
    assert scores == {"accuracy": pytest.approx(200 / 3), "open": pytest.approx(200 / 3), "consistency": 50}


def test_nlvr2_consistency_is_a_naive_count():
    rng = random.Random(0)
    asked = [Example(f"dev-{s}-{pair}-{n}", (), "", {}, "", {"answer": rng.choice(["true", "false"])})
             for s in range(60) for pair in range(rng.randint(1, 4)) for n in range(2)]
    said = [e.truth["answer"] if rng.random() < 0.8 else "x" for e in asked]
    wrong = {(e.id.split("-")[1], e.id.split("-")[3]) for e, p in zip(asked, said) if p != e.truth["answer"]}
    groups = {(e.id.split("-")[1], e.id.split("-")[3]) for e in asked}
    scores = score_nlvr(asked, said)
    assert scores["consistency"] == pytest.approx(100 * (1 - len(wrong) / len(groups)))
    assert scores["accuracy"] == pytest.approx(100 * np.mean([p == e.truth["answer"] for e, p in zip(asked, said)]))


def test_choices_are_scored_per_show():
    asked = [Example(i, (), "", {}, "", {"answer": "a2", "show": show}) for i, show in enumerate(["House", "House", "Castle"])]
    assert score_choices(asked, ["a2", "a1", "a2"]) == {"accuracy": pytest.approx(200 / 3), "Castle": 100, "House": 50}


# ---- captions, against pycocoevalcap ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: repr(case["in"]))
def test_words_are_those_of_stanfords_tokenizer(case):
    assert ptb_words(case["in"]) == case["out"]


@pytest.mark.parametrize("text, words", [
    ("Foreman's here, isn't he? We cannot go.", "foreman 's here is n't he we can not go"),
    ("“Don’t,” he said ‘now’.", "do n't he said now"),
    ("DON'T WALK, IT'S RED!", "do n't walk it 's red"),
    ("Dr. J. Smith vs. the U.S. team, etc.", "dr. j. smith vs. the u.s. team etc."),
    ("Add 1 1/2 cups (350°F) for $2.50.", "add 1\xa01/2 cups -lrb- 350 ° f -rrb- for $ 2.50"),
    ("Bake no. 5, say no. Then 9 a.m. comes", "bake no. 5 say no then 9 a.m. comes"),
    ("He is ill. In Ill. he is", "he is ill in ill. he is"),
    ("a 5-6 foot -- 7.5-foot - well-lit", "a 5-6 foot 7.5-foot well-lit"),
    ("the “café” costs 5 😀", "the café costs 5"),
])
def test_words_where_captions_are_odd(text, words):
    """What Stanford's tokenizer said of each."""
    assert ptb_words(text) == words


@pytest.mark.parametrize("system", "AB")
def test_scores_are_the_official_ones(system):
    ids = sorted(SCORES["refs"])
    hypotheses = [ptb_words(SCORES[system]["hyp"][i]) for i in ids]
    references = [[ptb_words(text) for text in SCORES["refs"][i]] for i in ids]
    assert hypotheses == [SCORES[system]["tokenized"][i][0] for i in ids]
    assert references == [SCORES["refs_tokenized"][i] for i in ids]
    official = SCORES[system]["scores"]
    assert bleu(hypotheses, references) == pytest.approx(official["Bleu"], abs=1e-12)
    assert rouge_l(hypotheses, references) == pytest.approx(official["ROUGE_L"][0], abs=1e-12)
    assert cider(hypotheses, references) == pytest.approx(official["CIDEr"][0], abs=1e-12)


def test_perfect_captions_score_best():
    said = ["a red bus drives down the street", "two men cut a large pizza", "an empty kitchen with a stove"]
    assert bleu(said, [[text] for text in said]) == pytest.approx([1] * 4)
    assert rouge_l(said, [[text] for text in said]) == pytest.approx(1)
    assert cider(said, [[text] for text in said]) == pytest.approx(10)


def test_every_hypothesis_needs_its_references():
    for metric in (bleu, rouge_l, cider):
        with pytest.raises(ValueError):
            metric(["a dog", "a cat"], [["a dog"]])


def random_text(lot: random.Random, words: int) -> str:
    text = " ".join(lot.choice("a the dog cat runs red".split()) for _ in range(words))
    return text.replace(" ", "  ", 1) if lot.random() < 0.1 else text


def test_random_corpora_score_as_in_the_official_code():
    """Empty and equal hypotheses, empty references, single images and double spaces among them."""
    Bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu
    Rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge
    Cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider
    for seed in range(500):
        lot = random.Random(seed)
        references = [[random_text(lot, lot.randint(i == j == 0, 8)) for j in range(lot.randint(1, 4))]
                      for i in range(lot.randint(1, 5))]
        hypotheses = [lot.choice((random_text(lot, lot.randint(0, 8)), lot.choice(texts), "", "a dog runs"))
                      for texts in references]
        theirs = dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
        official = Bleu(4).compute_score(*theirs, verbose=0)[0]
        assert bleu(hypotheses, references) == pytest.approx(official, rel=1e-9, abs=1e-9)
        assert rouge_l(hypotheses, references) == pytest.approx(Rouge().compute_score(*theirs)[0], rel=1e-9, abs=1e-9)
        assert cider(hypotheses, references) == pytest.approx(Cider().compute_score(*theirs)[0], rel=1e-9, abs=1e-9)


def test_cider_of_one_picture_is_explained(capsys):
    alone = [Example(1, (), "", {}, "", {"references": ["A red star.", "A star."]})]
    evaluate.print_scores({"caption": score_captions(alone, ["A red star."])}, "test")
    assert "0.00" in (said := capsys.readouterr().out) and "of one picture alone it is always 0" in said


def test_values_captions_have_a_space_for_what_is_not_ascii():
    def moment(*texts):
        return Example(1, (), "", {}, "", {"references": texts})
    asked = [moment("a cafe here now", "x"), moment("two dogs run home")]
    assert score_captions(asked, ["a caf\u00e9 here now", "two dogs run home"], True)["BLEU-1"] < 100
    assert score_captions(asked, ["a\u00e9cafe here now", "two dogs run home"], True)["BLEU-1"] == pytest.approx(100)


# ---- the commands, on a run ---------------------------------------------------------------------------------------


def command(module, monkeypatch, *words):
    """Runs a command in this process; gives its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, words)])
    try:
        report_problems(module.main, *PROBLEMS)
    except SystemExit as end:
        return end.code
    return 0


def begin(tiny, folder, tasks):
    """A short run of one adapter per task."""
    with pytest.MonkeyPatch.context() as patch:
        assert 0 == command(train, patch, "--method", "adapter", "--share", "none", "--data", tiny / "datasets", "--weights",
                            tiny / "weights", "--backbone", "bart-mini", "--vision", "RN-mini", "--epochs", 1, "--batch", 16,
                            "--tasks", tasks, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return begin(tiny, tmp_path_factory.mktemp("runs") / "pictures", "vqa,gqa,nlvr,caption")


@pytest.fixture(scope="module")
def video_run(tiny, tmp_path_factory):
    return begin(tiny, tmp_path_factory.mktemp("runs") / "videos", "tvqa,how2qa,tvc,yc2c")


def test_a_run_is_scored_predicted_and_shown(run, tiny, monkeypatch, capsys):
    assert command(evaluate, monkeypatch, run, "--split", "test") == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("vqa", "consistency", "BLEU-4", "ROUGE-L"))
    asked = read_examples(tiny / "datasets", "gqa", "testdev_all")
    answers = json.loads((run / "predictions_gqa_test.json").read_text())
    assert [record["questionId"] for record in answers] == [e.id for e in asked]
    assert all(isinstance(record["prediction"], str) for record in answers)
    assert {type(record["question_id"]) for record in json.loads((run / "predictions_vqa_test.json").read_text())} == {int}
    page = (run / "predictions.html").read_text()
    assert page.count("<figure") == 24 + 48 + 6 + 6 and page.count("data:image/jpeg;base64,") == 24 + 48 + 2 * 6 + 6


def test_a_run_on_videos_is_scored_and_shown_with_frames(video_run, monkeypatch, capsys):
    assert command(evaluate, monkeypatch, video_run) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("tvqa", "Castle", "how2qa", "tvc", "yc2c"))
    page = (video_run / "predictions.html").read_text()
    assert page.count("<figure") == 3 * (3 + 3 + 1 + 1) and page.count("data:image/jpeg;base64,") > 2 * page.count("<figure")


def test_predictions_of_a_run_are_scored_as_it_was(run, video_run, monkeypatch, capsys):
    for folder, task, suffix in (run, "vqa", "json"), (run, "nlvr", "csv"), (run, "caption", "json"), (video_run, "tvc", "jsonl"):
        assert command(evaluate, monkeypatch, folder, "--tasks", task) == 0
        first = [line for line in capsys.readouterr().out.splitlines() if line.startswith(task)]
        assert command(evaluate, monkeypatch, folder, "--tasks", task, "--predictions", folder / f"predictions_{task}_validation.{suffix}") == 0
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(task)] == first


FIELDS = {  # of the official submissions, and how many answers the tiny world has
    "vqa_OpenEnded_mscoco_test2015_vladapter_results.json": ({"question_id": int, "answer": str}, 8),
    "gqa_submission_all.json": ({"questionId": str, "prediction": str}, 16),
    "captions_val2014_vladapter_results.json": ({"image_id": int, "caption": str}, 14),
    "captions_test2014_vladapter_results.json": ({"image_id": int, "caption": str}, 3),
    "tvc/tvc_val_predictions.jsonl": ({"vid_name": str, "ts": list, "clip_id": int, "descs": list}, 3),
    "tvc/tvc_test_predictions.jsonl": ({"vid_name": str, "ts": list, "clip_id": int, "descs": list}, 2),
    "yc2c/yc2c_val_predictions.jsonl": ({"video_id": str, "clip_id": int, "descs": list}, 3),
    "yc2c/yc2c_test_predictions.jsonl": ({"video_id": str, "clip_id": int, "descs": list}, 2),
}


def test_submissions_have_the_servers_fields_and_all_answers(run, video_run, tmp_path, monkeypatch):
    for folder in run, video_run:
        assert command(evaluate, monkeypatch, folder, "--submit", tmp_path) == 0
    for name, (fields, count) in FIELDS.items():
        text = (tmp_path / name).read_text()
        rows = json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))
        assert len(rows) == count, name
        assert all({key: type(value) for key, value in row.items()} == fields for row in rows), name
        assert all(row["descs"] == [{"desc": row["descs"][0]["desc"]}] for row in rows if "descs" in row), name
    statements = (tmp_path / "nlvr2_test1.csv").read_text().splitlines()
    assert len(statements) == 6 and all(re.fullmatch(r"test1-\d+-\d+-0,(True|False)", line) for line in statements)
    for name, count in ("tvqa/tvqa_val", 9), ("tvqa/tvqa_test", 6), ("how2qa/how2qa_val", 9), ("how2qa/how2qa_test_public", 6):
        chosen = json.loads((tmp_path / f"{name}_predictions.json").read_text())
        assert len(chosen) == count and all(key.isdecimal() and value in range(5) for key, value in chosen.items())


def test_the_blind_command_scores_the_commonest_answers(run, tiny, monkeypatch, capsys):
    assert command(evaluate, monkeypatch, run, "--tasks", "gqa", "--blind") == 0
    said = float(next(line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("gqa")))
    common = {}
    for e in read_examples(tiny / "datasets", "gqa", "train,val"):
        common.setdefault(e.kind, Counter())[e.truth["answer"]] += 1
    asked = read_examples(tiny / "datasets", "gqa", "testdev")
    right = [common[e.kind].most_common(1)[0][0] == e.truth["answer"] for e in asked]
    assert said == pytest.approx(100 * sum(right) / len(right), abs=0.01)


def test_pictures_pairs_and_videos_can_be_asked_about(run, video_run, tiny, monkeypatch, capsys):
    picture = next((tiny / "datasets/GQA/images").iterdir())
    video = next((tiny / "datasets/video/videos/tv").iterdir())
    for words in [(run, "--image", picture, "--question", "How many stars are there?"),
                  (run, "--tasks", "nlvr", "--image", picture, picture, "--question", "Both pictures show stars."),
                  (run, "--tasks", "caption", "--image", picture), (video_run, "--tasks", "tvc", "--video", video),
                  (video_run, "--video", video, "--question", "What is it?", "--choices", "a star|a ring", "--subtitles", "Hi.")]:
        for precision in "--no-bf16", "--bf16":
            assert command(evaluate, monkeypatch, *words, precision) == 0
            assert capsys.readouterr().out.endswith("\n")
    assert command(evaluate, monkeypatch, run, "--bf16", "--tasks", "vqa") == 0, "a whole split, too"


def test_what_cannot_be_evaluated_is_told_in_one_sentence(run, video_run, tiny, tmp_path, monkeypatch, capsys):
    broken, other, edited = folders = tmp_path / "broken", tmp_path / "other", tmp_path / "edited"
    for folder in folders:
        shutil.copytree(run, folder)
    (broken / "best.pt").write_bytes((run / "best.pt").read_bytes()[:2000])
    for folder, change in (other, {"share": "all"}), (edited, {"lr": "high"}):
        config = json.loads((run / "config.json").read_text())
        config["flags"] |= change
        (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "x.jpg").write_text("no picture")
    (tmp_path / "x.json").write_text("[1]")
    assert command(evaluate, monkeypatch, run, "--tasks", "vqa") == 0
    validation = run / "predictions_vqa_validation.json"
    capsys.readouterr()
    world = tmp_path / "world"
    shutil.copytree(tiny, world, ignore=shutil.ignore_patterns("features"))
    next((world / "datasets/COCO/images/test2015").iterdir()).unlink()
    picture = next((tiny / "datasets/GQA/images").iterdir())
    for words, message in [
            ((tmp_path,), "is not a run: it has no config.json"),
            ((broken,), "best.pt is truncated or not a saved run"),
            ((other,), "does not fit its config.json"),
            ((edited,), "config.json is not the config.json of a run: RunError(\"lr is 'high', expected float | int\")"),
            ((run, "--image", tmp_path / "x.jpg", "--question", "?"), "x.jpg is not a readable picture"),
            ((run, "--device", "nonsense"), "device 'nonsense' cannot be used"),
            ((run, "--tasks", "vqa,tennis"), "unknown task: 'tennis'; known are vqa, gqa"),
            ((run, "--image", picture), "vqa needs a --question"),
            ((run, "--tasks", "nlvr", "--image", picture, "--question", "?"), "nlvr needs two pictures, not 1"),
            ((run, "--video", picture, "--question", "?"), "vqa needs --image"),
            ((video_run, "--video", tmp_path / "x.jpg", "--question", "?"), "tvqa needs --choices"),
            ((video_run, "--tasks", "tvc", "--video", tmp_path / "x.jpg"), "x.jpg is empty, truncated or not a readable video"),
            ((run, "--tasks", "vqa", "--split", "test", "--predictions", validation),
             "for another split: it has no answer for 24 of 24 examples"),
            ((run, "--tasks", "vqa", "--predictions", tmp_path / "x.json"), "is no file of predictions for vqa"),
            ((run, "--predictions", validation), "choose one with --tasks: vqa, gqa"),
            ((run, "--data", world / "datasets", "--tasks", "vqa", "--submit", tmp_path / "s"), "1 of 2 pictures are missing")]:
        assert command(evaluate, monkeypatch, *words) == 2, words
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
    assert not (tmp_path / "s").exists(), "no part of a submission is written"
