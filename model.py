"""The joint vision-and-language model of VL-Adapter: CLIP sees, BART or T5 reads and answers.

    picture -> CLIPResNet -> 7x7 grid -> pool -> 36 visual tokens --+
                                                                    +-> encoder -> decoder -> answer
    question -> embed_tokens ---------------------------------------+

What departs from the BART and T5 you know: one Stack serves both families, encoder and decoder;
visual tokens follow the text in the encoder; behind each sub-layer is a Site, empty until
adapters.py fills it; padding is known by its id (you pass no mask) and left out of all but
attention.

adapters.py knows a few names: `adapter` behind a sub-layer, `prompt` where text enters a stack,
`new_parts`, `new_rows`, `dropout_class`, and `logits_bias`, a buffer that BitFit trains on T5.

Paper: https://arxiv.org/abs/2112.06825, section 3. original: FILE#L is
https://github.com/ylsung/VL_adapter/blob/545fcbb/VL-T5/src/FILE#L.
It needs torch alone. Without features it is BART or T5:

    model = load_backbone("bart-base").eval()  # a folder as Hugging Face lays it out
    model.answer(ids, beams=5)  # token ids in, token ids out
"""

import io
import json
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

ADDED_TOKENS = 200  # <extra_id_*> and <vis_extra_id_*>, the vocabulary's last
VISUAL_SIDE = 6  # grids are pooled to 6 x 6 visual tokens (section 4.1: 36)
IMAGE_SIZE = 224  # pixels of a side, whatever CLIP was trained on


class WeightsError(ValueError):
    """A weight file or its config.json cannot be used."""


@dataclass(frozen=True)
class Config:
    """What the model is made of and how it searches; see `bart` and `t5`."""
    vocab_size: int  # added tokens included
    d_model: int
    heads: int
    d_ff: int
    encoder_layers: int
    decoder_layers: int
    max_positions: int | None  # of a text; None: any
    feature_dim: int  # of a visual feature
    dropout: float
    decoder_start: int
    pad: int
    eos: int
    # Of the search.
    forced_bos: int | None = None
    forced_eos: int | None = None
    no_repeat_ngram: int = 0
    early_stopping: bool = False
    length_penalty: float = 1.0
    loaded_vocab: int | None = None  # rows a weight file brings; None: all
    # What makes a family; the defaults are BART's.
    prenorm: bool = False  # norms before sub-layers and at the end
    norm: Callable = partial(nn.LayerNorm, eps=1e-5)
    bias: bool = True  # of the language part's Linears
    head_dim: int | None = None  # None: d_model / heads
    score_scale: float | None = None  # of q k before the softmax; None: head_dim ** -0.5
    activation: Callable = F.gelu
    head_scale: float = 1.0  # of the hidden state before the head
    embedding_std: float = 0.02  # of the rows that no weight file brings
    buckets: int | None = None  # rows of RelativePositions; None: LearnedPositions
    max_distance: int | None = None  # from here on all share a bucket


# ---- the joint model ----


