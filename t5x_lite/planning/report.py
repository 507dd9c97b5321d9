"""Plans for people: tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from t5x_lite.planning.largest import Largest
from t5x_lite.planning.request import Plan
from t5x_lite.planning.search import Tried


def show(found: Plan, total_steps: int | None, output: str | None, console: Console) -> None:
    """Prints a plan for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    slices = f"{found.slices} slices of " if found.slices > 1 else ""
    table = Table(title=f"{slices}{found.topology}, {mesh}: memory of a chip")
    table.add_column("kind")
    table.add_column("GiB", justify="right")
    for kind, size in found.memory.items():
        table.add_row(kind, f"{size / 2**30:.2f}")
    verdict = "fits" if found.fits else "does NOT fit"
    table.add_row(f"all, of {found.hbm / 2**30:.0f}: {verdict}", f"{found.used / 2**30:.2f}")
    for kind, size in found.host_memory.items():
        table.add_row(f"host memory: {kind}", f"{size / 2**30:.2f}")
    console.print(table)
    copies = " and copies to and from the host" if found.host_memory else ""
    table = Table(title=f"Collectives{copies} of a step, each chip")
    for column in ("kind", "times", "sends, MiB", "on its way, ms"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for one in found.collectives:
        ms = 1e3 * one["seconds"]
        table.add_row(
            one["kind"], f"{one['count']:,.0f}", f"{one['sent'] / 2**20:,.1f}", f"{ms:.2f}"
        )
    console.print(table)
    table = Table(title="Largest costs of a step, estimated")
    for column in ("where", "ms", "percent"):
        table.add_column(column, justify="left" if column == "where" else "right")
    for where, seconds in found.costs.items():
        table.add_row(where, f"{1e3 * seconds:.2f}", f"{100 * seconds / found.step_seconds:.0f}")
    console.print(table)
    say = console.print
    say(
        f"{found.parameters:,} parameters, {found.trained:,} trained; {found.tokens:,} tokens a "
        "step"
    )
    between = (
        f" ({1e3 * found.between_seconds:,.1f} of these between slices)" if found.slices > 1 else ""
    )
    say(
        f"{_STEPS[found.step]}, estimated: {1e3 * found.step_seconds:,.1f} ms, of which "
        f"{1e3 * found.exposed_seconds:,.1f} wait for collectives{copies}{between}; "
        f"MFU {found.mfu:.2f}, "
        f"{found.tokens_per_second:,.0f} tokens/s"
    )
    slow = found.cautious_seconds
    say(f"Cautiously: {1e3 * slow:,.1f} ms, MFU {found.mfu * found.step_seconds / slow:.2f}")
    if total_steps is not None:
        hours = total_steps * found.step_seconds * found.chips / 3600
        say(f"{total_steps:,} steps: {hours:,.1f} chip-hours")
    say(f"Method: {found.method}")
    if output is not None:
        say(f"Written: {output}", soft_wrap=True)


_STEPS = {"train": "Step", "eval": "Evaluation of a batch", "decode": "Decoding a batch"}


def show_largest(largest: Largest, console: Console) -> None:
    """Prints how many rows fit."""
    each = largest.rows // largest.step
    more = "nothing tried does not" if largest.too_many is None else f"{largest.too_many:,} do not"
    least = "" if largest.settled else "at least "
    console.print(
        f"Largest batch that fits: {least}{largest.rows:,} rows, {each} for each of "
        f"{largest.step:,} data devices and microbatches ({more})"
    )


def show_search(tried: Sequence[Tried], console: Console) -> None:
    """Prints what was tried, the best first."""
    table = Table(title="Tried, by the cautious estimate")
    for column in ("mesh", "remat", "microbatches", "GiB", "ms", "cautiously", "MFU"):
        table.add_column(column, justify="left" if column in ("mesh", "remat") else "right")
    for one in tried:
        what = one.mesh, one.remat, str(one.microbatches)
        if one.plan is None:
            table.add_row(*what, f"[dim]{one.reason}[/]")
            continue
        found = one.plan
        table.add_row(
            *what,
            f"{found.used / 2**30:.2f}",
            f"{1e3 * found.step_seconds:,.1f}",
            f"{1e3 * found.cautious_seconds:,.1f}",
            f"{found.mfu:.2f}",
        )
    console.print(table)
