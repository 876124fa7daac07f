"""What llama.cpp calls the model's tensors. Source: `tensor_mapping.py` of gguf, and llama.cpp's converter."""

from __future__ import annotations

import re

from llama4.families.names import NameTable

_LAYER, _BLOCK = "language_model.model.layers.*", "vision_model.model.layers.*"

_TEXT = (
    ("token_embd", "language_model.model.embed_tokens"),
    ("output_norm", "language_model.model.norm"),
    ("output", "language_model.lm_head"),
    *(
        (f"blk.*.{there}", f"{_LAYER}.{here}")
        for there, here in {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate_inp": "feed_forward.router",
            **{f"ffn_{matrix}": f"feed_forward.{matrix}_proj" for matrix in ("gate", "up", "down")},
            **{f"ffn_{matrix}_shexp": f"feed_forward.shared_expert.{matrix}_proj" for matrix in ("gate", "up", "down")},
            **{f"ffn_{matrix}_exps": f"feed_forward.experts.{matrix}_proj" for matrix in ("gate", "up", "down")},
        }.items()
    ),
)
"""Of the decoder. Rows of q and k are in the model's order: what RoPE rotates together lies side by side."""

_VISION = (
    ("v.class_embd", "vision_model.class_embedding"),
    ("v.position_embd.weight", "vision_model.positional_embedding_vlm"),
    ("v.patch_embd", "vision_model.patch_embedding.linear"),
    ("v.pre_ln", "vision_model.layernorm_pre"),
    ("v.post_ln", "vision_model.layernorm_post"),
    ("mm.model.mlp.1", "vision_model.vision_adapter.mlp.fc1"),
    ("mm.model.mlp.2", "vision_model.vision_adapter.mlp.fc2"),
    ("mm.model.fc", "multi_modal_projector.linear_1"),
    *(
        (f"v.blk.*.{there}", f"{_BLOCK}.{here}")
        for there, here in {
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_out": "self_attn.o_proj",
            "ln1": "input_layernorm",
            "ln2": "post_attention_layernorm",
            "attn_post_norm": "post_attention_layernorm",  # as newer converters call it
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        }.items()
    ),
)
"""Of the vision tower and the projection, in a file of their own."""

ROPE_DIVISORS = "rope_freqs.weight"
"""What RoPE's frequencies are divided by, one number for each pair of a head."""

NAMES = NameTable((*_TEXT, *_VISION), dropped=re.escape(ROPE_DIVISORS))
