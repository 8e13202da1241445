"""evaluate.py: scores are the official ones, and its commands say what they should."""

import argparse
import ast
import doctest
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from data import TASKS, Example, read_examples, report_problems
from evaluate import (METRICS, PROBLEMS, Run, RunError, bleu, blind_answers, card, cider,
                      read_predictions, rouge_l, score_captions, score_choices, score_gqa,
                      score_nlvr, score_vqa, shuffle_pictures, vqa_accuracy)
from tokenizer import load_tokenizer, ptb_words, vqa_normal_form

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "golden_vqa.json").read_text())
SCORES = json.loads((FOLDER / "golden_caption.json").read_text(encoding="utf-8"))


def example(number, truth: dict, kind: str = "", answers: dict | None = None) -> Example:
    return Example(id=number, pictures=(), text="", answers=answers or {}, kind=kind, truth=truth)


def test_the_examples_in_docstrings_are_true():
    result = doctest.testmod(evaluate)
    assert result.attempted > 0 and result.failed == 0


# ---- questions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["acc"], ids=lambda case: repr(case["pred"]))
def test_vqa_accuracy_is_the_official_one(case):
    assert round(vqa_accuracy(case["pred"], case["gt"], vqa_normal_form), 2) == case["acc"]


def test_vqa_scores_by_type_of_answer():
    asked = [example(1, {"answers": ["2"] * 10, "type": "number"}),
             example(2, {"answers": ["yes"] * 7 + ["no"] * 3, "type": "yes/no"})]
    scores = {name: round(value, 6) for name, value in score_vqa(asked, ["2", "no"]).items()}
    assert scores == {"accuracy": 95, "number": 100, "yes/no": 90}


def test_gqa_scores_open_and_binary_questions():
    truths = [("cat", "query"), ("dog", "query"), ("yes", "verify"), ("no", "logical"),
              ("left", "choose")]
    asked = [example(i, {"answer": answer, "structural": kind})
             for i, (answer, kind) in enumerate(truths)]
    scores = score_gqa(asked, ["cat", "Dog", "yes", "yes", "left"])
    assert scores == {"accuracy": 60, "binary": pytest.approx(200 / 3), "open": 50}


def test_gqa_consistency_is_the_mean_over_right_answers_of_what_they_entail():
    def question(number, answer, balanced, *entailed):
        return example(number, {"answer": answer, "structural": "query", "balanced": balanced,
                                "entailed": entailed})

    asked = [question("1", "cat", True, "1", "3", "4"), question("2", "dog", True, "3"),
             question("3", "yes", False), question("4", "no", False), question("5", "red", True)]
    scores = score_gqa(asked, ["cat", "cow", "yes", "yes", "red"])
    two_thirds = pytest.approx(200 / 3)
    assert scores == {"accuracy": two_thirds, "open": two_thirds, "consistency": 50}


def test_nlvr2_consistency_is_a_naive_count():
    rng = random.Random(0)
    asked = [example(f"dev-{s}-{pair}-{n}", {"answer": rng.choice(["true", "false"])})
             for s in range(60) for pair in range(rng.randint(1, 4)) for n in range(2)]
    said = [e.truth["answer"] if rng.random() < 0.8 else "x" for e in asked]
    statements = [(e.id.split("-")[1], e.id.split("-")[3]) for e in asked]
    right = [p == e.truth["answer"] for e, p in zip(asked, said)]
    wrong = {statement for statement, good in zip(statements, right) if not good}
    scores = score_nlvr(asked, said)
    assert scores["consistency"] == pytest.approx(100 * (1 - len(wrong) / len(set(statements))))
    assert scores["accuracy"] == pytest.approx(100 * np.mean(right))


def test_choices_are_scored_per_show():
    asked = [example(i, {"answer": "a2", "show": show})
             for i, show in enumerate(["House", "House", "Castle"])]
    scores = score_choices(asked, ["a2", "a1", "a2"])
    assert scores == {"accuracy": pytest.approx(200 / 3), "Castle": 100, "House": 50}


