"""How fast and how large we are beside the peers, in one command. A script, not a test: nothing is asserted on time.

    python tests/bench.py                               # BART-base at the paper's shapes; a quiet machine, please
    python tests/bench.py --tables train,memory --dtype bf16 --compile
    python tests/bench.py --backbone t5                 # T5-base; the peers are BART and are left out
    python tests/bench.py --tiny                        # two layers of width 64: only whether it runs

Peers are what users of other packages would run, as far as these are installed (pip install transformers==4.57.6 peft
adapters): transformers' BART trained whole, with peft's LoRA, with the adapters library's bottlenecks at all 30 places.
All take turns in one process, A B C A B C, after a warm-up. They have random weights, one batch, the same visual tokens
and mask and dropout 0.1, and train the same parts: beside what is put in the visual embedding, with bottlenecks the
norms, with LoRA the biases. bf16 is autocast. Peers lack our embeddings of box, object order and image order.
"""

import argparse
import gc
import importlib
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adapters import METHODS, cast_frozen, install, select
from data import Corpus, Example, FeatureStore, from_clip
from evaluate import pick_device
from model import FAMILIES, CLIPResNet, VLModel
from train import MAX_NORM, adamw

# A peer has the name of our adapters.py: ours gets another one, and its folder is not searched for packages any more.
sys.modules["our_adapters"] = sys.modules.pop("adapters")
sys.modules["our_adapters"].__name__ = "our_adapters"
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != ROOT]

PAD, END, WORD = 1, 2, 4                                # BART's ids; from WORD on they are words
TEXT, VISUAL, CHANNELS, ANSWER = 20, 36, 2048, 8        # tokens of question and picture, its channels, tokens of answer
BEAMS, NEW = 5, 10                                      # of generation: beams and words
SAMPLES, EPOCHS = 2_200_000, 20                         # the paper's: VQA, GQA, NLVR2 and captions together, times
WARMUP = 2
OWN_PEER = {"adapter": "adapters", "lora": "peft", "compacter": None, "full": "transformers"}      # of our methods


def precision(args):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bf16")


def stepper(model: nn.Module, loss: Callable[[dict], torch.Tensor], args) -> Callable[[dict], None]:
    """The training step of train.py, of the parts of a model that are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4

    def step(batch):
        torch.manual_seed(0)                            # in train.py dropout is a function of the step
        with precision(args):
            value = loss(batch)
        value.backward()
        clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(method: str, args) -> tuple[nn.Module, Callable, Callable]:
    """A model, its step on a batch as train.py makes it, and its answer to a batch as evaluate.py asks it."""
    preset, _ = FAMILIES[args.backbone]
    model = VLModel(preset(args.config, CHANNELS))
    install(model, method, model.config.d_model, ["vqa"], backbone=args.backbone)
    model.to(args.device).train()
    if args.dtype == "bf16":
        cast_frozen(model)
    loss_of = torch.compile(model.loss) if args.compile else model.loss
    decode = torch.compile(model.decode, dynamic=True) if args.compile else None

    def loss(batch):
        select(model, "vqa")
        return loss_of(**batch)

    def answer(batch):
        select(model, "vqa")
        with precision(args):
            return model.answer(batch["ids"], batch["features"], BEAMS, max_length=1 + NEW, decode=decode)

    return model, stepper(model, loss, args), answer


class Seeing(nn.Module):
    """A peer's language model with visual tokens behind its words, through a Linear and a LayerNorm."""

    def __init__(self, language: nn.Module, d_model: int):
        super().__init__()
        self.language, self.visual = language, nn.Sequential(nn.Linear(CHANNELS, d_model), nn.LayerNorm(d_model))

    def inputs(self, ids, features):
        visual = self.visual(features.flatten(1, 2).float())                                # [batch, 36, d_model]
        mask = nn.functional.pad((ids != PAD).long(), (0, visual.size(1)), value=1)         # [batch, text + 36]
        words = self.language.get_input_embeddings()(ids)
        return dict(inputs_embeds=torch.cat([words, visual], 1), attention_mask=mask)

    def loss(self, ids, features, labels, **_):
        return self.language(**self.inputs(ids, features), labels=labels).loss


