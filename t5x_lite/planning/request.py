"""A step compiled for a TPU slice that need not be there, and what is known of it then."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import jax

from t5x_lite import types
from t5x_lite.data.pipeline import Batches
from t5x_lite.decode.generate import generate
from t5x_lite.devices import HOST, described
from t5x_lite.models import flops
from t5x_lite.models.config import ModelConfig
from t5x_lite.peft.transform import Transform
from t5x_lite.planning import hlo, timing
from t5x_lite.planning.chips import Slice
from t5x_lite.sharding import Partitioner, local_bytes
from t5x_lite.train.loop import compile_step
from t5x_lite.train.optim import Optimizer
from t5x_lite.train.session import Session
from t5x_lite.train.step import Loss, eval_step
from t5x_lite.types import InputError

Step = Literal["train", "eval", "decode"]
METHOD: Final = (
    "products by the compiler's cycles, at least their operations at the chip's peak; elementwise "
    "loops by bytes at HBM's full bandwidth; loops times their trip counts; collectives round a "
    "ring at the links' bandwidth, between slices at a chip's share of the network, and copies of "
    "offloaded state over PCIe at 15 GB/s each way, hidden behind what is scheduled between start "
    "and end; Pallas kernels by roofline, of all tiles. Cautiously: the compiler's cycles for "
    "elementwise loops too, and kernels at half of their rooflines. No input pipeline, no host, no "
    "stragglers."
)


@dataclass(frozen=True)
class Arrays:
    """A global batch's arrays: by key, the length of a row and the sizes behind it."""

    rows: int
    lengths: Mapping[str, tuple[int, tuple[int, ...]]]

    @classmethod
    def of(cls, batches: Batches) -> Arrays:
        """Those of a run's first batch."""
        first = batches.batch(0, slice(0, 1))
        lengths = {key: (value.shape[1], value.shape[2:]) for key, value in first.items()}
        return cls(batches.batch_size, lengths)

    def structs(self, partitioner: Partitioner) -> dict[str, jax.ShapeDtypeStruct]:
        """As shape structs with shardings: int32, weights and values float32."""
        return {
            key: jax.ShapeDtypeStruct(
                (self.rows, length, *rest),
                "float32" if key in types.FLOAT_KEYS else "int32",
                sharding=partitioner.batch_sharding,
            )
            for key, (length, rest) in self.lengths.items()
        }


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A global batch by its sizes alone, for runs whose data is elsewhere; 0: no such stream."""

    rows: int
    encoder: int = 0  # tokens a row
    decoder: int = 0
    masked: int = 0  # slots a row, where an encoder's head answers

    def __post_init__(self) -> None:
        if self.rows < 1 or not (self.decoder or (self.encoder and self.masked)):
            raise InputError(
                f"{self}: expected rows, and a decoder, or an encoder with masked slots"
            )

    def arrays(self) -> Arrays:
        """Those of packed rows: `[rows, encoder]`, `[rows, decoder]`, `[rows, masked]`."""
        lengths: dict[str, int] = {}
        keys: tuple[str, ...]
        if self.encoder:
            keys = ("INPUT_TOKENS", "SEGMENT_IDS", "POSITIONS")
            lengths |= {getattr(types, f"ENCODER_{key}"): self.encoder for key in keys}
        if self.decoder:
            keys = ("INPUT_TOKENS", "SEGMENT_IDS", "POSITIONS", "TARGET_TOKENS", "LOSS_WEIGHTS")
            lengths |= {getattr(types, f"DECODER_{key}"): self.decoder for key in keys}
        if self.masked:
            keys = ("POSITIONS", "TARGET_TOKENS", "LOSS_WEIGHTS")
            lengths |= {getattr(types, f"MASKED_{key}"): self.masked for key in keys}
        return Arrays(self.rows, {key: (length, ()) for key, length in lengths.items()})


TEMPORARIES: Final = "activations, gradients and temporaries"  # a kind of memory


@dataclass(frozen=True)
class Plan:
    """What was found. Bytes and seconds are of one chip and one step."""

    step: Step
    topology: str  # of each slice
    slices: int
    mesh: dict[str, int]
    chips: int
    parameters: int
    trained: int
    memory: dict[str, int]  # bytes by kind, in HBM
    host_memory: dict[str, int]  # bytes by kind that a chip keeps in its host's memory
    hbm: int  # bytes that the chip has
    flops: float  # of the model's mathematics, on all chips
    step_seconds: float
    cautious_seconds: float  # the same step, where nothing but products goes as well as it can
    compute_seconds: float
    exposed_seconds: float  # waiting for collectives, or the host's memory
    between_seconds: float  # of that, for those between slices
    tokens: int  # a step
    collectives: list[dict[str, Any]]
    costs: dict[str, float]  # seconds of the largest, by place in the model
    mfu: float  # by step_seconds
    compile_seconds: float
    method: str = METHOD

    @property
    def temporaries(self) -> int:
        return self.memory[TEMPORARIES]

    @property
    def used(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.used <= self.hbm

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


class DoesNotFit(InputError):
    """More memory than a chip has."""


_REMEDIES: Final = (
    "try remat 'full', more microbatches, fewer rows, fsdp or model over more chips, or "
    "--search=True, which tries meshes and remat for you"
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run's step, and a slice or several to compile it for; see `plan`."""

    slice: Slice
    step: Step
    model: ModelConfig
    optimizer: Optimizer
    arrays: Arrays
    transform: Transform
    loss: Loss
    microbatches: int
    partitioner: Partitioner
    seed: int
    new_tokens: int
    options: Mapping[str, str]

    @property
    def rows_step(self) -> int:
        """What a batch's rows must be a multiple of. Raises InputError for an impossible mesh."""
        with described(self.slice.devices()):
            shards = dataclasses.replace(self.partitioner).batch_shards
        return shards * (self.microbatches if self.step == "train" else 1)

    def plan(self, program: str | None = None) -> Plan:
        """Compiles, and measures what comes of it; `program`: a file for its text.

        Raises DoesNotFit, and InputError for a mesh that the slice or the model does not divide.
        """
        with described(self.slice.devices()):
            session = Session(
                self.model, self.transform, dataclasses.replace(self.partitioner), self.seed
            )
            trains = self.step == "train"
            session.partitioner.check_batch_size(
                self.arrays.rows, self.microbatches if trains else 1
            )
            batch = self.arrays.structs(session.partitioner)
            if self.step == "decode":
                batch = {key: batch[key] for key in _prompt_keys(batch)}
            trained, frozen = session.split_shapes
            state = session.state_shapes(session.optimizer(self.optimizer)) if trains else None
            memory = {
                "trained parameters": _local(trained),
                "frozen parameters": _local(frozen),
                "optimizer state": 0 if state is None else _local(state.opt_state),
                "batch": _local(batch),
            }
            away = {
                "frozen parameters": _local(frozen, host=True),
                "optimizer state": 0 if state is None else _local(state.opt_state, host=True),
            }
            host = {kind: held for kind, held in away.items() if held}
            if (held := sum(memory.values())) > self.slice.chip.hbm_bytes:
                raise DoesNotFit(
                    f"{self.slice}: what a chip holds before it computes takes "
                    f"{held / 2**30:.1f} GiB of {self.slice.chip.hbm_bytes / 2**30:.0f}: "
                    f"{_REMEDIES}"
                )
            try:
                compiled, seconds = self._compiled(session, state, batch)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                # "... (38.49G) exceeds available HBM (15.75G)", or "Used 20G of 15.75G hbm"
                sizes = re.findall(r"\b([\d.]+)G\b", str(error))
                takes = f": it takes {sizes[0]} GiB of {sizes[1]}" if len(sizes) > 1 else ""
                raise DoesNotFit(
                    f"{self.slice}: the step does not fit{takes}: {_REMEDIES}"
                ) from error
        text = compiled.as_text()
        if program is not None:
            with open(program, "w", encoding="utf-8") as file:
                file.write(text)
        memory[TEMPORARIES] = _temporary(compiled)
        return self._measured(session, batch, memory, host, text, seconds)

    def _compiled(
        self, session: Session, state: Any, batch: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Any, float]:
        trained, frozen = session.split_shapes
        if self.step == "train":
            return compile_step(
                session, self.optimizer, self.loss, self.microbatches,
                self.seed, state, frozen, batch, self.options,
            )  # fmt: skip
        function: Callable[..., Any] = functools.partial(
            eval_step, model=session.model, transform=session.transform
        )
        if self.step == "decode":
            function = functools.partial(_decode, session, self.new_tokens)
        began = time.monotonic()
        jitted = jax.jit(function, out_shardings=session.partitioner.replicated)
        with session.partitioner.activate():
            lowered = jitted.lower(trained, frozen, batch)
            return lowered.compile(compiler_options=dict(self.options)), time.monotonic() - began

    def _measured(
        self,
        session: Session,
        batch: Mapping[str, jax.ShapeDtypeStruct],
        memory: dict[str, int],
        host: dict[str, int],
        text: str,
        compile_seconds: float,
    ) -> Plan:
        chip, chips, machine = self.slice.chip, self.slice.size, self.slice.machine
        program = hlo.Program.parse(text)
        times = timing.estimate(program, machine)
        cautious = timing.estimate(program, dataclasses.replace(machine, cautious=True))
        wanted = self._flops(session, batch)
        least = wanted / chips / chip.flops  # no program is faster than its mathematics
        seconds = max(times.total, least)
        rows = self.arrays.rows
        sizes = (math.prod(x.shape) for key, x in batch.items() if key in _STREAMS)
        return Plan(
            step=self.step,
            topology=self.slice.topology,
            slices=self.slice.count,
            mesh=dict(session.partitioner.mesh.shape),
            chips=chips,
            parameters=_count(session.base_shapes),
            trained=_count(session.split_shapes[0]),
            memory=memory,
            host_memory=host,
            hbm=chip.hbm_bytes,
            flops=wanted,
            step_seconds=seconds,
            cautious_seconds=max(cautious.total, least),
            compute_seconds=times.compute,
            exposed_seconds=times.exposed,
            between_seconds=times.between,
            tokens=rows * self.new_tokens if self.step == "decode" else sum(sizes),
            collectives=[dataclasses.asdict(traffic) for traffic in times.traffic.values()],
            costs=dict(sorted(times.by_source.items(), key=lambda one: -one[1])[:12]),
            mfu=least / seconds,
            compile_seconds=compile_seconds,
        )

    def _flops(self, session: Session, batch: Mapping[str, jax.ShapeDtypeStruct]) -> float:
        if self.step == "train":
            full = session.transform.trains_base
            return float(flops.train_flops(session.config, batch, full=full))
        if self.step == "eval":
            return float(flops.train_flops(session.config, batch) / 3)
        rows, lengths = self.arrays.rows, self.arrays.lengths
        encoder, prompt = (lengths.get(key, (0, ()))[0] for key in _STREAMS)
        written = self.new_tokens + (0 if encoder else prompt)
        sides = (rows if encoder else 0, encoder), (rows, written)
        return float(flops.forward_flops(session.config, *sides))


