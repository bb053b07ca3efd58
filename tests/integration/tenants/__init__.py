"""Tenants on a real PostgreSQL."""
