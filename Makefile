# Works with GNU make (3.81 and newer) and with BSD make.
# PYTHON= chooses the interpreter:  make demo PYTHON=pypy3
# The clients of all demos:  make demo CONNECTIONS=16 THINK=0.1

PYTHON = python3
SERVER = $(SINGLE).py $(MULTI).py $(BUSY).py $(KQUEUE).py
CONNECTIONS = 8
REQUESTS = 4
THINK = 0.05
TIMEOUT = 30
SCENE = thinking

SINGLE = 1_single_blocking
MULTI = 2_multi_blocking
BUSY = 3_busy_wait
KQUEUE = 4_kqueue_loop
CLIENTS = --connections $(CONNECTIONS) --requests $(REQUESTS) \
	--think $(THINK) --timeout $(TIMEOUT)
# Empty, these two are as good as not set: the tools import their neighbours,
# and end when they are done.
RUN = PYTHONSAFEPATH= PYTHONINSPECT= "$(PYTHON)"
DEMO = $(RUN) client.py $(CLIENTS)
EACH = set --; for server in $(SERVER); do \
	  set -- "$$@" --server "$$server"; done
TRANSCRIPTS = build/$(SINGLE).txt build/$(MULTI).txt build/$(BUSY).txt \
	build/$(KQUEUE).txt

help:
	@echo 'make demo         all four servers, one after the other, side by side'
	@echo 'make demo-single  only the first: single-threaded, blocking'
	@echo 'make demo-multi   only the second: a thread per connection, blocking'
	@echo 'make demo-busy    only the third: non-blocking, busy wait'
	@echo 'make demo-kqueue  only the fourth: an event loop on kqueue'
	@echo 'make diff         compare what the four servers replied'
	@echo
	@echo 'make compare      what each pattern costs, asked of all four'
	@echo 'make trace        where each server waits: its threads, from inside'
	@echo 'make scale        1 to 10,000 connections, as a plot'
	@echo 'make bench        requests per second, with redis-benchmark'
	@echo 'make syscalls     which system calls each pattern makes (Linux)'
	@echo 'make pictures     the plots as SVG files, in build/'
	@echo
	@echo 'make test         run the tests, in a virtual environment of their own'
	@echo 'make test-all     those that take longer, too (some minutes)'
	@echo 'make clean        remove all that was made (build/)'
	@echo
	@echo 'SERVER= runs your own:  make demo SERVER=mine.py (also trace, compare)'
	@echo 'SCENE= chooses what is traced:  make trace SCENE=blocking (or quiet)'
	@echo 'PYTHON= chooses the interpreter:  make demo PYTHON=pypy3'
	@echo 'More clients that think for longer, and wait for longer than 30 s:'
	@echo '  make demo-kqueue CONNECTIONS=1000 REQUESTS=4 THINK=0.5 TIMEOUT=60'

demo:
	@$(EACH); $(DEMO) "$$@"

compare:
	@$(EACH); $(RUN) tests/bench/compare.py "$$@"

trace:
	@$(EACH); $(RUN) tests/bench/trace.py $(CLIENTS) --scene $(SCENE) "$$@"

scale:
	@$(RUN) tests/bench/scale.py

bench:
	@$(RUN) tests/bench/bench.py

syscalls:
	@$(RUN) tests/bench/syscalls.py

pictures:
	@$(RUN) tests/bench/pictures.py $(CLIENTS) --svg build/demo.svg
	@$(RUN) tests/bench/trace.py $(CLIENTS) --svg build/trace.svg >/dev/null
	@echo 'Where each server waits is drawn in build/trace.svg.'
	@$(RUN) tests/bench/scale.py --svg build/scale.svg

demo-single:
	@$(DEMO) --server $(SINGLE).py

demo-multi:
	@$(DEMO) --server $(MULTI).py

demo-busy:
	@$(DEMO) --server $(BUSY).py

demo-kqueue:
	@$(DEMO) --server $(KQUEUE).py

# A transcript is made anew when the server or the client has changed. It is
# always that of the same clients, else it would differ for no good reason.
build/$(SINGLE).txt: $(SINGLE).py client.py
	@mkdir -p build; $(RUN) client.py --server $(SINGLE).py --transcript $@

