"""Handing a prompt's KV over while it is computed: the prefill worker tells of each layer that lies in the pool, the decode
worker loads it at once."""
