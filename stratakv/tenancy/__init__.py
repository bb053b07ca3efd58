"""Tenants, their API keys, roles and limits: what the command line writes into the metadata and DB nodes read from it."""
