"""The other side of `decode.py`: Hugging Face transformers on torch, in a process of its own.

Run by `decode.py`, in a Python that has torch and transformers. Reads one JSON object a line:
`{"make": {...}}` builds a model with random weights, `{"run": {...}}` generates once; answers each
with one line.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers


def make(shape: dict) -> torch.nn.Module:
    """A T5 1.1 or a GPT-2 of that shape."""
    torch.manual_seed(0)
    if shape["encoder_layers"]:
        config = transformers.T5Config(
            vocab_size=shape["vocab"],
            d_model=shape["embed"],
            d_kv=shape["head_dim"],
            d_ff=shape["mlp"],
            num_layers=shape["encoder_layers"],
            num_decoder_layers=shape["layers"],
            num_heads=shape["heads"],
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    config = transformers.GPT2Config(
        vocab_size=shape["vocab"],
        n_positions=shape["positions"],
        n_embd=shape["embed"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_inner=shape["mlp"],
    )
    return transformers.GPT2LMHeadModel(config).eval()


def run(model: torch.nn.Module, tokens: torch.Tensor, beams: int, new: int) -> tuple[float, float]:
    """Wall and CPU seconds of `new` tokens for each row; no row ends before."""
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        made = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=beams,
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
    spent = time.perf_counter() - wall, time.process_time() - cpu
    assert made.shape[1] - (1 if model.config.is_encoder_decoder else tokens.shape[1]) == new
    return spent


def main() -> None:
    transformers.logging.set_verbosity_error()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions), flush=True)
    model = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "make" in asked:
            model = make(asked["make"])
            print(json.dumps({}), flush=True)
            continue
        tokens = torch.tensor(asked["run"]["tokens"])
        wall, cpu = run(model, tokens, asked["run"]["beams"], asked["run"]["new"])
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)


if __name__ == "__main__":
    main()
