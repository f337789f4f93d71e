"""Benchmarks: ``python -m pytest bench`` times the operators, ``python -m bench.model_forward`` whole models."""
