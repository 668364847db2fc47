VENV ?= .venv
PYTHON ?=
BIN = $(VENV)/bin
SITE = import sysconfig; print(sysconfig.get_path("purelib"))
NUMPY1 = $(abspath $(VENV))/numpy1
TORCH26 = $(VENV)-torch2.6

MINUTES = 60
SEED = 0

.PHONY: setup docs demo demo-imagenet test test-long test-slurm test-browser soak lint format test-numpy1 test-existing-torch check-pythons lock

# The virtual environment. Every other target comes here first; once made, it costs a moment.
setup:
	@sh tools/setup_env.sh "$(VENV)" "$(PYTHON)"

# Trains a small detector on drawn shapes, evaluates it and leaves a page of pictures.
demo: setup
	$(BIN)/python tools/demo.py

# Trains a small classifier on drawn shapes and tells its accuracy.
demo-imagenet: setup
	$(BIN)/python tools/demo_imagenet.py

# As many processes as there are cores, four at most.
test: setup
	$(BIN)/pytest tests -n auto --maxprocesses 4 --dist worksteal

# The tests that take longest, of which make test runs only shorter variants.
test-long: setup
	$(BIN)/pytest tests -m long -n auto --maxprocesses 4 --dist worksteal

# The jobs on a private SLURM cluster; root gets SLURM installed, others are told how.
test-slurm: setup
	@sh tools/test_slurm.sh $(BIN)/pytest

# The pages in Chromium; root gets it installed, others are told how.
test-browser: setup
	@sh tools/test_browser.sh $(BIN)/pytest

# Random faults, hostile files and a watch for leaks, for as long as one likes (docs/reliability.md).
soak: setup
	$(BIN)/python tests/faults/soak.py --minutes $(MINUTES) --seed $(SEED)

# The documentation as a site, in build/site; a broken link or anchor is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Format, style, and that imports go one way (the contracts are in setup.cfg).
lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYTHONPATH=. $(BIN)/lint-imports setup.cfg

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tests marked numpy1, with numpy 1.26 and OpenCV 4 laid over the environment's own.
test-numpy1: $(NUMPY1)/complete
	PYTHONPATH=$(NUMPY1) $(BIN)/python -c 'import cv2, numpy; \
	  print("numpy", numpy.__version__, "OpenCV", cv2.__version__); \
	  assert numpy.__version__[:5] == "1.26." and cv2.__version__[:2] == "4."'
	PYTHONPATH=$(NUMPY1) $(BIN)/pytest tests -m numpy1

$(NUMPY1)/complete: requirements/numpy1.txt | setup
	rm -rf $(NUMPY1)
	$(BIN)/pip install -q --no-deps --require-hashes --target $(NUMPY1) -r $<
	touch $@

# The commands of docs/install.md in an environment that already has torch 2.6 (about 5 GB).
test-existing-torch: setup
	$(BIN)/python -m venv --clear $(TORCH26)
	$(TORCH26)/bin/pip install -q torch==2.6.0 torchvision==0.21.0
	$(TORCH26)/bin/pip install -q -e . --no-deps
	$(TORCH26)/bin/pip install -q -r requirements/existing-torch.txt pytest pytest-timeout packaging \
	  hypothesis webdataset globox
	$(TORCH26)/bin/pip install -q --no-deps --only-binary=:all: --python-version 3.10 \
	  --implementation cp --abi none --platform any --upgrade --require-hashes \
	  -r requirements/detectron2.txt --target "$$($(TORCH26)/bin/python -c '$(SITE)')"
	$(TORCH26)/bin/python -c 'import torch, torchvision; \
	  print("torch", torch.__version__, "torchvision", torchvision.__version__); \
	  assert torch.__version__[:5] == "2.6.0" and torchvision.__version__[:6] == "0.21.0"'
	$(TORCH26)/bin/pytest tests -m "not slow and not long and not gpu and not slurm and not browser"

# That every pin has a file for the other Pythons; nothing is installed.
check-pythons: setup
	for version in 3.12 3.13; do \
	  $(BIN)/pip install -q --dry-run --ignore-installed --no-deps --no-build-isolation \
	    --require-hashes --python-version $$version -r requirements/lock.txt \
	  && echo "Python $$version: every pin can be had" || exit 1; \
	done

# Writes the pinned files again, newest versions within the ranges of setup.cfg. Needs uv.
COMPILE = uv pip compile --quiet --upgrade --generate-hashes --no-annotate \
  --custom-compile-command "make lock"
UNIVERSAL = --universal --fork-strategy fewest --python-version 3.11
lock:
	$(COMPILE) $(UNIVERSAL) setup.cfg --all-extras -o requirements/lock.txt
	printf 'pip\nsetuptools<82\n' | $(COMPILE) $(UNIVERSAL) - -o requirements/build.txt
	printf 'numpy<2\nopencv-python-headless<5\n' \
	  | $(COMPILE) $(UNIVERSAL) - -o requirements/numpy1.txt
	printf 'sal-detectron2==0.7.2\ncityscapesscripts==2.3.0\n' \
	  | $(COMPILE) --no-deps --python-version 3.10 - -o requirements/detectron2.txt
