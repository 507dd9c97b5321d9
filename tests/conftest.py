"""Every test runs on 8 virtual CPU devices, and a silent rank promotion is an error.

Tests compile more than they compute, so LLVM is told not to try hard: the same programs, a third
to a half of the time.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

import jax  # noqa: E402 (after the flags it reads)

jax.config.update("jax_numpy_rank_promotion", "raise")
