"""train.py: runs that are killed, resumed, spread over processes or badly asked for."""

import copy
import doctest
import fcntl
import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import data
import toy
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


@pytest.mark.parametrize("words, name", [
    ({}, "runs/adapter-vqa-gqa"), ({"sharing": "half"}, "runs/adapter-half-vqa-gqa")])
def test_a_run_makes_a_folder_of_its_own(tmp_path, monkeypatch, words, name):
    monkeypatch.chdir(tmp_path)
    run = train.Run(tasks=["vqa", "gqa"], **words)
    assert train.new_folder(run, None) == Path(name)
    assert train.new_folder(run, None) == Path(f"{name}-2"), "though it is empty: another's"
    assert all(Path(folder).is_dir() for folder in (name, f"{name}-2"))


def test_out_is_a_folder_that_holds_nothing_yet(tmp_path):
    out = tmp_path / "a/b"
    assert train.new_folder(train.Run(), out) == out and out.is_dir()
    (out / "log.jsonl").touch()  # killed before there was a config.json
    (out / "config.json.unfinished-7").write_text("{")
    assert train.new_folder(train.Run(), out) == out
    for name in "config.json", "holiday.jpg":
        (out / name).touch()
        with pytest.raises(train.RunError, match=f"holds a run already.*--resume {out}"):
            train.new_folder(train.Run(), out)
        (out / name).unlink()
    (out / "log.jsonl").write_text("{}\n")
    with pytest.raises(train.RunError, match="holds a run already"):
        train.new_folder(train.Run(), out)


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


# ---- a run's folder is its own ---------------------------------------------------------------


