"""What tools/gpu_check.sh checks and measures, and the report of it."""
