"""The paper: every parameter-efficient method of VL-Adapter, and the table of methods.

A model offers sites: an attribute `adapter` on a sub-layer, called as adapter(hidden, x) with the
output and input of the sub-layer, both [..., d_model], before dropout and residual sum. `install`
freezes the model and puts modules there. What is put in is trained, and what is trained is saved.

    offer_sites(bart, "out_proj", "fc2")  # first, for a model of transformers or timm
    install(bart, "adapter", d_model=768, tasks=["vqa", "gqa"], sharing="multiple")
    select(bart, "vqa")  # before a batch, where tasks have their own weights
    save(bart, "adapter.pt")
    load(bart, "adapter.pt")  # into a model with the same method

A model may also have `prompt`, a module called with word embeddings; `new_parts`, modules that
every method trains; `new_rows`, how many last rows of a frozen table are saved; `dropout_class`;
and `logits_bias`, a buffer that BitFit trains on T5.

`python adapters.py` prints what share of the weights each method trains. Needs torch alone.
Paper: https://arxiv.org/abs/2112.06825. original: FILE#L is
https://github.com/ylsung/VL_adapter/blob/545fcbb/VL-T5/src/FILE#L.
In formulas h is the hidden state at a site, d = d_model, r = d / reduction the bottleneck.
"""

import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class AdapterError(ValueError):
    """All that can go wrong here, in one sentence."""


# ---- adapters: section 3.2 ----


class Adapter(nn.Module):
    """h + up(gelu(down(h))), with tanh's gelu (Houlsby et al. 2019).

    With Linears 2 d r + r + d weights.
    original: adapters/adapter_modeling.py#L52
    """

    def __init__(self, down, up):
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, hidden, x):  # both [..., d]
        return hidden + self.up(F.gelu(self.down(hidden), approximate="tanh"))


def linear(inputs, outputs):
    """N(0, 0.02) and zero bias, so that an adapter starts near h."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def xavier(*shape):
    """Uniform with gain sqrt(2), each matrix of a stack for itself."""
    weight = nn.Parameter(torch.empty(shape))
    for matrix in weight.data.view(-1, *shape[-2:]):
        nn.init.xavier_uniform_(matrix, gain=math.sqrt(2))
    return weight


class KroneckerLinear(nn.Module):
    """Compacter's y = x H + b, H = sum_i kron(phm_rule_i, W_i) (Mahabadi et al. 2021).

    phm_rule [n, n, n], W [n, inputs/n, outputs/n]: n^3 + inputs outputs / n + outputs weights.
    With a rank W_i = W_left_i W_right_i: n^3 + rank (inputs + outputs) + outputs.
    A shared phm_rule counts once a model.
    original: adapters/hypercomplex/layers.py#L28
    """

    def __init__(self, inputs, outputs, n, rank=None, shared_phm_rule=None):
        super().__init__()
        if rank is None:
            self.W = xavier(n, inputs // n, outputs // n)
        else:
            self.W_left = xavier(n, inputs // n, rank)
            self.W_right = xavier(n, rank, outputs // n)
        self.bias = nn.Parameter(torch.zeros(outputs))
        if shared_phm_rule is None:
            self.phm_rule = phm_rule(n)
        else:
            refer(self, "phm_rule", shared_phm_rule)

    def forward(self, x):
        W = self.W_left @ self.W_right if hasattr(self, "W_left") else self.W
        products = torch.einsum("nij,nkl->ikjl", self.phm_rule(), W)  # [n, inputs/n, n, outputs/n]
        H = products.flatten(2).flatten(0, 1)  # [inputs, outputs]
        return F.linear(x, H.T, self.bias)


def phm_rule(n):
    return Shared(torch.randn(n, n, n) * 0.01)


class LowRankLinear(nn.Module):
    """y = x left right + b. rank (inputs + outputs) + outputs weights.

    original: adapters/low_rank_layer.py#L34
    """

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.left = xavier(inputs, rank)
        self.right = xavier(rank, outputs)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x @ self.left, self.right.T, self.bias)


SUBLAYERS = ["ffn", "self_attn", "cross_attn"]  # in the order of the original


class HyperNetwork(nn.Module):
    """Hyperformer: writes the adapters of one stack (Mahabadi, Ruder et al. 2021).

    e = LN(W2 relu(W1 [task; layer])), of embeddings, has size p = projected_dim. Linears of e give
    each kind of sub-layer down [r, d], up [d, r] and biases: (p + 1) (2 d r + r + d) weights each,
    plus embeddings, W1, W2, LN. Efficient: one for all kinds, e of [task; layer; kind] (L198).
    original: adapters/adapter_hypernetwork.py#L107
    """

    def __init__(self, d, r, layers, kinds, task, task_dim, hidden_dim, projected_dim, efficient):
        super().__init__()
        # Rows of `kind`: three in either stack, as in the original.
        self.kinds = SUBLAYERS if set(kinds) <= set(SUBLAYERS) else kinds
        refer(self, "task", task)  # one for all stacks
        self.layer = nn.Embedding(layers, task_dim)
        self.kind = nn.Embedding(len(self.kinds), task_dim) if efficient else None
        self.project = nn.Sequential(
            linear((3 if efficient else 2) * task_dim, hidden_dim),
            nn.ReLU(),
            linear(hidden_dim, projected_dim))
        self.norm = nn.LayerNorm(projected_dim, 1e-6)
        nn.init.normal_(self.layer.weight, std=0.02)
        if efficient:
            nn.init.normal_(self.kind.weight, std=0.02)

        sizes = {"down": r * d, "down_bias": r, "up": d * r, "up_bias": d}
        self.write = nn.ModuleDict()
        for kind in ["any"] if efficient else [kind for kind in self.kinds if kind in kinds]:
            self.write[kind] = nn.ModuleDict(
                {name: linear(projected_dim, size) for name, size in sizes.items()})

    def forward(self, layer, kind):
        """One adapter's weights, flat: down [r d], down_bias [r], up [d r], up_bias [d]."""
        about = [self.task(), self.layer.weight[layer]]
        if self.kind is not None:
            about.append(self.kind.weight[self.kinds.index(kind)])
            kind = "any"
        e = self.norm(self.project(torch.cat(about)))  # [p]
        return {name: write(e) for name, write in self.write[kind].items()}


