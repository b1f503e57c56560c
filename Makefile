# Dovetail. `make help` lists the targets.

SHELL := /bin/bash

CARGO ?= cargo
# Such as --offline.
CARGO_FLAGS ?=
DESTDIR ?=
DOVECOT_CONFIG ?= /usr/lib/dovecot/dovecot-config
# Folders of the installed Dovecot; read from dovecot-config, which is there after `make deps`.
dovecot = $(shell . $(DOVECOT_CONFIG) 2>/dev/null && echo $$dovecot_$(1))
MODULEDIR = $(or $(call dovecot,moduledir),/usr/lib/dovecot/modules)
LIBEXECDIR = $(or $(call dovecot,pkglibexecdir),/usr/lib/dovecot)
DOCDIR = /usr/share/doc/dovetail
INCLUDEDIR = /usr/include/dovetail

TARGET_DIR = $(or $(CARGO_TARGET_DIR),target)
# Where the tests and the demo find the installed files. Absolute.
STAGE ?= $(abspath $(TARGET_DIR))/stage

LIBRARY = lib20_dovetail_plugin.so
INSTALLED = $(MODULEDIR)/$(LIBRARY) \
	$(MODULEDIR)/doveadm/lib20_doveadm_dovetail_plugin.so \
	$(MODULEDIR)/settings/libdovetail_settings.so \
	$(LIBEXECDIR)/dovetail \
	$(INCLUDEDIR)/dovetail.h

.DEFAULT_GOAL := build

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## Install by apt what building and testing need, if something is missing
	@./tests/deps.sh

.PHONY: build
build: deps ## The plugin and the executable, optimized
	$(CARGO) build $(CARGO_FLAGS) --locked --release

.PHONY: stage
stage: build ## What `make install` installs, below target/stage
	@rm -rf $(STAGE)
	@$(MAKE) --no-print-directory install-files DESTDIR=$(STAGE)

.PHONY: demo
demo: stage ## Two Dovecots that replicate to each other, until Ctrl-C (ONCE=1: check both directions and end)
	$(CARGO) build $(CARGO_FLAGS) --locked --no-default-features --example demo
	@# cat ends only after the last of the demo's processes: nothing is left when the prompt returns.
	@set -o pipefail; trap : INT; \
	DOVETAIL_TEST_STAGE=$(STAGE) DOVETAIL_DEMO_ONCE=$(ONCE) $(TARGET_DIR)/debug/examples/demo | (trap '' INT; exec cat)

# A debug build: only what the tests lay over it can panic.
.PHONY: stage-panics
stage-panics: deps
	$(CARGO) build $(CARGO_FLAGS) --locked --lib --features panics
	@install -D -m 644 $(TARGET_DIR)/debug/libdovetail.so $(STAGE)-panics/$(LIBRARY)

# The same with the C shim under the sanitizers. It can panic, too: those tests are checked as well.
.PHONY: stage-asan
stage-asan: deps
	$(CARGO) build $(CARGO_FLAGS) --locked --lib --features panics,sanitizers
	@install -D -m 644 $(TARGET_DIR)/debug/libdovetail.so $(STAGE)-asan/$(LIBRARY)

.PHONY: test
test: stage stage-panics ## All tests, end-to-end tests against this machine's Dovecot included (TESTS="--lib --test e2e": only these)
	@# Those against Dovecot wait most of their time.
	DOVETAIL_TEST_STAGE=$(STAGE) RUST_TEST_THREADS=$${RUST_TEST_THREADS:-$$((6 * $$(nproc)))} \
	$(CARGO) test $(CARGO_FLAGS) --locked --no-default-features $(TESTS)

.PHONY: test-asan
test-asan: stage stage-panics stage-asan ## The end-to-end tests with the C shim under AddressSanitizer (TESTS="flags:: tls::": only these)
	DOVETAIL_TEST_CHECKER=asan DOVETAIL_TEST_STAGE=$(STAGE) RUST_TEST_THREADS=$${RUST_TEST_THREADS:-$$((3 * $$(nproc)))} \
	$(CARGO) test $(CARGO_FLAGS) --locked --no-default-features --test e2e -- $(TESTS)

