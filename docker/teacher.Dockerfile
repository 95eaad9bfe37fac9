# The teacher. Targets: gpu (vLLM on CUDA, the default), cpu (the transformers backend), tools (keys and certificates).
#   docker build -f docker/teacher.Dockerfile --target gpu -t strong2weak-teacher .
# An image is pinned with its digest: --build-arg PYTHON_DIGEST=@sha256:... (`docker buildx imagetools inspect IMAGE` prints
# it); without one its tag is used. Packages come from PyPI, or from where the PIP_ arguments say; no secret is an argument.
ARG PYTHON_IMAGE=python:3.11-slim
ARG PYTHON_DIGEST=
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
ARG VLLM_DIGEST=

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Lists of packages are made here, so that what is installed from them is installed again only where a list has changed.
FROM base AS lists
COPY pyproject.toml docker/requirements.py ./
RUN python requirements.py --only torch server > torch.txt \
    && python requirements.py server > server.txt \
    && python requirements.py > tools.txt

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

FROM base AS tools-packages
ARG PIP_INDEX_URL=
ARG PIP_CERT=
COPY --from=lists /src/tools.txt ./
RUN pip install -r tools.txt

# Makes the keys and certificates that the services share as volumes, and ends.
FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS tools
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/code \
    TEACHER_KEYS_FILE=/keys/teacher-keys.json
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --create-home app \
    && install -d -o app -g app -m 0750 /keys /tls /authority /keys-of-clients \
       /keys-of-clients/trainer /keys-of-clients/prometheus /keys-of-clients/grafana \
    && install -d -o app -g app /ca
COPY --from=tools-packages /opt/venv /opt/venv
COPY --from=code /opt/code /opt/code
COPY docker/make-certificates.sh docker/make-keys.sh /usr/local/bin/
WORKDIR /home/app
USER 10001:10001
ENTRYPOINT ["python", "-m", "teacher_server", "keys"]
CMD ["list"]

FROM base AS cpu-packages
ARG PIP_INDEX_URL=
ARG PIP_CERT=
ARG PIP_FIND_LINKS=
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY --from=lists /src/torch.txt ./
RUN pip install --extra-index-url "${TORCH_INDEX_URL}" -r torch.txt
COPY --from=lists /src/server.txt ./
RUN pip install -r server.txt

# Any model of transformers, on a CPU; the embedded tiny teacher is in the image.
FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS cpu
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/code \
    HOME=/cache HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache TMPDIR=/tmp \
    TEACHER_MODEL=/models/tiny_teacher
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --home-dir /cache app \
    && install -d -o app -g app /cache
COPY --from=cpu-packages /opt/venv /opt/venv
COPY --from=code /opt/code /opt/code
COPY tiny_pair/teacher /models/tiny_teacher
COPY docker/ready.py /usr/local/bin/ready.py
WORKDIR /cache
USER 10001:10001
EXPOSE 50051 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=10s --retries=3 --start-period=10m CMD ["python", "/usr/local/bin/ready.py"]
ENTRYPOINT ["python", "-m", "teacher_server"]

# vLLM with its own CUDA build of torch, which is kept as it is. What it compiles goes below /cache.
FROM ${VLLM_IMAGE}${VLLM_DIGEST} AS gpu
ARG PIP_INDEX_URL=
ARG PIP_CERT=
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache TMPDIR=/tmp VLLM_CACHE_ROOT=/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor TRITON_CACHE_DIR=/cache/triton CUDA_CACHE_PATH=/cache/cuda \
    FLASHINFER_WORKSPACE_BASE=/cache VLLM_NO_USAGE_STATS=1 \
    TEACHER_BACKEND=vllm PYTHONPATH=/opt/code
USER root
COPY --from=lists /src/server.txt /src/server.txt
WORKDIR /src
RUN python3 -c "from importlib.metadata import version as v; print(*(f'{n}=={v(n)}' for n in ('torch', 'transformers')), sep='\n')" > held.txt \
    && python3 -m pip install --no-cache-dir --constraint held.txt -r server.txt \
    && groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --home-dir /cache app \
    && install -d -o app -g app /cache
COPY --from=code /opt/code /opt/code
COPY docker/ready.py /usr/local/bin/ready.py
WORKDIR /cache
USER 10001:10001
EXPOSE 50051 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=10s --retries=6 --start-period=2h CMD ["python3", "/usr/local/bin/ready.py"]
ENTRYPOINT ["python3", "-m", "teacher_server"]
