"""Each method trains what the paper says it trains, computes its formula and leaves the rest of the model alone."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import adapters
from adapters import (BASE, METHODS, PUBLISHED, BiasedRMSNorm, HyperAdapter, KroneckerLinear, LowRankLinear, LowRankUpdate, Value, install, merge,
                      select, share_trained, skeleton, trainable, unmerge)
from model import Config, Model, t5

TINY = Config(vocab_size=60, d_model=32, heads=4, d_ff=64, encoder_layers=2, decoder_layers=2, max_positions=64, feature_dim=8,
              dropout=0.0, start=2, pad=1, end=2)
TINY_T5 = t5(dict(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, relative_attention_num_buckets=32,
                  dropout_rate=0.0), feature_dim=8, words=60)
TASKS = ["vqa", "gqa", "nlvr", "caption"]
SIZES = {"hyperformer": dict(task_dim=16, hidden_dim=12), "prompt": dict(length=5, mid_dim=20), "lora": dict(rank=4)}
ROWS = [(method, share) for method, row in METHODS.items() for share in row.shares]
BOTH = pytest.mark.parametrize("base", [TINY, TINY_T5], ids=["bart", "t5"])
PER_TASK = [row for row in ROWS if row[1] != "all" or row[0] == "hyperformer"]


def new_model(base=TINY, **changes) -> Model:
    torch.manual_seed(0)
    return Model(dataclasses.replace(base, **changes)).eval()


def with_method(method, share="all", sites=None, shaken=True, base=TINY, **sizes) -> Model:
    """A model with a method and its first task; shaken, no new weight is at zero."""
    model = new_model(base)
    before = set(model.state_dict())
    install(model, method, 32, TASKS, share, sites, **SIZES.get(method, {}) | sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if shaken and name not in before:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    select(model, TASKS[0])
    return model


def batch(rows=3, length=7, answer=4):
    """ids, features, labels, weights"""
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randint(3, 60, shape, generator=generator)
    return draw(rows, length), torch.randn(rows, 1, 4, 8, generator=generator), draw(rows, answer), torch.ones(rows)


@torch.no_grad()
def logits(model):
    return model(*batch()[:3])


def distance(ours, theirs) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# ---- the paper's numbers ------------------------------------------------------------------------------------------


counts = functools.cache(share_trained)


@pytest.mark.parametrize("backbone, inputs, method, share, sizes, published", PUBLISHED)
def test_the_share_of_trained_weights_is_the_published_one(backbone, inputs, method, share, sizes, published):
    trained, total = counts(backbone, inputs, method, share, **sizes)
    expected = 17.71 if (method, share) == ("lora", "none") else published                 # the paper prints 17.72
    assert round(100 * trained / total, 2) == expected or published is None


COUNTS = {  # as counted in the original code
    ("pictures", "full", "all"): (141_156_864, 141_156_864), ("pictures", "adapter", "all"): (6_081_600, 145_606_464),
    ("pictures", "adapter", "half"): (12_725_760, 152_250_624), ("pictures", "adapter", "none"): (19_430_400, 158_955_264),
    ("pictures", "hyperformer", "all"): (8_579_088, 148_103_952), ("pictures", "compacter", "all"): (3_870_240, 143_395_104),
    ("pictures", "compacter", "none"): (10_584_960, 150_109_824), ("pictures", "lora", "all"): (8_786_688, 148_234_752),
    ("pictures", "lora", "none"): (30_020_352, 169_468_416), ("pictures", "prompt", "all"): (2_843_936, 142_417_952),
    ("pictures", "prompt", "none"): (6_627_200, 146_201_216), ("pictures", "bitfit", "all"): (1_708_800, 141_156_864),
    ("pictures", "lowrank", "all"): (1_709_760, 141_234_624), ("videos", "adapter", "all"): (4_901_952, 144_426_816),
    ("videos", "lora", "all"): (7_607_040, 147_055_104), ("videos", "prompt", "all"): (1_664_288, 141_238_304),
    ("videos", "bitfit", "all"): (529_152, 139_977_216), ("videos", "compacter", "all"): (2_690_592, 142_215_456)}


@pytest.mark.parametrize("inputs, method, share", COUNTS)
def test_the_counts_are_those_of_the_original_code(inputs, method, share):
    assert counts("bart", inputs, method, share) == COUNTS[inputs, method, share]


T5_COUNTS = [  # from LST's code where the size is its own, else from the original's
    ("pictures", "full", "all", {}, (224_540_160, 224_540_160)), ("pictures", "bitfit", "all", {}, (1_865_416, 224_824_264)),
    ("pictures", "prompt", "all", {}, (2_842_400, 225_801_248)), ("pictures", "prompt", "none", {}, (6_625_664, 229_584_512)),
    ("pictures", "lora", "all", {}, (18_170_112, 241_128_960)), ("pictures", "adapter", "all", {}, (19_333_632, 242_292_480)),
    ("pictures", "adapter", "all", dict(reduction=8), (10_480_512, 233_439_360)),
    ("pictures", "adapter", "none", dict(reduction=8), (37_178_112, 260_136_960)),
    ("pictures", "adapter", "half", dict(reduction=8), (23_768_832, 246_727_680)),
    ("pictures", "hyperformer", "all", {}, (8_534_544, 231_493_392)),
    ("pictures", "hyperformer", "all", dict(efficient=True), (4_664_048, 227_622_896)),
    ("pictures", "hyperformer", "all", dict(projected_dim=64), (50_078_816, 273_037_664)),
    ("pictures", "compacter", "all", {}, (6_057_792, 229_016_640)), ("pictures", "compacter", "none", {}, (19_487_232, 242_446_080)),
    ("pictures", "compacter", "all", dict(shared_rule=True, rank=1), (1_736_840, 224_695_688)),
    ("pictures", "lowrank", "all", {}, (1_736_832, 224_695_680)), ("videos", "full", "all", {}, (223_360_512, 223_360_512)),
    ("videos", "adapter", "all", dict(reduction=8), (9_300_864, 232_259_712)), ("videos", "prompt", "all", {}, (1_662_752, 224_621_600))]


@pytest.mark.parametrize("inputs, method, share, sizes, expected", T5_COUNTS)
def test_the_counts_on_t5_are_those_of_the_original_code(inputs, method, share, sizes, expected):
    assert counts("t5", inputs, method, share, **sizes) == expected


@pytest.mark.parametrize("method, sizes, expected", [
    ("hyperformer", dict(efficient=True), (4_708_592, 144_233_456)), ("hyperformer", dict(projected_dim=64), (50_123_360, 189_648_224)),
    ("compacter", dict(shared_rule=True, rank=1, factors=2), (1_709_768, 141_234_632)),
    ("compacter", dict(shared_rule=True, rank=1, factors=4), (1_709_824, 141_234_688))])
def test_the_counts_of_variants_are_those_of_the_original_code(method, sizes, expected):
    assert counts("bart", "pictures", method, "all", **sizes) == expected


def test_python_adapters_py_prints_the_table():
    lines = subprocess.run([sys.executable, Path(adapters.__file__)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 1 + len(PUBLISHED)
    assert lines[2].split() == ["bart", "pictures", "adapter", "all", "6,081,600", "145,606,464", "4.18", "4.18"]
    assert lines[9].split() == ["bart", "pictures", "lora", "none", "30,020,352", "169,468,416", "17.71", "17.72"]
    assert lines[17].split() == ["t5", "pictures", "adapter", "all", "10,480,512", "233,439,360", "4.49", "-", "reduction=8"]


BART_BASE = Config(vocab_size=50465, d_model=768, heads=12, d_ff=3072, encoder_layers=6, decoder_layers=6, max_positions=1024,
                   feature_dim=2048, dropout=0.1, start=2, pad=1, end=2)
T5_BASE = t5(dict(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, relative_attention_num_buckets=32),
             feature_dim=2048, words=32200)


@pytest.mark.parametrize("backbone, config", [("bart", BART_BASE), ("t5", T5_BASE)], ids=["bart", "t5"])
def test_the_skeleton_has_the_names_and_shapes_of_the_model(backbone, config):
    with torch.device("meta"):
        model = Model(config)
    shapes = lambda module: {name: weight.shape for name, weight in module.state_dict().items()}
    assert shapes(skeleton(2048, **BASE[backbone])) == shapes(model)


# ---- every method -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("method, share", ROWS)
def test_pretrained_names_and_values_stay(method, share, base):
    before, after = new_model(base).state_dict(), with_method(method, share, base=base).state_dict()
    assert list(before) == [name for name in after if name in before]
    assert all(torch.equal(after[name], value) for name, value in before.items())


@BOTH
@pytest.mark.parametrize("method, share", ROWS)
def test_what_is_new_trains_and_what_the_row_says(method, share, base):
    model, old = with_method(method, share, base=base), dict(new_model(base).named_parameters())
    norms = {"norms": lambda name: "norm." in name} if base is TINY else {"norms": lambda name: False}     # T5's stay frozen
    also = {"all": lambda name: True, "visual": lambda name: name.startswith("visual."), "biases": lambda name: name.endswith("bias")} | norms
    expected = {name for name, _ in model.named_parameters()
                if name not in old or any(also[part](name) for part in METHODS[method].trains)}
    assert set(trainable(model)) == expected and trainable(model).keys() >= {name for name in old if name.startswith("visual.")}
    assert (old.keys() <= expected) == (method == "full")


@pytest.mark.parametrize("method, share", ROWS + [("compacter", "shared rule")])
def test_each_weight_is_listed_once(method, share):
    model = with_method(method, shared_rule=True) if share == "shared rule" else with_method(method, share)
    weights = model.state_dict(keep_vars=True)
    assert len({id(weight) for weight in weights.values()}) == len(weights)
    assert len(list(model.named_parameters(remove_duplicate=False))) == len(list(model.parameters()))


@BOTH
@pytest.mark.parametrize("method, share", ROWS)
def test_a_method_changes_the_answer_and_trains_on_it(method, share, base):
    model = with_method(method, share, base=base)
    adds_nothing = method == "full" or method == "bitfit" and base is TINY
    assert (distance(logits(model), logits(new_model(base))) > 1e-3) != adds_nothing
    model.loss(*batch()).backward()
    idle = {name for name, parameter in trainable(model).items() if parameter.grad is None}
    assert all("copies" in name and ".vqa." not in name for name in idle)


def test_bitfit_gives_t5_the_biases_that_bart_has():
    assert set(with_method("bitfit").state_dict()) == set(new_model().state_dict())
    model, x = with_method("bitfit", base=TINY_T5), torch.randn(2, 3, 32)
    assert torch.equal(logits(with_method("bitfit", base=TINY_T5, shaken=False)), logits(new_model(TINY_T5)))      # zeros at first
    assert all(m.bias.requires_grad for m in model.modules() if isinstance(m, (nn.Linear, nn.RMSNorm)))
    norm = model.decoder.final_norm
    assert isinstance(norm, BiasedRMSNorm) and model.logits_bias.requires_grad
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() + norm.bias
    assert distance(norm(x).detach(), expected.detach()) < 1e-6


def test_the_sizes_of_a_row_are_those_of_the_backbone():
    model = new_model(TINY_T5)
    install(model, "adapter", 32, TASKS, backbone="t5")
    assert model.encoder.layers[0].ffn.adapter.down.out_features == 8 and METHODS["adapter"].sizes == dict(reduction=8)
    model = new_model(TINY_T5)
    install(model, "adapter", 32, TASKS, backbone="t5", reduction=2)                        # what is asked for comes first
    assert model.encoder.layers[0].ffn.adapter.down.out_features == 16


@BOTH
@pytest.mark.parametrize("method, share", ROWS)
def test_what_is_trained_is_all_that_must_be_saved(method, share, base):
    trained, fresh = with_method(method, share, base=base), with_method(method, share, base=base, shaken=False)
    with torch.no_grad():
        for parameter in trainable(trained).values():
            parameter.add_(0.01)
    assert distance(logits(fresh), logits(trained)) > 1e-3
    assert not fresh.load_state_dict(trainable(trained), strict=False).unexpected_keys
    assert torch.equal(logits(fresh), logits(trained))


@pytest.mark.parametrize("share", ["all", "none"])
def test_a_fresh_lora_changes_nothing(share):
    assert torch.equal(logits(with_method("lora", share, shaken=False)), logits(new_model()))


@pytest.mark.parametrize("method", ["adapter", "compacter"])
def test_a_fresh_adapter_changes_little(method):
    change = distance(logits(with_method(method, shaken=False)), logits(new_model()))
    assert 0 < change < 0.05


def test_two_methods_together():
    model = new_model()
    assert install(model, "adapter+prompt", 32, TASKS, "none", length=5, mid_dim=20, reduction=4) == 10 + 1
    select(model, "gqa")
    one, other = with_method("adapter", "none", reduction=4), with_method("prompt", "none")
    assert trainable(model).keys() == trainable(one).keys() | trainable(other).keys()
    assert model.encode(*batch()[:2])[0].shape == (3, 5 + 7 + 4, 32) and logits(model).isfinite().all()


@pytest.mark.parametrize("method", ["adapter", "compacter", "lowrank", "hyperformer"])
@pytest.mark.parametrize("sites, expected", [
    (None, 10), (["ffn"], 4), (["encoder"], 4), (["decoder.cross_attn"], 2), (["encoder.ffn", "decoder.self_attn"], 4), (["layers.1"], 5)])
def test_only_the_named_places_are_filled(method, sites, expected):
    model = new_model()
    assert install(model, method, 32, TASKS, sites=sites, **SIZES.get(method, {})) == expected
    select(model, "vqa")
    filled = {name for name, module in model.named_modules() if isinstance(module, (adapters.Adapter, HyperAdapter))}
    chosen = {name for name in (f"{stack}.layers.{i}.{kind}.adapter" for stack in ("encoder", "decoder") for i in (0, 1)
                                for kind in ("self_attn", "cross_attn", "ffn") if (stack, kind) != ("encoder", "cross_attn"))
              if sites is None or any(all(word in name.split(".") for word in site.split(".")) for site in sites)}
    assert filled == chosen and distance(logits(model), logits(new_model())) > 0


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, share", PER_TASK)
def test_forgetting_to_select_is_an_error(method, share):
    model = new_model()
    install(model, method, 32, TASKS, share, **SIZES.get(method, {}))
    with pytest.raises(RuntimeError, match=r"call select\(model, task\)"):
        logits(model)


@pytest.mark.parametrize("arguments, message", [
    (dict(method="adaptor"), "unknown method: 'adaptor'; known are full, adapter, hyperformer"),
    (dict(method="adapter+promt"), "unknown method: 'promt'; known are full"),
    (dict(share="some"), "unknown share of adapter: 'some'; known are all, half, none"),
    (dict(method="lora", share="half"), "unknown share of lora: 'half'; known are all, none"),
    (dict(backbone="gpt2"), "unknown backbone: 'gpt2'; known are bart, t5"),
    (dict(reducton=4), "unknown size of adapter: 'reducton'; known are reduction"),
    (dict(method="bitfit", rank=4), "unknown size of bitfit: 'rank'; known are none"),
    (dict(trains=["nroms"]), "unknown part to train: 'nroms'; known are all, visual, norms, biases"),
    (dict(sites=["ffn", "fnn"]), "unknown site: 'fnn' is nowhere among the places; their names have the words encoder"),
    (dict(method="lora", targets=["query"]), "the model has no place for lora"),
    (dict(method="compacter", factors=3), "3 Kronecker factors must divide both 32 and 4"),
], ids=lambda x: "" if isinstance(x, str) else "-".join(x))
def test_a_misspelt_name_is_an_error_that_lists_the_known_ones(arguments, message):
    with pytest.raises(ValueError) as error:
        install(new_model(), **dict(method="adapter", d_model=32, tasks=TASKS) | arguments)
    assert message in str(error.value)


def test_an_unknown_task_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown task: 'okvqa'; known are vqa, gqa, nlvr, caption"):
        select(with_method("adapter", "none"), "okvqa")


@pytest.mark.parametrize("method", ["adapter", "hyperformer", "compacter", "lowrank", "prompt", "lora"])
def test_a_model_without_places_is_an_error(method):
    with pytest.raises(ValueError, match=f"the model has no place for {method}"):
        install(nn.Sequential(nn.Linear(32, 32)), method, 32, TASKS)


# ---- tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, share", PER_TASK)
def test_a_task_trains_only_its_own_copy(method, share):
    model = with_method(method, share)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01, weight_decay=0.1)
    before = {name: parameter.clone() for name, parameter in trainable(model).items()}
    select(model, "nlvr")
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(*batch()).backward()
        assert {name for name, p in before.items() if trainable(model)[name].grad is None} == {
            name for name in before if ".copies." in name and ".copies.nlvr" not in name}
        optimizer.step()
    moved = {name for name, parameter in trainable(model).items() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".copies." not in name or ".copies.nlvr" in name}
    assert any(".copies." in name for name in moved)


@pytest.mark.parametrize("method, share", PER_TASK)
def test_tasks_answer_differently_and_come_back(method, share):
    model, answers = with_method(method, share), {}
    for task in TASKS * 2:
        select(model, task)
        assert torch.equal(answers.setdefault(task, logits(model)), logits(model))
    assert all(distance(answers[task], answers["vqa"]) > 1e-3 for task in TASKS[1:])


ROUND = [("vqa", (3, 9, 5), 1), ("gqa", (5, 6, 3), 1), ("nlvr", (2, 9, 5), 2), ("caption", (4, 5, 8), 1)]      # pictures


def round_batch(shape, pictures: int, base=TINY) -> tuple:
    """What `Model.loss` takes, with padding and the places of what is none."""
    ids, features, labels, weights = batch(*shape)
    ids[1:, -2:], labels[1:, -1] = base.pad, -100
    return (ids, features.repeat(1, pictures, 1, 1), labels, weights,
            (ids != base.pad).flatten().nonzero()[:, 0], (labels != -100).flatten().nonzero()[:, 0])


def graphs(method, share, modes, encoder_layers, base=TINY) -> list[int]:
    """How many graphs of the loss were compiled after each round, which is one batch of every task."""
    torch._dynamo.reset()
    model = new_model(base, encoder_layers=encoder_layers, decoder_layers=1, dropout=0.1)
    install(model, method, 32, TASKS, share, **SIZES.get(method, {}))
    counter, after = CompileCounter(), []
    loss = torch.compile(model.loss, backend=counter)
    for mode in modes:
        model.train(mode == "train")
        for task, shape, pictures in ROUND:
            select(model, task)
            with torch.set_grad_enabled(model.training):
                value = loss(*round_batch(shape, pictures, base))
            if model.training:
                value.backward()
        after.append(counter.frame_count)
    return after


def test_switching_tasks_does_not_recompile():
    """One graph for the first shape, one for all others, one for pairs of pictures, whatever the task."""
    assert graphs("adapter", "none", ["train", "train", "train"], encoder_layers=1) == [3, 3, 3]


@pytest.mark.parametrize("method, share", [("compacter", "none"), ("lora", "none"), ("prompt", "none"), ("hyperformer", "all")])
def test_nor_does_it_with_other_methods(method, share):
    assert graphs(method, share, ["train"] * 3, encoder_layers=0) == [3, 3, 3]              # a layer is as good as many


def test_nor_does_it_on_t5():
    assert graphs("adapter", "none", ["train"] * 2, encoder_layers=1, base=TINY_T5) == [3, 3]


@pytest.mark.parametrize("method, share, recompute", [("adapter", "none", True), ("compacter", "all", False),
                                                      ("lora", "all", False)])
def test_compiled_losses_and_gradients_are_those_of_eager(method, share, recompute):
    """To 1e-5 of the largest, over the shapes of all tasks; aot_eager has traced the graphs of backward, too."""
    torch._dynamo.reset()
    model = with_method(method, share, base=dataclasses.replace(TINY, encoder_layers=1, decoder_layers=1))
    model.encoder.recompute = model.decoder.recompute = model.train(recompute).training     # but LoRA has dropout
    compiled = torch.compile(model.loss, backend="aot_eager")
    for task, shape, pictures in ROUND:
        select(model, task)
        inputs, found = round_batch(shape, pictures), []
        for loss in model.loss, compiled:
            model.zero_grad()
            value = loss(*inputs)
            value.backward()
            found.append([value.detach(), *(p.grad for p in trainable(model).values() if p.grad is not None)])
        assert len(found[0]) == len(found[1]) > 5
        assert all(distance(theirs, ours) < 1e-5 for ours, theirs in zip(*found) if ours.any())


# ---- formulas -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_adapter_is_a_bottleneck_with_a_residual_sum():
    model, hidden = with_method("adapter"), torch.randn(2, 3, 32)
    place = model.encoder.layers[0].ffn.adapter
    a = hidden @ place.down.weight.T + place.down.bias
    gelu = 0.5 * a * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (a + 0.044715 * a ** 3)))
    assert a.size(-1) == 4 and distance(place(hidden, None), hidden + gelu @ place.up.weight.T + place.up.bias) < 1e-5


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_a_compacter_is_a_sum_of_kronecker_products(rank, shared):
    rule, x = Value(torch.randn(4, 4, 4)) if shared else None, torch.randn(5, 12).double()
    layer = KroneckerLinear(12, 8, factors=4, rank=rank, shared_rule=rule).double()
    nn.init.normal_(layer.bias)
    weights = layer.weight if rank is None else [left @ right for left, right in zip(layer.left, layer.right)]
    rules = (rule.double() if shared else layer.rule).value
    H = sum(torch.kron(r, w) for r, w in zip(rules, weights))
    assert H.shape == (12, 8) and distance(layer(x), x @ H + layer.bias) < 1e-12


def test_a_shared_rule_is_one_for_the_model():
    own, shared = with_method("compacter"), with_method("compacter", shared_rule=True)
    rules = [name for name in shared.state_dict() if "rule" in name]
    assert rules == ["kronecker_rule.value"] and sum("rule" in name for name in own.state_dict()) == 20
    assert len({id(m.rule) for m in shared.modules() if isinstance(m, KroneckerLinear)}) == 1
    shared.loss(*batch()).backward()
    assert shared.kronecker_rule.value.grad.abs().sum() > 0


@torch.no_grad()
def test_a_low_rank_linear_is_a_product_of_two_matrices():
    layer, x = LowRankLinear(6, 4, rank=2).double(), torch.randn(5, 6).double()
    nn.init.normal_(layer.bias)
    H = sum(torch.outer(layer.left[:, i], layer.right[i]) for i in range(2))
    assert distance(layer(x), x @ H + layer.bias) < 1e-12


@pytest.mark.parametrize("efficient", [False, True])
@torch.no_grad()
def test_a_hypernetwork_writes_the_adapter_of_each_place(efficient):
    """e = LN(W2 relu(W1 [task; layer (; kind)])); the adapter's weights are Linears of e."""
    model, hidden = with_method("hyperformer", efficient=efficient).double(), torch.randn(2, 3, 32).double()
    select(model, "nlvr")
    w = model.state_dict()
    for stack, kind, layer in [("encoder", "ffn", 0), ("encoder", "self_attn", 1), ("decoder", "cross_attn", 0), ("decoder", "ffn", 1)]:
        net = f"hypernetworks.{stack}."
        about = [w["task_embedding.copies.nlvr.value"], w[net + "layer.weight"][layer]]
        about += [w[net + "kind.weight"][["ffn", "self_attn", "cross_attn"].index(kind)]] if efficient else []
        e = w[net + "project.0.weight"] @ torch.cat(about) + w[net + "project.0.bias"]
        e = w[net + "project.2.weight"] @ e.clamp(min=0) + w[net + "project.2.bias"]
        e = (e - e.mean()) / (e.var(unbiased=False) + 1e-6).sqrt() * w[net + "norm.weight"] + w[net + "norm.bias"]
        written = {name: w[f"{net}write.{'any' if efficient else kind}.{name}.weight"] @ e
                   + w[f"{net}write.{'any' if efficient else kind}.{name}.bias"] for name in ("down", "down_bias", "up", "up_bias")}
        inner = F.gelu(hidden @ written["down"].reshape(4, 32).T + written["down_bias"], approximate="tanh")
        expected = hidden + inner @ written["up"].reshape(32, 4).T + written["up_bias"]
        place = getattr(getattr(model, stack).layers[layer], kind).adapter
        assert distance(place(hidden, None), expected) < 1e-12, (stack, kind, layer)