def test_two_runs_that_begin_at_once_have_two_folders(tiny, tmp_path):
    words = [sys.executable, ROOT / "train.py", "--tasks", "gqa", *SMALL, *flags_of(tiny)]
    both = [subprocess.Popen([*map(str, words), "--seed", seed], cwd=tmp_path,
                             stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
            for seed in "12"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    runs = [tmp_path / "runs" / name for name in ("adapter-gqa", "adapter-gqa-2")]
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    assert sorted(config["flags"]["seed"] for config in configs) == [1, 2]
    assert configs[0]["id"] != configs[1]["id"]
    assert [list(scores_of(run)) for run in runs] == [[1, 2], [1, 2]]


def test_a_run_is_trained_by_one_process_where_there_are_locks(tiny, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert command("--tasks", "gqa", *SMALL, *flags_of(tiny), "--out", run) == 0
    with open(run / "log.jsonl", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert command("--resume", run) == 2
        assert f"{run} is in use by another process" in capsys.readouterr().err
        monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
        assert command("--resume", run) == 0
    monkeypatch.undo()

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert command("--resume", run) == 0


def test_a_claim_of_a_killed_run_is_resumed_from_the_beginning(tiny, tmp_path, capsys):
    words = ["--tasks", "gqa", *SMALL, *flags_of(tiny)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*words, "--out", whole) == 0
    killed.mkdir()
    config = json.loads((whole / "config.json").read_text())
    assert config["examples"] == {"gqa": 48}
    del config["examples"]  # of which it knew nothing yet
    (killed / "config.json").write_text(json.dumps(config))
    assert command("--resume", killed) == 0
    assert "resumed" not in capsys.readouterr().out
    assert same(final_weights(killed), final_weights(whole))
    assert json.loads((killed / "config.json").read_text())["examples"] == {"gqa": 48}
    (killed / "config.json").unlink()
    assert command("--resume", killed) == 2
    assert "is not a run: it has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("problem, code", [(KeyboardInterrupt, 130), (train.RunError, 2)])
def test_a_run_that_ends_before_its_first_record_leaves_nothing(tiny, tmp_path, monkeypatch,
                                                                problem, code):
    def ends(*_):
        raise problem

    run = tmp_path / "run"
    words = ["--tasks", "gqa", *SMALL, *flags_of(tiny)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "seed_dropout", ends)
        assert command(*words, "--out", run) == code
    assert not run.exists()
    assert command(*words, "--out", run) == 0
    monkeypatch.setattr(train, "seed_dropout", ends)
    left = sorted(run.iterdir())
    (run / "last.pt").unlink()
    assert command("--resume", run) == code
    assert sorted([*run.iterdir(), run / "last.pt"]) == left, "a run from before stays"


def test_files_may_move_but_neither_their_content_nor_other_flags(tiny, tmp_path, monkeypatch,
                                                                  capsys):
    world, run = tmp_path / "world", tmp_path / "run"
    shutil.copytree(tiny, world)
    monkeypatch.chdir(tmp_path)
    assert command("--tasks", "gqa", *SMALL, *flags_of(Path("world")), "--out", run) == 0
    for data in "world/datasets/", "./world/datasets", world / "datasets":
        assert command("--resume", run, "--data", data) == 0
    world.rename("moved")
    assert command("--resume", run, "--data", "moved/datasets", "--weights", "moved/weights",
                   "--cache", "cache") == 0
    capsys.readouterr()
    assert command("--resume", run, "--data", "moved/datasets", "--batch", 13) == 2
    assert "was begun with batch 12, not 13" in capsys.readouterr().err
    world = tmp_path / "moved"
    path = world / QUESTIONS
    questions = json.loads(path.read_text())
    path.write_text(json.dumps(dict(list(questions.items())[2:])))
    words = "--data", world / "datasets", "--weights", world / "weights"
    assert command("--resume", run, *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the data have changed: in " in said and "examples are {'gqa': 48}" in said
    assert "now there are {'gqa': 46}" in said


def test_a_run_from_before_files_knew_their_run_goes_on(tiny, tmp_path):
    run = tmp_path / "run"
    assert command("--tasks", "gqa", *SMALL, *flags_of(tiny), "--out", run) == 0
    config = json.loads((run / "config.json").read_text())
    del config["id"], config["examples"], config["flags"]["cache"]
    (run / "config.json").write_text(json.dumps(config))
    state = torch.load(run / "last.pt", weights_only=True)
    del state["run"]
    torch.save(state, run / "last.pt")
    assert command("--resume", run) == 0


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


@pytest.mark.parametrize("backbone", ["bart-mini", "t5-mini"])
def test_four_tasks_are_four_graphs_of_the_loss_and_few_of_decoding(tiny, monkeypatch, backbone):
    """Those that were tried are those that train; loss and gradients are eager's."""
    torch._dynamo.reset()
    counters = []
    compiler = torch.compile

    def counting(function, **options):
        # Where AOTAutograd begins a graph anew it would count twice.
        counters.append(CompileCounterWithBackend("eager" if counters else "aot_eager"))
        return compiler(function, backend=counters[-1], **options)

    monkeypatch.setattr(torch, "compile", counting)
    given = dict(data=str(tiny / "datasets"), weights=str(tiny / "weights"), backbone=backbone,
                 vision="RN-mini", batch=12, sharing="multiple")
    run = train.with_defaults(given, torch.device("cpu"))
    hashes = run.hashes()
    monkeypatch.setattr(train, "note_examples", lambda *_: None)
    model, _, corpora, _ = train.prepare(run, None, hashes, torch.device("cpu"))
    model.requires_grad_(True)
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0  # dropout draws otherwise when it is compiled
    loss_of, _ = train.compile_both(model, corpora, run)
    assert counters[0].frame_count == 4 and counters[1].frame_count <= 3
    model.train()
    for task, parts in train.batches(corpora, run.batch, 0, 0):
        train.select(model, task)
        found = []
        for loss in loss_of, model.loss:
            model.zero_grad()
            train.mark_lengths(parts[0])
            value = loss(**parts[0])
            value.backward()
            found.append([value.detach(), *(p.grad for p in model.parameters()
                                            if p.grad is not None)])
        assert len(found[0]) == len(found[1])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found))
    assert counters[0].frame_count == 4


@pytest.mark.parametrize("where", ["compiler", "step"])
def test_too_little_memory_is_one_sentence_and_no_failure_of_the_compiler(
        tiny, tmp_path, monkeypatch, capsys, where):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.05 GiB ...")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fails)
    monkeypatch.setattr(train.VLModel, "loss", fails)
    flag = "--compile" if where == "compiler" else "--no-compile"
    run = tmp_path / "run"
    assert command("--tasks", "gqa", *SMALL, *flags_of(tiny), flag, "--out", run) == 2
    said = capsys.readouterr()
    assert "out of GPU memory: try a smaller --batch" in said.err and "--recompute" in said.err
    assert "going on without" not in said.out and not run.exists()


def test_few_examples_are_few_rows_whatever_batch_says(tiny, tmp_path, monkeypatch):
    rows, make = [], data.Corpus.batch

    def batch(corpus, indices, size, *others, **named):
        rows.append((size, len(corpus)))
        return make(corpus, indices, size, *others, **named)

    monkeypatch.setattr(data.Corpus, "batch", batch)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    words = ["--tasks", "vqa,gqa", "--epochs", 1, "--batch", 1000, "--accumulate", 1000,
             "--compile", *flags_of(tiny)]
    assert command(*words, "--out", tmp_path / "run") == 0
    assert rows and all(size <= count for size, count in rows)


def test_a_process_validates_with_its_share_of_the_batch(tiny, monkeypatch):
    asked = []

    def answer(model, tokenizer, corpus, device, batch, *_, **__):
        asked.append(batch)
        return []

    monkeypatch.setattr(train, "world", lambda: 8)
    monkeypatch.setattr(train, "answer", answer)
    monkeypatch.setattr(train, "score", lambda *_: {"accuracy": 1.0})
    monkeypatch.setattr(train.dist, "all_gather_object", lambda parts, _: parts.__setitem__(
        slice(None), [[]] * 8))
    corpus = SimpleNamespace(examples=[])
    run = SimpleNamespace(batch=4001, bf16=False)
    train.validate(None, None, {"vqa": corpus}, run, None, None)
    assert asked == [501]


def test_what_a_terminal_cannot_show_is_replaced(tiny, tmp_path):
    for out, code, said in ("k\u00fcche", 0, "runs/k?che"), ("k\u00fcche", 2, "k?che holds a run"):
        words = ["--tasks", "gqa", *SMALL, *flags_of(tiny), "--out", f"runs/{out}"]
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, ROOT / "train.py", *words], cwd=tmp_path,
                              capture_output=True, env=environment, timeout=120)
        assert done.returncode == code and said.encode() in done.stdout + done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "1"},
    {"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}])
def test_half_of_what_torchrun_says_is_told(tiny, tmp_path, monkeypatch, capsys, environment):
    for name in "RANK", "MASTER_ADDR", "MASTER_PORT":
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert command("--tasks", "gqa", *flags_of(tiny), "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "WORLD_SIZE" in said and not (tmp_path / "run").exists()


def test_of_two_first_uses_of_the_miniature_world_one_waits(tmp_path, monkeypatch):
    drawn = []

    def write(path, **_):
        drawn.append(path.name)
        assert not path.exists(), "half a piece of a killed run is thrown away"
        path.mkdir()
        time.sleep(0.2)

    for name in "write_clip", "write_language_model":
        monkeypatch.setattr(toy, name, write)
    monkeypatch.setattr(toy, "DATA", {"GQA": (write, ["gqa"])})
    (tmp_path / "weights/bart-mini.unfinished/half").mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: toy.world(["gqa"], folder=tmp_path), range(3)))
    pieces = ["GQA.unfinished", "RN-mini.pt.unfinished", "bart-mini.unfinished"]
    assert drawn == pieces
    assert {path.name for path in tmp_path.glob("*/*")} == {"GQA", "RN-mini.pt", "bart-mini"}


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


