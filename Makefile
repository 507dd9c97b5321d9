# Two commands: `make demo` and `make test`. Everything happens in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu
# Programs of one shape are compiled once and kept: the demo's runs share most of theirs.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/xla
# glibc hands out what a step needs anew in huge pages: a tenth less time on Linux, see benchmarks/README.md.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow test-lm-eval test-browser test-plan lint install install-dev clean-demo
SEED ?= 0
DEMO := runs/demo$(if $(filter-out 0,$(SEED)),-seed$(SEED))
TRAIN := $(BIN)/python scripts/train.py --gin.SEED=$(SEED)

ifdef FAMILY
# One family alone: bert, gpt, t5 or bart, pretrained by its own objective and asked what it is for.
# `STEPS=200 FALL=1` is a short one, of which less is expected.
ASK_bert := And the LORD said <mask> Moses,
ASK_gpt := And it came to pass, when
ASK_t5 := And the LORD said <mask> Moses,
ASK_bart := And the LORD said <mask> Moses,
MODE_t5 := infill
MODE_bart := infill
FALL_bert := 4.0
FALL_gpt := 4.5
FALL_t5 := 4.0
FALL_bart := 5.0
FALL ?= $(FALL_$(FAMILY))

demo: $(VENV)/.demo
	$(BIN)/python scripts/prepare_data.py --dataset=bible_text --data_dir=data
	$(BIN)/python scripts/train_vocab.py --gin_file=runs/demo_$(FAMILY).gin
	$(TRAIN) --gin_file=runs/demo_$(FAMILY).gin --model_dir=runs/demo_$(FAMILY) $(addprefix --gin.STEPS=,$(STEPS))
	$(BIN)/python scripts/demo_report.py --folder=runs/demo_$(FAMILY) --fall=$(FALL)
	echo "$(ASK_$(FAMILY))" | $(BIN)/python scripts/infer.py --model_dir=runs/demo_$(FAMILY) --max_input_tokens=64 --max_tokens=32 $(addprefix --mode=,$(MODE_$(FAMILY)))
else
demo: $(VENV)/.demo
	$(BIN)/python scripts/prepare_data.py --dataset=bible_text --data_dir=data
	$(BIN)/python scripts/prepare_data.py --dataset=kjv_to_bbe --data_dir=data
	$(BIN)/python scripts/train_vocab.py --gin_file=tasks/bible_vocabulary.gin
	$(TRAIN) --gin_file=runs/demo_pretrain.gin --model_dir=$(DEMO)/pretrained
	$(TRAIN) --gin_file=runs/demo_lora.gin --model_dir=$(DEMO)/lora --gin.PRETRAINED=$(DEMO)/pretrained
	$(TRAIN) --gin_file=runs/demo_lora_random.gin --model_dir=$(DEMO)/lora_random
	$(TRAIN) --gin_file=runs/demo_full.gin --model_dir=$(DEMO)/full --gin.PRETRAINED=$(DEMO)/pretrained
	$(BIN)/python scripts/demo_report.py --folder=$(DEMO)

endif

clean-demo:
	rm -rf $(DEMO) $(addprefix runs/demo_,bert gpt t5 bart)

# A file stays in one process, which makes its fixtures and compiles its programs once.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not browser and not plan"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# In an environment of its own, for lm_eval brings torch.
LM_EVAL_VENV ?= .venv-lm_eval

test-lm-eval: $(LM_EVAL_VENV)/.installed
	$(LM_EVAL_VENV)/bin/python -m pytest -m lm_eval tests/evaluation/test_harness.py

$(LM_EVAL_VENV)/.installed: setup.py
	$(PYTHON) -m venv $(LM_EVAL_VENV)
	@echo "Installing into $(LM_EVAL_VENV) (a few minutes: torch) ..."
	$(LM_EVAL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[lm_eval,test]' 'lm_eval[hf]'
	@touch $@

# Compiles for TPUs that need not be there; libtpu is for Linux on x86-64.
test-plan: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[plan]'
	$(BIN)/python -m pytest -m plan tests/planning

# Skipped where there is no Chromium with its driver. PICTURES=docs/images makes the pictures.
test-browser: $(VENV)/.dev
	PICTURES=$(PICTURES) $(BIN)/python -m pytest -m browser -rs tests/serving

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(VENV)/.demo
install-dev: $(VENV)/.dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; say which: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.py | $(VENV)/bin/python
	@echo "Installing into $(VENV) (a minute or two) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[eval,serve,studies]'
	@touch $@

$(VENV)/.dev: setup.py | $(VENV)/bin/python
	@echo "Installing into $(VENV) (a minute or two) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[eval,serve,studies,test,dev]'
	@touch $@ $(VENV)/.demo