@torch.no_grad()
def test_a_prompt_stands_before_the_words():
    model, ids = with_method("prompt"), batch()[0]
    prompt = model.encoder.prompt
    vectors = torch.tanh(prompt.table @ prompt.down.weight.T + prompt.down.bias) @ prompt.up.weight.T + prompt.up.bias
    words = model.words(ids) + model.encoder.positions.weight[2:9]
    seen = prompt(words)
    assert seen.shape == (3, 5 + 7, 32) and torch.equal(seen[:, 5:], words) and distance(seen[:, :5], vectors.expand(3, 5, 32)) < 1e-5


@torch.no_grad()
def test_a_lora_is_a_low_rank_update_of_q_and_v():
    model, x = with_method("lora"), torch.randn(2, 3, 32)
    attention = model.decoder.layers[1].cross_attn.inner
    for linear in (attention.q, attention.v):
        W = linear.weight + 32 / 4 * linear.update.b @ linear.update.a
        assert distance(linear(x), x @ W.T + linear.bias) < 1e-5
    assert type(attention.k) is type(attention.out) is nn.Linear


@BOTH
def test_a_place_is_shown_the_input_of_its_sublayer(base):
    """A parallel adapter, put in by hand: hidden + up(relu(down(x))). With prenorm x is what the norm is shown."""
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(32, 4), nn.Linear(4, 32)

        def forward(self, hidden, x):
            return hidden + self.up(F.relu(self.down(x)))

    model, x = new_model(base), torch.randn(2, 3, 32)
    step = model.decoder.layers[1].ffn
    step.adapter = parallel = Parallel()
    inner = step.inner(step.norm(x)) if base.prenorm else step.inner(x)
    a = (x @ parallel.down.weight.T + parallel.down.bias).clamp(min=0)
    sums = x + inner + a @ parallel.up.weight.T + parallel.up.bias
    expected = sums if base.prenorm else F.layer_norm(sums, (32,), step.norm.weight, step.norm.bias)
    assert distance(step(x).detach(), expected.detach()) < 1e-5
    assert distance(logits(model), logits(new_model(base))) > 1e-3


