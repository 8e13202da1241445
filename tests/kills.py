"""Kills tiny runs at random moments: is every file whole, nothing lost, every number the same?

    python tests/kills.py [--kills 100] [--interrupts 20] [--seed 0] [--keep DIR]

In a tiny world `train.py` is started, ended by SIGKILL or by Ctrl-C (SIGINT) at a random moment,
started again with --resume (or anew, where no run was claimed yet), ended again, ... until it comes
to its end, with pictures that must be encoded first. Half of the moments are drawn over the whole
life of the command, half within a phase that is drawn first, for some phases are short.

After each the folder is looked at: JSON parses, .pt files load, the rows of a store's index are
different and fit features.f16, and what the progress bar had called encoded is in the index and
stays as it is, so that the next start encodes only the rest. At the end of each run its weights,
best.pt and last.pt with the optimizer, must be bitwise those of a run that nobody disturbed.
Prints a line for each fault, and a table by phase; exit code 1 if there is any. Linux only.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

import campaign
from campaign import ENVIRONMENT, ROOT, quiet, train_command

PHASES = ["starting", "encoding", "training", "validating", "saving", "ending"]
COMMAND = train_command("--tasks", "gqa", "--batch", "48", out="run", epochs=3)
GO_ON = ["train.py", "--resume", "run", "--device", "cpu"]
BAR = re.compile(r"encoding (\w+):[^\r\n]*?(\d+)/(\d+)")
UNFINISHED = (".part", ".unfinished", ".tmp")


# ---- one start ----


class Start:
    """The command in a folder, with what it says in a file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.claimed = (folder / "run/config.json").exists()
        self.out = open(folder / "said", "wb")
        argv = GO_ON if self.claimed else COMMAND
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / argv[0]), *argv[1:]], cwd=folder, env=ENVIRONMENT,
            stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.out, start_new_session=True)

    def said(self) -> str:
        return (self.folder / "said").read_bytes().decode("utf-8", "replace")

    def phase(self) -> str:
        """By unfinished files, and the last of the lines and bars."""
        if any(path.name.endswith(UNFINISHED) or ".unfinished" in path.name
               for path in self.files("run")):
            return "saving"
        said = self.said()
        marks = {"encoding": said.rfind("encoding "), "training": said.rfind("epoch "),
                 "validating": said.rfind("answering "), "ending": said.rfind("the run is in")}
        last = max(marks, key=marks.get)
        return last if marks[last] >= 0 else "starting"

    def files(self, name: str) -> list[Path]:
        try:
            return list((self.folder / name).iterdir())
        except OSError:
            return []

    def wait_for(self, phase: str, end: float):
        while self.process.poll() is None and time.monotonic() < end and self.phase() != phase:
            time.sleep(0.0005 if phase == "saving" else 0.01)

    def end(self, number: int) -> tuple[int, str]:
        """Sends the signal; exit code and the phase it hit."""
        phase = self.phase()
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        code = self.process.wait()
        self.out.close()
        return code, phase


# ---- what is in a folder ----


def look(folder: Path) -> list[str]:
    """What cannot be read there."""
    faults = []
    for path in sorted([*folder.glob("run/*"), *folder.glob("datasets/features/**/*")]):
        if path.is_dir() or any(mark in path.name for mark in UNFINISHED):
            continue
        try:
            read(path)
        except Exception as problem:  # whatever it is, it cannot be read
            faults.append(f"{path.relative_to(folder)}: {type(problem).__name__} {problem}"[:200])
    return faults


def read(path: Path):
    if path.name == "index.json":
        check_index(path)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        for line in path.read_text().split("\n")[:-1]:  # the last may be half a line
            json.loads(line)
    elif path.suffix == ".pt":
        assert torch.load(path, weights_only=True), "nothing in it"


