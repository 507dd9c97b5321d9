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

    A parameter has as many copies as devices hold the same number of it. Nothing is allocated: it
    works for models of any size.
    """
    console = console or Console(width=max(Console().width, 150))  # paths are not cut
    session = Session(model, transform, partitioner)
    devices = partitioner.mesh.size
    table = Table(title=f"Parameters, {_describe(partitioner)}")
    for column in ("path", "shape", "axes", "sharding"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "per device", "copies"):
        table.add_column(column, justify="right")
    table.add_column("trained")
    counts = []
    names = session.split_names
    for shapes, axes, trained in zip(session.split_shapes, names, ("yes", "no"), strict=True):
        flat_axes = flatten_names(axes)
        for path, leaf in trees.flatten(shapes).items():
            count = math.prod(leaf.shape)
            local, whole = local_bytes(leaf), count * leaf.dtype.itemsize
            counts.append((trained, count, local, whole))
            table.add_row(
                path,
                str(leaf.shape),
                " ".join(map(str, flat_axes[path])),
                str(tuple(leaf.sharding.spec)),
                f"{count:,}",
                f"{count * local // whole:,}",
                f"{devices * local // whole:,}",
                trained,
            )
    console.print(table)
    for label, keep in (("trained", ("yes",)), ("frozen", ("no",)), ("all", ("yes", "no"))):
        kept = [sizes for trained, *sizes in counts if trained in keep]
        count, local, whole = (sum(size) for size in zip(*kept, strict=True)) if kept else (0, 0, 0)
        console.print(
            f"{label:>8}: {count:,} parameters, {_mib(whole)}; {_mib(local)} on each device"
            + (f", {_mib(devices * local - whole)} of copies in all" if devices > 1 else "")
        )


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
