"""train.py: runs that are killed, resumed, spread over processes or badly asked for."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd

import data
import train
from data import report_problems
from evaluate import PROBLEMS

ROOT = Path(__file__).parents[1]
SMALL = ["--epochs", "2", "--batch", "12", "--lr", "1e-3"]


def flags_of(tiny: Path) -> list[str]:
    return ["--data", str(tiny / "datasets"), "--weights", str(tiny / "weights"), "--backbone", "bart-mini",
            "--vision", "RN-mini"]


def command(*words) -> int:
    """Runs train.py in this process; gives its exit code."""
    sys.argv = ["train.py", *map(str, words)]
    try:
        report_problems(train.main, *PROBLEMS)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])


def final_weights(run: Path) -> dict:
    return torch.load(run / "last.pt", weights_only=True)["weights"]


def scores_of(run: Path) -> list[dict]:
    return [record["scores"] for record in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "scores" in record]


def same(ours: dict, theirs: dict, bound: float = 0.0) -> bool:
    return ours.keys() == theirs.keys() and all((ours[n] - theirs[n]).abs().max() <= bound for n in ours)


# ---- what a run leaves --------------------------------------------------------------------------------------------


def test_a_run_says_what_it_did_and_where_it_lies(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert command("--method", "compacter", "--tasks", "vqa,gqa", *SMALL, *flags_of(tiny), "--out", run) == 0
    said = capsys.readouterr().out
    for part in (f"data: {tiny / 'datasets'}", "compacter (all): 10 places, trains", "epoch 2, validation", f"evaluate.py {run}",
                 f"best.pt has its {(run / 'best.pt').stat().st_size / 1e6:.1f} MB"):
        assert part in said
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["method"] == "compacter" and len(config["backbone_sha256"]) == 64
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "scores" in line] == [1, 2]
    saved = torch.load(run / "best.pt", weights_only=True)
    assert (run / "best.pt").stat().st_size < 4 * sum(x.numel() for x in saved["weights"].values()) + 100_000
    assert "optimizer" not in saved and "added_words" in saved["weights"]
    assert not any(name.startswith("encoder.layers.0.self_attn.inner") for name in saved["weights"]), "the backbone is not saved"


def test_training_lowers_the_loss_and_full_trains_everything(tiny, tmp_path):
    assert command("--method", "full", "--tasks", "gqa", "--epochs", 6, "--batch", 12, "--lr", "1e-3", *flags_of(tiny),
                   "--out", tmp_path / "run") == 0
    losses = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert "words.weight" in final_weights(tmp_path / "run")


def test_flags_of_the_paper_are_the_defaults(tmp_path):
    for name, kind in ("bart-base", "bart"), ("t5-base", "t5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    given, cpu = {"data": "d", "weights": str(tmp_path)}, torch.device("cpu")
    flags = train.complete(given | {"method": "adapter", "share": "none"}, cpu, 1)
    assert (flags["lr"], flags["batch"], flags["epochs"], flags["backbone"]) == (3e-4, 500, 20, "bart-base")
    assert flags["tasks"] == ["vqa", "gqa", "nlvr", "caption"]
    assert train.complete(given | {"method": "full"}, cpu, 1)["lr"] == 1e-4
    flags = train.complete(given | {"method": "lora", "backbone": "t5-base", "tasks": ["tvqa"]}, cpu, 1)
    assert (flags["lr"], flags["batch"], flags["epochs"], flags["vision"]) == (3e-4, 30, 7, "clip-vit")


def test_every_method_trains_on_t5(tiny, tmp_path, capsys):
    for method in ("adapter", "lora", "bitfit", "hyperformer", "compacter", "prompt", "full"):
        words = [*flags_of(tiny), "--backbone", "t5-mini", "--method", method, "--tasks", "gqa", "--epochs", 1, "--batch", 12]
        assert command(*words, *(["--bf16"] if method == "adapter" else []), "--out", tmp_path / method) == 0
        losses = [json.loads(line) for line in (tmp_path / method / "log.jsonl").read_text().splitlines()]
        assert all(line["loss"] < 100 for line in losses if "loss" in line), "finite"
    assert "adapter (all)" in capsys.readouterr().out


def test_the_learning_rate_rises_and_falls():
    rates = [train.learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 1 and rates[10] == 2 and rates[55] == 1 and rates[100] == 0


# ---- killed, resumed, spread --------------------------------------------------------------------------------------


def child(words, folder):
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(command(*words))


def test_killed_at_twenty_moments_and_resumed_it_ends_with_the_same_weights(tiny, tmp_path, monkeypatch):
    processes = multiprocessing.get_context("forkserver")           # imports torch once; each run is a fork of that
    processes.set_forkserver_preload(["test_train", "torch._dynamo"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    words = ["--method", "compacter", "--share", "none", "--tasks", "vqa,gqa", "--epochs", "4", "--batch", "12", "--seed", "7",
             *flags_of(tiny)]

    def go(words, kill_after=None):
        process = processes.Process(target=child, args=(words, str(tmp_path)))
        began = time.monotonic()
        process.start()
        process.join(kill_after)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode, time.monotonic() - began

    code, warm = go([*words, "--out", "warm"])
    code, whole = go([*words, "--out", "undisturbed"])
    assert code == 0
    rng, kills, run, saves = random.Random(5), 0, tmp_path / "killed", set()
    while kills < 20:
        begun = (run / "config.json").exists()
        code, _ = go(["--resume", "killed"] if begun else [*words, "--out", "killed"], rng.uniform(0.1, 1.0) * whole)
        if code == 0:                                               # it reached the end: once more from the beginning
            assert same(final_weights(run), final_weights(tmp_path / "undisturbed"))
            shutil.rmtree(run)
        kills += code != 0
        if (run / "last.pt").exists():
            saves.add(torch.load(run / "last.pt", weights_only=True)["step"])       # readable, whenever it was killed
    code, _ = go(["--resume", "killed"] if (run / "config.json").exists() else [*words, "--out", "killed"])
    assert code == 0 and len(saves) > 1
    assert same(final_weights(run), final_weights(tmp_path / "undisturbed"))
    scores = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if "scores" in line]
              for folder in (run, tmp_path / "undisturbed")]
    assert scores[0] == scores[1]


def test_saved_in_the_middle_of_an_epoch_it_goes_on_there(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    words = ["--method", "lora", "--tasks", "vqa,gqa", *SMALL, *flags_of(tiny)]             # lora: its dropout is resumed too
    assert command(*words, "--out", tmp_path / "whole") == 0
    saved, steps = train.save, []

    def stop(run, model, optimizer, step, best):
        saved(run, model, optimizer, step, best)
        steps.append(step)
        if step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", stop)
    assert command(*words, "--out", tmp_path / "stopped") == 130
    monkeypatch.setattr(train, "save", saved)
    assert command("--resume", tmp_path / "stopped") == 0
    assert same(final_weights(tmp_path / "stopped"), final_weights(tmp_path / "whole"))


def test_two_processes_end_with_the_weights_of_one(tiny, tmp_path):
    words = ["--method", "adapter", "--share", "none", "--tasks", "vqa,gqa", *SMALL, *flags_of(tiny)]
    assert command(*words, "--out", tmp_path / "one") == 0
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "train.py",
                    *words, "--out", tmp_path / "two"], check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert same(final_weights(tmp_path / "one"), final_weights(tmp_path / "two"), 1e-6)
    assert scores_of(tmp_path / "one") == scores_of(tmp_path / "two"), "though each has answered half of the questions"


def test_compiled_a_run_ends_with_the_same_weights_and_where_compiling_fails_it_goes_on(tiny, tmp_path, monkeypatch, capsys):
    """The compiler may as well fail where gradients are needed first, or without a word."""
    def fails(*_):
        raise RuntimeError

    words, own = ["--tasks", "nlvr", "--epochs", "1", "--batch", "12", "--lr", "1e-3", *flags_of(tiny)], torch.compile
    assert command(*words, "--out", tmp_path / "eager") == 0
    for name, backend in ("aot", "aot_eager"), ("broken", aot_autograd(fw_compiler=nop, bw_compiler=fails)):
        monkeypatch.setattr(torch, "compile", partial(own, backend=backend))
        capsys.readouterr()
        assert command(*words, "--compile", "--out", tmp_path / name) == 0
        assert ("torch.compile failed, going on without" in capsys.readouterr().out) == (name == "broken")
        assert same(final_weights(tmp_path / name), final_weights(tmp_path / "eager"), 1e-5)
        assert scores_of(tmp_path / name) == scores_of(tmp_path / "eager")


def test_accumulated_or_recomputed_gradients_are_those_of_the_whole_batch(tiny, tmp_path):
    words = ["--method", "adapter", "--tasks", "vqa,nlvr,caption", "--epochs", "2", "--lr", "1e-3", *flags_of(tiny)]
    assert command(*words, "--batch", 12, "--out", tmp_path / "whole") == 0
    assert command(*words, "--batch", 3, "--accumulate", 4, "--out", tmp_path / "parts") == 0
    assert command(*words, "--batch", 12, "--recompute", "--out", tmp_path / "recomputed") == 0
    assert same(final_weights(tmp_path / "parts"), final_weights(tmp_path / "whole"), 1e-6)
    assert same(final_weights(tmp_path / "recomputed"), final_weights(tmp_path / "whole"), 1e-6)


def test_bf16_keeps_frozen_matrices_in_bf16_and_trains_like_fp32(tiny, tmp_path):
    words = ["--method", "lora", "--tasks", "vqa", "--epochs", "1", "--batch", "12", "--lr", "1e-3", *flags_of(tiny)]
    losses = {}
    for flag in "--bf16", "--no-bf16":
        assert command(*words, flag, "--out", tmp_path / flag) == 0
        log = [json.loads(line) for line in (tmp_path / flag / "log.jsonl").read_text().splitlines()]
        losses[flag] = [line["loss"] for line in log if "loss" in line]
        halved = {name for name, x in final_weights(tmp_path / flag).items() if x.dtype == torch.bfloat16}
        assert halved == ({"added_words"} if flag == "--bf16" else set()), "what is trained stays in float32"
    assert losses["--bf16"] == pytest.approx(losses["--no-bf16"], rel=1e-2)


# ---- bad input: one sentence, exit code 2 -------------------------------------------------------------------------


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def truncate(path: Path, size: int = 3000):
    path.write_bytes(path.read_bytes()[:size])


def misshape(path: Path):
    weights = torch.load(path, weights_only=True)
    weights["model.encoder.layers.0.fc1.weight"] = torch.zeros(3, 3)
    torch.save(weights, path)


def hostile(path: Path):
    path.write_bytes(pickle.dumps(Hostile(str(path.parent / "executed"))))


BART, RN = "weights/bart-mini/pytorch_model.bin", "weights/RN-mini.pt"
BAD_INPUT = {
    "unknown method": ((), ["--method", "magic"], "unknown method: 'magic'; known are full, adapter"),
    "unknown task": ((), ["--tasks", "vqa,tennis"], "unknown task: 'tennis'; known are vqa, gqa"),
    "unknown share": ((), ["--share", "some"], "invalid choice: 'some' (choose from"),
    "share a method has not": ((), ["--method", "lora", "--share", "half"], "lora has no --share half; it has all, none"),
    "unknown size": ((), ["--sizes", "bottleneck=3"], "unknown size of adapter: 'bottleneck'; known are reduction"),
    "unknown site": ((), ["--sites", "nowhere"], "unknown site: 'nowhere' is nowhere among the places"),
    "abbreviated flag": ((), ["--meth", "adapter"], "unrecognized arguments: --meth"),
    "half precision": ((), ["--fp16"], "T5's hidden states overflow half precision"),
    "no such weights": ((), ["--backbone", "bart-large"], "no weights called bart-large in"),
    "no such device": ((), ["--device", "nonsense"], "device 'nonsense' cannot be used"),
    "pictures and videos": ((), ["--tasks", "vqa,tvqa"], "see features of different kinds: train them apart"),
    "video missing": ((Path.unlink, "datasets/video/videos/yc2/a_-0001_1.mp4"), ["--tasks", "yc2c"], "1 of 9 videos are missing below"),
    "video truncated": ((lambda p: truncate(p, 900), "datasets/video/videos/yc2/a_-0001_1.mp4"), ["--tasks", "yc2c"],
                        "1 of 9 videos are unreadable, the first"),
    "batch of nothing": ((), ["--batch", "0"], "--batch, --accumulate, --epochs and --lr are positive numbers"),
    "bart truncated": ((truncate, BART), [], "pytorch_model.bin is truncated or not a weight file"),
    "bart misshapen": ((misshape, BART), [], "model.encoder.layers.0.fc1.weight is [3, 3], expected [256, 128]"),
    "bart hostile": ((hostile, BART), [], "pytorch_model.bin is truncated or not a weight file"),
    "clip truncated": ((truncate, RN), [], "RN-mini.pt is truncated or not a weight file"),
    "clip of another model": ((lambda p: shutil.copy(p.parent / "bart-mini/pytorch_model.bin", p), RN), [], "not a CLIP with a ResNet"),
    "clip hostile": ((hostile, RN), [], "RN-mini.pt is truncated or not a weight file"),
    "vocabulary truncated": ((lambda p: truncate(p, 200), "weights/bart-mini/vocab.json"), [], "vocab.json is truncated or not JSON"),
    "picture missing": ((Path.unlink, "datasets/GQA/images/2000003.jpg"), [], "1 of 18 pictures are missing"),
    "picture truncated": ((lambda p: truncate(p, 300), "datasets/GQA/images/2000003.jpg"), [],
                          "1 of 18 pictures are unreadable"),
    "sizes of no use": ((), ["--sizes", "reduction=0"], "--method adapter cannot be installed"),
    "two methods for one place": ((), ["--method", "adapter+compacter"], "is filled already"),
    "questions missing": ((Path.unlink, "datasets/GQA/val_balanced_questions.json"), [], "val_balanced_questions.json is missing"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_told_in_one_sentence(tiny, tmp_path, capsys, name):
    spoil, words, message = BAD_INPUT[name]
    world = tmp_path / "world"
    shutil.copytree(tiny, world, ignore=shutil.ignore_patterns("features"))
    if spoil:
        spoil[0](world / spoil[1])
    assert command(*flags_of(world), "--tasks", "gqa", "--out", tmp_path / "run", *words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and not any("Traceback" in line for line in said)
    assert not list(tmp_path.rglob("executed")), "nothing in a file is executed"
    assert not (tmp_path / "run").exists(), "and no run is left behind"


def test_with_allow_missing_it_runs_on_what_is_there_and_says_the_share(tiny, tmp_path, capsys):
    world = tmp_path / "world"
    shutil.copytree(tiny, world, ignore=shutil.ignore_patterns("features"))
    subtitles = world / "datasets/video/ann/yc2_subtitles.jsonl"
    subtitles.write_text("\n".join(subtitles.read_text().splitlines()[3:]))
    (world / "datasets/video/videos/yc2/a_-0001_1.mp4").unlink()
    truncate(world / "datasets/video/videos/yc2/a_-0008_1.mp4", 900)
    assert command("--tasks", "yc2c", *SMALL, *flags_of(world), "--out", tmp_path / "run", "--allow-missing") == 0
    said = capsys.readouterr().out
    assert "yc2c, train_release: 5 of 6 examples have their pictures, 83.3 %" in said
    assert "yc2c, val_release: 2 of 3 examples have their pictures, 66.7 %" in said
    assert "yc2c, train_release: 2 of 5 examples have no subtitles" in said


def test_values_released_features_stand_in_for_an_encoder(tiny, tmp_path):
    world, rng = tmp_path / "world", np.random.default_rng(0)
    shutil.copytree(tiny, world, ignore=shutil.ignore_patterns("features", "*.mp4"))
    for video in (tiny / "datasets/video/videos/tv").iterdir():
        folder = world / "datasets/video/vis_features/tv/clip-vit"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{video.stem}.npz", features=rng.normal(size=(rng.integers(1, 90), 512)).astype(np.float16))
    words = [*flags_of(world)[:-1], "clip-vit"]
    assert command("--tasks", "tvqa,tvc", *SMALL, *words, "--out", tmp_path / "run") == 0
    assert final_weights(tmp_path / "run")["visual.feature.weight"].shape[1] == 512
    assert command("--tasks", "vqa", *SMALL, *words, "--out", tmp_path / "other") == 2


def test_a_run_of_another_method_or_backbone_is_not_resumed(tiny, tmp_path, capsys):
    world, run = tmp_path / "world", tmp_path / "run"
    shutil.copytree(tiny, world)
    assert command("--method", "adapter", "--tasks", "gqa", *SMALL, *flags_of(world), "--out", run) == 0
    assert command("--resume", run, "--method", "lora") == 2
    assert "was begun with method adapter, not lora" in capsys.readouterr().err
    assert command("--method", "lora", "--tasks", "gqa", *SMALL, *flags_of(world), "--out", run) == 2
    assert "holds a run already" in capsys.readouterr().err
    weights = torch.load(world / BART, weights_only=True)
    weights["final_logits_bias"] += 1
    torch.save(weights, world / BART)
    assert command("--resume", run) == 2
    assert "was begun with other weights" in capsys.readouterr().err


def test_a_full_disk_loses_nothing_that_was_saved(tiny, tmp_path, monkeypatch, capsys):
    run, whole = tmp_path / "run", data.os.fsync
    words = ["--method", "adapter", "--tasks", "gqa", *SMALL, *flags_of(tiny), "--out", run]

    def full(file):
        if (run / "last.pt").exists():                  # from the second epoch on
            raise OSError(28, "No space left on device")
        whole(file)

    monkeypatch.setattr(data.os, "fsync", full)
    assert command(*words) == 2
    assert "could not be saved (No space left on device)" in capsys.readouterr().err
    assert torch.load(run / "last.pt", weights_only=True)["step"] > 0 and not list(run.glob("*.unfinished"))
    monkeypatch.setattr(data.os, "fsync", whole)
    assert command("--resume", run) == 0
