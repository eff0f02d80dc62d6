"""Writes golden_segformer.json: what Hugging Face's SegFormer says with test_model.fill's weights.

pip install transformers==5.23.0 && python tests/make_golden.py
"""

import json
import sys
from pathlib import Path

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import export  # noqa: E402
import model  # noqa: E402


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
        state = export.hf_state(fill(model.build(name, 5)).state_dict())
        net, told = SegformerForSemanticSegmentation.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
        assert not any(told.values()), told
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
