"""The coverage table: which attention of which model is found, what became of it, and that its numbers hold.

`python -m attention_coverage` with this package's folder on PYTHONPATH, or `make coverage`.
"""
