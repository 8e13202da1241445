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

import json
import math
import pickle
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

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
        count = config.buckets - self.ahead
        exact = count // 2
        # The formula inverted: where bucket i begins.
        growth = config.max_distance / exact
        boundaries = list(range(1, exact))
        for i in range(count - exact):
            boundaries.append(math.ceil(exact * growth ** (i / (count - exact)) - 1e-6))
        self.register_buffer("boundaries", torch.tensor(boundaries), persistent=False)

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
        return torch.where(mask, F.pad(bias, (0, visual, 0, visual)), -torch.inf)


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
        hidden = decode(tokens[:, -1:].contiguous(), None, cache.mask, cache)
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
        self.mask = mask
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


def bart(hf: dict, feature_dim=2048, vocab_size=None) -> Config:
    """BART's Config (Lewis et al. 2020) from config.json; vocab_size None: the file's own."""
    hf = dict(decoder_start_token_id=2, pad_token_id=1, eos_token_id=2, forced_eos_token_id=2,
              dropout=0.1) | hf
    if hf.get("activation_function", "gelu") != "gelu" or hf.get("scale_embedding"):
        raise WeightsError("only BART with gelu and unscaled embeddings is built")
    sizes = dict(heads="encoder_attention_heads", d_ff="encoder_ffn_dim",
                 encoder_layers="encoder_layers", decoder_layers="decoder_layers",
                 max_positions="max_position_embeddings")
    config = from_hf(hf, sizes, vocab_size, feature_dim=feature_dim, dropout=hf["dropout"])
    if hf.get("decoder_attention_heads", config.heads) != config.heads:
        raise WeightsError("decoder_attention_heads and encoder_attention_heads differ")
    return config


def t5(hf: dict, feature_dim=2048, vocab_size=None) -> Config:
    """T5's (Raffel et al. 2020), likewise."""
    hf = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, forced_eos_token_id=None,
              dropout_rate=0.1, layer_norm_epsilon=1e-6, num_decoder_layers=hf.get("num_layers"),
              relative_attention_max_distance=128) | hf
    if hf.get("feed_forward_proj", "relu") != "relu" or hf.get("tie_word_embeddings") is False:
        raise WeightsError("only T5 with relu and one word table is built, not 1.1 or Flan")
    sizes = dict(heads="num_heads", head_dim="d_kv", d_ff="d_ff", encoder_layers="num_layers",
                 decoder_layers="num_decoder_layers", buckets="relative_attention_num_buckets",
                 max_distance="relative_attention_max_distance")
    config = from_hf(hf, sizes, vocab_size, feature_dim=feature_dim, dropout=hf["dropout_rate"],
                     max_positions=None, prenorm=True, bias=False, score_scale=1.0,
                     norm=partial(nn.RMSNorm, eps=hf["layer_norm_epsilon"]), activation=F.relu,
                     embedding_std=1.0)
    return replace(config, head_scale=config.d_model ** -0.5)


def from_hf(hf: dict, sizes: dict[str, str], vocab_size: int | None, **others) -> Config:
    """What both families have; sizes: our names -> config.json's."""
    sizes = dict(loaded_vocab="vocab_size", d_model="d_model") | sizes
    for name in sizes.values():
        if not isinstance(hf.get(name), int) or hf[name] < 1:
            raise WeightsError(f"{name} is {hf.get(name)!r}, expected a number from 1 on")
    loaded = hf["vocab_size"]
    vocab_size = loaded if vocab_size is None else vocab_size
    if not loaded <= vocab_size <= loaded + ADDED_TOKENS:
        raise WeightsError(f"vocab_size is {loaded:,}, "
                           f"the tokenizer with its added words has {vocab_size:,}")
    if "head_dim" not in sizes and hf["d_model"] % hf[sizes["heads"]]:
        raise WeightsError(f"d_model is no multiple of {sizes['heads']}")
    penalty = hf.get("length_penalty")
    return Config(
        vocab_size, **{ours: hf[theirs] for ours, theirs in sizes.items()}, **others,
        decoder_start=hf["decoder_start_token_id"], pad=hf["pad_token_id"], eos=hf["eos_token_id"],
        forced_bos=hf.get("forced_bos_token_id"), forced_eos=hf["forced_eos_token_id"],
        no_repeat_ngram=hf.get("no_repeat_ngram_size") or 0,
        early_stopping=hf.get("early_stopping") is True,
        length_penalty=1.0 if penalty is None else penalty)


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
LEFT_OVER = (".version", "EncDecAttention.relative_attention_bias.weight")  # of old files


def load_backbone(folder: str | Path, feature_dim=2048, vocab_size=None) -> VLModel:
    """The model from Hugging Face's folder; visual part and added rows are new.

    Reads config.json, generation_config.json if there, model.safetensors or pytorch_model.bin.
    vocab_size counts added tokens; None: there are none. Raises WeightsError.
    """
    folder = Path(folder)
    path = folder / "config.json"
    hf = read_json(path)
    if (folder / "generation_config.json").exists():
        hf |= read_json(folder / "generation_config.json")
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        names = ", ".join(FAMILIES)
        raise WeightsError(f"{path}: model_type is {kind!r}, expected one of {names}")
    preset, table = FAMILIES[kind]
    try:
        model = VLModel(preset(hf, feature_dim, vocab_size))
    except (TypeError, ValueError, RuntimeError) as problem:
        raise WeightsError(f"{path}: {problem}") from None
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            load_weights(model, read_weights(folder / name), table, folder / name)
            return model
    raise WeightsError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")


