"""The paper: every parameter-efficient method of VL-Adapter, and the table of methods.

A model offers places: an attribute `adapter` on a sub-layer, called as adapter(hidden, x) with the output and the input
of that sub-layer, both [..., d_model], before dropout and residual sum. `install` freezes the model and puts modules
there. What is put in is new, therefore trainable; nothing is matched by the name of a weight.

    install(model, "adapter", d_model=768, tasks=["vqa", "gqa"], share="none")
    select(model, "vqa")                                # before every batch; needed when tasks have their own copies
    torch.save(trainable(model), "adapter.pt")          # {name: weight}: what is trained is what is saved

Three more attribute names count where a model has them: `prompt`, called with word embeddings [batch, length, d_model],
`visual`, the new part of the model that every method trains, and `logits_bias`, the buffer of zeros that BitFit trains
where Linears have no bias. LoRA replaces the Linears named q and v; Hyperformer reads stack, layer and kind off names
like encoder.layers.0.ffn (self_attn, cross_attn).

`python adapters.py` prints the share of weights each method trains on VL-BART and VL-T5 beside the published number.
Paper: Sung, Cho, Bansal, CVPR 2022, https://arxiv.org/abs/2112.06825. Needs torch and nothing else; copy it as it is.
Formulas: h is the hidden state at a place, d = d_model, r = d / reduction the bottleneck.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

# ---- tasks and sharing --------------------------------------------------------------------------------------------


def unchosen(*_):
    raise RuntimeError("these weights differ by task: call select(model, task) before the model")


class PerTask(nn.Module):
    """One copy of a module per task; `select` chooses the one that runs, and forgetting it is an error.

    The chosen copy is kept outside nn.Module's registry: its weights are listed once in state_dict(), and changing the
    task does not recompile, because weights are inputs of a compiled graph.
    """

    def __init__(self, tasks: Iterable[str], make: Callable[[], nn.Module]):
        super().__init__()
        self.copies = nn.ModuleDict({task: make() for task in tasks})
        point(self, "chosen", unchosen)

    def forward(self, *inputs):
        return self.chosen(*inputs)


def point(module: nn.Module, name: str, target):
    """Lets module.name be `target` without making it a part of the module, for what is registered elsewhere."""
    object.__setattr__(module, name, target)


class Value(nn.Module):
    """One trained tensor as a module, so that it can be shared, or copied per task, like any other."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self):
        return self.value


# ---- in the places ------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """h + up(gelu(down(h))), with tanh's gelu (Houlsby et al. 2019; section 3.2 of the paper).

    With Linears 2 d r + r + d weights a place. Half-shared: `down` is PerTask and `up` serves all tasks.
    """

    def __init__(self, down: nn.Module, up: nn.Module):
        super().__init__()
        self.down, self.up = down, up

    def forward(self, hidden, x):
        return hidden + self.up(F.gelu(self.down(hidden), approximate="tanh"))


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A Linear that starts at N(0, 0.02) with zero bias, so that an adapter starts near the identity."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def xavier(*shape: int) -> nn.Parameter:
    """Xavier's uniform start with gain sqrt(2), for each matrix of a stack."""
    weight = nn.Parameter(torch.empty(shape))
    for matrix in weight.data.view(-1, *shape[-2:]):
        nn.init.xavier_uniform_(matrix, gain=math.sqrt(2))
    return weight


