"""Benchmarks: pytest-benchmark suites and the plain PyTorch baseline."""
