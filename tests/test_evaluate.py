"""evaluate.py: scores are the official ones, and its commands say what they should."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from data import Example, read_examples
from data import report_problems
from evaluate import PROBLEMS, blind_answers, score_gqa, score_vqa, shuffle_pictures, vqa_accuracy

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden_vqa.json").read_text())


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


# ---- the commands, on a run -----------------------------------------------------------------------------------------


def command(module, monkeypatch, *words):
    """Runs a command in this process; gives its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, words)])
    try:
        report_problems(module.main, *PROBLEMS)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A short run of one adapter per task."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        assert 0 == command(train, patch, "--method", "adapter", "--share", "none", "--data", tiny / "datasets", "--weights",
                            tiny / "weights", "--backbone", "bart-mini", "--vision", "RN-mini", "--epochs", 1, "--batch", 16,
                            "--out", folder)
    return folder


def test_a_run_is_scored_predicted_and_shown(run, tiny, monkeypatch, capsys):
    assert command(evaluate, monkeypatch, run, "--split", "test") == 0
    assert "vqa" in capsys.readouterr().out
    asked = read_examples(tiny / "datasets", "gqa", "testdev")
    answers = json.loads((run / "predictions_gqa_test.json").read_text())
    assert [record["questionId"] for record in answers] == [e.id for e in asked]
    assert all(isinstance(record["prediction"], str) for record in answers)
    assert {type(record["question_id"]) for record in json.loads((run / "predictions_vqa_test.json").read_text())} == {int}
    page = (run / "predictions.html").read_text()
    assert page.count("<figure") == 48 and "data:image/jpeg;base64," in page


def test_the_blind_command_scores_the_commonest_answers(run, tiny, monkeypatch, capsys):
    assert command(evaluate, monkeypatch, run, "--tasks", "gqa", "--blind") == 0
    said = float(next(line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("gqa")))
    common = {}
    for e in read_examples(tiny / "datasets", "gqa", "train,val"):
        common.setdefault(e.kind, Counter())[e.truth["answer"]] += 1
    asked = read_examples(tiny / "datasets", "gqa", "testdev")
    right = [common[e.kind].most_common(1)[0][0] == e.truth["answer"] for e in asked]
    assert said == pytest.approx(100 * sum(right) / len(right), abs=0.01)


def test_a_picture_can_be_asked_about(run, tiny, monkeypatch, capsys):
    picture = next((tiny / "datasets/GQA/images").iterdir())
    assert command(evaluate, monkeypatch, run, "--image", picture, "--question", "How many stars are there?") == 0
    assert capsys.readouterr().out.endswith("\n")


def test_what_cannot_be_evaluated_is_told_in_one_sentence(run, tmp_path, monkeypatch, capsys):
    broken, other = tmp_path / "broken", tmp_path / "other"
    for folder in (broken, other):
        shutil.copytree(run, folder)
    (broken / "best.pt").write_bytes((run / "best.pt").read_bytes()[:2000])
    config = json.loads((other / "config.json").read_text())
    config["flags"]["share"] = "all"
    (other / "config.json").write_text(json.dumps(config))
    (tmp_path / "x.jpg").write_text("no picture")
    for words, message in [
            ((tmp_path,), "is not a run: it has no config.json"),
            ((broken,), "best.pt is truncated or not a saved run"),
            ((other,), "does not fit its config.json"),
            ((run, "--image", tmp_path / "x.jpg", "--question", "?"), "x.jpg is not a readable picture"),
            ((run, "--device", "nonsense"), "device 'nonsense' cannot be used"),
            ((run, "--tasks", "vqa,tennis"), "unknown task: 'tennis'; known are vqa, gqa"),
            ((run, "--image", tmp_path / "x.jpg"), "--image and --question go together")]:
        assert command(evaluate, monkeypatch, *words) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
