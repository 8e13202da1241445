"""Trains one method on one or more tasks and says what was reached.

    python train.py --method compacter --tasks vqa,gqa
    python train.py --method adapter --sharing multiple --data datasets --weights weights
    torchrun --nproc-per-node 4 train.py --method full --data datasets --weights weights
    python train.py --resume runs/compacter-vqa-gqa

Without --data and --weights it draws and uses the miniature world of toy.py. A run's folder holds
config.json, log.jsonl, last.pt (to go on from) and best.pt (of the best epoch), with the weights
that were trained and without the backbone's. Every step is a function of the seed, its number and
the weights, so a run that was killed goes on to the same numbers (on a CPU bit by bit).
Needs torch, numpy, tqdm and all of ours. original: FILE#L is
https://github.com/ylsung/VL_adapter/blob/545fcbb/VL-T5/src/FILE#L.
"""

import argparse
import json
import math
import os
import platform
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import toy
from adapters import METHODS, AdapterError, cast_frozen, misfit, save, select, trainable
from data import (TASKS, Corpus, batch_size, batches, check_labels, open_corpora, out_of_memory,
                  report_problems, steps_per_epoch, write_atomically)
from evaluate import PROBLEMS, Run, RunError, answer, open_run, pick_device, print_scores, score
from model import FAMILIES, VLModel

# As the authors train every method, with pictures and with videos.
# original: ../scripts/image/single_adapter.sh#L36-L37
# original: param.py#L121-L127
WARMUP = 0.1  # share of the steps
MAX_NORM = 5.0  # of all gradients
DECAY = 0.01
EPSILON = 1e-6

SAVE_EVERY = 1000  # steps, besides the end of each epoch
SHOW_EVERY = 20


# ---- the loop ----