class VLModel(nn.Module):
    """Encoder, decoder, head and the visual tokens' places share embed_tokens."""

    new_parts = ("visual",)  # no weight file brings them: always trained

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dropout_class = Dropout  # what adapters.py gives LoRA
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.visual = VisualTokens(config)
        self.encoder = Stack(config, config.encoder_layers, cross=False)
        self.decoder = Stack(config, config.decoder_layers, cross=True)
        self.register_buffer("logits_bias", torch.zeros(config.vocab_size))
        self.apply(partial(init_weights, embedding_std=config.embedding_std))

    @property
    def new_rows(self) -> dict[str, int]:
        """{table: number of its last rows, random and frozen, that are saved as drawn}."""
        total = self.config.vocab_size
        added = total - (self.config.loaded_vocab or total)
        return {"embed_tokens.weight": added} if added else {}

    def encode(self, ids, features=None, text_indices=None):
        """Memory [batch, S, d_model] of [prompt; text; visual] and its mask [batch, 1, 1, S].

        ids [batch, T], padded right; features [batch, pictures, tokens, feature_dim], None: text
        alone. V = pictures x tokens, S = prompt + T + V. Where the mask is False memory is zeros.
        text_indices: `token_indices(ids != pad)`.
        """
        if text_indices is None:
            text_indices = token_indices(ids != self.config.pad)
        if features is None:
            features = ids.new_zeros(len(ids), 0, 0, self.config.feature_dim)

        # Visual token o is told its place by row vocab_size - 1 - o of embed_tokens, the added
        # <vis_extra_id_o>: so VL-T5's pre-training numbers objects.
        # original: modeling_bart.py#L177
        order = self.config.vocab_size - 1 - torch.arange(features.size(2), device=ids.device)

        # One look-up for both: its gradient is as large as the table.
        rows = self.embed(torch.cat([ids.flatten(), order]))
        text, places = rows.split([ids.numel(), len(order)])  # both [..., d_model]
        text = text.view(*ids.shape, -1)  # [batch, T, d_model]
        text = self.encoder.embed(text, torch.arange(ids.size(1), device=ids.device))
        visual = self.visual(features, places)  # [batch, V, d_model]

        # All but the text's padding is looked at and computed.
        prompt = text.size(1) - ids.size(1)
        mask = F.pad(ids != self.config.pad, (prompt, visual.size(1)), value=True)[:, None, None]
        indices = joint_indices(text_indices, len(ids), prompt, ids.size(1), visual.size(1))

        # Visual tokens have no relative positions.
        # original: modeling_t5.py#L303
        positions = torch.arange(text.size(1), device=ids.device)
        bias = self.encoder.positions.bias(mask, positions, positions)
        return self.encoder(torch.cat([text, visual], 1), bias, indices=indices), mask

    def embed(self, ids):
        """Rows of embed_tokens, bfloat16 or not, in the precision of what is trained."""
        return self.embed_tokens(ids).to(self.visual.image_order.weight.dtype)

    def decode(self, ids, memory, memory_mask, cache=None, label_indices=None):
        """Hidden states [rows, T, d_model] of ids [rows, T].

        With a DecoderCache T is 1, its step, and memory may be None. label_indices: which of the
        flat ids are computed, the others are zeros; None: all.
        """
        keys = torch.arange(ids.size(1) if cache is None else cache.max_length, device=ids.device)
        queries = keys if cache is None else cache.step
        mask = (keys <= queries[:, None])[None, None]  # [1, 1, T, keys]
        bias = self.decoder.positions.bias(mask, queries, keys)
        x = self.decoder.embed(self.embed(ids), queries)
        return self.decoder(x, bias, memory, memory_mask, cache, label_indices)

    def decode_labels(self, ids, features, labels, text_indices=None, label_indices=None):
        """Hidden states [batch, L, d_model] that tell labels [batch, L], -100 behind eos.

        label_indices: `token_indices(labels != -100)`; the other hidden states are zeros.
        """
        if label_indices is None:
            label_indices = token_indices(labels != -100)
        memory, mask = self.encode(ids, features, text_indices)
        shifted = labels.masked_fill(labels == -100, self.config.pad).roll(1, 1)
        shifted[:, 0] = self.config.decoder_start
        return self.decode(shifted, memory, mask, label_indices=label_indices)

    def logits(self, hidden):
        """[..., d_model] to [..., vocab_size], under autocast in the bias's precision."""
        hidden = hidden * self.config.head_scale
        return F.linear(hidden, self.embed_tokens.weight) + self.logits_bias

    def forward(self, ids, features, labels):
        """Logits [batch, L, vocab_size], meaningless where labels are -100."""
        return self.logits(self.decode_labels(ids, features, labels))

    def loss(self, ids, features, labels, weights=None, text_indices=None, label_indices=None):
        """Mean over the batch of weight x mean cross entropy over the tokens of the answer.

        weights [batch], None: ones. VQA's is the drawn answer's score, a caption's
        tokens x batch / (tokens of the batch), that of a row that only fills up 0.
        original: vqa_model.py#L76
        """
        if label_indices is None:
            label_indices = token_indices(labels != -100)
        hidden = self.decode_labels(ids, features, labels, text_indices, label_indices)

        # The head, the widest layer, sees the tokens of the answers alone.
        hidden = hidden.flatten(0, 1).index_select(0, label_indices)  # [tokens, d_model]
        logits = self.logits(hidden).float()  # [tokens, vocab_size]
        losses = F.cross_entropy(logits, labels.flatten()[label_indices], reduction="none")

        # Token i of the flat labels belongs to answer i // L.
        sums = losses.new_zeros(len(labels)).index_add(0, label_indices // labels.size(1), losses)
        sums = sums if weights is None else weights * sums
        return (sums / (labels != -100).sum(1).clamp(min=1)).mean()

    def answer(self, ids, features=None, beams=1, choices=None, max_length=20, decode=None):
        """Answers as token ids [batch, <= max_length]: decoder_start first, `pad` behind eos.

        ids, features: see `encode`. choices: see `choose`; None: `generate`. decode: a compiled
        `model.decode`. No gradients.
        """
        if choices is not None:
            return choose(self, ids, features, choices)
        return generate(self, ids, features, beams, max_length, decode)


def init_weights(module, embedding_std):
    """What no weight file brings."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=embedding_std)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class VisualTokens(nn.Module):
    """Visual features to tokens of the encoder (section 3.1).

    N(W f + b) + N(W' box + b') + image_order + object_order, with the language part's norm N.
    A grid has no boxes: the original feeds zeros; the second term is one learned vector.
    image_order tells NLVR2's two pictures apart; object_order, the place in the grid, is rows of
    embed_tokens. (feature_dim + 13) d_model weights, 1,582,848 for RN101 and BART-base; T5's
    norms have 2 d_model fewer.
    original: modeling_bart.py#L142
    """

    def __init__(self, config: Config):
        super().__init__()
        self.feature = nn.Linear(config.feature_dim, config.d_model)
        self.feature_norm = config.norm(config.d_model)
        self.box = nn.Linear(5, config.d_model)
        self.box_norm = config.norm(config.d_model)
        self.image_order = nn.Embedding(2, config.d_model)

    def forward(self, features, object_order):
        """[batch, pictures, tokens, feature_dim], [tokens, d_model] to [batch, V, d_model]."""
        image_order = self.image_order.weight[:features.size(1), None]  # [pictures, 1, d_model]
        features = features.to(self.feature.weight.dtype)
        box = self.box(features.new_zeros(5))
        # Norms need float32; autocast knows so of LayerNorm, not of RMSNorm.
        feature = self.feature_norm(self.feature(features).to(image_order.dtype))
        box = self.box_norm(box.to(image_order.dtype))
        return (feature + box + image_order + object_order).flatten(1, 2)


# ---- the transformer ----
# Inside a stack `x` is [tokens, d_model], see `Unpad`, without indices [rows, T, d_model].
# An adapter is shown what is added to the residual.
# original: my_transformers/modeling_bart.py#L485


class Stack(nn.Module):
    """The encoder or, with cross-attention, the decoder."""

    def __init__(self, config: Config, layers: int, cross: bool):
        super().__init__()
        positions = LearnedPositions if config.buckets is None else RelativePositions
        self.positions = positions(config, causal=cross)
        self.prompt = nn.Identity()
        norm = config.norm(config.d_model)
        self.embed_norm = nn.Identity() if config.prenorm else norm
        self.final_norm = norm if config.prenorm else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.final_dropout = Dropout(config.dropout if config.prenorm else 0.0)
        self.layers = nn.ModuleList(Layer(config, cross) for _ in range(layers))
        self.recompute = False  # True: checkpoint each layer, slower with less memory

    def embed(self, text, positions):
        """Text [batch, T, d_model] at positions [T] to [batch, prompt + T, d_model]."""
        return self.embed_norm(self.prompt(self.positions.add(text, positions)))

    def forward(self, x, mask, memory=None, memory_mask=None, cache=None, indices=None):
        """x [batch, length, d_model] to hidden states of that shape; indices: see `Unpad`.

        mask [batch or 1, heads or 1, length or 1, keys]: boolean, or numbers to add.
        """
        unpad = Unpad(x.shape[:2], indices)
        x = self.dropout(unpad.unpad(x))
        for i, layer in enumerate(self.layers):
            if self.recompute and self.training:
                layer = partial(checkpoint, layer, use_reentrant=False)
            caches = cache.layers[i] if cache else (None, None)
            x = layer(x, unpad, mask, memory, memory_mask, caches)
        return unpad.pad(self.final_dropout(self.final_norm(x)))


class Layer(nn.Module):
    """Self-attention, in the decoder cross-attention, feed-forward."""

    def __init__(self, config: Config, cross: bool):
        super().__init__()
        self.self_attn = Sublayer(config, SelfAttention(config))
        self.cross_attn = Sublayer(config, Attention(config)) if cross else None
        self.ffn = Sublayer(config, FeedForward(config))

    def forward(self, x, unpad, mask, memory, memory_mask, caches):
        self_cache, cross_cache = caches
        x = self.self_attn(x, unpad, mask, self_cache)
        if self.cross_attn is not None:
            x = self.cross_attn(x, unpad, memory_mask, memory, cross_cache)
        return self.ffn(x)


class Sublayer(nn.Module):
    """A residual step around `inner`; the paper's adapters sit in `adapter` (section 3.2)."""

    def __init__(self, config: Config, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.adapter = Site()
        self.dropout = Dropout(config.dropout)
        self.norm = config.norm(config.d_model)
        self.prenorm = config.prenorm

    def forward(self, x, *context):
        if self.prenorm:
            return x + self.dropout(self.adapter(self.inner(self.norm(x), *context), x))
        hidden = self.adapter(self.inner(x, *context), x)
        # Hidden states keep autocast's precision, a prenorm stack's long sums do not.
        return self.norm(x + self.dropout(hidden)).to(hidden.dtype)


class Site(nn.Module):
    """An empty place behind a sub-layer; x, its input (before T5's norm), no method here uses."""

    def forward(self, hidden, x):
        return hidden


class Attention(nn.Module):
    """Multi-head attention of x over a memory."""

    def __init__(self, config: Config):
        super().__init__()
        head_dim = config.head_dim or config.d_model // config.heads
        width = config.heads * head_dim
        self.heads = config.heads
        self.dropout = config.dropout
        self.scale = config.score_scale or head_dim ** -0.5
        linear = partial(nn.Linear, config.d_model, width, config.bias)
        self.q = linear()
        self.k = linear()
        self.v = linear()
        self.out = nn.Linear(width, config.d_model, config.bias)

    def forward(self, x, unpad, mask, memory, cache=None):
        """memory [batch, S, d_model]; cache: a KVCache that has its keys and values."""
        cache = cache or self.keys_values(memory)
        # In a search x has several rows (beams) for a row of memory: they become its queries.
        q = unpad.pad(self.q(x)).view(len(cache.k), -1, self.heads, cache.k.size(-1))
        q = q.transpose(1, 2)  # [batch, heads, T or beams, head_dim], as out
        p = self.dropout if self.training else 0.0
        out = attend(q, cache.k, cache.v, mask, p, self.scale)
        return self.out(unpad.unpad(out.transpose(1, 2).reshape(*unpad.shape, -1)))

    def keys_values(self, memory):
        k = split_heads(self.k(memory), self.heads)  # [batch, heads, S, head_dim]
        return KVCache(k, split_heads(self.v(memory), self.heads))


class SelfAttention(Attention):
    """Attention of x over itself and, with a cache, over what came before."""

    def forward(self, x, unpad, mask, cache=None):
        k = split_heads(unpad.pad(self.k(x)), self.heads)  # [batch, heads, T, head_dim]
        v = split_heads(unpad.pad(self.v(x)), self.heads)
        if cache is None:
            cache = KVCache(k, v)
        else:
            cache.update(k, v)
        return super().forward(x, unpad, mask, None, cache)


def split_heads(x, heads):
    """[batch, length, heads x head_dim] to [batch, heads, length, head_dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, config.bias)
        self.activation = config.activation
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.down(self.dropout(self.activation(self.up(x))))


class LearnedPositions(nn.Embedding):
    """Rows of a table, added to the text (BART). Rows 0 and 1 are unused."""

    def __init__(self, config: Config, causal: bool):
        super().__init__(config.max_positions + 2, config.d_model)

    def add(self, text, positions):
        return text + self(positions + 2)

    def bias(self, mask, queries, keys):
        return mask  # BART has none: the mask itself


class RelativePositions(nn.Embedding):
    """Numbers by head and distance, added to the scores of self-attention (T5, section 2.1).

    Of `count` buckets the first half, `exact`, are a distance each; from there on d is in bucket
    floor(exact + (count - exact) log(d / exact) / log(max_distance / exact)), the last for all
    beyond. An encoder has as many for the keys ahead.
    """

    def __init__(self, config: Config, causal: bool):
        super().__init__(config.buckets, config.heads)
        self.ahead = 0 if causal else config.buckets // 2  # first bucket of keys ahead
        count = self.ahead or config.buckets
        exact = count // 2
        # The formula inverted: where bucket i begins.
        growth = config.max_distance / exact
        boundaries = list(range(1, exact))
        for i in range(count - exact):
            boundaries.append(math.ceil(exact * growth ** (i / (count - exact)) - 1e-6))
        self.register_buffer("boundaries", torch.tensor(boundaries), persistent=False)
        self.dropout = config.dropout

    def add(self, text, positions):
        return text

    def bias(self, mask, queries, keys):
        """Numbers [batch or 1, heads, T, S]: -inf where mask is False, 0 with visual tokens.

        queries, keys: positions in the text.
        """
        distance = keys - queries[:, None]  # [queries, keys]
        bucket = torch.bucketize(distance.abs(), self.boundaries, right=True)
        bucket = bucket + self.ahead * (distance > 0)
        bias = self(bucket).permute(2, 0, 1)  # [heads, queries, keys]
        visual = mask.size(-1) - len(keys)  # these follow the text
        bias = torch.where(mask, F.pad(bias, (0, visual, 0, visual)), -torch.inf)
        # Else each layer's attention would cast it, and keep that for the backward pass.
        device = bias.device.type
        if torch.is_autocast_enabled(device) and not cpu_dropout(bias, self.dropout):
            bias = bias.to(torch.get_autocast_dtype(device))
        return bias


# ---- CLIP ----


class CLIPResNet(nn.Module):
    """The picture half of a CLIP with a ResNet (Radford et al. 2021): RN50, RN101, RN50x4, ...

    Unlike torchvision's ResNet it has three stem convolutions, average pools for strides and
    attention for the last pool. Names are OpenAI's.
    original: clip/model.py#L222
    """

    def __init__(self, layers: list[int], width: int, side: int, output_dim: int):
        super().__init__()
        self.feature_dim = 32 * width
        self.output_dim = output_dim
        half = width // 2
        self.conv1 = conv(3, half, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, width, 3)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(layers):
            planes = width * 2 ** stage
            first = Bottleneck(channels, planes, stride=1 if stage == 0 else 2)
            channels = 4 * planes
            others = [Bottleneck(channels, planes, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *others))
        self.attnpool = AttentionPool(side, channels, output_dim)

    def encode_images(self, pixels):
        """uint8 [B, 224, 224, 3] to visual tokens [B, 36, feature_dim]."""
        return self.see(pixels, pool)

    def encode_frames(self, pixels):
        """Frames, uint8 [T, 224, 224, 3], to visual tokens [T, output_dim]."""
        return self.see(pixels, self.attnpool)

    def see(self, pixels, pooling):
        # float16, OpenAI's choice, is ten times nearer to float32 than bfloat16.
        with torch.autocast(pixels.device.type, torch.float16, enabled=pixels.is_cuda):
            return pooling(self(normalise(pixels))).float()

    def forward(self, pictures):
        """Normalised pictures [B, 3, H, W] to the last grid [B, feature_dim, H/32, W/32]."""
        x = F.relu(self.bn1(self.conv1(pictures)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)  # [B, width, H/4, W/4]
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    """Residual block; strides are average pools."""

    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1 = conv(channels, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = conv(planes, 4 * planes, 1)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = nn.Identity()
        if stride > 1 or channels != 4 * planes:
            shortcut = conv(channels, 4 * planes, 1)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * planes))

    def forward(self, x):  # [B, channels, H, W]
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.pool(F.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))  # [B, 4 planes, H/s, W/s]
        return F.relu(out + self.downsample(self.pool(x)))


class AttentionPool(nn.Module):
    """Attention of the grid's mean over mean and grid."""

    def __init__(self, side, channels, output_dim):
        super().__init__()
        self.heads = channels // 64
        positions = torch.randn(side * side + 1, channels) / channels ** 0.5
        self.positional_embedding = nn.Parameter(positions)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, output_dim)

    def forward(self, grid):  # [B, C, H, W]
        tokens = grid.flatten(2).transpose(1, 2)  # [B, H W, C]
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)  # [B, 1 + H W, C]
        tokens = tokens + self.positions(*grid.shape[2:])
        q = split_heads(self.q_proj(tokens[:, :1]), self.heads)
        k = split_heads(self.k_proj(tokens), self.heads)
        v = split_heads(self.v_proj(tokens), self.heads)
        pooled = F.scaled_dot_product_attention(q, k, v)  # [B, heads, 1, 64]
        return self.c_proj(pooled.flatten(1))  # [B, output_dim]

    def positions(self, height, width):
        """[1 + height width, C], resized for pictures of another size."""
        mean, grid = self.positional_embedding.tensor_split([1])  # [1, C], [side^2, C]
        side = int(len(grid) ** 0.5)
        if (height, width) == (side, side):
            return self.positional_embedding
        grid = grid.T.reshape(1, -1, side, side)
        grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        return torch.cat([mean, grid.flatten(2)[0].T])


