"""Every test runs on 8 virtual CPU devices, and a silent rank promotion is an error."""

from tests import xla

xla.prepare(devices=8)

import jax  # noqa: E402 (after the flags it reads)

jax.config.update("jax_numpy_rank_promotion", "raise")
