"""cda: Transformers whose layers select with coordinate-descent sparsity (the entropic soft top-k)."""

__version__ = "0.1.0"
