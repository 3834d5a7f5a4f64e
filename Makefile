# make quickstart   fine-tune a real chat model in 4 bits, in about two minutes
# make test         every check and every quick test
# make sanitize     the kernels under AddressSanitizer, UBSan and ThreadSanitizer, on random shapes
# make fuzz         the same for SECONDS=... each, from a seed of its own (an hour: SECONDS=3600)
# make soak         an hour of 32 clients of a server, its memory as a picture
# make campaign     N=1000: that many runs, each ended at a random moment, resumed, and compared
# make test-neon    the kernels for 64-bit Arm, cross-compiled, run by an emulator
# make experiments  the paper's tables and figures in small: hours, goes on where it was; see experiments/README.md
# make lessons      docs/tutorial run anew, their notebooks written: LESSONS=3 for the third alone
# The rest: setup, check, test-slow, bench, docs, clean.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# As in cli/__init__.py: torch's threads share the cores with whatever else runs.
export GOMP_SPINCOUNT ?= 1000

.PHONY: setup quickstart test test-slow browser check sanitize fuzz test-neon campaign soak bench experiments docs \
	lessons clean

setup: $(STAMP)
	@$(BIN)/halfbyte doctor --line

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.3"
	$(BIN)/python tools/install_torch.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt \
		--group dev --editable .
	touch $@

quickstart: setup
	$(BIN)/python examples/quickstart.py

# A process for each core, of one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

test: check
	$(PYTEST)

test-slow: setup browser
	$(PYTEST) -m slow

# For the tests of the web page, which are skipped where there is none.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
		{ apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-noto-cjk; } >/dev/null 2>&1 || \
		echo "There is no browser, and none could be installed: apt-get install chromium"

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror csrc/* tests/native/*.cpp tests/native/*.h
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/update_help.py --check
	$(BIN)/python docs/update_stub.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Without Python: see tests/native/check.cpp. About 30 seconds a tier.
sanitize:
	$(MAKE) -C tests/native --no-print-directory sanitize threads
	build/native/sanitize/check
	build/native/threads/check --cases 20
	build/native/sanitize/check --seconds 2 --seed $$(date +%s)

fuzz: SECONDS := 60
fuzz:
	$(MAKE) -C tests/native --no-print-directory sanitize
	build/native/sanitize/check --seconds $(SECONDS) --seed $$(date +%s)

test-neon:
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null || \
		{ echo "No cross compiler or no emulator: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
	$(MAKE) -C tests/native --no-print-directory neon
	ASAN_OPTIONS=detect_leaks=0 qemu-aarch64 -L /usr/aarch64-linux-gnu build/native/neon/check --cases 50

# Goes on after the trials that benchmarks/campaign.jsonl has; see tests/campaign.py.
campaign: N := 300
campaign: setup
	$(BIN)/python tests/campaign.py $(N)

# Clients of a server that stream, hang up, read slowly; build/soak.svg is its memory. See tests/deploy/load.py.
soak: SECONDS := 3600
soak: setup
	mkdir -p build
	$(BIN)/python tests/deploy/load.py $(SECONDS) build/soak.svg

bench: setup
	$(BIN)/halfbyte bench kernels

# One thread, so that results do not depend on how many there are.
experiments: export OMP_NUM_THREADS := 1
experiments: setup
	$(BIN)/python experiments/table_2.py
	$(BIN)/python experiments/figure_3.py
	$(BIN)/python experiments/normality.py
	$(BIN)/python experiments/memory.py
	$(BIN)/python experiments/tables_3_4.py
	$(BIN)/python experiments/figure_2.py
	$(BIN)/python experiments/rank.py
	$(BIN)/python experiments/forgetting.py

docs: setup
	$(BIN)/python docs/update_help.py
	$(BIN)/python docs/update_stub.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lessons: setup
	$(BIN)/python docs/update_lessons.py $(LESSONS)

clean:
	rm -rf $(VENV) build
