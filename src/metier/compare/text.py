"""Numbers as people read them: as many digits as the interval supports, units that fit."""

import math

MINUS = "−"


def decimals(uncertainty: float | None, value: float = 0.0) -> int:
    """Decimals for two significant digits of ``uncertainty``, or three of ``value`` where it is unknown."""
    size, digits = (uncertainty, 2) if uncertainty else (value, 3)
    if not size or not math.isfinite(size):
        return 3
    return min(9, max(0, digits - 1 - math.floor(math.log10(abs(size)))))


def fixed(value: float | None, places: int, *, sign: bool = False) -> str:
    """``value`` with ``places`` decimals, a true minus sign and, with ``sign``, a plus."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{abs(value):.{places}f}"
    if value < 0 and float(text):
        return MINUS + text
    return ("+" + text) if sign and float(text) else text


def significant(value: float | None, digits: int = 3) -> str:
    """``value`` with some significant digits and without an exponent where that stays short."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}".replace("-", MINUS)


def ratio(value: float | None) -> str:
    """A cost relative to the control."""
    return "–" if value is None else f"×{value:.2f}"


def scaled(value: float | None, unit: str = "") -> str:
    """A large number with an SI prefix: ``160 k``, ``2.5 GFLOP``."""
    if value is None or not math.isfinite(value):
        return "–"
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    power = min(len(prefixes) - 1, max(0, math.floor(math.log10(abs(value)) / 3))) if value else 0
    if float(f"{value / 1000**power:.3g}") >= 1000 and power < len(prefixes) - 1:
        power += 1
    return f"{float(f'{value / 1000**power:.3g}'):g} {prefixes[power]}{unit}".rstrip()


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None or not math.isfinite(value):
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{float(f'{value:.3g}'):g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{float(f'{value:.3g}'):g} TiB"


def duration(seconds: float | None) -> str:
    """Seconds as ``12.3 s``, ``4 min 05 s`` or ``2 h 10 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 99.95:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def counted(n: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