def _decode(
    session: Session, new_tokens: int, params: types.Params, frozen: types.Params, batch: Any
) -> types.Array:
    """Greedy, to the end; which ids end and pad a row makes no difference."""
    return generate(
        session.model,
        session.transform.apply(params, frozen),
        batch,
        max_tokens=new_tokens,
        eos_id=1,
        pad_id=0,
    )


def _prompt_keys(batch: Mapping[str, Any]) -> tuple[str, ...]:
    """What generation starts from: the encoder's text where there is one, the decoder's else."""
    stream = "encoder" if types.ENCODER_INPUT_TOKENS in batch else "decoder"
    return tuple(key for key in (f"{stream}_input_tokens", f"{stream}_segment_ids") if key in batch)


_STREAMS: Final = (types.ENCODER_INPUT_TOKENS, types.DECODER_INPUT_TOKENS)


def _local(tree: Any, host: bool = False) -> int:
    """Bytes of one device's shards, in its own memory or in its host's."""
    return sum(
        local_bytes(leaf)
        for leaf in jax.tree.leaves(tree)
        if (leaf.sharding.memory_kind == HOST) == host
    )


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _temporary(compiled: Any) -> int:
    """What stands in memory beside the arguments; results in their place count once."""
    used = compiled.memory_analysis()
    return int(used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes)
