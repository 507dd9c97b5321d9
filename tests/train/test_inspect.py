"""The report of parameters' placement, against arithmetic."""

from __future__ import annotations

import io
import re

import jax
from rich.console import Console

from t5x_lite.peft.lora import LoRA
from t5x_lite.sharding import Partitioner
from t5x_lite.train.inspect import inspect_params
from tests import common


def report(partitioner, **settings):
    out = io.StringIO()
    console = Console(file=out, width=200)
    inspect_params(model=common.T5, partitioner=partitioner, console=console, **settings)
    return out.getvalue()


def totals(text):
    lines = re.findall(r"(trained|frozen|all): ([\d,]+) numbers, (.*)", text)
    return {label: (int(count.replace(",", "")), sizes) for label, count, sizes in lines}


def row(text, path):
    cells = next(line for line in text.splitlines() if path in line).split("│")
    return [cell.strip() for cell in cells[1:-1]]


def test_copies_are_counted():
    text = report(Partitioner(data=-1, fsdp=2, model=2, num_slices=2))
    assert f"mesh data {jax.device_count() // 4} x fsdp 2 x model 2" in text
    assert f"{jax.device_count()} cpu device(s) in 2 slices" in text
    # Split over model and fsdp, over fsdp alone, and not at all.
    copies = jax.device_count() // 4
    wanted = ("mlp/wi_0/kernel", 2 * 32 * 64, 4), ("mlp_norm/scale", 2 * 32, 2)
    for path, count, parts in wanted:
        numbers = row(text, f"encoder/layers/{path}")[4:9]
        copied = str(copies * 4 // parts)
        assert numbers == ["float32", f"{count:,}", f"{4 * count // parts:,}", "device", copied]


def test_what_hosts_hold_is_not_on_the_devices():
    lora = LoRA(rank=2, targets=(".*/query/kernel",))
    text = report(Partitioner(data=-1, offload=("frozen",)), transform=lora)
    places = ("mlp/wi_0/kernel", "host"), ("mlp_norm/scale", "device"), ("query/kernel/a", "device")
    for path, place in places:
        assert row(text, path)[7] == place
    trained, frozen, _ = (line for line in text.splitlines() if " numbers, " in line)
    assert "on its host" not in trained
    assert re.search(r"; 0\.0 MiB on each device, [\d.]+ MiB for each on its host", frozen)


def test_totals_are_of_bytes():
    text = report(Partitioner(data=-1), transform=LoRA(rank=2, targets=(".*/query/kernel",)))
    found = totals(text)
    assert found["all"][0] == found["trained"][0] + found["frozen"][0]
    # Queries of three attentions in two layers, 32 x (4 x 8), from both sides.
    assert found["trained"][0] == 3 * 2 * 2 * (32 + 32)
    assert f"The model by itself has {found['frozen'][0]:,} parameters" in text
    for count, sizes in found.values():
        size = 4 * count / 2**20
        copies = (jax.device_count() - 1) * size
        assert sizes == (
            f"{size:,.1f} MiB; {size:,.1f} MiB on each device, {copies:,.1f} MiB in further copies"
        )