def normalise(pixels):
    """uint8 [B, H, W, 3] to [B, 3, H, W] by CLIP's mean and deviation, channels last in memory.

    original: clip/clip.py#L64
    """
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=pixels.device)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=pixels.device)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def pool(grid, side: int = VISUAL_SIDE):
    """Adaptive max pool of grids [B, C, H, W] to [B, side^2, C], row by row.

    From 7x7 to 6x6 a token is the maximum of a 2x2 window.
    original: modeling_bart.py#L413
    """
    return F.adaptive_max_pool2d(grid, side).flatten(2).transpose(1, 2)


# ---- search ----


@torch.no_grad()
def choose(model: VLModel, ids, features, choices: list[list[int]]):
    """The choice whose first differing token is likeliest, the first in a tie, as for NLVR2.

    choices: token ids as a tokenizer gives them, special tokens included.
    original: nlvr_model.py#L252
    """
    differ = (i for i, tokens in enumerate(zip(*choices)) if len(set(tokens)) > 1)
    first = next(differ, 0)  # first place where they differ
    common = ids.new_tensor([model.config.decoder_start, *choices[0][:first]])
    memory, mask = model.encode(ids, features)
    hidden = model.decode(common.expand(len(ids), -1), memory, mask)  # [batch, common, d_model]
    logits = model.logits(hidden[:, -1])  # [batch, vocab_size]
    best = logits[:, [choice[first] for choice in choices]].argmax(1)  # [batch]

    rows = [ids.new_tensor([model.config.decoder_start, *choice]) for choice in choices]
    return nn.utils.rnn.pad_sequence(rows, True, padding_value=model.config.pad)[best]


