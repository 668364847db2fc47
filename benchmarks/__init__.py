"""Benchmarks of tools/benchmark.py, one module per subject; the GPU check; comparisons."""
