"""The two sides of vLLM's connector against a real pool, without vLLM."""