def test_blind_answers_are_the_commonest_of_their_kind():
    seen = [example(0, {}, "color", {"red": 1.0})] * 3
    seen += [example(0, {}, "color", {"blue": 0.3, "red": 0.9}),
             example(0, {}, "count", {"2": 1.0}), example(0, {}, "empty", {})]
    asked = [example(0, {}, kind) for kind in ("color", "count", "never seen", "empty")]
    assert blind_answers(seen, asked) == ["red", "2", "red", "red"]


def test_shuffling_gives_every_question_another_row():
    class Some:
        rows = np.arange(50)[:, None]

        def __len__(self):
            return 50

    corpus = Some()
    shuffle_pictures(corpus)
    assert (corpus.rows[:, 0] != np.arange(50)).all()
    assert set(corpus.rows[:, 0]) == set(range(50))


# ---- captions, against pycocoevalcap -----------------------------------------------------------


def golden_captions(system: str) -> tuple[list[str], list[list[str]], list[float]]:
    """Hypotheses and references in words; the official BLEU-1 to BLEU-4, ROUGE-L and CIDEr."""
    ids = sorted(SCORES["refs"])
    hypotheses = [ptb_words(SCORES[system]["hyp"][i]) for i in ids]
    references = [[ptb_words(text) for text in SCORES["refs"][i]] for i in ids]
    assert hypotheses == [SCORES[system]["tokenized"][i][0] for i in ids]
    assert references == [SCORES["refs_tokenized"][i] for i in ids]
    official = SCORES[system]["scores"]
    return hypotheses, references, [*official["Bleu"], official["ROUGE_L"][0], official["CIDEr"][0]]


@pytest.mark.parametrize("system", "AB")
def test_scores_are_the_official_ones(system):
    hypotheses, references, official = golden_captions(system)
    ours = [*bleu(hypotheses, references), rouge_l(hypotheses, references),
            cider(hypotheses, references)]
    assert ours == pytest.approx(official, abs=1e-12)


COPIED = """
import json, sys
asked = json.load(sys.stdin)
forms = asked["forms"]
accuracies = [vqa_accuracy(pred, answers, forms.__getitem__) for pred, answers in asked["vqa"]]
captions = [[*bleu(*texts), rouge_l(*texts), cider(*texts)] for texts in asked["captions"]]
json.dump([accuracies, captions, sorted(sys.modules)], sys.stdout)
"""


def test_the_metrics_run_on_their_own_when_they_are_copied(tmp_path):
    """The fenced lines, the standard library's imports, and no project or site-packages to find."""
    source = Path(evaluate.__file__).read_text(encoding="utf-8")
    fence = r"# ---- metrics: strings in, numbers out; copy from here -+\n.*\n# ---- to here -+\n"
    chapter, = re.findall(fence, source, re.DOTALL)
    imports = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            if module.split(".")[0] in sys.stdlib_module_names:
                imports.append(ast.unparse(node))
    copied = tmp_path / "metrics.py"
    copied.write_text("\n".join([*imports, chapter, COPIED]), encoding="utf-8")

    texts = {text for case in GOLDEN["acc"] for text in (case["pred"], *case["gt"])}
    golden = {system: golden_captions(system) for system in "AB"}
    asked = {"forms": {text: vqa_normal_form(text) for text in texts},
             "vqa": [(case["pred"], case["gt"]) for case in GOLDEN["acc"]],
             "captions": [golden[system][:2] for system in "AB"]}
    (tmp_path / "empty").mkdir()
    said = subprocess.run([sys.executable, "-I", "-S", copied], input=json.dumps(asked), text=True,
                          capture_output=True, check=True, cwd=tmp_path / "empty").stdout
    accuracies, captions, modules = json.loads(said)
    assert [round(value, 2) for value in accuracies] == [case["acc"] for case in GOLDEN["acc"]]
    for system, scores in zip("AB", captions):
        assert scores == pytest.approx(golden[system][2], abs=1e-12)
    assert not {"torch", "numpy", "tokenizer", "data"} & set(modules)


