"""Triton kernels and their launchers, one file an op. Imported only where an op meets a device tensor, or by tests:
`import wise_kernels` alone needs no triton.
"""
