"""Our model is transformers' BART or T5 where there are no pictures; its search and its files."""

import collections
import contextlib
import copyreg
import dataclasses
import doctest
import functools
import importlib
import itertools
import json
import os
import pathlib
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import (BartConfig, BartForConditionalGeneration, T5Config,
                          T5ForConditionalGeneration)

import model as module
from model import (CLIPResNet, Config, Dropout, VLModel, WeightsError, load_backbone, load_clip,
                   read_json, read_weights, t5)

VOCAB, PAD, END = 60, 1, 2
SIZES = dict(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2,
             encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
             decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.5)
TINY = Config(vocab_size=VOCAB, d_model=32, heads=4, d_ff=64, encoder_layers=2, decoder_layers=2,
              max_positions=64, feature_dim=8, dropout=0.0, decoder_start=END, pad=PAD, eos=END)
TINY_T5 = t5(dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                  relative_attention_num_buckets=32, dropout_rate=0.0), feature_dim=8)


def their_bart(**sizes) -> BartForConditionalGeneration:
    """Random weights, large enough that answers vary, and an end token that comes now and then."""
    torch.manual_seed(0)
    theirs = BartForConditionalGeneration(BartConfig(**SIZES | sizes)).eval()
    shake(theirs)
    theirs.final_logits_bias[0, END] = 4.0
    return theirs


def shake(model):
    """Moves biases and norms away from 0 and 1, so that no two are alike."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)


def save(theirs, folder, safe=True):
    theirs.save_pretrained(folder, safe_serialization=safe)
    return folder


def our_bart(folder) -> VLModel:
    ours = load_backbone(folder, feature_dim=8, vocab_size=VOCAB + 200).eval()
    ours.logits_bias[VOCAB:] = -1e9  # the added words are ours alone: never say them
    return ours


def questions(batch=50, longest=9, pad=PAD):
    """Random ids [batch, longest], padded right to their own lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (batch, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (batch, 1), generator=generator)
    return ids.masked_fill(torch.arange(longest) >= lengths, pad)