@torch.no_grad()
def generate(model: VLModel, ids, features=None, beams=1, max_length=20, decode=None):
    """Searches the likeliest answers; arguments and result as `VLModel.answer`.

    One beam is greedy search, more is beam search by the rules of transformers 4.2.1, the
    paper's. max_length counts decoder_start.
    """
    decode = decode or model.decode
    memory, mask = model.encode(ids, features)
    cache = DecoderCache(model.decoder, memory, mask, max_length)

    def next_logits(tokens):
        cache.step.fill_(tokens.size(1) - 1)
        # A copy, for compiled a view has a graph of its own, and a row of another stride, too.
        last = tokens[:, -1:].clone(memory_format=torch.contiguous_format)
        hidden = decode(last, None, cache.mask, cache)
        logits = model.logits(hidden[:, 0]).float()
        return force(model.config, logits, tokens.size(1), max_length)

    if beams == 1:
        return greedy_search(model.config, next_logits, ids, max_length, cache.select)
    return beam_search(model.config, next_logits, ids, beams, max_length, cache.select)


def greedy_search(config: Config, next_logits, ids, max_length, select):
    """Takes the likeliest token until eos.

    next_logits(tokens [rows, t]) -> [rows, vocab_size]; select: `DecoderCache.select`.
    """
    output = ids.new_full((len(ids), max_length), config.pad)
    active = torch.arange(len(ids), device=ids.device)  # examples still searched
    tokens = ids.new_full((len(ids), 1), config.decoder_start)
    done = torch.zeros_like(active, dtype=torch.bool)
    while tokens.size(1) < max_length and len(active):
        scores = ban_repeats(next_logits(tokens), tokens, config.no_repeat_ngram)
        best = scores.argmax(-1).masked_fill(done, config.pad)
        tokens = torch.cat([tokens, best[:, None]], 1)
        done |= best == config.eos
        # Those done leave once they are half: copying what stays has a price.
        if 2 * int(done.sum()) >= len(done):
            output[active[done], :tokens.size(1)] = tokens[done]
            keep = token_indices(~done)
            active, tokens, done = active[keep], tokens[keep], done[keep]
            select(keep, keep)
    output[active, :tokens.size(1)] = tokens
    return output[:, :tokens.size(1)]


def beam_search(config: Config, next_logits, ids, beams, max_length, select):
    """`beams` open hypotheses an example, by sums of log-probabilities, and as many closed.

    Of the 2 x beams best continuations an eos among the first `beams` closes a hypothesis, other
    eos are dropped, the best others stay open. A closed one scores sum / length ** length_penalty;
    the length counts decoder_start, not eos. With early_stopping `beams` closed ones are enough.
    Row i: probabilities of what follows token i; 0 is likeliest, yet 3 ends better:

    >>> table = torch.tensor([[.3, 0, .4, .3], [0, 0, 0, 0], [.6, 0, 0, .4], [0, 0, 1, 0]]).log()
    >>> config = Config(4, 8, 2, 8, 1, 1, 9, 8, 0.0, decoder_start=2, pad=1, eos=2)
    >>> beam_search(config, lambda tokens: table[tokens[:, -1]], torch.tensor([[0]]), beams=2,
    ...             max_length=5, select=lambda rows, examples: None)
    tensor([[2, 3, 2]])
    """
    batch, device = len(ids), ids.device
    tokens = ids.new_full((batch, 1, 1), config.decoder_start)  # [batch, open, t], open 1 at first
    sums = torch.zeros(batch, 1, device=device)  # [batch, open]
    closed = ids.new_full((batch, beams, max_length), config.pad)
    scores = torch.full((batch, beams), -torch.inf, device=device)  # of the closed ones
    active = torch.arange(batch, device=device)  # examples still searched
    done = torch.zeros_like(active, dtype=torch.bool)
    output = closed[:, 0].clone()

    def close(new_tokens, new_scores):
        """The best of the closed and the new (none where done), and their scores."""
        new_tokens = F.pad(new_tokens, (0, max_length - new_tokens.size(2)), value=config.pad)
        new_scores = new_scores.masked_fill(done[:, None], -torch.inf)
        best, index = torch.cat([scores, new_scores], 1).topk(beams)
        return torch.cat([closed, new_tokens], 1).take_along_dim(index[..., None], 1), best

    def finish(rows):
        """The best closed ones of these rows become answers."""
        best = scores[rows].argmax(1)[:, None, None]
        output[active[rows]] = closed[rows].take_along_dim(best, 1)[:, 0]

    while tokens.size(2) < max_length and len(active):
        # The best continuations of a hypothesis, then of an example.
        batch, open_beams, length = tokens.shape
        rows = tokens.flatten(0, 1)  # [batch x open, t]
        logs = next_logits(rows).log_softmax(-1)  # [batch x open, vocab_size]
        logs = ban_repeats(logs, rows, config.no_repeat_ngram)
        candidates = min(2 * beams, logs.size(1))
        best, token = logs.topk(candidates)  # [batch x open, candidates]
        best = (best.view(batch, open_beams, -1) + sums[..., None]).flatten(1)
        best, index = best.topk(min(2 * beams, best.size(1)))  # [batch, 2 beams]

        beam = index // candidates  # the hypothesis it continues
        token = token.view(batch, -1).gather(1, index)  # [batch, 2 beams]
        before = tokens.take_along_dim(beam[..., None], 1)
        longer = torch.cat([before, token[..., None]], 2)  # [batch, 2 beams, t + 1]

        # Done, as in transformers: the worst closed one beats the best candidate if cut here.
        ends = token == config.eos
        final = best / length ** config.length_penalty
        closing = final.masked_fill(~ends, -torch.inf)[:, :beams]  # [batch, beams]
        closed, scores = close(longer[:, :beams], closing)
        worst = scores.min(1).values
        enough = worst.isfinite()
        if not config.early_stopping:
            enough &= worst >= final[:, 0]
        done |= enough

        # The best others stay open.
        sums, keep = best.masked_fill(ends, -torch.inf).topk(min(beams, best.size(1)))
        tokens = longer.take_along_dim(keep[..., None], 1)
        first_rows = torch.arange(batch, device=device) * open_beams
        rows = first_rows[:, None] + beam.gather(1, keep)  # [batch, open]

        # Those done leave once they are half.
        examples = None
        if 2 * int(done.sum()) >= len(done):
            finish(done)
            examples = token_indices(~done)
            tokens, sums, rows = tokens[examples], sums[examples], rows[examples]
            closed, scores = closed[examples], scores[examples]
            active, done = active[examples], done[examples]
        select(rows.flatten(), examples)

    # What is open at max_length is closed there.
    closed, scores = close(tokens, sums / tokens.size(2) ** config.length_penalty)
    finish(slice(None))
    last = ((output != config.pad) * torch.arange(max_length, device=device)).max()
    return output[:, :1 + int(last)]


