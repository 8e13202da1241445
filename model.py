"""The joint vision-and-language model of VL-Adapter: CLIP sees, BART or T5 reads and answers.

    picture -> CLIPResNet -> 7x7 grid -> pool -> 36 visual tokens --+
                                                                     +-> encoder -> decoder -> answer
    question -> word embeddings -------------------------------------+

From top to bottom: sizes, sight, language, both, speaking, weights.
The contract with adapters.py is four attribute names: `adapter` is an empty place on the output of a sub-layer,
`prompt` one where words enter a stack, `visual` the new part that every method trains, `logits_bias` the head's zeros.

Paper: https://arxiv.org/abs/2112.06825. This file needs torch and nothing else; copy it as it is.
"""

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

ADDED_WORDS = 200  # <extra_id_*> and <vis_extra_id_*>: the last rows of the word table, which number visual tokens
VISUAL_SIDE = 6    # pictures are pooled to 6 x 6 visual tokens (section 4.1 of the paper: 36)


class WeightsError(ValueError):
    """A weight file or its config.json cannot be used; the message names the file and what was expected."""


@dataclass(frozen=True)
class Config:
    """What the encoder-decoder is made of and how it wants to speak; `bart` and `t5` read it from a config.json."""
    vocab_size: int                  # rows of the word table, added ones included
    d_model: int
    heads: int
    d_ff: int
    encoder_layers: int
    decoder_layers: int
    max_positions: int | None        # longest text, in tokens; None: any, with relative positions
    feature_dim: int                 # channels of a visual feature
    dropout: float                   # one number for all places, as in the original
    start: int                       # first token of the decoder
    pad: int
    end: int
    forced_first: int | None = None  # generation: token that must come first
    forced_last: int | None = None   # generation: token that must come last when max_length is reached
    no_repeat_ngram: int = 0         # generation: no n-gram of this length occurs twice; 0 is off
    early_stopping: bool = False     # beam search: stop as soon as `beams` hypotheses are closed
    length_penalty: float = 1.0      # beam search: a hypothesis scores sum of log-probabilities / length ** penalty
    loaded_words: int | None = None  # rows of the word table that a checkpoint brings, the first ones; None: all
    # What makes a family; the defaults are BART's.
    prenorm: bool = False            # norms stand before the sub-layers and at the end, not behind sums and embeddings
    norm: Callable[[int], nn.Module] = partial(nn.LayerNorm, eps=1e-5)
    bias: bool = True                # of the Linears of the language part
    head_dim: int | None = None      # None: d_model / heads
    score_scale: float | None = None                 # of q k before the softmax; None: head_dim ** -0.5
    activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu
    head_scale: float = 1.0          # of the last hidden state before it meets the word table
    embedding_std: float = 0.02      # of the rows that no checkpoint brings
    buckets: int | None = None       # rows of RelativePositions; None: LearnedPositions
    max_distance: int | None = None  # from which on all positions share a bucket


def from_json(said: dict, sizes: dict[str, str], words: int, **others) -> Config:
    """What both families say alike in a config.json. `sizes` are our names of its numbers and theirs."""
    for name in sizes.values():
        if not isinstance(said.get(name), int) or said[name] < 1:
            raise WeightsError(f"{name} is {said.get(name)!r}, expected a number from 1 on")
    if not said["vocab_size"] <= words <= said["vocab_size"] + ADDED_WORDS:
        raise WeightsError(f"vocab_size is {said['vocab_size']:,}, the tokenizer with its added words has {words:,}")
    if "head_dim" not in sizes and said["d_model"] % said[sizes["heads"]]:
        raise WeightsError(f"d_model is no multiple of {sizes['heads']}")
    return Config(
        words, **{ours: said[theirs] for ours, theirs in sizes.items()}, **others,
        start=said["decoder_start_token_id"], pad=said["pad_token_id"], end=said["eos_token_id"],
        forced_first=said.get("forced_bos_token_id"), forced_last=said["forced_eos_token_id"],
        no_repeat_ngram=said.get("no_repeat_ngram_size") or 0, early_stopping=said.get("early_stopping") is True,
        length_penalty=1.0 if said.get("length_penalty") is None else said["length_penalty"])


def bart(json_config: dict, feature_dim: int, words: int) -> Config:
    """BART's sizes and wishes from its config.json (Lewis et al. 2020), with `words` rows in the word table."""
    said = dict(decoder_start_token_id=2, pad_token_id=1, eos_token_id=2, forced_eos_token_id=2) | json_config
    if said.get("activation_function", "gelu") != "gelu" or said.get("scale_embedding"):
        raise WeightsError("only BART with gelu and unscaled embeddings is built here (bart-base, bart-large)")
    for name in ("attention_heads", "ffn_dim"):
        ours, theirs = said.get(f"encoder_{name}"), said.get(f"decoder_{name}")
        if None not in (ours, theirs) and ours != theirs:
            raise WeightsError(f"decoder_{name} and encoder_{name} differ, as in no published BART")
    sizes = dict(loaded_words="vocab_size", d_model="d_model", heads="encoder_attention_heads", d_ff="encoder_ffn_dim",
                 encoder_layers="encoder_layers", decoder_layers="decoder_layers",
                 max_positions="max_position_embeddings")
    return from_json(said, sizes, words, feature_dim=feature_dim, dropout=said.get("dropout", 0.1))


