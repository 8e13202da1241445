"""Trains one method on one or more tasks and says what was reached.

    python train.py --method compacter --tasks vqa,gqa
    python train.py --method adapter --share none --tasks vqa,gqa --data datasets --weights weights
    torchrun --nproc-per-node 4 train.py --method full --tasks vqa,gqa --data datasets --weights weights
    python train.py --resume runs/compacter-vqa-gqa

Without --data and --weights it draws and uses the miniature world of toy.py. A run's folder holds config.json,
log.jsonl, last.pt (to go on from) and best.pt (the weights of the best epoch): only what was trained, not the backbone.
Every step is a function of the seed, its number and the weights, so a run that was killed goes on to the same numbers
(on a CPU bit by bit).
Needs torch, numpy, pillow, av, tqdm and all of ours.
"""

import argparse
import io
import json
import os
import platform
import random
import subprocess
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import toy
from adapters import METHODS, select, trainable
from data import TASKS, ahead, batch_size, mixture, report_problems, task_list, write_atomically
from evaluate import (PROBLEMS, RunError, answer, build_model, check_flags, check_labels, check_weights, family,
                      keep_in_bf16, load_run_weights, load_state, open_corpora, open_eye, pick_device, print_scores,
                      read_run, run_weights, score, weight_hashes, weight_path)
from model import FAMILIES, generate

WARMUP, CLIP, DECAY = 0.1, 5.0, 0.01                    # the paper's: share of the steps, norm of the gradient, decay
SAVE_EVERY = 1000                                       # steps, besides the end of each epoch
SHOW_EVERY = 20
PICTURE_TASKS = ["vqa", "gqa", "nlvr", "caption"]


# ---- the loop -----------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rises from 0 over the first tenth of the steps, then falls in a line to 0."""
    warmup = int(WARMUP * steps)
    return peak * (step / warmup if step < warmup else (steps - step) / max(1, steps - warmup))


