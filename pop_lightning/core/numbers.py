"""How figures are printed, in one way on every page and terminal."""

import math

DASH = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits; a dash for a missing value, a plain 0 for an exact zero."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    return (
        f"{value:.{digits - 1}e}" if abs(value) < 1e-4 else f"{value:.{digits}g}" if abs(value) < 1 else f"{value:.2f}"
    )


def percent(value: float | None) -> str:
    """A fraction as percent with two decimals; a nonzero value never prints as zero, nor one below 1 as 100%."""
    if value is None or not math.isfinite(value):
        return number(value)
    text = f"{100 * value:.2f}%"
    if (text == "0.00%" and value) or (text == "100.00%" and value < 1):
        return f"{100 * value:.3g}%" if abs(value) < 0.5 else ">99.99%"
    return text


def confidence(value: float) -> str:
    """0.95 as 95%, 0.999 as 99.9%."""
    return f"{100 * value:.6g}%"


def ratio(value: float | None) -> str:
    """A speedup: ``1.52x``."""
    return DASH if value is None else f"{value:.2f}x"


def count(value: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{value:,} {noun}" + ("" if value == 1 else "s")


def millions(number: int) -> str:
    """A number of parameters in words: ``1.35 million``, ``8.03 billion``."""
    for factor, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= factor:
            return f"{number / factor:.3g} {word}"
    return str(number)


def flops(value: float | None) -> str:
    """Floating-point operations with an SI prefix."""
    if value is None:
        return DASH
    for factor, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 * factor else f"{value / factor:,.0f} {unit}"
    return f"{value:,.0f} FLOP"


def milliseconds(value: float | None) -> str:
    """A duration with three significant digits."""
    return DASH if value is None else f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