def test_perfect_captions_score_best():
    said = ["a red bus drives down the street", "two men cut a large pizza",
            "an empty kitchen with a stove"]
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
    """Empty and equal hypotheses, empty references, single images, double spaces among them."""
    Bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu
    Rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge
    Cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider
    for seed in range(500):
        lot = random.Random(seed)
        references = [[random_text(lot, lot.randint(i == j == 0, 8))
                       for j in range(lot.randint(1, 4))] for i in range(lot.randint(1, 5))]
        hypotheses = [lot.choice((random_text(lot, lot.randint(0, 8)), lot.choice(texts), "",
                                  "a dog runs")) for texts in references]
        theirs = dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
        official = [*Bleu(4).compute_score(*theirs, verbose=0)[0],
                    Rouge().compute_score(*theirs)[0], Cider().compute_score(*theirs)[0]]
        ours = [*bleu(hypotheses, references), rouge_l(hypotheses, references),
                cider(hypotheses, references)]
        assert ours == pytest.approx(official, rel=1e-9, abs=1e-9)


def test_cider_of_one_picture_is_explained(capsys):
    alone = [example(1, {"references": ["A red star.", "A star."]})]
    evaluate.print_scores({"caption": score_captions(alone, ["A red star."])}, "test")
    said = capsys.readouterr().out
    assert "0.00" in said and "of one picture alone it is always 0" in said


def test_values_captions_have_a_space_for_what_is_not_ascii():
    asked = [example(1, {"references": ["a cafe here now", "x"]}),
             example(2, {"references": ["two dogs run home"]})]

    def bleu_1(first: str) -> float:
        return score_captions(asked, [first, "two dogs run home"], ascii_only=True)["BLEU-1"]

    assert bleu_1("a caf\u00e9 here now") < 100
    assert bleu_1("a\u00e9cafe here now") == pytest.approx(100)


# ---- a run is its flags ------------------------------------------------------------------------

COMPLETE = dict(data="datasets", weights="weights", backbone="bart-base", vision="RN101", epochs=20,
                batch=500, lr=1e-3, bf16=False, compile=False)


