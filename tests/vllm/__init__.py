"""Tests of vLLM on the pool: `make test-vllm`."""
