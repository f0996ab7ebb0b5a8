# Works with GNU make (3.81 and newer) and with BSD make.
# PYTHON= chooses the interpreter:  make demo PYTHON=pypy3
# The clients of all demos:  make demo CONNECTIONS=16 THINK=0.1

PYTHON = python3
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
DEMO = $(PYTHON) client.py $(CLIENTS)
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
	@echo 'SCENE= chooses what is traced:  make trace SCENE=blocking (or quiet)'
	@echo 'PYTHON= chooses the interpreter:  make demo PYTHON=pypy3'
	@echo 'More clients that think for longer, and wait for longer than 30 s:'
	@echo '  make demo-kqueue CONNECTIONS=1000 REQUESTS=4 THINK=0.5 TIMEOUT=60'

demo:
	@$(DEMO) --server $(SINGLE).py --server $(MULTI).py \
	  --server $(BUSY).py --server $(KQUEUE).py

compare:
	@$(PYTHON) tests/bench/compare.py

trace:
	@$(PYTHON) tests/bench/trace.py $(CLIENTS) --scene $(SCENE)

scale:
	@$(PYTHON) tests/bench/scale.py

bench:
	@$(PYTHON) tests/bench/bench.py

syscalls:
	@$(PYTHON) tests/bench/syscalls.py

pictures:
	@$(PYTHON) tests/bench/pictures.py $(CLIENTS) --svg build/demo.svg
	@$(PYTHON) tests/bench/trace.py $(CLIENTS) --svg build/trace.svg >/dev/null
	@echo 'Where each server waits is drawn in build/trace.svg.'
	@$(PYTHON) tests/bench/scale.py --svg build/scale.svg

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
	@$(PYTHON) client.py --server $(SINGLE).py --transcript $@

build/$(MULTI).txt: $(MULTI).py client.py
	@$(PYTHON) client.py --server $(MULTI).py --transcript $@

build/$(BUSY).txt: $(BUSY).py client.py
	@$(PYTHON) client.py --server $(BUSY).py --transcript $@

build/$(KQUEUE).txt: $(KQUEUE).py client.py
	@$(PYTHON) client.py --server $(KQUEUE).py --transcript $@

diff: $(TRANSCRIPTS)
	diff build/$(SINGLE).txt build/$(MULTI).txt
	diff build/$(SINGLE).txt build/$(BUSY).txt
	diff build/$(SINGLE).txt build/$(KQUEUE).txt
	@echo 'No difference: all four servers gave the same reply to each request.'
	@echo 'Compared are the replies to SET and GET. What INCR replies depends on'
	@echo 'whose turn it is, so of these only that each number came once.'

# A virtual environment for each interpreter, made when it is first needed. The
# tests mostly wait: half of them run beside the others, and are shown at the end.
VERSION = import platform as p; print(p.python_implementation(), p.python_version(), sep="-")
HALF = tests/test_faults.py tests/test_patterns.py

test test-all:
	@venv=build/venv-`$(PYTHON) -c '$(VERSION)'`; \
	if test ! -f $$venv/ready; then \
	  $(PYTHON) -m venv $$venv && \
	  $$venv/bin/python -m pip install -q --disable-pip-version-check pytest && \
	  touch $$venv/ready || exit 1; \
	fi; \
	PYTHONDONTWRITEBYTECODE=1; export PYTHONDONTWRITEBYTECODE; \
	run="$$venv/bin/python -m pytest -q -rfEs -p no:cacheprovider"; \
	test $@ = test || run="env SLOW=1 $$run"; \
	$$run $(HALF) >build/$@.txt 2>&1 & half=$$!; \
	trap "kill $$half" INT TERM; \
	$$run --ignore-glob='*faults.py' --ignore-glob='*patterns.py' tests; \
	others=$$?; wait $$half; half=$$?; cat build/$@.txt; \
	test $$half = 0 && test $$others = 0

clean:
	rm -rf build

.PHONY: help demo demo-single demo-multi demo-busy demo-kqueue diff compare \
	trace scale bench syscalls pictures test test-all clean