def low_rank(language):
    peft, own = importlib.import_module("peft"), METHODS["lora"].sizes
    return peft.get_peft_model(language, peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=own["rank"], lora_alpha=own["alpha"], lora_dropout=own["dropout"], bias="all",
        target_modules=["q_proj", "v_proj"]))


def bottleneck(language):
    library = importlib.import_module("adapters")
    library.init(language)
    language.add_adapter("vqa", config=library.BnConfig(
        mh_adapter=True, cross_adapter=True, output_adapter=True, non_linearity="gelu_pytorch_tanh",
        reduction_factor=METHODS["adapter"].sizes["reduction"]))
    language.train_adapter("vqa")
    for norm in (module for module in language.modules() if isinstance(module, nn.LayerNorm)):
        norm.requires_grad_(True)
    return language


PEERS = {"transformers": lambda language: language, "peft": low_rank, "adapters": bottleneck}


def peer(package: str, args) -> tuple[nn.Module, Callable, Callable]:
    """The same of a package on top of transformers' BART, with the usual loop and its `generate`."""
    transformers = importlib.import_module("transformers")
    language = transformers.BartForConditionalGeneration(transformers.BartConfig(**args.config))
    model = Seeing(PEERS[package](language), args.config["d_model"]).to(args.device).train()
    loss_of = torch.compile(model.loss) if args.compile_peers else model.loss

    @torch.no_grad()
    def answer(batch):
        with precision(args):
            return model.language.generate(**model.inputs(batch["ids"], batch["features"]), num_beams=BEAMS,
                                           max_new_tokens=NEW, do_sample=False)

    return model, stepper(model, lambda batch: loss_of(**batch), args), answer


def build(name: str, args) -> tuple[nn.Module, Callable, Callable]:
    side, what = name.split()
    return (ours if side == "ours" else peer)(what, args)


def sizes(backbone: str, words: int, d_model: int, heads: int, layers: int) -> dict:
    """A config.json for both sides; nothing forces an end."""
    if backbone == "t5":
        return dict(vocab_size=words, d_model=d_model, d_kv=64, num_heads=heads, d_ff=4 * d_model, num_layers=layers,
                    relative_attention_num_buckets=32, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD)
    stacks = dict(layers=layers, attention_heads=heads, ffn_dim=4 * d_model)
    return dict(vocab_size=words, d_model=d_model, max_position_embeddings=1024, forced_eos_token_id=None, dropout=0.1,
                attention_dropout=0.1, activation_dropout=0.1,
                **{f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in stacks.items()})


BASE = {"bart": sizes("bart", 50465, 768, 12, 6), "t5": sizes("t5", 32300, 768, 12, 12)}
TINY = {backbone: sizes(backbone, 500, 64, 4, 2) for backbone in BASE}


def make_batch(args) -> dict[str, torch.Tensor]:
    """What Corpus.batch gives for VQA: questions of 6 to 20 tokens, answers of 3 to 8, features in half precision."""
    lot, size = np.random.default_rng(0), args.batch
    ids, labels = (lot.integers(WORD, args.config["vocab_size"], (size, longest)) for longest in (TEXT, ANSWER))
    ids[np.arange(TEXT) >= lot.integers(6, TEXT + 1, (size, 1))] = PAD
    labels[np.arange(ANSWER) >= lot.integers(3, ANSWER + 1, (size, 1))] = -100
    features = torch.from_numpy(lot.standard_normal((size, 1, VISUAL, CHANNELS), np.float32)).half()
    ids, labels = torch.from_numpy(ids), torch.from_numpy(labels)
    batch = dict(ids=ids, features=features, labels=labels, weights=torch.ones(size),
                 text_indices=(ids != PAD).flatten().nonzero()[:, 0],
                 label_indices=(labels != -100).flatten().nonzero()[:, 0])
    return {name: x.to(args.device) for name, x in batch.items()}


