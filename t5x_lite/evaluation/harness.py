"""A model of ours as EleutherAI's lm-evaluation-harness asks for one.

Needs the package `lm_eval`, which only this module and the program `train/harness.py` import. Texts
become tokens as its own class for Hugging Face models does it, so that published scores compare.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from t5x_lite.data.objectives.base import wrap
from t5x_lite.decode import scoring
from t5x_lite.decode.choices import score_alternatives
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.sampling import Greedy, Sampling
from t5x_lite.decode.scoring import Item, Score
from t5x_lite.evaluation.generation import cut, write_tokens
from t5x_lite.types import InputError

_NO_LIMIT = 2048  # tokens of a row where a model's positions have no end, as the harness has it
_NEW_TOKENS = 256  # where a task doesn't say, as the harness has it
_ONLY = {"num_beams": 1, "num_beam_groups": 1, "no_repeat_ngram_size": 0}
_MOST_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READ = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# What the harness asks besides the context's and the continuation's text: their ids.
Asked = tuple[Any, list[int], list[int]]


class HarnessModel(TemplateLM):
    """Answers the harness's three questions: likelihoods, rolling likelihoods, generation.

    Args:
      loaded: with a decoder and a language model's head.
      batch_size: rows at a time; rounded up to the devices that rows are split over.
      max_length: tokens of a row; None: what the model has, or 2048.
      add_bos_token: whether a decoder's rows begin with the start token. Models trained here expect
        it; GPT-2's and GPT-NeoX's tokenizers leave it out, Llama's put it in. An empty context
        always is that token.
      seed: of what is drawn, for tasks that sample.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        add_bos_token: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        scoring.check_scored(loaded.model.config)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"batch_size={batch_size}: expected a number of rows, from 1 on")
        shards = loaded.partitioner.batch_shards
        self.batch_size = math.ceil(int(batch_size) / shards) * shards
        self.loaded, self.add_bos_token, self.seed = loaded, add_bos_token, seed
        config = loaded.model.config
        self.backend = "causal" if config.encoder is None else "seq2seq"
        stacks = [name for name in ("encoder", "decoder") if getattr(config, name) is not None]
        known = [loaded.room(name) for name in stacks]
        limits = [most for most in known if most is not None]
        if max_length is not None and limits and max_length > min(limits):
            raise InputError(f"max_length={max_length}: the model has {min(limits)} positions")
        self.max_length = max_length or min(limits, default=_NO_LIMIT)

    # --- tokens ---

    @property
    def eot_token_id(self) -> int:
        return self.loaded.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.loaded.vocabulary.start_id

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.vocabulary.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text; with specials unless told otherwise, or the text begins with one."""
        vocabulary, ids = self.loaded.vocabulary, self.loaded.vocabulary.encode(string)
        if self.backend == "seq2seq":
            whole = add_special_tokens is None or add_special_tokens
            return (wrap(ids, vocabulary) if whole else ids).tolist()
        add = add_special_tokens
        if add is None:
            add = self.add_bos_token and ids[:1].tolist() != [vocabulary.start_id]
        return [vocabulary.start_id, *ids.tolist()] if add else ids.tolist()

    # --- likelihoods ---

    def _loglikelihood_tokens(
        self, requests: Sequence[Asked], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding writes it), in the requests' order.

        Requests with one context, such as the choices of a question, share its cache.
        """
        items = [self._item(context, continuation) for _, context, continuation in requests]
        scores = self._scores(items)
        answers = [(score.logprob, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _item(self, context: Sequence[int], continuation: Sequence[int]) -> Item:
        """An item, its context cut on the left to what fits."""
        written = np.asarray(continuation, np.int32)
        room = self.max_length
        if self.backend == "causal":
            room = max(1, self.max_length + 1 - len(written))  # the last token is never read
        else:
            written = written[: self.max_length]
        return Item(np.asarray(context, np.int32)[-room:], written)

    def _scores(self, items: Sequence[Item]) -> list[Score]:
        groups: dict[bytes, list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(item.context.tobytes(), []).append(index)
        if len(groups) == len(items):
            return scoring.score_items(self.loaded, items, batch_size=self.batch_size)
        questions = [[items[i] for i in group] for group in groups.values()]
        found: dict[int, Score] = {}
        for group, scores in zip(
            groups.values(),
            score_alternatives(self.loaded, questions, batch_size=self.batch_size),
            strict=True,
        ):
            found |= zip(group, scores, strict=True)
        return [found[i] for i in range(len(items))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihoods of whole documents in nats, in rows that overlap by one token.

        The start token stands before the first row and is not scored. (The harness's `hf` class
        scores it where the tokenizer puts it in, as Llama's does.)
        """
        if self.backend != "causal":
            raise InputError("rolling log-likelihood needs a decoder alone; this has an encoder")
        parts = [
            scoring.windows(
                # Without the start, which `windows` puts before the first row.
                np.asarray(self.tok_encode(request.args[0], add_special_tokens=False), np.int32),
                self.prefix_token_id,
                self.max_length,
            )
            for request in requests
        ]
        items = [item for part in parts for item in part]
        scores = iter(scoring.score_items(self.loaded, items, batch_size=self.batch_size))
        totals = [scoring.total([next(scores) for _ in part]).logprob for part in parts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- generation ---

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written behind each context up to a stop; requests of one kind go together."""
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        found: dict[int, str] = {}
        for kind, group in kinds.items():
            contexts = [requests[i].args[0] for i in group]
            found |= zip(group, self._write(contexts, json.loads(kind)), strict=True)
            for i in group:
                self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
        return [found[i] for i in range(len(requests))]

    def _write(self, contexts: Sequence[str], kind: dict[str, Any]) -> list[str]:
        limits = [int(kind[name]) for name in _MOST_NEW if kind.get(name) is not None]
        most = limits[0] if limits else _NEW_TOKENS
        until = kind.get("until") or []
        until = [until] if isinstance(until, str) else until
        room = self.max_length - most if self.backend == "causal" else self.max_length
        if room < 1:
            raise InputError(
                f"the task wants {most} new tokens, and a row of this model has {self.max_length}: "
                "ask for less with --gen_kwargs max_gen_toks=..."
            )
        rows = [self.tok_encode(text)[-room:] or [self.prefix_token_id] for text in contexts]
        tokens = write_tokens(
            self.loaded,
            [np.asarray(row, np.int32) for row in rows],
            max_tokens=most,
            strategy=strategy_of(kind),
            seed=self.seed,
            batch_size=self.batch_size,
        )
        return [cut(self.loaded.text(row), until) for row in tokens]


def strategy_of(kind: dict[str, Any]) -> Greedy | Sampling:
    """What a task's `generation_kwargs` ask for, as Hugging Face reads them.

    Raises InputError for what would be computed otherwise than asked.
    """
    known = {*_READ, *_MOST_NEW}
    unread = {
        name: value
        for name, value in kind.items()
        if name not in known and value is not None and value != _ONLY.get(name)
    }
    if unread:
        raise InputError(f"the task's generation_kwargs ask for {unread}, which is not computed")
    temperature = float(kind.get("temperature") or 0.0)
    penalty = float(kind.get("repetition_penalty", 1.0))
    if not kind.get("do_sample", temperature > 0.0):
        return Greedy(repetition_penalty=penalty)
    return Sampling(
        temperature=temperature or 1.0,
        top_k=kind.get("top_k"),
        top_p=kind.get("top_p"),
        min_p=kind.get("min_p"),
        repetition_penalty=penalty,
    )
