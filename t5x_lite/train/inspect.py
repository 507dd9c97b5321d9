"""What a run sees and holds, for people: batches as text, parameters as a table."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from t5x_lite import trees
from t5x_lite.data import inspection
from t5x_lite.data.pipeline import Batches
from t5x_lite.devices import HOST
from t5x_lite.models.config import ModelConfig
from t5x_lite.peft.transform import Full, Transform, flatten_names
from t5x_lite.sharding import Partitioner, local_bytes
from t5x_lite.train.session import Session


def inspect_data(
    *, batches: Batches, step: int = 0, rows: int = 1, tokens: int = 40, console: Any = None
) -> None:
    """Prints what the model sees at `step`: ids, pieces, weights, segments and decoded text.

    Args:
      batches: the training batches, as in `train.batches`.
      step: which batch.
      rows: how many of its rows.
      tokens: how many tokens of each stream to print one by one; the text is whole.
    """
    console = console or Console(soft_wrap=False)
    found = inspection.describe(batches, step, slice(0, rows))
    shapes = {key: (batches.batch_size, *shape[1:]) for key, shape in found["shapes"].items()}
    console.print(f"[bold]Step {step}[/bold]: batch of " + escape(str(shapes)))
    for row in found["rows"]:
        for key, columns in row["tokens"].items():
            table = Table(title=f"row {row['row']}, {key}", title_justify="left")
            for column in columns:
                table.add_column(column, justify="right")
            for index in range(min(tokens, len(columns["ids"]))):
                table.add_row(*(escape(str(values[index])) for values in columns.values()))
            console.print(table)
        for segment in row["segments"]:
            for key, text in segment["text"].items():
                console.print(
                    f"row {row['row']}, segment {segment['segment']}, {key}: {text!r}", markup=False
                )
    console.print("[bold]Packing efficiency[/bold] (share of positions that hold a token)")
    for name, share in {**found["efficiency"], **inspection.measure(batches)}.items():
        console.print(f"  {name}: {share:.3f}")


def inspect_params(
    *,
    model: ModelConfig,
    transform: Transform = Full(),
    partitioner: Partitioner = Partitioner(),
    console: Any = None,
) -> None:
    """Prints the parameter table: path, shape, logical axes, sharding, size and copies, and totals.

    A row is an array: of quantised weights the codes and the scales have one each. It has as many
    copies as devices hold the same numbers of it. Nothing is allocated: it works for models of any
    size.

    Args:
      model: its config.
      transform: what is trained.
      partitioner: the mesh and its rules.
      console: to print to; None: standard output.
    """
    console = console or Console(width=max(Console().width, 170))  # paths are not cut
    session = Session(model, transform, partitioner)
    devices = partitioner.mesh.size
    table = Table(title=f"Parameters, {_describe(partitioner)}")
    table.add_column("path", no_wrap=True)
    for column in ("shape", "axes", "sharding"):
        table.add_column(column, overflow="fold")
    for column in ("dtype", "numbers", "bytes a device", "memory", "copies"):
        table.add_column(column, justify="right")
    table.add_column("trained")
    sizes: dict[str, list[tuple[int, int, int, int]]] = {"yes": [], "no": []}
    names = session.split_names
    for shapes, axes, trained in zip(session.split_shapes, names, sizes, strict=True):
        flat_axes = flatten_names(axes)
        for path, leaf in trees.flatten(shapes).items():
            count = math.prod(leaf.shape)
            local, whole = local_bytes(leaf), count * leaf.dtype.itemsize
            away = local if leaf.sharding.memory_kind == HOST else 0
            sizes[trained].append((count, local, whole, away))
            table.add_row(
                path,
                str(leaf.shape),
                " ".join(map(str, flat_axes[path])),
                str(tuple(leaf.sharding.spec)),
                str(leaf.dtype),
                f"{count:,}",
                f"{local:,}",
                "host" if away else "device",
                f"{devices * local // max(whole, 1):,}",
                trained,
            )
    console.print(table)
    every = {"trained": sizes["yes"], "frozen": sizes["no"], "all": sizes["yes"] + sizes["no"]}
    for label, kept in every.items():
        count, local, whole, away = (sum(size) for size in zip((0, 0, 0, 0), *kept, strict=True))
        console.print(
            f"{label:>8}: {count:,} numbers, {_mib(whole)}; {_mib(local - away)} on each device"
            + (f", {_mib(away)} for each on its host" if away else "")
            + (f", {_mib(devices * local - whole)} in further copies" if devices > 1 else "")
        )
    console.print(f"The model by itself has {trees.count(session.base_shapes):,} parameters")


def _describe(partitioner: Partitioner) -> str:
    mesh = partitioner.mesh
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    slices = len(partitioner.by_slice)
    kind = mesh.devices.flat[0].platform
    return f"mesh {sizes}: {mesh.size} {kind} device(s)" + (
        f" in {slices} slices" if slices > 1 else ""
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
