"""Writes golden_segformer.json: what Hugging Face's SegFormer says with test_model.fill's weights.

pip install transformers==5.23.0 && python tests/make_golden.py
"""

import json
import re
import sys
from pathlib import Path

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import model  # noqa: E402

RENAMES = [
    (r"^encoder\.stages\.(\d)\.patch_embed\.proj", r"segformer.stages.\1.patch_embeddings.proj"),
    (
        r"^encoder\.stages\.(\d)\.patch_embed\.norm",
        r"segformer.stages.\1.patch_embeddings.layer_norm",
    ),
    (r"^encoder\.stages\.(\d)\.norm", r"segformer.stages.\1.layer_norm"),
    (r"^encoder", "segformer"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.q\.", ".attention.q_proj."),
    (r"\.attn\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
    (r"\.attn\.norm\.", ".attention.sequence_reduction.layer_norm."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.mlp\.dwconv", ".mlp.dwconv.dwconv"),
    (r"^head\.linears\.(\d)", r"decode_head.linear_projections.\1.proj"),
    (r"^head\.fuse", "decode_head.linear_fuse"),
    (r"^head\.norm", "decode_head.batch_norm"),
    (r"^head\.classifier", "decode_head.classifier"),
]


def theirs(state):
    """Our state dict in their names, with keys and values apart."""
    out = {}
    for name, t in state.items():
        for ours, new in RENAMES:
            name = re.sub(ours, new, name)
        if ".attn.kv." in name:
            k, v = t.chunk(2)
            out[name.replace(".attn.kv.", ".attention.k_proj.")] = k
            out[name.replace(".attn.kv.", ".attention.v_proj.")] = v
        else:
            out[name] = t
    return out


def main():
    path = HERE / "golden_segformer.json"
    if not path.exists():
        path.write_text("{}")  # test_model reads it
    from test_model import fill

    golden = {}
    for name in ("nano", "b0", "b2"):
        dims, heads, depths, width = model.MODELS[name]
        config = SegformerConfig(
            hidden_sizes=dims,
            num_attention_heads=heads,
            depths=depths,
            decoder_hidden_size=width,
            num_labels=5,
        )
        net = SegformerForSemanticSegmentation(config).eval()
        net.load_state_dict(theirs(fill(model.build(name, 5)).state_dict()))
        for stage in net.segformer.stages:  # the eps of the original code, whatever the port's
            stage.layer_norm.eps = 1e-6
            for block in stage.blocks:
                block.layernorm_before.eps = block.layernorm_after.eps = 1e-6
        image = torch.sin(torch.arange(3 * 64 * 96, dtype=torch.float64) * 0.01).float()
        with torch.no_grad():
            out = net(image.view(1, 3, 64, 96), output_hidden_states=True)
        golden[name] = {}
        for key, t in (("logits", out.logits), ("feature", out.hidden_states[-1])):
            t = t.flatten()[:: max(1, t.numel() // 40)][:40]
            golden[name][key] = [round(v, 6) for v in t.tolist()]
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