def configure(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIG = "weights/bart-mini/config.json"
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
        "unknown sharing of lora: 'half'; known are single, multiple"),
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
        (), ["--batch", "0"], "batch is 0, expected a number from 1 to"),
    "size of no memory": (
        (), ["--method", "lora", "--sizes", "rank=1000000000"], "size rank is 1000000000, expected"),
    "method twice": ((), ["--method", "full+full"], "the method full+full has one twice"),
    "device without numbers": ((), ["--device", "meta"], "device 'meta' cannot be used"),
    "out is a file": ((), ["--out", __file__], "or other files: go on with --resume"),
    "pad of another vocabulary": (
        (partial(configure, pad_token_id=7), CONFIG), [], "config.json: pad_token_id is 7, but"),
    "eos of another vocabulary": (
        (partial(configure, eos_token_id=7), CONFIG), [], "config.json: eos_token_id is 7, but"),
    "bart truncated": (
        (truncate, BART), [], "pytorch_model.bin is truncated or not a weight file"),
    "bart misshapen": (
        (misshape, BART), [],
        "model.encoder.layers.0.fc1.weight is [3, 3], expected [256, 128]"),
    "bart hostile": ((hostile, BART), [], "pytorch_model.bin asks for posix.mkdir, expected"),
    "clip truncated": ((truncate, RN), [], "RN-mini.pt is truncated or not a weight file"),
    "clip of another model": ((swap, RN), [], "not a CLIP with a ResNet"),
    "clip hostile": ((hostile, RN), [], "RN-mini.pt asks for posix.mkdir, expected"),
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
    assert "last.pt: optimizer should be that of this run" in capsys.readouterr().err
    truncate(run / "last.pt")
    assert command("--resume", run) == 2
    assert "last.pt is truncated" in capsys.readouterr().err