def t5(json_config: dict, feature_dim: int, words: int) -> Config:
    """T5's sizes and wishes from its config.json (Raffel et al. 2020), with `words` rows in the word table."""
    said = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, forced_eos_token_id=None, dropout_rate=0.1,
                num_decoder_layers=json_config.get("num_layers"), relative_attention_max_distance=128) | json_config
    if said.get("feed_forward_proj", "relu") != "relu" or said.get("tie_word_embeddings") is False:
        raise WeightsError("only T5 with relu and one word table is built here (t5-base, t5-large; not T5 1.1 or Flan)")
    sizes = dict(loaded_words="vocab_size", d_model="d_model", heads="num_heads", head_dim="d_kv", d_ff="d_ff",
                 encoder_layers="num_layers", decoder_layers="num_decoder_layers",
                 buckets="relative_attention_num_buckets", max_distance="relative_attention_max_distance")
    return replace(
        from_json(said, sizes, words, max_positions=None, feature_dim=feature_dim, dropout=said["dropout_rate"]),
        prenorm=True, norm=partial(nn.RMSNorm, eps=said.get("layer_norm_epsilon", 1e-6)), bias=False, score_scale=1.0,
        activation=F.relu, head_scale=said["d_model"] ** -0.5, embedding_std=1.0)


# ---- sight --------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Residual block of CLIP's ResNet: strides are average pools, before the last 1x1 and before the shortcut."""

    def __init__(self, channels: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if stride > 1 or channels != 4 * planes:
            conv, norm = nn.Conv2d(channels, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
            self.downsample = nn.Sequential(conv, norm)                                     # OpenAI's names: 0 and 1

    def forward(self, x):                                                                   # [B, channels, H, W]
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.pool(F.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))                                                     # [B, 4 planes, H/s, W/s]
        return F.relu(out + (x if self.downsample is None else self.downsample(self.pool(x))))


class AttentionPool(nn.Module):
    """CLIP's pooled output: the mean of the grid asks, the mean and the grid answer."""

    def __init__(self, side: int, channels: int, output_dim: int):
        super().__init__()
        self.heads = channels // 64
        self.positional_embedding = nn.Parameter(torch.randn(side * side + 1, channels) / channels ** 0.5)
        self.q_proj, self.k_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.v_proj, self.c_proj = nn.Linear(channels, channels), nn.Linear(channels, output_dim)

    def forward(self, grid):                                                                # [B, C, H, W]
        tokens = grid.flatten(2).transpose(1, 2)                                            # [B, H W, C]
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positions(*grid.shape[2:])
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj, x in
                   [(self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens)])
        pooled = F.scaled_dot_product_attention(q, k, v)                                    # [B, heads, 1, 64]
        return self.c_proj(pooled.flatten(1))                                               # [B, output_dim]

    def positions(self, height: int, width: int):
        """The learned positions, resized where the picture is not of the size CLIP was trained on."""
        mean, grid = self.positional_embedding[:1], self.positional_embedding[1:]           # [1, C], [side^2, C]
        side = int(len(grid) ** 0.5)
        if (height, width) == (side, side):
            return self.positional_embedding
        grid = grid.T.reshape(1, -1, side, side)
        grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        return torch.cat([mean, grid.flatten(2)[0].T])


