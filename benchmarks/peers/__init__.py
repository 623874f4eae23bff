"""One worker per runtime; `worker.py` is their common part."""
