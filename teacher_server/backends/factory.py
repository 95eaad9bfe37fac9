"""Makes the backend that the options name; imports an engine only when it is the one."""

from __future__ import annotations

import os

from teacher_server.backends.base import Backend
from teacher_server.backends.options import BackendOptions


def make_backend(options: BackendOptions) -> Backend:
    """The backend, not started yet; ValueError for a name that nobody knows or an engine that is not installed."""
    if options.backend == "transformers":
        # OpenMP's threads spin while they wait, which costs nothing on idle cores and a factor of ten where trainer and
        # teacher share them (measured: 9 against 91 completions/s). OpenMP reads this when PyTorch is first imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            from teacher_server.backends.transformers_backend import TransformersBackend
        except ModuleNotFoundError as error:
            raise ValueError(
                f"the transformers backend needs {error.name}, which is missing; pip install 'strong2weak[server]'"
            ) from error
        return TransformersBackend(options)
    if options.backend == "theoretical":
        from teacher_server.backends.theoretical_backend import TheoreticalBackend

        return TheoreticalBackend(options)
    if options.backend == "vllm":
        try:
            from teacher_server.backends.vllm_backend import VllmBackend

            return VllmBackend(options)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"the vllm backend needs {error.name}, which is missing; pip install 'strong2weak[server,vllm]'"
            ) from error
    raise ValueError(f"there is no backend {options.backend!r} in this release; choose transformers")