VALGRIND_TESTS ?= acks::with_peers_1_a_server_lost_after_its_ok_loses_no_mail_maildir acks::with_peers_1_a_server_lost_after_its_ok_loses_no_mail_mdbox
.PHONY: test-valgrind
test-valgrind: stage ## A few end-to-end tests with Dovecot's processes under valgrind
	@./tests/deps.sh valgrind
	DOVETAIL_TEST_CHECKER=valgrind DOVETAIL_TEST_STAGE=$(STAGE) RUST_TEST_THREADS=1 \
	$(CARGO) test $(CARGO_FLAGS) --locked --no-default-features --test e2e -- $(VALGRIND_TESTS)

.PHONY: chaos
chaos: stage ## Random schedules of writing and killing: seeds 1 to 12 (FIRST=1 SEEDS=200 JOBS=8; WRITERS=one: one server written to at a time, WRITERS=two: both; FIRST=1000: with restores, servers that come and go, full journals; SEED=17: that one, with its output)
	DOVETAIL_TEST_STAGE=$(STAGE) DOVETAIL_CHAOS_FIRST=$(or $(SEED),$(FIRST),1) DOVETAIL_CHAOS_SEEDS=$(if $(SEED),1,$(or $(SEEDS),12)) DOVETAIL_CHAOS_JOBS=$(or $(JOBS),2) DOVETAIL_CHAOS_WRITERS=$(WRITERS) \
	$(CARGO) test $(CARGO_FLAGS) --locked --no-default-features --test chaos -- $(if $(SEED),--nocapture)

.PHONY: sim
sim: ## A whole cluster simulated: SEEDS=10000 FIRST=1 runs of random schedules (SEED=17: that one, with its story; COMPARE=1: those that differ in the end are compared)
	DOVETAIL_SIM_SEED=$(SEED) DOVETAIL_SIM_SEEDS=$(SEEDS) DOVETAIL_SIM_FIRST=$(FIRST) DOVETAIL_SIM_SERVERS=$(SERVERS) DOVETAIL_SIM_CLASHES=$(CLASHES) DOVETAIL_SIM_FAILURES=$(FAILURES) DOVETAIL_SIM_COMPARE=$(COMPARE) \
	$(CARGO) test $(CARGO_FLAGS) --locked --profile sim --no-default-features --test sim every_seed -- --nocapture

.PHONY: bench
bench: stage ## Lag, throughput and cost beside no replication and Dovecot 2.3's own (QUICK=1; docs/PERFORMANCE.md has more)
	DOVETAIL_TEST_STAGE=$(STAGE) DOVETAIL_BENCH_QUICK=$(QUICK) DOVETAIL_BENCH_VARIANTS="$(VARIANTS)" \
	DOVETAIL_BENCH_PARTS="$(PARTS)" DOVETAIL_BENCH_MAILS=$(MAILS) DOVETAIL_BENCH_JSON=$(abspath $(TARGET_DIR))/bench.json \
	$(CARGO) bench $(CARGO_FLAGS) --locked --bench replication

.PHONY: test-matrix
test-matrix: stage ## The same against the other Debian releases, and against pairs of different versions
	./tests/matrix.sh

