"""Hugging Face's side of `peers.py` and `lora_step.py`: transformers and PEFT on torch.

Run by them, in a Python that has torch, transformers and peft. Reads one JSON object a line:
`{"make": {...}}` builds a model with random weights and takes its first step, `{"run": {"steps":
n}}` takes one step untimed and then n, `{"trace": {}}` one in torch's profiler, `{"product":
{...}}` times one product of matrices; answers each with one line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import peft
import torch
import transformers


def t5(asked: dict) -> tuple[torch.nn.Module, dict]:
    """T5 1.1, and rows without padding."""
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
    # Transformers 5 ties the head to the embedding whatever the config asks for.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    encoder, decoder = tokens(asked, asked["encoder"]), tokens(asked, asked["decoder"])
    batch = {"input_ids": encoder, "attention_mask": torch.ones_like(encoder), "labels": decoder}
    return model, batch


def bert(asked: dict) -> tuple[torch.nn.Module, dict]:
    """BERT, its head on every token; the loss is of `slots` tokens a row."""
    config = transformers.BertConfig(
        vocab_size=asked["vocab"],
        hidden_size=asked["embed"],
        num_hidden_layers=asked["layers"],
        num_attention_heads=asked["heads"],
        intermediate_size=asked["mlp"],
        max_position_embeddings=asked["positions"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    encoder = tokens(asked, asked["encoder"])
    order = torch.rand(encoder.shape).argsort(1)
    batch = {
        "input_ids": encoder,
        "attention_mask": torch.ones_like(encoder),
        "labels": encoder.masked_fill(order >= asked["slots"], -100),
    }
    return transformers.BertForMaskedLM(config), batch


def gpt2(asked: dict) -> tuple[torch.nn.Module, dict]:
    """GPT-2, and whole blocks of text, which need no mask."""
    config = transformers.GPT2Config(
        vocab_size=asked["vocab"],
        n_positions=asked["positions"],
        n_embd=asked["embed"],
        n_layer=asked["layers"],
        n_head=asked["heads"],
        n_inner=asked["mlp"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    decoder = tokens(asked, asked["decoder"])
    return transformers.GPT2LMHeadModel(config), {"input_ids": decoder, "labels": decoder}


def tokens(asked: dict, length: int) -> torch.Tensor:
    return torch.randint(2, asked["vocab"], (asked["rows"], length))


def adapted(model: torch.nn.Module, method: str) -> torch.nn.Module:
    """The model with T5's usual adapters: on q and v, IA3's on k, v and wo."""
    if method == "full":
        return model
    if method == "ia3":
        settings = peft.IA3Config(task_type="SEQ_2_SEQ_LM")
    else:
        settings = peft.LoraConfig(
            task_type="SEQ_2_SEQ_LM",
            r=8,
            lora_alpha=16,
            target_modules=["q", "v"],
            use_dora=method == "dora",
        )
    return peft.get_peft_model(model, settings)


def make(asked: dict) -> tuple[Callable[[], None], int]:
    """A step of training, and how many parameters it trains."""
    torch.manual_seed(0)
    model, batch = {"t5": t5, "bert": bert, "gpt2": gpt2}[asked["family"]](asked)
    model = adapted(model, asked["method"]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    called = torch.compile(model) if asked["compiled"] else model
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=asked["dtype"] == "bfloat16")

    def step() -> None:
        with autocast:
            loss = called(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in trained)


def run(step: Callable[[], None], steps: int) -> dict[str, list[float]]:
    """Seconds of each step but the first."""
    spent: dict[str, list[float]] = {"wall": [], "cpu": []}
    for number in range(steps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        if number:
            spent["wall"].append(time.perf_counter() - wall)
            spent["cpu"].append(time.process_time() - cpu)
    return spent


def traced(step: Callable[[], None]) -> list[tuple[str, float]]:
    """Torch's operations in a step, and the seconds of each without those that it calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return [(event.key, event.self_cpu_time_total / 1e6) for event in profile.key_averages()]


def product(equation: str, left: list[int], right: list[int]) -> Callable[[], torch.Tensor]:
    """One product of two float32 arrays `[*batch, rows, columns]`, transposed as it comes."""
    first, second = equation.split("->")[0].split(",")
    x, y = torch.ones(left), torch.ones(right)
    x = x.mT if first.endswith("m") else x
    y = y.mT if second.endswith("k") else y
    return lambda: torch.matmul(x, y)


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_flush_denormal(True)  # as XLA does; see README: T5 took Intel's four times as long
    modules = (torch, transformers, peft)
    hello = {module.__name__: module.__version__ for module in modules}
    hello["instructions"] = torch.backends.cpu.get_cpu_capability()
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "make" in asked:
            step, trained = make(asked["make"])
            step()
            answer: dict = {"trained": trained}
        elif "trace" in asked:
            answer = {"operations": traced(step)}
        elif "product" in asked:
            answer = {"wall": statistics.median(run(product(**asked["product"]), 5)["wall"])}
        else:
            answer = run(step, asked["run"]["steps"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
