"""The other side of `lora_step.py`: Hugging Face PEFT on torch, in a process of its own.

Run by `lora_step.py`. Reads one JSON object a line: `{"make": {...}}` builds a T5 1.1 with random
weights and its adapters, `{"run": {"steps": n}}` trains one step untimed and then n; answers each
with one line.
"""

from __future__ import annotations

import json
import sys
import time

import peft
import torch
import transformers


def make(asked: dict) -> tuple[torch.nn.Module, dict]:
    """The model with adapters on q and v (IA3: on k, v and wo), and a batch without padding."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=asked["vocab"],
        d_model=asked["embed"],
        d_kv=asked["head_dim"],
        d_ff=asked["mlp"],
        num_layers=asked["layers"],
        num_heads=asked["heads"],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        use_cache=False,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if asked["method"] == "ia3":
        settings = peft.IA3Config(task_type="SEQ_2_SEQ_LM")
    else:
        settings = peft.LoraConfig(
            task_type="SEQ_2_SEQ_LM",
            r=8,
            lora_alpha=16,
            target_modules=["q", "v"],
            use_dora=asked["method"] == "dora",
        )
    model = peft.get_peft_model(model, settings).train()

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(2, asked["vocab"], (asked["rows"], length))

    encoder, decoder = tokens(asked["encoder"]), tokens(asked["decoder"])
    batch = {"input_ids": encoder, "attention_mask": torch.ones_like(encoder), "labels": decoder}
    return model, batch


def main() -> None:
    transformers.logging.set_verbosity_error()
    modules = (torch, transformers, peft)
    print(json.dumps({module.__name__: module.__version__ for module in modules}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "make" in asked:
            model, batch = make(asked["make"])
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
            print(json.dumps({}), flush=True)
            continue
        spent: dict[str, list[float]] = {"wall": [], "cpu": []}
        for number in range(asked["run"]["steps"] + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number:
                spent["wall"].append(time.perf_counter() - wall)
                spent["cpu"].append(time.process_time() - cpu)
        print(json.dumps(spent), flush=True)


if __name__ == "__main__":
    main()
