"""The datasets that `scripts/prepare_data.py` builds, by name: ours, and published ones of TFDS."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

from absl import logging

from t5x_lite.data.sources import TfdsSource
from t5x_lite.types import InputError


@functools.cache
def datasets() -> dict[str, Any]:
    """Our builders by name, imported when they are asked for: TFDS takes a fifth of a second."""
    from t5x_lite.data.builders import bible, labelled, python_functions, seq2seq, word_pairs

    return {
        **bible.DATASETS,
        **labelled.DATASETS,
        "aclsum": seq2seq.Aclsum,
        "indico_po": seq2seq.IndicoPo,
        "chatterbot": seq2seq.Chatterbot,
        "docstrings": python_functions.Docstrings,
        **word_pairs.DATASETS,
    }


# TFDS's own builders, which download from where the datasets are published: module, class. They are
# not all known to `tfds.builder`.
PUBLISHED = {
    "glue": ("text.glue", "Glue"),
    "super_glue": ("text.super_glue", "SuperGlue"),
    "conll2003": ("text.conll2003", "Conll2003"),
    "squad": ("datasets.squad.squad_dataset_builder", "Builder"),
    "cnn_dailymail": ("summarization.cnn_dailymail", "CnnDailymail"),
    "wmt14_translate": ("translate.wmt14", "Wmt14Translate"),
    "wmt16_translate": ("translate.wmt16", "Wmt16Translate"),
}


def builder_class(name: str) -> Any:
    """The builder of a dataset, ours or TFDS's. Raises InputError for an unknown one."""
    if name in datasets():
        return datasets()[name]
    if name not in PUBLISHED:
        raise InputError(
            f"dataset '{name}' is unknown; expected one of: {', '.join(names())}; or a published "
            f"one: {', '.join(PUBLISHED)}"
        )
    module, kind = PUBLISHED[name]
    return getattr(importlib.import_module(f"tensorflow_datasets.{module}"), kind)


def names() -> list[str]:
    """All datasets of ours, those of several configs with each."""
    found = []
    for name, builder in datasets().items():
        configs = [config.name for config in builder.BUILDER_CONFIGS]
        found += [f"{name}/{config}" for config in configs] or [name]
    return found


def prepare(dataset: str, data_dir: str, *, wheels: str | None = None) -> dict[str, Any]:
    """Fetches and builds `dataset` under `data_dir`, unless it is there; returns a summary.

    `{"dataset": ..., "path": ..., "splits": {"train": records, ...}, "bytes": on disk}`. TFDS
    builds in a temporary folder and renames it, so a build that was killed leaves nothing that
    could be taken for a dataset; one that is prepared is not built again, and needs no network.

    Args:
      dataset: its name; one of several configs with its own: `indico_po/fr`.
      data_dir: the folder that TFDS datasets are in.
      wheels: where fetched packages go; None: `data_dir/wheels`.

    Raises InputError for an unknown dataset and for wheels that can't be had.
    """
    name, _, config = dataset.partition("/")
    kind = builder_class(name)
    configs = [one.name for one in kind.BUILDER_CONFIGS]
    if config not in (configs or [""]):
        raise InputError(
            f"dataset '{dataset}' is unknown; expected one of: "
            + (", ".join(f"{name}/{one}" for one in configs) or name)
        )
    data_dir = os.path.expanduser(data_dir)
    source = TfdsSource(dataset, data_dir)
    try:
        _ = source.splits
    except InputError:
        logging.info("Preparing %s in %s", dataset, data_dir)
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        options: dict[str, Any] = {"config": config} if config else {}
        if name in datasets():
            options["wheels"] = wheels
        try:
            builder = kind(data_dir=data_dir, **options)
            builder.download_and_prepare(file_format="array_record")
        except ImportError as error:
            raise InputError(
                f"TFDS prepares '{dataset}' with TensorFlow ({error}): pip install tensorflow, "
                "here or in another environment; reading it takes none"
            ) from error
        source = TfdsSource(dataset, data_dir)
    path = source.path
    return {
        "dataset": dataset,
        "path": path,
        "splits": {split: len(source.open(split)) for split in source.splits},
        "bytes": sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path)),
    }
