"""Each method trains what the paper says, computes its formula and leaves the rest alone."""

import dataclasses
import doctest
import functools
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import adapters
from adapters import (METHODS, AdapterError, BiasedRMSNorm, HyperAdapter, KroneckerLinear,
                      LoRALinear, LowRankLinear, Shared, cast_frozen, install, load, merge,
                      percent_trained, save, select, trainable)
from model import Config, Dropout, VLModel, t5

TINY = Config(
    vocab_size=60, d_model=32, heads=4, d_ff=64, encoder_layers=2, decoder_layers=2,
    max_positions=64, feature_dim=8, dropout=0.0, decoder_start=2, pad=1, eos=2)
TINY_T5 = t5(
    dict(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
         relative_attention_num_buckets=32, dropout_rate=0.0), feature_dim=8)
TASKS = ["vqa", "gqa", "nlvr", "caption"]
SIZES = {"hyperformer": dict(task_dim=16, hidden_dim=12), "prompt": dict(length=5, mid_dim=20),
         "lora": dict(rank=4)}
ROWS = [(method, sharing) for method, row in METHODS.items() for sharing in row.sharings]
BOTH = pytest.mark.parametrize("base", [TINY, TINY_T5], ids=["bart", "t5"])
PER_TASK = [row for row in ROWS if row[1] != "single" or row[0] == "hyperformer"]


def new_model(base=TINY, **changes) -> VLModel:
    torch.manual_seed(0)
    return VLModel(dataclasses.replace(base, **changes)).eval()


