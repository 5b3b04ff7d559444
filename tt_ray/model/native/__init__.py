"""The decoders for CPU, in C++."""

from tt_ray.model.native.build import NativeUnavailableError
from tt_ray.model.native.by_token import NativeTokenCache
from tt_ray.model.native.cache import NativeCache

__all__ = ["NativeCache", "NativeTokenCache", "NativeUnavailableError"]
