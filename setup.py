"""Installs t5x_lite: `pip install -e .`, with extras `eval`, `studies`, `test` and `dev`."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "plan": ["libtpu==0.0.42.*"],  # matches jax 0.10.2: compiles for TPUs on a machine without one
    "eval": ["sacrebleu>=2.4", "rouge-score>=0.1.2", "seqeval>=1.2"],
    "studies": ["matplotlib>=3.8"],
    "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100"],
    "fixtures": ["torch>=2.6", "transformers>=5.0"],  # tests/fixtures/make_*.py alone
    "dev": ["ruff==0.17.6", "mypy==2.4.1"],
}

setup(
    name="t5x_lite",
    version="0.1.0",
    description="A lean JAX/Flax codebase to pretrain, fine-tune, evaluate and ship Transformers.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["t5x_lite", "t5x_lite.*"]),
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.5",
        "flax>=0.12",
        "gin-config>=0.5",
        "grain>=0.2.10",
        "importlib_resources>=6.0",  # tensorflow-datasets imports it without declaring it
        "jax>=0.10",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.7",
        "tensorstore>=0.1.60",
        "tokenizers>=0.20",
    ],
    extras_require=EXTRAS,
)