def read_rows(path: Path) -> tuple[dict[str, int], int]:
    """A store's rows by name, of index.json and the whole lines of new.jsonl; bytes of a row."""
    index = json.loads(path.read_text())
    rows = index["pictures"]
    if (path.parent / "new.jsonl").exists():
        for line in (path.parent / "new.jsonl").read_text().split("\n")[:-1]:
            rows |= json.loads(line)["pictures"]
    return rows, 2 * index["tokens"] * index["channels"]


def check_index(path: Path):
    rows, size = read_rows(path)
    there = (path.parent / "features.f16").stat().st_size // size
    assert len(set(rows.values())) == len(rows), "two pictures have one row"
    assert all(0 <= row < there for row in rows.values()), f"a row is none of the {there}"


def encoded(folder: Path) -> dict[str, dict[str, bytes]]:
    """Of each store what its index names, by name."""
    stores = {}
    for path in folder.glob("datasets/features/*/RN-mini/index.json"):
        rows, size = read_rows(path)
        content = (path.parent / "features.f16").read_bytes()
        stores[path.parts[-3]] = {name: content[row * size:(row + 1) * size]
                                  for name, row in rows.items()}
    return stores


def lost(before: dict, after: dict, said: str, total: dict) -> list[str]:
    """Features that went or changed, that the bar had counted, or that were encoded again."""
    faults = []
    for source, rows in before.items():
        kept = after.get(source, {})
        if gone := sum(kept.get(name) != features for name, features in rows.items()):
            faults.append(f"{gone} of {len(rows)} features of {source} went or are others")
    bars = defaultdict(list)
    for source, done, of in BAR.findall(said):
        bars[source].append((int(done), int(of)))
    for source, counts in bars.items():
        had = len(before.get(source, {}))
        (first, of), (last, _) = counts[0], counts[-1]
        offset = total[source] - of  # a bar may count the rest only
        if len(after.get(source, {})) < last + offset:
            faults.append(f"the bar had {last + offset} of {source}, "
                          f"the index has {len(after.get(source, {}))}")
        if first + offset < had:
            faults.append(f"{source} begins at {first + offset}, though {had} were encoded")
    return faults


def same(one, two) -> bool:
    """Trees of tensors, bit by bit."""
    if isinstance(one, torch.Tensor):
        return (isinstance(two, torch.Tensor) and one.dtype == two.dtype
                and one.numpy().tobytes() == two.numpy().tobytes())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def weights(folder: Path) -> dict:
    """Without what names the run."""
    kept = {}
    for name in "best.pt", "last.pt":
        state = torch.load(folder / "run" / name, weights_only=True)
        kept[name] = [state[key] for key in ("weights", "step", "best")] + [state.get("optimizer")]
    return kept


def scores(folder: Path) -> dict:
    """By epoch: a resumed run may write a line again."""
    rows = map(json.loads, (folder / "run/log.jsonl").read_text().splitlines())
    return {row["epoch"]: row["scores"] for row in rows if "scores" in row}


# ---- runs that are killed again and again ----


