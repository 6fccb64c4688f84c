# On a fresh Debian or macOS machine with Python >= 3.11 and make: `make quickstart`, `make test`, `make bench`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: quickstart test bench clean

quickstart: $(INSTALLED)
	mkdir -p out/quickstart
	WANDB_DIR=out/quickstart $(BIN)/python -m data build --source inquiries --documents 3000 --vocab_size 2048 --out out/quickstart/data
	WANDB_DIR=out/quickstart $(BIN)/python -m gacha run sweeps/quickstart.yaml --jobs 2
	WANDB_DIR=out/quickstart $(BIN)/python -m gacha run sweeps/quickstart_posttrain.yaml --jobs 2
	WANDB_DIR=out/quickstart $(BIN)/python -m gacha report out/quickstart/wandb --out out/quickstart/report.html

test: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

bench: $(INSTALLED)-bench
	$(BIN)/python bench.py

clean:
	rm -rf out runs wandb

# A change of the dependencies installs again; everything else starts at once.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11: install a newer Python, or say make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: no venv module: on Debian, apt install python3-venv" >&2; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps sweeps==0.3.0  # it asks for numpy 1, and runs on 2
	@touch $@

$(INSTALLED)-bench: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@
