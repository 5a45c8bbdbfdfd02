# make run    the relay with an echo server as backend: ARGS="--backend=http ..."
# make test   every test, in parallel; only some: ARGS="-k callback"
# make demo   one exchange between a client and an HTTP backend, to watch
# make soak   random faults for five minutes, each message accounted for; then the
#             console in a browser for five minutes under load, and batches of 200,000
#             messages (these two not with ARGS): ARGS="--seconds=60 --seed=1"; deaths
#             of relays that share Redis, and around a durable queue: ARGS="--cluster"
# make bench  the cost of a message compared with other relays, into docs/performance.md
#             ARGS="--modes=up,echo --rounds=3 --results=/tmp/results.json"
# make fuzz   forty times as many random frames, requests and answers as the tests:
#             ARGS="-k answers" FUZZ=400
# make conformance  all of Autobahn's cases, into docs/conformance.md, in ten
#             minutes: ARGS="'9.*' 12.1.1" (without --write)
# make screenshots  the console's pictures in docs/images, in two minutes
# make compile  compiles what messages pass, in place, by mypyc: in three minutes, and again
#             when its sources have changed. Other targets then use it
# make pure   removes what was compiled
# make lint   ruff and mypy
# make clean  removes what the other targets created

PYTHON ?= python3
ARGS ?=
FUZZ ?= 40

BIN = .venv/bin
IS_NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# npm writes these files; the tests with Node need the modules beside them.
NODE_MODULES = test/interop/node_modules/.package-lock.json \
    examples/express_backend/node_modules/.package-lock.json
# AWS's emulator of Lambda, for the tests of functions.
EMULATOR = test/rie/aws-lambda-rie

