# understudy: everything that a developer types.  `make help` explains.
#
# Every step that takes long leaves a stamp in .venv/stamps, so that a second call is quick.
# Needed beforehand: cargo (Rust), Python 3.11 or newer with its venv module, a C linker (cc).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
CARGO_TARGET_DIR ?= $(CURDIR)/silicon/target
export CARGO_TARGET_DIR
export PYTHONNOUSERSITE := 1

# The Python that the virtual environment is made from: `make setup PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 /usr/bin/python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$p; break; fi; done)

RUST_SOURCES := $(shell find silicon -path silicon/target -prune -o \
	\( -name '*.rs' -o -name 'Cargo.*' -o -name '*.asm' \) -print 2>/dev/null)
# Which guest `make demo` boots.
GUEST ?= cloud-amd64

say = @if [ -t 1 ]; then printf '\033[1m==> %s\033[0m\n' $(1); else printf '==> %s\n' $(1); fi

.PHONY: help setup build check check-fast test test-all test-rust fuzz fuzz-engine fuzz-devices fuzz-emulate fuzz-fragments fuzz-walls fuzz-windows fuzz-lending bench bench-guest boots techniques reference lab demo format clean tools

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
		awk -F'\t' '{ printf "  make %-14s %s\n", $$1, $$2 }'

# --- Setting up -----------------------------------------------------------------------------

tools:
	@tools/require "$(PYTHON)"

$(STAMPS)/venv: | tools
	$(call say,"Making a virtual environment in $(VENV)")
	@"$(PYTHON)" -m venv --clear $(VENV)
	@mkdir -p $(STAMPS) build
	@touch $@

$(STAMPS)/packages: pyproject.toml $(STAMPS)/venv
	$(call say,"Installing the Python packages that understudy needs")
	@$(BIN)/python tools/requirements.py pyproject.toml > build/requirements.txt
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on \
		-r build/requirements.txt
	@touch $@

$(STAMPS)/silicon: $(RUST_SOURCES) $(STAMPS)/packages
	$(call say,"Compiling the machine - Rust; the first time takes a few minutes")
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) PATH=$(CURDIR)/$(BIN):$$PATH \
		$(BIN)/maturin develop --release
	@touch $@

IMAGES := understudy/_images.abi3.so

