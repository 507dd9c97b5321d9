"""Installs t5x_lite: `pip install -e .`, with extras `eval`, `studies`, `test` and `dev`."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "plan": ["libtpu==0.0.42.*"],  # matches jax 0.10.2: compiles for TPUs on a machine without one
    "eval": [
        "sacrebleu>=2.4",
        "rouge-score>=0.1.2",
        "seqeval>=1.2",
        "scikit-learn>=1.4",
        "scipy>=1.11",
    ],
    "studies": ["matplotlib>=3.8"],
    "serve": ["starlette>=0.40", "uvicorn>=0.30"],
    "test": [
        "httpx>=0.27",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "selenium>=4.20",
    ],
    "fixtures": ["torch>=2.6", "transformers>=5.0"],  # tests/fixtures/make_*.py alone
    "lm_eval": ["lm_eval>=0.4.13"],  # its tests also need its own extra, lm_eval[hf], and so torch
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
    package_data={"t5x_lite.serving": ["page.html"]},
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
    entry_points={"console_scripts": ["t5x_lite-lm_eval = t5x_lite.train.harness:main"]},
)