def first(state: dict) -> dict:
    return state["optimizer"]["state"][0]


SPOILT = {  # what is done to last.pt, the message
    "short moment": (
        lambda x: first(x).update(exp_avg=torch.zeros(2)),
        "optimizer, exp_avg of weight 0 has the shape [2], expected ["),
    "huge view": (
        lambda x: first(x).update(exp_avg=torch.zeros(1).expand(10 ** 12)),
        "exp_avg of weight 0 has the shape [1000000000000]"),
    "no number": (
        lambda x: first(x)["exp_avg_sq"].fill_(torch.nan), "exp_avg_sq of weight 0 has numbers"),
    "negative square": (
        lambda x: first(x)["exp_avg_sq"].fill_(-1), "exp_avg_sq of weight 0 is negative"),
    "missing moment": (
        lambda x: first(x).pop("exp_avg"), "exp_avg of weight 0 is not a tensor"),
    "steps before the first": (
        lambda x: first(x)["step"].fill_(-1), "step of weight 0 is negative"),
    "weights beyond the last": (
        lambda x: x["optimizer"]["state"].update({999: first(x)}), "optimizer should be that of"),
    "no optimizer": (lambda x: x.update(optimizer="x"), "optimizer should be that of this run"),
    "step in words": (lambda x: x.update(step="x"), "step should be from 0 to 6"),
    "step of a longer run": (lambda x: x.update(step=7), "step should be from 0 to 6"),
    "best of nothing": (lambda x: x.update(best=torch.nan), "best should be a number"),
    "another run": (lambda x: x.update(run="0"), "is of another run than"),
}


def test_what_does_not_fit_in_last_pt_is_told_before_it_is_used(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert command("--tasks", "gqa", *SMALL, *flags_of(tiny), "--out", run) == 0
    whole = torch.load(run / "last.pt", weights_only=True)
    assert whole["step"] == 6
    for spoil, message in SPOILT.values():
        state = copy.deepcopy(whole)
        spoil(state)
        torch.save(state, run / "last.pt")
        assert command("--resume", run) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{run / 'last.pt'}" in said and message in said
    # What optimizer and model are told by this run's own code is not asked of the file.
    state = copy.deepcopy(whole)
    state["optimizer"]["param_groups"] = "x"
    first(state)["exp_avg"] = torch.zeros(1).expand(first(state)["exp_avg"].shape)
    torch.save(state | {"step": 3}, run / "last.pt")
    assert command("--resume", run) == 0


def test_odd_lines_of_a_log_are_left_out(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert command("--tasks", "gqa", *SMALL, *flags_of(tiny), "--out", run) == 0
    table = capsys.readouterr().out.split("\nepoch ")[-1]
    with open(run / "log.jsonl", "ab") as log:
        for line in (b"5", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"epoch": 3, "scores": {"gqa": {}}}',
                     b'{"epoch": "x", "scores": {"gqa": {"accuracy": 1}}}',
                     b'{"epoch": 3, "scores": {"gqa": {"accuracy": "x"}}}'):
            log.write(line + b"\n")
    assert command("--resume", run) == 0
    assert capsys.readouterr().out.split("\nepoch ")[-1] == table


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