class HyperAdapter(nn.Module):
    """h + up gelu(down h) with weights that a HyperNetwork writes. No weights of its own."""

    def __init__(self, network, layer, kind):
        super().__init__()
        refer(self, "network", network)
        self.layer = layer
        self.kind = kind

    def forward(self, hidden, x):
        weights = self.network(self.layer, self.kind)
        down = weights["down"].view(-1, hidden.size(-1))  # [r, d]
        up = weights["up"].view(hidden.size(-1), -1)  # [d, r]
        inner = F.gelu(F.linear(hidden, down, weights["down_bias"]), approximate="tanh")
        return hidden + F.linear(inner, up, weights["up_bias"])


# ---- prompts and LoRA: section 3.3; BitFit ----


class Prompt(nn.Module):
    """Puts `length` trained vectors before the words: up(tanh(down(table))) (Li and Liang 2021).

    length d + d mid + mid + mid d + d weights.
    original: prompt/prompt_modeling.py#L13
    """

    def __init__(self, d_model, length, mid_dim):
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, d_model) * 0.02)
        self.down = linear(d_model, mid_dim)
        self.up = linear(mid_dim, d_model)

    def forward(self, words):  # [batch, T, d]
        vectors = self.up(torch.tanh(self.down(self.table)))  # [length, d]
        vectors = vectors.to(words.dtype).expand(len(words), -1, -1)  # [batch, length, d]
        return torch.cat([vectors, words], 1)  # [batch, length + T, d]


class LowRankUpdate(nn.Module):
    """LoRA's B A dropout(x), with B at zero at first. rank (inputs + outputs) weights."""

    def __init__(self, inputs, outputs, rank, dropout):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = dropout

    def forward(self, x):
        return self.dropout(x) @ self.A.T @ self.B.T