# ---- merging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["all", "none"])
def test_a_merged_lora_says_the_same_without_its_update(share, monkeypatch):
    model = with_method("lora", share)
    select(model, "gqa")
    before = logits(model)
    merge(model)
    monkeypatch.setattr(LowRankUpdate, "forward", None)             # calling it would now be an error
    assert distance(logits(model), before) < 1e-5


@pytest.mark.parametrize("share", ["all", "none"])
def test_unmerging_gives_the_weights_back_bit_by_bit(share):
    model = with_method("lora", share)
    before, said = {name: weight.clone() for name, weight in model.state_dict().items()}, logits(model)
    merge(model)
    merge(model)                                                    # a second time changes nothing
    q = "encoder.layers.0.self_attn.inner.q.weight"
    assert not torch.equal(model.state_dict()[q], before[q])
    unmerge(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(logits(model), said)


def test_selecting_another_task_while_merged_is_an_error():
    model = with_method("lora", "none")
    merge(model)
    select(model, "vqa")                                            # the one that is merged
    with pytest.raises(ValueError, match="unmerge the model"):
        select(model, "gqa")
    unmerge(model)
    select(model, "gqa")


def test_merging_before_selecting_is_an_error():
    model = new_model()
    install(model, "lora", 32, TASKS, "none", rank=4)
    with pytest.raises(RuntimeError, match="call select"):
        merge(model)


# ---- a model of your own ------------------------------------------------------------------------------------------


class Empty(nn.Module):
    def forward(self, hidden, x):
        return hidden


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value, self.adapter = nn.Linear(16, 16), nn.Linear(16, 16), Empty()

    def forward(self, x):
        return x + self.adapter(torch.softmax(self.query(x), -1) * self.value(x), x)


@pytest.mark.parametrize("method, sizes, places", [("adapter", {}, 3), ("compacter", {}, 3), ("lora", dict(targets=("query",), rank=2), 3)],
                         ids=lambda x: x if isinstance(x, str) else "")
def test_six_lines_adapt_a_model_of_your_own(method, sizes, places, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(Mixer(), Mixer(), nn.ModuleDict({"block": Mixer()})["block"]), torch.randn(4, 5, 16)
    assert install(model, method, d_model=16, tasks=["cats", "dogs"], share="none", trains=[], **sizes) == places
    select(model, "cats")
    optimizer, losses = torch.optim.AdamW(trainable(model).values(), lr=0.01), []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.save(trainable(model), tmp_path / "adapter.pt")
    assert losses[-1] < losses[0] and all(".copies." in name for name in torch.load(tmp_path / "adapter.pt"))