def our_model(seed=0, base=TINY, **changes) -> VLModel:
    """A model with random weights, large enough that everything matters."""
    torch.manual_seed(seed)
    model = VLModel(dataclasses.replace(base, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    shake(model)
    return model


@torch.no_grad()
def distance(ours, theirs) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit", "ignore:enable_nested_tensor", "ignore:Detected pickle protocol")


# ---- transformers' BART --------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_the_logits_are_those_of_transformers(tmp_path, safe):
    theirs, ids, labels = their_bart(), questions(), questions(longest=5)
    ours = our_bart(save(theirs, tmp_path, safe))
    assert (tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")).exists()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).logits
        assert distance(ours(ids, None, labels)[..., :VOCAB], expected) < 1e-5


def test_added_words_are_new_rows_behind_the_vocabulary(tmp_path):
    theirs = their_bart()
    ours = load_backbone(save(theirs, tmp_path), feature_dim=8, vocab_size=VOCAB + 200)
    assert ours.embed_tokens.weight.shape == (VOCAB + 200, 32)
    assert torch.equal(ours.embed_tokens.weight[:VOCAB], theirs.model.shared.weight)
    assert 0.015 < ours.embed_tokens.weight[VOCAB:].std() < 0.025
    assert not ours.logits_bias[VOCAB:].any() and ours.new_rows == {"embed_tokens.weight": 200}


@pytest.mark.parametrize("ngram", [0, 3])
@pytest.mark.parametrize("beams", [1, 5])
def test_the_words_are_those_of_transformers(tmp_path, beams, ngram):
    theirs, ids = their_bart(), questions()
    ours = our_bart(save(theirs, tmp_path))
    ours.config = dataclasses.replace(ours.config, no_repeat_ngram=ngram, early_stopping=True)
    said = theirs.generate(
        ids, attention_mask=(ids != PAD).long(), num_beams=beams, no_repeat_ngram_size=ngram,
        max_length=20, early_stopping=beams > 1, do_sample=False)
    lengths = (said != PAD).sum(1)
    # A varied exam:
    assert len(said.unique(dim=0)) > 20 and len(lengths.unique()) > 3 and lengths.max() == 20
    assert ours.answer(ids, beams=beams).tolist() == said.tolist()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("wish", [
    dict(no_repeat_ngram_size=2), dict(forced_bos_token_id=7), dict(length_penalty=3.0),
    dict(early_stopping=True)], ids=lambda wish: next(iter(wish)))
def test_wishes_of_the_backbone_are_honoured(tmp_path, wish, file):
    theirs, ids = their_bart(), questions()
    save(theirs, tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    ask = dict(attention_mask=(ids != PAD).long(), num_beams=5, max_length=20, do_sample=False)
    without = {} if "early_stopping" in wish else dict(early_stopping=True)
    wish = dict(early_stopping=True) | wish  # without it later transformers go on longer
    said = theirs.generate(ids, **ask, **wish)
    assert said.tolist() != theirs.generate(ids, **ask, **without).tolist()
    asked = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(asked | wish))
    assert our_bart(tmp_path).answer(ids, beams=5).tolist() == said.tolist()


# ---- transformers' T5 ----------------------------------------------------------------------------

T5_SIZES = dict(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2,
                num_heads=4)  # 4 x 16 > 32
T5_PAD, T5_END = 0, 1


def their_t5(std=0.2, **sizes) -> T5ForConditionalGeneration:
    """Random weights: 0.5 for varied answers, less for logits: unscaled scores magnify rounding."""
    torch.manual_seed(1)
    config = T5Config(**T5_SIZES | dict(decoder_start_token_id=T5_PAD) | sizes)
    theirs = T5ForConditionalGeneration(config).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.0 if "shared" in name or "relative" in name else std)
    shake(theirs)
    return theirs


def our_t5(folder) -> VLModel:
    ours = load_backbone(folder, feature_dim=8, vocab_size=VOCAB + 72).eval()
    ours.logits_bias[VOCAB:] = -1e9
    return ours


# In Google's .bin files, without a use.
OLD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.mark.parametrize("longest", [9, 200], ids=["short", "beyond the last bucket"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_the_logits_are_those_of_transformers_t5(tmp_path, safe, longest):
    theirs = their_t5(num_decoder_layers=3)
    save(theirs, tmp_path, safe)
    if not safe:
        torch.save(theirs.state_dict() | {OLD: torch.randn(32, 4)}, tmp_path / "pytorch_model.bin")
    ids, labels = questions(10, longest, T5_PAD), questions(10, 5, T5_PAD)
    with torch.no_grad():
        mask = (ids != T5_PAD).long()
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).logits
        assert distance(our_t5(tmp_path)(ids, None, labels)[..., :VOCAB], expected) < 1e-5


@pytest.mark.parametrize("ngram", [0, 3])
@pytest.mark.parametrize("beams", [1, 5])
def test_the_words_are_those_of_transformers_t5(tmp_path, beams, ngram):
    """In beam search the end is forced: later transformers score what is cut off differently."""
    theirs, ids, end = their_t5(std=0.5), questions(pad=T5_PAD), T5_END if beams > 1 else None
    ours = our_t5(save(theirs, tmp_path))
    ours.config = dataclasses.replace(ours.config, no_repeat_ngram=ngram, early_stopping=True,
                                      forced_eos=end)
    said = theirs.generate(
        ids, attention_mask=(ids != T5_PAD).long(), num_beams=beams, no_repeat_ngram_size=ngram,
        max_length=20, early_stopping=beams > 1, do_sample=False, forced_eos_token_id=end)
    ended = (said == T5_END).cumsum(1) - (said == T5_END).long() > 0
    said = said.masked_fill(ended, T5_PAD)  # their beam search pads with the end where pad is 0
    lengths = (said != T5_PAD).sum(1)
    assert len(said.unique(dim=0)) > 20 and len(lengths.unique()) > 3 and said[:, -1].any()
    assert ours.answer(ids, beams=beams).tolist() == said.tolist()


def test_more_words_than_the_vocabulary_are_new_rows_behind_it(tmp_path):
    theirs = their_t5()
    ours = load_backbone(save(theirs, tmp_path), feature_dim=8, vocab_size=VOCAB + 72)
    table = ours.embed_tokens.weight
    assert table.shape == (VOCAB + 72, 32) and torch.equal(table[:VOCAB], theirs.shared.weight)
    assert 0.9 < table[VOCAB:].std() < 1.1 and not ours.logits_bias.any()
    assert 0.015 < ours.visual.feature.weight.std() < 0.025 and not ours.visual.feature.bias.any()


@pytest.mark.parametrize("words", [VOCAB - 1, VOCAB + 201])
def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, words):
    save(their_t5(), tmp_path)
    message = f"vocab_size is 60, the tokenizer with its added words has {words}$"
    with pytest.raises(WeightsError, match=f"config.json: {message}"):
        load_backbone(tmp_path, feature_dim=8, vocab_size=words)


@pytest.mark.parametrize("changes, message", [
    (dict(feed_forward_proj="gated-gelu"), 'feed_forward_proj should be "relu"'),
    (dict(tie_word_embeddings=False), "tie_word_embeddings should be true"),
    (dict(d_kv=None), "d_kv should be a whole number from 1 to 1,000,000"),
    (dict(num_layers=0), "num_layers should be a whole number from 1 to 100"),
    (dict(num_layers=10 ** 9), "num_layers should be a whole number from 1 to 100"),
    (dict(relative_attention_num_buckets="32"), "relative_attention_num_buckets should be a whole"),
    (dict(relative_attention_num_buckets=2), "relative_attention_num_buckets should be a whole"),
    (dict(relative_attention_max_distance=16), "relative_attention_max_distance should be"),
    (dict(layer_norm_epsilon=0), "layer_norm_epsilon should be a number from 1e-15 to 0.1"),
    (dict(dropout_rate=1), "dropout_rate should be a number from 0.0 to 0.99"),
    (dict(forced_eos_token_id=60), "forced_eos_token_id should be a whole number from 0 to 59"),
], ids=str)
def test_a_t5_that_is_not_built_here_is_refused(tmp_path, changes, message):
    save(their_t5(), tmp_path)
    asked = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(asked | changes))
    said = refused(tmp_path)
    assert message in said and str(tmp_path / "config.json") in said


def test_an_old_config_of_t5_says_less(tmp_path):
    theirs = their_t5()
    save(theirs, tmp_path)
    old = {name: size for name, size in T5_SIZES.items() if name != "num_decoder_layers"}
    old |= dict(model_type="t5", relative_attention_num_buckets=32,
                task_specific_params=dict(summarization=dict(num_beams=4)))
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = our_t5(tmp_path).config
    assert (config.decoder_layers, config.max_distance) == (2, 128)
    assert (config.decoder_start, config.pad, config.eos, config.forced_eos) == (0, 0, 1, None)


@pytest.mark.parametrize("name", [
    "encoder.final_layer_norm.weight", "decoder.block.1.layer.1.EncDecAttention.v.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"])
def test_a_missing_weight_of_t5_is_named(tmp_path, name):
    theirs = their_t5()
    save(theirs, tmp_path, safe=False)
    weights = theirs.state_dict()
    del weights[name]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert refused(tmp_path).endswith(f"does not fit its config.json: no {name}")


ALONE = """
import sys, torch
from model import load_backbone
model = load_backbone(sys.argv[1]).eval()
ids = torch.load("ids")
with torch.no_grad():
    logits = model(ids, None, ids)
words = {beams: model.answer(ids, beams=beams) for beams in (1, 5)}
torch.save((logits, words, sorted(sys.modules)), "answers")
"""


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_file_alone_is_transformers_bart_or_t5(tmp_path, family):
    """model.py, copied into an empty folder, needs torch alone."""
    bart = family == "bart"
    theirs, pad, eos = (their_bart(), PAD, END) if bart else (their_t5(), T5_PAD, T5_END)
    ids = questions(10, pad=pad)
    config = save(theirs, tmp_path / "weights") / "config.json"
    # Without these, later transformers search on for longer, see the tests above.
    wishes = dict(early_stopping=True, forced_eos_token_id=eos)
    config.write_text(json.dumps(json.loads(config.read_text()) | wishes))
    (tmp_path / "weights" / "generation_config.json").unlink()
    shutil.copy(module.__file__, tmp_path)
    torch.save(ids, tmp_path / "ids")
    subprocess.run([sys.executable, "-c", ALONE, tmp_path / "weights"], cwd=tmp_path, check=True,
                   env=os.environ | {"PYTHONPATH": ""})
    logits, words, imported = torch.load(tmp_path / "answers", weights_only=True)
    assert not {"transformers", "adapters", "data", "safetensors"} & set(imported)

    mask = (ids != pad).long()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, labels=ids).logits
    assert logits.shape == expected.shape and distance(logits, expected) < 1e-5
    for beams, ours in words.items():
        said = theirs.generate(ids, attention_mask=mask, num_beams=beams, max_length=20,
                               early_stopping=beams > 1, forced_eos_token_id=eos, do_sample=False)
        ended = (said[:, 1:-1] == eos).cumsum(1) > 0
        said[:, 2:] = said[:, 2:].masked_fill(ended, pad)  # theirs pads T5's beams with the end
        assert len(said.unique(dim=0)) > 3 and ours.tolist() == said.tolist()


@pytest.mark.parametrize("family", [BartForConditionalGeneration, T5ForConditionalGeneration])
def test_the_miniatures_are_transformers_models_too(tiny, family):
    folder = tiny / "weights" / f"{family.config_class.model_type}-mini"
    theirs, info = family.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    ours, ids = load_backbone(folder).eval(), questions(8, pad=theirs.config.pad_token_id)
    with torch.no_grad():
        mask = (ids != theirs.config.pad_token_id).long()
        expected = theirs.eval()(input_ids=ids, attention_mask=mask, labels=ids).logits
        assert distance(ours(ids, None, ids), expected) < 1e-5


# ---- a strict load -------------------------------------------------------------------------------

FC1, TABLE = "model.encoder.layers.1.fc1.weight", "model.shared.weight"


def refused(folder) -> str:
    with pytest.raises(WeightsError) as error:
        load_backbone(folder, feature_dim=8, vocab_size=VOCAB + 200)
    return str(error.value)


