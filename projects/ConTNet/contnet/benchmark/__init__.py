"""What tools/benchmark.py measures, one module for each subject, and tools/compare_checkouts.py."""