build/$(MULTI).txt: $(MULTI).py client.py
	@mkdir -p build; $(RUN) client.py --server $(MULTI).py --transcript $@

build/$(BUSY).txt: $(BUSY).py client.py
	@mkdir -p build; $(RUN) client.py --server $(BUSY).py --transcript $@

build/$(KQUEUE).txt: $(KQUEUE).py client.py
	@mkdir -p build; $(RUN) client.py --server $(KQUEUE).py --transcript $@

diff: $(TRANSCRIPTS)
	diff build/$(SINGLE).txt build/$(MULTI).txt
	diff build/$(SINGLE).txt build/$(BUSY).txt
	diff build/$(SINGLE).txt build/$(KQUEUE).txt
	@echo 'No difference: all four servers gave the same reply to each request.'
	@echo 'Compared are the replies to SET and GET. What INCR replies depends on'
	@echo 'whose turn it is, so of these only that each number came once.'

# pytest goes into a virtual environment of its own, one for each interpreter.
# What settings of pip, pytest and Python there are elsewhere is kept out. The
# tests mostly wait: half of them run beside the others, and are shown at the end.
VERSION = import platform as p; print(p.python_implementation(), p.python_version(), sep="-")
HALF = tests/test_faults.py tests/test_project.py
FOREIGN = PYTHONHOME PYTHONPATH PYTHONOPTIMIZE PYTHONWARNINGS PYTHONINSPECT \
	PYTHONSAFEPATH PYTHONSTARTUP PYTHONPROFILEIMPORTTIME PYTHONVERBOSE \
	PYTHONDEVMODE PYTHONDEBUG PYTHONASYNCIODEBUG PYTHONTRACEMALLOC \
	PYTHONMALLOC PYTHONMALLOCSTATS PYTHONDUMPREFS PYTHONIOENCODING \
	PYTHONUTF8 PYTHONLEGACYWINDOWSSTDIO PYTHONINTMAXSTRDIGITS \
	PYTHONPYCACHEPREFIX PYTHONPLATLIBDIR PYTHONEXECUTABLE PYTHONBREAKPOINT \
	PYTHON_PRESITE PYTHON_COLORS FORCE_COLOR PYTEST_ADDOPTS PYTEST_PLUGINS \
	PYTEST_DISABLE_PLUGIN_AUTOLOAD PY_COLORS MAKEFLAGS MFLAGS MAKELEVEL \
	COLUMNS LINES CDPATH
PIP = PIP_USER=0 PIP_TARGET= PIP_PREFIX= PIP_ROOT= PIP_REQUIRE_VIRTUALENV=0 \
	PIP_CONSTRAINT= PIP_REQUIREMENT= PIP_DRY_RUN=0 PIP_NO_DEPS=0
PYTEST = -m pytest -q -rfEs -p no:cacheprovider -c /dev/null --rootdir=. \
	--confcutdir=tests

test test-all:
	@unset $(FOREIGN); \
	venv=build/venv-`"$(PYTHON)" -c '$(VERSION)'`; \
	if ! "$$venv/bin/python" -c 'import pytest' 2>/dev/null; then \
	  rm -rf "$$venv"; \
	  "$(PYTHON)" -m venv "$$venv" && $(PIP) "$$venv/bin/python" -m pip \
	    install -q --disable-pip-version-check pytest && \
	  "$$venv/bin/python" -c 'import pytest' || { \
	    echo 'make: pytest could not be installed into build/' >&2; exit 1; }; \
	fi; \
	PYTHONDONTWRITEBYTECODE=1; export PYTHONDONTWRITEBYTECODE; \
	unset SLOW; test $@ = test || { SLOW=1; export SLOW; }; \
	"$$venv/bin/python" $(PYTEST) $(HALF) >build/$@.txt 2>&1 & half=$$!; \
	trap "kill $$half 2>/dev/null; exit 1" INT TERM HUP; \
	"$$venv/bin/python" $(PYTEST) --ignore-glob='*faults.py' \
	  --ignore-glob='*project.py' tests; \
	others=$$?; wait $$half; half=$$?; cat build/$@.txt; \
	test $$half = 0 && test $$others = 0

clean:
	rm -rf build

.PHONY: help demo demo-single demo-multi demo-busy demo-kqueue diff compare \
	trace scale bench syscalls pictures test test-all clean
