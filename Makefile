# make          what can be made
# make demo     the demo, in an environment of its own
# make test     the tests of every function
# make test-all the tests, and those that take longer: committed as a report
# make kernels  the tests that compare numbers, and the pages, with the kernels of other processors
# make check    which requirements an implementation of LoRA keeps
# make peers    the same for other libraries, each in an environment of its own
# make zoo      model classes of transformers, tiny: adapted, trained, merged, saved, loaded here and in PEFT
# make bench    time and memory, as ratios to PEFT's
# make tutorials  the tutorials, executed from scratch
# make compat  the tests with the oldest and the newest versions of what lora_ref needs, on each Python that is here
# make book     the tutorials as a site: prose on the left, code on the right

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test test-all kernels check peers zoo bench tutorials book mutants fuzz compat lint readme format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          train, adapt, save, reload and merge a small network (writes lora_ref_demo/)"
	@echo "make test          run the tests (under 6 minutes on 2 quiet cores); ARGS='-k merge -x' passes options to pytest"
	@echo "make test-all      the tests, then those that take longer (half an hour); writes tests/deep/results.json;"
	@echo "                   ARGS='--only matrix pages': only these groups"
	@echo "make kernels       the tests that compare numbers, and the pages, with the kernels of other processors; writes"
	@echo "                   tests/kernels/results.json; ARGS='--only haswell --numeric': a part of it"
	@echo "make check         test lora_ref on the requirements; ARGS=lora_ref_core: its core; ARGS='peft --html matrix.html'"
	@echo "make peers         the same for other libraries (gigabytes in .peers/); writes reports and CONFORMANCE.md;"
	@echo "                   make peers ARGS=--releases: for older releases of PEFT"
	@echo "make zoo           adapt, train, merge, save and load 343 model classes of transformers, tiny (a few minutes);"
	@echo "                   writes tests/zoo/results.json and results.md; ARGS='--only llama t5': these, and no report"
	@echo "make bench         the time of a step, a merge, ... beside PEFT's (about 10 minutes; make bench ARGS=--quick: one;"
	@echo "                   ARGS='--only init': the initialisations; ARGS='--only steps --compile': compiled, half an hour;"
	@echo "                   ARGS='--device cuda'); writes benchmarks/results"
	@echo "make tutorials     execute the tutorials, renew their quotes, figures and notebooks; ARGS=3: page 3 alone"
	@echo "make book          the tutorials beside their code, as HTML in tutorials/book/site/; ARGS='--out DIR': elsewhere"
	@echo "make mutants       small changes of lora_ref's source, and whether the tests notice (an hour);"
	@echo "                   ARGS=--suite: whether the requirements alone notice; ARGS='--suite --handmade'; ARGS='--suite"
	@echo "                   --modules core/layer --sample 20': a part"
	@echo "make fuzz          fuzz the readers of adapter folders (2 minutes; ARGS='--seconds 1800': an hour)"
	@echo "make compat        the tests with the oldest, the pinned and the newest versions, on each Python that is here"
	@echo "                   (an hour, gigabytes in .compat/; ARGS='--python 3.12 --with lowest': one of them)"
	@echo "make lint          ruff check, ruff format --check, mypy, and whether generated tables are up to date"
	@echo "make readme        renew the tables and outputs of SECURITY.md and of the README of each folder"
	@echo "make format        let ruff rewrite the sources"
	@echo "make clean         remove the environment, caches and what the demo wrote"
	@echo "Each target first makes $(VENV) and installs what it needs; PYTHON=python3.12 chooses another Python."

demo: $(VENV)/.installed-demo
	@echo "==> lora-ref demo $(ARGS)"
	@$(BIN)/lora-ref demo $(ARGS)

test: $(VENV)/.installed-test
	@echo "==> pytest $(ARGS)"
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: $(VENV)/.installed-test
	@echo "==> tests/deep/groups.py $(ARGS)"
	@$(BIN)/python tests/deep/groups.py $(ARGS)

kernels: $(VENV)/.installed-test
	@echo "==> tests/kernels/processors.py $(ARGS)"
	@$(BIN)/python tests/kernels/processors.py $(ARGS)

check: $(VENV)/.installed-test
	@echo "==> lora-ref check $(ARGS)"
	@$(BIN)/lora-ref check $(ARGS)

peers: $(VENV)/.installed-test
	@echo "==> python -m spec_tests.peers $(ARGS)"
	@$(BIN)/python -m spec_tests.peers $(ARGS)

zoo: $(VENV)/.installed-test
	@echo "==> tests/zoo/zoo.py $(ARGS)"
	@$(BIN)/python tests/zoo/zoo.py $(ARGS)

bench: $(VENV)/.installed-test
	@echo "==> python -m benchmarks $(ARGS)"
	@$(BIN)/python -m benchmarks --out benchmarks/results $(ARGS)

# quotes first: a cell may be about the code that has just changed
tutorials: $(VENV)/.installed-tutorials
	@echo "==> cog: quotes from the code"
	@COLUMNS=120 $(BIN)/python -m cogapp -P -r -I tutorials $(wildcard tutorials/*.md tutorials/vi/*.md)
	@echo "==> tutorials/book/run.py --write $(ARGS)"
	@$(BIN)/python tutorials/book/run.py --write $(ARGS)

book: $(VENV)/.installed-tutorials
	@echo "==> tutorials/book/edition.py $(ARGS)"
	@$(BIN)/python tutorials/book/edition.py $(ARGS)

mutants: $(VENV)/.installed-mutation
	@echo "==> tests/mutation/run.py $(ARGS)"
	@$(BIN)/python tests/mutation/run.py $(ARGS)

fuzz: $(VENV)/.installed-test
	@echo "==> tests/fuzz/fuzzing.py $(ARGS)"
	@$(BIN)/python tests/fuzz/fuzzing.py $(ARGS)

compat: $(VENV)/.installed-test
	@echo "==> tests/compat/compatibility.py $(ARGS)"
	@$(BIN)/python tests/compat/compatibility.py $(ARGS)

lint: $(VENV)/.installed-dev
	@echo "==> ruff check, ruff format --check, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@echo "==> cog: do the generated tables and outputs agree with the code?"
	@COLUMNS=120 $(BIN)/cog -P --check --diff SECURITY.md spec_tests/README.md benchmarks/README.md tests/README.md

readme: $(VENV)/.installed-dev
	@COLUMNS=120 $(BIN)/cog -P -r SECURITY.md spec_tests/README.md benchmarks/README.md tests/README.md

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) lora_ref_demo .compat .kernels build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "==> $(PYTHON) -m venv $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch comes first, alone: it is the large one, so a broken download is told apart from the rest.
$(VENV)/.installed-torch: constraints.txt | $(BIN)/python
	@echo "==> installing torch into $(VENV)"
	@$(PIP) install --quiet -c constraints.txt torch
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt $(VENV)/.installed-torch
	@echo "==> installing lora_ref[$*] into $(VENV)"
	@$(PIP) install --quiet -c constraints.txt -e '.[$*]'
	@touch $@
