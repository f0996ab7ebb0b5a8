# Works with GNU make (3.81 and newer) and with BSD make.
# PYTHON= chooses the interpreter:  make demo PYTHON=pypy3

PYTHON = python3

SINGLE = 1_single_blocking
MULTI = 2_multi_blocking
BUSY = 3_busy_wait
KQUEUE = 4_kqueue_loop
DEMO = $(PYTHON) client.py
SERVERS = --server $(SINGLE).py --server $(MULTI).py \
	--server $(BUSY).py --server $(KQUEUE).py
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
	@echo 'make scale        1 to 10,000 connections, as a plot'
	@echo 'make bench        requests per second, with redis-benchmark'
	@echo 'make syscalls     which system calls each pattern makes (Linux)'
	@echo 'make pictures     the plots as SVG files, in build/'
	@echo
	@echo 'make test         run the tests, in a virtual environment of their own'
	@echo 'make clean        remove all that was made (build/)'
	@echo
	@echo 'PYTHON= chooses the interpreter:  make demo PYTHON=pypy3'

demo:
	@$(DEMO) \
	  --server $(SINGLE).py --transcript build/$(SINGLE).txt \
	  --server $(MULTI).py --transcript build/$(MULTI).txt \
	  --server $(BUSY).py --transcript build/$(BUSY).txt \
	  --server $(KQUEUE).py --transcript build/$(KQUEUE).txt

compare:
	@$(DEMO) --compare $(SERVERS)

scale:
	@$(PYTHON) tests/bench/scale.py

bench:
	@$(PYTHON) tests/bench/bench.py

syscalls:
	@$(PYTHON) tests/bench/syscalls.py

pictures:
	@$(DEMO) $(SERVERS) --svg build/demo.svg
	@$(PYTHON) tests/bench/scale.py --svg build/scale.svg
	@echo 'See build/demo.svg and build/scale.svg.'

demo-single:
	@$(DEMO) --server $(SINGLE).py --transcript build/$(SINGLE).txt

demo-multi:
	@$(DEMO) --server $(MULTI).py --transcript build/$(MULTI).txt

demo-busy:
	@$(DEMO) --server $(BUSY).py --transcript build/$(BUSY).txt

demo-kqueue:
	@$(DEMO) --server $(KQUEUE).py --transcript build/$(KQUEUE).txt

# A transcript is made anew when the server or the client has changed.
build/$(SINGLE).txt: $(SINGLE).py client.py
	@$(DEMO) --server $(SINGLE).py --transcript $@

build/$(MULTI).txt: $(MULTI).py client.py
	@$(DEMO) --server $(MULTI).py --transcript $@

build/$(BUSY).txt: $(BUSY).py client.py
	@$(DEMO) --server $(BUSY).py --transcript $@

build/$(KQUEUE).txt: $(KQUEUE).py client.py
	@$(DEMO) --server $(KQUEUE).py --transcript $@

diff: $(TRANSCRIPTS)
	diff build/$(SINGLE).txt build/$(MULTI).txt
	diff build/$(SINGLE).txt build/$(BUSY).txt
	diff build/$(SINGLE).txt build/$(KQUEUE).txt
	@echo 'No difference: all four servers gave the same replies.'

# A virtual environment for each interpreter, made when it is first needed.
VERSION = import platform as p; print(p.python_implementation(), p.python_version(), sep="-")

test:
	@venv=build/venv-`$(PYTHON) -c '$(VERSION)'`; \
	if test ! -f $$venv/ready; then \
	  $(PYTHON) -m venv $$venv && \
	  $$venv/bin/python -m pip install -q --disable-pip-version-check pytest && \
	  touch $$venv/ready; \
	fi && PYTHONDONTWRITEBYTECODE=1 \
	  $$venv/bin/python -m pytest -q -p no:cacheprovider tests

clean:
	rm -rf build

.PHONY: help demo demo-single demo-multi demo-busy demo-kqueue diff compare \
	scale bench syscalls pictures test clean
