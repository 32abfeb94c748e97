# Every target installs what it needs (see scripts/), never asks for input, and can be run again.
# Nothing needs root where Postgres, Python, Node.js and Java are there already.

CARGO ?= cargo
# `make demo KEEP=1` leaves everything running; `make bench ARGS=--quick` is a short benchmark.
KEEP ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint clean

help: ## what can be made
	@echo 'make TARGET'
	@sed -n 's/^\([a-z]*\):.*## /  \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-8s %s\n", $$1, $$2 }'

# An unoptimised build: it takes a third of the time, and the demo is not about speed.
demo: ## two servers, the proxy, mirrored writes, a flip and back; KEEP=1 leaves it running
	@scripts/install-build
	@scripts/install-postgres
	@$(CARGO) build --locked --bin pgtandem
	@target_dir="$${CARGO_TARGET_DIR:-target}"; exec "$$target_dir/debug/pgtandem" demo $(if $(KEEP),--keep)

test: ## every test, on real servers and with real drivers
	@scripts/install-build
	@scripts/install-postgres
	@scripts/install-drivers
	@scripts/install-browser
	@CARGO="$(CARGO)" scripts/run-tests $(ARGS)

bench: ## throughput, latency, CPU and memory beside PgBouncer; ARGS=--help lists its options
	@scripts/install-build
	@scripts/install-postgres
	@bench/run $(ARGS)

lint: ## formatting and clippy, as CI has them
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings

clean: ## removes what was built and what was installed into this checkout
	$(CARGO) clean
	rm -rf .servers bench/results