class KroneckerLinear(nn.Module):
    """Compacter's y = x H + b with H = sum_i rule_i (x) W_i, a sum of n Kronecker products (Mahabadi et al. 2021).

    rule [n, n, n]; W [n, inputs/n, outputs/n], or with a rank W_i = left_i right_i of that rank.
    n^3 + inputs outputs / n + outputs weights; with a rank n^3 + rank (inputs + outputs) + outputs.
    """

    def __init__(self, inputs: int, outputs: int, factors: int, rank: int | None, shared_rule: Value | None):
        super().__init__()
        if inputs % factors or outputs % factors:
            raise ValueError(f"{factors} Kronecker factors must divide both {inputs} and {outputs}")
        if rank is None:
            self.weight = xavier(factors, inputs // factors, outputs // factors)
        else:
            self.left, self.right = xavier(factors, inputs // factors, rank), xavier(factors, rank, outputs // factors)
        self.bias = nn.Parameter(torch.zeros(outputs))
        if shared_rule is None:
            self.rule = Value(torch.randn(factors, factors, factors) * 0.01)
        else:
            point(self, "rule", shared_rule)

    def forward(self, x):
        weight = self.left @ self.right if hasattr(self, "left") else self.weight
        product = torch.einsum("nij,nkl->ikjl", self.rule(), weight)                        # [n, inputs/n, n, outputs/n]
        return F.linear(x, product.flatten(2).flatten(0, 1).T, self.bias)                   # [..., outputs]


class LowRankLinear(nn.Module):
    """y = x left right + b. rank (inputs + outputs) + outputs weights."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.left, self.right = xavier(inputs, rank), xavier(rank, outputs)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x @ self.left, self.right.T, self.bias)


class HyperNetwork(nn.Module):
    """Writes the adapters of one stack from embeddings of task and layer (Hyperformer, Mahabadi et al. 2021).

    e = LN(W2 relu(W1 [task; layer])), p numbers; for each kind of place down = [r, d] and up = [d, r] with their biases
    are Linears of e. The efficient variant has one pair of generators for all kinds, and tells them apart by one more
    embedding in the input. Kinds times (p + 1)(2 r d + r + d) weights and the small network before them.
    """

    def __init__(self, d_model: int, bottleneck: int, layers: int, kinds: list[str], task: PerTask,
                 task_dim: int, hidden_dim: int, projected_dim: int, efficient: bool):
        super().__init__()
        point(self, "task", task)                                     # one embedding a task, for both stacks
        self.layer = nn.Embedding(layers, task_dim)
        self.kind = nn.Embedding(len(KINDS), task_dim) if efficient else None
        embeddings = [e for e in (self.layer, self.kind) if e is not None]
        self.project = nn.Sequential(linear((1 + len(embeddings)) * task_dim, hidden_dim), nn.ReLU(),
                                     linear(hidden_dim, projected_dim))
        self.norm = nn.LayerNorm(projected_dim, 1e-6)
        for embedding in embeddings:
            nn.init.normal_(embedding.weight, std=0.02)
        shapes = {"down": bottleneck * d_model, "down_bias": bottleneck, "up": d_model * bottleneck, "up_bias": d_model}
        self.write = nn.ModuleDict({kind: nn.ModuleDict({name: linear(projected_dim, n) for name, n in shapes.items()})
                                    for kind in (["any"] if efficient else kinds)})

    def forward(self, layer: int, kind: str) -> dict[str, torch.Tensor]:
        about = [self.task(), self.layer.weight[layer]]
        if self.kind is not None:
            about.append(self.kind.weight[KINDS.index(kind)])
        e = self.norm(self.project(torch.cat(about)))                                       # [projected_dim]
        return {name: write(e) for name, write in self.write["any" if self.kind is not None else kind].items()}


KINDS = ["ffn", "self_attn", "cross_attn"]       # rows of the efficient variant's embedding


class HyperAdapter(nn.Module):
    """h + up gelu(down h) with weights that a HyperNetwork writes. No weights of its own."""

    def __init__(self, network: HyperNetwork, layer: int, kind: str):
        super().__init__()
        point(self, "network", network)
        self.layer, self.kind = layer, kind

    def forward(self, hidden, x):
        w, d_model = self.network(self.layer, self.kind), hidden.size(-1)
        inner = F.gelu(F.linear(hidden, w["down"].view(-1, d_model), w["down_bias"]), approximate="tanh")
        return hidden + F.linear(inner, w["up"].view(d_model, -1), w["up_bias"])


# ---- elsewhere ----------------------------------------------------------------------------------------------------


class Prompt(nn.Module):
    """Puts `length` trained vectors before the words: up(tanh(down(table))) (prefix tuning's network, section 3.3).

    length d + d mid + mid + mid d + d weights.
    """

    def __init__(self, d_model: int, length: int, mid_dim: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, d_model) * 0.02)
        self.down, self.up = linear(d_model, mid_dim), linear(mid_dim, d_model)

    def forward(self, words):                                                               # [batch, T, d_model]
        prompt = self.up(torch.tanh(self.down(self.table))).to(words.dtype)                 # [length, d_model]
        return torch.cat([prompt.expand(len(words), -1, -1), words], 1)                     # [batch, length + T, d_model]


class LowRankUpdate(nn.Module):
    """LoRA's B A dropout(x); A [rank, inputs] starts uniform, B [outputs, rank] at zero.

    rank (inputs + outputs) weights.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, dropout: nn.Module):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.dropout = dropout

    def forward(self, x):
        return self.dropout(x) @ self.a.T @ self.b.T


class LoRALinear(nn.Linear):
    """W x + b + alpha / rank B A dropout(x) (Hu et al. 2021): a Linear that takes over the weights of another.

    `merge` folds the update into W for as long as `unmerge` is not called, which gives W back bit by bit.
    """

    def __init__(self, linear: nn.Linear, update: nn.Module, scale: float):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.update, self.scale = update, scale
        self.unmerged = None                                          # W, while the update is folded in

    def forward(self, x):
        out = super().forward(x)
        return out + self.scale * self.update(x) if self.unmerged is None else out


class BiasedRMSNorm(nn.RMSNorm):
    """g x / rms(x) + b: an RMSNorm that takes over the weight of another, and has a bias, zero at first. d weights."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, nn.Parameter(torch.zeros_like(norm.weight))

    def forward(self, x):
        return super().forward(x) + self.bias


# ---- filling a model ----------------------------------------------------------------------------------------------


def places(model: nn.Module, attribute: str, sites: Iterable[str] | None) -> dict[str, nn.Module]:
    """The modules with a submodule called `attribute`, by their names, at the given sites (None: everywhere).

    A site is one or more words of such a name: "ffn", "encoder", "decoder.cross_attn". Raises ValueError for one that
    fits no name.
    """
    found = {name: module for name, module in model.named_modules() if attribute in module._modules}
    if sites is None:
        return found
    fits = lambda site, name: set(site.split(".")) <= set(name.split("."))
    for site in sites:
        if not any(fits(site, name) for name in found):
            words = dict.fromkeys(word for name in found for word in name.split("."))
            raise ValueError(f"unknown site: {site!r} is nowhere among the places; their names have the words "
                             f"{', '.join(words) or '(there are no places)'}")
    return {name: module for name, module in found.items() if any(fits(site, name) for site in sites)}


def empty_places(model: nn.Module, attribute: str, sites: Iterable[str] | None) -> dict[str, nn.Module]:
    """`places`, if no earlier method has filled any of them. Raises ValueError otherwise."""
    found = places(model, attribute, sites)
    for name, module in found.items():
        if isinstance(getattr(module, attribute), (PerTask, Adapter, HyperAdapter, Prompt)):
            raise ValueError(f"the place {name}.{attribute} is filled already")
    return found


def per_task(tasks, share: str, make: Callable[[], nn.Module]) -> nn.Module:
    """One module for all tasks or one for each."""
    return PerTask(tasks, make) if share == "none" else make()


def fill_bottlenecks(model, d_model, tasks, share, sites, reduction, projection) -> int:
    """Adapters whose down and up are made by projection(inputs, outputs) in every place."""
    bottleneck = d_model // reduction
    if bottleneck < 1:
        raise ValueError(f"a reduction of {reduction} leaves nothing of a width of {d_model}")
    filled = empty_places(model, "adapter", sites)
    for module in filled.values():
        make_down = lambda: projection(d_model, bottleneck)
        down = PerTask(tasks, make_down) if share == "half" else None
        module.adapter = per_task(tasks, share, lambda: Adapter(down or make_down(), projection(bottleneck, d_model)))
    return len(filled)


def fill_adapters(model, d_model, tasks, share, sites, reduction) -> int:
    return fill_bottlenecks(model, d_model, tasks, share, sites, reduction, linear)


def fill_compacters(model, d_model, tasks, share, sites, reduction, factors, shared_rule, rank) -> int:
    if shared_rule:
        model.kronecker_rule = Value(torch.randn(factors, factors, factors) * 0.01)
    projection = lambda inputs, outputs: KroneckerLinear(
        inputs, outputs, factors, rank, model.kronecker_rule if shared_rule else None)
    return fill_bottlenecks(model, d_model, tasks, share, sites, reduction, projection)


def fill_low_rank(model, d_model, tasks, share, sites, reduction, rank) -> int:
    projection = lambda inputs, outputs: LowRankLinear(inputs, outputs, rank)
    return fill_bottlenecks(model, d_model, tasks, share, sites, reduction, projection)


def fill_hyperformer(model, d_model, tasks, share, sites, reduction, task_dim, hidden_dim, projected_dim,
                     efficient) -> int:
    """One HyperNetwork a stack. Stack, layer and kind are read off the name of a place, as in encoder.layers.0.ffn."""
    filled = empty_places(model, "adapter", sites)
    for name in filled:
        if not re.fullmatch(r"\w+\..*\.\d+\.(ffn|self_attn|cross_attn)", name):
            raise ValueError(f"hyperformer cannot tell stack, layer and kind of the place {name!r}; "
                             f"expected a name like encoder.layers.0.ffn")
    model.task_embedding = PerTask(tasks, lambda: Value(torch.randn(task_dim)))
    model.hypernetworks = nn.ModuleDict()
    for stack in dict.fromkeys(name.split(".")[0] for name in filled):
        here = [name.split(".") for name in filled if name.startswith(stack + ".")]
        layers = 1 + max(int(words[-2]) for words in here)
        kinds = [kind for kind in KINDS if any(words[-1] == kind for words in here)]
        model.hypernetworks[stack] = HyperNetwork(d_model, d_model // reduction, layers, kinds, model.task_embedding,
                                                  task_dim, hidden_dim, projected_dim, efficient)
    for name, module in filled.items():
        stack, *_, layer, kind = name.split(".")
        module.adapter = HyperAdapter(model.hypernetworks[stack], int(layer), kind)
    return len(filled)


def fill_prompt(model, d_model, tasks, share, sites, length, mid_dim) -> int:
    """Prompts before the words of the encoder (not of a decoder), whatever the sites of an adapter beside it."""
    filled = {name: module for name, module in empty_places(model, "prompt", None).items() if "decoder" not in name}
    for module in filled.values():
        module.prompt = per_task(tasks, share, lambda: Prompt(d_model, length, mid_dim))
    return len(filled)


def fill_lora(model, d_model, tasks, share, sites, rank, alpha, dropout, targets) -> int:
    filled, kind = 0, next((type(m) for m in model.modules() if isinstance(m, nn.Dropout)), nn.Dropout)  # the model's own
    for target in targets:
        for module in places(model, target, sites).values():
            old = getattr(module, target)
            make = lambda: LowRankUpdate(old.in_features, old.out_features, rank, kind(dropout))
            setattr(module, target, LoRALinear(old, per_task(tasks, share, make), alpha / rank))
            filled += 1
    return filled


def fill_biases(model, d_model, tasks, share, sites) -> int:
    """Zero biases for Linears and RMSNorms that have none, and then for the head: BitFit on T5 as LST defines it.

    In BART nothing lacks a bias. Returns how many biases the model has then; sites do not matter.
    """
    bare = [module for module in model.modules() if isinstance(module, nn.Linear) and module.bias is None]
    for module in bare:
        module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm) is nn.RMSNorm:
                setattr(parent, name, BiasedRMSNorm(norm))
    if bare and "logits_bias" in model._buffers:
        model.logits_bias = nn.Parameter(model._buffers.pop("logits_bias"))
    return sum(name.endswith("bias") for name, _ in model.named_parameters())


# ---- the table of methods -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A row of the paper: what is put in, with which sizes, what else trains, and the learning rates of its scripts."""
    fill: Callable | None                # puts modules in and returns how many; None: nothing is put in
    sizes: dict                          # its sizes, any of which `install` takes by name
    trains: tuple[str, ...]              # besides what is put in: keys of TRAINS
    lr: float                            # pictures; one module for all tasks
    lr_videos: float
    shares: tuple[str, ...] = ("all",)   # all: one for all tasks; half: up for all, down per task; none: one per task
    lr_per_task: float | None = None     # pictures, share half and none, where it differs
    sizes_on: dict[str, dict] = field(default_factory=dict)      # sizes that differ by backbone


ANY = ("all", "half", "none")
BACKBONES = ("bart", "t5")
# Sizes and rates: scripts/{image,video}/*.sh of the original; where it has no video script, the adapter's rate. On T5
# the sizes of the published numbers, LST's (arXiv 2206.06522); the original's own T5 scripts are --sizes reduction=8.
METHODS = {
    "full": Method(None, {}, ("all",), 1e-4, 3e-5),
    "adapter": Method(fill_adapters, dict(reduction=8), ("visual", "norms"), 1e-3, 3e-4, ANY, 3e-4,
                      dict(t5=dict(reduction=4))),
    "hyperformer": Method(fill_hyperformer,
                          dict(reduction=8, task_dim=512, hidden_dim=128, projected_dim=8, efficient=False),
                          ("visual", "norms"), 1e-3, 3e-4),
    "compacter": Method(fill_compacters, dict(reduction=8, factors=2, shared_rule=False, rank=None),
                        ("visual", "norms"), 1e-3, 3e-4, ANY),
    "lowrank": Method(fill_low_rank, dict(reduction=8, rank=1), ("visual", "norms"), 1e-3, 3e-4, ANY),
    "prompt": Method(fill_prompt, dict(length=40, mid_dim=800), ("visual",), 1e-3, 3e-4, ("all", "none")),
    "lora": Method(fill_lora, dict(rank=128, alpha=32, dropout=0.1, targets=("q", "v")),
                   ("visual", "biases"), 1e-3, 3e-4, ("all", "none"), sizes_on=dict(t5=dict(rank=150))),
    "bitfit": Method(fill_biases, {}, ("visual", "biases"), 1e-3, 3e-4),
}

TRAINS = {  # what a method trains besides what it puts in, by type and not by name
    "all": lambda model: model.parameters(),
    "visual": lambda model: model.visual.parameters() if hasattr(model, "visual") else (),
    # T5's RMSNorms are none of these: they are frozen in the original too, and in the published numbers.
    "norms": lambda model: (p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()),
    "biases": lambda model: (m.bias for m in model.modules()
                             if isinstance(m, (nn.Linear, nn.LayerNorm)) and m.bias is not None),
}


def install(model: nn.Module, method: str, d_model: int, tasks: Iterable[str], share: str = "all",
            sites: Iterable[str] | None = None, trains: Iterable[str] | None = None, backbone: str = "bart",
            **sizes) -> int:
    """Freezes the model, fills its places and returns how many it filled. New weights are drawn from torch's generator.

    method is a row of METHODS, or several joined by "+" ("adapter+prompt"); tasks are the names `select` will be given;
    share is all, half or none; sites restrict the places ("ffn", "encoder", "decoder.cross_attn"; see `places`);
    trains replaces what else is trained (keys of TRAINS); sizes replace those of the method's row for the backbone.
    Raises ValueError for names that are not known and when no place was found.
    """
    known(method.split("+"), METHODS, "method")
    known([backbone], BACKBONES, "backbone")
    rows, filled = {name: METHODS[name] for name in method.split("+")}, 0
    for name, row in rows.items():
        known([share], row.shares, f"share of {name}")
    known(sizes, list(dict.fromkeys(size for row in rows.values() for size in row.sizes)), f"size of {method}")
    if trains is None:
        trains = dict.fromkeys(part for row in rows.values() for part in row.trains)
    trains = list(trains)
    known(trains, TRAINS, "part to train")
    tasks, sites = list(tasks), None if sites is None else list(sites)
    device, training = next(model.parameters()).device, model.training
    model.requires_grad_(False)
    for name, row in rows.items():
        if row.fill is not None:
            own = row.sizes | row.sizes_on.get(backbone, {})
            count = row.fill(model, d_model, tasks, share, sites, **{k: sizes.get(k, v) for k, v in own.items()})
            if count == 0:
                raise ValueError(f"the model has no place for {name}")
            filled += count
    for part in trains:
        for parameter in TRAINS[part](model):
            parameter.requires_grad_(True)
    model.to(device).train(training)
    return filled


def known(names: Iterable[str], allowed: Iterable[str], what: str):
    for name in names:
        if name not in allowed:
            raise ValueError(f"unknown {what}: {name!r}; known are {', '.join(map(str, allowed)) or 'none'}")


def select(model: nn.Module, task: str):
    """Points every per-task module at its copy for `task`. Raises ValueError for a task it was not installed with."""
    per_task = [module for module in model.modules() if isinstance(module, PerTask)]
    for module in per_task:
        known([task], module.copies, "task")
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.unmerged is not None and isinstance(module.update, PerTask):
            if module.update.chosen is not module.update.copies[task]:
                raise ValueError("unmerge the model before selecting another task")
    for module in per_task:
        point(module, "chosen", module.copies[task])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name, each weight once. It is also what is saved."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge(model: nn.Module):
    """Folds LoRA's updates into the weights they belong to (per task: the selected ones), for inference at no cost."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear) and module.unmerged is None:
                update = module.update.chosen if isinstance(module.update, PerTask) else module.update
                if update is unchosen:
                    unchosen()
                module.unmerged = module.weight.clone()
                module.weight += module.scale * update.b @ update.a


def unmerge(model: nn.Module):
    """Takes LoRA's updates out again: the weights are those before `merge`, bit by bit."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear) and module.unmerged is not None:
                module.weight.copy_(module.unmerged)
                module.unmerged = None


# ---- python adapters.py -------------------------------------------------------------------------------------------


BASE = {  # what a skeleton needs to know of bart-base and t5-base
    "bart": dict(layers=6, words=50465, positions=(1026, 768), norm=nn.LayerNorm, bias=True, prenorm=False),
    "t5": dict(layers=12, words=32200, positions=(32, 12), norm=nn.RMSNorm, bias=False, prenorm=True),
}


def skeleton(feature_dim: int, layers: int, words: int, positions: tuple[int, int], norm: Callable, bias: bool,
             prenorm: bool, d_model=768, d_ff=3072) -> nn.Module:
    """The weights and places of VL-BART or VL-T5 on the meta device: names and shapes, no values, enough to count."""
    def tree(**parts):
        module = nn.Module()
        for name, part in parts.items():
            module.add_module(name, part)
        return module

    def sublayer(inner):
        return tree(inner=inner, adapter=nn.Identity(), norm=norm(d_model))

    def layer(cross):
        attention = lambda: sublayer(tree(**{x: nn.Linear(d_model, d_model, bias) for x in ("q", "k", "v", "out")}))
        ffn = sublayer(tree(up=nn.Linear(d_model, d_ff, bias), down=nn.Linear(d_ff, d_model, bias)))
        return tree(self_attn=attention(), cross_attn=attention() if cross else None, ffn=ffn)

    def stack(cross):
        return tree(positions=nn.Embedding(*positions), prompt=nn.Identity(),
                    **{"final_norm" if prenorm else "embed_norm": norm(d_model)},
                    layers=nn.ModuleList(layer(cross) for _ in range(layers)))

    with torch.device("meta"):
        visual = tree(feature=nn.Linear(feature_dim, d_model), feature_norm=norm(d_model),
                      box=nn.Linear(5, d_model), box_norm=norm(d_model), picture=nn.Embedding(2, d_model))
        model = tree(words=nn.Embedding(words, d_model), visual=visual, encoder=stack(False), decoder=stack(True))
        model.register_buffer("logits_bias", torch.zeros(words))
    return model


PUBLISHED = [  # backbone, inputs, method, share, sizes, published per cent of all weights: tables 1 and 2 of the paper,
    # BART's BitFit from VL-PET, T5 from LST; None: the original's script, not published
    ("bart", "pictures", "full", "all", {}, 100), ("bart", "pictures", "adapter", "all", {}, 4.18),
    ("bart", "pictures", "adapter", "half", {}, 8.36), ("bart", "pictures", "adapter", "none", {}, 12.22),
    ("bart", "pictures", "hyperformer", "all", {}, 5.79), ("bart", "pictures", "compacter", "all", {}, 2.70),
    ("bart", "pictures", "compacter", "none", {}, 7.05), ("bart", "pictures", "lora", "all", {}, 5.93),
    ("bart", "pictures", "lora", "none", {}, 17.72), ("bart", "pictures", "prompt", "all", {}, 2.00),
    ("bart", "pictures", "prompt", "none", {}, 4.53), ("bart", "pictures", "bitfit", "all", {}, 1.21),
    ("bart", "videos", "adapter", "all", {}, 3.39), ("bart", "videos", "lora", "all", {}, 5.17),
    ("t5", "pictures", "full", "all", {}, 100), ("t5", "pictures", "adapter", "all", {}, 7.98),
    ("t5", "pictures", "adapter", "all", dict(reduction=8), None),
    ("t5", "pictures", "adapter", "half", dict(reduction=8), None),
    ("t5", "pictures", "adapter", "none", dict(reduction=8), None), ("t5", "pictures", "hyperformer", "all", {}, None),
    ("t5", "pictures", "compacter", "all", {}, None), ("t5", "pictures", "compacter", "none", {}, None),
    ("t5", "pictures", "lora", "all", {}, 7.54), ("t5", "pictures", "prompt", "all", {}, 1.26),
    ("t5", "pictures", "bitfit", "all", {}, 0.83),
]


def share_trained(backbone: str, inputs: str, method: str, share: str, **sizes) -> tuple[int, int]:
    """Trained and all weights with four tasks; inputs are pictures (RN101) or videos (ViT-B/32)."""
    model = skeleton({"pictures": 2048, "videos": 512}[inputs], **BASE[backbone])
    with torch.device("meta"):
        install(model, method, 768, ["a", "b", "c", "d"], share, backbone=backbone, **sizes)
    return sum(p.numel() for p in trainable(model).values()), sum(p.numel() for p in model.parameters())


def main():
    print(f"{'':<6}{'inputs':<10}{'method':<13}{'share':<7}{'trained':>12}{'of all':>13}{'per cent':>10}{'paper':>8}")
    for backbone, inputs, method, share, sizes, published in PUBLISHED:
        trained, total = share_trained(backbone, inputs, method, share, **sizes)
        paper = "-" if published is None else f"{published:.2f}"
        print(f"{backbone:<6}{inputs:<10}{method:<13}{share:<7}{trained:>12,}{total:>13,}{100 * trained / total:>10.2f}"
              f"{paper:>8}", *(f" {name}={size}" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