def test_the_flags_are_read_from_the_fields_of_a_run():
    parser = argparse.ArgumentParser()
    Run.add_flags(parser)
    assert set(vars(parser.parse_args([])).values()) == {None}
    words = ("--tasks nlvr,vqa --sizes reduction=4,shared_phm_rule=true --sites ffn,encoder "
             "--lr 0.1 --batch 3 --no-prompts --bf16 --sharing half --allow-missing").split()
    parsed = vars(parser.parse_args(words))
    given = {name: value for name, value in parsed.items() if value is not None}
    assert given == {"tasks": ["nlvr", "vqa"], "sizes": {"reduction": 4, "shared_phm_rule": True},
                     "sites": ["ffn", "encoder"], "lr": 0.1, "batch": 3, "prompts": False,
                     "bf16": True, "sharing": "half", "allow_missing": True}
    help = " ".join(parser.format_help().split())
    assert all(f"--{row.name.replace('_', '-')}" in help for row in fields(Run))
    for wrong in ("--sizes=4", "--tasks=tennis", "--sharing=some", "--batch=x"):
        with pytest.raises(SystemExit):
            parser.parse_args([wrong])


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = Run(tasks=["gqa"], sizes={"reduction": 4}, **COMPLETE)
    config = {"flags": vars(run), "backbone_sha256": "b", "vision_sha256": "v"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Run.read(tmp_path) == run and Run().tasks is not Run().tasks
    run.check_hashes(tmp_path, {"backbone_sha256": "b", "vision_sha256": "v"})
    with pytest.raises(RunError, match="other weights than these: vision_sha256 differs"):
        run.check_hashes(tmp_path, {"backbone_sha256": "b", "vision_sha256": "x"})


@pytest.mark.parametrize("change, message", [
    ({"method": "magic"}, "unknown method: 'magic'; known are full, adapter"),
    ({"method": "adapter+magic"}, "unknown method: 'magic'"),
    ({"method": "adapter+adapter"}, "adapter+adapter has one twice"),
    ({"method": "lora", "sharing": "half"}, "of lora: 'half'; known are single, multiple"),
    ({"sizes": {"reduction": 10 ** 9}}, "the size reduction is 1000000000, expected one like 8"),
    ({"tasks": ["vqa", "tennis"]}, "expected some of vqa, gqa"),
    ({"tasks": []}, "expected some of vqa, gqa"),
    ({"tasks": ["vqa", "tvqa"]}, "see features of different kinds: train them apart"),
    ({"tasks": [["vqa"]]}, "expected some of vqa, gqa"),
    ({"batch": "12"}, "batch is '12', expected a number from 1 to"),
    ({"batch": True}, "batch is True, expected a number"),
    ({"epochs": None}, "epochs is None, expected a number"),
    ({"epochs": 10 ** 400}, "expected a number from 1 to 2,147,483,648"),
    ({"lr": float("nan")}, "lr is nan, expected a number from 1e-30 to 1e+30"),
    ({"accumulate": 0}, "accumulate is 0, expected a number from 1 to"),
    ({"seed": -1}, "seed is -1, expected a number from 0 to 2,147,483,647"),
    ({"bf16": 1}, "bf16 is 1, expected bool"),
    ({"sites": [5]}, "sites are [5], expected words"),
    ({"sites": []}, "sites are [], expected words"),
    ({"tasks": ["vqa", "vqa"]}, "expected some of vqa, gqa"),
    ({"data": "a\0b"}, "data is 'a\\x00b', expected str"),
    ({"weights": "\ud800"}, "weights is '\\ud800', expected str"),
])
def test_flags_that_make_no_run_are_told(change, message):
    run = Run(**COMPLETE)
    run.check()
    Run().check(complete=False)
    with pytest.raises(RunError, match=re.escape(message)):
        replace(run, **change).check()


# ---- predictions -------------------------------------------------------------------------------


def test_anybodys_predictions_are_read_by_their_ids(tmp_path):
    path = tmp_path / "theirs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "answer": "two"}\r\n\n{"answer": "one", "id": 7}\n')
    assert read_predictions(path, "vqa") == {"7": "one", "a": "two"}
    good = '{"id": 7, "answer": "x"}\n'
    for bad in ("[1]", good, '{"id": 8}', '{"id": 8, "answer": 2}', '{"id": 8, "ans', "[" * 100_000,
                "\udcff"):
        path.write_bytes((good + bad).encode("utf-8", "surrogateescape"))
        with pytest.raises(RunError, match="is no file of predictions for vqa: line 2 should be"):
            read_predictions(path, "vqa")


def test_a_card_is_coloured_by_half_of_the_points_and_shows_what_people_said():
    people = {"answers": ["2"] + ["<3"] * 9}
    row = {"question": "[Q] How many? [Choices] a0: 1. a1: 2.", "answer": "2", "truth": people}
    page = card(row, [])
    assert '<figure class="wrong">' in page, "nine people have one beside them who said so"
    assert "truth: &lt;3 (9) / 2<" in page
    assert "How many?<br>[Choices]<br>a0: 1.<br>a1: 2.<" in page
    assert 'class="right"' in card(row | {"answer": "<3"}, [])
    assert 'class="right"' in card(row | {"truth": {"answer": "2"}}, ["data:x"])
    assert 'class=""' in card(row | {"truth": {"references": ["2"]}}, [])
    assert "<figcaption><p>“a &lt;b”</p><b>" in card(row | {"subtitles": "a <b"}, [])
    assert "<figcaption><b>" in page, "no subtitles, no line for them"


# ---- the commands, on a run --------------------------------------------------------------------


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
        words = ["--method", "adapter", "--sharing", "multiple", "--data", tiny / "datasets",
                 "--weights", tiny / "weights", "--backbone", "bart-mini", "--vision", "RN-mini",
                 "--epochs", 1, "--batch", 16, "--tasks", tasks, "--out", folder]
        assert command(train, patch, *words) == 0
    return folder


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return begin(tiny, tmp_path_factory.mktemp("runs") / "pictures", "vqa,gqa,nlvr,caption")


@pytest.fixture(scope="module")
def video_run(tiny, tmp_path_factory):
    return begin(tiny, tmp_path_factory.mktemp("runs") / "videos", "tvqa,how2qa,tvc,yc2c")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_scored_predicted_and_shown(run, tiny, monkeypatch, capsys):
    assert command(evaluate, monkeypatch, run, "--split", "test") == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("vqa", "consistency", "BLEU-4", "ROUGE-L"))
    for task in ("vqa", "gqa", "nlvr", "caption"):
        asked = read_examples(tiny / "datasets", task, TASKS[task].test)
        rows = lines(run / f"predictions_{task}_test.jsonl")
        assert all(set(row) == {"id", "question", "answer", "truth"} for row in rows)
        assert [(row["id"], row["question"]) for row in rows] == [(e.id, e.text) for e in asked]
        assert all(isinstance(row["answer"], str) for row in rows)
        assert [row["truth"] for row in rows] == json.loads(json.dumps([e.truth for e in asked]))
        if task == "nlvr":
            assert {row["answer"] for row in rows} <= {"true", "false"}
    page = (run / "predictions.html").read_text()
    assert page.count("<figure") == 24 + 48 + 6 + 6
    assert page.count("data:image/jpeg;base64,") == 24 + 48 + 2 * 6 + 6
    assert re.findall(r'<main class="(\w*)">', page) == ["", "", "wide", ""]
    assert page.count('<figure class="right"') + page.count('<figure class="wrong"') == 24 + 48 + 6


