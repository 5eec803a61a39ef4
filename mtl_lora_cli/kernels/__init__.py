"""The inner loops: each operation as its formula in plain torch, and as a Triton kernel for the card.

A file `NAME.py` holds the operation as others call it and its plain form; `triton_NAME.py` holds the
kernels, and is imported only where they run. Nothing here knows of adapters, tasks or models.
"""
