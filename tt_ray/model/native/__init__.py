"""The decoder for CPU, in C++."""

from tt_ray.model.native.build import NativeUnavailableError
from tt_ray.model.native.cache import NativeCache

__all__ = ["NativeCache", "NativeUnavailableError"]