def load_weights(model: VLModel, weights: dict, table: dict, source="the weights"):
    """Copies raw weights into the model: every name of the table, every tensor but LEFT_OVER.

    embed_tokens and its bias get loaded_vocab rows; the bias may be missing. Raises WeightsError.
    """
    weights = dict(weights)
    if table is BART and not any(name.startswith("model.") for name in weights):
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}  # has no head
    state = model.state_dict()
    problems = []
    for name, theirs in expand(table, model.config).items():
        found = [alias for alias in theirs if alias in weights]
        copies = [weights.pop(alias) for alias in found]
        if name == "logits_bias":
            copies = [copy.flatten() for copy in copies]  # stored as [1, vocab]
        elif not copies:
            problems.append(f"no {theirs[0]}")
        target = state[name]
        if name in ("embed_tokens.weight", "logits_bias"):
            target = target[:model.config.loaded_vocab]
        for alias, tensor in zip(found, copies):
            if tensor.shape != target.shape:
                problems.append(f"{alias} is {list(tensor.shape)}, expected {list(target.shape)}")
            elif tensor is not copies[0] and not torch.equal(tensor, copies[0]):
                problems.append(f"{' and '.join(theirs)} are not the same table")
            else:
                target.copy_(tensor)
    problems += [f"unknown {name}" for name in weights if not name.endswith(LEFT_OVER)]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        shown = "; ".join(problems[:4])
        raise WeightsError(f"{source} does not fit its config.json: {shown}{more}")


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
    weights = {name.removeprefix("visual."): tensor.float()
               for name, tensor in read_weights(path).items() if name.startswith("visual.")}
    try:
        blocks = [name.split(".")[0] for name in weights if name.endswith(".bn3.weight")]
        layers = [blocks.count(f"layer{stage}") for stage in (1, 2, 3, 4)]
        side = int((len(weights["attnpool.positional_embedding"]) - 1) ** 0.5)
        width = len(weights["conv3.weight"])
        encoder = CLIPResNet(layers, width, side, output_dim=len(weights["attnpool.c_proj.weight"]))
        encoder.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError) as problem:
        problem = one_line(problem, 300)
        raise WeightsError(f"{path}: not a CLIP with a ResNet: {problem}") from None
    return encoder.eval()


# ---- file formats ----


@contextmanager
def reading(path: str | Path, kind: str):
    """Makes one WeightsError of whatever a broken or hostile file provokes."""
    try:
        yield
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing") from None
    except Exception as problem:
        raise WeightsError(f"{path} is {kind}: {one_line(problem, 160)}") from None


def one_line(problem: Exception, length: int) -> str:
    return " ".join(str(problem).split())[:length] or type(problem).__name__


def read_json(path: Path) -> dict:
    with reading(path, "not JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return content


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file by name, on the CPU, in the stored precision.

    safetensors, PyTorch's .bin (zipped or old) or TorchScript (OpenAI's CLIP), told by content. A
    file is data: nothing in it is run. Raises WeightsError.
    """
    path = Path(path)
    with reading(path, "truncated or not a weight file"):
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
        values = weights.values() if isinstance(weights, dict) else [None]
        if not all(isinstance(value, torch.Tensor) for value in values):
            raise ValueError("expected a dictionary of tensors")
        return dict(weights)


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The header's length, 8 bytes; the header; the data, without holes or overlaps."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + length:]
    weights = {}
    reached = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != reached or not begin <= end <= len(data) or min(entry["shape"], default=0) < 0:
            raise ValueError(f"{name} should lie at bytes {begin} to {end} of {len(data)}, "
                             f"after {reached}")
        tensor = data[begin:end].clone().view(DTYPES[entry["dtype"]])
        weights[name] = tensor.reshape(entry["shape"])
        reached = end
    if reached != len(data):
        raise ValueError(f"{len(data) - reached} bytes belong to no tensor")
    return weights


def read_torchscript(archive: zipfile.ZipFile, root: str) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a TorchScript archive by their state_dict names.

    data.pkl may name tensors, storages, and classes, which become SimpleNamespaces; all else is
    refused. The archive's code/ is never opened.
    """
    def rebuild(storage, offset, size, stride, *_):
        return torch.as_strided(storage, size, stride, offset)  # raises beyond the end

    known = {"collections.OrderedDict": dict, "torch._utils._rebuild_tensor_v2": rebuild}

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            path = f"{module}.{name}"
            if path in known:
                return known[path]
            if module == "torch" and name.endswith("Storage"):
                return name.removesuffix("Storage").lower()  # its kind of numbers
            if module == "torch.jit._pickle" and name.startswith("build_"):
                return list
            if module.startswith("__torch__"):
                return SimpleNamespace
            raise ValueError(f"it asks for {path}, which no weight file needs")

        def persistent_load(self, pid):
            _, kind, key, _, count = pid
            dtype = torch.uint8 if kind == "byte" else getattr(torch, kind)
            content = bytearray(archive.read(f"{root}/data/{key}"))
            storage = torch.frombuffer(content, dtype=torch.uint8).view(dtype)
            if len(storage) != count:
                raise ValueError(f"storage {key} has {len(storage)} numbers, expected {count}")
            return storage

    def collect(module, prefix=""):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                weights[prefix + name] = value
            elif isinstance(value, SimpleNamespace):
                collect(value, f"{prefix}{name}.")

    weights = {}
    with archive.open(f"{root}/data.pkl") as file:
        collect(Reader(file).load())
    return weights
