"""The authors' code, as recorded: reads tests/golden/*.npz and translates its names of weights into ours.

The files were made by running the unmodified original on tiny models (2 + 2 layers, width 32) whose weights lie on a
coarse grid. Keys: w/ weights, in/ inputs, out/ results, grad/ gradients, gen/ generated ids, final/ weights after ten
steps. Set VL_GOLDEN to a folder with more recorded cases to test those too.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import torch

from adapters import install
from model import FAMILIES, Config, Model, expand, pool, t5

FOLDER = Path(os.environ.get("VL_GOLDEN", Path(__file__).parent / "golden"))
TASKS = ["vqa", "gqa", "nlvr", "caption"]

# case -> method, share, sizes and sites that say the same as the original's flags
METHOD_OF = {
    "full": ("full", "all", {}, None), "bitfit": ("bitfit", "all", {}, None), "lst_bitfit": ("bitfit", "all", {}, None),
    "single_adapter": ("adapter", "all", {}, None), "multiple_adapters": ("adapter", "none", {}, None),
    "half_shared_up": ("adapter", "half", {}, None),
    "x_adapter_no_cross": ("adapter", "all", {}, ["self_attn", "ffn"]),
    "single_compacter": ("compacter", "all", dict(factors=2), None),
    "compacter_shared_factorized": ("compacter", "all", dict(factors=2, shared_rule=True, rank=1), None),
    "lradapter": ("lowrank", "all", dict(rank=2), None),
    "hyperformer": ("hyperformer", "all", dict(task_dim=16, hidden_dim=12), None),
    "single_lora": ("lora", "all", dict(rank=4), None),
    "single_prompt": ("prompt", "all", dict(length=5, mid_dim=20), None),
}

RENAMES = [  # in this order, after "model." in front; what is left is found in the tables of weight names
    (r"encoder\.visual_embedding\.feat_embedding\.0", "visual.feature"),
    (r"encoder\.visual_embedding\.feat_embedding\.1", "visual.feature_norm"),
    (r"encoder\.visual_embedding\.absolute_vis_pos_embedding\.0", "visual.box"),
    (r"encoder\.visual_embedding\.absolute_vis_pos_embedding\.1", "visual.box_norm"),
    (r"encoder\.visual_embedding\.img_order_embedding", "visual.picture"),
    (r"(encoder|decoder)\.layers\.(\d+)\.(?:self_)?attn_adapter", r"\1.layers.\2.self_attn.adapter"),
    (r"(encoder|decoder)\.layers\.(\d+)\.enc_attn_adapter", r"\1.layers.\2.cross_attn.adapter"),
    (r"(encoder|decoder)\.layers\.(\d+)\.ff_adapter", r"\1.layers.\2.ffn.adapter"),
    (r"(encoder|decoder)\.block\.(\d+)\.layer\.0\.attn_adapter", r"\1.layers.\2.self_attn.adapter"),
    (r"(encoder|decoder)\.block\.(\d+)\.layer\.1\.enc_attn_adapter", r"\1.layers.\2.cross_attn.adapter"),
    (r"(encoder|decoder)\.block\.(\d+)\.layer\.[12]\.ff_adapter", r"\1.layers.\2.ffn.adapter"),
    (r"(down|up)_sampler\.W_left", r"\1_sampler.left"), (r"(down|up)_sampler\.W_right", r"\1_sampler.right"),
    (r"(down|up)_sampler\.W$", r"\1_sampler.weight"), (r"(down|up)_sampler\.b$", r"\1_sampler.bias"),
    (r"(down|up)_sampler\.phm_rule", r"\1_sampler.rule.value"), (r"^phm_rule$", "kronecker_rule.value"),
    (r"(\w+)\.layers\.(\d+)\.self_attn\.(\w)_proj\.lora_(A|B)s\.vqa", r"\1.layers.\2.self_attn.inner.\3.update.\4"),
    (r"(\w+)\.layers\.(\d+)\.encoder_attn\.(\w)_proj\.lora_(A|B)s\.vqa", r"\1.layers.\2.cross_attn.inner.\3.update.\4"),
    (r"(\w+)\.block\.(\d+)\.layer\.0\.SelfAttention\.(\w)\.lora_(A|B)s\.vqa", r"\1.layers.\2.self_attn.inner.\3.update.\4"),
    (r"(\w+)\.block\.(\d+)\.layer\.1\.EncDecAttention\.(\w)\.lora_(A|B)s\.vqa", r"\1.layers.\2.cross_attn.inner.\3.update.\4"),
    (r"update\.A$", "update.a"), (r"update\.B$", "update.b"),
    (r"encoder\.prompt_modules\.prompts\.vqa\.prefix_embedding\.0\.weight", "encoder.prompt.table"),
    (r"encoder\.prompt_modules\.prompts\.vqa\.prefix_embedding\.1", "encoder.prompt.down"),
    (r"encoder\.prompt_modules\.prompts\.vqa\.prefix_embedding\.3", "encoder.prompt.up"),
    (r"shared_task_embed\.task_to_embeddings\.(\w+)", r"task_embedding.copies.\1.value"),
    (r"(\w+)\.adapter_layers_hyper_net\.layer_id_embeddings", r"hypernetworks.\1.layer"),
    (r"(\w+)\.adapter_layers_hyper_net\.task_hypernet\.task_embeding_generator", r"hypernetworks.\1.project"),
    (r"(\w+)\.adapter_layers_hyper_net\.LayerNorm", r"hypernetworks.\1.norm"),
    (r"(\w+)\.adapter_layers_hyper_net\.feed_forward_(\w+)_sampler_hyper_net", r"hypernetworks.\1.write.ffn.\2"),
    (r"(\w+)\.adapter_layers_hyper_net\.(self|cross)_attention_(\w+)_sampler_hyper_net",
     r"hypernetworks.\1.write.\2_attn.\3"),
    (r"(up|down)\.weight_generator\.0", r"\1"), (r"(up|down)\.bias_generator\.0", r"\1_bias"),
]
COPIES = {  # where a sampler of one task lies
    "all": {r"adapters\.t?vqa\.(down|up)_sampler": r"\1"},
    "half": {r"adapters\.(\w+)\.down_sampler": r"down.copies.\1", r"adapters\.vqa\.up_sampler": "up"},
    "none": {r"adapters\.(\w+)\.(down|up)_sampler": r"copies.\1.\2"},
}


class Recorded:
    """One file: `model` with its method and weights in place, the inputs, and all keys with our names of weights."""

    def __init__(self, path: Path):
        self.arrays = dict(np.load(path))
        self.meta = json.loads(str(self.arrays["meta"]))
        self.family, case, _ = path.stem.split("-")
        method, self.share, sizes, sites = METHOD_OF[case]
        config = tiny_config(self.family, self.meta)
        self.theirs = {names[0].removeprefix("model."): ours for ours, names in expand(FAMILIES[self.family][1], config).items()}
        self.model = Model(config)
        tasks = [str(self.arrays["task"])] if "tvqa" in path.stem else TASKS
        install(self.model, method, 32, tasks, self.share, sites, **sizes)
        weights = {self.rename(key[2:]): torch.from_numpy(x) for key, x in self.arrays.items() if key.startswith("w/")}
        weights["logits_bias"] = weights.get("logits_bias", torch.zeros(1, 164)).flatten()
        left = self.model.load_state_dict(weights, strict=True)
        assert not left.missing_keys and not left.unexpected_keys

    def rename(self, name: str) -> str:
        name = name.removeprefix("model.")
        for pattern, ours in [*RENAMES, *COPIES[self.share].items()]:
            name = re.sub(pattern, ours, name)
        if name.replace(".bias", ".weight") in self.theirs:                                 # T5 with BitFit has more biases
            return self.theirs.get(name) or self.theirs[name.replace(".bias", ".weight")].replace(".weight", ".bias")
        return self.theirs.get(name, name)

    def batch(self, prefix: str = "in/"):
        """ids, features [batch, pictures, tokens, channels], labels and the weights of the task's loss."""
        task = prefix.split("/")[1] or str(self.arrays.get("task", "vqa"))
        ids, labels = (torch.from_numpy(self.arrays[prefix + key]) for key in ("input_ids", "labels"))
        return ids, features(self.arrays[prefix + "vis_feats"]), labels, loss_weights(task, labels, self.arrays.get(prefix + "scores"))


