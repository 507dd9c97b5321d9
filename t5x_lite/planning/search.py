"""Which mesh, remat and microbatches: every mesh is compiled with as little recomputing as fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console

from t5x_lite.models.config import REMAT_POLICIES, ModelConfig
from t5x_lite.planning.request import DoesNotFit, Plan, Request
from t5x_lite.sharding import MESH_AXES, Partitioner
from t5x_lite.types import InputError


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is tried. For each mesh, remat and microbatches in this order, up to the first that
    fits: to recompute and to split cost time, and are for want of memory.
    """

    model: tuple[int, ...] = (1, 2, 4, 8)  # sizes of that axis; data and fsdp share the rest
    remat: tuple[str, ...] = ("none", "dots", "full")
    microbatches: tuple[int, ...] = (1, 2, 4)
    most: int = 24  # combinations, of all meshes together

    def __post_init__(self) -> None:
        for name in ("model", "remat", "microbatches"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if unknown := set(self.remat) - set(REMAT_POLICIES):
            raise InputError(
                f"Search.remat has {sorted(unknown)}; known: {', '.join(REMAT_POLICIES)}"
            )
        if not (self.model and self.remat and self.microbatches and self.most > 0):
            raise InputError(f"{self}: expected something to try of each, and most above 0")

    def meshes(self, chips: int, slices: int = 1) -> Iterator[tuple[int, int, int]]:
        """`(data, fsdp, model)`, powers of two, split least first; data is over all slices."""
        for model in self.model:
            fsdp = 1
            while chips % (slices * model * fsdp) == 0:
                yield chips // (model * fsdp), fsdp, model
                fsdp *= 2


@dataclass(frozen=True)
class Tried:
    """One combination, and its plan, or why there is none."""

    partitioner: Partitioner
    remat: str
    microbatches: int
    plan: Plan | None = None
    reason: str = ""

    @property
    def mesh(self) -> str:
        one = self.partitioner
        return f"data {one.data} x fsdp {one.fsdp} x model {one.model}"

    def record(self) -> dict[str, Any]:
        return {
            "mesh": {axis: getattr(self.partitioner, axis) for axis in MESH_AXES},
            "remat": self.remat,
            "microbatches": self.microbatches,
            "reason": self.reason,
            **({} if self.plan is None else dataclasses.asdict(self.plan)),
        }


def search_plans(request: Request, tries: Search, console: Console) -> tuple[Plan, list[Tried]]:
    """The best plan, and all that was tried: those that fit by the cautious estimate, then others.

    Raises InputError if none fits.
    """
    tried: list[Tried] = []
    compiled = 0
    for data, fsdp, model in tries.meshes(request.slice.size, request.slice.count):
        partitioner = dataclasses.replace(request.partitioner, data=data, fsdp=fsdp, model=model)
        for microbatches in tries.microbatches if request.step == "train" else (1,):
            settled = False  # no other remat or microbatches are worth trying on this mesh
            for remat in tries.remat if request.step == "train" else tries.remat[:1]:
                if compiled >= tries.most:
                    break
                one = Tried(partitioner, remat, microbatches)
                console.print(f"{one.mesh}, remat {remat}, {microbatches} microbatches ...")
                changed = dataclasses.replace(
                    request,
                    partitioner=partitioner,
                    microbatches=microbatches,
                    model=_with_remat(request.model, remat),
                )
                try:
                    found = changed.plan()
                    tried.append(dataclasses.replace(one, plan=found))
                    settled, compiled = found.fits, compiled + 1
                except DoesNotFit as error:
                    tried.append(dataclasses.replace(one, reason=_brief(error)))
                    compiled += 1
                except InputError as error:  # this mesh can't be
                    tried.append(dataclasses.replace(one, reason=_brief(error)))
                    settled = True
                if settled:
                    break
            if settled:
                break
    tried.sort(key=_rank)
    best = tried[0].plan if tried else None
    if best is None or not best.fits:
        reasons = "; ".join(f"{one.mesh}, remat {one.remat}: {one.reason}" for one in tried[:4])
        raise InputError(
            f"nothing that was tried fits {request.slice} ({reasons}): take a larger slice, fewer "
            "rows, or other Search.model, .remat and .microbatches"
        )
    return best, tried


_NEVER: Final = float("inf")


def _rank(one: Tried) -> tuple[bool, float]:
    if one.plan is None:
        return True, _NEVER
    return not one.plan.fits, one.plan.cautious_seconds


def _brief(error: InputError) -> str:
    return str(error).split(": try ")[0].partition(": ")[2] or str(error)


def _with_remat(model: ModelConfig, remat: str) -> ModelConfig:
    stacks = {
        name: dataclasses.replace(stack, remat=remat)
        for name in ("encoder", "decoder")
        if (stack := getattr(model, name)) is not None
    }
    return dataclasses.replace(model, **stacks)
