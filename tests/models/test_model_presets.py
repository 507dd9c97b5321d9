"""Every model of gin_configs/models has the number of parameters that was published.

Counted by `jax.eval_shape`: nothing is allocated. The published figures are those of the named
checkpoints' files; BERT and RoBERTa are counted with their masked-token head and without a pooler,
as Hugging Face's `*ForMaskedLM` (110,106,428: `BertForPreTraining`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from pathlib import Path

import jax
import pytest

from t5x_lite import configure, trees
from t5x_lite.models import config_positions, transformer
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import LMHead

FOLDER = Path(__file__).resolve().parents[2] / "gin_configs" / "models"
PUBLISHED = {
    "bert_base": 109_514_298,
    "bert_base pair_head": 110_106_428,
    "bert_large": 335_174_458,
    "roberta_base": 124_697_433,
    "roberta_large": 355_412_057,
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama_1b": 1_235_814_400,
    "llama_7b": 6_738_415_616,
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
    "byt5_large": 1_228_183_552,
    "byt5_xl": 3_737_801_728,
    "byt5_xxl": 12_906_899_328,
    "bart_base": 139_420_416,
    "bart_large": 406_291_456,
}
TINY = [f"{family}_tiny" for family in ("bert", "roberta", "gpt2", "llama", "t5", "byt5", "bart")]


def built(*, model: ModelConfig) -> ModelConfig:
    """What the gin files make of `%MODEL`."""
    return model


def read(names: str) -> ModelConfig:
    files = [f"models/{name}.gin" for name in names.split()]
    with configure.isolated():
        configure.parse(files, ["built.model = %MODEL"])
        return built(**configure.arguments(built))


@pytest.fixture(scope="module", autouse=True)
def _registered():
    configure.register([built])


@pytest.mark.parametrize("names", [*PUBLISHED, *TINY, "t5_1_1_tiny"])
def test_the_number_of_parameters_is_the_published_one(names):
    model = transformer.Transformer(read(names))
    shapes = jax.eval_shape(functools.partial(transformer.init, model), jax.random.key(0))
    count = trees.count(shapes)
    if names in PUBLISHED:
        assert count == PUBLISHED[names]
        comment = (FOLDER / f"{names.split()[0]}.gin").read_text(encoding="utf-8")
        assert f"{count:,}" in comment  # the file says the same
    else:
        assert count < 6_000_000


def test_no_preset_is_left_out():
    known = {
        name for names in (*PUBLISHED, *TINY, "t5_1_1_tiny", "defaults") for name in names.split()
    }
    assert {path.stem for path in FOLDER.glob("*.gin")} == known


def test_no_module_of_models_knows_a_family_by_its_name():
    """A family is data: its name may stand in comments and docstrings, and never in code."""
    families = r"\b(bert|roberta|gpt2?|llama|t5|byt5|bart|neox)\b"
    for path in (FOLDER.parents[1] / "t5x_lite" / "models").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        code = re.sub(r'""".*?"""|#[^\n]*', "", text, flags=re.S)
        found = re.findall(families, code, re.I)
        assert not found, (path.name, found)


def test_the_defaults_are_those_of_the_classes():
    """And all of them: a field that defaults.gin forgot would leak from one model into another."""
    bound = {}
    for line in (FOLDER / "defaults.gin").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, value = line.split(" = ")
            bound[name] = value
    kinds = (ModelConfig, StackConfig, LMHead, *config_positions.CLASSES[:4])
    how = {"dtype", "param_dtype", "remat", "unroll", "attention"}
    expected = {
        f"{kind.__name__}.{field.name}": field.default
        for kind in kinds
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING and field.name not in how
    }
    expected.pop("Sinusoidal.max_period")  # of no published model here
    assert bound.keys() == expected.keys()
    for name, value in bound.items():
        if value.startswith("@"):
            assert repr(expected[name]).startswith(value[1:-2]), name
        else:
            assert ast.literal_eval(value) == expected[name], name


ROOTS = ("bart_base", "bert_base pair_head", "roberta_base", "gpt2", "llama_1b", "t5_small")


@pytest.mark.parametrize("names", [*ROOTS, "t5_1_1_small", "llama_7b", "bart_large"])
def test_a_model_behind_any_other_is_itself(names):
    alone = read(names)
    for before in ROOTS:
        assert read(f"{before} {names}") == alone, before
