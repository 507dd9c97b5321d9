"""What gin files may name, each by its own name: new public classes are added here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from t5x_lite.data import (
    layouts,
    objectives,
    packing,
    pipeline,
    preprocessors,
    sources,
    tasks,
    textfiles,
    vocabularies,
    vocabulary_training,
)
from t5x_lite.data.builders import catalog
from t5x_lite.decode import sampling
from t5x_lite.evaluation import metrics
from t5x_lite.models import config, config_heads, config_positions
from t5x_lite.peft import lora, transform
from t5x_lite.sharding import Partitioner
from t5x_lite.studies import demo, skipgram, word2vec, words
from t5x_lite.train import (
    checkpoint,
    convert,
    embed,
    evaluate,
    infer,
    inspect,
    loop,
    losses,
    offline,
    optim,
    run,
    schedules,
    step,
)

CONFIGURABLES: Final[tuple[Callable[..., Any], ...]] = (
    # vocabularies and sources
    vocabularies.SentencePieceVocabulary,
    vocabularies.TokenizersVocabulary,
    vocabularies.ByteVocabulary,
    vocabulary_training.SentencePieces,
    vocabulary_training.WordPieces,
    vocabulary_training.ByteLevelPieces,
    sources.TextSource,
    sources.JsonlSource,
    sources.TokenFileSource,
    sources.TfdsSource,
    sources.PairedSource,
    textfiles.Lines,
    textfiles.Paragraphs,
    # tasks
    preprocessors.Prefix,
    preprocessors.Rename,
    objectives.SpanCorruption,
    objectives.IidDenoising,
    objectives.UL2,
    objectives.Denoiser,
    objectives.BART,
    objectives.TokenMasking,
    objectives.TokenDeletion,
    objectives.TextInfilling,
    objectives.SentencePermutation,
    objectives.DocumentRotation,
    objectives.MaskedLM,
    objectives.MaskTokens,
    objectives.MaskWholeWords,
    objectives.MaskSpans,
    objectives.NextSentencePairs,
    objectives.CausalLM,
    objectives.PrefixLM,
    objectives.FillInTheMiddle,
    objectives.TextToText,
    objectives.Classify,
    objectives.Regress,
    objectives.Tag,
    objectives.SpanAnswer,
    layouts.as_encoder_decoder,
    layouts.as_encoder,
    layouts.as_decoder,
    layouts.as_prefix_lm,
    tasks.Task,
    tasks.Mixture,
    tasks.Chunks,
    tasks.Proportional,
    tasks.Capped,
    tasks.Temperature,
    # batches
    packing.Pad,
    packing.Pack,
    pipeline.Batches,
    pipeline.EvaluationBatches,
    # models and transforms
    config.ModelConfig,
    config.StackConfig,
    *config_positions.CLASSES,
    *config_heads.CLASSES,
    Partitioner,
    transform.Full,
    transform.Freeze,
    lora.LoRA,
    # decoding
    sampling.Greedy,
    sampling.Sampling,
    sampling.BeamSearch,
    # training
    step.Loss,
    losses.by_real_tokens,
    losses.by_total_tokens,
    losses.by_sequence,
    schedules.FactorSchedule,
    optim.AdamW,
    optim.Lion,
    optim.Adafactor,
    checkpoint.CheckpointPolicy,
    run.RunCheckpoint,
    evaluate.TeacherForced,
    evaluate.Generate,
    metrics.exact_match,
    metrics.bleu,
    metrics.chrf,
    # programs
    loop.train,
    offline.evaluate_run,
    infer.infer,
    embed.embed,
    inspect.inspect_data,
    inspect.inspect_params,
    convert.convert,
    convert.run_model,
    convert.run_vocabulary,
    vocabulary_training.train_vocabulary,
    catalog.prepare,
    demo.report,
    skipgram.SkipGram,
    word2vec.train_word2vec,
    words.study_words,
)
