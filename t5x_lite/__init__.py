"""Pretrain, fine-tune, evaluate and ship Transformers of all three families, in JAX."""

import time
from typing import Final

BEGAN: Final = time.time()  # before any other module of this package was read: see `programs`
