# The trainer, without a GPU or for one, which needs PyPI's build of torch and a compiler:
#   docker build -f docker/trainer.Dockerfile -t strong2weak-trainer --build-arg TORCH_INDEX_URL=https://pypi.org/simple \
#       --build-arg EXTRAS="trainer bitsandbytes" --build-arg SYSTEM_PACKAGES="gcc libc6-dev" .
# Pinned like docker/teacher.Dockerfile, with whose target cpu it shares torch's layer.
ARG PYTHON_IMAGE=python:3.11-slim
ARG PYTHON_DIGEST=

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY pyproject.toml docker/requirements.py ./

FROM base AS wheel
ARG PIP_INDEX_URL=
ARG PIP_CERT=
COPY README.md LICENSE ./
COPY protos protos
COPY teacher_server teacher_server
COPY student_trainer student_trainer
COPY tiny_pair tiny_pair
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base AS packages
ARG PIP_INDEX_URL=
ARG PIP_CERT=
ARG PIP_FIND_LINKS=
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python requirements.py --only torch server > torch.txt && pip install --extra-index-url "${TORCH_INDEX_URL}" -r torch.txt
ARG EXTRAS="trainer"
RUN python requirements.py ${EXTRAS} > all.txt && pip install -r all.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-deps /wheels/*.whl

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS trainer
# A compiler, where kernels are compiled as they are first used (Triton, on a GPU): --build-arg SYSTEM_PACKAGES="gcc libc6-dev".
ARG SYSTEM_PACKAGES=
RUN if [ -n "${SYSTEM_PACKAGES}" ]; then apt-get update && apt-get install -y --no-install-recommends ${SYSTEM_PACKAGES} \
    && rm -rf /var/lib/apt/lists/*; fi
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH \
    HOME=/cache HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache TMPDIR=/tmp \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor TRITON_CACHE_DIR=/cache/triton CUDA_CACHE_PATH=/cache/cuda \
    STRONG2WEAK_TRAINING__OUTPUT_DIR=/outputs STRONG2WEAK_TRAINING__LOG_FILE=/outputs/distillation.log
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --home-dir /cache app \
    && install -d -o app -g app /cache /outputs
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY main_distillation.py ./
COPY config config
COPY dataset dataset
COPY tiny_pair/student_base tiny_pair/student_base
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "main_distillation.py"]
