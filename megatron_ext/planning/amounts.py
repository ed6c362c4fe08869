"""Amounts as people read them: three digits and a unit."""


def short_number(count: float) -> str:
    """A count with three digits, such as 7.51B."""
    return _scaled(count, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)))


def flops(count: float) -> str:
    """Floating-point operations, or their rate, with the unit that gives three digits, such as 412 GFLOP."""
    number = _scaled(count, (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)), space=" ")
    return f"{number}FLOP"


def size(count: float) -> str:
    """Bytes, such as 1.2 GB (10**9)."""
    number = _scaled(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)), space=" ")
    return number if number[-1] == "B" else f"{number}bytes"


def duration(seconds: float) -> str:
    """A time as one or two units, such as 3 h 20 min."""
    seconds = max(round(seconds), 0)
    for unit, scale, part, below in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= scale:
            rest = seconds % scale // below
            return f"{seconds // scale} {unit}" + (f" {rest} {part}" if rest and seconds < 10 * scale else "")
    return f"{seconds} s"


def _scaled(count: float, units: tuple[tuple[str, float], ...], space: str = "") -> str:
    for unit, scale in units:
        if count >= 0.9995 * scale:
            number = count / scale
            digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
            return f"{number:,.{digits}f}{space}{unit}"
    return f"{count:,.3g}{space}" if count % 1 else f"{count:,.0f}{space}"
