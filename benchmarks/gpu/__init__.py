"""Parts of tools/gpu_check.sh and their report."""
