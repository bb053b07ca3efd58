"""Tests of the SGLang integration against SGLang's published classes, on the CPU: `make test-sglang`."""
