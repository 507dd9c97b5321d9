"""gin_configs/tasks: every text-to-text task is built, asked and scored, on a record of its shape.

The records are of the features that TFDS's builders declare. (Builders that need TensorFlow to
declare them are copied here by hand.)
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from t5x_lite import configure
from t5x_lite.data import pipeline
from t5x_lite.data.builders import catalog
from t5x_lite.data.tasks import Mixture, Task
from t5x_lite.train import loop
from t5x_lite.train.evaluate import score_records

FOLDER = configure.GIN_CONFIGS / "tasks"
BUILT_BY_HAND = {
    "cnn_dailymail": ("article", "highlights"),
    "super_glue/boolq": ("passage", "question"),
    "super_glue/cb": ("hypothesis", "premise"),
    "super_glue/copa": ("premise", "choice1", "choice2", "question"),
    "super_glue/rte": ("hypothesis", "premise"),
    "super_glue/wic": ("word", "sentence1", "sentence2"),
    "super_glue/multirc": ("paragraph", "question", "answer"),
    "super_glue/record": ("passage", "query"),
    "super_glue/wsc.fixed": ("text", "span1_text", "span2_text"),
}
MORE = {
    "super_glue/multirc": {"idx": dict.fromkeys(("paragraph", "question", "answer"), np.int32)},
    "super_glue/record": {
        "entities": tfds.features.Sequence(tfds.features.Text()),
        "answers": tfds.features.Sequence(tfds.features.Text()),
    },
    "super_glue/wsc.fixed": {"span1_index": np.int32, "span2_index": np.int32},
}
LABELLED = {"boolq": 2, "cb": 3, "copa": 2, "multirc": 2, "rte": 2, "wic": 2, "wsc.fixed": 2}
# What a record of made-up words becomes: (inputs, targets).
WANT = {
    "glue_cola": ("cola sentence: sentence 0", "acceptable"),
    "glue_sst2": ("sst2 sentence: sentence 0", "positive"),
    "glue_mrpc": ("mrpc sentence1: sentence1 0 sentence2: sentence2 0", "equivalent"),
    "glue_qqp": ("qqp question1: question1 0 question2: question2 0", "duplicate"),
    "glue_stsb": ("stsb sentence1: sentence1 0 sentence2: sentence2 0", "1.0"),
    "glue_mnli": ("mnli hypothesis: hypothesis 0 premise: premise 0", "neutral"),
    "glue_qnli": ("qnli question: question 0 sentence: sentence 0", "not_entailment"),
    "glue_rte": ("rte sentence1: sentence1 0 sentence2: sentence2 0", "not_entailment"),
    "glue_wnli": ("wnli sentence1: sentence1 0 sentence2: sentence2 0", "entailment"),
    "super_glue_boolq": ("boolq passage: passage 0 question: question 0", "True"),
    "super_glue_cb": ("cb hypothesis: hypothesis 0 premise: premise 0", "contradiction"),
    "super_glue_copa": (
        "copa choice1: choice1 0 choice2: choice2 0 premise: premise 0 question: question 0",
        "choice2",
    ),
    "super_glue_multirc": (
        "multirc question: question 0 answer: answer 0 paragraph: paragraph 0",
        "True",
    ),
    "super_glue_record": (
        "record query: query 0 entities: entities 0 passage: passage 0",
        "answers 0",
    ),
    "super_glue_rte": ("rte hypothesis: hypothesis 0 premise: premise 0", "not_entailment"),
    "super_glue_wic": ("wic sentence1: sentence1 0 sentence2: sentence2 0 word: word 0", "True"),
    "super_glue_wsc": ("wsc: text *0*", "span1_text 0"),
    "squad": ("question: question 0 context: context 0", "text 0"),
    "conll2003_text": ("ner: tokens 0", "PER: tokens 0"),
    "cnn_dailymail": ("summarize: article 0", "highlights 0"),
    "wmt14_en_de": ("translate English to German: en 0", "de 0"),
    "wmt14_en_fr": ("translate English to French: en 0", "fr 0"),
    "wmt16_en_ro": ("translate English to Romanian: en 0", "ro 0"),
    "aclsum": ("summarize aspect 0: inputs 0", "targets 0"),
    "docstrings": ("summarize python: code 0", "summary 0"),
    "complete_functions": ('complete python: signature 0\n    """summary 0"""', "body 0"),
    "chatterbot": ("reply: inputs 0", "targets 0"),
    **{
        f"indico_{code}": (f"translate English to {language}: inputs 0", "targets 0")
        for code, language in (
            ("de", "German"),
            ("es", "Spanish"),
            ("fr", "French"),
            ("it", "Italian"),
            ("pl", "Polish"),
        )
    },
}
OTHERS = {"jsonl", "glue_mixture", "kjv_to_bbe", "rotten_tomatoes", "tweet_ner"}  # elsewhere


def features_of(name: str) -> tfds.features.FeaturesDict:
    """The dataset's features, from its builder where that goes without TensorFlow."""
    if name not in BUILT_BY_HAND:
        base, _, config = name.partition("/")
        options = {"config": config} if config else {}
        with pytest.MonkeyPatch.context() as patch:  # nothing is looked for on the network
            patch.setattr(tfds.core.DatasetInfo, "initialize_from_bucket", lambda self: None)
            builder = catalog.builder_class(base)(data_dir="/nowhere", **options)
        return builder.info.features
    texts = {field: tfds.features.Text() for field in BUILT_BY_HAND[name]}
    labels = LABELLED.get(name.partition("/")[2])
    label = {} if labels is None else {"label": tfds.features.ClassLabel(num_classes=labels)}
    return tfds.features.FeaturesDict({**texts, **label, **MORE.get(name, {})})


