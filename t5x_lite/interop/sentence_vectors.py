"""How a directory of sentence-transformers says that token states become one vector.

`modules.json` lists the modules in turn: the Transformer, a pooling with a `config.json` of its
own, and a normalisation, if there is one (Reimers & Gurevych 2019, arXiv:1908.10084).
"""

from __future__ import annotations

import os
from typing import Final

from t5x_lite.interop import safetensors_files as files
from t5x_lite.models.config_heads import EmbeddingHead
from t5x_lite.types import InputError

_MODULES: Final = "modules.json"
_PREFIX: Final = "sentence_transformers.models."
_POOLINGS: Final = {
    "first": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}


def read_head(directory: str) -> EmbeddingHead:
    """The head that the directory describes; the default one if it says nothing.

    Raises InputError for poolings and modules that ours don't have.
    """
    path = os.path.join(directory, _MODULES)
    if not os.path.exists(path):
        return EmbeddingHead()
    pooling, normalise = "mean", False
    for module in files.read_json_list(path):
        kind = module["type"].rpartition(".")[2]
        match kind:
            case "Transformer":
                pass
            case "Pooling":
                pooling = _read_pooling(os.path.join(directory, module["path"], "config.json"))
            case "Normalize":
                normalise = True
            case _:
                raise InputError(f"'{path}' has a module '{kind}', which t5x_lite doesn't compute")
    assert pooling in ("first", "mean", "last")
    return EmbeddingHead(pooling=pooling, normalise=normalise)  # type: ignore[arg-type]


def _read_pooling(path: str) -> str:
    settings = files.read_json(path)
    modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
    found = [name for name, mode in _POOLINGS.items() if modes == [mode]]
    if not found:
        raise InputError(f"'{path}' pools by {modes}: expected one of {list(_POOLINGS.values())}")
    return found[0]


def write_head(directory: str, head: EmbeddingHead, embed_dim: int) -> None:
    """Writes what `read_head` reads."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [("2_Normalize", "Normalize")] if head.normalise else []
    os.makedirs(os.path.join(directory, "1_Pooling"), exist_ok=True)
    settings = {mode: head.pooling == name for name, mode in _POOLINGS.items()}
    files.write_json(
        os.path.join(directory, "1_Pooling", "config.json"),
        {"word_embedding_dimension": embed_dim, **settings},
    )
    files.write_json(
        os.path.join(directory, _MODULES),
        [
            {"idx": index, "name": str(index), "path": path, "type": _PREFIX + kind}
            for index, (path, kind) in enumerate(modules)
        ],
    )