def shake(model, but=()):
    """No weight is at zero then, or at one."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in but:
                weight.add_(torch.randn_like(weight) * 0.1)


def with_method(method, sharing="single", sites=None, shaken=True, base=TINY, **sizes) -> VLModel:
    """A model with a method and its first task; shaken, no new weight is at zero."""
    model = new_model(base)
    before = set(model.state_dict())
    install(model, method, 32, TASKS, sharing, sites, **SIZES.get(method, {}) | sizes)
    if shaken:
        shake(model, but=before)
    select(model, TASKS[0])
    return model


def batch(rows=3, length=7, answer=4):
    """ids, features, labels, weights"""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    features = torch.randn(rows, 1, 4, 8, generator=generator)
    labels = torch.randint(3, 60, (rows, answer), generator=generator)
    return ids, features, labels, torch.ones(rows)


@torch.no_grad()
def logits(model):
    return model(*batch()[:3])


def distance(ours, theirs) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_the_examples_in_docstrings_are_true():
    failed, attempted = doctest.testmod(adapters)
    assert failed == 0 and attempted > 0


# ---- the paper's numbers ------------------------------------------------------------------------


counts = functools.cache(percent_trained)
PUBLISHED_ROWS = []
for backbone, inputs, sizes, rows in adapters.PUBLISHED:
    for row, per_cent in rows.items():
        method, _, sharing = row.partition(" ")
        PUBLISHED_ROWS.append((backbone, inputs, method, sharing or "single", sizes, per_cent))


@pytest.mark.parametrize("backbone, inputs, method, sharing, sizes, published", PUBLISHED_ROWS)
def test_the_share_of_trained_weights_is_the_published_one(backbone, inputs, method, sharing,
                                                           sizes, published):
    trained, total = counts(backbone, inputs, method, sharing, **sizes)
    # The paper prints 17.72.
    expected = 17.71 if (method, sharing) == ("lora", "multiple") else published
    assert round(100 * trained / total, 2) == expected or published is None


COUNTS = {  # as counted in the original code
    ("pictures", "full", "single"): (141_156_864, 141_156_864),
    ("pictures", "adapter", "single"): (6_081_600, 145_606_464),
    ("pictures", "adapter", "half"): (12_725_760, 152_250_624),
    ("pictures", "adapter", "multiple"): (19_430_400, 158_955_264),
    ("pictures", "hyperformer", "single"): (8_579_088, 148_103_952),
    ("pictures", "compacter", "single"): (3_870_240, 143_395_104),
    ("pictures", "compacter", "multiple"): (10_584_960, 150_109_824),
    ("pictures", "lora", "single"): (8_786_688, 148_234_752),
    ("pictures", "lora", "multiple"): (30_020_352, 169_468_416),
    ("pictures", "prompt", "single"): (2_843_936, 142_417_952),
    ("pictures", "prompt", "multiple"): (6_627_200, 146_201_216),
    ("pictures", "bitfit", "single"): (1_708_800, 141_156_864),
    ("pictures", "lowrank", "single"): (1_709_760, 141_234_624),
    ("videos", "adapter", "single"): (4_901_952, 144_426_816),
    ("videos", "lora", "single"): (7_607_040, 147_055_104),
    ("videos", "prompt", "single"): (1_664_288, 141_238_304),
    ("videos", "bitfit", "single"): (529_152, 139_977_216),
    ("videos", "compacter", "single"): (2_690_592, 142_215_456),
}


@pytest.mark.parametrize("inputs, method, sharing", COUNTS)
def test_the_counts_are_those_of_the_original_code(inputs, method, sharing):
    assert counts("bart", inputs, method, sharing) == COUNTS[inputs, method, sharing]


T5_COUNTS = [  # from LST's code where the size is its own, else from the original's
    ("pictures", "full", "single", {}, (224_540_160, 224_540_160)),
    ("pictures", "bitfit", "single", {}, (1_865_416, 224_824_264)),
    ("pictures", "prompt", "single", {}, (2_842_400, 225_801_248)),
    ("pictures", "prompt", "multiple", {}, (6_625_664, 229_584_512)),
    ("pictures", "lora", "single", {}, (18_170_112, 241_128_960)),
    ("pictures", "adapter", "single", {}, (19_333_632, 242_292_480)),
    ("pictures", "adapter", "single", dict(reduction=8), (10_480_512, 233_439_360)),
    ("pictures", "adapter", "multiple", dict(reduction=8), (37_178_112, 260_136_960)),
    ("pictures", "adapter", "half", dict(reduction=8), (23_768_832, 246_727_680)),
    ("pictures", "hyperformer", "single", {}, (8_534_544, 231_493_392)),
    ("pictures", "hyperformer", "single", dict(efficient=True), (4_664_048, 227_622_896)),
    ("pictures", "hyperformer", "single", dict(projected_dim=64), (50_078_816, 273_037_664)),
    ("pictures", "compacter", "single", {}, (6_057_792, 229_016_640)),
    ("pictures", "compacter", "multiple", {}, (19_487_232, 242_446_080)),
    ("pictures", "compacter", "single", dict(shared_phm_rule=True, rank=1),
     (1_736_840, 224_695_688)),
    ("pictures", "lowrank", "single", {}, (1_736_832, 224_695_680)),
    ("videos", "full", "single", {}, (223_360_512, 223_360_512)),
    ("videos", "adapter", "single", dict(reduction=8), (9_300_864, 232_259_712)),
    ("videos", "prompt", "single", {}, (1_662_752, 224_621_600)),
]


@pytest.mark.parametrize("inputs, method, sharing, sizes, expected", T5_COUNTS)
def test_the_counts_on_t5_are_those_of_the_original_code(inputs, method, sharing, sizes, expected):
    assert counts("t5", inputs, method, sharing, **sizes) == expected


@pytest.mark.parametrize("method, sizes, expected", [
    ("hyperformer", dict(efficient=True), (4_708_592, 144_233_456)),
    ("hyperformer", dict(projected_dim=64), (50_123_360, 189_648_224)),
    ("compacter", dict(shared_phm_rule=True, rank=1, n=2), (1_709_768, 141_234_632)),
    ("compacter", dict(shared_phm_rule=True, rank=1, n=4), (1_709_824, 141_234_688)),
])
def test_the_counts_of_variants_are_those_of_the_original_code(method, sizes, expected):
    assert counts("bart", "pictures", method, "single", **sizes) == expected


def test_python_adapters_py_prints_the_table(capsys):
    runpy.run_path(adapters.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(PUBLISHED_ROWS)
    words = [line.split() for line in lines]
    assert words[0][:3] == ["inputs", "method", "sharing"]
    assert words[2] == ["bart", "pictures", "adapter", "single", "6,081,600", "145,606,464",
                        "4.18", "4.18"]
    assert words[9] == ["bart", "pictures", "lora", "multiple", "30,020,352", "169,468,416",
                        "17.71", "17.72"]
    assert words[23] == ["t5", "pictures", "adapter", "single", "10,480,512", "233,439,360",
                         "4.49", "-", "reduction=8"]


# ---- every method -------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("method, sharing", ROWS)
def test_pretrained_names_and_values_stay(method, sharing, base):
    before = new_model(base).state_dict()
    after = with_method(method, sharing, base=base).state_dict()
    assert list(before) == [name for name in after if name in before]
    assert all(torch.equal(after[name], value) for name, value in before.items())


@BOTH
@pytest.mark.parametrize("method, sharing", ROWS)
def test_what_is_new_trains_and_what_the_row_says(method, sharing, base):
    model = with_method(method, sharing, base=base)
    old = dict(new_model(base).named_parameters())
    also = {
        "all": lambda name: True,
        "new": lambda name: name.startswith("visual."),
        "norms": lambda name: base is TINY and "norm." in name,       # T5's stay frozen
        "biases": lambda name: name.endswith("bias"),
    }
    expected = {name for name, _ in model.named_parameters()
                if name not in old or any(also[part](name) for part in METHODS[method].trains)}
    assert set(trainable(model)) == expected
    assert trainable(model).keys() >= {name for name in old if name.startswith("visual.")}
    assert (old.keys() <= expected) == (method == "full")


@pytest.mark.parametrize("method, sharing", ROWS + [("compacter", "shared rule")])
def test_each_weight_is_listed_once(method, sharing):
    if sharing == "shared rule":
        model = with_method(method, shared_phm_rule=True)
    else:
        model = with_method(method, sharing)
    weights = model.state_dict(keep_vars=True)
    assert len({id(weight) for weight in weights.values()}) == len(weights)
    everywhere = list(model.named_parameters(remove_duplicate=False))
    assert len(everywhere) == len(list(model.parameters()))


@BOTH
@pytest.mark.parametrize("method, sharing", ROWS)
def test_a_method_changes_the_answer_and_trains_on_it(method, sharing, base):
    model = with_method(method, sharing, base=base)
    adds_nothing = method == "full" or method == "bitfit" and base is TINY
    assert (distance(logits(model), logits(new_model(base))) > 1e-3) != adds_nothing
    model.loss(*batch()).backward()
    idle = {name for name, weight in trainable(model).items() if weight.grad is None}
    assert all("copies" in name and ".vqa." not in name for name in idle)


def test_bitfit_gives_t5_the_biases_that_bart_has():
    assert set(with_method("bitfit").state_dict()) == set(new_model().state_dict())
    fresh = with_method("bitfit", base=TINY_T5, shaken=False)
    assert torch.equal(logits(fresh), logits(new_model(TINY_T5)))     # zeros at first
    model = with_method("bitfit", base=TINY_T5)
    biased = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.RMSNorm))]
    assert all(module.bias.requires_grad for module in biased)
    norm = model.decoder.final_norm
    assert isinstance(norm, BiasedRMSNorm) and model.logits_bias.requires_grad
    x = torch.randn(2, 3, 32)
    rms = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert distance(norm(x).detach(), (norm.weight * x / rms + norm.bias).detach()) < 1e-6


def test_the_sizes_of_a_row_are_those_of_the_backbone():
    model = new_model(TINY_T5)
    install(model, "adapter", 32, TASKS, backbone="t5")
    assert model.encoder.layers[0].ffn.adapter.down.out_features == 8
    assert METHODS["adapter"].sizes == dict(reduction=8)
    model = new_model(TINY_T5)
    install(model, "adapter", 32, TASKS, backbone="t5", reduction=2)  # what is asked for is first
    assert model.encoder.layers[0].ffn.adapter.down.out_features == 16


@BOTH
@pytest.mark.parametrize("method, sharing", ROWS)
def test_what_is_trained_is_all_that_must_be_saved(method, sharing, base, tmp_path):
    trained = with_method(method, sharing, base=base)
    fresh = with_method(method, sharing, base=base, shaken=False)
    shake(trained, but=new_model(base).state_dict().keys() - trainable(trained).keys())
    assert distance(logits(fresh), logits(trained)) > 1e-3
    save(trained, tmp_path / "a.pt", step=7)
    assert load(fresh, tmp_path / "a.pt") == {"step": 7}
    assert torch.equal(logits(fresh), logits(trained))


@pytest.mark.parametrize("sharing", ["single", "multiple"])
def test_a_fresh_lora_changes_nothing(sharing):
    assert torch.equal(logits(with_method("lora", sharing, shaken=False)), logits(new_model()))


@pytest.mark.parametrize("method", ["adapter", "compacter"])
def test_a_fresh_adapter_changes_little(method):
    change = distance(logits(with_method(method, shaken=False)), logits(new_model()))
    assert 0 < change < 0.05


def test_two_methods_together():
    model = new_model()
    sizes = dict(length=5, mid_dim=20, reduction=4)
    assert install(model, "adapter+prompt", 32, TASKS, "multiple", **sizes) == 10 + 1
    select(model, "gqa")
    one = with_method("adapter", "multiple", reduction=4)
    other = with_method("prompt", "multiple")
    assert trainable(model).keys() == trainable(one).keys() | trainable(other).keys()
    assert model.encode(*batch()[:2])[0].shape == (3, 5 + 7 + 4, 32)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("method", ["adapter", "compacter", "lowrank", "hyperformer"])
@pytest.mark.parametrize("sites, expected", [
    (None, 10), (["ffn"], 4), (["encoder"], 4), (["decoder.cross_attn"], 2),
    (["encoder.ffn", "decoder.self_attn"], 4), (["layers.1"], 5)])
def test_only_the_named_sites_are_filled(method, sites, expected):
    model = new_model()
    assert install(model, method, 32, TASKS, sites=sites, **SIZES.get(method, {})) == expected
    select(model, "vqa")
    filled = {name for name, module in model.named_modules()
              if isinstance(module, (adapters.Adapter, HyperAdapter))}
    chosen = set()
    for stack, kinds in ("encoder", ["self_attn", "ffn"]), ("decoder", adapters.SUBLAYERS):
        for layer in "01":
            for kind in kinds:
                words = [stack, "layers", layer, kind]
                if sites is None or any(set(site.split(".")) <= set(words) for site in sites):
                    chosen.add(".".join([*words, "adapter"]))
    assert filled == chosen and distance(logits(model), logits(new_model())) > 0


def test_dropout_of_lora_is_the_models_own():
    assert type(with_method("lora").encoder.layers[0].self_attn.inner.q.update.dropout) is Dropout


def test_new_weights_follow_the_model_and_its_mode():
    model = new_model().bfloat16().train()
    install(model, "adapter+lora", 32, TASKS, "multiple")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.adapter = nn.Linear(32, 32), nn.Linear(32, 32), adapters.Site()

    def forward(self, x):
        return x + self.adapter(self.q(x) + self.v(x), x)


@pytest.mark.parametrize("method", ["adapter", "compacter", "lowrank", "lora"])
def test_a_model_of_ones_own_in_bf16_stays_so(method):
    model = Own().bfloat16()
    install(model, method, 32, ["mine"])
    assert model(torch.randn(2, 3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["adapter", "full", "lora"])
def test_what_is_frozen_can_be_cast(method):
    model = with_method(method)
    cast_frozen(model)
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, weight in model.named_parameters():
        cast = name.rpartition(".")[0] in linears | {"embed_tokens"} and not weight.requires_grad
        assert weight.dtype == (torch.bfloat16 if cast else torch.float32), name
    assert (model.embed_tokens.weight.dtype == torch.float32) == (method == "full")


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method, sharing", PER_TASK)
def test_forgetting_to_select_is_an_error(method, sharing):
    model = new_model()
    install(model, method, 32, TASKS, sharing, **SIZES.get(method, {}))
    with pytest.raises(AdapterError, match=r"call select\(model, task\)"):
        logits(model)


@pytest.mark.parametrize("arguments, message", [
    (dict(method="adaptor"), "unknown method: 'adaptor'; known are full, adapter, hyperformer"),
    (dict(method="adapter+promt"), "unknown method: 'promt'; known are full"),
    (dict(sharing="some"),
     "unknown sharing of adapter: 'some'; known are single, half, multiple"),
    (dict(method="lora", sharing="half"),
     "unknown sharing of lora: 'half'; known are single, multiple"),
    (dict(backbone="gpt2"), "unknown backbone: 'gpt2'; known are bart, t5"),
    (dict(reducton=4), "unknown size of adapter: 'reducton'; known are reduction"),
    (dict(method="bitfit", rank=4), "unknown size of bitfit: 'rank'; known are none"),
    (dict(trains=["nroms"]), "unknown part to train: 'nroms'; known are all, new, norms, biases"),
    (dict(sites=["ffn", "fnn"]),
     "unknown site: 'fnn' is nowhere among the sites: encoder, layers, 0"),
    (dict(method="lora", targets=["query"]), "no module of the model has a part called 'query'"),
    (dict(method="lora", targets=["norm"]),
     "LoRA's target encoder.layers.0.self_attn.norm is a LayerNorm, expected nn.Linear"),
    (dict(method="compacter", n=3), "n = 3 must divide both 32 and 4"),
    (dict(reduction=33), "a reduction of 33 leaves nothing of a d_model of 32"),
    (dict(reduction=0), "the size reduction is 0, expected one like 8"),
    (dict(reduction="8"), "the size reduction is '8', expected one like 8"),
    (dict(method="compacter", rank=-1), "the size rank is -1, expected one like 1"),
    (dict(method="compacter", shared_phm_rule=1), "the size shared_phm_rule is 1, expected one"),
    (dict(method="lora", dropout=1.5), "the size dropout is 1.5, expected one like 0.1"),
    (dict(method="lora", alpha=float("nan")), "the size alpha is nan, expected one like 32"),
    (dict(method="lora", targets="qv"), "the size targets is 'qv', expected one like ('q', 'v')"),
    (dict(method="lora", targets=[]), "the size targets is [], expected one like"),
    (dict(method="lora", targets=[["q"]]), "the size targets is [['q']], expected one like"),
    (dict(method="lora", rank=-1), "the size rank is -1, expected one like 128"),
    (dict(method="lora", rank=10 ** 9), "the size rank is 1000000000, expected one like 128"),
    (dict(method="prompt", length=0), "the size length is 0, expected one like 40"),
    (dict(method="prompt", mid_dim=10 ** 9), "the size mid_dim is 1000000000, expected one"),
    (dict(method="compacter", n=4096, shared_phm_rule=True), "n = 4096 must divide both 32 and 4"),
    (dict(reduction=8.0), "the size reduction is 8.0, expected one like 8"),
    (dict(method="adapter+adapter"), "the method adapter+adapter has one twice"),
    (dict(method="full+full"), "the method full+full has one twice"),
    (dict(sites=[]), "sites are an empty list, expected words of their names"),
], ids=lambda x: "" if isinstance(x, str) else "-".join(x))
def test_a_mistake_is_one_sentence_that_says_what_was_expected(arguments, message):
    with pytest.raises(AdapterError) as error:
        install(new_model(), **dict(method="adapter", d_model=32, tasks=TASKS) | arguments)
    assert message in str(error.value)


def test_an_unknown_task_is_an_error_that_lists_the_known_ones():
    with pytest.raises(AdapterError, match="unknown task: 'okvqa'; known are vqa, gqa, nlvr, cap"):
        select(with_method("adapter", "multiple"), "okvqa")


@pytest.mark.parametrize("method", ["adapter", "hyperformer", "compacter", "lowrank", "prompt",
                                    "lora"])
def test_a_model_without_sites_is_an_error(method):
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(AdapterError, match="no module of the model has a part called"):
        install(model, method, 32, TASKS)
    assert all(weight.requires_grad for weight in model.parameters())  # as it was


def test_a_prompt_without_an_encoder_is_an_error():
    model = nn.ModuleDict({"decoder": nn.ModuleDict({"prompt": nn.Identity()})})
    model["head"] = nn.Linear(32, 32)
    with pytest.raises(AdapterError, match="only decoders have a part called 'prompt'"):
        install(model, "prompt", 32, TASKS)
    assert type(model["decoder"]["prompt"]) is nn.Identity
    assert all(weight.requires_grad for weight in model.parameters())  # as it was


@pytest.mark.parametrize("method", ["adapter", "hyperformer", "compacter", "lowrank", "prompt",
                                    "lora"])
def test_no_site_is_filled_twice(method):
    model = with_method(method)
    names = set(model.state_dict())
    with pytest.raises(AdapterError, match="is filled already"):
        install(model, method, 32, TASKS)
    assert set(model.state_dict()) == names


# ---- tasks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, sharing", PER_TASK)
def test_a_task_trains_only_its_own_copy(method, sharing):
    model = with_method(method, sharing)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01, weight_decay=0.1)
    before = {name: weight.clone() for name, weight in trainable(model).items()}
    others = {name for name in before if ".copies." in name and ".copies.nlvr" not in name}
    select(model, "nlvr")
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(*batch()).backward()
        assert {name for name in before if trainable(model)[name].grad is None} == others
        optimizer.step()
    moved = {name for name, weight in trainable(model).items()
             if not torch.equal(weight, before[name])}
    assert moved == before.keys() - others and any(".copies." in name for name in moved)


@pytest.mark.parametrize("method, sharing", PER_TASK)
def test_tasks_answer_differently_and_come_back(method, sharing):
    model = with_method(method, sharing)
    answers = {}
    for task in TASKS * 2:
        select(model, task)
        assert torch.equal(answers.setdefault(task, logits(model)), logits(model))
    assert all(distance(answers[task], answers["vqa"]) > 1e-3 for task in TASKS[1:])


# task, the shape of its batch, pictures a question
ROUND = [("vqa", (3, 9, 5), 1), ("gqa", (5, 6, 3), 1), ("nlvr", (2, 9, 5), 2),
         ("caption", (4, 5, 8), 1)]


def round_batch(shape, pictures: int, base=TINY) -> tuple:
    """What `VLModel.loss` takes, with padding and the indices of what is none."""
    ids, features, labels, weights = batch(*shape)
    ids[1:, -2:] = base.pad
    labels[1:, -1] = -100
    text_indices = (ids != base.pad).flatten().nonzero()[:, 0]
    label_indices = (labels != -100).flatten().nonzero()[:, 0]
    features = features.repeat(1, pictures, 1, 1)
    return ids, features, labels, weights, text_indices, label_indices


def graphs(method, sharing, modes, encoder_layers, base=TINY) -> list[int]:
    """How many graphs of the loss were compiled after each round, one batch of every task."""
    torch._dynamo.reset()
    model = new_model(base, encoder_layers=encoder_layers, decoder_layers=1, dropout=0.1)
    install(model, method, 32, TASKS, sharing, **SIZES.get(method, {}))
    counter = CompileCounter()
    loss = torch.compile(model.loss, backend=counter, dynamic=False)
    after = []
    for mode in modes:
        model.train(mode == "train")
        for task, shape, pictures in ROUND:
            select(model, task)
            inputs = round_batch(shape, pictures, base)
            for indices in inputs[-2:]:  # as train.py does
                torch._dynamo.mark_dynamic(indices, 0)
            with torch.set_grad_enabled(model.training):
                value = loss(*inputs)
            if model.training:
                value.backward()
        after.append(counter.frame_count)
    return after


def test_switching_tasks_does_not_recompile():
    """One graph a task."""
    assert graphs("adapter", "multiple", ["train"] * 3, encoder_layers=1) == [4, 4, 4]


@pytest.mark.parametrize("method, sharing", [
    ("compacter", "multiple"), ("lora", "multiple"), ("prompt", "multiple"),
    ("hyperformer", "single")])
def test_nor_does_it_with_other_methods(method, sharing):
    # A layer is as good as many.
    assert graphs(method, sharing, ["train"] * 3, encoder_layers=0) == [4, 4, 4]


def test_nor_does_it_on_t5():
    assert graphs("adapter", "multiple", ["train"] * 2, encoder_layers=1, base=TINY_T5) == [4, 4]


@pytest.mark.parametrize("method, sharing, recompute", [
    ("adapter", "multiple", True), ("compacter", "single", False), ("lora", "single", False)])
def test_compiled_losses_and_gradients_are_those_of_eager(method, sharing, recompute):
    """To 1e-5 of the largest; aot_eager has traced the graphs of backward, too."""
    torch._dynamo.reset()
    # The encoder and pairs of pictures are the same for all methods: the adapter's run has both.
    whole = method == "adapter"
    base = dataclasses.replace(TINY, encoder_layers=1 if whole else 0, decoder_layers=1)
    model = with_method(method, sharing, base=base)
    model.train(recompute)                                            # but LoRA has dropout
    model.encoder.recompute = model.decoder.recompute = recompute
    compiled = torch.compile(model.loss, backend="aot_eager")
    for task, shape, pictures in ROUND:
        if pictures == 2 and not whole:
            continue
        select(model, task)
        inputs = round_batch(shape, pictures)
        found = []
        for loss in model.loss, compiled:
            model.zero_grad()
            value = loss(*inputs)
            value.backward()
            grads = [p.grad for p in trainable(model).values() if p.grad is not None]
            found.append([value.detach(), *grads])
        assert len(found[0]) == len(found[1]) > 5
        assert all(distance(theirs, ours) < 1e-5 for ours, theirs in zip(*found) if ours.any())


# ---- formulas -----------------------------------------------------------------------------------


@torch.no_grad()
def test_an_adapter_is_a_bottleneck_with_a_residual_sum():
    hidden = torch.randn(2, 3, 32)
    site = with_method("adapter").encoder.layers[0].ffn.adapter
    a = hidden @ site.down.weight.T + site.down.bias
    gelu = 0.5 * a * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (a + 0.044715 * a ** 3)))
    expected = hidden + gelu @ site.up.weight.T + site.up.bias
    assert a.size(-1) == 4 and distance(site(hidden, None), expected) < 1e-5


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_a_compacter_is_a_sum_of_kronecker_products(rank, shared):
    rule = Shared(torch.randn(4, 4, 4).double()) if shared else None
    layer = KroneckerLinear(12, 8, n=4, rank=rank, shared_phm_rule=rule).double()
    nn.init.normal_(layer.bias)
    if rank is None:
        weights = layer.W
    else:
        weights = [left @ right for left, right in zip(layer.W_left, layer.W_right)]
    rules = (rule if shared else layer.phm_rule).value
    H = sum(torch.kron(r, w) for r, w in zip(rules, weights))
    x = torch.randn(5, 12).double()
    assert H.shape == (12, 8) and distance(layer(x), x @ H + layer.bias) < 1e-12


def test_a_shared_rule_is_one_for_the_model():
    own = with_method("compacter")
    shared = with_method("compacter", shared_phm_rule=True)
    assert [name for name in shared.state_dict() if "rule" in name] == ["phm_rule.value"]
    assert sum("phm_rule" in name for name in own.state_dict()) == 20
    layers = [m for m in shared.modules() if isinstance(m, KroneckerLinear)]
    assert len({id(layer.phm_rule) for layer in layers}) == 1
    shared.loss(*batch()).backward()
    assert shared.phm_rule.value.grad.abs().sum() > 0


@torch.no_grad()
def test_a_low_rank_linear_is_a_product_of_two_matrices():
    layer = LowRankLinear(6, 4, rank=2).double()
    nn.init.normal_(layer.bias)
    H = sum(torch.outer(layer.left[:, i], layer.right[i]) for i in range(2))
    x = torch.randn(5, 6).double()
    assert distance(layer(x), x @ H + layer.bias) < 1e-12


@pytest.mark.parametrize("efficient", [False, True])
@torch.no_grad()
def test_a_hypernetwork_writes_the_adapter_of_each_site(efficient):
    """e = LN(W2 relu(W1 [task; layer (; kind)])); the adapter's weights are Linears of e."""
    model = with_method("hyperformer", efficient=efficient).double()
    hidden = torch.randn(2, 3, 32).double()
    select(model, "nlvr")
    w = model.state_dict()
    sites = [("encoder", "ffn", 0), ("encoder", "self_attn", 1), ("decoder", "cross_attn", 0),
             ("decoder", "ffn", 1)]
    for stack, kind, layer in sites:
        net = f"hypernetworks.{stack}."
        about = [w["task_embedding.copies.nlvr.value"], w[net + "layer.weight"][layer]]
        if efficient:
            row = ["ffn", "self_attn", "cross_attn"].index(kind)
            about.append(w[net + "kind.weight"][row])
        e = w[net + "project.0.weight"] @ torch.cat(about) + w[net + "project.0.bias"]
        e = w[net + "project.2.weight"] @ e.clamp(min=0) + w[net + "project.2.bias"]
        e = (e - e.mean()) / (e.var(unbiased=False) + 1e-6).sqrt()
        e = e * w[net + "norm.weight"] + w[net + "norm.bias"]
        written = {}
        for name in "down", "down_bias", "up", "up_bias":
            writer = f"{net}write.{'any' if efficient else kind}.{name}."
            written[name] = w[writer + "weight"] @ e + w[writer + "bias"]
        inner = hidden @ written["down"].reshape(4, 32).T + written["down_bias"]
        inner = F.gelu(inner, approximate="tanh")
        expected = hidden + inner @ written["up"].reshape(32, 4).T + written["up_bias"]
        site = getattr(getattr(model, stack).layers[layer], kind).adapter
        assert distance(site(hidden, None), expected) < 1e-12, (stack, kind, layer)


