"""What goes wrong in a transfer, by who must mend it."""

__all__ = ["DeviceError", "LayoutError", "RequestError"]


class LayoutError(ValueError):
    """The engine's KV cache has a shape or strides that cannot be copied as whole blocks."""


class RequestError(ValueError):
    """The caller asked for a transfer that would corrupt a cache or an arena; nothing was copied."""


class DeviceError(RuntimeError):
    """The CUDA driver refused a call; the message carries its name and its error."""
