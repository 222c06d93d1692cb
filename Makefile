# Two commands do everything on a fresh machine: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
IMAGE ?= text-to-image-service:latest
VARIANT ?= cpu

.DEFAULT_GOAL := help
.PHONY: help demo gallery bench-overhead bench-scheduling bench-trace bench-batching bench-overlap bench-cpu bench-endurance \
	bench-ready bench-startup bench-loadgen bench-scale soak run test test-cpu test-deploy test-instill test-ray lint lint-deploy environments generate generate-check lock docs docs-serve plots \
	image instill-model weights evaluate clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(VENV)/.runtime ## set up, start the service on the embedded ensemble, draw a napping cat into out/
	@mkdir -p out
	@scripts/with-service.sh $(BIN)/t2i generate "cat napping" --seed 7 -o out/cat-napping.jpg

gallery: $(VENV)/.runtime ## draw the README's pictures through the running service
	@scripts/with-service.sh $(BIN)/python scripts/gallery.py

bench-overhead: $(VENV)/.runtime ## what the service costs beyond the bare loop over the model's calls
	$(BIN)/python -m bench.overhead $(ARGS)

bench-scheduling: $(VENV)/.dev ## simulate a million jobs against other orders; ARGS="--jobs 5000" is quick
	$(BIN)/python -m bench.scheduling --plot docs/scheduling.png --json docs/scheduling.json $(ARGS)

bench-trace: $(VENV)/.runtime ## two hundred callers through gRPC, against first come, first served
	$(BIN)/python -m bench.trace $(ARGS)

bench-endurance: $(VENV)/.dev ## a thousand streams for five minutes: how calls end, and the server's memory
	$(BIN)/python -m bench.endurance --plot docs/endurance.png $(ARGS)

bench-batching: $(VENV)/.runtime ## images per second by the number of images that share a network call
	$(BIN)/python -m bench.batching $(ARGS)

bench-overlap: $(VENV)/.runtime ## images per second with and without prompts and decodings beside the steps
	$(BIN)/python -m bench.overlap $(ARGS)

bench-cpu: $(VENV)/.runtime ## an image on a CPU by each --compile mode and by stock diffusers, in turn
	$(BIN)/python -m bench.cpu $(ARGS)

bench-ready: $(VENV)/.runtime ## how soon a service is ready, and how it draws until it has compiled
	$(BIN)/python -m bench.ready $(ARGS)

bench-startup: $(VENV)/.runtime ## how soon a server is SERVING, next to the imports that it needs
	$(BIN)/python -m bench.startup $(ARGS)

bench-loadgen: $(VENV)/.dev ## MLCommons' LoadGen: one after the other, all at once, at random; ARGS="--ways service stock"
	$(BIN)/python -m bench.loadgen $(ARGS)

bench-scale: .venv-ray/.done ## one replica and two on Ray, what is lost when they die, a thousand simulated
	PYTHONPATH=.:clients/python:tests/support .venv-ray/bin/python -m bench.scale $(ARGS)

soak: $(VENV)/.dev ## bad input by the thousand, for 20 to 60 minutes; ARGS="messages --count 1000 --seed 7" is a part
	OMP_NUM_THREADS=1 $(BIN)/python -m soak $(ARGS)

run: $(VENV)/.runtime ## serve; flags come from T2I_... variables, or ARGS="--device cuda ..."
	$(BIN)/python -m server $(ARGS)

# Two test files at a time, each with the servers that it starts: most of the time is theirs until they are ready, which
# takes one core. More threads than cores would wait for one another.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev .triton/.done ## set up and run all tests, with line coverage
	$(PYTEST) --cov --cov-report=term $(ARGS)

# The tests whose results depend on the CPU, as on lesser ones than this: make test has run them as on this. torch, oneDNN
# and MKL each have a variable of their own for it, and none of these can raise a processor. torch would take its own at
# its word, and end at the first instruction that is not there.
CPU_TESTS = $(BIN)/python -m pytest $(addprefix tests/,$(addprefix acceleration/,kernels test_layers.py test_compilation.py) ensemble/test_batching.py) \
	-k "not fp8 and (kernels or layers or embedded or any_number_of_threads or quickly_built)"

test-cpu: $(VENV)/.dev ## the CPU's own tests as on a CPU without AVX2 and, where this one has AVX-512, as on one without
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(CPU_TESTS)
	! grep -qw avx512f /proc/cpuinfo || \
		OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(CPU_TESTS)

DEPLOY_TESTS := $(addprefix tests/,deploy observability interoperability api/test_security.py api/test_content_filter.py \
	api/test_open_inference.py)

test-deploy: $(VENV)/.dev lint-deploy ## what a cluster needs: the image, Kubernetes, security ...; all as root, on Debian
	$(PYTEST) $(DEPLOY_TESTS) $(ARGS)

test-instill: $(VENV)/.dev .venv-instill/.done instill-model ## what Instill Core deploys, with Instill's SDK and Ray
	$(BIN)/python -m pytest tests/api/test_instill.py tests/deploy/test_instill_deployment.py $(ARGS)

test-ray: .venv-ray/.done ## the service on Ray Serve: replicas, ingress, what is lost with them; ARGS="-m smoke" is short
	PYTHONPATH=.:clients/python .venv-ray/bin/python -m pytest tests/deploy/test_ray.py $(ARGS)

.triton/.done: requirements-triton.txt
	$(BIN)/python -m pip --disable-pip-version-check --quiet install --no-deps --upgrade --target .triton --requirement $<
	touch $@