$(IMAGES): images/Cargo.toml images/Cargo.lock $(wildcard images/src/*.rs) | $(STAMPS)/packages
	$(call say,"Compiling the library for disk images - Rust")
	@cd images && PYO3_PYTHON=$(CURDIR)/$(BIN)/python CARGO_TARGET_DIR=$(CURDIR)/images/target \
		cargo build --release
	@cp images/target/release/libimages.so $(IMAGES).new
	@mv $(IMAGES).new $(IMAGES)

setup: $(STAMPS)/silicon $(IMAGES) ## Make .venv, install the packages, compile the Rust

build: $(STAMPS)/packages $(IMAGES) ## Leave a wheel (abi3: CPython 3.11 and newer) in dist/
	$(call say,"Building the wheel")
	@rm -f dist/*.whl
	@PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/maturin build --release --out dist
	@ls dist/*.whl

# --- Trying it ------------------------------------------------------------------------------

demo: setup ## Boot an unmodified Debian kernel to a prompt in this terminal
	$(call say,"Fetching the guest $(GUEST)")
	@$(BIN)/understudy fetch $(GUEST)
	@if [ -t 0 ] && [ -t 1 ]; then \
		printf '\033[1m==> %s\033[0m\n' "Booting $(GUEST) - type poweroff to end"; \
		exec $(BIN)/understudy run --guest $(GUEST); \
	else \
		printf '==> %s\n' "No terminal: booting $(GUEST) to run uname -a in it"; \
		exec $(BIN)/understudy run --guest $(GUEST) --exec "uname -a"; \
	fi

# --- Checking -------------------------------------------------------------------------------

format: $(STAMPS)/packages ## Format Python and Rust
	@$(BIN)/ruff format understudy experiments tests examples tools
	@cd silicon && cargo fmt
	@cd images && cargo fmt

check-fast: $(STAMPS)/packages ## Lint and type-check the Python (seconds)
	$(call say,"ruff and mypy")
	@$(BIN)/ruff format --check understudy experiments tests examples tools
	@$(BIN)/ruff check understudy experiments tests examples tools
	@$(BIN)/mypy

check: check-fast ## The same, and rustfmt and clippy
	$(call say,"rustfmt and clippy")
	@cd silicon && cargo fmt --check
	@cd silicon && cargo clippy --all-targets --features python -- -D warnings
	@cd images && cargo fmt --check
	@cd images && CARGO_TARGET_DIR=$(CURDIR)/images/target cargo clippy -- -D warnings

test-rust: $(STAMPS)/packages ## The Rust tests only
	$(call say,"Rust tests")
	@cd silicon && PYO3_PYTHON=$(CURDIR)/$(BIN)/python cargo test

# How many processes run the Python tests: `make test JOBS=4`.
JOBS ?= 2
test: setup check test-rust ## All checks and tests but the slow ones
	$(call say,"Python tests")
	@$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-all: setup check test-rust ## Everything, the slow ones too
	$(call say,"Python tests, all of them")
	@$(BIN)/python -m pytest

SEED ?= 1
fuzz: fuzz-engine fuzz-emulate fuzz-fragments ## The next three: random instructions, and 200,000 random kernel fragments (hours)

fuzz-engine: ## Random instructions, compared with this computer's own processor (SEED=n for others)
	@cd silicon && cargo build --release --example fuzz
	@cd silicon && cargo run -q --release --example fuzz -- --count 10000000 --seed $(SEED) --engine reference
	@cd silicon && cargo run -q --release --example fuzz -- --count 10000000 --seed $(SEED) --engine dbt
	@cd silicon && cargo run -q --release --example fuzz -- --encodings 1 --count 5000000 --seed $(SEED) --engine reference
	@cd silicon && cargo run -q --release --example fuzz -- --encodings 1 --count 5000000 --seed $(SEED) --engine dbt
	@cd silicon && cargo run -q --release --example fuzz -- --count 10000000 --seed $(SEED) --engine dbt \
		--wide 10 --against reference
	@cd silicon && cargo run -q --release --example fuzz -- --count 10000000 --seed $(SEED) --engine dbt \
		--wide 0 --windows always
	@cd silicon && cargo run -q --release --example fuzz -- --count 10000000 --seed $(SEED) --engine dbt \
		--wide 95 --windows always

PIECES ?= 20000
fuzz-emulate: setup ## Random instructions, interpreted and executed (SEED=n, PIECES=n: 20000 are a million)
	@FUZZ_SEED=$(SEED) FUZZ_PIECES=$(PIECES) $(BIN)/python -m pytest -q -s --timeout 0 tests/matrix/test_emulate_fuzz.py

FRAGMENTS ?= 200000
FIRST ?= 0
fuzz-fragments: setup ## Random kernel fragments under each technique of execution (SEED=n, FRAGMENTS=n, FIRST=n)
	@FUZZ_SEED=$(SEED) FUZZ_FRAGMENTS=$(FRAGMENTS) FUZZ_FIRST=$(FIRST) $(BIN)/python -m pytest -vv -rP \
		-n $(JOBS) --dist load --timeout 0 tests/matrix/test_fragments.py -k random

MINUTES ?= 60
fuzz-walls: setup ## Hostile snapshots, files, clients and guests for an hour (SEED=n, MINUTES=n)
	@for paging in eager ept lazy vtlb; do $(BIN)/python tests/walls/ten_minutes.py $$paging 60; done
	@$(BIN)/python -m tests.walls.campaigns --minutes $(MINUTES) --seed $(SEED)

ACCESSES ?= 10000000
SIGNALS ?= 600000
fuzz-windows: setup ## Windows: every address form at every edge, a minute of signals, tables, guests (SEED=n, ACCESSES=n, SIGNALS=n)
	@cd silicon && ACCESSES=$(ACCESSES) SEED=$(SEED) SIGNALS=$(SIGNALS) cargo test -q --release \
		--test confinement --test led_astray --test signal_storm -- --nocapture
	@$(BIN)/python -m pytest -q -s --timeout 0 -m slow -k windows tests/property/test_paging_windows.py \
		tests/guests/test_stress.py tests/guests/test_selftests.py

SCRIPTS ?= 10000
fuzz-devices: setup ## Hostile drivers for the virtio devices (SCRIPTS=n)
	@$(BIN)/python -m tests.property.virtio_bench --scripts $(SCRIPTS)

fuzz-lending: setup ## Share, swap, move and take frames of guests that use them: 100,000 steps a technique
	@$(BIN)/python -m pytest -q --timeout 0 tests/property/test_lending.py -m slow

bench: setup ## Compare with native and with QEMU, then exits, switches, scans, processors; writes build/bench.json
	@$(BIN)/python -m bench
	@$(BIN)/python -m bench.heart
	@$(BIN)/python -m bench.overcommit
	@$(BIN)/python -m bench.processors

bench-guest: setup ## Compare a whole Debian with QEMU TCG: compute, disk, network, boot (minutes)
	@$(BIN)/python -m bench.guest

techniques: setup ## Boot each guest under each pair of techniques; writes docs/results/techniques.md (an hour)
	@$(BIN)/python -m tests.matrix.techniques

boots: setup ## Record tests/matrix/boots.json again: the counts of every guest's whole boot
	@$(BIN)/python -m tests.matrix.boots

reference: setup ## Write docs/reference/registers.md again: what the code's MSRs and CPUID do
	@$(BIN)/python -m tools.registers

lab: setup ## Run every experiment; writes build/lab/report.html (quick sweeps: QUICK=1)
	@$(BIN)/understudy lab --all $(if $(QUICK),--quick)

clean: ## Remove what make made (the guests' cache stays)
	rm -rf $(VENV) build dist silicon/target images/target understudy/_*.so
