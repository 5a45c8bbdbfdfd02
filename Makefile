# make run    the relay, with an echo server behind it: ARGS="--backend=http ..."
# make test   every test: ARGS="-k callback"
# make demo   one exchange between a client and an HTTP backend, to watch
# make soak   random faults for five minutes, each message accounted for; then the
#             console in a browser for five minutes under load (not with ARGS):
#             ARGS="--seconds=60 --seed=1"
# make bench  the price of a message beside other relays, into docs/performance.md:
#             ARGS="--modes=up,echo --rounds=3 --results=/tmp/results.json"
# make fuzz   forty times as many random frames, requests and answers as the tests:
#             ARGS="-k answers" FUZZ=400
# make conformance  all of Autobahn's cases, into docs/conformance.md, in ten
#             minutes: ARGS="'9.*' 12.1.1" (without --write)
# make screenshots  the console's pictures in docs/images, in two minutes
# make lint   ruff and mypy
# make clean  removes what the others made

PYTHON ?= python3
ARGS ?=
FUZZ ?= 40

BIN = .venv/bin
# npm writes them; the tests with Node need what stands beside them.
NODE_MODULES = test/interop/node_modules/.package-lock.json \
    examples/express_backend/node_modules/.package-lock.json

# What the defaults leave unused, and the tests that run over it once more.
OTHERWISE = --event_loop=asyncio --http_server=tornado
OTHERWISE_TESTS = $(patsubst %,test/%_test.py,websocket frames callback handshake \
    authorization bad_input delivery signing backend_tls tls)

.PHONY: run test demo soak screenshots bench fuzz conformance lint clean

run: .venv/run.stamp
	@exec $(BIN)/python socketdock.py $(ARGS)

test: .venv/test.stamp
	@if command -v npm >/dev/null && [ -e test/interop/package.json ]; then \
	    $(MAKE) --no-print-directory $(NODE_MODULES); \
	fi
	@status=0; $(BIN)/python -m pytest $(ARGS) || status=$$?; \
	[ -n "$(ARGS)" ] || TEST_FLAGS="$(OTHERWISE)" $(BIN)/python -m pytest -q \
	    $(OTHERWISE_TESTS) || status=$$?; \
	command -v node >/dev/null && command -v npm >/dev/null || \
	    echo "Left out: tests with Node.js, since node or npm is missing" \
	        "(Debian: apt-get install nodejs npm)."; \
	command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	    command -v google-chrome >/dev/null || \
	    echo "Left out: tests with Chromium, since it is missing" \
	        "(Debian: apt-get install chromium)."; \
	PATH=$$PATH:/usr/sbin; \
	command -v haproxy >/dev/null && command -v nginx >/dev/null || \
	    echo "Left out: tests behind HAProxy or nginx, since one is missing" \
	        "(Debian: apt-get install haproxy nginx)."; \
	command -v promtool >/dev/null || \
	    echo "Left out: tests of the alerts and the dashboard, since promtool is" \
	        "missing (Debian: apt-get install prometheus)."; \
	command -v systemd-analyze >/dev/null || \
	    echo "Left out: a test of the systemd unit, since systemd-analyze is" \
	        "missing (Debian: apt-get install systemd)."; \
	exit $$status

demo: .venv/run.stamp
	@exec $(BIN)/python examples/demo.py

soak: .venv/test.stamp
	$(BIN)/python test/soak.py $(ARGS)
	@[ -n "$(ARGS)" ] || CONSOLE_SECONDS=300 $(BIN)/python -m pytest -q -rs \
	    test/console_page_test.py -k does_not_grow

# The console's pictures in docs/images; it needs ports 8000 and 8765, and chromium.
screenshots: .venv/test.stamp
	@exec $(BIN)/python test/screenshots.py $(ARGS)

bench: .venv/bench.stamp
	@if command -v npm >/dev/null; then \
	    $(MAKE) --no-print-directory bench/peers/node_modules/.package-lock.json; \
	fi
	@exec $(BIN)/python -m bench $(ARGS)

fuzz: .venv/test.stamp
	FUZZ=$(FUZZ) $(BIN)/python -m pytest test/fuzz_*_test.py $(ARGS)

conformance: .venv/test.stamp
	@exec $(BIN)/python test/conformance.py $(or $(ARGS),--write)

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	rm -rf test/interop/node_modules examples/express_backend/node_modules
	rm -rf bench/peers/node_modules supervisord.pid
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run.stamp: setup.py pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/test.stamp: setup.py pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch .venv/run.stamp $@

.venv/bench.stamp: setup.py pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch .venv/run.stamp $@

%/node_modules/.package-lock.json: %/package.json %/package-lock.json
	npm ci --prefix $* --no-audit --no-fund --loglevel=error
	@touch $@
