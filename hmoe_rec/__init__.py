"""Heterogeneous mixture of experts with multi-embedding for ads and recommendation, on TorchRec."""

__version__ = "0.1.0"