@pytest.mark.parametrize("changes, message", [
    ({FC1: None}, f"no {FC1}"),
    ({"model.encoder.layers.2.fc1.weight": torch.zeros(64, 32)},
     "unknown model.encoder.layers.2.fc1.weight"),
    ({FC1: torch.zeros(64, 31)}, f"{FC1} is [64, 31], expected [64, 32]"),
    ({FC1: torch.zeros(32)}, f"{FC1} is [32], expected [64, 32]"),
    ({TABLE: torch.zeros(30, 32)}, f"{TABLE} is [30, 32], expected [60, 32]"),
    ({TABLE: torch.zeros(261, 32)}, f"{TABLE} is [261, 32], expected [60, 32]"),
    ({"lm_head.weight": torch.zeros(60, 32)}, "are not the same table"),
], ids=["missing", "extra", "shape", "dimensions", "too few words", "too many words", "two tables"])
def test_a_tensor_that_does_not_fit_is_named(tmp_path, changes, message):
    theirs = their_bart()
    save(theirs, tmp_path, safe=False)
    weights = theirs.state_dict() | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    said = refused(tmp_path)
    assert message in said and str(tmp_path / "pytorch_model.bin") in said


def test_weights_of_another_model_are_refused(tmp_path):
    save(their_bart(), tmp_path, safe=False)
    torch.save(nn.Transformer(32, 4, 2, 2, 64).state_dict(), tmp_path / "pytorch_model.bin")
    said = refused(tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in said
    assert "no model.shared.weight" in said and "more" in said


def test_weights_of_a_deeper_bart_are_refused(tmp_path):
    save(their_bart(encoder_layers=3), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "bart"}))
    said = refused(tmp_path)
    assert str(tmp_path / "model.safetensors") in said and "unknown model.encoder.layers.2." in said


def test_a_bart_saved_without_its_head_is_whole(tmp_path):
    theirs = their_bart()
    theirs.final_logits_bias.zero_()
    save(theirs.model, tmp_path)
    ours, ids = our_bart(tmp_path), questions()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=(ids != PAD).long(), labels=ids).logits
        assert distance(ours(ids, None, ids)[..., :VOCAB], expected) < 1e-5


def bart_json(**changes) -> str:
    """A config.json of the tiny BART; what is None is left out."""
    content = SIZES | {"model_type": "bart"} | changes
    return json.dumps({name: value for name, value in content.items() if value is not None})