class CLIPResNet(nn.Module):
    """The picture half of CLIP with a modified ResNet (Radford et al. 2021, section 2.4): RN50, RN101, RN50x4, ...

    Unlike torchvision's ResNet it has three stem convolutions, average pools for strides and attention for the last
    pool: encoder(pictures) is the grid, encoder.attnpool(grid) the pooled output. Names are OpenAI's, so their weights
    load without a table. Use `load_clip` to read a weight file.
    """

    def __init__(self, layers: tuple[int, int, int, int], width: int, side: int, output_dim: int):
        super().__init__()
        self.resolution = 32 * side                                # pixels of a side of the pictures it was trained on
        self.feature_dim, self.output_dim = 32 * width, output_dim
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(layers):
            planes, stride = width * 2 ** stage, 1 if stage == 0 else 2
            stack = [Bottleneck(channels if i == 0 else 4 * planes, planes, stride if i == 0 else 1)
                     for i in range(blocks)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
            channels = 4 * planes
        self.attnpool = AttentionPool(side, channels, output_dim)

    def forward(self, pictures):
        """Pictures [B, 3, H, W], normalised as CLIP wants them, to the last grid [B, 32 width, H/32, W/32]."""
        x = F.relu(self.bn1(self.conv1(pictures)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)                                # [B, width, H/4, W/4]
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def fold_norms(encoder: CLIPResNet) -> CLIPResNet:
    """The same encoder for use, not for training: each BatchNorm becomes a part of the convolution before it."""
    for module in list(encoder.modules()):
        parts = module._modules
        for conv, norm in ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1"):
            if isinstance(parts.get(norm), nn.BatchNorm2d):
                parts[conv], parts[norm] = fuse_conv_bn_eval(parts[conv], parts[norm]), nn.Identity()
    return encoder


def pool(grid, side: int = VISUAL_SIDE):
    """Adaptive max pool of feature grids [B, C, H, W] to [B, side^2, C], row-major.

    For 7x7 to 6x6 each token is the maximum of a 2x2 window. Without weights, so it is done once, before storing.
    """
    return F.adaptive_max_pool2d(grid, side).flatten(2).transpose(1, 2)


# ---- language -----------------------------------------------------------------------------------------------------


class Place(nn.Module):
    """An empty place on the output of a sub-layer: hands `hidden` on. adapters.py may put another module here.

    It is shown the input `x` of the sub-layer too, which parallel adapters need; both [..., d_model], see `Packing`.
    """

    def forward(self, hidden, x):
        return hidden


class Dropout(nn.Dropout):
    """nn.Dropout, but four elements share one random number of 64 bits on a CPU, where drawing was a quarter of a step.

    `ours` is False on other devices and while compiling, where PyTorch's own is as fast.
    """

    def ours(self, x) -> bool:
        return self.training and self.p > 0 and x.device.type == "cpu" and not torch.compiler.is_compiling()

    def forward(self, x):
        if not self.ours(x):
            return super().forward(x)
        numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-2 ** 63, None)
        keep = numbers.view(torch.int16)[:x.numel()].view(x.shape).ge_(round(self.p * 2 ** 16) - 2 ** 15)
        return (x * keep.to(torch.int8)).mul_(1 / (1 - self.p))                             # a byte is kept for backward


class Moved(torch.autograd.Function):
    """Rows of x [n, width] in other places: x[source], and zeros where source is n. `back` leads the same way back.

    No row has two places, so the gradient just moves back: nothing to add up, nothing but two indices to keep.
    """

    @staticmethod
    def forward(context, x, source, back):
        context.save_for_backward(source, back)
        return torch.cat([x, x.new_zeros(1, x.size(1))]).index_select(0, source)

    @staticmethod
    def backward(context, grad):
        source, back = context.saved_tensors
        return Moved.apply(grad, back, source), None, None


def flat_places(mask):
    """Where the flat mask is True. On CUDA the host waits for it, so training is given them with the batch."""
    return mask.flatten().nonzero()[:, 0]


class Packing:
    """Takes the padding out of x [batch, length, width] inside a stack; attention alone needs a rectangle.

    at: the places of the tokens in the flat batch x length. None: all stays as it is.
    """

    def __init__(self, x, at=None):
        self.shape, self.at = x.shape[:2], at
        if at is not None:
            none = at.new_full([self.shape.numel()], len(at))
            self.number = none.index_copy(0, at, torch.arange(len(at), device=at.device))   # of the token at a place

    def pack(self, x):
        """[batch, length, width] to [tokens, width]."""
        return x if self.at is None else Moved.apply(x.flatten(0, 1), self.at, self.number)

    def pad(self, x):
        """[tokens, width] to [batch, length, width], zeros between; what is a rectangle already stays."""
        return x if x.ndim == 3 else Moved.apply(x, self.number, self.at).unflatten(0, self.shape)


class Attention(nn.Module):
    """Multi-head attention of `x` over `memory`."""

    def __init__(self, config: Config):
        super().__init__()
        head_dim = config.head_dim or config.d_model // config.heads
        self.heads, self.dropout = config.heads, Dropout(config.dropout)
        self.scale = config.score_scale or head_dim ** -0.5
        d_model, width = config.d_model, config.heads * head_dim
        self.q, self.k = nn.Linear(d_model, width, config.bias), nn.Linear(d_model, width, config.bias)
        self.v, self.out = nn.Linear(d_model, width, config.bias), nn.Linear(width, d_model, config.bias)

    def keys_values(self, memory, packing):
        """Keys and values of `memory` [batch, S, d_model] or packed, each [batch, heads, S, head_dim]."""
        return [packing.pad(proj(memory)).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.k, self.v)]

    def forward(self, x, packing, memory, mask, cache=None):
        """x [batch, T, d_model] or packed; mask [batch or 1, heads or 1, T or 1, S], boolean or added.

        cache, see `Cache`, gives keys and values instead of `keys_values`.
        """
        k, v = (cache or Attention.keys_values)(self, memory, packing)
        # In beam search x has `beams` rows an example, memory one: the beams are so many queries on the same keys.
        q = packing.pad(self.q(x)).view(len(k), -1, self.heads, k.size(-1)).transpose(1, 2) # [batch, heads, T, head_dim]
        if self.dropout.ours(x):                                                            # the same with our dropout
            scores = self.scale * q @ k.transpose(-1, -2)
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            out = self.dropout(scores.softmax(-1)) @ v
        else:
            p = self.dropout.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, p, scale=self.scale)
        return self.out(packing.pack(out.transpose(1, 2).reshape(*packing.shape, -1)))


class SelfAttention(Attention):
    """Attention of `x` over itself."""

    def forward(self, x, packing, mask, cache=None):
        return super().forward(x, packing, x, mask, cache)


class FeedForward(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, config.bias)
        self.activation, self.dropout = config.activation, Dropout(config.dropout)

    def forward(self, x):
        return self.down(self.dropout(self.activation(self.up(x))))