def take_turns(what: str, run: dict[str, Callable], args, inner: int = 1) -> dict[str, list[float]]:
    """Seconds of each repeat of each contestant; of `inner` runs the mean, where the wait for CUDA would count."""
    wait, times = torch.cuda.synchronize if args.cuda else lambda: None, {name: [] for name in run}
    turns = [(i, name) for i in range(-WARMUP, args.repeats) for name in run]
    for i, name in tqdm(turns, desc=what, unit=" turns", leave=False):
        wait()
        began = perf_counter()
        for _ in range(inner):
            run[name]()
        wait()
        times[name] += [(perf_counter() - began) / inner] if i >= 0 else []
    return times


def compare(median: dict[str, float]) -> dict[str, list[float | None]]:
    """How many times as much as one of ours its own and the best of the peers need."""
    best = min((value for name, value in median.items() if name.startswith("peer")), default=None)
    others = {f"ours {method}": [median.get(f"peer {own}"), best] for method, own in OWN_PEER.items()}
    return {name: [other and other / median[name] for other in others.get(name, [None, None])] for name in median}


def print_times(title: str, times: dict[str, list[float]], count: int, **more: Callable):
    """A row a contestant: rate, spread, times the rate of its own and of the best peer, and `more` columns."""
    print(f"\n{title}\n{'':<20}{'a second':>11}{'median ms':>11}{'min':>9}{'quartiles':>19}{'own peer':>10}{'best':>8}"
          + "".join(f"{name:>12}" for name in more))
    median = {name: float(np.median(seconds)) for name, seconds in times.items()}
    for name, (own, best) in compare(median).items():
        least, low, high = (f"{1e3 * x:.1f}" for x in np.quantile(times[name], (0, 0.25, 0.75)))
        own, best = (f"{ratio:.2f} x" if ratio else "" for ratio in (own, best))
        print(f"{name:<20}{count / median[name]:>11,.2f}{1e3 * median[name]:>11.1f}{least:>9}{low + ' to ' + high:>19}"
              f"{own:>10}{best:>8}"
              + "".join(f"{column(name, median[name]):>12}" for column in more.values()))


