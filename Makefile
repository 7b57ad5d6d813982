# make demo    set up, fine-tune the embedded model, ingest the sample documents, fit when to refuse, ask three questions
# make evaluate  base and tuned model on both files of sample questions, into evaluations/ and README.md (after make demo)
# make own DOCUMENTS=folder  a model of your own: ingest, write rows, train, evaluate on documents that were held out;
#              NAME=mine: of the collection and of adapters/NAME
# make improve NAME=own  what people said of the answers becomes rows; a better adapter takes the place of adapters/NAME
# make test    set up if needed, lint, run the tests; CPU=avx2: as on a smaller CPU; TESTS="-m cpu": some of them;
#              WORKERS=2: in that many processes, 0: in this one
# make notebooks  build the notebooks anew: expand, execute, write (about ten minutes)
# make setup   the set-up alone: .venv and the embedded models; PYTHON=python3.12 and TORCH_INDEX=URL choose
# make lock    write requirements.lock anew; make audit: known faults of the packages in it
# make gpu-wheels DIR=folder  what benchmarks/gpu_check.py needs on a GPU machine without a network (Python 3.12)
# make clean   remove caches and the demo's adapter

# The .venv's own Python, else the newest that fits; a pyenv shim is there, and may not run.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for python in .venv/bin/python python3.14 python3.13 python3.12 python3.11; do \
  $$python -c '$(FITS)' 2>/dev/null && echo $$python && exit; done; echo python3)
PY := .venv/bin/python
DEMO := --adapter adapters/demo --collection demo
INPUTS := requirements.txt requirements-dev.txt
WORKERS := 2

# make test CPU=avx2: as on a CPU without AVX512 and bf16
ifeq ($(CPU),avx2)
export ATEN_CPU_CAPABILITY := avx2
export ONEDNN_MAX_CPU_ISA := AVX2
export MKL_ENABLE_INSTRUCTIONS := AVX2
endif

.PHONY: setup demo own improve evaluate notebooks test lock audit gpu-wheels clean

setup:
	@"$(PYTHON)" tools/set_up.py $(if $(TORCH_INDEX),--torch-index "$(TORCH_INDEX)")

demo: setup
	$(PY) instruct_train_qlora.py --preset laptop --output adapters/demo --overwrite
	$(PY) rag_qlora.py ingest sample_data/documents --collection demo
	$(PY) rag_qlora.py fit $(DEMO)
	$(PY) rag_qlora.py demo $(DEMO)
	@echo
	@echo "Now try:"
	@echo "  source .venv/bin/activate"
	@echo "  python rag_qlora.py chat $(DEMO)"
	@echo '  python rag_qlora.py search --collection demo "When may the night shift eat?"'
	@echo '  python rag_qlora.py ask --adapter none --collection demo "When may the night shift eat?"   # before fine-tuning'
	@echo "  python rag_qlora.py ingest YOUR_FOLDER --collection mine"

NAME ?= own
OWN := --collection "$(NAME)"
ASKED := --questions "rows/$(NAME)/rows.questions.jsonl"
own: setup
	@test -e "$(DOCUMENTS)" || { echo "Name the documents: make own DOCUMENTS=folder"; exit 2; }
	@mkdir -p "rows/$(NAME)"
	$(PY) rag_qlora.py ingest "$(DOCUMENTS)" $(OWN)
	$(PY) rag_qlora.py write $(OWN) --output "rows/$(NAME)/rows.jsonl" --hold-out 0.2
	$(PY) instruct_train_qlora.py --preset laptop --start-from embedded --epochs 1 --learning-rate 2e-4 \
	  --dataset "rows/$(NAME)/rows.jsonl" --output "adapters/$(NAME)" --overwrite
	$(PY) rag_qlora.py evaluate $(OWN) $(ASKED) --adapter embedded --models tuned --output "evaluations/$(NAME)-before"
	$(PY) rag_qlora.py evaluate $(OWN) $(ASKED) --adapter "adapters/$(NAME)" --output "evaluations/$(NAME)"
	@echo
	@echo "Your adapter beside the one that it went on from:"
	$(PY) rag_qlora.py compare "evaluations/$(NAME)/evaluation.json" "evaluations/$(NAME)-before/evaluation.json"

# Its rows were written, and its questions held out, by make own.
improve: setup
	$(PY) improve_qlora.py --adapter "adapters/$(NAME)" $(OWN) $(ASKED) $(if $(TRAIN),--train $(TRAIN))

evaluate: setup
	$(PY) rag_qlora.py evaluate $(DEMO) --questions sample_data/second_questions.jsonl --output evaluations/second
	$(PY) rag_qlora.py evaluate $(DEMO) --output evaluations/demo
	$(PY) -m qlora.evaluation.report docs/measurements.md README.md evaluations/demo evaluations/second

notebooks: setup
	$(PY) notebooks/build.py

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# What torch alone needs with CUDA is left out: it belongs to the build of torch, which each machine chooses.
CUDA := torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc \
  cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
lock: .venv/tools
	.venv/tools/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	  --custom-compile-command "make lock" $(CUDA:%=--no-emit-package %) $(INPUTS) -o requirements.lock
	@! grep -E "^(nvidia|cuda|triton)" requirements.lock || { echo "Name these in CUDA, in the Makefile"; exit 2; }

audit: .venv/tools
	.venv/tools/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

.venv/tools: Makefile
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1
	@touch $@

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
