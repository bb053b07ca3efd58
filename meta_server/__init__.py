"""The meta server: which KV blocks are committed, where they lie, who is alive. Holds no KV.

Truth is in PostgreSQL (`store`, `journal`), the index in memory (`index`, `catalog`) is rebuilt from it at each start.
"""