class SameLinear(nn.Linear):
    """Has the weight and bias of another Linear."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias


class LoRALinear(SameLinear):
    """W x + b + alpha / rank B A dropout(x) (Hu et al. 2021).

    original: lora/controller.py#L56
    """

    def __init__(self, linear, update, scale):
        super().__init__(linear)
        self.update = update
        self.scale = scale

    def forward(self, x):
        return super().forward(x) + self.scale * self.update(x)

    def merged(self):
        """A plain Linear with W + alpha / rank B A."""
        update = getattr(self.update, "chosen", self.update)
        if update is not_selected:
            not_selected()
        W = self.weight.detach() + self.scale * update.B.detach() @ update.A.detach()
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(W.to(self.weight.dtype), self.weight.requires_grad)
        plain.bias = self.bias
        return plain


class BiasedRMSNorm(nn.RMSNorm):
    """g x / rms(x) + b with another RMSNorm's g, b zero at first. d weights more."""

    def __init__(self, norm):
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight = norm.weight
        self.bias = nn.Parameter(torch.zeros_like(norm.weight))

    def forward(self, x):
        return super().forward(x) + self.bias


# ---- tasks and sharing ----


class PerTask(nn.Module):
    """One copy of a module per task; `select` chooses the one that runs.

    The choice is no part of the module: state_dict() lists weights once, and another task needs
    no compiling, for weights are inputs of the graph.
    original: adapters/adapter_controller.py#L41
    """

    def __init__(self, tasks, make):
        super().__init__()
        self.copies = nn.ModuleDict({task: make() for task in tasks})
        refer(self, "chosen", not_selected)

    def forward(self, *inputs):
        return self.chosen(*inputs)


def not_selected(*_):
    raise AdapterError("these weights differ by task: call select(model, task) before the model")


def refer(module, name, target):
    """Sets module.name, but not as a part of the module."""
    object.__setattr__(module, name, target)