@torch.no_grad()
def test_a_prompt_stands_before_the_words():
    model = with_method("prompt")
    prompt = model.encoder.prompt
    inner = torch.tanh(prompt.table @ prompt.down.weight.T + prompt.down.bias)
    vectors = inner @ prompt.up.weight.T + prompt.up.bias
    words = model.embed_tokens(batch()[0]) + model.encoder.positions.weight[2:9]
    seen = prompt(words)
    assert seen.shape == (3, 5 + 7, 32) and torch.equal(seen[:, 5:], words)
    assert distance(seen[:, :5], vectors.expand(3, 5, 32)) < 1e-5


@torch.no_grad()
def test_a_lora_is_a_low_rank_update_of_q_and_v():
    attention = with_method("lora").decoder.layers[1].cross_attn.inner
    x = torch.randn(2, 3, 32)
    for linear in (attention.q, attention.v):
        W = linear.weight + 32 / 4 * linear.update.B @ linear.update.A
        assert distance(linear(x), x @ W.T + linear.bias) < 1e-5
    assert type(attention.k) is type(attention.out) is nn.Linear


@BOTH
def test_a_site_is_shown_the_input_of_its_sublayer(base):
    """A parallel adapter, put in by hand: hidden + up(relu(down(x))); x is not yet normed."""
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(32, 4)
            self.up = nn.Linear(4, 32)

        def forward(self, hidden, x):
            return hidden + self.up(F.relu(self.down(x)))

    model = new_model(base)
    x = torch.randn(2, 3, 32)
    step = model.decoder.layers[1].ffn
    step.adapter = parallel = Parallel()
    inner = step.inner(step.norm(x)) if base.prenorm else step.inner(x)
    a = (x @ parallel.down.weight.T + parallel.down.bias).clamp(min=0)
    expected = x + inner + a @ parallel.up.weight.T + parallel.up.bias
    if not base.prenorm:
        expected = F.layer_norm(expected, (32,), step.norm.weight, step.norm.bias)
    assert distance(step(x).detach(), expected.detach()) < 1e-5
    assert distance(logits(model), logits(new_model(base))) > 1e-3


