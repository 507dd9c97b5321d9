"""Text in, text out: a model asked about files, standard input, or at a prompt."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import Progress

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode import modes
from t5x_lite.decode.asking import Prompt
from t5x_lite.decode.modes.asker import Asker
from t5x_lite.decode.sampling import BeamSearch, Sampling, Strategy
from t5x_lite.models.cache import CacheDtype
from t5x_lite.sharding import Partitioner
from t5x_lite.train import asked
from t5x_lite.train.opening import open_model
from t5x_lite.types import InputError


def infer(
    *,
    model_dir: str,
    adapter: str | None = None,
    input: str = "-",
    output: str = "-",
    mode: modes.Name | None = None,
    prefix: str = "",
    strategy: Strategy | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int | None = None,
    cache_dtype: CacheDtype | None = None,
    window: int | None = None,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    prompt: Prompt | None = None,
    mode_token: Literal["R", "S", "X"] | None = None,
    pooling: Literal["first", "last", "mean"] | None = None,
    candidates: int = 5,
    step: int | Literal["best"] | None = None,
    vocabulary: Vocabulary | None = None,
    batch_size: int = 32,
    max_input_tokens: int | None = None,
    max_tokens: int = 64,
    partitioner: Partitioner = Partitioner(),
) -> int:
    """Asks the model about each input, and writes the answers as JSON lines in the inputs' order.

    Started again on a half-written output file, it goes on behind the last whole line. Inputs of
    like length are asked together, padded to a power of two: one compilation for each.

    Args:
      model_dir: a run's folder, or Hugging Face's (config.json, safetensors, a tokenizer's files).
      adapter: a PEFT directory, or a run's folder that was tuned on the model in model_dir.
      input: a text file (one input a line), a `.jsonl` file (its field `inputs`; other fields go
        along into the output), or `-` for standard input: at a terminal, a prompt.
      output: a `.jsonl` file, or `-` for standard output.
      mode: "generate" (an answer or a continuation), "infill" (the text with each `<mask>` filled),
        "score" (log-likelihood of the text, or of the field `targets` behind it), "fill_mask" (an
        encoder's candidates for each `<mask>`), "embed" (a vector), "classify" (a label, or a
        number), "tag" (a label a word); None: what the model is for.
      prefix: put before every input, as the task did in training.
      strategy: Greedy(), Sampling(...) or BeamSearch(...); None: as the four flags below say, which
        without any is Greedy().
      temperature, top_k, top_p: sample, within these limits.
      beams: search over so many beams.
      cache_dtype: "bfloat16" or "int8": keys and values take half or a quarter of the memory; None:
        the compute dtype's.
      window: what is written sees so many tokens back, itself included, and the cache holds no
        more; None: all.
      stop: texts of which the first one that is generated ends the answer, and is left out.
      seed: of sampling; an input's answer depends on it and the input's number alone.
      prompt: how a decoder alone is asked: "continue", "wrapped" (inputs end with eos) or "prefix"
        (seen in both directions, too); None: as it was trained.
      mode_token: UL2's, put before the inputs.
      pooling: of embed: "first", "last" or "mean"; None: the model's own, or the mean.
      candidates: how many tokens fill_mask names for each mask.
      step: the checkpoint; None: the latest; "best": by the run's best_metric.
      vocabulary: None: the model's.
      batch_size: inputs asked together; the last batch is filled up.
      max_input_tokens: longer inputs are an error, with their number; None: 128, or what the model
        has positions for.
      max_tokens: the most new tokens.
      partitioner: the mesh.

    Returns:
      How many answers were written.

    Raises InputError, before anything is compiled, for whatever does not fit.
    """
    if batch_size < 1:
        raise InputError(f"infer.batch_size={batch_size}: expected at least 1")
    chosen = _strategy(strategy, temperature, top_k, top_p, beams)
    loaded = open_model(
        model_dir, adapter=adapter, step=step, vocabulary=vocabulary, partitioner=partitioner
    )
    if max_input_tokens is None:
        max_input_tokens = modes.room(loaded, mode, max_tokens)
    options = modes.Options(
        max_input_tokens=max_input_tokens,
        max_tokens=max_tokens,
        candidates=candidates,
        prefix=prefix,
        strategy=chosen,
        cache_dtype=cache_dtype,
        window=window,
        seed=seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        prompt=prompt,
        mode_token=mode_token,
        pooling=pooling,
    )
    made = modes.make(loaded, mode, options)
    if input == "-" and sys.stdin.isatty():
        return _converse(made, output)
    asker = Asker(made, batch_size)
    if os.path.exists(input) and os.path.exists(output) and os.path.samefile(input, output):
        raise InputError(f"infer.output '{output}' is infer.input: name another file")
    items = list(asked.read_items(input))
    done = asked.finished_lines(output, items)
    items = items[done:]
    rows = [_encode(made, item, number) for number, item in enumerate(items, start=done + 1)]
    quiet = jax.process_index() != 0
    console = Console(file=sys.stderr)
    with (
        asked.open_output(output, done, quiet) as file,
        Progress(console=console, disable=quiet or not console.is_terminal) as progress,
    ):
        task = progress.add_task(made.name, total=len(rows))
        remaining = zip(items, rows, strict=True)
        for answers in asker.answers(rows, done):
            for answer, (item, row) in zip(answers, remaining, strict=False):
                _write(file, item, made.record(item, row, answer))
            file.flush()
            progress.advance(task, len(answers))
    return len(items)


def _encode(mode: modes.Mode, item: Mapping[str, Any], number: int) -> modes.Row:
    try:
        if not item["inputs"].strip() and not (mode.name == "score" and item.get("targets")):
            raise InputError("is empty: expected a text")
        return mode.encode(item)
    except InputError as error:
        joint = " " if str(error).startswith("is empty") else ": "
        raise InputError(f"input {number}{joint}{error}") from error


def _write(file: Any, item: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    file.write(json.dumps({**item, **record}, ensure_ascii=False) + "\n")


def _strategy(
    strategy: Strategy | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    beams: int | None,
) -> Strategy | None:
    """The strategy that the flags name; None: nobody asked for one."""
    limits = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in limits.items() if value is not None}
    said = [*given, *(["beams"] if beams is not None else [])]
    if strategy is not None and said:
        raise InputError(
            f"infer.{said[0]} and infer.strategy={strategy} both say how to decode: leave one out"
        )
    if given and beams is not None:
        raise InputError(f"infer.beams={beams} searches and infer.{said[0]} samples: choose one")
    if beams is not None:
        return BeamSearch(beams=beams)
    return Sampling(**given) if given else strategy  # type: ignore[arg-type]


def _converse(mode: modes.Mode, output: str) -> int:
    """Answers line by line what is typed, until Ctrl-D; returns how many lines."""
    if jax.process_count() > 1:
        raise InputError("a prompt is for one process: give infer.input a file")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (its import gives input() a history and keys to edit with)
    asker = Asker(mode, mode.loaded.partitioner.batch_shards)
    console, count = Console(stderr=True), 0
    console.print(f"One input a line; Ctrl-D ends. Mode: {mode.name}", highlight=False)
    with asked.open_output(output, asked.finished_lines(output), output == "-") as file:
        while True:
            try:
                item = {"inputs": console.input(f"{mode.name}> ", markup=False)}
            except EOFError:
                console.print()
                return count
            try:
                row = _encode(mode, item, count + 1)
            except InputError as error:
                console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
                continue
            record = mode.record(item, row, asker.batch([row], [count])[0])
            count += 1
            print(_spoken(record), flush=True)
            _write(file, item, record)
            file.flush()


def _spoken(record: Mapping[str, Any]) -> str:
    """The answer in a line: text as it is, everything else as JSON."""
    if set(record) == {"prediction"} and isinstance(record["prediction"], str):
        return record["prediction"].replace("\n", "\\n")
    return json.dumps(record, ensure_ascii=False)