class Shared(nn.Module):
    """One trained tensor as a module, to refer to or to copy per task."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self):
        return self.value


# ---- what follows fills models and saves weights; you may stop here ----


@dataclass(frozen=True)
class Sites:
    """Where a method may put modules, and for which tasks."""
    model: nn.Module
    d_model: int
    tasks: list[str]
    sharing: str
    names: list[str] | None  # None: all

    def find(self, attribute):
        """Modules with a part `attribute` that no method has filled, by name."""
        found = {name: module for name, module in self.model.named_modules()
                 if attribute in module._modules}
        if not found:
            raise AdapterError(f"no module of the model has a part called {attribute!r}")
        for site in self.names or ():
            if not any(fits(site, name) for name in found):
                words = ", ".join(dict.fromkeys(".".join(found).split(".")))
                raise AdapterError(f"unknown site: {site!r} is nowhere among the sites: {words}")
        if self.names is not None:
            found = {name: module for name, module in found.items()
                     if any(fits(site, name) for site in self.names)}
        for name, module in found.items():
            if isinstance(getattr(module, attribute), FILLED):
                raise AdapterError(f"the site {name}.{attribute} is filled already")
        return found

    def copies(self, make):
        return PerTask(self.tasks, make) if self.sharing == "multiple" else make()


FILLED = (PerTask, Adapter, HyperAdapter, Prompt, LoRALinear)


def fits(site, name):
    """Whether all words of a site are in a name: decoder.ffn in decoder.layers.0.ffn."""
    return set(site.split(".")) <= set(name.split("."))


def bottlenecks(sites, reduction, projection):
    """Adapters with down and up of projection(inputs, outputs)."""
    d = sites.d_model
    r = bottleneck(d, reduction)
    found = sites.find("adapter")
    for module in found.values():
        if sites.sharing == "half":
            down = PerTask(sites.tasks, lambda: projection(d, r))
            module.adapter = Adapter(down, projection(r, d))
        else:
            module.adapter = sites.copies(lambda: Adapter(projection(d, r), projection(r, d)))
    return len(found)


def bottleneck(d_model, reduction):
    if reduction > d_model:
        raise AdapterError(f"a reduction of {reduction} leaves nothing of a d_model of {d_model}")
    return d_model // reduction


def adapter(sites, reduction):
    return bottlenecks(sites, reduction, linear)


def compacter(sites, reduction, n, shared_phm_rule, rank):
    d = sites.d_model
    r = bottleneck(d, reduction)
    if d % n or r % n:
        raise AdapterError(f"n = {n} must divide both {d} and {r}")
    rule = None
    if shared_phm_rule:
        rule = sites.model.phm_rule = phm_rule(n)
    return bottlenecks(sites, reduction, lambda *shape: KroneckerLinear(*shape, n, rank, rule))


def lowrank(sites, reduction, rank):
    return bottlenecks(sites, reduction, lambda *shape: LowRankLinear(*shape, rank))


def hyperformer(sites, reduction, task_dim, hidden_dim, projected_dim, efficient):
    """One HyperNetwork a stack; one embedding a task for all stacks, so `select` is needed."""
    model = sites.model
    r = bottleneck(sites.d_model, reduction)
    found = sites.find("adapter")
    stacks = {}
    for name, module in found.items():
        stack, layer, kind = layer_of(name)
        stacks.setdefault(stack, []).append((module, layer, kind))

    model.task_embedding = PerTask(sites.tasks, lambda: Shared(torch.randn(task_dim)))
    model.hypernetworks = nn.ModuleDict()
    for stack, places in stacks.items():
        _, layers, kinds = zip(*places)
        network = model.hypernetworks[stack] = HyperNetwork(
            sites.d_model, r, 1 + max(layers), list(dict.fromkeys(kinds)), model.task_embedding,
            task_dim, hidden_dim, projected_dim, efficient)
        for module, layer, kind in places:
            module.adapter = HyperAdapter(network, layer, kind)
    return len(found)


def layer_of(name):
    """Stack, layer and kind of a sub-layer from its name PREFIX.NUMBER.KIND.

    >>> layer_of("model.decoder.layers.11.self_attn.out_proj")
    ('model_decoder', 11, 'self_attn_out_proj')
    """
    parts = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name)
    if parts is None:
        raise AdapterError(f"hyperformer needs sites named like encoder.layers.0.ffn, not {name!r}")
    stack, layer, kind = parts.groups()
    return stack.removesuffix(".layers").replace(".", "_"), int(layer), kind.replace(".", "_")


def prompt(sites, length, mid_dim):
    """In the encoder alone, whatever `sites` says."""
    found = replace(sites, names=None).find("prompt")
    encoders = [module for name, module in found.items() if "decoder" not in name]
    if not encoders:
        raise AdapterError("only decoders have a part called 'prompt', expected an encoder")
    for module in encoders:
        module.prompt = sites.copies(lambda: Prompt(sites.d_model, length, mid_dim))
    return len(encoders)


def lora(sites, rank, alpha, dropout, targets):
    dropout_class = getattr(sites.model, "dropout_class", nn.Dropout)
    filled = 0
    for target in targets:
        for name, module in sites.find(target).items():
            old = getattr(module, target)
            if type(old) is not nn.Linear:
                raise AdapterError(f"LoRA's target {name}.{target} is a {type(old).__name__}, "
                                   f"expected nn.Linear")
            update = sites.copies(lambda: LowRankUpdate(
                old.in_features, old.out_features, rank, dropout_class(dropout)))
            setattr(module, target, LoRALinear(old, update, alpha / rank))
            filled += 1
    return filled


def bitfit(sites):
    """Zero biases for Linears and RMSNorms without and, if a Linear lacked one, for the logits.

    LST does so on T5 (arXiv 2206.06522); BART has them all. Ignores sites, counts all biases.
    """
    model = sites.model
    bare = [m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is None]
    for module in bare:
        module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
    swap(model, nn.RMSNorm, BiasedRMSNorm)
    if bare and "logits_bias" in model._buffers:
        model.logits_bias = nn.Parameter(model._buffers.pop("logits_bias"))
    return sum(name.endswith("bias") for name, _ in model.named_parameters())


def swap(model, kind, make):
    """Puts make(module) where a module of exactly this kind was."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) is kind:
                setattr(parent, name, make(module))


# ---- the table of methods ----


# single: one module for all tasks; half: up for all, down per task; multiple: one per task
SHARINGS = ("single", "half", "multiple")


@dataclass(frozen=True)
class Method:
    """A row of the paper: fill(sites, **sizes) puts modules in and says how many."""
    fill: Callable
    sizes: dict
    trains: tuple[str, ...] = ("new", "norms")  # keys of TRAINS, besides what fill puts in
    lr: float = 1e-3  # for pictures
    lr_videos: float = 3e-4
    lr_per_task: float | None = None  # half and multiple, for pictures
    sharings: tuple[str, ...] = ("single",)
    sizes_on: dict = field(default_factory=dict)  # what differs by backbone


