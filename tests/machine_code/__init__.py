"""Reads the machine code of the kernels, without a GPU: ``make resources``.

`triton_variants` lists the Triton binaries and `triton_compile` makes them; `sass` reads them and
those of the native module; `report` checks what it finds against `expected`.
"""
