"""Writes checkpoints as T5X lays them out, from our parameters, without any of the loader's code.

The layout is that of t5x/checkpoints.py (version 3) and of its networks in t5x/examples/{t5,
scalable_t5,decoder_only}, github.com/google-research/t5x.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import flax.serialization
import numpy as np
import orbax.checkpoint as ocp

from t5x_lite import trees


def t5x_tree(
    params, *, scanned: bool = False, joined: bool = True, own_bias: bool = True
) -> dict[str, np.ndarray]:
    """Our parameters under T5X's paths.

    `scanned`: with the layers on axis 1 of one subtree, and (`own_bias`) relative biases with them.
    """
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    encoder = any(path.startswith("encoder/") for path in flat)
    found = {}
    for path, array in flat.items():
        stack, _, rest = path.partition("/")
        if path == "token_embedding/embedding":
            found["token_embedder/embedding" if encoder else "decoder/token_embedder/embedding"] = (
                array
            )
        elif path == "lm_head/kernel":
            found["decoder/logits_dense/kernel"] = array
        elif rest == "relative_bias/embedding":
            if not (scanned and own_bias):
                found[f"{stack}/relpos_bias/rel_embedding"] = array.T
            else:  # every layer has one of its own
                layers = flat[f"{stack}/layers/mlp_norm/scale"].shape[0]
                found[f"{stack}/{stack}/relpos_bias/rel_embedding"] = np.stack(
                    [array.T] * layers, axis=1
                )
        elif rest == "final_norm/scale":
            found[f"{stack}/{stack}_norm/scale"] = array
        else:
            name = _layer_name(stack, rest.removeprefix("layers/"), flat)
            layers = [_joined(name, layer) if joined else layer for layer in array]
            if scanned:
                found[f"{stack}/{stack}/{name}"] = np.stack(layers, axis=1)
            else:
                found |= {
                    f"{stack}/layers_{index}/{name}": layer for index, layer in enumerate(layers)
                }
    return found


def _layer_name(stack: str, rest: str, flat: Mapping[str, np.ndarray]) -> str:
    block, _, leaf = rest.partition("/")
    own = "attention" if stack == "encoder" else "self_attention"
    if block.endswith("_norm"):
        kind = {"self_attention_norm": own, "cross_attention_norm": "cross_attention"}
        return f"pre_{kind.get(block, 'mlp')}_layer_norm/{leaf}"
    if block == "mlp":
        alone = f"{stack}/layers/mlp/wi_1/kernel" not in flat
        return f"mlp/{leaf.replace('wi_0', 'wi') if alone else leaf}"
    return f"{own if block == 'self_attention' else 'encoder_decoder_attention'}/{leaf}"


def _joined(name: str, layer: np.ndarray) -> np.ndarray:
    """`[embed, heads, kv]` as `[embed, heads * kv]`, and the output's likewise."""
    if layer.ndim < 3:
        return layer
    return layer.reshape((-1, layer.shape[-1]) if "/out/" in name else (layer.shape[0], -1))


def adafactor_tree(
    second: Mapping[str, np.ndarray],
    step: int,
    *,
    momentum: Mapping[str, np.ndarray] | None = None,
    min_size: int = 128,
) -> dict[str, np.ndarray]:
    """`state/...` of full second moments under T5X's paths, by the rules of t5x/adafactor.py."""
    found = {"state/step": np.asarray(step, np.int32)}
    for path, v in second.items():
        slots = {} if momentum is None else {"m": momentum[path]}
        if _is_scanned(path):  # by names: rows are `embed`, columns the rest, layers apart
            embed = v.ndim - 1 if path.endswith(("/out/kernel", "/wo/kernel")) else 0
            columns = tuple(axis for axis in range(v.ndim) if axis not in (1, embed))
            factored = v.ndim > 2 and not path.endswith("rel_embedding")
        else:  # by size
            order = np.argsort(v.shape, kind="stable")
            factored = v.ndim > 1 and v.shape[order[-2]] >= min_size
            embed, columns = (order[-2], (order[-1],)) if factored else (0, ())
        if factored:
            slots |= {"v_row": v.mean(columns), "v_col": v.mean(embed)}
        else:
            slots["v"] = v
        for slot in ("v", "v_row", "v_col", "m"):  # the others hold one zero
            found[f"state/param_states/{path}/{slot}"] = slots.get(slot, np.zeros(1, np.float32))
    return found


def _is_scanned(path: str) -> bool:
    return path.startswith(("encoder/encoder/", "decoder/decoder/"))


def write_native(directory: Path, target: Mapping[str, np.ndarray], state=None) -> Path:
    """Version 3: a msgpack tree whose arrays are zarr directories, but for the step."""
    directory.mkdir(parents=True)
    tree = {f"target/{path}": array for path, array in target.items()} | (state or {})
    leaves = {}
    for path, array in tree.items():
        if path == "state/step":
            leaves[path] = array
            continue
        name = path.replace("/", ".")
        chunks = [max(1, array.shape[0] // 2), *array.shape[1:]]
        metadata = {"chunks": chunks, "compressor": {"id": "gzip", "level": 1}}
        metadata["shape"] = list(array.shape)
        leaves[path] = {
            "driver": "zarr",
            "dtype": array.dtype.name,
            "kvstore": {"driver": "gfile", "path": f"{name}/"},
            "metadata": metadata,
        }
        _write_zarr(directory / name, array, metadata)
    contents = {"version": 3, "optimizer": trees.unflatten(leaves)}
    (directory / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    return directory


def _write_zarr(folder: Path, array: np.ndarray, metadata: Mapping) -> None:
    folder.mkdir()
    zarray = {
        **metadata,
        "dimension_separator": ".",
        "dtype": array.dtype.name if array.dtype.name == "bfloat16" else array.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "zarr_format": 2,
    }
    (folder / ".zarray").write_text(json.dumps(zarray))
    size = metadata["chunks"][0]
    for index in range(-(-array.shape[0] // size)):
        part = array[index * size : (index + 1) * size]
        chunk = np.zeros((size, *array.shape[1:]), array.dtype)
        chunk[: len(part)] = part
        name = ".".join([str(index)] + ["0"] * (array.ndim - 1))
        (folder / name).write_bytes(gzip.compress(chunk.tobytes()))


def write_orbax(
    directory: Path, target: Mapping[str, np.ndarray], state=None, *, ocdbt: bool = True
) -> Path:
    """What T5X's Orbax manager writes: `checkpoint_<step>/state`."""
    tree = {f"target/{path}": array for path, array in target.items()}
    tree |= {"state/step": np.asarray(0, np.int32)} | (state or {})
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            (directory / "state").absolute(), args=ocp.args.PyTreeSave(trees.unflatten(tree))
        )
    return directory