@pytest.mark.parametrize("content, message", [
    (None, "is missing"),
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('{"d_model": ' + "9" * 5000 + "}", "is not JSON"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer"),
    ("<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    ("[]", "should be a JSON object"),
    ("{}", "model_type should be bart or t5"),
    (bart_json(model_type="gpt2"), "model_type should be bart or t5"),
    (bart_json(model_type=["bart"]), "model_type should be bart or t5"),
    (bart_json(encoder_attention_heads=5, decoder_attention_heads=5),
     "d_model should be a multiple of"),
    (bart_json(activation_function="relu"), 'activation_function should be "gelu"'),
    (bart_json(scale_embedding=True), "scale_embedding should be false"),
    (bart_json(decoder_attention_heads=1),
     "encoder_attention_heads and decoder_attention_heads differ"),
    (bart_json(decoder_layers=-1), "decoder_layers should be a whole number from 1 to 100"),
    (bart_json(encoder_layers=10 ** 9), "encoder_layers should be a whole number from 1 to 100"),
    (bart_json(d_model=32.0), "d_model should be a whole number from 1 to 1,000,000"),
    (bart_json(encoder_ffn_dim=True), "encoder_ffn_dim should be a whole number"),
    *((bart_json(**{field: None}), f"{field} should be a whole number from 1 to") for field in (
        "vocab_size", "d_model", "encoder_attention_heads", "encoder_ffn_dim", "encoder_layers",
        "decoder_layers", "max_position_embeddings")),
], ids=lambda x: "" if x is None or x[:1] in "{[<v" else x.replace('"', ""))
def test_a_bad_config_is_named(tmp_path, content, message):
    save(their_bart(), tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    said = refused(tmp_path)
    assert message in said and str(tmp_path / "config.json") in said


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("field, value, expected", [
    ("pad_token_id", "null", "a whole number from 0 to 59"),
    ("eos_token_id", "[2]", "a whole number from 0 to 59"),
    ("decoder_start_token_id", "60", "a whole number from 0 to 59"),
    ("forced_bos_token_id", "-1", "a whole number from 0 to 59"),
    ("no_repeat_ngram_size", "-1", "a whole number from 0 to 1,000,000"),
    ("dropout", "NaN", "a number from 0.0 to 0.99"),
    ("dropout", "true", "a number from 0.0 to 0.99"),
    ("length_penalty", "101", "a number from -100.0 to 100.0"),
    ("length_penalty", "Infinity", "a number from -100.0 to 100.0"),
    ("length_penalty", '"1"', "a number from -100.0 to 100.0"),
    ("early_stopping", '"never"', "one of 0 to 1"),
])
def test_each_field_is_of_its_kind_in_both_files(tmp_path, file, field, value, expected):
    save(their_bart(), tmp_path)
    content = json.loads((tmp_path / file).read_text())
    content.pop(field, None)
    if file == "config.json":
        (tmp_path / "generation_config.json").unlink()  # it would have the last word
    text = json.dumps(content)[:-1] + f', "{field}": {value}' + "}"
    (tmp_path / file).write_text(text)
    assert refused(tmp_path) == f"{tmp_path / file}: {field} should be {expected}"


def test_a_large_length_penalty_is_no_large_whole_number(tmp_path):
    save(their_bart(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"length_penalty": 100}')
    assert our_bart(tmp_path).answer(questions(3), beams=2).size(1) > 1


def test_null_is_no_wish(tmp_path):
    save(their_bart(), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    wishes = dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "no_repeat_ngram_size",
                            "early_stopping", "length_penalty"))
    content = json.loads((tmp_path / "config.json").read_text()) | wishes
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = our_bart(tmp_path).config
    assert (config.forced_bos, config.forced_eos) == (None, None)
    assert (config.no_repeat_ngram, config.early_stopping, config.length_penalty) == (0, False, 1.0)


@pytest.mark.parametrize("sizes", [
    dict(d_model=30_000), dict(d_model=10 ** 6), dict(vocab_size=10 ** 6),
    dict(encoder_ffn_dim=10 ** 6), dict(max_position_embeddings=10 ** 6),
    dict(encoder_layers=100, decoder_layers=100)], ids=str)
def test_sizes_are_compared_before_memory_is_taken(tmp_path, sizes):
    save(their_bart(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(content))
    before = peak()
    with pytest.raises(WeightsError, match="model.safetensors does not fit its config.json"):
        load_backbone(tmp_path, feature_dim=8)
    assert peak() - before < 100e6


def peak() -> float:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_folder_without_weights_is_named(tmp_path):
    save(their_bart(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    said = refused(tmp_path)
    assert str(tmp_path) in said and "neither model.safetensors nor pytorch_model.bin" in said


# ---- weight files --------------------------------------------------------------------------------

TENSORS = {
    "float": torch.randn(3, 5), "half": torch.randn(7).half(), "double": torch.randn(2).double(),
    "brain": torch.randn(2, 2).bfloat16(), "none": torch.zeros(0, 4), "scalar": torch.tensor(1.5),
    "long": torch.arange(5), "bool": torch.tensor([True, False, True]),
    "byte": torch.arange(3, dtype=torch.uint8)}


class Net(nn.Module):
    """With parameters, buffers and a module in a module."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(3, 5), nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2))
        self.register_buffer("kept", torch.randn(4))

    def forward(self, x):
        return self.inner(self.first(x))


def write_safetensors(path, header: dict, data: bytes, gap=""):
    text = json.dumps(header).encode() + gap.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_torchscript(path) -> dict:
    traced = torch.jit.trace(Net().eval(), torch.randn(2, 3)).half()
    traced.save(path)
    return traced.state_dict()


def write_tensors(write):
    def writer(path) -> dict:
        write(TENSORS, path)
        return TENSORS
    return writer


def save_old(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS = {  # each writes a file and returns what is to be read from it
    "safetensors": write_tensors(partial(safetensors.torch.save_file, metadata={"format": "pt"})),
    "zip": write_tensors(torch.save),
    "old": write_tensors(save_old),
    "torchscript": write_torchscript,
}


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == x.dtype and ours[name].shape == x.shape and torch.equal(ours[name], x)
        for name, x in theirs.items())


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_is_read_bit_by_bit(tmp_path, kind):
    expected = WRITERS[kind](tmp_path / "weights")
    assert same(read_weights(tmp_path / "weights"), expected)


@pytest.mark.parametrize("gap", ["", " ", "  ", "   "])
def test_a_safetensors_header_need_not_be_aligned(tmp_path, gap):
    header = {"b": entry(2, 14, (3,)), "a": entry(0, 2, (1, 1), "F16")}
    a, b = torch.randn(1, 1).half(), torch.randn(3)
    data = a.numpy().tobytes() + b.numpy().tobytes()
    path = write_safetensors(tmp_path / "weights", header, data, gap)
    assert same(read_weights(path), {"a": a, "b": b})


@pytest.mark.parametrize("kind", WRITERS)
def test_a_truncated_file_is_named(tmp_path, kind):
    WRITERS[kind](tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in (0, 1, 8, 9, 10, 50, len(whole) // 2, len(whole) - 10, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="truncated or not a weight file") as error:
            read_weights(tmp_path / "cut")
        assert str(tmp_path / "cut") in str(error.value), length


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=f"{tmp_path / 'weights'} is missing"):
        read_weights(tmp_path / "weights")


OLD_AND_NEW = pytest.mark.parametrize("write", [torch.save, save_old], ids=["zip", "old"])


@OLD_AND_NEW
@pytest.mark.parametrize("wrap", [
    lambda weights: {"state_dict": weights, "epoch": 3, "optimizer": {"state": {0: [1.5]}}},
    lambda weights: {"model": weights, "args": None},
    lambda weights: {"module." + name: x for name, x in weights.items()},
    lambda weights: {"model": {"module." + name: x for name, x in weights.items()}},
    lambda weights: {name: nn.Parameter(x) for name, x in weights.items()},
    lambda weights: collections.OrderedDict(weights),
], ids=["state_dict", "model", "parallel", "both", "parameters", "ordered"])
def test_what_training_scripts_wrap_is_read(tmp_path, write, wrap):
    weights = {"a": torch.randn(3, 4), "b.c": torch.randn(5)}
    write(wrap(weights), tmp_path / "weights")
    assert same(read_weights(tmp_path / "weights"), weights)


@OLD_AND_NEW
def test_views_transposed_and_shared_tensors_are_read(tmp_path, write):
    x = torch.randn(4, 6)
    views = {"whole": x, "rows": x[1:3], "columns": x[:, 2:4], "transposed": x.T, "one": x[3, 5]}
    write(views, tmp_path / "weights")
    assert same(read_weights(tmp_path / "weights"), views)


@OLD_AND_NEW
@pytest.mark.parametrize("content, message", [
    ([torch.zeros(2)], "should be a dictionary of tensors"),
    (torch.zeros(2), "should be a dictionary of tensors"),
    ({"a": 1}, "should be a dictionary of tensors, but for a"),
    ({"a": {"b": torch.zeros(2)}}, "should be a dictionary of tensors, but for a"),
    ({5: torch.zeros(2)}, "names that are not text"),
    ({(1, 2): torch.zeros(2)}, "keys that are neither text nor numbers"),
    ({"a\nb": torch.zeros(2)}, "names that are not text"),
    ({"a" * 1000: torch.zeros(2)}, "names that are not text, or too long"),
    ({"a": torch.zeros(2, 2).to_sparse()}, "asks for torch._utils._rebuild_sparse_tensor"),
    ({"a": torch.zeros(2, device="meta")}, "asks for torch._utils._rebuild_meta_tensor"),
    ({"a": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}, "_rebuild_qtensor"),
    ({"a": torch.nested.nested_tensor([torch.zeros(2)])}, "_rebuild_nested_tensor"),
    ({"a": torch.zeros(2, dtype=torch.complex64)}, "asks for torch.ComplexFloatStorage"),
    ({"a": torch.zeros(1).half().expand(2 ** 15, 80_000)}, "has a, which is not dense"),
    ({"a": torch.zeros([1] * 70)}, "has a, which is not dense"),
], ids=range(15))
def test_only_a_dictionary_of_dense_tensors_will_do(tmp_path, write, content, message):
    write(content, tmp_path / "weights")
    with pytest.raises(WeightsError, match=message) as error:
        read_weights(tmp_path / "weights")
    assert str(tmp_path / "weights") in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("change, message", [
    (lambda x: x.long(), f"{FC1} is of torch.int64, expected floating-point numbers"),
    (lambda x: x > 0, f"{FC1} is of torch.bool"),
    (lambda x: x.index_fill(1, torch.tensor([3]), torch.nan), f"{FC1} has numbers that are not"),
    (lambda x: x.double().index_fill(0, torch.tensor([3]), 1e300), f"{FC1} has numbers that are"),
], ids=["integers", "bool", "nan", "too large"])
def test_numbers_that_cannot_be_weights_are_named(tmp_path, change, message):
    theirs = their_bart()
    save(theirs, tmp_path, safe=False)
    weights = theirs.state_dict()
    torch.save(weights | {FC1: change(weights[FC1])}, tmp_path / "pytorch_model.bin")
    assert message in refused(tmp_path)


@pytest.mark.parametrize("name", ["RN101.pt", "pytorch_model.bin", "model.safetensors"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, name):
    path = tmp_path / name
    for make, message in [
            (os.mkfifo, "is not a regular file"),
            (os.mkdir, "is not a regular file"),
            (lambda path: os.symlink("/dev/zero", path), "is not a regular file"),
            (lambda path: os.symlink("nowhere", path), "is missing"),
            (lambda path: os.symlink(path, path), "is missing"),
            (lambda path: path.write_bytes(b""), "truncated or not a weight file"),
            (lambda path: shutil.copy(POINTER, path), "is a Git LFS pointer, not the file itself"),
            (lambda path: path.write_text("\n<html>no access</html>"), "is a web page"),
            (lambda path: path.write_text("<?xml version='1.0'?><Error/>"), "is a web page")]:
        make(path)
        with pytest.raises(WeightsError) as error:
            load_clip(path)
        assert str(error.value).startswith(f"{path} {message}") or message in str(error.value)
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
        path.rmdir() if path.is_dir() else path.unlink()
    save(their_bart(), tmp_path)
    os.symlink(tmp_path / "model.safetensors", tmp_path / "link")
    assert read_weights(tmp_path / "link")


class Harm:
    """Pickled, a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


POINTER = Path(__file__).parent / "golden" / "reports" / "lfs-pointer.bin"


def as_torchscript(content, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content))
        archive.writestr("archive/constants.pkl", pickle.dumps(()))


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


FORMATS = pytest.mark.parametrize("write", [torch.save, save_old, as_pickle, as_torchscript],
                                  ids=["zip", "old", "pickle", "torchscript"])


@FORMATS
@pytest.mark.parametrize("harm", [
    lambda mark: Harm(os.system, f"touch {mark}"),
    lambda mark: Harm(open, str(mark), "w"),
    lambda mark: Harm(eval, f"open({str(mark)!r}, 'w')"),
    lambda mark: Harm(getattr, pathlib.Path, "touch", mark),
    lambda mark: Harm(subprocess.check_call, ["touch", str(mark)]),
    lambda mark: Harm(torch.load, str(mark)),
    lambda mark: Harm(torch.jit.load, str(mark)),
    lambda mark: Harm(copyreg._reconstructor, pathlib.Path, object, None),
    lambda mark: Harm(pickle.loads, b"."),
    lambda mark: Harm(functools.partial, os.system, f"touch {mark}"),
    lambda mark: functools.partial(os.system, f"touch {mark}"),
    lambda mark: Harm(importlib.import_module, "antigravity"),
    lambda mark: Harm(torch.hub.load, "a/b", "c"),
    lambda mark: nn.Linear(2, 2),
], ids=range(14))
def test_a_hostile_file_does_nothing(tmp_path, write, harm):
    mark = tmp_path / "harmed"
    # Harm first: nothing before it may be refused.
    write({"harm": harm(mark), "weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(WeightsError, match=f"{tmp_path / 'weights'} asks for ") as error:
        read_weights(tmp_path / "weights")
    assert not mark.exists() and len(str(error.value)) < 300


def test_harm_would_have_been_done(tmp_path):
    for i, harm in enumerate([
            Harm(os.system, f"touch {tmp_path}/0"), Harm(open, f"{tmp_path}/1", "w"),
            Harm(eval, f"open('{tmp_path}/2', 'w')")]):
        pickle.loads(pickle.dumps(harm))
        assert (tmp_path / str(i)).exists()


MAGIC = 0x1950a86a20f9469cfc6c
NESTED = b"\x80\2)q\0" + b"h\0h\0\x86q\0" * 60  # memo 0: a pair of one pair of one pair ...
LONG = b"\x80\2X" + struct.pack("<i", 10 ** 6 + 9) + b"__torch__" + b"a" * 10 ** 6 + b"q\0"


@pytest.mark.parametrize("write", ["zip", "old", "torchscript"])
@pytest.mark.parametrize("content", [
    b"\x80\x02" + b"]" * 1_000_000 + b".",
    b"\x80\x02}(" + b"X\x01\0\0\0a" + b"(" * 1_000_000 + b".",
    b"\x80\x02]r\xff\xff\xff\x7f.",
    b"\x80\x02\x8b\xff\xff\xff\x7f\1.",
    b"\x80\x05\x96" + (2 * 10 ** 9).to_bytes(8, "little") + b"abc.",
    b"\x80\x05\x8e" + (10 ** 11).to_bytes(8, "little") + b"abc.",
    b"\x80\x04\x95" + (10 ** 11).to_bytes(8, "little") + b"}.",
    b"\x80\x02X\xff\xff\xff\xff.",
    b"I" + b"9" * 100_000 + b"\n.",
    NESTED + b"}h\0K\1s.",
    NESTED + b"ccollections\nOrderedDict\n]]h\0aK\1aa\x85R.",
    NESTED + b"}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(h\0K\0))tRs.",
    NESTED + b"c__torch__\nA\n)\x81]]h\0aK\1aab.",
    # A million times the same long number, name, storage, call, list, state.
    b"\x80\2\x8b" + struct.pack("<i", 10 ** 6) + b"\1" * 10 ** 6 + b"q\0}"
    + b"h\0Ns" * 10 ** 5 + b".",
    LONG + b"h\0h\0\x93" * 10 ** 5 + b".",
    b"\x80\2(" + b"N" * 10 ** 6 + b"tq\0" + b"h\0Q" * 10 ** 5 + b".",
    b"\x80\2(" + b"N" * 10 ** 6 + b"tq\0" + b"ctorch._utils\n_rebuild_parameter\nq\1"
    + b"h\1h\0R" * 10 ** 5 + b".",
    b"\x80\2](" + b"N" * 10 ** 6 + b"e\x85q\0" + b"ctorch.jit._pickle\nbuild_intlist\nq\1"
    + b"h\1h\0R" * 10 ** 5 + b".",
    b"\x80\2c__torch__\nA\nq\1}(" + b"".join(
        b"X\3\0\0\0%03xN" % i for i in range(4000)) + b"uq\0" + b"h\1)\x81h\0b" * 10 ** 5 + b".",
    b"\x80\x02c__torch__\nA\n)\x81q\0}X\x01\0\0\0ah\0sb.",
    b"\x80\x02c__torch__\nA\n)\x81q\0" + b"".join(
        b"c__torch__\nA\n)\x81q%c}X\1\0\0\0ah%csX\1\0\0\0bh%csb" % (i, i - 1, i - 1)
        for i in range(1, 60)) + b".",
    b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.",
    b"\x80\x02\x82\1.",
    b"\x80\x02X\1\0\0\0aQ.",
    b"\x80\x02" + b"X\1\0\0\0a" + b"\x85Q" * 100 + b".",
    b"\x80\x02ctorch\nload\n.",
    b"\x80\x02ctorch.jit._pickle\nbuild_intlist\n(K\1tR.",
    b"",
])
def test_a_pickle_takes_no_more_memory_and_time_than_its_bytes(tmp_path, write, content):
    path = tmp_path / "weights"
    if write == "old":
        path.write_bytes(pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
                         + content + pickle.dumps([], 2))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            if write == "torchscript":
                archive.writestr("archive/constants.pkl", pickle.dumps(()))
    before, began = peak(), time.process_time()
    with contextlib.suppress(WeightsError):
        assert read_weights(path) == {}
    assert peak() - before < 500e6 and time.process_time() - began < 20


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_not_unpacked(tmp_path, compression):
    path, bomb = tmp_path / "weights", tmp_path / "bomb"
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(bomb, "w", compression) as archive:
        for name in whole.namelist():
            content = whole.read(name)
            archive.writestr(name, bytes(10 ** 8) if name.endswith("/data/0") else content)
    with pytest.raises(WeightsError, match="is damaged or compressed at weights/data.pkl"):
        read_weights(bomb)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "weights"
    torch.save({"a": torch.full((300,), 1.25)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<2f", 1.25, 1.25)) + 400] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="is damaged or compressed at weights/data/0"):
        read_weights(path)


def test_tensors_cannot_share_one_storage_without_end(tmp_path):
    x = torch.zeros(1000)
    torch.save({str(i): x.view(10, 100) for i in range(100)}, tmp_path / "weights")
    with pytest.raises(WeightsError, match="has tensors that share their memory"):
        read_weights(tmp_path / "weights")


@pytest.mark.parametrize("write", [save_old, torch.save])
def test_a_storage_cannot_be_larger_than_the_file(tmp_path, write):
    path = tmp_path / "weights"
    write({"a": torch.full((300,), 1.25)}, path)
    content = path.read_bytes()
    count = b"M,\x01"  # 300, as pickled
    assert content.count(count) == 2
    path.write_bytes(content.replace(count, b"J\xff\xff\xff\x7f"))
    before = peak()
    with pytest.raises(WeightsError):
        read_weights(path)
    assert peak() - before < 100e6


def test_a_large_file_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "weights"
    header = {"a": entry(0, 4 * 10 ** 9, (10 ** 9,))}
    write_safetensors(path, header, b"")
    os.truncate(path, path.stat().st_size + 4 * 10 ** 9)
    before = peak()
    assert read_weights(path)["a"].shape == (10 ** 9,)
    assert peak() - before < 100e6
    for head in b"PK\3\4", b"\x80\2", b"{", (2 ** 62).to_bytes(8, "little") + b"{":
        path.write_bytes(head)
        os.truncate(path, 10 ** 10)
        for read in read_weights, read_json:
            with pytest.raises(WeightsError):
                read(path)
    assert peak() - before < 100e6


def test_a_torchscript_tensor_cannot_reach_beyond_its_storage(tmp_path):
    write_torchscript(tmp_path / "good")
    shape, longer = b"(K\x05K\x03t", b"(K\x06K\x03t"  # (5, 3) of first.weight, as pickled
    with zipfile.ZipFile(tmp_path / "good") as good, zipfile.ZipFile(tmp_path / "bad", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith("/data.pkl"):
                assert content.count(shape) == 1
                content = content.replace(shape, longer)
            bad.writestr(name, content)
    with pytest.raises(WeightsError, match="is truncated or not a weight file"):
        read_weights(tmp_path / "bad")


def entry(begin, end, shape=(2,), dtype="F32"):
    return dict(dtype=dtype, shape=list(shape), data_offsets=[begin, end])


@pytest.mark.parametrize("header, message", [
    ({"a": entry(0, 8), "b": entry(4, 12)}, "see b"),
    ({"a": entry(0, 8), "b": entry(0, 8)}, "see b"),
    ({"a": entry(0, 8), "b": entry(12, 20)}, "see b"),
    ({"a": entry(0, 8), "b": entry(8, 28, (5,))}, "see b"),
    ({"a": entry(8, 0)}, "see a"),
    ({"a": entry(-8, 0)}, "see a"),
    ({"a": entry(0, 8)}, "12 bytes that belong to no tensor"),
    ({"a": entry(0, 20, (4,))}, "truncated or not"),
    ({"a": entry(0, 20, (-5, -1))}, "see a"),
    ({"a": entry(0, 20, (-1,))}, "see a"),
    ({"a": entry(0, 20, (1,) * 500 + (5,))}, "see a"),
    ({"a": entry(0, 20, (2 ** 70, 0))}, "truncated or not"),
    ({"a": entry(0, 20, (5,), "F5")}, "truncated or not"),
    ({"a": entry(0, 20, (5,), [])}, "truncated or not"),
    ({"a": entry(0, 20, (5,)), "b": 7}, "truncated or not"),
    ({"a": entry(0, 1e30, (5,))}, "see a"),
    ({"a\n": entry(0, 20, (5,))}, "names that are not text"),
    ([entry(0, 20, (5,))], "truncated or not"),
], ids=range(18))
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header, message):
    path = write_safetensors(tmp_path / "weights", header, bytes(20))
    with pytest.raises(WeightsError, match=message) as error:
        read_weights(path)
    assert str(path) in str(error.value)


def test_a_safetensors_name_that_is_there_twice_is_refused(tmp_path):
    text = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, ' * 2
    text = text.replace(b"[0, 4]", b"[4, 8]", 1)[:-2] + b"}"
    text = text.replace(b"}, {", b"}, ")
    (tmp_path / "weights").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(WeightsError):
        read_weights(tmp_path / "weights")


# ---- CLIP ----------------------------------------------------------------------------------------


def their_clip() -> CLIPResNet:
    torch.manual_seed(0)
    encoder = CLIPResNet((1, 2, 1, 1), width=8, side=2, output_dim=16)
    encoder.train()(torch.randn(4, 3, 64, 64))  # moves the running statistics
    return encoder.eval()


def visual(weights: dict) -> dict:
    return {"visual." + name: x for name, x in weights.items()}


def save_clip(encoder, path):
    text = {"token_embedding.weight": torch.zeros(5, 4), "logit_scale": torch.tensor(1.0)}
    torch.save(visual(encoder.state_dict()) | text, path)
    return path


def test_the_sizes_of_a_clip_are_read_off_its_weights(tmp_path):
    theirs = their_clip()
    ours = load_clip(save_clip(theirs, tmp_path / "RN.pt"))
    assert (ours.feature_dim, ours.output_dim) == (256, 16)
    layers = ours.layer1, ours.layer2, ours.layer3, ours.layer4
    assert [len(layer) for layer in layers] == [1, 2, 1, 1] and not ours.training
    picture = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(picture), theirs(picture)) and ours(picture).shape == (2, 256, 2, 2)


def test_a_half_precision_torchscript_clip_is_read(tmp_path):
    theirs = their_clip()
    torch.jit.trace(theirs, torch.randn(1, 3, 64, 64)).half().save(tmp_path / "traced")
    weights = read_weights(tmp_path / "traced")
    torch.save(visual(weights), tmp_path / "RN.pt")
    ours = load_clip(tmp_path / "RN.pt")
    assert all(x.dtype in (torch.float32, torch.int64) for x in ours.state_dict().values())
    assert all(torch.equal(x.half(), weights[name].half()) for name, x in ours.state_dict().items())


@pytest.mark.parametrize("weights", [
    {},
    {"model.shared.weight": torch.zeros(2, 2)},
    {"visual.conv1.weight": torch.zeros(4, 3, 16, 16), "visual.proj": torch.zeros(4, 4)},
    {name: x for name, x in visual(their_clip().state_dict()).items() if "1.bn1" not in name},
    visual(their_clip().state_dict() | {"layer2.1.more": torch.zeros(1)}),
], ids=["empty", "bart", "vision transformer", "missing", "extra"])
def test_weights_that_are_no_clip_resnet_are_refused(tmp_path, weights):
    torch.save(weights, tmp_path / "RN.pt")
    with pytest.raises(WeightsError, match="not a CLIP with a ResNet") as error:
        load_clip(tmp_path / "RN.pt")
    assert str(tmp_path / "RN.pt") in str(error.value)


def test_a_clip_with_a_vision_transformer_is_told_as_such(tmp_path):
    torch.save({"visual.class_embedding": torch.zeros(4)}, tmp_path / "ViT.pt")
    with pytest.raises(WeightsError) as error:
        load_clip(tmp_path / "ViT.pt")
    assert str(error.value) == (
        f"{tmp_path / 'ViT.pt'} is not a CLIP with a ResNet, but with a vision transformer")


@pytest.mark.parametrize("name, shape", [
    ("conv3.weight", (4000, 4, 3, 3)), ("conv3.weight", (10 ** 9, 0, 3, 3)),
    ("conv3.weight", ()), ("conv3.weight", (7, 4, 3, 3)),
    ("attnpool.positional_embedding", (10 ** 6 + 1, 1)), ("attnpool.c_proj.weight", (10 ** 6, 1)),
    *((f"layer1.{i}.bn3.weight", (0,)) for i in (1, 10 ** 5))], ids=str)
def test_sizes_of_a_clip_are_compared_before_memory_is_taken(tmp_path, name, shape):
    weights = visual(their_clip().state_dict() | {name: torch.zeros(shape)})
    torch.save(weights, tmp_path / "RN.pt")
    before = peak()
    with pytest.raises(WeightsError, match=f"{tmp_path / 'RN.pt'} is not a CLIP with a ResNet"):
        load_clip(tmp_path / "RN.pt")
    assert peak() - before < 100e6


def test_a_clip_of_very_many_blocks_is_refused(tmp_path):
    more = {f"layer2.{i}.bn3.weight": torch.zeros(0) for i in range(20_000)}
    torch.save(visual(their_clip().state_dict() | more), tmp_path / "RN.pt")
    began = time.process_time()
    with pytest.raises(WeightsError, match="not a CLIP with a ResNet"):
        load_clip(tmp_path / "RN.pt")
    assert time.process_time() - began < 20


def pooled_as_openai(pool, grid, positions):
    """The attention pool of OpenAI's clip/model.py, with positions [1 + H W, C]."""
    x = grid.flatten(2).permute(2, 0, 1)  # [H W, B, C]
    x = torch.cat([x.mean(0, keepdim=True), x]) + positions[:, None]
    bias = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    x, _ = F.multi_head_attention_forward(
        x[:1], x, x, x.size(-1), pool.heads, None, bias, None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False,
        use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight)
    return x[0]


def test_the_attention_pool_is_openais():
    pool, grid = their_clip().attnpool, torch.randn(3, 256, 2, 2)
    assert distance(pool(grid), pooled_as_openai(pool, grid, pool.positional_embedding)) < 1e-5


@torch.no_grad()
def test_a_larger_picture_is_pooled_with_resized_positions():
    encoder = their_clip()
    pool, grid = encoder.attnpool, encoder(torch.randn(2, 3, 96, 160))
    assert grid.shape == (2, 256, 3, 5)
    top, bottom = torch.randn(2, 256)
    pool.positional_embedding[1:] = torch.stack([top, top, bottom, bottom])
    middle = (top + bottom) / 2  # between two rows, by symmetry of any interpolation
    resized = pool.positions(3, 5)
    assert torch.equal(resized[0], pool.positional_embedding[0])
    assert distance(resized[6:11], middle.expand(5, -1)) < 1e-5
    assert distance(resized[1], resized[2:6]) < 1e-5
    assert distance(resized[11:16], resized[11:12]) < 1e-5
    assert (resized[1] - top).norm() < (resized[1] - middle).norm()
    assert (resized[11] - bottom).norm() < (resized[11] - middle).norm()
    assert distance(pool(grid), pooled_as_openai(pool, grid, resized)) < 1e-5


@torch.no_grad()
def test_pictures_are_normalised_and_pooled():
    """encode_images and encode_frames, step by step as OpenAI's preprocessing and VL-T5's pool."""
    encoder = CLIPResNet((1, 1, 1, 1), width=8, side=7, output_dim=16).eval()
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    grid = encoder((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    windows = grid.unfold(2, 2, 1).unfold(3, 2, 1).amax((-1, -2))  # [2, 256, 6, 6]
    images, frames = encoder.encode_images(pixels), encoder.encode_frames(pixels)
    assert images.shape == (2, 36, 256) and frames.shape == (2, 16)
    assert distance(images, windows.flatten(2).transpose(1, 2)) < 1e-5
    assert distance(frames, encoder.attnpool(grid)) < 1e-5


# ---- what must not matter, and what must ---------------------------------------------------------

def batch(base=TINY, pictures=1):
    """ids, features and labels of six examples."""
    return questions(6, pad=base.pad), torch.randn(6, pictures, 4, 8), questions(6, 5)


BOTH = pytest.mark.parametrize("base", [TINY, TINY_T5], ids=["bart", "t5"])


@BOTH
@torch.no_grad()
def test_padding_changes_nothing(base):
    model, (ids, features, labels) = our_model(base=base), batch(base)
    longer = F.pad(ids, (0, 7), value=base.pad)
    assert distance(model(longer, features, labels), model(ids, features, labels)) < 1e-5
    memory, mask = model.encode(ids, features)
    assert not memory[~mask[:, 0, 0]].any() and memory[mask[:, 0, 0]].abs().min() > 0


@BOTH
def test_a_batch_learns_what_its_examples_learn_alone(base):
    """Loss and gradients of a batch are the means of those of each example cut to its length."""
    model, (ids, features, labels) = our_model(base=base).double(), batch(base)
    features, weights = features.double(), torch.rand(6).double()
    for row, length in enumerate([5, 1, 3, 4, 2, 5]):
        labels[row, length:] = -100
    model.loss(ids, features, labels, weights).backward()
    together = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    for i in range(6):
        text, answer = ids[i][ids[i] != base.pad], labels[i][labels[i] != -100]
        loss = model.loss(text[None], features[i:i + 1], answer[None])
        (loss * weights[i] / 6).backward()
    assert distance(torch.cat([p.grad.flatten() for p in model.parameters()]), together) < 1e-6


@BOTH
def test_bfloat16_gives_nearly_the_same_loss(base, recwarn):
    """Losses to 2 %, gradients to 10 % of their length."""
    model, (ids, features, labels) = our_model(base=base), batch(base)
    for parameter in model.parameters():
        parameter.data *= 0.5 if parameter.ndim > 1 else 1  # large scores need more bits
    losses, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model.loss(ids, features, labels))
            assert model.answer(ids, features, beams=2, max_length=5).size(1) <= 5
        model.zero_grad()
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert abs(losses[1] - losses[0]) < 0.02 * losses[0]
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()
    assert not recwarn.list


@BOTH
@torch.no_grad()
def test_only_a_prenorm_stack_ends_with_dropout(base):
    model = our_model(base=base, dropout=0.3).train()
    ids, features, _ = batch(base)
    memory, mask = model.encode(ids, features)
    dropped = (memory[mask[:, 0, 0]] == 0).float().mean()
    assert abs(dropped - (0.3 if base.prenorm else 0)) < 0.05


@torch.no_grad()
def test_relative_positions_matter_to_words_and_not_to_visual_tokens():
    model = our_model(base=TINY_T5)
    mask, at = torch.ones(1, 1, 1, 9, dtype=torch.bool), torch.arange(5)
    mask[..., 4] = False  # five words, the last one padding, and four visual tokens
    bias = model.encoder.positions.bias(mask, at, at)
    assert bias.shape == (1, 4, 9, 9) and not bias[..., 5:].any() and not bias[..., 5:, :4].any()
    assert (bias[..., 4] == -torch.inf).all()
    assert len(bias[0, 0, :5, :4].unique()) == 8  # distances -3 to 4
    causal = model.decoder.positions.bias(at <= at[:, None], at, at)
    step = at[2:3]  # as with a cache
    one = model.decoder.positions.bias(at <= step[:, None], step, at)
    assert torch.equal(one[:, 0], causal[:, 2]) and (causal[:, 0, 1:] == -torch.inf).all()


@torch.no_grad()
def test_labels_behind_the_end_change_no_loss():
    model, (ids, features, labels), weights = our_model(), batch(), torch.rand(6)
    labels[labels == PAD] = -100
    loss = model.loss(ids, features, labels, weights)
    longer = F.pad(labels, (0, 4), value=-100)
    assert distance(model.loss(ids, features, longer, weights), loss) < 1e-5


@torch.no_grad()
def test_future_words_change_nothing():
    model, (ids, features, _) = our_model(), batch()
    labels = torch.randint(3, VOCAB, (6, 8))
    other = labels.clone()
    other[:, 3:] = torch.randint(3, VOCAB, (6, 5))
    one, two = model(ids, features, labels), model(ids, features, other)
    assert distance(one[:, :4], two[:, :4]) < 1e-6 and distance(one[:, 4:], two[:, 4:]) > 0.1


@torch.no_grad()
def test_the_cache_changes_nothing():
    model, ids, features = our_model(forced_eos=END), questions(), torch.randn(50, 2, 4, 8)
    memory, mask = model.encode(ids, features)
    words = torch.full((50, 1), END)
    while words.size(1) < 12:
        best = model.logits(model.decode(words, memory, mask))[:, -1].argmax(-1)
        if words.size(1) == 11:
            best[:] = END  # forced
        ended = (words[:, 1:] == END).any(1)
        words = torch.cat([words, best.masked_fill(ended, PAD)[:, None]], 1)
    said = model.answer(ids, features, beams=1, max_length=12)
    assert len(said.unique(dim=0)) > 20
    assert F.pad(said, (0, 12 - said.size(1)), value=PAD).tolist() == words.tolist()


@BOTH
@torch.no_grad()
def test_a_compiled_decoding_step_says_the_same(base):
    """And three graphs are enough for all shapes: one row, another length, fewer rows."""
    torch._dynamo.reset()
    model, counter, lengths = our_model(base=base), CompileCounter(), set()
    # Answers end at different steps, so that the search gets smaller.
    model.logits_bias[base.eos] = 4 if base is TINY else 1
    decode = torch.compile(model.decode, backend=counter, dynamic=True)
    for rows, pictures in (6, 1), (3, 1), (5, 2), (7, 1):
        ids, features = questions(rows, pad=base.pad), torch.randn(rows, pictures, 4, 8)
        for beams in 1, 5:
            said = model.answer(ids, features, beams)
            lengths.update((said == base.eos)[:, 1:].int().argmax(1).tolist())
            assert torch.equal(model.answer(ids, features, beams, decode=decode), said)
    assert counter.frame_count <= 3 and len(lengths) > 3


def test_under_autocast_the_layers_of_t5_share_one_bias():
    """What is kept for the backward pass, [batch, heads, S, S], was one more for each layer."""
    model = our_model(base=TINY_T5, encoder_layers=4).train()
    ids, features, labels = batch(TINY_T5)
    model.encoder.positions.requires_grad_(False)  # as with an adapter
    kept = []

    def keep(tensor):
        if tensor.shape == (6, 4, 13, 13):  # nine tokens, four visual ones
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            model.loss(ids, features, labels)
    assert len(kept) == 4 and {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == 1


def test_dropout_keeps_nine_of_ten_and_the_mean():
    torch.manual_seed(0)
    dropout = Dropout(0.1)
    x = torch.ones(401, 1001, requires_grad=True)  # their number is no multiple of 4
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()) and set(y.unique().tolist()) == {0.0, y.max().item()}
    assert abs(y.max() - 1 / 0.9) < 1e-6 and abs(y.mean() - 1) < 2e-3
    for lane in range(4):
        assert abs((y.flatten()[lane::4] > 0).float().mean() - 0.9) < 5e-3
    assert not torch.equal(dropout(x), y) and torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("base", [TINY, TINY_T5], ids=["bart", "t5"])
@torch.no_grad()
def test_the_attention_of_training_is_that_of_answering(base, monkeypatch):
    """What training takes on a CPU, against PyTorch's own; with a dropout that drops nothing."""
    model, (ids, features, _) = our_model(base=base, dropout=0.3), batch(base)
    memory, _ = model.eval().encode(ids, features)
    monkeypatch.setattr(module, "drop", lambda x, p: x)
    assert distance(model.train().encode(ids, features)[0], memory) < 1e-5


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
@torch.no_grad()
def test_a_beam_as_wide_as_the_language_finds_the_best_sentence(penalty):
    """Three words, an end, and at most three of them: every sentence is scored one by one."""
    model = our_model(vocab_size=5, length_penalty=penalty).double()
    model.logits_bias[PAD] = -1e9
    ids = torch.tensor([[0, 3, 4, 0], [3, 3, 1, 1], [4, 1, 1, 1], [0, 0, 4, 1]])
    features = torch.randn(4, 1, 2, 8).double()
    sentences = [words for n in range(4) for words in itertools.product((0, 3, 4), repeat=n)]

    def score(words, memory, mask):
        said = [END, *words] if len(words) == 3 else [END, *words, END]  # cut, or ended
        logs = model.logits(model.decode(torch.tensor([said]), memory, mask))[0].log_softmax(-1)
        return sum(logs[i, word] for i, word in enumerate(said[1:])) / (len(words) + 1) ** penalty

    for row, said in zip(range(4), model.answer(ids, features, beams=27, max_length=4).tolist()):
        memory = model.encode(ids[row:row + 1], features[row:row + 1])
        best = max(sentences, key=lambda words: score(words, *memory))
        expected = [END, *best, END][:4]
        assert said == expected + [PAD] * (len(said) - len(expected))


@torch.no_grad()
def test_the_order_of_two_pictures_matters_by_their_numbers():
    model, (ids, pictures, _) = our_model(), batch(pictures=2)

    def read(pictures):
        return model.encode(ids, pictures)[0][:, :9]  # what the words see

    assert distance(read(pictures), read(pictures.flip(1))) > 0.01
    model.visual.image_order.weight[1] = model.visual.image_order.weight[0]
    assert distance(read(pictures), read(pictures.flip(1))) < 1e-5


@torch.no_grad()
def test_visual_token_o_has_the_word_row_vocab_minus_1_minus_o():
    model, ids, features = our_model(), torch.full((2, 3), 5), torch.randn(2, 2, 6, 8)
    entering = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0][:, 3:]))
    model.encode(ids, features)
    for o in range(6):
        model.embed_tokens.weight[VOCAB - 1 - o] += 1
        model.encode(ids, features)
        moved = (entering[-1] - entering[-2]).unflatten(1, (2, 6))
        expected = torch.zeros_like(moved)
        expected[:, :, o] = 1
        assert torch.allclose(moved, expected, atol=1e-5)


@torch.no_grad()
def test_the_likeliest_choice_is_told_by_the_first_token_that_differs():
    model, (ids, features, _) = our_model(), batch()
    choices = [[0, 9, 7, END], [0, 9, 8, 5, END], [0, 9, 6, END]]
    memory, mask = model.encode(ids, features)
    before = torch.tensor([[END, 0, 9]]).expand(6, -1)
    best = model.logits(model.decode(before, memory, mask))[:, -1, [7, 8, 6]].argmax(1)
    padded = torch.tensor([[END, *choice, PAD][:6] for choice in choices])
    said = model.answer(ids, features, choices=choices)
    assert said.tolist() == padded[best].tolist() and len(said.unique(dim=0)) > 1
    assert model.answer(ids, features, choices=[[0, 9, END]] * 2).tolist() == [[END, 0, 9, END]] * 6


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted > 0