# ---- merging ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("sharing", ["single", "multiple"])
def test_a_merged_lora_is_plain_linears_that_say_the_same(sharing, base):
    model = with_method("lora", sharing, base=base)
    select(model, "gqa")
    before = logits(model)
    merge(model)
    assert distance(logits(model), before) < 1e-6
    assert not any(isinstance(module, (LoRALinear, adapters.LowRankUpdate, adapters.PerTask))
                   for module in model.modules())
    plain = new_model(base)
    assert [(n, w.shape) for n, w in model.state_dict().items()] == [
        (n, w.shape) for n, w in plain.state_dict().items()]
    q = model.encoder.layers[0].self_attn.inner.q
    assert type(q) is nn.Linear and not q.weight.requires_grad and q.weight.is_leaf
    plain.load_state_dict(model.state_dict())                         # nothing is left elsewhere
    assert torch.equal(logits(plain), logits(model))
    merge(model)                                                      # nothing to do
    assert torch.equal(logits(plain), logits(model))


def test_merging_keeps_the_precision_of_the_frozen_weights():
    model = with_method("lora")
    cast_frozen(model)
    merge(model)
    assert model.encoder.layers[0].self_attn.inner.q.weight.dtype == torch.bfloat16


def test_merging_before_selecting_is_an_error():
    model = new_model()
    install(model, "lora", 32, TASKS, "multiple", rank=4)
    with pytest.raises(AdapterError, match="call select"):
        merge(model)


