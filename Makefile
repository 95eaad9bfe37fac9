# The commands of this project. Each sets up what it needs in .venv; nothing outside this folder is touched.
#   make demo         the main job on the embedded pair: teacher server, both stages, a table of results
#   make test         the fast tests          make test-slow    the long ones
#   make lint         ruff, mypy, import contracts, buf
#   make protos       generates protos/teacher/v1/*_pb2* again after a change of the .proto
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
SHELL := /bin/sh
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-slow lint format protos clean
help:
	@sed -n '2,6s/^# *//p' Makefile

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; none was found. Name one: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	"$(PYTHON)" -m venv .venv

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e '.[server,trainer]'
	@touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e '.[server,trainer,dev]'
	@touch $@ .venv/demo.stamp

# One thread each for the trainer and the teacher that it starts: the models are tiny, and two pools of threads that share
# two cores wait for each other more than they gain.
demo: .venv/demo.stamp
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) main_distillation.py --config config/demo.yaml --stage all

test: .venv/dev.stamp
	$(PY) -m pytest

test-slow: .venv/dev.stamp
	$(PY) -m pytest -m "slow and not vllm"

lint: .venv/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/buf lint

format: .venv/dev.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

protos: .venv/dev.stamp
	$(PY) -m grpc_tools.protoc -Iprotos/teacher/v1=protos/teacher/v1 --python_out=. --pyi_out=. --grpc_python_out=. protos/teacher/v1/teacher.proto

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build ./*.egg-info