def flops(name: str, config: dict) -> float:
    """Of a contestant's training step on one sample, padding included; a multiply-add is 2.

    With S = text + visual tokens, T of the answer, N layers a stack, W words, C channels, f = 4 d, multiply-adds are
        linear     N S (4 d^2 + 2 d f) encoder, N T (6 d^2 + 2 d f) decoder, N S 2 d^2 keys and values, T d W head
        attention  2 N d (S^2 + T^2 + T S)
        visual     36 C d
        added      2 d r at 2 N S + 3 N T places (adapters); 2 d rank at N (3 S + 3 T) (LoRA's q and v)
    A product has two gradients as large as itself: of attention and what is put in both are needed, of what is frozen
    only that of the input, of visual only that of the weight.
    """
    method = {f"peer {own}": method for method, own in OWN_PEER.items()}.get(name, name.split()[1])
    d, n, s, t = config["d_model"], config.get("encoder_layers", config.get("num_layers")), TEXT + VISUAL, ANSWER
    linear = n * d * d * (12 * s + 14 * t + 2 * s) + t * d * config["vocab_size"]
    added = {"full": 0, "lora": n * (3 * s + 3 * t) * 2 * d * METHODS["lora"].sizes["rank"]}.get(
        method, n * (2 * s + 3 * t) * 2 * d * (d // METHODS["adapter"].sizes["reduction"]))
    return 2 * ((3 if method == "full" else 2) * linear + 3 * (2 * n * d * (s * s + t * t + t * s) + added)
                + 2 * VISUAL * CHANNELS * d)


def train_table(args):
    contestants = {name: build(name, args) for name in tqdm(args.names, "building", leave=False)}
    trained = {name: sum(p.numel() for p in c[0].parameters() if p.requires_grad) for name, c in contestants.items()}
    more = {"trained": lambda name, seconds: f"{trained[name]:,}",
            f"{EPOCHS} epochs": lambda name, seconds: f"{SAMPLES * EPOCHS * seconds / args.batch / 3600:,.2f} h"}
    batch, title = make_batch(args), f"training step, {args.dtype}, batch {args.batch}"
    if args.cuda:
        a = torch.randn(8192, 8192, device=args.device, dtype=torch.bfloat16)
        rate = 2 * 8192 ** 3 / np.median(take_turns("product", {"product": lambda: a @ a}, args, 10)["product"])
        title += f"; a product of 8192 x 8192 in bf16: {rate / 1e12:.0f} TFLOP/s"
        more["of product"] = lambda name, seconds: f"{args.batch * flops(name, args.config) / seconds / rate:.1%}"
    run = {name: lambda step=step: step(batch) for name, (_, step, _) in contestants.items()}
    print_times(title, take_turns("training", run, args, 10 if args.cuda else 1), args.batch, **more)


def generate_table(args):
    batch, run = make_batch(args), {}
    for name in tqdm(args.names, "building", leave=False):
        model, _, answer = build(name, args)
        for _, bias in filter(lambda named: named[0].endswith("logits_bias"), model.eval().named_buffers()):
            bias[..., END] = -torch.inf                 # nobody may end before NEW words
        if answer(batch).shape != (args.batch, 1 + NEW):
            raise SystemExit(f"{name} did not say {NEW} words")
        run[name] = lambda answer=answer: answer(batch)
    print_times(f"generation of {NEW} words with {BEAMS} beams, {args.dtype}, batch {args.batch}",
                take_turns("answering", run, args), args.batch)


def pictures_table(args):
    if (args.dtype == "bf16") != args.cuda:             # CLIP runs in half precision on CUDA only
        return
    layers, width, output = ((1, 1, 1, 1), 8, 32) if args.tiny else ((3, 4, 23, 3), 64, 512)
    count = 2 if args.tiny else 256 if args.cuda else 8
    pictures = list(np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), np.uint8))
    with TemporaryDirectory() as folder:
        weights = CLIPResNet(layers, width, 7, output).state_dict()
        torch.save({f"visual.{name}": x for name, x in weights.items()}, Path(folder, "RN101.pt"))
        features = from_clip(Path(folder, "RN101.pt"), "", False, args.device)
    times = take_turns("encoding", {"ours": lambda: features.encode(pictures)}, args)
    print_times(f"pictures through RN101, {args.dtype}, {count} at once", times, count)


def input_table(args):
    if args.dtype == "bf16" and "fp32" in args.dtypes:  # the store has but one precision
        return
    count, size = (64, 16) if args.tiny else (2000, 500)
    lot, names = np.random.default_rng(0), [str(i) for i in range(count)]
    tokenizer = SimpleNamespace(pad=PAD, encode=lambda text, longest=None: [WORD] * len(text.split()))
    examples = [Example(i, (names[i],), "word " * lot.integers(5, TEXT), {"yes": 0.9, "no": 0.3}) for i in range(count)]
    with TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder, "input", "random"), "random", VISUAL, CHANNELS)
        store.add(dict.fromkeys(names), lambda path: None, lambda loaded: torch.randn(len(loaded), VISUAL, CHANNELS))
        corpus = Corpus("vqa", examples, tokenizer, store)

        def load():
            batch = corpus.batch(lot.permutation(count)[:size], size, "seed", pin=args.cuda)
            return {name: x.to(args.device, non_blocking=True) for name, x in batch.items()}

        print_times(f"Corpus.batch of {size} of {count:,} examples, from the page cache to the device",
                    take_turns("loading", {"ours": load}, args), size)