def force(config: Config, logits, length, max_length):
    """Leaves only the forced token: forced_bos as the second, forced_eos as the last."""
    forced = {max_length - 1: config.forced_eos, 1: config.forced_bos}.get(length)
    if forced is None:
        return logits
    only = torch.full_like(logits, -torch.inf)
    only[:, forced] = logits[:, forced]
    return only


def ban_repeats(scores, tokens, n):
    """Scores [rows, vocab], -inf for what would end an n-gram that is in tokens [rows, t].

    Behind 1 2 3 1 comes no second 1 2:

    >>> ban_repeats(torch.zeros(1, 5), torch.tensor([[1, 2, 3, 1]]), 2)
    tensor([[0., 0., -inf, 0., 0.]])
    """
    if n == 0 or tokens.size(1) < n:
        return scores
    grams = tokens.unfold(1, n, 1)  # [rows, t - n + 1, n]
    begun = tokens[:, None, tokens.size(1) - n + 1:]  # [rows, 1, n - 1]
    repeats = (grams[..., :-1] == begun).all(-1)  # [rows, t - n + 1]
    penalty = torch.where(repeats, -torch.inf, 0.0).to(scores.dtype)
    return scores.scatter_add(1, grams[..., -1], penalty)


class KVCache:
    """Keys and values of one attention, [rows, heads, S, head_dim] each.

    In a search self-attention's have room for all tokens, a row a hypothesis, and are filled at
    `step`, a tensor [1] that all share; cross-attention's are only read, a row an example.
    """

    def __init__(self, k, v, step=None):
        self.k, self.v, self.step = k, v, step

    def update(self, k, v):
        """One token's [rows, heads, 1, head_dim] go to `step`."""
        self.k.index_copy_(2, self.step, k.to(self.k.dtype))
        self.v.index_copy_(2, self.step, v.to(self.v.dtype))

    def select(self, rows):
        """Row i becomes what row rows[i] was."""
        self.k = self.k.index_select(0, rows)
        self.v = self.v.index_select(0, rows)


class DecoderCache:
    """Two KVCaches a layer and the memory's mask; shapes stay from step to step."""

    def __init__(self, decoder: Stack, memory, mask, max_length):
        self.max_length = max_length
        self.step = torch.zeros(1, dtype=torch.long, device=memory.device)
        self.mask = mask.clone()  # no view: compiled, it would have a graph of its own
        self.layers = []
        for layer in decoder.layers:
            cross = layer.cross_attn.inner.keys_values(memory)
            batch, heads, _, head_dim = cross.k.shape
            room = cross.k.new_zeros(batch, heads, max_length, head_dim)
            # Contiguous as `select` leaves it: one layout, one graph.
            cross = KVCache(cross.k.contiguous(), cross.v.contiguous())
            self.layers.append((KVCache(room, room.clone(), self.step), cross))

    def select(self, rows, examples=None):
        """Hypothesis i becomes what rows[i] was; only these examples stay, None: all."""
        for self_cache, cross_cache in self.layers:
            self_cache.select(rows)
            if examples is not None:
                cross_cache.select(examples)
        if examples is not None:
            self.mask = self.mask.index_select(0, examples)


# ---- what follows leaves padding out, makes it fast, and reads files; you may stop here ----


def token_indices(mask):
    """Where the flat mask is True. CUDA makes the host wait: better made with the batch.

    >>> token_indices(torch.tensor([[True, True, False], [True, False, False]]))
    tensor([0, 1, 3])
    """
    return mask.flatten().nonzero()[:, 0]


def joint_indices(text_indices, batch, prompt, length, visual):
    """Where the rows [prompt; text; visual] have tokens; two texts of 2 and 1 tokens:

    >>> joint_indices(torch.tensor([0, 1, 3]), batch=2, prompt=1, length=3, visual=1)
    tensor([0, 5, 1, 2, 6, 4, 9])
    """
    row = prompt + length + visual
    places = torch.arange(batch * row, device=text_indices.device).view(batch, row)
    before, text, behind = places.split([prompt, length, visual], 1)
    text = text.flatten().index_select(0, text_indices)
    return torch.cat([before.flatten(), text, behind.flatten()])


class Unpad:
    """Takes the padding out of a stack; only attention needs rectangles.

    shape (batch, length); indices: the tokens' places in the flat batch, None: all stays as it
    is; inverse: the token in each place, their number where none is.

    >>> x = torch.tensor([[[7.], [8.], [0.]], [[9.], [0.], [0.]]])  # [batch, length, 1]
    >>> unpad = Unpad(x.shape[:2], torch.tensor([0, 1, 3]))
    >>> unpad.inverse
    tensor([0, 1, 3, 2, 3, 3])
    >>> unpad.unpad(x).flatten()
    tensor([7., 8., 9.])
    """

    def __init__(self, shape: torch.Size, indices=None):
        self.shape, self.indices = shape, indices
        if indices is not None:
            none = indices.new_full([shape.numel()], len(indices))
            numbers = torch.arange(len(indices), device=indices.device)
            self.inverse = none.index_copy(0, indices, numbers)

    def unpad(self, x):
        """[batch, length, width] to [tokens, width]."""
        if self.indices is None:
            return x
        return gather_rows(x.flatten(0, 1), self.indices, self.inverse)

    def pad(self, x):
        """[tokens, width] to [batch, length, width], zeros between."""
        if self.indices is None:
            return x
        return gather_rows(x, self.inverse, self.indices).unflatten(0, self.shape)


class GatherRows(torch.autograd.Function):
    """x[indices] for x [n, width], zeros where an index is n; the gradient moves by `inverse`.

    >>> gather_rows(torch.tensor([[7.], [8.]]), torch.tensor([1, 2, 0]), torch.tensor([2, 0])).T
    tensor([[8., 0., 7.]])
    """

    @staticmethod
    def forward(context, x, indices, inverse):
        context.save_for_backward(indices, inverse)
        return torch.cat([x, x.new_zeros(1, x.size(1))]).index_select(0, indices)

    @staticmethod
    def backward(context, grad):
        indices, inverse = context.saved_tensors
        return gather_rows(grad, inverse, indices), None, None


gather_rows = GatherRows.apply


class Dropout(nn.Dropout):
    """nn.Dropout, but fast on a CPU."""

    def forward(self, x):
        if cpu_dropout(x, self.p if self.training else 0.0):
            return drop(x, self.p)
        return super().forward(x)


def cpu_dropout(x, p):
    """Whether `drop` is faster than PyTorch's own; compiled it is not."""
    return p > 0 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def drop(x, p):
    """Dropout with 16 random bits a number: drawing was a quarter of a step."""
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    numbers = bits.random_(-2 ** 63, None).view(torch.int16)[:x.numel()].view(x.shape)
    keep = numbers.ge_(round(p * 2 ** 16) - 2 ** 15).to(torch.int8)  # for backward: a byte each
    return (x * keep).mul_(1 / (1 - p))