class Sublayer(nn.Module):
    """One residual step around `inner`. The paper's adapters sit in `adapter`, and are shown x, un-normed."""

    def __init__(self, config: Config, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.adapter = Place()
        self.dropout = Dropout(config.dropout)
        self.norm, self.prenorm = config.norm(config.d_model), config.prenorm

    def forward(self, x, *context):                             # [batch, length, d_model] or packed, [tokens, d_model]
        if self.prenorm:
            return x + self.dropout(self.adapter(self.inner(self.norm(x), *context), x))
        hidden = self.adapter(self.inner(x, *context), x)
        # Under autocast hidden states stay in its precision; T5's sums, which no norm interrupts, do not.
        return self.norm(x + self.dropout(hidden)).to(hidden.dtype)


class Layer(nn.Module):
    """Self-attention, cross-attention where there is a memory (decoder), feed-forward."""

    def __init__(self, config: Config, cross: bool):
        super().__init__()
        self.self_attn = Sublayer(config, SelfAttention(config))
        self.cross_attn = Sublayer(config, Attention(config)) if cross else None
        self.ffn = Sublayer(config, FeedForward(config))

    def forward(self, x, packing, mask, memory=None, memory_mask=None, caches=(None, None)):
        x = self.self_attn(x, packing, mask, caches[0])
        if self.cross_attn is not None:
            x = self.cross_attn(x, packing, memory, memory_mask, caches[1])
        return self.ffn(x)


class LearnedPositions(nn.Embedding):
    """Rows of a table, added to the words (BART). Rows 0 and 1 are unused."""

    def __init__(self, config: Config, causal: bool):
        super().__init__(config.max_positions + 2, config.d_model)

    def embed(self, words, at):
        return words + self(at + 2)

    def bias(self, mask, queries, keys):
        return mask


class RelativePositions(nn.Embedding):
    """Numbers by head and distance, added to the scores of self-attention (T5, section 2.1).

    Short distances have a bucket each, others share ever wider ones. An encoder has a second set, for the keys ahead.
    """

    def __init__(self, config: Config, causal: bool):
        super().__init__(config.buckets, config.heads)
        self.ahead = 0 if causal else config.buckets // 2                                   # first bucket of keys ahead
        count, exact = config.buckets - self.ahead, (config.buckets - self.ahead) // 2
        wide = lambda i: exact * (config.max_distance / exact) ** ((i - exact) / (count - exact))
        least = [i if i < exact else int(wide(i) + 1 - 1e-6) for i in range(1, count)]      # where bucket i begins
        self.register_buffer("least", torch.tensor(least), persistent=False)

    def embed(self, words, at):
        return words

    def bias(self, mask, queries, keys):
        """mask, True where to look, to numbers [batch or 1, heads, T, S]: -inf where not, 0 with a visual token."""
        distance = keys - queries[:, None]                                                  # [text queries, text keys]
        bucket = torch.bucketize(distance.abs(), self.least, right=True) + self.ahead * (distance > 0)
        visual = mask.size(-1) - len(keys)                                                  # these follow the text
        return torch.where(mask, F.pad(self(bucket).permute(2, 0, 1), (0, visual, 0, visual)), -torch.inf)


class Stack(nn.Module):
    """The encoder or, with cross-attention, the decoder."""

    def __init__(self, config: Config, layers: int, cross: bool):
        super().__init__()
        self.positions = (LearnedPositions if config.buckets is None else RelativePositions)(config, causal=cross)
        self.prompt = nn.Identity()
        norms = nn.Identity(), config.norm(config.d_model)
        self.embed_norm, self.final_norm = norms if config.prenorm else norms[::-1]
        self.dropout = Dropout(config.dropout)
        self.final_dropout = Dropout(config.dropout if config.prenorm else 0.0)
        self.layers = nn.ModuleList(Layer(config, cross) for _ in range(layers))
        self.recompute = False                          # in training keep only what enters each layer: less memory

    def embed(self, words, at):
        """Word embeddings [batch, T, d_model] at the positions [T], with the prompt before them."""
        return self.embed_norm(self.prompt(self.positions.embed(words, at)))                # [batch, prompt + T, d_model]

    def forward(self, x, mask, memory=None, memory_mask=None, cache=None, at=None):
        """x [batch, length, d_model] to hidden states of that shape, computed only at the places `at`, see `Packing`."""
        packing = Packing(x, at)
        x = self.dropout(packing.pack(x))
        for i, layer in enumerate(self.layers):
            run = partial(checkpoint, layer, use_reentrant=False) if self.recompute and self.training else layer
            x = run(x, packing, mask, memory, memory_mask, cache.layers[i] if cache else (None, None))
        return packing.pad(self.final_dropout(self.final_norm(x)))


# ---- both ---------------------------------------------------------------------------------------------------------


class VisualTokens(nn.Module):
    """Visual features to tokens of the encoder (section 3.1 of the paper; VL-T5's visual embedding).

    N(W f + b) + N(W' box + b') + picture number + a row of the word table for the place in the grid, with the norm N of
    the language part. There are no boxes in a grid: the original feeds zeros, so the second term is one learned vector.
    Weights: (feature_dim + 5 + 2 + 2 + 4) d_model, 1,582,848 for RN101 and BART-base; T5's norms have 2 d_model fewer.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.feature = nn.Linear(config.feature_dim, config.d_model)
        self.feature_norm = config.norm(config.d_model)
        self.box = nn.Linear(5, config.d_model)
        self.box_norm = config.norm(config.d_model)
        self.picture = nn.Embedding(2, config.d_model)

    def forward(self, features, place):
        """features [batch, pictures, tokens, feature_dim], place [tokens, d_model] to [batch, all tokens, d_model]."""
        features = features.to(self.feature.weight.dtype)
        number = self.picture.weight[:features.size(1), None]                               # [pictures, 1, d_model]
        # Not in autocast's precision, which it sees to for LayerNorm, but not for RMSNorm.
        feature, box = (x.to(number.dtype) for x in (self.feature(features), self.box(features.new_zeros(5))))
        return (self.feature_norm(feature) + self.box_norm(box) + number + place).flatten(1, 2)


class Model(nn.Module):
    """The encoder-decoder over words and visual tokens. One word table serves input, output and grid places."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.d_model)
        self.visual = VisualTokens(config)
        self.encoder = Stack(config, config.encoder_layers, cross=False)
        self.decoder = Stack(config, config.decoder_layers, cross=True)
        self.register_buffer("logits_bias", torch.zeros(config.vocab_size))
        self.apply(partial(start, embedding_std=config.embedding_std))

    def encode(self, ids, features, ids_at=None):
        """Question ids [batch, T], padded right, and features [batch, pictures, tokens, feature_dim].

        Returns memory [batch, S, d_model] of [prompt; text; visual] and its mask [batch, 1, 1, S], True where to look.
        ids_at: `flat_places` where ids are no padding; given, padding is not computed and its memory is zeros.
        """
        # Token o of a grid has the row vocab - 1 - o. One lookup, for its gradient is as large as the table.
        rows = self.config.vocab_size - 1 - torch.arange(features.size(2), device=ids.device)
        words, rows = self.embed(torch.cat([ids.flatten(), rows])).split([ids.numel(), len(rows)])
        text = self.encoder.embed(words.view(*ids.shape, -1), torch.arange(ids.size(1), device=ids.device))
        visual = self.visual(features, rows)                                                # [batch, V, d_model]
        prompt = text.size(1) - ids.size(1)
        mask = F.pad(ids != self.config.pad, (prompt, visual.size(1)), value=True)          # [batch, S]
        at = None
        if ids_at is not None:
            all_places = torch.arange(mask.numel(), device=ids.device).view_as(mask)
            before, asked, behind = all_places.split([prompt, ids.size(1), visual.size(1)], 1)
            at = torch.cat([before.flatten(), asked.flatten().index_select(0, ids_at), behind.flatten()])
        mask, position = mask[:, None, None], torch.arange(text.size(1), device=ids.device)     # the prompt counts
        bias = self.encoder.positions.bias(mask, position, position)
        return self.encoder(torch.cat([text, visual], 1), bias, at=at), mask

    def embed(self, ids):
        """Word embeddings [..., d_model] in the precision of what is trained."""
        return self.words(ids).to(self.visual.picture.weight.dtype)

    def decode(self, ids, memory, memory_mask, cache=None, at=None):
        """Answer ids so far [rows, T] to hidden states [rows, T, d_model].

        With a cache, ids are those at `cache.step`. at: places of the flat ids; given, the others are zeros.
        """
        keys = torch.arange(ids.size(1) if cache is None else cache.max_length, device=ids.device)
        queries = keys if cache is None else cache.step
        mask = (keys <= queries[:, None])[None, None]                                       # [1, 1, T, keys]
        x = self.decoder.embed(self.embed(ids), queries)
        return self.decoder(x, self.decoder.positions.bias(mask, queries, keys), memory, memory_mask, cache, at)

    def logits(self, hidden):
        """[..., d_model] to [..., vocab]. The bias makes them float32 under autocast, too: one pass over them, not two."""
        return F.linear(hidden * self.config.head_scale, self.words.weight) + self.logits_bias

    def hidden(self, ids, features, labels, ids_at=None, labels_at=None):
        """The decoder's hidden states [batch, L, d_model] for labels [batch, L], which are -100 behind their end."""
        memory, mask = self.encode(ids, features, ids_at)
        inputs = labels.masked_fill(labels == -100, self.config.pad).roll(1, 1)
        inputs[:, 0] = self.config.start
        return self.decode(inputs, memory, mask, at=labels_at)

    def forward(self, ids, features, labels):
        """Logits [batch, L, vocab]."""
        return self.logits(self.hidden(ids, features, labels))

    def loss(self, ids, features, labels, weights, ids_at=None, labels_at=None):
        """Mean over the batch of weight x mean cross entropy over the tokens of the answer.

        weights [batch]: VQA's is the score of the drawn answer; a token mean over the whole batch, as for captions, is
        the weight (tokens of the answer) x batch / (tokens of the batch); a row that only fills up the batch has 0.
        ids_at, labels_at: `flat_places` where ids are no padding and labels not -100; the rest is not computed.
        """
        ids_at = flat_places(ids != self.config.pad) if ids_at is None else ids_at
        labels_at = flat_places(labels != -100) if labels_at is None else labels_at
        hidden = self.hidden(ids, features, labels, ids_at, labels_at).flatten(0, 1).index_select(0, labels_at)
        tokens = F.cross_entropy(self.logits(hidden).float(), labels.flatten()[labels_at], reduction="none")
        sums = tokens.new_zeros(len(labels)).index_add(0, labels_at // labels.size(1), tokens)
        return (weights * sums / (labels != -100).sum(1).clamp(min=1)).mean()


def start(module: nn.Module, embedding_std: float):
    """Starting values of what no weight file brings: N(0, 0.02) or N(0, embedding_std), zero biases (as BART's own)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=embedding_std if isinstance(module, nn.Embedding) else 0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# ---- speaking -----------------------------------------------------------------------------------------------------


class Cache:
    """What the decoder's attentions remember while `generate` runs; shapes stay the same from step to step.

    Keys and values of the memory are made once an example and serve all its beams; those of the words have room for
    max_length words and are filled at `step`, a tensor [1].
    """

    def __init__(self, decoder: Stack, memory, mask, max_length: int):
        self.max_length, self.step = max_length, torch.zeros(1, dtype=torch.long, device=memory.device)
        self.mask, self.layers = mask, []
        for layer in decoder.layers:
            keys, values = layer.cross_attn.inner.keys_values(memory, Packing(memory))      # [batch, heads, S, head_dim]
            room = [keys.new_zeros(len(keys), keys.size(1), max_length, keys.size(-1)) for _ in range(2)]
            # Contiguous as what `reorder` leaves: one layout, one graph.
            self.layers.append((Kept(room, self.step), Kept([keys.contiguous(), values.contiguous()])))

    def reorder(self, rows, examples=None):
        """Row i becomes what row rows[i] was. With `examples` only these stay."""
        for words, memory in self.layers:
            words.kept = [x.index_select(0, rows) for x in words.kept]
            if examples is not None:
                memory.kept = [x.index_select(0, examples) for x in memory.kept]
        self.mask = self.mask if examples is None else self.mask.index_select(0, examples)


class Kept:
    """Keys and values, [rows, heads, S, head_dim] each; with a step, a call adds those of x at this place."""

    def __init__(self, kept: list, step=None):
        self.kept, self.step = kept, step

    def __call__(self, attention, x, packing):
        if self.step is not None:
            for kept, new in zip(self.kept, attention.keys_values(x, packing)):
                kept.index_copy_(2, self.step, new.to(kept.dtype))
        return self.kept


@torch.no_grad()
def generate(model: Model, ids, features, beams: int = 1, max_length: int = 20, decode: Callable | None = None):
    """Answers as token ids [batch, <= max_length]: start token first, `end` where one ended, padded behind.

    One beam is greedy search, more is beam search with the rules of transformers 4.2.1, which the paper used. What the
    backbone's config asks for (forced tokens, no repeated n-grams, early stopping, length penalty) is honoured.
    ids and features as for `Model.encode`; max_length counts the start token; decode: a compiled `model.decode`.
    """
    decode = decode or model.decode
    memory, mask = model.encode(ids, features, flat_places(ids != model.config.pad))
    cache = Cache(model.decoder, memory, mask, max_length)

    def next_logits(words):                                                                 # [rows, t] -> [rows, vocab]
        cache.step.fill_(words.size(1) - 1)
        logits = model.logits(decode(words[:, -1:].contiguous(), memory, cache.mask, cache)[:, 0]).float()
        return force(model.config, logits, words.size(1), max_length)

    if beams == 1:
        return greedy_search(model.config, next_logits, ids, max_length, cache.reorder)
    return beam_search(model.config, next_logits, ids, beams, max_length, cache.reorder)


def force(config: Config, logits, length: int, max_length: int):
    """Leaves only the forced token where the config forces one: behind the start token, or as the last."""
    forced = config.forced_first if length == 1 else config.forced_last if length == max_length - 1 else None
    if forced is None:
        return logits
    only = torch.full_like(logits, -torch.inf)
    only[:, forced] = logits[:, forced]
    return only


def ban_repeats(scores, words, n: int):
    """-inf for each word of `scores` [rows, vocab] that would end an n-gram which `words` [rows, t] already has."""
    if n == 0 or words.size(1) < n:
        return scores
    grams = words.unfold(1, n, 1)                                                           # [rows, t - n + 1, n]
    repeats = (grams[..., :-1] == words[:, None, words.size(1) - n + 1:]).all(-1)
    penalty = torch.zeros_like(repeats, dtype=scores.dtype).masked_fill(repeats, -torch.inf)
    return scores.scatter_add(1, grams[..., -1], penalty)


def greedy_search(config: Config, next_logits, ids, max_length: int, reorder):
    said = torch.full((len(ids), max_length), config.pad, device=ids.device)
    here = torch.arange(len(ids), device=ids.device)                    # rows of the examples still searched
    words = torch.full((len(ids), 1), config.start, device=ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while words.size(1) < max_length and len(here):
        best = ban_repeats(next_logits(words), words, config.no_repeat_ngram).argmax(-1)
        words = torch.cat([words, best.masked_fill(ended, config.pad)[:, None]], 1)
        ended |= best == config.end
        if half(ended):
            said[here[ended], :words.size(1)] = words[ended]
            stay = (~ended).nonzero()[:, 0]
            here, words, ended = here[stay], words[stay], ended[stay]
            reorder(stay, stay)
    said[here, :words.size(1)] = words
    return said[:, :words.size(1)]


def half(done) -> bool:
    """Whether it is time for those that are done to leave: to copy what stays has a price, too."""
    return 2 * int(done.sum()) >= len(done)


def top(x, count: int, block: int = 64):
    """`topk` of the rows of x, or all where there are fewer; on a vocabulary four times as fast, on a CPU.

    The best lie in the blocks with the best maxima, or in what no block holds.
    """
    whole = x.size(1) // block * block
    if whole < count * block:
        return x.topk(min(count, x.size(1)))
    blocks = x[:, :whole].unflatten(1, (-1, block)).amax(2).topk(count).indices             # [rows, count]
    here = (block * blocks[..., None] + torch.arange(block, device=x.device)).flatten(1)    # [rows, count x block]
    here = torch.cat([here, torch.arange(whole, x.size(1), device=x.device).expand(len(x), -1)], 1)
    best, index = x.gather(1, here).topk(count)
    return best, here.gather(1, index)


def beam_search(config: Config, next_logits, ids, beams: int, max_length: int, reorder):
    """Per example `beams` open hypotheses with their sums of log-probabilities, and the `beams` best closed ones.

    The search begins with one open hypothesis. Of the 2 x beams best continuations an end among the first `beams` closes
    a hypothesis, other ends are dropped, the rest stays open. Closed scores are sum / length ** penalty; the length
    counts the start token, not the end.
    """
    batch, device = len(ids), ids.device
    words = torch.full((batch, 1, 1), config.start, device=device)                          # [batch, open, length]
    sums = torch.zeros(batch, 1, device=device)
    closed = torch.full((batch, beams, max_length), config.pad, device=device)
    scores = torch.full((batch, beams), -torch.inf, device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    said, here = closed[:, 0].clone(), torch.arange(batch, device=device)                   # examples still searched

    def close(new_words, new_scores):
        """The best of the closed and the new hypotheses, where the search is not done."""
        padded = F.pad(new_words, (0, max_length - new_words.size(2)), value=config.pad)
        best, index = torch.cat([scores, new_scores.masked_fill(done[:, None], -torch.inf)], 1).topk(beams)
        return torch.cat([closed, padded], 1).gather(1, index[..., None].expand(-1, -1, max_length)), best

    def say(rows):
        """The best hypotheses of these rows are the answers."""
        best = scores[rows].argmax(1)[:, None, None].expand(-1, -1, max_length)
        said[here[rows]] = closed[rows].gather(1, best)[:, 0]

    while words.size(2) < max_length and len(here):
        batch, many, length = words.shape
        logs = ban_repeats(next_logits(words.flatten(0, 1)).log_softmax(-1), words.flatten(0, 1), config.no_repeat_ngram)
        best, word = top(logs, 2 * beams)                                                   # [batch x open, 2 beams]
        each, best = best.size(1), best.view(batch, many, -1) + sums[..., None]
        best, index = top(best.flatten(1), 2 * beams)                                       # [batch, 2 beams]
        beam, word = index // each, word.view(batch, -1).gather(1, index)
        longer = torch.cat([words.gather(1, beam[..., None].expand(-1, -1, length)), word[..., None]], 2)

        ends = word == config.end
        closing = best / length ** config.length_penalty
        hopeful = closing[:, 0]                                                             # no open one can end better
        closed, scores = close(longer[:, :beams], closing[:, :beams].masked_fill(~ends[:, :beams], -torch.inf))
        worst = scores.min(1).values
        done |= worst.isfinite() & (torch.ones_like(done) if config.early_stopping else worst >= hopeful)

        sums, keep = top(best.masked_fill(ends, -torch.inf), beams)                         # best first, as they were
        words = longer.gather(1, keep[..., None].expand(-1, -1, length + 1))
        rows, stay = torch.arange(0, batch * many, many, device=device)[:, None] + beam.gather(1, keep), None
        if half(done):
            say(done)
            stay = (~done).nonzero()[:, 0]
            words, sums, closed, scores, done, here, rows = (
                x[stay] for x in (words, sums, closed, scores, done, here, rows))
        reorder(rows.flatten(), stay)

    closed, scores = close(words, sums / words.size(2) ** config.length_penalty)
    say(slice(None))
    return said[:, :1 + int(((said != config.pad) * torch.arange(max_length, device=device)).max())]


# ---- weights ------------------------------------------------------------------------------------------------------

# Ours -> theirs. {stack} is encoder or decoder, {i} a layer, {ffn} its last sub-layer's number, {x} q, k or v, * weight
# or bias. A tuple names copies of one tensor.
BART = {
    "words.weight":                           ("model.shared.weight", "model.encoder.embed_tokens.weight",
                                               "model.decoder.embed_tokens.weight", "lm_head.weight"),
    "logits_bias":                            "final_logits_bias",
    "{stack}.positions.weight":               "model.{stack}.embed_positions.weight",
    "{stack}.embed_norm.*":                   "model.{stack}.layernorm_embedding.*",
    "{stack}.layers.{i}.self_attn.inner.{x}.*": "model.{stack}.layers.{i}.self_attn.{x}_proj.*",
    "{stack}.layers.{i}.self_attn.inner.out.*": "model.{stack}.layers.{i}.self_attn.out_proj.*",
    "{stack}.layers.{i}.self_attn.norm.*":    "model.{stack}.layers.{i}.self_attn_layer_norm.*",
    "decoder.layers.{i}.cross_attn.inner.{x}.*": "model.decoder.layers.{i}.encoder_attn.{x}_proj.*",
    "decoder.layers.{i}.cross_attn.inner.out.*": "model.decoder.layers.{i}.encoder_attn.out_proj.*",
    "decoder.layers.{i}.cross_attn.norm.*":   "model.decoder.layers.{i}.encoder_attn_layer_norm.*",
    "{stack}.layers.{i}.ffn.inner.up.*":      "model.{stack}.layers.{i}.fc1.*",
    "{stack}.layers.{i}.ffn.inner.down.*":    "model.{stack}.layers.{i}.fc2.*",
    "{stack}.layers.{i}.ffn.norm.*":          "model.{stack}.layers.{i}.final_layer_norm.*",
}
T5 = {
    "words.weight": ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    "logits_bias":                            "lm_head.bias",        # not in Google's files
    "{stack}.positions.weight":               "{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "{stack}.layers.{i}.self_attn.inner.{x}.weight": "{stack}.block.{i}.layer.0.SelfAttention.{x}.weight",
    "{stack}.layers.{i}.self_attn.inner.out.weight": "{stack}.block.{i}.layer.0.SelfAttention.o.weight",
    "{stack}.layers.{i}.self_attn.norm.weight": "{stack}.block.{i}.layer.0.layer_norm.weight",
    "decoder.layers.{i}.cross_attn.inner.{x}.weight": "decoder.block.{i}.layer.1.EncDecAttention.{x}.weight",
    "decoder.layers.{i}.cross_attn.inner.out.weight": "decoder.block.{i}.layer.1.EncDecAttention.o.weight",
    "decoder.layers.{i}.cross_attn.norm.weight": "decoder.block.{i}.layer.1.layer_norm.weight",
    "{stack}.layers.{i}.ffn.inner.up.weight": "{stack}.block.{i}.layer.{ffn}.DenseReluDense.wi.weight",
    "{stack}.layers.{i}.ffn.inner.down.weight": "{stack}.block.{i}.layer.{ffn}.DenseReluDense.wo.weight",
    "{stack}.layers.{i}.ffn.norm.weight":     "{stack}.block.{i}.layer.{ffn}.layer_norm.weight",
    "{stack}.final_norm.weight":              "{stack}.final_layer_norm.weight",
}
FAMILIES = {"bart": (bart, BART), "t5": (t5, T5)}        # model_type of config.json -> preset, weight names
LEFT_OVER = ".version", "EncDecAttention.relative_attention_bias.weight"    # in old files of BART and T5, of no use


def load_backbone(folder: str | Path, feature_dim: int, words: int) -> Model:
    """The model, with `words` words, from a folder as Hugging Face lays it out; visual part and added words are new.

    Reads config.json, generation_config.json if there, and model.safetensors or pytorch_model.bin. Raises WeightsError.
    """
    folder = Path(folder)
    asked = read_json(folder / "config.json")
    if (folder / "generation_config.json").exists():
        asked |= read_json(folder / "generation_config.json")
    if asked.get("model_type") not in FAMILIES:
        raise WeightsError(f"{folder / 'config.json'}: model_type is {asked.get('model_type')!r}, "
                           f"expected one of {', '.join(FAMILIES)}")
    preset, table = FAMILIES[asked["model_type"]]
    try:
        model = Model(preset(asked, feature_dim, words))
    except (WeightsError, TypeError, ValueError, RuntimeError) as problem:
        raise WeightsError(f"{folder / 'config.json'}: {problem}") from None
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            load(model, read_weights(folder / name), table, folder / name)
            return model
    raise WeightsError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")


def load(model: Model, weights: dict, table: dict, source="the weights"):
    """Copies raw weights into the model; strict both ways: each tensor of either side is used exactly once.

    Only the word table and its bias have fewer rows than ours, which has added words. Changes `weights`.
    """
    if table is BART and not any(name.startswith("model.") for name in weights):
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}             # saved without its head
    expected = expand(table, model.config)
    ours = {name: x for name, x in model.state_dict().items() if not name.startswith("visual.")}
    assert set(ours) == set(expected), set(ours) ^ set(expected)
    problems = []
    for name, theirs in expected.items():
        copies = [weights.pop(alias) for alias in theirs if alias in weights]
        target = ours[name][:model.config.loaded_words if name in ("words.weight", "logits_bias") else None]
        if not copies and name != "logits_bias":                        # a checkpoint without a head has no bias: zeros
            problems.append(f"no {theirs[0]}")
        for tensor in copies:
            tensor = tensor.reshape(-1) if name == "logits_bias" else tensor                # stored as [1, vocab]
            if tensor.shape != target.shape:
                problems.append(f"{theirs[0]} is {list(tensor.shape)}, expected {list(target.shape)}")
            elif tensor is not copies[0] and not torch.equal(tensor.reshape(-1), copies[0].reshape(-1)):
                problems.append(f"{' and '.join(theirs)} are not the same table")
            else:
                target.copy_(tensor)
    problems += [f"unknown {name}" for name in weights if not name.endswith(LEFT_OVER)]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise WeightsError(f"{source} does not fit its config.json: {'; '.join(problems[:4])}{more}")


def expand(table: dict, config: Config) -> dict[str, tuple[str, ...]]:
    """The table with its gaps filled: our name -> their names."""
    stacks = ("encoder", config.encoder_layers, 1), ("decoder", config.decoder_layers, 2)
    gaps = [dict(stack=stack, i=i, ffn=ffn, x=x, kind=kind) for stack, layers, ffn in stacks for i in range(layers)
            for x in "qkv" for kind in ("weight", "bias")]
    fill = lambda name, gap: name.replace("*", "{kind}").format(**gap)
    return {fill(ours, gap): tuple(fill(name, gap) for name in ([theirs] if isinstance(theirs, str) else theirs))
            for ours, theirs in table.items() for gap in gaps
            if gap["stack"] == "decoder" or not ours.startswith("decoder")}


def load_clip(path: str | Path) -> CLIPResNet:
    """CLIP's picture encoder from OpenAI's file (RN50.pt, RN101.pt, RN50x4.pt, ...), sizes read off the weights.

    The text half of the file is left aside. In eval mode, float32. Raises WeightsError.
    """
    weights = {name.removeprefix("visual."): tensor.float() for name, tensor in read_weights(path).items()
               if name.startswith("visual.")}
    try:
        layers = tuple(len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")})
                       for stage in (1, 2, 3, 4))
        side = int((len(weights["attnpool.positional_embedding"]) - 1) ** 0.5)
        encoder = CLIPResNet(layers, len(weights["conv3.weight"]), side, len(weights["attnpool.c_proj.weight"]))
        encoder.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise WeightsError(f"{path}: not a CLIP with a ResNet (RN50, RN101, RN50x4, ...): {reason}") from None
    return encoder.eval()


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing") from None
    except (ValueError, RecursionError) as problem:
        raise WeightsError(f"{path} is not JSON: {problem}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return content


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file by name, on the CPU, in the stored precision.

    Reads safetensors, PyTorch's .bin (zipped or old) and TorchScript archives such as OpenAI's CLIP, told apart by
    content. A file is data: nothing in it is ever executed. Raises WeightsError in one sentence.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":
            return read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if any(name.endswith("/constants.pkl") for name in names):
                    return read_torchscript(archive, names[0].split("/")[0])
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(weights, dict) or not all(isinstance(x, torch.Tensor) for x in weights.values()):
            raise ValueError("expected a dictionary of tensors")
        return dict(weights)
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing") from None
    except Exception as problem:                # whatever a broken or hostile file provokes in three parsers
        reason = " ".join(str(problem).split())[:160] or type(problem).__name__
        raise WeightsError(f"{path} is truncated or not a weight file: {reason}") from None


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """8 bytes of header length, a JSON header {name: dtype, shape, data_offsets}, then the data without holes."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
              "BOOL": torch.bool}
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"its header should have {length} bytes, the file has {size}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data, weights, reached = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + length:], {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != reached or not begin <= end <= len(data) or min(entry["shape"], default=0) < 0:
            raise ValueError(f"{name} should lie at bytes {begin} to {end} of {len(data)}, after {reached}")
        weights[name] = data[begin:end].clone().view(dtypes[entry["dtype"]]).reshape(entry["shape"])
        reached = end
    if reached != len(data):
        raise ValueError(f"{len(data) - reached} bytes belong to no tensor")
    return weights


class Inert:
    """Stands in for every class of a TorchScript archive: keeps what it is given and does nothing."""

    def __setstate__(self, state):
        self.__dict__.update(state)


def read_torchscript(archive: zipfile.ZipFile, root: str) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a TorchScript archive, by their state_dict names.

    Its data.pkl may name three things: tensors to rebuild, their storages, and classes, which become `Inert`. Anything
    else is refused, and the code/ of the archive is not even opened.
    """
    def rebuild(storage, offset, size, stride, *_):
        return torch.as_strided(storage, size, stride, offset)          # raises beyond the end of the storage

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return rebuild
            if module == "torch" and name.endswith("Storage"):
                return name.removesuffix("Storage").lower()             # a word: which numbers the storage holds
            if module == "torch.jit._pickle" and name.startswith("build_"):
                return list
            if module.startswith("__torch__"):
                return type(name, (Inert,), {})
            raise ValueError(f"it asks for {module}.{name}, which no weight file needs")

        def persistent_load(self, pid):
            _, kind, key, _, count = pid
            dtype = {"byte": torch.uint8, "bool": torch.bool}.get(kind) or getattr(torch, kind)
            raw = torch.frombuffer(bytearray(archive.read(f"{root}/data/{key}")), dtype=torch.uint8).view(dtype)
            if len(raw) != count:
                raise ValueError(f"storage {key} has {len(raw)} numbers, expected {count}")
            return raw

    def collect(module, prefix=""):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            elif isinstance(value, Inert):
                yield from collect(value, f"{prefix}{name}.")

    with archive.open(f"{root}/data.pkl") as file:
        return dict(collect(Reader(file).load()))
