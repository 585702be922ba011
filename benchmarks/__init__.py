"""Benchmarks against peers: interleaved, checked, and reported with the machine that ran them."""
