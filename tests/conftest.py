"""Every test runs on 8 virtual CPU devices, and a silent rank promotion is an error."""

from tests import xla

xla.prepare(devices=8)

# These define absl flags when they are imported: within a test that puts flags back as they were,
# they would be lost to all that come after it.
import array_record.python.array_record_data_source as array_record  # noqa: E402, F401
import grain  # noqa: E402, F401
import jax  # noqa: E402 (after the flags it reads)
import pytest  # noqa: E402

from t5x_lite import aside, compilation, programs  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
programs.keep = compilation.keep_compiled  # tests patch functions, of which a key knows nothing


@pytest.fixture(autouse=True)
def _nothing_is_compiled_for_a_test_before():
    yield
    aside.wait()
