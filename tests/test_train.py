"""train.py: runs that are killed, resumed, spread over processes or badly asked for."""

import doctest
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

import train
from data import report_problems
from evaluate import PROBLEMS

ROOT = Path(__file__).parents[1]
SMALL = ["--epochs", "2", "--batch", "12", "--lr", "1e-3"]


def flags_of(tiny: Path) -> list[str]:
    return ["--data", str(tiny / "datasets"), "--weights", str(tiny / "weights"),
            "--backbone", "bart-mini", "--vision", "RN-mini"]


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


def records(run: Path) -> list[dict]:
    return list(map(json.loads, (run / "log.jsonl").read_text().splitlines()))


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


def scores_of(run: Path) -> dict[int, dict]:
    """By epoch; what a resumed run wrote later counts."""
    return {record["epoch"]: record for record in records(run) if "scores" in record}


def same(ours: dict, theirs: dict, bound: float = 0.0) -> bool:
    if ours.keys() != theirs.keys():
        return False
    return all((ours[name] - theirs[name]).abs().max() <= bound for name in ours)


def test_the_examples_in_the_docstrings():
    failed, attempted = doctest.testmod(train)
    assert failed == 0 and attempted > 0


# ---- what a run leaves ---------------------------------------------------------------------------


def test_a_run_says_what_it_did_and_where_it_lies(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--method", "compacter", "--tasks", "vqa,gqa", *SMALL, *flags_of(tiny)]
    assert command(*words, "--out", run) == 0
    said = capsys.readouterr().out
    size = (run / "best.pt").stat().st_size
    for part in (f"data: {tiny / 'datasets'}", "compacter (single): 10 sites, trains",
                 "epoch 2, validation", f"best.pt has its {size / 1e6:.1f} MB",
                 f"evaluate.py {run}"):
        assert part in said
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["method"] == "compacter" and len(config["backbone_sha256"]) == 64
    assert list(scores_of(run)) == [1, 2]
    saved = torch.load(run / "best.pt", weights_only=True)
    assert size < 4 * sum(x.numel() for x in saved["weights"].values()) + 100_000
    assert "optimizer" not in saved and "embed_tokens.weight[-200:]" in saved["weights"]
    backbone = "encoder.layers.0.self_attn.inner"
    assert not any(name.startswith(backbone) for name in saved["weights"])


def test_training_lowers_the_loss_and_full_trains_everything(tiny, tmp_path):
    words = ["--method", "full", "--tasks", "gqa", "--epochs", 6, "--batch", 12, "--lr", "1e-3"]
    assert command(*words, *flags_of(tiny), "--out", tmp_path / "run") == 0
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < 0.8 * losses[0]
    assert "embed_tokens.weight" in final_weights(tmp_path / "run")


def test_flags_of_the_paper_are_the_defaults(tmp_path):
    for name, kind in ("bart-base", "bart"), ("t5-base", "t5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))

    def defaults(**given):
        given |= {"data": "d", "weights": str(tmp_path)}
        return train.with_defaults(given, torch.device("cpu"))

    run = defaults(method="adapter", sharing="multiple")
    assert (run.lr, run.batch, run.epochs, run.backbone) == (3e-4, 500, 20, "bart-base")
    assert run.tasks == ["vqa", "gqa", "nlvr", "caption"]
    assert (run.bf16, run.compile) == (False, False)
    assert defaults(method="full").lr == 1e-4
    run = defaults(method="lora", backbone="t5-base", tasks=["tvqa"])
    assert (run.lr, run.batch, run.epochs, run.vision) == (3e-4, 30, 7, "clip-vit")


@pytest.mark.parametrize("out, words, name", [
    (None, {}, "runs/adapter-vqa-gqa"),
    (None, {"sharing": "half"}, "runs/adapter-half-vqa-gqa"),
    ("there", {}, "there")])
def test_a_run_gets_a_folder_of_its_own(tmp_path, monkeypatch, out, words, name):
    monkeypatch.chdir(tmp_path)
    run = train.Run(tasks=["vqa", "gqa"], **words)
    out = out and Path(out)
    assert train.new_folder(run, out) == Path(name)
    Path(name).mkdir(parents=True)
    (Path(name) / "config.json").touch()
    if out:
        with pytest.raises(train.RunError, match="holds a run already"):
            train.new_folder(run, out)
    else:
        assert train.new_folder(run, None) == Path(f"{name}-2")


def test_every_method_trains_on_t5(tiny, tmp_path, capsys):
    words = [*flags_of(tiny), "--backbone", "t5-mini", "--tasks", "gqa",
             "--epochs", 1, "--batch", 12]
    for method in "adapter", "lora", "bitfit", "hyperformer", "compacter", "prompt", "full":
        bf16 = ["--bf16"] if method == "adapter" else []
        assert command(*words, "--method", method, *bf16, "--out", tmp_path / method) == 0
        losses = losses_of(tmp_path / method)
        assert losses and all(loss < 100 for loss in losses), "finite"
    assert "adapter (single)" in capsys.readouterr().out


def test_the_learning_rate_rises_and_falls():
    rates = [train.learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 1 and rates[10] == 2
    assert rates[55] == 1 and rates[100] == 0


# ---- killed, resumed, spread ---------------------------------------------------------------------


def child(words, folder):
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(command(*words))


def test_killed_at_twenty_moments_and_resumed_it_ends_with_the_same_weights(
        tiny, tmp_path, monkeypatch):
    # A server that imports torch once; each run is a fork of it.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["test_train", "torch._dynamo"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    words = ["--method", "compacter", "--sharing", "multiple", "--tasks", "vqa,gqa",
             "--epochs", "4", "--batch", "12", "--seed", "7", *flags_of(tiny)]
    run = tmp_path / "killed"

    def go(words, kill_after=None):
        process = processes.Process(target=child, args=(words, str(tmp_path)))
        began = time.monotonic()
        process.start()
        process.join(kill_after)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode, time.monotonic() - began

    def begin_or_resume(kill_after=None):
        begun = (run / "config.json").exists()
        return go(["--resume", "killed"] if begun else [*words, "--out", "killed"], kill_after)[0]

    go([*words, "--out", "warm"])
    code, whole = go([*words, "--out", "undisturbed"])
    assert code == 0
    undisturbed = tmp_path / "undisturbed"

    rng = random.Random(5)
    kills, saves = 0, set()
    while kills < 20:
        code = begin_or_resume(rng.uniform(0.1, 1.0) * whole)
        if code == 0:  # it reached the end: once more from the beginning
            assert same(final_weights(run), final_weights(undisturbed))
            shutil.rmtree(run)
        kills += code != 0
        if (run / "last.pt").exists():  # readable, whenever it was killed
            saves.add(torch.load(run / "last.pt", weights_only=True)["step"])
    assert begin_or_resume() == 0 and len(saves) > 1
    assert same(final_weights(run), final_weights(undisturbed))
    assert scores_of(run) == scores_of(undisturbed)


def test_half_a_line_of_a_killed_run_leaves_the_log(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert command("--tasks", "gqa", *SMALL, *flags_of(tiny), "--out", run) == 0
    table = capsys.readouterr().out.split("\nepoch ")[-1]
    log = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(log + '{"step": 9, "ep')
    assert command("--resume", run) == 0
    assert (run / "log.jsonl").read_text() == log
    assert capsys.readouterr().out.split("\nepoch ")[-1] == table


def test_saved_in_the_middle_of_an_epoch_it_goes_on_there(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    # LoRA, for its dropout is resumed too.
    words = ["--method", "lora", "--tasks", "vqa,gqa", *SMALL, *flags_of(tiny)]
    assert command(*words, "--out", tmp_path / "whole") == 0
    save_last = train.save_last

    def stop(folder, model, optimizer, step, best):
        save_last(folder, model, optimizer, step, best)
        if step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_last", stop)
    assert command(*words, "--out", tmp_path / "stopped") == 130
    monkeypatch.setattr(train, "save_last", save_last)
    assert command("--resume", tmp_path / "stopped") == 0
    assert same(final_weights(tmp_path / "stopped"), final_weights(tmp_path / "whole"))


def test_two_processes_end_with_the_weights_of_one(tiny, tmp_path):
    words = ["--method", "adapter", "--sharing", "multiple", "--tasks", "vqa,gqa", *SMALL,
             *flags_of(tiny)]
    assert command(*words, "--out", tmp_path / "one") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", ROOT / "train.py"]
    subprocess.run([*torchrun, *words, "--out", tmp_path / "two"], check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert same(final_weights(tmp_path / "one"), final_weights(tmp_path / "two"), 1e-6)
    assert scores_of(tmp_path / "one") == scores_of(tmp_path / "two"), "each answers half"


def test_compiled_a_run_ends_with_the_same_weights_and_where_compiling_fails_it_goes_on(
        tiny, tmp_path, monkeypatch, capsys):
    """The compiler may as well fail where gradients are needed first, or without a word."""
    def fails(*_):
        raise RuntimeError

    words = ["--tasks", "nlvr", "--epochs", "1", "--batch", "12", "--lr", "1e-3", *flags_of(tiny)]
    own = torch.compile
    broken = aot_autograd(fw_compiler=nop, bw_compiler=fails)
    assert command(*words, "--out", tmp_path / "eager") == 0
    for name, backend in ("aot", "aot_eager"), ("broken", broken):
        monkeypatch.setattr(torch, "compile", partial(own, backend=backend))
        capsys.readouterr()
        assert command(*words, "--compile", "--out", tmp_path / name) == 0
        failed = "torch.compile failed, going on without" in capsys.readouterr().out
        assert failed == (name == "broken")
        assert same(final_weights(tmp_path / name), final_weights(tmp_path / "eager"), 1e-5)
        assert scores_of(tmp_path / name) == scores_of(tmp_path / "eager")


def test_accumulated_or_recomputed_gradients_are_those_of_the_whole_batch(tiny, tmp_path):
    words = ["--method", "adapter", "--tasks", "vqa,nlvr,caption", "--epochs", "2", "--lr", "1e-3",
             *flags_of(tiny)]
    assert command(*words, "--batch", 12, "--out", tmp_path / "whole") == 0
    assert command(*words, "--batch", 3, "--accumulate", 4, "--out", tmp_path / "parts") == 0
    assert command(*words, "--batch", 12, "--recompute", "--out", tmp_path / "recomputed") == 0
    whole = final_weights(tmp_path / "whole")
    assert same(final_weights(tmp_path / "parts"), whole, 1e-6)
    assert same(final_weights(tmp_path / "recomputed"), whole, 1e-6)


def test_bf16_keeps_frozen_matrices_in_bf16_and_trains_like_fp32(tiny, tmp_path):
    words = ["--method", "lora", "--tasks", "vqa", "--epochs", "1", "--batch", "12", "--lr", "1e-3",
             *flags_of(tiny)]
    losses = {}
    for flag in "--bf16", "--no-bf16":
        run = tmp_path / flag
        assert command(*words, flag, "--out", run) == 0
        losses[flag] = losses_of(run)
        halved = {name for name, x in final_weights(run).items() if x.dtype == torch.bfloat16}
        frozen = {"embed_tokens.weight[-200:]"} if flag == "--bf16" else set()
        assert halved == frozen, "what is trained stays in float32"
    assert losses["--bf16"] == pytest.approx(losses["--no-bf16"], rel=1e-2)


# ---- bad input: one sentence, exit code 2 --------------------------------------------------------


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


def swap(path: Path):
    shutil.copy(path.parent / "bart-mini/pytorch_model.bin", path)


def hostile(path: Path):
    path.write_bytes(pickle.dumps(Hostile(str(path.parent / "executed"))))


BART, RN = "weights/bart-mini/pytorch_model.bin", "weights/RN-mini.pt"
VIDEO = "datasets/video/videos/yc2/a_-0001_1.mp4"
PICTURE = "datasets/GQA/images/2000003.jpg"
VOCABULARY = "weights/bart-mini/vocab.json"
QUESTIONS = "datasets/GQA/val_balanced_questions.json"
BAD_INPUT = {  # what is done to which file, flags, the message
    "unknown method": (
        (), ["--method", "magic"], "unknown method: 'magic'; known are full, adapter"),
    "unknown task": ((), ["--tasks", "vqa,tennis"], "unknown task: 'tennis'; known are vqa, gqa"),
    "unknown sharing": ((), ["--sharing", "some"], "invalid choice: 'some' (choose from"),
    "sharing a method has not": (
        (), ["--method", "lora", "--sharing", "half"],
        "lora has no --sharing half; it has single, multiple"),
    "unknown size": (
        (), ["--sizes", "bottleneck=3"],
        "unknown size of adapter: 'bottleneck'; known are reduction"),
    "unknown site": (
        (), ["--sites", "nowhere"], "unknown site: 'nowhere' is nowhere among the sites"),
    "abbreviated flag": ((), ["--meth", "adapter"], "unrecognized arguments: --meth"),
    "resumed elsewhere": ((), ["--resume", "runs/x"], "--out cannot be given with --resume"),
    "no such weights": ((), ["--backbone", "bart-large"], "no weights called bart-large in"),
    "no such device": ((), ["--device", "nonsense"], "device 'nonsense' cannot be used"),
    "pictures and videos": (
        (), ["--tasks", "vqa,tvqa"], "see features of different kinds: train them apart"),
    "video missing": (
        (Path.unlink, VIDEO), ["--tasks", "yc2c"], "1 of 9 videos are missing below"),
    "video truncated": (
        (partial(truncate, size=900), VIDEO), ["--tasks", "yc2c"],
        "1 of 9 videos are unreadable, the first"),
    "batch of nothing": (
        (), ["--batch", "0"], "--batch, --accumulate, --epochs and --lr are positive numbers"),
    "bart truncated": (
        (truncate, BART), [], "pytorch_model.bin is truncated or not a weight file"),
    "bart misshapen": (
        (misshape, BART), [],
        "model.encoder.layers.0.fc1.weight is [3, 3], expected [256, 128]"),
    "bart hostile": ((hostile, BART), [], "pytorch_model.bin is truncated or not a weight file"),
    "clip truncated": ((truncate, RN), [], "RN-mini.pt is truncated or not a weight file"),
    "clip of another model": ((swap, RN), [], "not a CLIP with a ResNet"),
    "clip hostile": ((hostile, RN), [], "RN-mini.pt is truncated or not a weight file"),
    "vocabulary truncated": (
        (partial(truncate, size=200), VOCABULARY), [], "vocab.json is truncated or not JSON"),
    "picture missing": ((Path.unlink, PICTURE), [], "1 of 18 pictures are missing"),
    "picture truncated": (
        (partial(truncate, size=300), PICTURE), [], "1 of 18 pictures are unreadable"),
    "sizes of no use": (
        (), ["--sizes", "reduction=0"], "--method adapter cannot be installed"),
    "two methods for one site": ((), ["--method", "adapter+compacter"], "is filled already"),
    "questions missing": (
        (Path.unlink, QUESTIONS), [], "val_balanced_questions.json is missing"),
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


def test_data_and_weights_go_together(tiny, tmp_path, capsys):
    assert command("--data", tiny / "datasets", "--out", tmp_path / "run") == 2
    assert "--data and --weights go together" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(tiny, tmp_path, capsys):
    words = ["--tasks", "gqa", "--epochs", 2, "--batch", 12, "--lr", "1e30", *flags_of(tiny)]
    assert command(*words, "--out", tmp_path / "run") == 2
    assert "try a lower --lr" in capsys.readouterr().err


def test_with_allow_missing_it_runs_on_what_is_there_and_says_the_share(tiny, tmp_path, capsys):
    world = tmp_path / "world"
    shutil.copytree(tiny, world, ignore=shutil.ignore_patterns("features"))
    subtitles = world / "datasets/video/ann/yc2_subtitles.jsonl"
    subtitles.write_text("\n".join(subtitles.read_text().splitlines()[3:]))
    (world / "datasets/video/videos/yc2/a_-0001_1.mp4").unlink()
    truncate(world / "datasets/video/videos/yc2/a_-0008_1.mp4", 900)
    words = ["--tasks", "yc2c", *SMALL, *flags_of(world), "--allow-missing"]
    assert command(*words, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "yc2c, train_release: 5 of 6 examples have their pictures, 83.3 %" in said
    assert "yc2c, val_release: 2 of 3 examples have their pictures, 66.7 %" in said
    assert "yc2c, train_release: 2 of 5 examples have no subtitles" in said


def test_values_released_features_stand_in_for_an_encoder(tiny, tmp_path):
    world = tmp_path / "world"
    rng = np.random.default_rng(0)
    shutil.copytree(tiny, world, ignore=shutil.ignore_patterns("features", "*.mp4"))
    for video in (tiny / "datasets/video/videos/tv").iterdir():
        folder = world / "datasets/video/vis_features/tv/clip-vit"
        folder.mkdir(parents=True, exist_ok=True)
        features = rng.normal(size=(rng.integers(1, 90), 512)).astype(np.float16)
        np.savez(folder / f"{video.stem}.npz", features=features)
    words = [*flags_of(world)[:-1], "clip-vit"]
    assert command("--tasks", "tvqa,tvc", *SMALL, *words, "--out", tmp_path / "run") == 0
    assert final_weights(tmp_path / "run")["visual.feature.weight"].shape[1] == 512
    assert command("--tasks", "vqa", *SMALL, *words, "--out", tmp_path / "other") == 2


def test_a_run_of_another_method_or_backbone_is_not_resumed(tiny, tmp_path, capsys):
    world, run = tmp_path / "world", tmp_path / "run"
    shutil.copytree(tiny, world)
    words = ["--tasks", "gqa", *SMALL, *flags_of(world), "--out", run]
    assert command("--method", "adapter", *words) == 0
    assert command("--resume", run, "--method", "lora") == 2
    assert "was begun with method adapter, not lora" in capsys.readouterr().err
    assert command("--method", "lora", *words) == 2
    assert "holds a run already" in capsys.readouterr().err
    weights = torch.load(world / BART, weights_only=True)
    weights["final_logits_bias"] += 1
    torch.save(weights, world / BART)
    assert command("--resume", run) == 2
    assert "was begun with other weights" in capsys.readouterr().err


def test_a_run_goes_on_from_what_train_py_saved_and_from_nothing_else(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert command("--tasks", "gqa", *SMALL, *flags_of(tiny), "--out", run) == 0
    shutil.copy(run / "best.pt", run / "last.pt")
    assert command("--resume", run) == 2
    assert "last.pt lacks the step or the optimizer" in capsys.readouterr().err
    truncate(run / "last.pt")
    assert command("--resume", run) == 2
    assert "last.pt is truncated" in capsys.readouterr().err


def test_a_full_disk_loses_nothing_that_was_saved(tiny, tmp_path, monkeypatch, capsys):
    run, whole = tmp_path / "run", os.fsync
    words = ["--method", "adapter", "--tasks", "gqa", *SMALL, *flags_of(tiny), "--out", run]

    def full(file):
        if (run / "last.pt").exists():  # from the second epoch on
            raise OSError(28, "No space left on device")
        whole(file)

    monkeypatch.setattr(os, "fsync", full)
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and f"go on from there with --resume {run}" in said
    assert torch.load(run / "last.pt", weights_only=True)["step"] > 0
    left = {path.name for path in run.iterdir()}
    assert left <= {"config.json", "log.jsonl", "last.pt", "best.pt"}, "nothing half-written"
    monkeypatch.setattr(os, "fsync", whole)
    assert command("--resume", run) == 0