def average(parameters: list, world: int):
    """Averages the gradients over the processes. All train the same task, so of the same weights."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / world).split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def train(flags: dict, run: Path, device: torch.device, world: int):
    eye, channels = open_eye(flags, device)
    model, tokenizer, filled = build_model(flags, channels)
    model.to(device)
    with first(world):                                  # the first process encodes the pictures for all
        corpora, validation = open_corpora(flags, tokenizer, eye, {task: TASKS[task].train for task in flags["tasks"]},
                                           {task: TASKS[task].validation for task in flags["tasks"]}, say=say)
    for task, corpus in validation.items():
        check_labels(task, corpus.examples)
    with first(world):
        describe(run, flags, device, world)
    trained, total = trainable(model), sum(p.numel() for p in model.parameters())
    parameters, count = list(trained.values()), sum(p.numel() for p in trained.values())
    say(f"{flags['method']} ({flags['share']}): {filled} places, trains {count:,} of {total:,} weights, "
        f"{100 * count / total:.2f} %")

    model.encoder.recompute = model.decoder.recompute = flags["recompute"]
    if flags["bf16"]:
        keep_in_bf16(model)
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, eps=1e-6, fused=True)
    sizes = {task: batch_size(task, flags["batch"] * flags["accumulate"]) for task in corpora}
    # Process r takes the rows r, r + each, ...; with --accumulate its part i those from r + world i on.
    each = world * flags["accumulate"]
    rows = {task: -(-size // each) * each for task, size in sizes.items()}                  # filled up to equal parts
    parts = [slice(rank() + world * i, None, each) for i in range(flags["accumulate"])]
    per_epoch = sum(-(-len(corpus) // sizes[task]) for task, corpus in corpora.items())
    steps, step, best, loss_of, decode = per_epoch * flags["epochs"], 0, -1.0, model.loss, model.decode
    if (run / "last.pt").exists():
        step, best = restore(run, model, optimizer)
        say(f"resumed at step {step:,} of {steps:,}")
    if rank() == 0:
        trim_log(run, step)

    def prepare(job: tuple):
        """The parts of one batch, on another thread while the device computes."""
        number, task, indices = job
        cuda = device.type == "cuda"
        return task, [corpora[task].batch(indices, rows[task], f"{flags['seed']} {number}", part, cuda) for part in parts]

    if flags["compile"]:
        model.train()
        loss_of, decode = compiled(model, corpora, rows, parts[0], flags["bf16"])
    for epoch in range(step // per_epoch, flags["epochs"]):
        model.train()
        batches, began, shown = mixture(corpora, sizes, flags["seed"], epoch), step, torch.zeros((), device=device)
        jobs = [(step + i, *batch) for i, batch in enumerate(batches[step % per_epoch:])]
        bar = tqdm(desc=f"epoch {epoch + 1}/{flags['epochs']}", initial=step % per_epoch, total=per_epoch, unit=" steps",
                   disable=rank() > 0)
        clock = Clock(device)
        for task, made in clock.waiting(ahead(prepare, jobs, 3, threads=2)):
            # ---- the whole of training
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, flags["lr"])
            # For dropout. 32 bits, for a CPU's generator takes no more.
            torch.manual_seed(random.Random(f"{flags['seed']} {step} {rank()}").getrandbits(32))
            select(model, task)
            for batch in made:
                batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=flags["bf16"]):
                    loss = loss_of(**batch) / len(made)
                loss.backward()
                shown += loss.detach()
            if world > 1:
                average(parameters, world)
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            # ---- what is shown and kept of it
            step += 1
            bar.update()
            if step % SHOW_EVERY == 0 or step % per_epoch == 0:
                log(run, bar, step, shown.item() / (step - began), clock)
                began, shown = step, torch.zeros((), device=device)
            if step % SAVE_EVERY == 0 and step % per_epoch != 0:
                save(run, model, optimizer, step, best)
        bar.close()
        scores = validate(model, tokenizer, validation, device, flags, decode, world)
        mean = sum(next(iter(parts.values())) for parts in scores.values()) / len(scores)
        if rank() == 0:
            print_scores(scores, f"epoch {epoch + 1}, validation")
            append(run, {"step": step, "epoch": epoch + 1, "scores": scores})
        if mean > best:
            best = mean
            save(run, model, None, step, best)
        save(run, model, optimizer, step, best)
    finish(run, flags)


class Clock:
    """Which share of the time went by waiting for data.

    On CUDA the host stays one step ahead of the device: further ahead it would wait for data that nobody needs yet.
    """

    def __init__(self, device: torch.device):
        self.began, self.waited, self.cuda = time.perf_counter(), 0.0, device.type == "cuda"

    def waiting(self, items):
        items, last = iter(items), None
        while True:
            if self.cuda:
                before, last = last, torch.cuda.Event()
                last.record()
                if before is not None:
                    before.synchronize()
            asked = time.perf_counter()
            item = next(items, None)
            self.waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    def __str__(self):
        return f"{100 * self.waited / (time.perf_counter() - self.began):.1f} %"


def compiled(model, corpora, rows: dict, part: slice, bf16: bool):
    """The compiled loss and decoding step, tried on each task; where that fails, the run goes on without.

    Tried with gradients and on two batches, for it is the second number of tokens that has graphs for any number made.
    """
    loss, decode = torch.compile(model.loss), torch.compile(model.decode, dynamic=True)
    device = next(model.parameters()).device
    try:
        for task, corpus in tqdm(corpora.items(), "compiling", unit=" tasks", disable=rank() > 0):
            select(model, task)
            count = min(len(corpus), rows[task])        # different examples, that do not all end at once
            for indices in range(count), range(count // 2, count):
                batch = {name: x.to(device) for name, x in corpus.batch(indices, rows[task], "", part).items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    value = loss(**batch)
                value.backward()
            if not TASKS[task].choices:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    generate(model.eval(), batch["ids"], batch["features"], TASKS[task].beams, decode=decode)
                model.train()
    except Exception as problem:                        # compilers fail in many ways, none of which should end the run
        say(f"torch.compile failed, going on without: {' '.join(str(problem).split())[:200] or type(problem).__name__}")
        loss, decode = model.train().loss, model.decode
    model.zero_grad()
    return loss, decode


def validate(model, tokenizer, corpora, device, flags, decode, world: int) -> dict[str, dict[str, float]]:
    """Process r answers the questions r, r + world, ...; all know the scores."""
    scores = {}
    for task, corpus in corpora.items():
        said = answer(model, tokenizer, corpus, device, flags["batch"], flags["bf16"], slice(rank(), None, world),
                      rank() > 0, decode)
        parts, predictions = [said] * world, [""] * len(corpus)
        if world > 1:
            dist.all_gather_object(parts, said)
        for i, part in enumerate(parts):
            predictions[i::world] = part
        scores[task] = score(task, corpus.examples, predictions)
    return scores


# ---- the run's folder ---------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process; 0 writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def first(world: int):
    """Process 0 goes through the block before the others."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world > 1:
        dist.barrier()


def say(text: str):
    if rank() == 0:
        print(text, flush=True)


def append(run: Path, record: dict):
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def log(run: Path, bar, step: int, loss: float, clock: Clock):
    if not loss < float("inf"):
        raise RunError(f"the loss is {loss} at step {step:,}: try a lower --lr; what was saved before lies in {run}")
    bar.set_postfix(loss=f"{loss:.3f}", waiting=str(clock), refresh=False)
    if rank() == 0:
        append(run, {"step": step, "loss": loss})


