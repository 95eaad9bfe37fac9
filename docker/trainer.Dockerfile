# The trainer, without a GPU or for one, which needs PyPI's build of torch and a compiler:
#   docker build -f docker/trainer.Dockerfile -t strong2weak-trainer --build-arg TORCH_INDEX_URL=https://pypi.org/simple \
#       --build-arg EXTRAS="trainer metrics bitsandbytes" --build-arg SYSTEM_PACKAGES="gcc libc6-dev" .
# Pinned like docker/teacher.Dockerfile, with whose target cpu it shares torch's layer.
ARG PYTHON_IMAGE=python:3.11-slim
ARG PYTHON_DIGEST=

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Lists of packages are made here, so that what is installed from them is installed again only where a list has changed.
FROM base AS lists
COPY pyproject.toml docker/requirements.py ./
ARG EXTRAS="trainer metrics"
RUN python requirements.py --only torch server > torch.txt && python requirements.py ${EXTRAS} > trainer.txt

# The code, by itself: a change of it copies and installs nothing else.
FROM base AS code
ARG PIP_INDEX_URL=
ARG PIP_CERT=
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY teacher_server teacher_server
COPY student_trainer student_trainer
COPY tiny_pair tiny_pair
RUN pip install --no-deps --target /opt/code .

FROM base AS packages
ARG PIP_INDEX_URL=
ARG PIP_CERT=
ARG PIP_FIND_LINKS=
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY --from=lists /src/torch.txt ./
RUN pip install --extra-index-url "${TORCH_INDEX_URL}" -r torch.txt
COPY --from=lists /src/trainer.txt ./
RUN pip install -r trainer.txt

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS trainer
# A compiler, where kernels are compiled as they are first used (Triton, on a GPU): --build-arg SYSTEM_PACKAGES="gcc libc6-dev".
ARG SYSTEM_PACKAGES=
RUN if [ -n "${SYSTEM_PACKAGES}" ]; then apt-get update && apt-get install -y --no-install-recommends ${SYSTEM_PACKAGES} \
    && rm -rf /var/lib/apt/lists/*; fi
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/code \
    HOME=/cache HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache TMPDIR=/tmp \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor TRITON_CACHE_DIR=/cache/triton CUDA_CACHE_PATH=/cache/cuda \
    STRONG2WEAK_TRAINING__OUTPUT_DIR=/outputs STRONG2WEAK_TRAINING__LOG_FILE=/outputs/distillation.log
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --home-dir /cache app \
    && install -d -o app -g app /cache /outputs
COPY --from=packages /opt/venv /opt/venv
COPY --from=code /opt/code /opt/code
WORKDIR /app
COPY main_distillation.py ./
COPY config config
COPY dataset dataset
COPY tiny_pair/student_base tiny_pair/student_base
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "main_distillation.py"]