# ---- files --------------------------------------------------------------------------------------


EXTENDED = dataclasses.replace(TINY, loaded_vocab=50)                 # the last ten rows are new


def test_a_file_holds_what_trains_and_what_is_new(tmp_path):
    model = with_method("adapter", base=EXTENDED)
    save(model, tmp_path / "a.pt", step=3, best=0.5)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert state.keys() == {"weights", "step", "best"}
    rows = state["weights"].pop("embed_tokens.weight[-10:]")
    assert torch.equal(rows, model.embed_tokens.weight[-10:])
    assert state["weights"].keys() == trainable(model).keys()
    # Ten rows, not the table behind them.
    bytes_saved = sum(w.numel() for w in state["weights"].values()) * 4 + rows.numel() * 4
    assert (tmp_path / "a.pt").stat().st_size < 1.5 * bytes_saved + 400 * len(state["weights"])
    assert rows.untyped_storage().nbytes() == rows.numel() * 4

    other = with_method("adapter", base=EXTENDED)
    shake(other)
    before = other.embed_tokens.weight.detach().clone()
    assert load(other, tmp_path / "a.pt") == {"step": 3, "best": 0.5}
    assert torch.equal(other.embed_tokens.weight[-10:], rows)
    assert torch.equal(other.embed_tokens.weight[:-10], before[:-10])