class Trial:
    """Kills until as many are done as wanted, and counts them by phase."""

    def __init__(self, work: Path, rng: random.Random):
        self.work = work
        self.rng = rng
        self.table = defaultdict(Counter)
        self.notes = Counter()
        self.faults = 0
        self.reference = self.fresh("reference")
        began = time.monotonic()
        code, said = self.finish(self.reference)
        self.seconds = time.monotonic() - began
        if code:
            sys.exit(f"the undisturbed run failed:\n{said}")
        self.expected = weights(self.reference)
        self.total = {name: len(rows) for name, rows in encoded(self.reference).items()}
        print(f"undisturbed: {self.seconds:.1f} s, {sum(self.total.values())} pictures", flush=True)

    def fresh(self, name: str) -> Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.work / "world", folder)
        return folder

    def finish(self, folder: Path) -> tuple[int, str]:
        start = Start(folder)
        code = start.process.wait()
        start.out.close()
        return code, start.said()

    def run(self, signals: list[int], name: str) -> int:
        """One run from its beginning to its end; how many of the signals hit it."""
        folder = self.fresh(name)
        hits = []
        for number in signals:
            if not self.hit(folder, number, hits):
                break
        before = encoded(folder)
        code, said = self.finish(folder)
        faults = look(folder) + lost(before, encoded(folder), said, self.total)
        if code:
            faults.append(f"it does not go on: exit code {code}: {said.strip()[-300:]}")
        else:
            found = weights(folder)
            others = [part for part in found if not same(found[part], self.expected[part])]
            others += ["encoded"] * (encoded(folder) != encoded(self.reference))
            others += ["scores"] * (scores(folder) != scores(self.reference))
            for phase in {phase for phase, _ in hits} if others else ():
                self.table[phase]["other weights"] += 1
            faults += [f"{part} is another than the undisturbed run's" for part in others]
        self.tell(faults, name, hits)
        if not faults:
            shutil.rmtree(folder)
        return len(hits)

    def hit(self, folder: Path, number: int, hits: list) -> bool:
        """Starts the command and ends it at a moment by lot; False if it came to its end first."""
        before = encoded(folder)
        start = Start(folder)
        rng = self.rng
        limit = time.monotonic() + 20 * self.seconds
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, self.seconds))
        else:
            phase = rng.choice(PHASES[1:5])
            start.wait_for(phase, limit)
            time.sleep(0 if phase == "saving" else rng.uniform(0, 0.06 * self.seconds))
        code, phase = start.end(number)
        if code in (0, 2) or code == 1 and number == signal.SIGKILL:
            if code:
                self.tell([f"exit code {code}: {start.said().strip()[-300:]}"], folder.name, hits)
            return False
        hits.append((phase, signal.Signals(number).name))
        said = start.said()
        row = self.table[phase]
        row[signal.Signals(number).name] += 1
        unreadable = look(folder)
        row["unreadable files"] += len(unreadable)
        gone = [] if unreadable else lost(before, encoded(folder), said, self.total)
        row["lost encodings"] += len(gone)
        if number == signal.SIGINT and (code != 130 or "Traceback" in said):
            self.notes[f"Ctrl-C while {phase}: exit code {code}, "
                       f"{'a traceback' if 'Traceback' in said else 'no traceback'}"] += 1
        self.tell(unreadable + gone, folder.name, hits)
        return True

    def tell(self, faults: list[str], name: str, hits: list):
        self.faults += len(faults)
        for fault in faults:
            print(f"WRONG {name}, after {' '.join(f'{phase}:{kind}' for phase, kind in hits)}: "
                  f"{fault}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Kills tiny runs.", allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--interrupts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="the world, and wrong runs")
    args = parser.parse_args()
    work = (args.keep or Path(tempfile.mkdtemp(prefix="kills-"))).resolve()
    if not (work / "world/datasets/GQA").exists():
        print("drawing the tiny world", flush=True)
        shutil.rmtree(work / "world", ignore_errors=True)
        (work / "world").mkdir(parents=True)
        quiet(["-c", campaign.DRAW, ROOT, 12, "pictures only"], work / "world")

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
    rng = random.Random(args.seed)
    trial = Trial(work, rng)
    signals = [signal.SIGKILL] * args.kills + [signal.SIGINT] * args.interrupts
    rng.shuffle(signals)
    number = 0
    while signals:
        done = trial.run(signals[:rng.randint(2, 7)], f"run-{number}")
        signals = signals[done:]
        number += 1
        print(f"{number} runs, {len(signals)} signals to go", flush=True)
    print_table(trial.table)
    for note, count in trial.notes.items():
        print(f"{count} x {note}")
    if not args.keep:
        shutil.rmtree(work)
    sys.exit(bool(trial.faults))


def print_table(table: dict):
    columns = ["SIGKILL", "SIGINT", "unreadable files", "lost encodings", "other weights"]
    print(f"\n{'phase':<14}" + "".join(f"{name:>18}" for name in columns))
    together = Counter()
    for phase in [*PHASES, "together"]:
        row = together if phase == "together" else table[phase]
        print(f"{phase:<14}" + "".join(f"{row[name]:>18,}" for name in columns))
        together.update(row)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
