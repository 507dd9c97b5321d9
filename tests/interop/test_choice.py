"""Which architecture of Hugging Face's a config of ours is, without any weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from t5x_lite import configure
from t5x_lite.interop import ARCHITECTURES, choice
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import LMHead, SequenceHead, TokenHead
from t5x_lite.train.inspect import inspect_params
from t5x_lite.types import InputError

MODELS = Path(configure.__file__).resolve().parents[1] / "gin_configs" / "models"
PRESETS = sorted(
    path.stem for path in MODELS.glob("*.gin") if path.stem not in ("pair_head", "defaults")
)
MODEL_TYPES = {"byt5": "t5"}  # else a preset's name begins with it


def preset(name: str, *more: str) -> ModelConfig:
    with configure.isolated():
        configure.register()
        files = [f"models/{file}.gin" for file in (name, *more)]
        configure.parse(files, ["inspect_params.model = %MODEL"])
        return configure.arguments(inspect_params)["model"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_of_its_architecture(name):
    """Published sizes can be saved as what they were published as, and nothing else comes first."""
    config = preset(name)
    architecture, settings = choice.choose(config, ARCHITECTURES)
    family = name.partition("_")[0]
    assert architecture.model_type == MODEL_TYPES.get(family, family)
    assert settings["architectures"][0] in architecture.classes


@pytest.mark.parametrize(
    ("name", "files", "settings"),
    [
        ("gpt2", ["gpt2"], {}),
        ("bert", ["bert_base", "pair_head"], {"architectures": ["BertForPreTraining"]}),
        ("t5", ["t5_small"], {}),
        ("llama", ["llama_7b"], {"rms_norm_eps": 1e-5}),
        ("bart", ["bart_large"], {}),
    ],
)
def test_an_empty_config_means_the_published_size(name, files, settings):
    """What config.json leaves out is what transformers takes, which is the published base size."""
    (architecture,) = [a for a in ARCHITECTURES if a.model_type == name]
    settings = {"architectures": [next(iter(architecture.classes))], **settings}
    found = architecture.read(settings, {})
    assert not choice.differences(choice.essence(found), choice.essence(preset(*files)))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("bert_base", {"head": TokenHead(num_labels=9)}, "BertForTokenClassification"),
        ("bert_base", {"head": SequenceHead(num_labels=2)}, "BertForSequenceClassification"),
        ("roberta_base", {"head": TokenHead(num_labels=9)}, "RobertaForTokenClassification"),
        ("llama_7b", {"head": LMHead(tied=True)}, "LlamaForCausalLM"),
        ("t5_small", {"head": LMHead(tied=True)}, "T5ForConditionalGeneration"),  # not scaled
        ("bart_base", {"head": LMHead(tied=True, bias=True)}, "BartForConditionalGeneration"),
    ],
)
def test_heads_choose_the_class(name, changes, expected):
    config = dataclasses.replace(preset(name), **changes)
    assert choice.choose(config, ARCHITECTURES)[1]["architectures"] == [expected]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("gpt2", {"head": TokenHead(num_labels=2)}, "head"),
        ("gpt2", {"head": LMHead(tied=True, bias=True)}, "head.bias=True, not False"),
        ("t5_small", {"embedding_scale": 2.0}, "embedding_scale=2.0, not 1.0"),
        ("bart_base", {"head": LMHead()}, "head.tied=False, not True"),
        ("bert_base", {"head": SequenceHead(num_labels=2, pooling="mean")}, "pooling='mean'"),
    ],
)
def test_what_no_architecture_has_is_named(name, changes, expected):
    config = dataclasses.replace(preset(name), **changes)
    with pytest.raises(InputError) as error:
        choice.choose(config, ARCHITECTURES)
    assert expected in str(error.value)
