"""From files to batches, with numpy, Grain and TFDS; no JAX."""
