# Two commands matter: `make serve` and `make test`. Both install into .venv what is missing there and nothing else.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

BIN := .venv/bin
PINS := -c requirements.lock -c constraints.txt
SOURCES := models model_store training service feeds client examples bench monitoring tests candlecast.py
DEVICE ?= cpu
# The first Python on the PATH that is new enough; PYTHON=... overrides it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: .venv/.installed ## install, train the two demo models if the store has none, start the service
	$(BIN)/candlecast sample-data data/samples
	$(BIN)/candlecast train training/recipes/toto-demo.toml training/recipes/kronos-demo.toml --if-missing
	$(BIN)/candlecast serve --load data/samples

test: lint ## lint, types, every test but the long ones
	$(BIN)/pytest -m "not long and not frameworks"

test-long: .venv/.tested ## the tests that take minutes
	$(BIN)/pytest -m long

test-examples: .venv/.tested .venv-freqtrade/.installed .venv-nautilus/.installed ## the bots of examples/ in their frameworks
	$(BIN)/pytest -m frameworks -rP tests/examples

bench: .venv/.tested ## the numbers beside the references and the hardware floor; DEVICE=cuda, BENCH="--quick --only start"
	$(BIN)/python -m bench --device $(DEVICE) $(BENCH)

bench-peers: .venv/.tested .venv-peers/.installed ## the service beside LitServe, BentoML and Ray Serve
	$(BIN)/python -m bench.peers --device $(DEVICE) --python .venv-peers/bin/python $(BENCH)

fuzz: .venv/.tested ## Schemathesis against both ports; FUZZ="--max-examples 5000 --seed 7"
	$(BIN)/python -m bench.fuzz $(FUZZ)

gates: .venv/.tested ## the wall-clock figures behind the promises under bad input, faults and endings, and the tests of the countable ones
	$(BIN)/python -m bench.gates

soak: .venv/.tested ## ten minutes at half load: memory, descriptors, threads, tasks, series, p99; SOAK="--seconds 3600"
	$(BIN)/python -m bench.soak $(SOAK)

lint: .venv/.tested ## ruff and mypy --strict
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: .venv/.tested ## let ruff format and fix the sources
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

dashboards: .venv/.installed ## write monitoring/grafana/dashboards from the tables in monitoring/dashboards.py
	$(BIN)/python monitoring/dashboards.py

reference: .venv/.installed ## docs/reference.md, after a change to a setting, a metric, a route or an error
	$(BIN)/python -m service.reference > docs/reference.md

rules: ## write monitoring/rules for the Prometheus operator, into k8s/
	@{ echo "# make rules writes this from monitoring/rules."; \
	for file in monitoring/rules/*.yml; do \
		printf '%s\n' --- "apiVersion: monitoring.coreos.com/v1" "kind: PrometheusRule" "metadata:" \
			"  name: candlecast-$$(basename $$file .yml)" "spec:"; \
		sed 's/^./  &/' $$file; \
	done; } > k8s/components/monitoring/rules.yaml

# uv reads none of pip's settings: hand it pip's own folder of wheels. The local part of a version (+cpu) stays out of
# the lock, so that one lock serves the CPU and the CUDA build of torch.
lock: .venv/bin/python ## compile requirements.lock from pyproject.toml under constraints.txt
	$(BIN)/pip install --quiet uv
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $(BIN)/uv pip compile --quiet --upgrade pyproject.toml \
		--extra train --extra samples --extra test --extra reference -c constraints.txt --python-version 3.11 \
		--no-annotate --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" -o requirements.lock
	sed -i -E 's/^([^#;]+==[^+;]+)\+[a-z0-9.]+/\1/' requirements.lock
	$(MAKE) hashes

# Beside the lock: pip would want a hash of this project too if what constrains it had any.
hashes: .venv/bin/python ## write requirements.hashes from requirements.lock
	$(BIN)/pip install --quiet uv
	{ echo "# make hashes writes this: the files that the versions of requirements.lock may come in, but for torch's."; \
	grep -v '^torch==' requirements.lock | $(BIN)/uv pip compile --quiet --no-deps --universal --generate-hashes \
		--no-annotate --no-header --python-version 3.11 -; } > requirements.hashes

audit: .venv/.tested .venv-audit/.installed ## hashes, vulnerabilities, licences, dist/sbom.json, secrets
	$(BIN)/python -m bench.audit --tools .venv-audit $(AUDIT)

clean: ## delete the environment and every cache; candles, models and what the service wrote stay
	rm -rf .venv .venv-peers .venv-audit .venv-freqtrade .venv-nautilus .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Candlecast needs Python 3.11 or newer on the PATH." >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

.venv/.installed: pyproject.toml requirements.lock constraints.txt | .venv/bin/python
	$(BIN)/pip install --disable-pip-version-check $(PINS) -e '.[samples]'
	touch $@

# The reference implementations pin versions that nothing else here can live with: they come without dependencies.
.venv/.tested: .venv/.installed tests/reference.txt
	$(BIN)/pip install --disable-pip-version-check --quiet $(PINS) -e '.[train,samples,test,reference]'
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps -r tests/reference.txt
	touch $@

.venv-audit/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m venv .venv-audit
	.venv-audit/bin/pip install --disable-pip-version-check --quiet \
		$$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["audit"])')
	touch $@

# Neither goes with the versions of requirements.lock, and freqtrade is under the GPL, nautilus_trader under the LGPL.
.venv-%/.installed: examples/%.txt client/pyproject.toml | .venv/bin/python
	$(BIN)/python -m venv .venv-$*
	.venv-$*/bin/pip install --disable-pip-version-check --quiet -r $< -e ./client
	touch $@

# The servers pin packages that ours has outgrown: only what theirs and the reference predictor import goes in beside them.
.venv-peers/.installed: pyproject.toml constraints.txt tests/reference.txt | .venv/bin/python
	$(BIN)/python -m venv .venv-peers
	.venv-peers/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[peers,reference]'
	.venv-peers/bin/pip install --disable-pip-version-check --quiet --no-deps -r tests/reference.txt
	touch $@

.PHONY: help serve test test-long test-examples bench bench-peers fuzz gates soak audit lint format dashboards reference
.PHONY: rules lock hashes clean