def attend(q, k, v, mask, p, scale):
    """softmax(scale q k^T + mask) v with dropout p on the softmax; q [batch, heads, T, head_dim].

    The first form, with `drop`, saves 5 to 9 % of an adapter's step on a CPU.
    """
    if cpu_dropout(q, p):
        scores = scale * q @ k.transpose(-1, -2)  # [batch, heads, T, S]
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if boolean else scores + mask
        return drop(scores.softmax(-1), p) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, p, scale=scale)


def fold_norms(encoder: CLIPResNet) -> CLIPResNet:
    """Each BatchNorm joins the convolution before it; not for training."""
    for module in list(encoder.modules()):
        parts = module._modules
        for conv, norm in ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1"):
            if isinstance(parts.get(norm), nn.BatchNorm2d):
                parts[conv] = fuse_conv_bn_eval(parts[conv], parts[norm])
                parts[norm] = nn.Identity()
    return encoder


# ---- weights of BART and T5 ----


SIZE, DEPTH, ID = (1, 10 ** 6), (1, 100), (0, None)  # lowest and highest; None: the last id
# Ours, theirs, limits: whole numbers, or of the limits' kind.
FIELDS = [
    ("loaded_vocab", "vocab_size", SIZE),
    ("d_model", "d_model", SIZE),
    ("decoder_start", "decoder_start_token_id", ID),
    ("pad", "pad_token_id", ID),
    ("eos", "eos_token_id", ID),
    # None: null or missing is Config's own.
    ("forced_bos", "forced_bos_token_id", ID, None),
    ("forced_eos", "forced_eos_token_id", ID, None),
    ("no_repeat_ngram", "no_repeat_ngram_size", (0, 10 ** 6), None),
    ("early_stopping", "early_stopping", (False, True), None),
    ("length_penalty", "length_penalty", (-100.0, 100.0), None),
]
BART_FIELDS = [
    ("heads", "encoder_attention_heads", SIZE),
    ("d_ff", "encoder_ffn_dim", SIZE),
    ("encoder_layers", "encoder_layers", DEPTH),
    ("decoder_layers", "decoder_layers", DEPTH),
    ("max_positions", "max_position_embeddings", SIZE),
    ("dropout", "dropout", (0.0, 0.99)),
]
T5_FIELDS = [
    ("heads", "num_heads", SIZE),
    ("head_dim", "d_kv", SIZE),
    ("d_ff", "d_ff", SIZE),
    ("encoder_layers", "num_layers", DEPTH),
    ("decoder_layers", "num_decoder_layers", DEPTH),
    ("buckets", "relative_attention_num_buckets", (4, 10 ** 6)),
    ("max_distance", "relative_attention_max_distance", SIZE),
    ("dropout", "dropout_rate", (0.0, 0.99)),
    ("eps", "layer_norm_epsilon", (1e-15, 0.1)),
]


def bart(hf: dict, feature_dim=2048, vocab_size=None) -> Config:
    """BART's Config (Lewis et al. 2020) from config.json; vocab_size None: the file's own."""
    hf = dict(decoder_start_token_id=2, pad_token_id=1, eos_token_id=2, forced_eos_token_id=2,
              dropout=0.1) | hf
    values = read_fields(hf, BART_FIELDS, vocab_size)
    check_only(hf, activation_function="gelu", scale_embedding=False)
    if hf.get("decoder_attention_heads", values["heads"]) != values["heads"]:
        raise WeightsError("encoder_attention_heads and decoder_attention_heads differ")
    if values["d_model"] % values["heads"]:
        raise WeightsError("d_model should be a multiple of encoder_attention_heads")
    return Config(**values, feature_dim=feature_dim)


def t5(hf: dict, feature_dim=2048, vocab_size=None) -> Config:
    """T5's (Raffel et al. 2020), likewise."""
    hf = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=0.1,
              layer_norm_epsilon=1e-6, relative_attention_max_distance=128) | hf
    if hf.get("num_decoder_layers") is None:
        hf["num_decoder_layers"] = hf.get("num_layers")
    values = read_fields(hf, T5_FIELDS, vocab_size)
    check_only(hf, feed_forward_proj="relu", tie_word_embeddings=True)  # not 1.1 or Flan
    if values["max_distance"] <= values["buckets"] // 2:
        raise WeightsError("relative_attention_max_distance should be more than half of "
                           "relative_attention_num_buckets")
    return Config(norm=partial(nn.RMSNorm, eps=values.pop("eps")), **values, max_positions=None,
                  feature_dim=feature_dim, prenorm=True, bias=False, score_scale=1.0,
                  activation=F.relu, embedding_std=1.0, head_scale=values["d_model"] ** -0.5)


def read_fields(hf: dict, fields: list, vocab_size: int | None) -> dict:
    """The fields by our names, each of its kind. Errors begin with the field's name."""
    values = {}
    for ours, name, (low, high), *null in FIELDS + fields:
        value = hf.get(name)
        if null and value is None:
            continue
        high = values["loaded_vocab"] - 1 if high is None else high
        kinds = (int, float) if type(low) is float else (type(low),)  # True is no number
        if type(value) not in kinds or not low <= value <= high:
            kind = {bool: "one of", int: "a whole number from"}.get(type(low), "a number from")
            raise WeightsError(f"{name} should be {kind} {low:,} to {high:,}")
        values[ours] = type(low)(value)
    loaded = values["loaded_vocab"]
    values["vocab_size"] = loaded if vocab_size is None else vocab_size
    if not loaded <= values["vocab_size"] <= loaded + ADDED_TOKENS:
        raise WeightsError(f"vocab_size is {loaded:,}, "
                           f"the tokenizer with its added words has {vocab_size:,}")
    return values


def check_only(hf: dict, **only):
    for name, value in only.items():
        if hf.get(name, value) != value:
            raise WeightsError(f"{name} should be {json.dumps(value)}: no other model is built")


# Weights of a layer: ours, BART's, T5's.
LAYER = [
    ("self_attn.inner.{x}", "self_attn.{x}_proj", "0.SelfAttention.{x}"),
    ("self_attn.inner.out", "self_attn.out_proj", "0.SelfAttention.o"),
    ("self_attn.norm", "self_attn_layer_norm", "0.layer_norm"),
    ("cross_attn.inner.{x}", "encoder_attn.{x}_proj", "1.EncDecAttention.{x}"),
    ("cross_attn.inner.out", "encoder_attn.out_proj", "1.EncDecAttention.o"),
    ("cross_attn.norm", "encoder_attn_layer_norm", "1.layer_norm"),
    ("ffn.inner.up", "fc1", "{ffn}.DenseReluDense.wi"),
    ("ffn.inner.down", "fc2", "{ffn}.DenseReluDense.wo"),
    ("ffn.norm", "final_layer_norm", "{ffn}.layer_norm"),
]
# Ours -> theirs; `expand` fills the gaps. * is weight or bias. A tuple: copies of one tensor.
BART = {
    "embed_tokens.weight": (
        "model.shared.weight", "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight", "lm_head.weight"),
    "logits_bias": "final_logits_bias",
    "{stack}.positions.weight": "model.{stack}.embed_positions.weight",
    "{stack}.embed_norm.*": "model.{stack}.layernorm_embedding.*",
    **{"{layer}." + ours + ".*": "model.{layer}." + theirs + ".*" for ours, theirs, _ in LAYER},
}
T5 = {
    "embed_tokens.weight": (
        "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
        "lm_head.weight"),
    "logits_bias": "lm_head.bias",  # not in Google's files
    "{stack}.positions.weight":
        "{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    **{"{layer}." + ours + ".weight": "{block}." + theirs + ".weight" for ours, _, theirs in LAYER},
    "{stack}.final_norm.weight": "{stack}.final_layer_norm.weight",
}
FAMILIES = {"bart": (bart, BART), "t5": (t5, T5)}  # model_type -> preset, weight names
LEFT_OVER = (  # neither needed nor unknown
    ".version", "EncDecAttention.relative_attention_bias.weight", ".num_batches_tracked")


