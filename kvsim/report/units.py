"""Figures as text, with their units."""


def seconds(value: float) -> str:
    """Return a time with its unit, three digits."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f} s"
    if size >= 1:
        return f"{_three_digits(value)} s"
    return f"{_three_digits(1e3 * value)} ms" if size >= 1e-3 else f"{1e6 * value:.3g} us"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def gib(value: float) -> str:
    """Return a size in GiB, as short as it is exact enough."""
    return f"{value:,.0f} GiB" if value >= 100 else f"{value:.3g} GiB"


def mib(size_bytes: int) -> str:
    """Return a size in MiB."""
    return f"{size_bytes / (1 << 20):,.4g} MiB"


def percent(value: float) -> str:
    """Return a fraction in percent."""
    return f"{100 * value:.1f}%"


def sentence(words: str) -> str:
    """Return words as a sentence: a capital first, a full stop last."""
    return f"{words[0].upper()}{words[1:]}."
