"""Conversations: histories that the DB node keeps for its tenants, so that a client sends only what is new.

`Conversations` is what both faces use. The truth is in PostgreSQL, so any DB node can take the next turn.
"""
