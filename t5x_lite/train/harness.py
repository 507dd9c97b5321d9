"""lm-evaluation-harness, with our models in it.

    python -m t5x_lite.train.harness run --model t5x_lite --model_args path=runs/mine --tasks ...

The harness finds models in its own table alone, so this program adds `t5x_lite` to that, and then
is the harness's command line. Installing the project also makes it a command, `t5x_lite-lm_eval`.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from typing import Any

from t5x_lite.train import run as runs
from t5x_lite.train.opening import open_model
from t5x_lite.types import InputError

NAME = "t5x_lite"


def register() -> None:
    """Adds `t5x_lite` to the harness's models.

    Its `--model_args`: `path=` a run's folder or a Hugging Face directory, `adapter=`, `step=`, and
    what `HarnessModel` takes. Rows begin with the start token in a run, and in a directory unless
    that is the token that ends texts too (GPT-2, GPT-NeoX); `add_bos_token=` overrules.
    """
    import lm_eval.models  # noqa: F401 (the harness adds its own only while there are none)
    from lm_eval.api.registry import register_model

    from t5x_lite.evaluation.harness import HarnessModel

    class Opened(HarnessModel):
        def __init__(
            self,
            path: str,
            *,
            adapter: str | None = None,
            step: int | None = None,
            add_bos_token: bool | None = None,
            device: Any = None,
            max_batch_size: Any = None,
            **options: Any,
        ):
            del device, max_batch_size  # what JAX finds, and batches are of one size
            known = inspect.signature(HarnessModel).parameters
            if unknown := [name for name in options if name not in known]:
                takes = ["path", "adapter", "step", *list(known)[1:]]
                raise InputError(
                    f"--model_args has {', '.join(unknown)}, which {NAME} doesn't know; it takes "
                    f"{', '.join(takes)}"
                )
            loaded = open_model(path, adapter=adapter, step=step)
            if add_bos_token is None:
                vocabulary = loaded.vocabulary
                own = os.path.exists(os.path.join(path, runs.FILE))
                add_bos_token = own or vocabulary.start_id != vocabulary.eos_id
            super().__init__(loaded, add_bos_token=add_bos_token, **options)

    register_model(NAME)(Opened)


def main() -> int:
    """The harness's command line."""
    if importlib.util.find_spec("lm_eval") is None:
        print("error: lm_eval is not installed: pip install 't5x_lite[lm_eval]'", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
