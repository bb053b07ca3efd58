"""What runs inside other engines, as their guest: connectors of vLLM and SGLang to the pool."""