def tiny_config(family: str, meta: dict) -> Config:
    if family == "t5":
        return t5(dict(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, relative_attention_num_buckets=32,
                       dropout_rate=0.0), feature_dim=24, words=164)
    defaults = meta.get("defaults", {})
    return Config(vocab_size=164, d_model=32, heads=4, d_ff=64, encoder_layers=2, decoder_layers=2, max_positions=64,
                  feature_dim=24, dropout=0.0, start=2, pad=1, end=2,
                  no_repeat_ngram=defaults.get("no_repeat_ngram_size", 0), early_stopping=defaults.get("early_stopping", False))


def features(array) -> torch.Tensor:
    """Recorded features, one picture or two of 49, or 64 frames, to what our model takes."""
    x = torch.from_numpy(array)
    x = x if x.ndim == 4 else x[:, None]                                                    # [batch, pictures, tokens, C]
    if x.size(2) == 64:
        return x
    grids = x.flatten(0, 1).transpose(1, 2).unflatten(2, (7, 7))
    return pool(grids).unflatten(0, x.shape[:2])


def loss_weights(task: str, labels, scores) -> torch.Tensor:
    """The weights with which Model.loss is the task's loss in the original."""
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
    return sorted(path for path in FOLDER.glob(f"*-*-{kind}.npz") if path.stem.split("-")[1] in METHOD_OF)