# The C compiler that setuptools takes, and where Python's headers are.
COMPILER = import os, shlex, sysconfig; \
    print(shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC"))[0])
HEADERS = import sysconfig; print(sysconfig.get_path("include"))

# If something was compiled, what runs it compiles again what has changed.
COMPILED = $(wildcard .venv/compile.stamp)
SOURCES = $(shell find backends handlers -name '*.py')

.PHONY: run test demo soak screenshots bench fuzz conformance compile pure lint clean

run: .venv/run.stamp $(COMPILED)
	@exec $(BIN)/python socketdock.py $(ARGS)

# Without these modules the tests that need them are skipped, with a message.
test: .venv/test.stamp $(COMPILED)
	@if command -v npm >/dev/null; then \
	    $(MAKE) --no-print-directory --keep-going $(NODE_MODULES) || \
	        echo "npm failed, so the tests with Node.js are left out." >&2; \
	fi
	@$(MAKE) --no-print-directory $(EMULATOR) || \
	    echo "AWS's emulator is missing, so the tests with it are left out." >&2
	@exec $(BIN)/python test/run.py $(ARGS)

demo: .venv/run.stamp $(COMPILED)
	@exec $(BIN)/python examples/demo.py

soak: .venv/test.stamp $(COMPILED)
	$(BIN)/python test/soak.py $(ARGS)
	@[ -n "$(ARGS)" ] || CONSOLE_SECONDS=300 CONSOLE_CLIENTS=10000 \
	    $(BIN)/python -m pytest -q -rs test/console_page_test.py \
	    -k "does_not_grow or many_connections"
	@[ -n "$(ARGS)" ] || $(BIN)/python test/batch_soak.py

# The console's pictures in docs/images; it needs ports 8000 and 8765, and chromium.
screenshots: .venv/test.stamp $(COMPILED)
	@exec $(BIN)/python test/screenshots.py $(ARGS)

bench: .venv/bench.stamp $(COMPILED)
	@if command -v npm >/dev/null; then \
	    $(MAKE) --no-print-directory bench/peers/node_modules/.package-lock.json; \
	fi
	@exec $(BIN)/python -m bench $(ARGS)

fuzz: .venv/test.stamp $(COMPILED)
	FUZZ=$(FUZZ) $(BIN)/python -m pytest test/fuzz_*_test.py $(ARGS)

conformance: .venv/test.stamp $(COMPILED)
	@exec $(BIN)/python test/conformance.py $(or $(ARGS),--write)

compile: .venv/compile.stamp

pure:
	find backends handlers -name '*.so' -delete
	rm -rf socketdock__mypyc.* build .venv/compile.stamp

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/mypy

clean: pure
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	rm -rf test/interop/node_modules examples/express_backend/node_modules
	rm -rf bench/peers/node_modules test/rie supervisord.pid
	find . -name __pycache__ -prune -exec rm -rf {} +

# `venv` installs pip last: if it is there, the rest is complete. A .venv that was moved
# with its folder, or whose Python is missing or too old, is created again.
ifneq ($(shell .venv/bin/python -c "$(IS_NEW_ENOUGH)" 2>/dev/null && \
    grep -qsF "$$(pwd -P)/.venv/bin/" .venv/bin/pip && echo usable),usable)
.PHONY: .venv/bin/pip .venv/run.stamp .venv/test.stamp .venv/bench.stamp
endif

.venv/bin/pip:
	@"$(PYTHON)" -c "$(IS_NEW_ENOUGH)" 2>/dev/null || { \
	    echo "SocketDock needs Python 3.11 or newer, but $(PYTHON) is:" \
	        "$$("$(PYTHON)" --version 2>&1). Name another one:" \
	        "make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	    exit 1; \
	}
	@"$(PYTHON)" -c "import ensurepip" 2>/dev/null || { \
	    echo "$(PYTHON) can't make an environment. On Debian:" \
	        "apt-get install $(notdir $(PYTHON))-venv" >&2; \
	    exit 1; \
	}
	"$(PYTHON)" -m venv --clear .venv

.venv/run.stamp: setup.py pyproject.toml | .venv/bin/pip
	$(PIP) -e .
	@touch $@

.venv/test.stamp: setup.py pyproject.toml | .venv/bin/pip
	$(PIP) -e '.[test,checks]'
	@touch .venv/run.stamp $@

.venv/bench.stamp: setup.py pyproject.toml | .venv/bin/pip
	$(PIP) -e '.[bench]'
	@touch .venv/run.stamp $@

.venv/compile.stamp: $(SOURCES) setup.py pyproject.toml | .venv/bin/pip
	@cc=$$($(BIN)/python -c '$(COMPILER)'); command -v "$$cc" >/dev/null || { \
	    echo "make compile needs a C compiler, and there is no $$cc. On Debian:" \
	        "apt-get install gcc. SocketDock runs without it, too." >&2; \
	    exit 1; \
	}
	@[ -f "$$($(BIN)/python -c '$(HEADERS)')/Python.h" ] || { \
	    echo "make compile needs Python.h, which is not there. On Debian:" \
	        "apt-get install $(notdir $(PYTHON))-dev. SocketDock runs without" \
	        "it, too." >&2; \
	    exit 1; \
	}
	@find backends handlers -name '*.so' -delete
	@rm -rf socketdock__mypyc.*
	@echo "Compiling takes about three minutes."
	@{ $(PIP) -e '.[compile]' && \
	    SOCKETDOCK_COMPILE=1 $(PIP) --no-build-isolation --no-deps -e .; } || { \
	    echo "SocketDock was not compiled: the reason is above. It runs as before" \
	        "'make compile', as pure Python." >&2; \
	    exit 1; \
	}
	@touch .venv/run.stamp $@

$(EMULATOR): test/rie.py | .venv/test.stamp
	$(BIN)/python test/rie.py

%/node_modules/.package-lock.json: %/package.json %/package-lock.json
	npm ci --prefix $* --no-audit --no-fund --loglevel=error \
	    --fetch-retries=1 --fetch-timeout=30000
	@touch $@