# From the authors' VL-T5/scripts, the adapter's rate where videos have none. On T5 the sizes are
# LST's, which were published; the authors' T5 scripts have reduction=8.
METHODS = {
    "full": Method(lambda sites: 0, {}, ("all",), lr=1e-4, lr_videos=3e-5),
    "adapter": Method(
        adapter, dict(reduction=8), lr_per_task=3e-4, sharings=SHARINGS,
        sizes_on=dict(t5=dict(reduction=4))),
    "hyperformer": Method(
        hyperformer,
        dict(reduction=8, task_dim=512, hidden_dim=128, projected_dim=8, efficient=False)),
    "compacter": Method(
        compacter, dict(reduction=8, n=2, shared_phm_rule=False, rank=None), sharings=SHARINGS),
    "lowrank": Method(lowrank, dict(reduction=8, rank=1), sharings=SHARINGS),
    "prompt": Method(
        prompt, dict(length=40, mid_dim=800), ("new",), sharings=("single", "multiple")),
    "lora": Method(
        lora, dict(rank=128, alpha=32, dropout=0.1, targets=("q", "v")), ("new", "biases"),
        sharings=("single", "multiple"), sizes_on=dict(t5=dict(rank=150))),
    "bitfit": Method(bitfit, {}, ("new", "biases")),
}


# original: trainer_base.py#L289
def new_weights(model):
    for name in getattr(model, "new_parts", ()):
        yield from model.get_submodule(name).parameters()


# original: trainer_base.py#L354
def norms(model):
    """Not T5's RMSNorms: frozen in the authors' code and the published numbers."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            yield from module.parameters()


# original: trainer_base.py#L318
def biases(model):
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            yield module.bias


TRAINS = {"all": nn.Module.parameters, "new": new_weights, "norms": norms, "biases": biases}


def install(model: nn.Module, method: str, d_model: int, tasks: Iterable[str],
            sharing: str = "single", sites: Iterable[str] | None = None,
            trains: Iterable[str] | None = None, backbone: str = "bart", **sizes) -> int:
    """Freezes the model, fills its sites and returns how many it filled.

    method   a row of METHODS, or several joined by "+": "adapter+prompt"
    tasks    names for `select`
    sharing  one of SHARINGS
    sites    words of their names: "ffn", "encoder", "decoder.cross_attn"; None: all
    trains   keys of TRAINS, instead of the method's
    sizes    instead of the method's on this backbone, bart or t5

    New weights take device and dtype of the model's first.
    AdapterError: something is unknown or of no use, or there is no empty site.
    """
    check_method(method, sharing, sizes)
    known([backbone], ("bart", "t5"), "backbone")
    rows = [METHODS[name] for name in method.split("+")]
    defaults = [row.sizes | row.sizes_on.get(backbone, {}) for row in rows]
    trains = [part for row in rows for part in row.trains] if trains is None else list(trains)
    known(trains, TRAINS, "part to train")
    sites = None if sites is None else list(sites)
    if sites == []:
        raise AdapterError("sites are an empty list, expected words of their names, or None")

    old = set(model.parameters())
    first = next(model.parameters())
    sites = Sites(model, d_model, list(tasks), sharing, sites)
    filled = 0
    for row, own in zip(rows, defaults):
        filled += row.fill(sites, **{name: sizes.get(name, own[name]) for name in own})
    for weight in model.parameters():
        if weight in old:
            weight.requires_grad_(False)
        else:  # new
            weight.data = weight.data.to(first)
    for part in trains:
        for weight in TRAINS[part](model):
            weight.requires_grad_(True)
    model.train(model.training)  # new modules take the model's mode
    return filled


def known(names, allowed, what):
    for name in names:
        if name not in allowed:
            allowed = ", ".join(allowed) or "none"
            raise AdapterError(f"unknown {what}: {name!r:.80}; known are {allowed}")


def check_method(method: str, sharing: str, sizes: dict):
    """Raises AdapterError: something is unknown, of another kind or too large."""
    names = method.split("+")
    known(names, METHODS, "method")
    defaults = {}
    for name in names:
        known([sharing], METHODS[name].sharings, f"sharing of {name}")
        defaults |= METHODS[name].sizes
    if len(set(names)) < len(names):
        raise AdapterError(f"the method {method} has one twice")
    known(sizes, defaults, f"size of {method}")
    for name, size in sizes.items():
        default = defaults[name]
        if name == "targets":
            good = isinstance(size, (list, tuple)) and size and {*map(type, size)} == {str}
        elif name in ("alpha", "dropout"):
            good = type(size) in (int, float) and 0 <= size < dict(alpha=1e4, dropout=1)[name]
        elif type(default) is bool:
            good = type(size) is bool
        else:
            good = type(size) is int and 0 < size <= 4096  # more would fill the memory
        if not good and (size, default) != (None, None):
            like = 1 if default is None else default
            raise AdapterError(f"the size {name} is {size!r}, expected one like {like!r}")


def select(model: nn.Module, task: str):
    """Makes every PerTask run its copy for `task`. AdapterError: it is unknown."""
    modules = [module for module in model.modules() if isinstance(module, PerTask)]
    for module in modules:
        known([task], module.copies, "task")
    for module in modules:
        refer(module, "chosen", module.copies[task])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def cast_frozen(model: nn.Module, dtype: torch.dtype = torch.bfloat16):
    """Frozen Linears and word embeddings in autocast's precision: no cast at every step."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.split(".")[-1] == "embed_tokens":
            for weight in module.parameters(recurse=False):
                if not weight.requires_grad:
                    weight.data = weight.data.to(dtype)