def save(run: Path, model, optimizer, step: int, best: float):
    """last.pt with the optimizer, best.pt without."""
    if rank() > 0:
        return
    state = {"weights": run_weights(model), "step": step, "best": best}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    buffer, path = io.BytesIO(), run / ("best.pt" if optimizer is None else "last.pt")
    torch.save(state, buffer)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as problem:
        raise RunError(f"{path} could not be saved ({problem.strerror}); what was saved before is whole, "
                       f"go on from there with --resume {run}") from None


def restore(run: Path, model, optimizer) -> tuple[int, float]:
    """Loads weights and optimizer; returns the saved step and the best score so far."""
    state = load_state(run / "last.pt")
    load_run_weights(model, state["weights"], run / "last.pt")
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["best"]


def trim_log(run: Path, step: int):
    """Leaves the lines of the log up to the step from which the run goes on."""
    path, lines = run / "log.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(line + "\n" if json.loads(line)["step"] <= step else "")
        except ValueError:                              # the line a killed run was writing
            continue
    write_atomically(path, "".join(lines).encode())


def finish(run: Path, flags: dict):
    """The table of all epochs, and where everything lies."""
    if rank() > 0:
        return
    epochs = [r for r in map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines()) if "scores" in r]
    print(f"\n{'epoch':<8}" + "".join(f"{task:>10}" for task in flags["tasks"]) + f"{'mean':>10}")
    for record in epochs:
        heads = [next(iter(record["scores"][task].values())) for task in flags["tasks"]]
        print(f"{record['epoch']:<8}" + "".join(f"{x:>10.2f}" for x in heads) + f"{sum(heads) / len(heads):>10.2f}")
    size = (run / "best.pt").stat().st_size
    print(f"\nthe run is in {run}: best.pt has its {size / 1e6:.1f} MB of weights"
          f"\nnext: python evaluate.py {run}")


# ---- python train.py ----------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a parameter-efficient method on vision-and-language tasks.",
                                     allow_abbrev=False)
    what = parser.add_argument_group("what is trained")
    what.add_argument("--method", metavar="M", help=f"{', '.join(METHODS)}, or two joined by + (default: adapter)")
    what.add_argument("--tasks", type=task_list, metavar="A,B", help=f"of {', '.join(TASKS)} (default: the first four)")
    what.add_argument("--share", choices=("all", "half", "none"), help="all: one adapter for all tasks (default); half: "
                      "up projections for all, down projections per task; none: one adapter per task")
    what.add_argument("--sites", type=lambda text: text.split(","), metavar="S,S",
                      help="fill only these places: ffn, self_attn, encoder, decoder.cross_attn, ... (default: all)")
    what.add_argument("--sizes", type=sizes, metavar="K=V,K=V", help="other sizes of the method, such as reduction=4")
    what.add_argument("--prompts", action=argparse.BooleanOptionalAction,
                      help="begin questions with the name of their task (default: yes)")
    files = parser.add_argument_group("files (without --data and --weights: the built-in miniature world)")
    files.add_argument("--data", metavar="DIR", help="data sets; `python data.py --data DIR` looks at them")
    files.add_argument("--weights", metavar="DIR", help="pre-trained weights: DIR/bart-base/, DIR/RN101.pt")
    files.add_argument("--backbone", metavar="NAME", help="folder in --weights, such as t5-base (default: bart-base; without "
                       "--weights bart or t5)")
    files.add_argument("--vision", metavar="NAME", help="CLIP in --weights, or features in DIR/video/vis_features/*/ "
                       "(default: RN101; for videos clip-vit)")
    files.add_argument("--allow-missing", action="store_true", default=None,
                       help="leave out examples whose pictures are missing or broken")
    files.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (default: runs/METHOD-TASKS)")
    files.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped, with its flags")
    how = parser.add_argument_group("how")
    how.add_argument("--epochs", type=int, metavar="N", help="default: 20; videos: 7")
    how.add_argument("--batch", type=int, metavar="N", help="examples a step, over all processes (default: 500, "
                     "T5 300; videos 50 and 30)")
    how.add_argument("--accumulate", type=int, metavar="N", help="batches whose gradients make one step (default: 1)")
    how.add_argument("--recompute", action="store_true", default=None,
                     help="activation checkpointing: less memory, about a third more time")
    how.add_argument("--lr", type=float, metavar="X", help="highest learning rate (default: the first method's)")
    how.add_argument("--seed", type=int, metavar="N", help="default: 9595, as the authors'")
    how.add_argument("--device", metavar="D", help="cpu, cuda, ... (default: cuda if there is one)")
    how.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on CUDA)")
    how.add_argument("--fp16", action="store_true", help=argparse.SUPPRESS)
    how.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    args = parser.parse_args()
    if vars(args).pop("fp16"):
        parser.error("--fp16 is not built: T5's hidden states overflow half precision (inf, then NaN), "
                     "and bfloat16, --bf16, needs no loss scaling")
    return args