def test_a_table_that_trains_is_saved_once(tmp_path):
    save(with_method("full", base=EXTENDED), tmp_path / "a.pt")
    weights = torch.load(tmp_path / "a.pt", weights_only=True)["weights"]
    assert [name for name in weights if "embed_tokens" in name] == ["embed_tokens.weight"]


def drop(weights):
    del weights["visual.box.bias"]


def rename(weights):
    weights["visual.bax.bias"] = torch.zeros(32)


def reshape(weights):
    weights["visual.box.bias"] = torch.zeros(1, 32)


def count(weights):
    weights["visual.box.bias"] = torch.zeros(32, dtype=torch.int64)


def divide(weights):
    weights["visual.box.bias"] = torch.zeros(32) / 0


def overflow(weights):
    weights["visual.box.bias"] = torch.full((32,), 1e300, dtype=torch.float64)


def sparsify(weights):
    weights["visual.box.bias"] = torch.ones(32).to_sparse()


def name(weights):
    weights["visual.box.bias"] = "zeros"


def forget_rows(weights):
    del weights["embed_tokens.weight[-10:]"]


@pytest.mark.parametrize("spoil, message", [
    (drop, "the weight 'visual.box.bias' is missing"),
    (forget_rows, "the weight 'embed_tokens.weight[-10:]' is missing"),
    (rename, "the weight 'visual.bax.bias' is not one this model would save"),
    (reshape, "the weight 'visual.box.bias' has the shape [1, 32], expected [32]"),
    (count, "the weight 'visual.box.bias' is not a tensor of floating-point numbers"),
    (name, "the weight 'visual.box.bias' is not a tensor of floating-point numbers"),
    (sparsify, "the weight 'visual.box.bias' is not a tensor of floating-point numbers"),
    (divide, "the weight 'visual.box.bias' has numbers that are not finite"),
    (overflow, "the weight 'visual.box.bias' has numbers that are not finite"),
])
def test_a_file_that_does_not_fit_changes_nothing(spoil, message, tmp_path):
    path = tmp_path / "a.pt"
    save(with_method("adapter", base=EXTENDED), path)
    state = torch.load(path)
    spoil(state["weights"])
    torch.save(state, path)
    model = with_method("adapter", base=EXTENDED)
    shake(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError) as error:
        load(model, path)
    assert str(path) in str(error.value) and message in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_no_file_of_weights_is_told_and_not_run(tmp_path):
    model = with_method("adapter")
    contents = {
        "text.pt": b"no weights",
        "empty.pt": b"",
        "hostile.pt": pickle.dumps({"weights": Hostile(tmp_path / "run")}),
    }
    for file_name, content in contents.items():
        (tmp_path / file_name).write_bytes(content)
    torch.save({"weights": Hostile(tmp_path / "run")}, tmp_path / "zip.pt")
    save(model, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    for file_name in [*contents, "zip.pt", "half.pt"]:
        with pytest.raises(AdapterError, match=f"{file_name} is truncated or not a file of weight"):
            load(model, tmp_path / file_name)
    assert not (tmp_path / "run").exists()
    for other in [1, 2], {"step": 1}, {"weights": [1]}:
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(AdapterError, match="other.pt is not a file of weights: it has no entr"):
            load(model, tmp_path / "other.pt")
    with pytest.raises(AdapterError, match="nowhere.pt is missing"):
        load(model, tmp_path / "nowhere.pt")
    (tmp_path / "lfs.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "page.pt").write_bytes(b"\n<!DOCTYPE html><html>")
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10 ** 7))
    for file_name, said in [
            ("lfs.pt", "a Git LFS pointer"), ("page.pt", "a web page"), ("folder.pt", "truncated"),
            ("pipe.pt", "truncated or not a file"), ("bomb.pt", "truncated or not a file")]:
        with pytest.raises(AdapterError) as error:
            load(model, tmp_path / file_name)
        assert f"{file_name} is {said}" in str(error.value)
        assert "weights_only" not in str(error.value), "no advice to load it unsafely"


