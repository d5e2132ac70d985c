"""Fused kernels for what takes TNT's time, each beside an eager reference. They know of no model."""