def load_backbone(folder: str | Path, feature_dim=2048, vocab_size=None) -> VLModel:
    """The model from Hugging Face's folder; visual part and added rows are new.

    Reads config.json, generation_config.json if there, model.safetensors or pytorch_model.bin.
    vocab_size counts added tokens; None: there are none. Raises WeightsError.
    """
    folder = Path(folder)
    path, wishes = folder / "config.json", folder / "generation_config.json"
    hf = read_json(path)
    wished = read_json(wishes) if wishes.exists() else {}
    hf |= wished
    if str(hf.get("model_type")) not in FAMILIES:
        raise WeightsError(f"{path}: model_type should be {' or '.join(FAMILIES)}")
    preset, table = FAMILIES[hf["model_type"]]
    try:
        config = preset(hf, feature_dim, vocab_size)
    except WeightsError as problem:
        file = wishes if str(problem).split()[0] in wished else path
        raise WeightsError(f"{file}: {problem}") from None
    for path in folder / "model.safetensors", folder / "pytorch_model.bin":
        if path.exists():
            weights = read_weights(path)
            # Sizes are compared before memory is taken.
            with torch.device("meta"):
                skeleton = VLModel(config)
            weights = fit_weights(skeleton, weights, table, path)
            model = VLModel(config)
            state = model.state_dict()
            for name, tensor in weights.items():
                state[name][:len(tensor)].copy_(tensor)
            return model
    raise WeightsError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")


def fit_weights(model: VLModel, weights: dict, table: dict, path) -> dict[str, torch.Tensor]:
    """A file's tensors by our names; of tables with added rows the loaded_vocab first ones.

    logits_bias may be missing. Raises WeightsError.
    """
    weights = dict(weights)
    if table is BART and not any(name.startswith("model.") for name in weights):
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}  # has no head
    bias = table["logits_bias"]
    if bias in weights:
        weights[bias] = weights[bias].flatten()  # stored as [1, vocab]
    state = model.state_dict()
    found = {}  # our name: theirs
    wanted = {}
    for name, theirs in expand(table, model.config).items():
        found[name] = [alias for alias in theirs if alias in weights]
        target = state[name]
        if name in ("embed_tokens.weight", "logits_bias"):
            target = target[:model.config.loaded_vocab]
        if name != "logits_bias":
            found[name] = found[name] or theirs[:1]
        wanted |= dict.fromkeys(found[name], target)
    compare(weights, wanted, f"{path} does not fit its config.json")
    for theirs in filter(None, found.values()):
        first = weights[theirs[0]].float()
        if any(not torch.equal(first, weights[alias].float()) for alias in theirs[1:]):
            raise WeightsError(f"{path}: {' and '.join(theirs)} are not the same table")
    return {name: weights[theirs[0]] for name, theirs in found.items() if theirs}


def compare(weights: dict, wanted: dict, otherwise: str):
    """WeightsError unless names, shapes and kinds are the wanted ones, and numbers finite."""
    problems = []
    for name in wanted | weights:
        tensor, target = weights.get(name), wanted.get(name)
        if name.endswith(LEFT_OVER):
            continue
        elif tensor is None or target is None:
            problems.append(f"{'no' if tensor is None else 'unknown'} {name}")
        elif tensor.shape != target.shape:
            problems.append(f"{name} is {[*tensor.shape]}, expected {[*target.shape]}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is of {tensor.dtype}, expected floating-point numbers")
        elif not tensor.float().isfinite().all():
            problems.append(f"{name} has numbers that are not finite")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise WeightsError(f"{otherwise}: {'; '.join(problems[:4])}{more}")


def expand(table: dict, config: Config) -> dict[str, tuple[str, ...]]:
    """The table with its gaps filled: our name -> their names. Repeats are harmless."""
    names = {}
    for stack, depth in ("encoder", config.encoder_layers), ("decoder", config.decoder_layers):
        for i, x, kind in product(range(depth), "qkv", ("weight", "bias")):
            gaps = dict(stack=stack, layer=f"{stack}.layers.{i}", block=f"{stack}.block.{i}.layer",
                        x=x, ffn=1 if stack == "encoder" else 2)  # its number in T5

            def fill(name):
                return name.replace("*", kind).format(**gaps)

            for ours, theirs in table.items():
                theirs = (theirs,) if isinstance(theirs, str) else theirs
                if stack == "decoder" or "cross_attn" not in ours:
                    names[fill(ours)] = tuple(fill(name) for name in theirs)
    return names


def load_clip(path: str | Path) -> CLIPResNet:
    """The CLIPResNet of OpenAI's RN101.pt etc., eval mode, float32. Raises WeightsError."""
    weights = {name.removeprefix("visual."): tensor
               for name, tensor in read_weights(path).items() if name.startswith("visual.")}
    kind = "not a CLIP with a ResNet"
    with reading(path, kind):
        if "class_embedding" in weights:
            raise WeightsError(f"is {kind}, but with a vision transformer")
        blocks = [name.split(".")[0] for name in weights if name.endswith(".bn3.weight")]
        layers = [blocks.count(f"layer{stage}") for stage in (1, 2, 3, 4)]
        side = int((len(weights["attnpool.positional_embedding"]) - 1) ** 0.5)
        width = len(weights["conv3.weight"])
        output_dim = len(weights["attnpool.c_proj.weight"])
        if min(*layers, side, width, output_dim) < 1 or max(layers) > DEPTH[1] or width % 2:
            raise ValueError
        with torch.device("meta"):
            skeleton = CLIPResNet(layers, width, side, output_dim)
        compare(weights, skeleton.state_dict(), f"is {kind}")
        encoder = CLIPResNet(layers, width, side, output_dim)
        encoder.load_state_dict(weights)
    return encoder.eval()


# ---- file formats ----
# A file is data: nothing in it is run, and no memory is taken that it does not fill.

HEADER_LIMIT = 1 << 22  # bytes; what describes the tensors of large files has a tenth of it


def disguise(head: bytes) -> str:
    """What a file that begins so is in place of another; "" if nothing is known."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: git lfs pull fetches it"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file itself"
    return ""


@contextmanager
def reading(path: str | Path, kind: str):
    """Makes one WeightsError of whatever a broken or hostile file provokes."""
    try:
        yield
    except WeightsError as problem:
        raise WeightsError(f"{path} {problem}") from None
    except OSError as problem:
        raise WeightsError(f"{path} cannot be read: {problem.strerror}") from None
    except Exception:
        raise WeightsError(f"{path} is {kind}") from None


def map_file(path: str | Path) -> memoryview:
    """The bytes of a regular file, not read before they are looked at."""
    if not Path(path).is_file():
        raise WeightsError("is not a regular file" if Path(path).exists() else "is missing")
    with open(path, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    if said := disguise(bytes(data[:99])):
        raise WeightsError(said)
    return data


def read_json(path: Path) -> dict:
    with reading(path, "not JSON"):
        content = json.loads(bytes(header(map_file(path))))
        if not isinstance(content, dict):
            raise WeightsError("should be a JSON object")
    return content


def header(data: memoryview) -> memoryview:
    if len(data) > HEADER_LIMIT:
        raise WeightsError(f"has more than {HEADER_LIMIT:,} bytes that describe it")
    return data


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file by name, on the CPU, in the stored precision, still in the file.

    safetensors, PyTorch's .bin (zipped or old) or TorchScript (OpenAI's CLIP), told by content.
    Raises WeightsError.
    """
    with reading(path, "truncated or not a weight file"):
        data = map_file(path)
        if data[8:9] == b"{":
            return read_safetensors(data)
        return read_zip(data, path) if data[:2] == b"PK" else read_old(data)