def memory_table(args):
    """Each contestant in a process of its own. The first table: on Linux a child begins with its parent's peak."""
    peak = {}
    for name in tqdm(args.names, "memory", unit=" processes", leave=False):
        child = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--dtype", args.dtype, "--child", name],
                               capture_output=True, text=True)
        if child.returncode:
            raise SystemExit(f"{name} failed in a process of its own:\n{child.stderr}")
        peak[name] = float(child.stdout.split()[-1])
    print(f"\npeak memory of training, {args.dtype}, batch {args.batch}"
          f"\n{'':<20}{'MiB':>11}{'of own peer':>13}{'of best':>9}")
    for name, (own, best) in compare(peak).items():
        own, best = (f"{1 / ratio:.2f}" if ratio else "" for ratio in (own, best))
        print(f"{name:<20}{peak[name]:>11,.0f}{own:>13}{best:>9}")


def measure_child(name: str, args):
    """Prints the peak of a contestant that is built and makes two steps, in MiB: allocated on CUDA, else grown."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024 ** 2)
    for args.config in (TINY[args.backbone], args.config):      # a small one before loads what is loaded at first use
        batch, before = make_batch(args), peak()
        _, step, _ = build(name, args)
        step(batch), step(batch)
    print(torch.cuda.max_memory_allocated() / 2 ** 20 if args.cuda else max(1.0, peak() - before))


TABLES = {"memory": memory_table, "train": train_table, "generate": generate_table, "pictures": pictures_table,
          "input": input_table}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times us and the peers that are installed.", allow_abbrev=False)
    parser.add_argument("--tables", default=",".join(TABLES), metavar="A,B", help=f"default: {','.join(TABLES)}")
    parser.add_argument("--backbone", choices=tuple(BASE), default="bart", help="default: bart")
    parser.add_argument("--dtype", choices=("both", "fp32", "bf16"), default="both")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--batch", type=int, metavar="N", help="default: 500, on a CPU 16")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="turns that count (default: 9)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for our losses and decoding")
    parser.add_argument("--compile-peers", action="store_true", help="torch.compile for the losses of the peers")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64: only whether it runs")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tables = args.tables.split(",")
    if set(args.tables) - set(TABLES):
        parser.error(f"--tables are {', '.join(TABLES)}")
    args.device, args.config = pick_device(args.device), (TINY if args.tiny else BASE)[args.backbone]
    args.dtypes = ["fp32", "bf16"] if args.dtype == "both" else [args.dtype]
    args.cuda = args.device.type == "cuda"
    if args.cuda:
        torch.cuda.set_device(args.device)
    args.batch = args.batch or (4 if args.tiny else 500 if args.cuda else 16)
    args.peers = [package for package in PEERS if find_spec("transformers") and find_spec(package)
                  and args.backbone == "bart"]
    args.names = [f"ours {method}" for method in OWN_PEER] + [f"peer {package}" for package in args.peers]
    return args


def main():
    args = parse()
    if args.child:
        return measure_child(args.child, args)
    logging.disable(logging.WARNING)                    # the adapters library says that none is active, though all are
    torch._dynamo.config.recompile_limit = 64           # else from 8 graphs on, of all models together, it is eager
    say = {False: "eager", True: "compiled"}
    print(f"{torch.cuda.get_device_name() if args.cuda else 'CPU'}, {torch.get_num_threads()} threads, load "
          f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores, "
          + ", ".join(f"{package} {version(package)}" for package in ["torch", *args.peers])
          + "".join(f", {package} is left out" for package in PEERS if package not in args.peers)
          + f"\nmedians of {args.repeats} after {WARMUP}; ours {say[args.compile]}, peers {say[args.compile_peers]}"
          f"\n{EPOCHS} epochs: {SAMPLES:,} samples each, training only, as if all had the shape of VQA's", flush=True)
    for table in (TABLES[name] for name in TABLES if name in args.tables):
        for args.dtype in args.dtypes:
            table(args)
            sys.stdout.flush()
            gc.collect()                                # these contestants go before others come


if __name__ == "__main__":
    main()