def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = with_method("adapter")
    save(model, tmp_path / "a.pt", step=1)
    whole = (tmp_path / "a.pt").read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(AdapterError, match="a.pt cannot be written: .*No space left"):
        save(model, tmp_path / "a.pt", step=2)
    monkeypatch.undo()
    assert (tmp_path / "a.pt").read_bytes() == whole
    with pytest.raises(AdapterError, match="a.pt cannot be written: .*No such file"):
        save(model, tmp_path / "nowhere" / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


# ---- other people's models ----------------------------------------------------------------------


# Both scripts run with nothing of ours but adapters.py. A case: method, sizes, its number of sites.
COMMON = """
import sys, torch
from torch import nn
import adapters
from adapters import AdapterError, install, load, merge, offer_sites, save, select, trainable

def check(new_model, outputs, method, sizes, sharing, expected, offered):
    '''Installs, trains a step, saves, and loads into a model that was built anew.'''
    def prepared():
        model = new_model()
        if offered:
            assert offer_sites(model, *offered) == expected, offered
        filled = install(model, method, 16, ["cats", "dogs"], sharing, **sizes)
        assert filled == expected, (method, filled)
        return model
    plain = dict(new_model().named_parameters())
    model = prepared()
    select(model, "dogs")
    trained = trainable(model)
    new = {name for name, _ in model.named_parameters() if name not in plain}
    kinds = (nn.Linear, nn.LayerNorm) if method == "lora" else nn.LayerNorm
    parts = ["bias"] if method == "lora" else ["weight", "bias"]
    besides = {f"{name}.{part}" for name, module in model.named_modules()
               for part in parts if isinstance(module, kinds)} & plain.keys()
    assert trained.keys() == new | besides, trained.keys() ^ (new | besides)
    optimizer = torch.optim.SGD(trained.values(), lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        outputs(model).square().mean().backward()
        optimizer.step()
    with_grad = {name for name, weight in model.named_parameters() if weight.grad is not None}
    unused = {name for name in trained if ".copies.cats." in name}
    assert with_grad == trained.keys() - unused, (with_grad ^ (trained.keys() - unused))
    for name, weight in model.named_parameters():
        if name not in trained:
            assert torch.equal(weight, plain[name]), name
    save(model, "a.pt")
    fresh = prepared()
    select(fresh, "dogs")
    with torch.no_grad():
        assert not torch.equal(outputs(fresh), outputs(model))
        assert load(fresh, "a.pt") == {}
        assert torch.equal(outputs(fresh), outputs(model))
    return model

def refused(sentence, action):
    try:
        action()
    except AdapterError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError("no error")

SITED = [("adapter", dict(reduction=4)), ("compacter", dict(reduction=4)),
         ("compacter", dict(reduction=4, shared_phm_rule=True, rank=1)),
         ("lowrank", dict(reduction=4)),
         ("hyperformer", dict(reduction=4, task_dim=8, hidden_dim=8)),
         ("hyperformer", dict(reduction=4, task_dim=8, hidden_dim=8, efficient=True))]
"""

BART = COMMON + """
from transformers import BartConfig, BartForConditionalGeneration

def new_model():
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0,
        max_position_embeddings=30)).eval()

ids = torch.arange(4, 16).view(2, 6)

def outputs(model):
    return model(input_ids=ids, labels=ids).logits

OFFERED = ("out_proj", "fc2")
for method, sizes in SITED:
    for sharing in adapters.METHODS[method].sharings:
        model = check(new_model, outputs, method, sizes, sharing, 10, OFFERED)
        words = model.generate(ids, max_length=9, num_beams=2, do_sample=False)
        assert words.shape[0] == 2 and 1 < words.shape[1] <= 9

lora = dict(rank=2, targets=("q_proj", "v_proj"), dropout=0.0)
for sharing in "single", "multiple":
    model = check(new_model, outputs, "lora", lora, sharing, 12, ())
    before, words = outputs(model), model.generate(ids, max_length=9)
    refused("is filled already", lambda: install(model, "lora", 16, ["cats"], **lora))
    merge(model)
    assert (outputs(model) - before).abs().max() < 1e-6 * before.abs().max()
    assert torch.equal(model.generate(ids, max_length=9), words)
    assert {type(m) for n, m in model.named_modules() if "q_proj" in n} == {nn.Linear}
    assert not any("update" in name or "copies" in name for name in model.state_dict())
    new_model().load_state_dict(model.state_dict())

refused("no module of the model has a part called 'prompt'",
        lambda: install(new_model(), "prompt", 16, ["cats"]))
refused("no module of the model has a part called 'adapter'",
        lambda: install(new_model(), "adapter", 16, ["cats"]))
refused("no nn.Linear of the model is called 'fc3'", lambda: offer_sites(new_model(), "fc3"))
model = new_model()
assert (offer_sites(model, "fc2"), offer_sites(model, "out_proj")) == (4, 6)
assert list(model.state_dict()) == list(new_model().state_dict())
assert torch.equal(outputs(model), outputs(new_model()))

model = new_model().bfloat16()
offer_sites(model, *OFFERED)
install(model, "adapter+lora", 16, ["cats"], "multiple", reduction=4, **lora)
select(model, "cats")
assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
assert outputs(model).dtype == torch.bfloat16
outputs(model).float().square().mean().backward()
print("done")
"""

VIT = COMMON + """
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(16), Attention(), nn.LayerNorm(16)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Linear(16, 16)             # open_clip calls its whole tower so
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, pictures):
        x = self.patch_embed.proj(pictures).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(self.visual(x))).mean(1))

def new_model():
    torch.manual_seed(0)
    return ViT().eval()

pictures = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

def outputs(model):
    return model(pictures.to(model.head.weight.dtype))

for method, sizes in SITED:
    for sharing in adapters.METHODS[method].sharings:
        model = check(new_model, outputs, method, sizes, sharing, 6, ("proj", "fc2"))
        assert not any(weight.requires_grad for weight in model.visual.parameters())

lora = dict(rank=2, targets=["qkv"], dropout=0.0)
model = check(new_model, outputs, "lora", lora, "multiple", 3, ())
assert not model.visual.weight.requires_grad and not model.blocks[0].attn.qkv.weight.requires_grad
before = outputs(model)
merge(model)
assert (outputs(model) - before).abs().max() < 1e-6 * before.abs().max()
refused("LoRA's target patch_embed.proj is a Conv2d",
        lambda: install(new_model(), "lora", 16, ["cats"], targets=["proj"]))
model = new_model().bfloat16()
offer_sites(model, "proj", "fc2")
install(model, "compacter", 16, ["cats"], reduction=4)
assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
assert outputs(model).dtype == torch.bfloat16
print("done")
"""


@pytest.mark.parametrize("script, needs", [(BART, "transformers"), (VIT, "torch")],
                         ids=["bart", "vit"])
def test_a_copy_of_the_file_alone_adapts_other_peoples_models(script, needs, tmp_path):
    pytest.importorskip(needs)
    shutil.copy(adapters.__file__, tmp_path)
    (tmp_path / "mine.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


class Mixer(nn.Module):
    """A sub-layer with a site of its own."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(16, 16)
        self.value = nn.Linear(16, 16)
        self.adapter = adapters.Site()

    def forward(self, x):
        return x + self.adapter(torch.softmax(self.query(x), -1) * self.value(x), x)


@pytest.mark.parametrize("method, sizes", [
    ("adapter", {}), ("compacter", {}), ("lora", dict(targets=("query",), rank=2))],
    ids=["adapter", "compacter", "lora"])
def test_six_lines_adapt_a_model_of_your_own(method, sizes, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Mixer(), Mixer(), nn.ModuleDict({"block": Mixer()})["block"])
    x = torch.randn(4, 5, 16)
    assert install(model, method, 16, ["cats", "dogs"], "multiple", trains=[], **sizes) == 3
    select(model, "cats")
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    save(model, tmp_path / "adapter.pt")
    saved = torch.load(tmp_path / "adapter.pt")["weights"]
    assert losses[-1] < losses[0] and all(".copies." in name for name in saved)
