"""kill -9 of meta servers and PostgreSQL in every step of a write; what happened is recorded and checked against a model.

`python -m tests.chaos --minutes 10 --seed 7` (or `make chaos`) goes on for a while; the suite runs a short form.
"""
