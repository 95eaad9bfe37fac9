"""Parts of benchmarks/overlap.py."""
