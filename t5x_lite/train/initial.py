"""The weights that a run starts from: another run's, or a Hugging Face directory's, in part or whole.

A classifier is a pretrained encoder under a new head. `RunCheckpoint.restore` says, by regexes on
the new model's paths, what is read from where, and what is drawn anew:

    restore = (("sequence_head/.*", None),)     None: fresh; all else is read from its own path
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Final

import jax
from absl import logging

from t5x_lite import trees
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.interop import hf
from t5x_lite.interop.hf_tokenizers import find_vocabulary
from t5x_lite.models import transformer
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import Head
from t5x_lite.train.session import Session
from t5x_lite.types import InputError, Params
