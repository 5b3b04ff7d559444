"""A layer's forward and backward pass for CPU, in C++."""

from tt_ray.training.native.layers import NativeLayer, require_native

__all__ = ["NativeLayer", "require_native"]
