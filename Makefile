# `make help` says what there is. Everything here wants root: it makes containers, namespaces and cgroups.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PREFIX  ?= /usr/local
DESTDIR ?=
TARGET  ?= $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
HELPERS := wshd wsh iomux-spawn iomux-link oom

export OSTLER_HELPERS := $(TARGET)/x86_64-unknown-linux-gnu/helpers

help: ## what there is
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

deps: ## installs what is missing (Debian packages, cargo-nextest)
	@scripts/deps.sh

build: deps ## the agent (release) and the five static helpers
	OSTLER_COMMIT=$$(git rev-parse --short HEAD 2>/dev/null || true) cargo build --release --bin ostler
	cargo helpers

stack: deps ## the Debian root with Ruby that sample apps run in (cached)
	@fixtures/stack/build.sh >/dev/null

test: deps ## all tests here, the bus on the newest nats-server, many in cgroup v2 machines; says at its end that nothing is left over
	@.ci/run test

test-v2: deps ## engine, wall, network and what cgroup v2 is for, in virtual machines (ONLY=regex of `file test`)
	@.ci/run test-v2

lint: deps ## format, clippy, and the walls between the rooms
	@.ci/run lint

demo: build stack ## the six steps of README.md, live (KEEP=1 leaves it running)
	@cargo build --quiet --release --package tests --bin say
	@OSTLER_AGENT=$(TARGET)/release/ostler SAY=$(TARGET)/release/say scripts/demo.sh

bench: build stack ## one JSON line per figure, beside runc, bwrap and fork+exec
	@cargo build --quiet --release --package tests --bin bench
	@OSTLER_AGENT=$(TARGET)/release/ostler $(TARGET)/release/bench

soak: deps stack ## the tests of luck, with many rounds (OSTLER_ROUNDS=200)
	@OSTLER_ROUNDS=$${OSTLER_ROUNDS:-200} .ci/run soak

fuzz: deps ## RUNS inputs (100000) for each parser of foreign bytes; says how many were executed
	@scripts/fuzz.sh

docker: build stack ## an image of the agent, and start, output, scale and stop through compose
	@docker/try.sh

# An agent may run: it meets the old program or the new one, and never none. The agent's own comes last: until then it is the old one
# that a restart finds, with helpers that it says do not fit.
define place
	install -D -m 755 $(1) $(DESTDIR)$(PREFIX)/$(2).new && mv $(DESTDIR)$(PREFIX)/$(2).new $(DESTDIR)$(PREFIX)/$(2)

endef

install: ## installs what `make build` has built, with a unit file and a sample configuration
	$(foreach helper,$(HELPERS),$(call place,$(OSTLER_HELPERS)/$(helper),lib/ostler/$(helper)))
	$(call place,$(TARGET)/release/ostler,bin/ostler)
	sed 's|/usr/local|$(PREFIX)|' packaging/ostler.service | install -D -m 644 /dev/stdin $(DESTDIR)/etc/systemd/system/ostler.service
	test -e $(DESTDIR)/etc/ostler/ostler.toml || sed 's|^#: helpers = .*|helpers = "$(PREFIX)/lib/ostler"|' packaging/ostler.toml | install -D -m 644 /dev/stdin $(DESTDIR)/etc/ostler/ostler.toml
	@there=$$(sed -n 's/^helpers *= *"\(.*\)".*/\1/p' $(DESTDIR)/etc/ostler/ostler.toml); there=$${there:-/usr/local/lib/ostler}; \
	test "$$there" = $(PREFIX)/lib/ostler || echo "$(DESTDIR)/etc/ostler/ostler.toml was there; it has the helpers in $$there, these are in $(PREFIX)/lib/ostler: correct it"
	@echo "a first time: name a stack in $(DESTDIR)/etc/ostler/ostler.toml, then: systemctl enable --now ostler"
	@echo "an upgrade: ostler doctor, then: systemctl daemon-reload && systemctl restart ostler (apps run on)"

clean: ## what was built here (not the cache in /var/cache/ostler-dev)
	cargo clean

.PHONY: help deps build stack test test-v2 lint demo bench soak fuzz docker install clean