SECS ?= 60
FUZZ_TARGETS ?= indexlog frame session relay journal settings
FUZZ_DIR = $(abspath $(TARGET_DIR))/fuzz
FUZZ_TRIPLE = $(shell rustc -vV | sed -n 's/^host: //p')
# As cargo-fuzz builds them (the targets are its own), without having to install it first. The sanitizer is a part of each Rust of
# rustup's, behind a switch of the nightly one's.
FUZZ_FLAGS = --cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions
.PHONY: fuzz
fuzz: deps ## Fuzz all that reads what others wrote, each for SECS seconds
	@./tests/deps.sh g++
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(FUZZ_FLAGS)" $(CARGO) build $(CARGO_FLAGS) --locked --release --manifest-path fuzz/Cargo.toml \
		--target $(FUZZ_TRIPLE) --target-dir $(FUZZ_DIR)
	@# What is found to be new goes below target/fuzz; tests/golden and fuzz/seeds are where it begins.
	@printf '%s\n' $(FUZZ_TARGETS) | xargs -P $$(nproc) -I TARGET bash -o pipefail -euc '\
		case TARGET in indexlog) seeds=tests/golden/indexlog ;; *) seeds=fuzz/seeds/TARGET ;; esac; \
		mkdir -p $(FUZZ_DIR)/corpus/TARGET $(FUZZ_DIR)/artifacts/TARGET; \
		$(FUZZ_DIR)/$(FUZZ_TRIPLE)/release/TARGET $(FUZZ_DIR)/corpus/TARGET $$seeds \
			-artifact_prefix=$(FUZZ_DIR)/artifacts/TARGET/ -max_total_time=$(SECS) -timeout=20 -rss_limit_mb=2048 -verbosity=0 \
			-print_funcs=0 -print_final_stats=1 2>&1 | sed -n "/# Uses:/!s/^/TARGET: /p"'

.PHONY: header
header: ## Write include/dovetail.h anew, after a change in src/host
	DOVETAIL_WRITE_HEADER=1 $(CARGO) test $(CARGO_FLAGS) --locked --no-default-features --test house the_c_header_is_fresh

.PHONY: lint
lint: deps ## Formatting and clippy, warnings denied
	$(CARGO) fmt -- --check
	$(CARGO) clippy $(CARGO_FLAGS) --locked --all-targets --no-default-features -- -D warnings
	$(CARGO) clippy $(CARGO_FLAGS) --locked --lib --bins -- -D warnings

.PHONY: deny
deny: ## Licences, sources and known holes of the crates that are built in
	@./tests/deny.sh

.PHONY: install
install: build install-files ## Install beside the installed Dovecot (DESTDIR=...)

.PHONY: install-files
install-files:
	install -d $(DESTDIR)$(MODULEDIR)/doveadm $(DESTDIR)$(LIBEXECDIR) $(DESTDIR)$(DOCDIR) $(DESTDIR)$(INCLUDEDIR)
	install -m 644 $(TARGET_DIR)/release/libdovetail.so $(DESTDIR)$(MODULEDIR)/$(LIBRARY)
	ln -sf ../$(LIBRARY) $(DESTDIR)$(MODULEDIR)/doveadm/lib20_doveadm_dovetail_plugin.so
	@# Dovecot 2.4 has typed settings: its config process reads ours from a module.
	case "$$(dovecot --version)" in 2.3.*) ;; *) \
		install -d $(DESTDIR)$(MODULEDIR)/settings && \
		ln -sf ../$(LIBRARY) $(DESTDIR)$(MODULEDIR)/settings/libdovetail_settings.so ;; \
	esac
	install -m 755 $(TARGET_DIR)/release/dovetail $(DESTDIR)$(LIBEXECDIR)/dovetail
	install -m 644 dovecot-plugin.conf.example dovecot-plugin-2.3.conf.example dovecot-service.conf.example $(DESTDIR)$(DOCDIR)/
	@# The C contract, for those who link to the library.
	if [ -e include/dovetail.h ]; then install -m 644 include/dovetail.h $(DESTDIR)$(INCLUDEDIR)/; fi

.PHONY: uninstall
uninstall: ## Remove what `make install` installed (DESTDIR=...)
	rm -f $(addprefix $(DESTDIR),$(INSTALLED))
	rm -rf $(DESTDIR)$(DOCDIR) $(DESTDIR)$(INCLUDEDIR)

.PHONY: clean
clean: ## Remove everything that was built, cached Debian roots included
	rm -rf target
