"""What tools/benchmark.py measures, one module for each subject; the GPU check; comparisons."""