def train(run: Run, folder: Path, hashes: dict[str, str], device: torch.device, resume: bool):
    """Trains what `run` asks for into its folder; resume: goes on from last.pt there."""
    # The model with its method, what it learns from, and the optimizer of what is trained.
    model, tokenizer, corpora, validation = prepare(run, folder, hashes, device)
    parameters = list(trainable(model).values())
    optimizer = adamw(parameters)
    per_epoch = steps_per_epoch(corpora, run.batch * run.accumulate)
    step, best = 0, -1.0
    if resume:
        step, best = restore(folder, model, optimizer, per_epoch * run.epochs)
    loss_of, decode = model.loss, model.decode
    if run.compile:
        loss_of, decode = compile_both(model, corpora, run)

    for epoch in range(step // per_epoch, run.epochs):
        # Each example once, each batch of one task, the tasks in random turns.
        model.train()
        progress = Progress(folder, f"epoch {epoch + 1}/{run.epochs}", step, per_epoch)
        made = batches(corpora, run.batch, run.seed, epoch, skip=step % per_epoch, rank=rank(),
                       world=world(), accumulate=run.accumulate, pin=device.type == "cuda")
        for task, parts in progress.over(made):
            # ---- the whole of training
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, per_epoch * run.epochs, run.lr)
            seed_dropout(run.seed, step)
            select(model, task)
            for batch in parts:
                batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
                if run.compile:
                    mark_lengths(batch)
                with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
                    loss = loss_of(**batch) / len(parts)
                loss.backward()
                progress.losses.append(loss.detach())
            if world() > 1:
                average(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            # ---- what is shown and kept of it
            step += 1
            progress.update(step)
            if step % SAVE_EVERY == 0 and step % per_epoch != 0:
                save_last(folder, model, optimizer, step, best)

        # What it has learned, and what is kept: the best to use, the last to go on from.
        scores = validate(model, tokenizer, validation, run, device, decode)
        mean = mean_headline(scores)
        if rank() == 0:
            print_scores(scores, f"epoch {epoch + 1}, validation")
            append(folder, {"step": step, "epoch": epoch + 1, "scores": scores})
        if mean > best:
            best = mean
            save_weights(folder, "best.pt", model, step=step, best=best)
        save_last(folder, model, optimizer, step, best)
    finish(folder, run.tasks)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rises from 0 over the first tenth of the steps, then falls in a line to 0.

    original: trainer_base.py#L505-L515

    >>> [learning_rate(step, 20, 1.0) for step in (0, 1, 2, 11, 20)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warmup = int(WARMUP * steps)
    if step < warmup:
        return peak * (step / warmup)
    return peak * ((steps - step) / max(1, steps - warmup))


def adamw(parameters: list) -> torch.optim.Optimizer:
    """Matrices decay; vectors, such as biases and the weights of norms, do not.

    The authors go by names, "bias" and "LayerNorm.weight", which BART's and T5's norms do not have.
    original: trainer_base.py#L420
    """
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, eps=EPSILON, fused=True)


def seed_dropout(seed: int, step: int):
    """What is dropped depends on step and process alone, so that a run can go on anywhere."""
    # 32 bits, for a CPU's generator takes no more.
    torch.manual_seed(random.Random(f"{seed} {step} {rank()}").getrandbits(32))


def average(parameters: list):
    """Averages the gradients over the processes. All train the same task, so the same weights."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])  # [all of them]
    dist.all_reduce(flat)
    means = (flat / world()).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means):
        gradient.copy_(mean.view_as(gradient))


def prepare(run: Run, folder: Path, hashes: dict[str, str], device: torch.device) -> tuple:
    """The model, its tokenizer, {task: Corpus} to learn from and to validate with."""
    model, tokenizer, features, filled = open_run(run, hashes, device)
    model.to(device)
    corpora, validation = open_corpora(
        Path(run.data), run.vision, features, tokenizer,
        {task: TASKS[task].train for task in run.tasks},
        {task: TASKS[task].validation for task in run.tasks},
        **run.reading(), say=print0, first=rank0_first)
    for task, corpus in validation.items():
        check_labels(task, corpus.examples)
    note_examples(folder, {task: len(corpus) for task, corpus in corpora.items()})

    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trainable(model).values())
    print0(f"{run.method} ({run.sharing}): {filled} sites, trains {count:,} of {total:,} weights, "
           f"{100 * count / total:.2f} %")
    model.encoder.recompute = model.decoder.recompute = run.recompute
    if run.bf16:
        cast_frozen(model)
    return model, tokenizer, corpora, validation


# ---- torch.compile ----


def compile_or_not(function: Callable, trial: Callable, **options) -> Callable:
    """The compiled function if `trial`, which is given it, succeeds; else the function itself."""
    # Behind so many graphs torch goes on without compiling, with a warning.
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(function, **options)
    try:
        trial(compiled)
        return compiled
    except Exception as problem:  # compilers fail in many ways, none of which should end the run
        if out_of_memory(problem):  # without compiling it takes more
            raise
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        print0(f"torch.compile failed, going on without: {reason}")
        return function


def mark_lengths(batch: dict):
    """A task's batches differ only in how many tokens they have: its graph takes any number."""
    for name in "text_indices", "label_indices":
        torch._dynamo.mark_dynamic(batch[name], 0)


def compile_both(model: VLModel, corpora: dict[str, Corpus], run: Run) -> tuple:
    """model.loss and model.decode, compiled if that works with every task."""
    print0("compiling, which takes minutes")
    device = next(model.parameters()).device
    trials = []
    for task, corpus in corpora.items():
        # Two batches, for decoding is compiled for any size from the second on.
        parts = world() * run.accumulate
        rows = -(-batch_size(task, run.batch * run.accumulate, len(corpus)) // parts)
        count = min(len(corpus), rows)
        for indices in range(count), range(count // 2, count):
            batch = corpus.batch(np.array(indices), rows, seed="")
            trials.append((task, {name: x.to(device) for name, x in batch.items()}))

    def try_loss(loss_of: Callable):
        model.train()
        for task, batch in trials:
            select(model, task)
            mark_lengths(batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
                loss = loss_of(**batch)
            loss.backward()

    def try_decode(decode: Callable):
        model.eval()
        for task, batch in trials:
            select(model, task)
            with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
                if not TASKS[task].choices:
                    model.answer(batch["ids"], batch["features"], TASKS[task].beams, decode=decode)

    loss_of = compile_or_not(model.loss, try_loss, dynamic=False)
    decode = compile_or_not(model.decode, try_decode, dynamic=True)
    model.zero_grad()
    return loss_of, decode


# ---- validation ----


def validate(model, tokenizer, corpora, run: Run, device, decode) -> dict[str, dict[str, float]]:
    """The scores of each task, known to all processes."""
    scores = {}
    batch = -(-run.batch // world())
    for task, corpus in corpora.items():
        # Process r answers the examples r, r + world(), ...
        said = answer(model, tokenizer, corpus, device, batch, run.bf16,
                      part=slice(rank(), None, world()), quiet=rank() > 0, decode=decode)
        parts = [said]
        if world() > 1:
            parts = [None] * world()
            dist.all_gather_object(parts, said)
        scores[task] = score(task, corpus.examples, interleave(parts))
    return scores


def interleave(parts: list[list[str]]) -> list[str]:
    """What all processes have answered, in the order of the examples.

    >>> interleave([["a", "c", "e"], ["b", "d"]])
    ['a', 'b', 'c', 'd', 'e']
    """
    whole = [""] * sum(map(len, parts))
    for r, part in enumerate(parts):
        whole[r::len(parts)] = part
    return whole


def mean_headline(scores: dict[str, dict[str, float]]) -> float:
    """The mean of the tasks' first scores: accuracy or CIDEr."""
    return sum(next(iter(parts.values())) for parts in scores.values()) / len(scores)


# ---- the processes ----


def rank() -> int:
    """The number of this process. Process 0 writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def rank0_first():
    """Process 0 goes through a block before the others."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


def from_rank0(make: Callable):
    """What process 0 makes, on all processes."""
    made = [make() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(made)
    return made[0]


def print0(text: str):
    if rank() == 0:
        print(text, flush=True)


# ---- the run's folder ----


class Progress:
    """The bar of an epoch. Every few steps it shows their mean loss, which is also logged, and the
    share of the time that went by waiting for batches. Both are of process 0's part.
    """

    def __init__(self, folder: Path, name: str, step: int, per_epoch: int):
        self.folder = folder
        self.per_epoch = per_epoch
        self.logged = step
        self.losses = []  # on the device, of each part of the steps since the last record
        self.waiting = 0.0
        self.bar = tqdm(desc=name, initial=step % per_epoch, total=per_epoch, unit=" steps",
                        mininterval=0.1 if sys.stderr.isatty() else 10, disable=rank() > 0)

    def over(self, items: Iterator) -> Iterator:
        began = asked = time.perf_counter()
        waited = 0.0
        for item in items:
            waited += time.perf_counter() - asked
            self.waiting = waited / (time.perf_counter() - began)
            yield item
            asked = time.perf_counter()
        self.bar.close()

    def update(self, step: int):
        self.bar.update()
        if step % SHOW_EVERY and step % self.per_epoch:
            return
        loss = sum(self.losses).item() / (step - self.logged)
        if not loss < float("inf"):
            raise RunError(f"the loss is {loss} at step {step:,}: try a lower --lr")
        self.bar.set_postfix(loss=f"{loss:.3f}", waiting=f"{self.waiting:.1%}", refresh=False)
        if rank() == 0:
            append(self.folder, {"step": step, "loss": loss})
        self.logged = step
        self.losses = []


def append(folder: Path, record: dict):
    try:
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as problem:  # a full disk's has no name
        raise RunError(f"{folder / 'log.jsonl'} cannot be written: {problem.strerror}") from None


def save_last(folder, model, optimizer, step, best):
    """What a run goes on from."""
    save_weights(folder, "last.pt", model, step=step, best=best, optimizer=optimizer.state_dict())


def save_weights(folder, name, model, **others):
    if rank() > 0:
        return
    try:
        save(model, folder / name, run=Run.read_config(folder)["id"], **others)
    except AdapterError as problem:
        raise RunError(f"{problem}; what was saved before is whole, "
                       f"go on from there with --resume {folder}") from None


def restore(folder, model, optimizer, steps: int) -> tuple[int, float]:
    """Loads last.pt, if it is there; the step to go on from, and the best score so far."""
    path = folder / "last.pt"
    if not path.exists():
        return 0, -1.0
    others = Run.load_weights(model, folder, "last.pt")
    step, best, saved = (others.get(name) for name in ("step", "best", "optimizer"))

    def check(good, expected):
        if not good:
            raise RunError(f"{path}: {expected}")

    check(type(step) is int and 0 <= step <= steps, f"step should be from 0 to {steps:,}")
    check(type(best) is float and math.isfinite(best), "best should be a number")
    moments = saved.get("state") if isinstance(saved, dict) else None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    check(isinstance(moments, dict) and moments.keys() <= set(range(len(parameters))),
          "optimizer should be that of this run")
    ours = optimizer.state_dict()
    for number, moment in moments.items():
        ours["state"][number] = {}
        for name in "step", "exp_avg", "exp_avg_sq":
            like = torch.zeros(()) if name == "step" else parameters[number]
            there = moment.get(name) if isinstance(moment, dict) else None
            problem = misfit(there, like)
            if not problem and name != "exp_avg" and there.min() < 0:
                problem = "is negative"
            check(not problem, f"optimizer, {name} of weight {number} {problem}")
            # A copy, laid out as the weight: a view of another shape in memory would be overrun.
            ours["state"][number][name] = torch.zeros_like(like).copy_(there)
    optimizer.load_state_dict(ours)
    print0(f"resumed at step {step:,}")
    return step, best


def finish(folder: Path, tasks: list[str]):
    """Prints the table of all epochs, and where everything lies."""
    if rank() > 0:
        return
    epochs = {}
    for line in (folder / "log.jsonl").read_bytes().splitlines():
        try:
            record = json.loads(line)
            scores = {task: record["scores"][task] for task in tasks}
            heads = [float(next(iter(parts.values()))) for parts in scores.values()]
            epochs[int(record["epoch"])] = [*heads, sum(heads) / len(heads)]
        except Exception:  # it is a loss, or not ours
            continue

    print(f"\n{'epoch':<8}" + "".join(f"{task:>10}" for task in tasks) + f"{'mean':>10}")
    for epoch, columns in sorted(epochs.items()):  # of two lines that of the resumed run
        print(f"{epoch:<8}" + "".join(f"{x:>10.2f}" for x in columns))
    size = (folder / "best.pt").stat().st_size
    print(f"\nthe run is in {folder}: best.pt has its {size / 1e6:.1f} MB of weights"
          f"\nnext: python evaluate.py {folder}")


def new_folder(run: Run, out: Path | None) -> Path:
    """--out, or the first of runs/METHOD-TASKS, runs/METHOD-TASKS-2, ... that is not there.

    Of two runs that begin at once one makes it.
    """
    sharing = [] if run.sharing == "single" else [run.sharing]
    name = "-".join([run.method, *sharing, *run.tasks])
    for number in count(1):
        folder = out or Path("runs", name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not out:
                continue
            if not out.is_dir() or not all(map(is_unbegun, out.iterdir())):
                raise RunError(f"{out} holds a run already, or other files: go on with --resume "
                               f"{out}, or choose another --out") from None
        return folder


def is_unbegun(path: Path) -> bool:
    """What a run leaves that was killed before its config.json was there."""
    return ".unfinished" in path.name or path.name == "log.jsonl" and not path.stat().st_size


@contextmanager
def claimed(folder: Path, config: dict | None):
    """Keeps others out of a run's folder. A new run, with a config, that fails before there is
    anything to keep leaves none.
    """
    if rank() > 0:
        yield
        return
    log = folder / "log.jsonl"
    if log.exists() and not log.is_file():
        raise RunError(f"{log} is not a regular file")
    with open(log, "ab") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder} is in use by another process") from None
        except (ImportError, OSError):  # there are no locks
            pass
        file.truncate(log.read_bytes().rfind(b"\n") + 1)  # a killed run may leave half a line
        try:
            if config:
                write_config(folder, config)
            yield
        except BaseException:
            with suppress(OSError):
                if config and not log.stat().st_size and not (folder / "last.pt").exists():
                    (folder / "config.json").unlink()
                    log.unlink()
                    folder.rmdir()
            raise


def write_config(folder: Path, config: dict):
    write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())


def note_examples(folder: Path, examples: dict[str, int]):
    """Keeps in config.json how many there are. Raises RunError if there were others."""
    config = Run.read_config(folder)
    begun = config["examples"]
    if begun and begun != examples:
        raise RunError(f"the data have changed: in {folder / 'config.json'} examples are {begun}, "
                       f"now there are {examples}")
    if rank() == 0 and not begun:
        write_config(folder, config | {"examples": examples})


def describe(run: Run, hashes: dict[str, str], device: torch.device) -> dict:
    """The config.json of a new run."""
    return {
        "flags": vars(run), **hashes, "id": secrets.token_hex(8),
        "python": platform.python_version(), "torch": torch.__version__,
        "device": device_name(device), "processes": world(), "commit": commit()}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of this code, where it lies in a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        asked = subprocess.run(git, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return asked.stdout.strip() or None


# ---- python train.py ----


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains one method on one or more tasks.", allow_abbrev=False)
    Run.add_flags(parser)
    add = parser.add_argument_group("the run").add_argument
    add("--out", type=Path, metavar="RUN", help="its folder (default: runs/METHOD-TASKS)")
    add("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped")
    add("--device", metavar="D", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args()
    if args.resume and args.out:
        parser.error("--out cannot be given with --resume")
    return args


def with_defaults(given: dict, device: torch.device) -> Run:
    """A new run: the flags that were given, or the miniature world's, or the authors'.

    original: ../scripts/image/single_adapter.sh#L9-L39, ../scripts/video/single_adapter.sh#L9-L40
    """
    run = Run(**given)
    run.check(complete=False)
    if (run.data is None) != (run.weights is None):
        raise RunError("--data and --weights go together; without both, the built-in miniature "
                       "world is used")

    # The authors' flags, of the method and of the kind of tasks.
    cuda = device.type == "cuda"
    row = METHODS[run.method.split("+")[0]]
    defaults = {
        "vision": "RN101", "epochs": 20, "batch": 500, "lr": row.lr, "bf16": cuda, "compile": cuda}
    if run.sharing != "single" and row.lr_per_task:
        defaults["lr"] = row.lr_per_task
    if run.video:
        defaults |= {"vision": "clip-vit", "epochs": 7, "batch": 50, "lr": row.lr_videos}

    # The miniature world's instead, or what the backbone changes.
    if run.data is None:
        family = run.backbone or "bart"
        if family not in FAMILIES:
            raise RunError(f"the miniature world has the backbones {' and '.join(FAMILIES)}, "
                           f"not {family}; for others give --data and --weights")
        print0("no --data given: the built-in miniature world, "
               f"drawn and trained into {toy.FOLDER} on its first use")
        with rank0_first():
            defaults |= toy.world(run.tasks, family)
        defaults["lr"] *= defaults.pop("lr_scale")
        run.backbone = None  # its name is the miniature's
    else:
        run.backbone = run.backbone or "bart-base"
        if run.family() == "t5":
            defaults["batch"] = 30 if run.video else 300

    # What was given stays.
    run = replace(run, **{name: x for name, x in defaults.items() if getattr(run, name) is None})
    run.check()
    return run


def stopped_run(folder: Path, given: dict) -> Run:
    """A run to go on with. Raises RunError for flags other than those it was begun with.

    Where files lie may change: hashes tell whether they are the same.
    """
    run = Run.read(folder)
    for name, value in given.items():
        begun = getattr(run, name)
        if name in ("data", "weights", "cache", "compile"):
            setattr(run, name, value)
        elif begun != value:
            raise RunError(f"{folder} was begun with {name} {begun}, not {value}")
    run.check()
    return run


def join_processes(device: torch.device):
    """torchrun tells each process who it is. Raises RunError."""
    number = os.environ.get("WORLD_SIZE", "1")
    if number == "1":
        return
    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise RunError(f"WORLD_SIZE is {number} without RANK, MASTER_ADDR and MASTER_PORT: start "
                       "with torchrun, or, for one process, unset it")
    # The others wait while process 0 encodes all pictures: longer than any usual timeout.
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(days=1))
    except (ValueError, RuntimeError) as problem:
        reason = str(problem).split("\n")[0]
        raise RunError(f"the {number} processes of WORLD_SIZE do not meet: {reason}") from None


def main():
    args = parse()
    given = {name: x for name, x in vars(args).items() if x is not None}
    for name in "out", "resume", "device":
        given.pop(name, None)

    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    join_processes(device)

    folder, config = args.resume, None
    if folder:
        run = stopped_run(folder, given)
    else:
        run = with_defaults(given, device)
    hashes = from_rank0(run.hashes)
    if folder:
        run.check_hashes(folder, hashes)
    else:
        folder = from_rank0(lambda: new_folder(run, args.out))
        config = describe(run, hashes, device)
    print0(f"data: {run.data}, weights: {run.weights} ({run.backbone}, {run.vision}), "
           f"run: {folder}, on {device_name(device)}")
    with claimed(folder, config):
        train(run, folder, hashes, device, resume=bool(args.resume))
    if world() > 1:  # not after an error: it would wait for the others, and they for this
        dist.destroy_process_group()


if __name__ == "__main__":
    report_problems(main, *PROBLEMS)
