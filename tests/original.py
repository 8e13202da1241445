"""The authors' code, as recorded: reads tests/golden/*.npz and gives its weights our names.

The files were made by running the unmodified original on tiny models (2 + 2 layers, width 32)
whose weights lie on a coarse grid. Keys: w/ weights, in/ inputs, out/ results, grad/ gradients,
gen/ generated ids, final/ weights after ten steps. Set VL_GOLDEN to a folder with more recorded
cases to test those too.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import torch

from adapters import install
from model import FAMILIES, Config, VLModel, expand, pool, t5

FOLDER = Path(os.environ.get("VL_GOLDEN", Path(__file__).parent / "golden"))
TASKS = ["vqa", "gqa", "nlvr", "caption"]

# case -> method, sharing, sizes and sites that say the same as the original's flags
METHOD_OF = {
    "full": ("full", "single", {}, None),
    "bitfit": ("bitfit", "single", {}, None),
    "lst_bitfit": ("bitfit", "single", {}, None),
    "single_adapter": ("adapter", "single", {}, None),
    "multiple_adapters": ("adapter", "multiple", {}, None),
    "half_shared_up": ("adapter", "half", {}, None),
    "x_adapter_no_cross": ("adapter", "single", {}, ["self_attn", "ffn"]),
    "single_compacter": ("compacter", "single", dict(n=2), None),
    "compacter_shared_factorized": (
        "compacter", "single", dict(n=2, shared_phm_rule=True, rank=1), None),
    "lradapter": ("lowrank", "single", dict(rank=2), None),
    "hyperformer": ("hyperformer", "single", dict(task_dim=16, hidden_dim=12), None),
    "single_lora": ("lora", "single", dict(rank=4), None),
    "single_prompt": ("prompt", "single", dict(length=5, mid_dim=20), None),
}

# In this order, without "model." in front; what is left is found in the tables of weight names.
BART, T5 = r"(\w+)\.layers\.(\d+)\.", r"(\w+)\.block\.(\d+)\.layer\."
RENAMES = [
    (r"encoder\.visual_embedding\.feat_embedding\.0", "visual.feature"),
    (r"encoder\.visual_embedding\.feat_embedding\.1", "visual.feature_norm"),
    (r"encoder\.visual_embedding\.absolute_vis_pos_embedding\.0", "visual.box"),
    (r"encoder\.visual_embedding\.absolute_vis_pos_embedding\.1", "visual.box_norm"),
    (r"encoder\.visual_embedding\.img_order_embedding", "visual.image_order"),
    # sites
    (BART + r"(?:self_)?attn_adapter", r"\1.layers.\2.self_attn.adapter"),
    (BART + r"enc_attn_adapter", r"\1.layers.\2.cross_attn.adapter"),
    (BART + r"ff_adapter", r"\1.layers.\2.ffn.adapter"),
    (T5 + r"0\.attn_adapter", r"\1.layers.\2.self_attn.adapter"),
    (T5 + r"1\.enc_attn_adapter", r"\1.layers.\2.cross_attn.adapter"),
    (T5 + r"[12]\.ff_adapter", r"\1.layers.\2.ffn.adapter"),
    # Compacter
    (r"(down|up)_sampler\.b$", r"\1_sampler.bias"),
    (r"phm_rule$", "phm_rule.value"),
    # LoRA
    (r"lora_(A|B)s\.vqa", r"update.\1"),
    (BART + r"self_attn\.(\w)_proj\.update", r"\1.layers.\2.self_attn.inner.\3.update"),
    (BART + r"encoder_attn\.(\w)_proj\.update", r"\1.layers.\2.cross_attn.inner.\3.update"),
    (T5 + r"0\.SelfAttention\.(\w)\.update", r"\1.layers.\2.self_attn.inner.\3.update"),
    (T5 + r"1\.EncDecAttention\.(\w)\.update", r"\1.layers.\2.cross_attn.inner.\3.update"),
    # prompts
    (r"encoder\.prompt_modules\.prompts\.vqa\.prefix_embedding\.0\.weight", "encoder.prompt.table"),
    (r"encoder\.prompt_modules\.prompts\.vqa\.prefix_embedding\.1", "encoder.prompt.down"),
    (r"encoder\.prompt_modules\.prompts\.vqa\.prefix_embedding\.3", "encoder.prompt.up"),
    # Hyperformer
    (r"shared_task_embed\.task_to_embeddings\.(\w+)", r"task_embedding.copies.\1.value"),
    (r"(\w+)\.adapter_layers_hyper_net", r"hypernetworks.\1"),
    (r"layer_id_embeddings", "layer"),
    (r"task_hypernet\.task_embeding_generator", "project"),
    (r"LayerNorm", "norm"),
    (r"feed_forward_(\w+)_sampler_hyper_net", r"write.ffn.\1"),
    (r"(self|cross)_attention_(\w+)_sampler_hyper_net", r"write.\1_attn.\2"),
    (r"(up|down)\.weight_generator\.0", r"\1"),
    (r"(up|down)\.bias_generator\.0", r"\1_bias"),
]
# Compacter's factors are W_left and W_right here, too, but not those of the low-rank adapter.
LOW_RANK = [(r"_sampler\.W_(left|right)", r"_sampler.\1")]
COPIES = {  # where a sampler of one task lies
    "single": [(r"adapters\.t?vqa\.(down|up)_sampler", r"\1")],
    "half": [(r"adapters\.(\w+)\.down_sampler", r"down.copies.\1"),
             (r"adapters\.vqa\.up_sampler", "up")],
    "multiple": [(r"adapters\.(\w+)\.(down|up)_sampler", r"copies.\1.\2")],
}


class Recorded:
    """One file: `model` with its method and weights in place, and all arrays by their keys."""

    def __init__(self, path: Path):
        self.arrays = dict(np.load(path))
        self.meta = json.loads(str(self.arrays["meta"]))
        self.family, case, _ = path.stem.split("-")
        method, sharing, sizes, sites = METHOD_OF[case]
        self.patterns = RENAMES + (LOW_RANK if method == "lowrank" else []) + COPIES[sharing]
        config = tiny_config(self.family, self.meta)
        names = expand(FAMILIES[self.family][1], config)
        self.theirs = {theirs[0].removeprefix("model."): ours for ours, theirs in names.items()}
        self.model = VLModel(config)
        tasks = [str(self.arrays["task"])] if "tvqa" in path.stem else TASKS
        install(self.model, method, 32, tasks, sharing, sites, **sizes)
        weights = {}
        for key, array in self.arrays.items():
            if key.startswith("w/"):
                weights[self.rename(key[2:])] = torch.from_numpy(array)
        weights["logits_bias"] = weights.get("logits_bias", torch.zeros(1, 164)).flatten()
        self.model.load_state_dict(weights, strict=True)

    def rename(self, name: str) -> str:
        name = name.removeprefix("model.")
        for pattern, ours in self.patterns:
            name = re.sub(pattern, ours, name)
        weight = name.replace(".bias", ".weight")
        if name not in self.theirs and weight in self.theirs:       # T5 with BitFit has more biases
            return self.theirs[weight].replace(".weight", ".bias")
        return self.theirs.get(name, name)

    def batch(self, prefix: str = "in/"):
        """ids, features [batch, pictures, tokens, channels], labels and weights of the loss."""
        task = prefix.split("/")[1] or str(self.arrays.get("task", "vqa"))
        ids = torch.from_numpy(self.arrays[prefix + "input_ids"])
        labels = torch.from_numpy(self.arrays[prefix + "labels"])
        weights = loss_weights(task, labels, self.arrays.get(prefix + "scores"))
        return ids, features(self.arrays[prefix + "vis_feats"]), labels, weights


def tiny_config(family: str, meta: dict) -> Config:
    if family == "t5":
        hf = dict(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                  relative_attention_num_buckets=32, dropout_rate=0.0)
        return t5(hf, feature_dim=24, vocab_size=164)
    defaults = meta.get("defaults", {})
    return Config(
        vocab_size=164, d_model=32, heads=4, d_ff=64, encoder_layers=2, decoder_layers=2,
        max_positions=64, feature_dim=24, dropout=0.0, decoder_start=2, pad=1, eos=2,
        no_repeat_ngram=defaults.get("no_repeat_ngram_size", 0),
        early_stopping=defaults.get("early_stopping", False))


def features(array) -> torch.Tensor:
    """Recorded features, one picture or two of 49, or 64 frames, to what our model takes."""
    x = torch.from_numpy(array)
    x = x if x.ndim == 4 else x[:, None]                            # [batch, pictures, tokens, C]
    if x.size(2) == 64:
        return x
    grids = x.flatten(0, 1).transpose(1, 2).unflatten(2, (7, 7))
    return pool(grids).unflatten(0, x.shape[:2])


def loss_weights(task: str, labels, scores) -> torch.Tensor:
    """The weights with which VLModel.loss is the task's loss in the original."""
    if task == "vqa":
        return torch.from_numpy(scores)
    tokens = (labels != -100).sum(1)
    return tokens * len(tokens) / tokens.sum() if task == "caption" else torch.ones(len(labels))


def distance(ours, theirs) -> float:
    """Largest difference, relative to the largest recorded value."""
    theirs = torch.as_tensor(theirs)
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def cases(kind: str) -> list[Path]:
    """The recorded files: kind is vqa, caption, ..., generate or trajectory."""
    found = sorted(FOLDER.glob(f"*-*-{kind}.npz"))
    return [path for path in found if path.stem.split("-")[1] in METHOD_OF]
