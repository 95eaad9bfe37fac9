"""Tests against the real vLLM; they need its own environment: `make test-vllm`."""