def made_up(feature, name: str, number: int):
    """A value of a feature: texts say its name, the first record's labels are 1, the other's 0."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {key: made_up(inner, key, number) for key, inner in feature.items()}
    if isinstance(feature, tfds.features.Sequence):
        inner = made_up(feature.feature, name, number)
        return {k: [v] for k, v in inner.items()} if isinstance(inner, dict) else [inner]
    if isinstance(feature, tfds.features.ClassLabel) or np.dtype(feature.np_dtype).kind in "if":
        return 1 - number
    return str(number) if name == "span2_text" else f"{name} {number}"


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Two records of given features in each split, under the name of another dataset."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, features, splits, **kwargs):
        self._made_of, self._named = features, splits
        super().__init__(**kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=self._made_of)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in self._named}

    def _generate_examples(self):
        for number in range(2):
            yield number, made_up(self.info.features, "", number)


def write_tiny(name: str, splits, folder) -> None:
    base, _, config = name.partition("/")
    kind = type(
        "Made",
        (Tiny,),
        {"name": base, "BUILDER_CONFIGS": [], "__module__": __name__},
        skip_registration=True,
    )
    options = {"config": tfds.core.BuilderConfig(name=config, version="1.0.0")} if config else {}
    builder = kind(features=features_of(name), splits=splits, data_dir=str(folder), **options)
    builder.download_and_prepare(file_format="array_record")


def parsed(name: str, data_dir, *bindings: str):
    files = ["runs/finetune_task.gin", f"tasks/{name}.gin"]
    given = ["VOCABULARY = @ByteVocabulary()", f"DATA_DIR = '{data_dir}'", *bindings]
    configure.parse(files, given)


@pytest.mark.parametrize("name", sorted(WANT))
def test_a_task_asks_and_scores(name, tmp_path):
    text = (FOLDER / f"{name}.gin").read_text()
    (dataset,) = re.findall(r"TfdsSource\.name = '(.+)'", text)
    splits = re.findall(r"EVALUATION_SPLIT = '(\w+)'", text) or ["validation"]
    write_tiny(dataset, ["train", *splits], tmp_path)
    assert f"--dataset={dataset} --data_dir=data" in text
    with configure.isolated():
        parsed(name, tmp_path)
        evaluations = configure.arguments(loop.train)["evaluations"]
    generate = next(one for one in evaluations if hasattr(one, "max_tokens"))
    task = generate.batches.task
    assert isinstance(task, Task)
    assert task.name == name
    records = sorted(generate.batches.records(0), key=lambda record: record["inputs"].endswith("1"))
    assert (records[0]["inputs"], records[0]["targets"]) == WANT[name]
    assert len(task.open("train")) == (1 if name == "super_glue_wsc" else 2)
    assert generate.max_tokens <= task.lengths["decoder"]
    generate.batches.batch(0)

    right = score_records(task, [{**r, "prediction": r["targets"]} for r in records])
    wrong = score_records(task, [{**r, "prediction": "0"} for r in records])
    assert right
    for metric, value in right.items():
        # Texts too short for BLEU, mentions that are not meant, correlations with equal numbers.
        if metric != "bleu" and name != "super_glue_wsc":
            assert not wrong[metric] >= value, metric
    assert score_records(task, [{**r, "prediction": r["targets"]} for r in records], 3)


HEADS = {
    # inputs of the record "0" in its words, and the target that metrics take
    "glue_cola_head": (["sentence 0"], "acceptable"),
    "glue_sst2_head": (["sentence 0"], "positive"),
    "glue_mrpc_head": (["sentence1 0", "sentence2 0"], "equivalent"),
    "glue_qqp_head": (["question1 0", "question2 0"], "duplicate"),
    "glue_stsb_head": (["sentence1 0", "sentence2 0"], 1.0),
    "glue_mnli_head": (["premise 0", "hypothesis 0"], "neutral"),
    "glue_qnli_head": (["question 0", "sentence 0"], "not_entailment"),
    "glue_rte_head": (["sentence1 0", "sentence2 0"], "not_entailment"),
    "glue_wnli_head": (["sentence1 0", "sentence2 0"], "entailment"),
    "conll2003_head": (["tokens 0"], ["B-PER"]),
    "squad_head": (["question 0", "context 0"], ["text 0"]),
}


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_head_asks_the_same_of_an_encoder(name, tmp_path):
    text = (FOLDER / f"{name}.gin").read_text()
    (dataset,) = re.findall(r"TfdsSource\.name = '(.+)'", text)
    splits = re.findall(r"EVALUATION_SPLIT = '(\w+)'", text) or ["validation"]
    write_tiny(dataset, ["train", *splits], tmp_path)
    files = ["runs/finetune_labels.gin", f"tasks/{name}.gin"]
    # Bytes stand in for the published model's vocabulary; its model is not read.
    given = ["VOCABULARY = @ByteVocabulary()", f"DATA_DIR = '{tmp_path}'", "MODEL = @ModelConfig()"]
    given += [
        "ModelConfig.vocab_size = 384",
        "ModelConfig.embed_dim = 8",
        "ModelConfig.head = %HEAD",
    ]
    given += ["ModelConfig.encoder = @StackConfig()", "StackConfig.num_layers = 1"]
    given += [f"StackConfig.{size} = 2" for size in ("num_heads", "head_dim", "mlp_dim")]
    with configure.isolated():
        configure.parse(files, given)
        arguments = configure.arguments(loop.train)
    model, (evaluation,) = arguments["model"], arguments["evaluations"]
    task = arguments["batches"].task
    assert arguments["initial"].restore == (((model_head(model)), None),)
    assert model.head.num_labels == (len(task.labels) or 1)
    truths = [task.objective.truth(r) for r in evaluation.batches.records(0)]
    words, truth = HEADS[name]
    assert truth in truths
    batch = evaluation.batches.batch(0)
    shown = bytes(np.maximum(batch["encoder_input_tokens"][truths.index(truth)] - 3, 0).tolist())
    assert all(part.encode() in shown for part in words)
    evaluation = dataclasses.replace(evaluation, resamples=3)
    right = evaluation.score([{"target": t, "prediction": said_right(t)} for t in truths])
    assert {metric for metric in right if not metric.endswith(("_low", "_high"))}


def model_head(model) -> str:
    kind = {"SequenceHead": "sequence_head", "TokenHead": "token_head"}[type(model.head).__name__]
    return f"{kind}/.*"


def said_right(truth):
    return truth[0] if isinstance(truth, list) and " " in truth[0] else truth


def test_every_file_with_a_task_is_tested():
    files = {path.stem for path in FOLDER.glob("*.gin") if "/Task()" in path.read_text()}
    assert {name for name in files if not name.startswith("bible")} == {*WANT, *HEADS, *OTHERS}


def test_a_decoder_alone_gets_one_row(tmp_path):
    write_tiny("chatterbot", ["train", "validation"], tmp_path)
    with configure.isolated():
        parsed("chatterbot", tmp_path, "include 'tasks/as_prefix_lm.gin'")
        task = configure.arguments(loop.train)["batches"].task
    assert dict(task.lengths) == {"decoder": 256}
    batch = pipeline.Batches(task, batch_size=2).batch(0)
    assert batch["decoder_prefix"].sum() > 2 * len("reply: ")


def test_the_mixture_of_glue_is_built(tmp_path):
    for name in ("cola", "sst2", "mrpc", "qqp", "stsb", "qnli", "rte", "wnli"):
        write_tiny(f"glue/{name}", ["train", "validation"], tmp_path)
    write_tiny("glue/mnli", ["train", "validation_matched"], tmp_path)
    with configure.isolated():
        parsed("glue_mixture", tmp_path)
        batches = configure.arguments(loop.train)["batches"]
    assert isinstance(batches.task, Mixture)
    assert len(batches.task.tasks) == 9
    batches.batch(0)