def test_a_run_on_videos_is_scored_and_shown_with_frames(video_run, tiny, monkeypatch, capsys):
    assert command(evaluate, monkeypatch, video_run) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("tvqa", "Castle", "how2qa", "tvc", "yc2c"))
    page = (video_run / "predictions.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 3 * (3 + 3 + 1 + 1)
    assert page.count("data:image/jpeg;base64,") > 2 * page.count("<figure")
    assert page.count('<main class="wide">') == 4
    spoken = 0
    for task in ("tvqa", "how2qa", "tvc", "yc2c"):
        asked = read_examples(tiny / "datasets", task, TASKS[task].validation)
        rows = lines(video_run / f"predictions_{task}_validation.jsonl")
        assert [row.get("subtitles", "") for row in rows] == [e.subtitles for e in asked]
        assert all(row.get("subtitles") != "" for row in rows)
        spoken += sum("subtitles" in row for row in rows)
    assert page.count("<figcaption><p>“") == spoken > 0


def test_predictions_of_a_run_are_scored_as_it_was(run, video_run, monkeypatch, capsys):
    for folder, task in (run, "vqa"), (run, "nlvr"), (run, "caption"), (video_run, "tvc"):
        file = folder / f"predictions_{task}_validation.jsonl"
        scores = []
        for words in [], ["--predictions", file]:
            assert command(evaluate, monkeypatch, folder, "--tasks", task, *words) == 0
            said = capsys.readouterr().out.splitlines()
            scores.append([line for line in said if line.startswith(task)])
        assert scores[0] == scores[1] and len(scores[0]) == 1


def test_predictions_without_the_missing_pictures_are_scored_as_it_was(run, tmp_path, monkeypatch,
                                                                       capsys):
    rows = (run / "predictions_vqa_validation.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(rows[5:]))
    words = run, "--tasks", "vqa", "--predictions", tmp_path / "some.jsonl", "--allow-missing"
    assert command(evaluate, monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert f"has no answer for 5 of {len(rows)} examples; they are left out" in said
    points = [vqa_accuracy(row["answer"], row["truth"]["answers"], vqa_normal_form)
              for row in map(json.loads, rows[5:])]
    line, = [line for line in said.splitlines() if line.startswith("vqa")]
    assert float(line.split()[1]) == pytest.approx(np.mean(points), abs=0.01)


def test_what_cannot_be_shown_leaves_a_gap_and_half_a_character_is_escaped(run, tmp_path):
    (tmp_path / "datasets/GQA/images").mkdir(parents=True)
    (tmp_path / "datasets/GQA/images/7.jpg").write_text("no picture")
    shown = Example(id=1, pictures=("7",), text="", answers={}, truth={"answer": "x"})

    class One:
        examples = [shown]
        rows = np.zeros((1, 1))

        def __len__(self):
            return 1

    row = {"id": 1, "question": "Why \ud800?", "answer": "\udcff", "truth": {"answer": "x"}}
    page = tmp_path / "page.html"
    evaluate.save_gallery(page, tmp_path / "datasets", {"gqa": One()}, {"gqa": [row]})
    said = page.read_text(encoding="utf-8")
    assert "<b>Why \\ud800?</b>" in said and "<div></div>" in said and "<img" not in said


def test_a_batch_is_at_most_what_is_asked(run, monkeypatch, capsys):
    sizes, make = [], evaluate.Corpus.batch

    def batch(corpus, indices, size, **named):
        sizes.append(size)
        return make(corpus, indices, size, **named)

    monkeypatch.setattr(evaluate.Corpus, "batch", batch)
    assert command(evaluate, monkeypatch, run, "--tasks", "nlvr", "--batch", 10 ** 40) == 0
    assert sizes == [8]


def test_features_can_be_kept_elsewhere(run, tiny, tmp_path, monkeypatch):
    world, cache = tmp_path / "world", tmp_path / "cache"
    shutil.copytree(tiny, world, ignore=shutil.ignore_patterns("features", "corpora"))
    words = run, "--tasks", "gqa", "--data", world / "datasets", "--cache", cache
    assert command(evaluate, monkeypatch, *words) == 0
    assert (cache / "features/GQA/RN-mini/index.json").exists()
    assert not (world / "datasets/features").exists()


def test_a_long_question_is_not_cut_without_a_word(run, video_run, tiny, monkeypatch, capsys):
    picture = next((tiny / "datasets/GQA/images").iterdir())
    words = run, "--tasks", "gqa", "--image", picture, "--question"
    assert command(evaluate, monkeypatch, *words, "How many stars?") == 0
    assert capsys.readouterr().err == ""
    assert command(evaluate, monkeypatch, *words, "star " * 70) == 0
    number, = re.findall(r"the text has (\d+) tokens, but gqa takes 20: the end of it was cut",
                         capsys.readouterr().err)
    assert int(number) > 70
    video = next((tiny / "datasets/video/videos/tv").iterdir())
    words = video_run, "--video", video, "--question", "What?", "--choices", "a star|a ring"
    assert command(evaluate, monkeypatch, *words, "--subtitles", "star " * 900) == 0
    assert "tvqa takes 600: the end of the subtitles was cut" in capsys.readouterr().err


def test_a_question_is_checked_before_anything_is_loaded(run, tiny, monkeypatch, capsys):
    monkeypatch.setattr(Run, "hashes", lambda run: pytest.fail("weights were read"))
    picture = next((tiny / "datasets/GQA/images").iterdir())
    assert command(evaluate, monkeypatch, run, "--image", picture) == 2
    assert "vqa needs a --question" in capsys.readouterr().err


def test_a_choice_is_read_as_it_was_written(tiny):
    """The model answers NLVR2 in tokens; they must come back as the words that are scored."""
    for family in ("bart", "t5"):
        tokenizer = load_tokenizer(tiny / "weights" / f"{family}-mini")
        for choice in TASKS["nlvr"].choices:
            assert tokenizer.decode(tokenizer.encode(choice)).strip() == choice


IMAGE = {"image_id": int, "caption": str}
CLIP = {"clip_id": int, "descs": list}
FIELDS = {  # of the official submissions, and how many answers the tiny world has
    "vqa_OpenEnded_mscoco_test2015_vladapter_results.json":
        ({"question_id": int, "answer": str}, 8),
    "gqa_submission_all.json": ({"questionId": str, "prediction": str}, 16),
    "captions_val2014_vladapter_results.json": (IMAGE, 14),
    "captions_test2014_vladapter_results.json": (IMAGE, 3),
    "tvc/tvc_val_predictions.jsonl": (CLIP | {"vid_name": str, "ts": list}, 3),
    "tvc/tvc_test_predictions.jsonl": (CLIP | {"vid_name": str, "ts": list}, 2),
    "yc2c/yc2c_val_predictions.jsonl": (CLIP | {"video_id": str}, 3),
    "yc2c/yc2c_test_predictions.jsonl": (CLIP | {"video_id": str}, 2),
}


def test_submissions_have_the_servers_fields_and_all_answers(run, video_run, tmp_path, monkeypatch):
    for folder in run, video_run:
        assert command(evaluate, monkeypatch, folder, "--submit", tmp_path) == 0
    for name, (kinds, count) in FIELDS.items():
        path = tmp_path / name
        rows = json.loads(path.read_text()) if name.endswith(".json") else lines(path)
        assert len(rows) == count, name
        for row in rows:
            assert {key: type(value) for key, value in row.items()} == kinds, name
            if "descs" in row:
                assert row["descs"] == [{"desc": row["descs"][0]["desc"]}], name
    statements = (tmp_path / "nlvr2_test1.csv").read_text().splitlines()
    assert len(statements) == 6
    assert all(re.fullmatch(r"test1-\d+-\d+-0,(True|False)", line) for line in statements)
    for name, count in {"tvqa/tvqa_val": 9, "tvqa/tvqa_test": 6, "how2qa/how2qa_val": 9,
                        "how2qa/how2qa_test_public": 6}.items():
        chosen = json.loads((tmp_path / f"{name}_predictions.json").read_text())
        assert len(chosen) == count
        assert all(key.isdecimal() and value in range(5) for key, value in chosen.items())


def test_an_answer_that_is_no_choice_is_submitted_as_the_first():
    asked = [example(i, {}) for i in range(4)]
    written = METRICS["choices"].write(asked, ["a3", "", "a star", "a"])
    assert json.loads(written) == {"0": 3, "1": 0, "2": 0, "3": 0}


def test_the_blind_command_scores_the_commonest_answers(run, tiny, monkeypatch, capsys):
    assert command(evaluate, monkeypatch, run, "--tasks", "gqa", "--blind") == 0
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gqa")]
    common = {}
    for e in read_examples(tiny / "datasets", "gqa", "train,val"):
        common.setdefault(e.kind, Counter())[e.truth["answer"]] += 1
    asked = read_examples(tiny / "datasets", "gqa", "testdev")
    right = [common[e.kind].most_common(1)[0][0] == e.truth["answer"] for e in asked]
    assert float(line.split()[1]) == pytest.approx(100 * sum(right) / len(right), abs=0.01)


def test_pictures_pairs_and_videos_can_be_asked_about(run, video_run, tiny, monkeypatch, capsys):
    picture = next((tiny / "datasets/GQA/images").iterdir())
    video = next((tiny / "datasets/video/videos/tv").iterdir())
    pair = ("--image", picture, picture, "--question", "Both pictures show stars.")
    choices = ("--question", "What is it?", "--choices", "a star|a ring", "--subtitles", "Hi.")
    for words in [(run, "--image", picture, "--question", "How many stars are there?"),
                  (run, "--tasks", "nlvr", *pair), (run, "--tasks", "caption", "--image", picture),
                  (video_run, "--tasks", "tvc", "--video", video),
                  (video_run, "--video", video, *choices)]:
        for precision in "--no-bf16", "--bf16":
            assert command(evaluate, monkeypatch, *words, precision) == 0
            said = capsys.readouterr().out
            assert said.endswith("\n")
            assert "nlvr" not in words or said in ("true\n", "false\n")
    assert command(evaluate, monkeypatch, run, "--bf16", "--tasks", "vqa") == 0, "a split, too"


def changed(run: Path, folder: Path, **flags) -> Path:
    """A copy of a run with other flags in its config.json."""
    shutil.copytree(run, folder)
    config = json.loads((run / "config.json").read_text())
    config["flags"] |= flags
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_too_little_memory_is_one_sentence(run, monkeypatch, capsys):
    for problem, said in [(torch.OutOfMemoryError("CUDA out of memory."), "out of GPU memory: try"),
                          (RuntimeError("not enough memory: you tried"), "error: out of memory"),
                          (MemoryError(), "error: out of memory")]:
        def fails(*_, **__):
            raise problem

        monkeypatch.setattr(evaluate.VLModel, "answer", fails)
        assert command(evaluate, monkeypatch, run, "--tasks", "nlvr") == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content, message", [
    (b"", "is not JSON"), (b"[" * 100_000, "is not JSON"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "is a Git LFS pointer"),
    (b"<!DOCTYPE html>", "is a web page"), (b"[1]", "config.json"),
    (b"{}", "flags is None, expected dict"), (b'{"flags": {}, "backbone_sha256": 5}', "expected str"),
    (b'{"flags": {}, "backbone_sha256": "", "vision_sha256": "", "id": 5}', "id is 5, expected str"),
    (b'{"flags": {}, "backbone_sha256": "", "vision_sha256": ""}', "its flags lack 'method'"),
])
def test_a_config_that_is_none_is_told(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(PROBLEMS) as error:
        Run.read(tmp_path)
    assert "config.json" in str(error.value) and message in str(error.value)


def test_what_cannot_be_evaluated_is_told_in_one_sentence(run, video_run, tiny, tmp_path,
                                                          monkeypatch, capsys):
    broken, unsaved = changed(run, tmp_path / "broken"), changed(run, tmp_path / "unsaved")
    (broken / "best.pt").write_bytes((run / "best.pt").read_bytes()[:2000])
    (unsaved / "last.pt").unlink()
    other = changed(run, tmp_path / "other", sharing="single")
    edited = changed(run, tmp_path / "edited", lr="high")
    swapped = changed(run, tmp_path / "swapped")
    config = json.loads((swapped / "config.json").read_text())
    (swapped / "config.json").write_text(json.dumps(config | {"id": "another"}))
    (tmp_path / "x.jpg").write_text("no picture")
    (tmp_path / "x.jsonl").write_text("[1]")
    assert command(evaluate, monkeypatch, run, "--tasks", "vqa") == 0
    validation = run / "predictions_vqa_validation.jsonl"
    (tmp_path / "half.jsonl").write_text(validation.read_text().split("\n", 1)[1])
    capsys.readouterr()
    world = tmp_path / "world"
    shutil.copytree(tiny, world, ignore=shutil.ignore_patterns("features"))
    next((world / "datasets/COCO/images/test2015").iterdir()).unlink()
    picture = next((tiny / "datasets/GQA/images").iterdir())
    bad = tmp_path / "x.jpg"
    ask = ("--question", "?")
    for words, message in [
            ((tmp_path,), "is not a run: it has no config.json"),
            ((broken,), "best.pt is truncated or not a file of weights"),
            ((unsaved, "--weights-of", "last"), "last.pt is missing: the run was stopped before"),
            ((other,), "best.pt: the weight 'encoder.layers.0."),
            ((edited,), "config.json is not the config.json of a run: "
                        "lr is 'high', expected a number from 1e-30 to 1e+30"),
            ((run, "--image", bad, *ask), "x.jpg is not a readable picture"),
            ((run, "--device", "nonsense"), "device 'nonsense' cannot be used"),
            ((run, "--tasks", "vqa,tennis"), "unknown task: 'tennis'; known are vqa, gqa"),
            ((run, "--tasks", "tvqa"), "was trained on vqa, gqa, nlvr, caption, not on tvqa"),
            ((run, "--image", picture), "vqa needs a --question"),
            ((run, "--image", picture, "--question", " "), "vqa needs a --question"),
            ((video_run, "--video", bad, *ask, "--choices", ""), "two or more different texts"),
            ((video_run, "--video", bad, *ask, "--choices", "a|b| a"), "two or more different"),
            ((run, "--device", "meta"), "device 'meta' cannot be used"),
            ((run, "--tasks", "vqa", "--predictions", tmp_path), f"{tmp_path} is not a regular"),
            ((swapped,), "best.pt is of another run than"),
            ((run, "--tasks", "nlvr", "--image", picture, *ask), "nlvr needs 2 of --image, not 1"),
            ((run, "--video", picture, *ask), "vqa needs --image"),
            ((video_run, "--video", bad, *ask), "tvqa needs --choices"),
            ((video_run, "--tasks", "tvc", "--video", bad),
             "x.jpg is empty, truncated or not a readable video"),
            ((run, "--tasks", "vqa", "--split", "test", "--predictions", validation),
             "has no answer for 24 of 24 examples: for another split"),
            ((run, "--tasks", "vqa", "--predictions", tmp_path / "half.jsonl"),
             "has no answer for 1 of "),
            ((run, "--image", picture, "--subtitles", "Hi."), "--subtitles go with --video"),
            ((run, "--tasks", "vqa", "--predictions", tmp_path / "x.jsonl"),
             "is no file of predictions for vqa"),
            ((run, "--predictions", validation), "choose one with --tasks: vqa, gqa"),
            ((run, "--data", world / "datasets", "--tasks", "vqa", "--submit", tmp_path / "s"),
             "1 of 2 pictures are missing")]:
        assert command(evaluate, monkeypatch, *words) == 2, words
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
    assert not (tmp_path / "s").exists(), "no part of a submission is written"