DTYPES = {  # safetensors' names, with those of PyTorch's storages
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = dict(zip("Double Float Half BFloat16 Long Int Byte Bool".split(), DTYPES.values()))


def read_safetensors(data: memoryview) -> dict[str, torch.Tensor]:
    """The header's length, 8 bytes; the header; the data, without holes or overlaps."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError
    entries = json.loads(bytes(header(data[8:start])))
    entries.pop("__metadata__", None)
    data = data[start:]
    weights = {}
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        placed = begin == reached and begin <= end <= len(data)
        if not placed or min(shape, default=0) < 0 or len(shape) > 8:
            raise WeightsError(f"is truncated or not a weight file, see {check_name(name)}")
        tensor = numbers(data[begin:end], DTYPES[entry["dtype"]])
        weights[check_name(name)] = tensor.reshape(shape)
        reached = end
    if reached != len(data):
        raise WeightsError(f"has {len(data) - reached:,} bytes that belong to no tensor")
    return weights


def numbers(data: memoryview, dtype) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype) if len(data) else torch.zeros(0, dtype=dtype)


def check_name(name) -> str:
    if type(name) is not str or len(name) > 200 or not name.isprintable():
        raise WeightsError("has names that are not text, or too long")
    return name


def read_zip(data: memoryview, path) -> dict[str, torch.Tensor]:
    """A .bin since PyTorch 1.6, or TorchScript: data.pkl, and storages in data/, uncompressed."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
    root = next(iter(members)).split("/")[0]
    if sum(member.compress_size for member in members.values()) > len(data):
        raise ValueError

    @cache
    def read(name):
        member = members[f"{root}/{name}"]
        names = struct.unpack_from("<2H", data, member.header_offset + 26)
        begin = member.header_offset + 30 + sum(names)
        content = data[begin:begin + member.compress_size]
        if member.compress_type or zlib.crc32(content) != member.CRC:
            raise WeightsError(f"is damaged or compressed at {check_name(member.filename)}")
        return content

    reader = Reader(io.BytesIO(header(read("data.pkl"))))
    content = reader.load()
    if f"{root}/constants.pkl" in members:
        content = attributes(content)

    def storage(key):
        values = numbers(read(f"data/{key}"), reader.storages[key][0])
        return values.view(reader.storages[key][1])  # raises if it has another number of them

    return make_tensors(content, storage)


def read_old(data: memoryview) -> dict[str, torch.Tensor]:
    """An older .bin: five pickles, then of each storage its count, 8 bytes, and its numbers."""
    file = io.BytesIO(data[:HEADER_LIMIT])
    readers = [Reader(file) for _ in range(5)]
    *_, content, keys = [reader.load() for reader in readers]
    begin = file.tell()
    storages = {}
    for key in keys:
        dtype, count = readers[3].storages[check_name(key)]
        end = begin + 8 + count * dtype.itemsize
        if data[begin:begin + 8] != count.to_bytes(8, "little") or end > len(data):
            raise ValueError
        storages[key] = numbers(data[begin + 8:end], dtype)
        begin = end
    return make_tensors(content, storages.get)


class Table(dict):
    """A pickle's dictionary, or an object with its attributes."""

    def __init__(self):
        super().__init__()
        self.attributes = {}

    def __setitem__(self, key, value):
        # To hash tuples of tuples may take for ever.
        if type(key) is not str and not (type(key) is int and -1 < key < 2 ** 63):
            raise WeightsError("has keys that are neither text nor numbers")
        super().__setitem__(key, value)


class Stored:
    """A tensor of a pickle: which part of a storage it is."""

    def __init__(self, key, *part):
        self.key, self.part = key, part


class Reader(pickle._Unpickler):
    """Reads pickles of weights, in Python: nothing is called but what is in `known`.

    Opcodes that need more memory than bytes, or that weights need not, are left out.
    """
    known = {"collections.OrderedDict": Table, "torch._utils._rebuild_tensor_v2": Stored,
             "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
             **{f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()}}
    dispatch = {code: pickle._Unpickler.dispatch[code] for code in
                b"\x80\x85\x86\x87\x88\x89\x8a\x8b\x8c\x93\x94\x95()].GJKMNQRTUXacehjqrstu"}
    dispatch[ord("}")] = lambda self: self.append(Table())

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}  # key -> dtype, count

    def find_class(self, module, name):
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda values: values
        if module.startswith("__torch__"):
            return Table
        path = f"{module}.{name}"
        if path not in self.known:
            raise WeightsError(f"asks for {check_name(path)}, expected dense tensors and no more")
        return self.known[path]

    def persistent_load(self, pid):
        kinds = [*map(type, pid[1:7])]
        if kinds[:4] != [torch.dtype, str, str, int] or kinds[4:] not in ([], [type(None)]):
            raise ValueError
        self.storages[pid[2]] = pid[1], pid[4]
        return pid[2]

    def load_reduce(self):
        arguments = self.stack.pop()
        if len(arguments) > 8:
            raise ValueError
        self.stack[-1] = self.stack[-1](*arguments)

    def load_build(self):
        state = self.stack.pop()
        if type(self.stack[-1]) is Table:
            self.stack[-1].attributes = state

    dispatch |= {ord("R"): load_reduce, 0x81: load_reduce, ord("b"): load_build}


def attributes(module: Table, prefix="") -> Table:
    """Parameters and buffers of a TorchScript module by their state_dict names."""
    found = Table()
    inside, module.attributes = module.attributes, {}  # it may be in itself
    for name, value in inside.items():
        name = check_name(prefix + name)
        if type(value) is Table:
            found |= attributes(value, f"{name}.")
        elif type(value) is Stored:
            found[name] = value
    return found


def make_tensors(content: Table, storage: Callable) -> dict[str, torch.Tensor]:
    """A state_dict's tensors, also if a training script or DataParallel has wrapped it."""
    for wrap in "state_dict", "model_state_dict", "model", "module":
        if type(content) is Table and type(content.get(wrap)) is Table:
            content = content[wrap]
    if type(content) is not Table:
        raise WeightsError("should be a dictionary of tensors")
    weights = {}
    sizes = {}
    for name, stored in content.items():
        if type(stored) is not Stored or type(stored.key) is not str:
            raise WeightsError(f"should be a dictionary of tensors, but for {check_name(name)}")
        values = storage(stored.key)
        offset, size, stride, *_ = stored.part
        tensor = values.as_strided(size, stride, offset)  # raises beyond the end
        if tensor.numel() > len(values) or tensor.ndim > 8:
            raise WeightsError(f"has {check_name(name)}, which is not dense")
        sizes[stored.key] = values.nbytes
        weights[check_name(name).removeprefix("module.")] = tensor
    if sum(tensor.nbytes for tensor in weights.values()) > 4 * sum(sizes.values()):
        raise WeightsError("has tensors that share their memory")
    return weights