def sizes(text: str) -> dict:
    """reduction=4,shared_rule=true"""
    try:
        return {key: json.loads(value) for key, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected KEY=NUMBER,KEY=true,... not {text!r}") from None


def complete(given: dict, device: torch.device, world: int) -> dict:
    """All flags of a new run: those given, the miniature world's where there are no data, and the paper's."""
    if ("data" in given) != ("weights" in given):
        raise RunError("--data and --weights go together; without both, the built-in miniature world is used")
    method, share, tasks = given.get("method", "adapter"), given.get("share", "all"), given.get("tasks", PICTURE_TASKS)
    for name in method.split("+"):
        if name not in METHODS:
            raise RunError(f"unknown method: {name!r}; known are {', '.join(METHODS)}")
        if share not in METHODS[name].shares:
            raise RunError(f"{name} has no --share {share}; it has {', '.join(METHODS[name].shares)}")
    row, cuda, video = METHODS[method.split("+")[0]], device.type == "cuda", TASKS[tasks[0]].video
    lr = row.lr_videos if video else row.lr_per_task if share != "all" and row.lr_per_task else row.lr
    flags = dict(method=method, tasks=tasks, share=share, sites=None, sizes={}, prompts=True, backbone="bart-base",
                 vision="clip-vit" if video else "RN101", epochs=7 if video else 20, batch=50 if video else 500,
                 accumulate=1, seed=9595, bf16=cuda, compile=cuda, recompute=False, allow_missing=False, lr=lr)
    given = {name: value for name, value in given.items() if name not in ("out", "device")}
    if "data" not in given:
        kind = given.pop("backbone", "bart")
        if kind not in FAMILIES:
            raise RunError(f"the miniature world has the backbones {' and '.join(FAMILIES)}, not {kind}; "
                           "for others give --data and --weights")
        say(f"no --data given: the built-in miniature world, drawn and trained into {toy.FOLDER} on its first use")
        with first(world):
            miniature = toy.world(tasks, kind)
        flags["lr"] *= miniature.pop("faster")
        flags |= miniature
    elif family(weight_path(flags | given, (flags | given)["backbone"])) == "t5":
        flags["batch"] = 30 if video else 300
    flags |= given
    check_flags(flags)
    return flags


def begin(given: dict, device: torch.device, world: int) -> tuple[Path, dict]:
    """A new run: its folder, the same for all processes, and its flags."""
    flags = complete(given, device, world)
    share = [] if flags["share"] == "all" else [flags["share"]]
    run = given.get("out") or Path("runs") / "-".join([flags["method"], *share, *flags["tasks"]])
    if "out" in given and (run / "config.json").exists():
        raise RunError(f"{run} holds a run already: go on with --resume {run}, or choose another --out")
    name, number = run.name, 2
    while (run / "config.json").exists():
        run, number = run.with_name(f"{name}-{number}"), number + 1
    chosen = [run]
    if world > 1:
        dist.broadcast_object_list(chosen)
    return chosen[0], flags


def describe(run: Path, flags: dict, device: torch.device, world: int):
    """Makes the folder of a new run with its config.json, once everything that it needs was found to be there."""
    if rank() > 0 or (run / "config.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    about = {"flags": flags, **weight_hashes(flags), "python": platform.python_version(), "torch": torch.__version__,
             "device": device_name(device), "processes": world, "commit": commit()}
    write_atomically(run / "config.json", json.dumps(about, indent=2).encode())


def resume(given: dict) -> tuple[Path, dict]:
    """A run that was stopped, with the flags it was begun with; others are refused."""
    run = given["resume"]
    flags = read_run(run)
    for name, value in given.items():
        if name not in flags and name not in ("resume", "device"):
            raise RunError(f"--{name.replace('_', '-')} cannot be given with --resume")
        if name not in ("resume", "device") and flags[name] != value:
            raise RunError(f"{run} was begun with {name} {flags.get(name)}, not {value}")
    check_weights(run, flags)
    return run, flags


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of this code, where it lies in a git checkout."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:                                     # there is no git
        return None
    return asked.stdout.strip() or None


def main():
    given = {name: value for name, value in vars(parse()).items() if value is not None}
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(given.get("device"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # The others wait while the first process encodes all pictures, which may take longer than any usual timeout.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    run, flags = resume(given) if "resume" in given else begin(given, device, world)
    say(f"data: {flags['data']}, weights: {flags['weights']} ({flags['backbone']}, {flags['vision']}), "
        f"run: {run}, on {device_name(device)}")
    train(flags, run, device, world)
    if world > 1:                                       # not after an error: it would wait for the others, they for this
        dist.destroy_process_group()


if __name__ == "__main__":
    report_problems(main, *PROBLEMS)