def merge(model: nn.Module):
    """Makes LoRA's Linears plain, with the selected task's update, for good."""
    swap(model, LoRALinear, LoRALinear.merged)


# ---- files ----


def saved_weights(model):
    """What is trained, and the frozen model.new_rows, as views."""
    weights = {name: weight.detach() for name, weight in trainable(model).items()}
    for name, n in getattr(model, "new_rows", {}).items():
        if name not in weights:
            weights[f"{name}[-{n}:]"] = model.get_parameter(name).detach()[-n:]
    return weights


def save(model: nn.Module, path: str | Path, **others):
    """Writes {"weights": {name: tensor}, **others}; others are tensors, numbers, text, containers.

    At any time the file is whole. AdapterError: it cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    # Of a slice torch.save would write the whole table.
    weights = {name: weight.clone() for name, weight in saved_weights(model).items()}
    try:
        with open(part, "wb") as file:
            torch.save(others | {"weights": weights}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as problem:
        raise AdapterError(f"{path} cannot be written: {problem}") from None
    finally:
        part.unlink(missing_ok=True)


def load(model: nn.Module, path: str | Path) -> dict:
    """Reads what `save` wrote from a model with the same method; returns the `others`.

    Nothing in the file is run, nothing is copied before all fits. AdapterError names the file and
    the weight that does not fit.
    """
    if not Path(path).exists():
        raise AdapterError(f"{path} is missing")
    state = read_zip(path)
    weights = state.pop("weights", None) if isinstance(state, dict) else None
    if not isinstance(weights, dict):
        raise AdapterError(f"{path} is not a file of weights: it has no entry 'weights'")

    ours = saved_weights(model)
    for name in ours | weights:
        if name not in weights:
            problem = "is missing"
        elif name not in ours:
            problem = "is not one this model would save"
        else:
            problem = misfit(weights[name], ours[name])
        if problem:
            raise AdapterError(f"{path}: the weight {name!r} {problem}")
    for name, weight in ours.items():
        weight.copy_(weights[name])
    return state


def read_zip(path):
    """What torch.save wrote, of a regular file that does not unpack to more."""
    what = "truncated or not a file of weights"
    try:
        if not Path(path).is_file():
            raise ValueError
        with open(path, "rb") as file:
            head = file.read(99).lstrip().lower()
        if head.startswith(b"version https://git-lfs"):
            what = "a Git LFS pointer, not the file itself: git lfs pull fetches it"
        if head.startswith((b"<!doctype", b"<html")):
            what = "a web page, not the file itself"
        with zipfile.ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > os.path.getsize(path):
                raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as problem:
        what = f"not readable: {problem.strerror}"
    except Exception:  # whose text advises to load it unsafely
        pass
    raise AdapterError(f"{path} is {what}")


def misfit(saved, ours: torch.Tensor) -> str:
    """Why what was saved cannot be copied to `ours`, or ""."""
    if (not isinstance(saved, torch.Tensor) or not saved.is_floating_point() or saved.is_nested
            or saved.layout != torch.strided or saved.is_meta):
        return "is not a tensor of floating-point numbers"
    if saved.shape != ours.shape:
        return f"has the shape {list(saved.shape)}, expected {list(ours.shape)}"
    if not saved.to(ours.dtype).isfinite().all():
        return "has numbers that are not finite"
    return ""


# ---- models of others ----


class Site(nn.Module):
    """Hands `hidden` on, until a method puts another module here."""

    def forward(self, hidden, x):
        return hidden


class AdaptedLinear(SameLinear):
    """The last Linear of a sub-layer, with a site behind it."""

    def __init__(self, linear):
        super().__init__(linear)
        self.adapter = Site()

    def forward(self, x):
        return self.adapter(super().forward(x), x)


def offer_sites(model: nn.Module, *names: str) -> int:
    """Puts a site behind every nn.Linear of these names, and returns how many.

    x is the Linear's input, not its sub-layer's; no method here looks at it. Subclasses are left
    alone: PyTorch's attention reads their weights without a call, past the site. So does
    nn.TransformerEncoderLayer in evaluation, until torch.backends.mha.set_fastpath_enabled(False).
    AdapterError: unknown name.
    """
    offered = 0
    for name in names:
        parents = [m for m in model.modules() if type(m._modules.get(name)) is nn.Linear]
        if not parents:
            raise AdapterError(f"no nn.Linear of the model is called {name!r}")
        for parent in parents:
            setattr(parent, name, AdaptedLinear(getattr(parent, name)))
        offered += len(parents)
    return offered


# ---- python adapters.py ----


# Per cent of all weights. BART: tables 1 and 2, BitFit VL-PET's; T5: LST. None: not published.
PUBLISHED = [
    ("bart", "pictures", {}, {
        "full": 100, "adapter": 4.18, "adapter half": 8.36, "adapter multiple": 12.22,
        "hyperformer": 5.79, "compacter": 2.70, "compacter multiple": 7.05, "lora": 5.93,
        "lora multiple": 17.72, "prompt": 2.00, "prompt multiple": 4.53, "bitfit": 1.21}),
    ("bart", "videos", {}, {"adapter": 3.39, "lora": 5.17}),
    ("t5", "pictures", {}, {
        "full": 100, "adapter": 7.98, "hyperformer": None, "compacter": None,
        "compacter multiple": None, "lora": 7.54, "prompt": 1.26, "bitfit": 0.83}),
    ("t5", "pictures", {"reduction": 8}, {
        "adapter": None, "adapter half": None, "adapter multiple": None}),
]


def percent_trained(backbone: str, inputs: str, method: str, sharing: str = "single",
                    **sizes) -> tuple[int, int]:
    """(trained, total) weights with four tasks; inputs: pictures (RN101) or videos (ViT-B/32)."""
    from model import VLModel, bart, t5

    feature_dim = {"pictures": 2048, "videos": 512}[inputs]
    if backbone == "bart":
        hf = dict(vocab_size=50265, d_model=768, encoder_attention_heads=12, encoder_ffn_dim=3072,
                  encoder_layers=6, decoder_layers=6, max_position_embeddings=1024)
        config = bart(hf, feature_dim, 50465)
    else:
        hf = dict(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12,
                  relative_attention_num_buckets=32)
        config = t5(hf, feature_dim, 32200)
    with torch.device("meta"):
        model = VLModel(config)
        install(model, method, 768, "abcd", sharing, backbone=backbone, **sizes)
    trained = sum(weight.numel() for weight in trainable(model).values())
    return trained, sum(weight.numel() for weight in model.parameters())


def main():
    line = "{:<6}{:<10}{:<13}{:<10}{:>12}{:>13}{:>10}{:>8}"
    print(line.format("", "inputs", "method", "sharing", "trained", "of all", "per cent", "paper"))
    for backbone, inputs, sizes, rows in PUBLISHED:
        for row, published in rows.items():
            method, sharing = row.split() if " " in row else (row, "single")
            trained, total = percent_trained(backbone, inputs, method, sharing, **sizes)
            paper = "-" if published is None else f"{published:.2f}"
            print(line.format(backbone, inputs, method, sharing, f"{trained:,}", f"{total:,}",
                              f"{100 * trained / total:.2f}", paper),
                  *(f" {name}={size}" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
