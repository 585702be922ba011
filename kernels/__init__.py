"""Triton kernels; reached as ``emp_fast.kernels``."""