lint: $(VENV)/.dev generate-check ## ruff, mypy --strict, buf lint and breaking, hadolint, shell syntax
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/typos
	$(BIN)/mypy
	$(BIN)/mypy clients/python/tests
	$(BIN)/buf lint
	$(BIN)/buf breaking --against proto/released.json
	$(BIN)/hadolint Dockerfile deploy/ray/Dockerfile
	$(BIN)/shellcheck .ci/run scripts/*.sh findings/*.sh

CHECKOV := .venv-checkov/bin/checkov --skip-download --quiet --compact

lint-deploy: $(VENV)/.dev .venv-checkov/.done ## checkov over the Dockerfile and what the Kubernetes overlays come to
	$(CHECKOV) --framework dockerfile --file Dockerfile deploy/ray/Dockerfile
	@mkdir -p out
	for overlay in cpu gpu; do \
		$(BIN)/kubectl kustomize deploy/kubernetes/overlays/$$overlay > out/$$overlay.yaml && \
		$(CHECKOV) --framework kubernetes --file out/$$overlay.yaml || exit 1; \
	done

# $(call PROTOC,FOLDER,PACKAGE,FILE). The virtual path makes the stubs import from their package, with no rewriting of
# generated code.
PROTOC = (cd $(1) && $(CURDIR)/.venv-generate/bin/python -m grpc_tools.protoc \
	$(foreach plugin,mypy mypy_grpc,--plugin=protoc-gen-$(plugin)=$(CURDIR)/.venv-generate/bin/protoc-gen-$(plugin)) \
	--proto_path=$(2)=$(CURDIR)/proto --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	$(2)/$(3).proto)

# Our own contract belongs to the client, those of others to the server alone.
generate: .venv-generate/.done ## make the Python stubs from proto/
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

# What is installed alone, what the image holds, what the tests need: each with the versions of the one before.
LOCKED = $(BIN)/pip-compile --quiet --strip-extras --allow-unsafe --no-header --no-annotate --no-emit-index-url \
	--no-emit-find-links --no-emit-trusted-host --upgrade-package torch==2.13.0 pyproject.toml clients/python/pyproject.toml

lock: $(VENV)/.dev ## pin what pyproject.toml asks for
	$(LOCKED) --output-file requirements.lock
	$(LOCKED) --extra telemetry --extra filter --constraint requirements.lock --output-file requirements-image.lock
	$(LOCKED) --extra telemetry --extra filter --extra dev --constraint requirements-image.lock \
		--output-file requirements-dev.lock
	sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements.lock requirements-image.lock requirements-dev.lock

image: ## build the container image with docker, podman or buildah; VARIANT=cuda is the one for GPUs
	$(PYTHON) scripts/build_image.py --tag $(IMAGE) --variant $(VARIANT) $(ARGS)

# What is in packages/ is for the interpreter of the image alone, hence its version and no link to an environment here.
instill-model: requirements.lock ## out/instill, ready for `instill build`: see deploy/instill/README.md
	mkdir -p out/instill
	cp deploy/instill/instill.yaml deploy/instill/model.py out/instill
	rm -rf out/instill/packages
	$(PYTHON) -m pip --disable-pip-version-check --quiet install --target out/instill/packages \
		--requirement requirements.lock $(ARGS)
	$(PYTHON) -m pip --disable-pip-version-check --quiet install --target out/instill/packages --no-deps ./clients/python
	cp -r server weights out/instill/packages

weights: $(VENV)/.training ## train the embedded ensemble anew: see training/README.md
	$(BIN)/python -m training $(ARGS)

docs: .venv-docs/.done ## build docs/ as a site in out/docs; a broken link or anchor fails
	.venv-docs/bin/sphinx-build --conf-dir docs --fail-on-warning --keep-going --quiet . out/docs

plots: $(VENV)/.dev ## draw the figures of docs/ whose data is in the repository, without measuring again
	$(BIN)/python -m bench.loadgen --of docs/loadgen.json --plot docs/loadgen.png
	$(BIN)/python -m bench.scheduling --of docs/scheduling.json --plot docs/scheduling.png

docs-serve: docs ## show the site on http://127.0.0.1:8000
	$(PYTHON) -m http.server --bind 127.0.0.1 --directory out/docs 8000

evaluate: $(VENV)/.training ## measure the embedded ensemble
	$(BIN)/python -m training.evaluate $(ARGS)

clean: ## remove everything that was made here
	rm -f server/acceleration/cpu-kernels-*.so
	rm -rf $(VENV) .venv-generate .venv-checkov .venv-docs .venv-instill .venv-ray out .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .coverage

$(VENV)/.runtime: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --editable . --editable clients/python
	touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	$(PIP) install --requirement requirements-dev.lock
	touch $@

$(VENV)/.training: training/requirements.txt $(VENV)/.runtime
	$(PIP) install --no-deps --requirement training/requirements.txt
	touch $@

environments: $(VENV)/.dev .venv-checkov/.done .venv-generate/.done ## set up all that the other targets would, at once with -j

.venv-generate/.done: proto/requirements.txt
.venv-checkov/.done: deploy/requirements.txt
.venv-docs/.done: docs/requirements.txt
.venv-instill/.done: deploy/instill/requirements.txt
.venv-ray/.done: deploy/ray/requirements-test.txt deploy/ray/requirements.txt requirements.lock
.venv-%/.done:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --requirement $<
	touch $@
