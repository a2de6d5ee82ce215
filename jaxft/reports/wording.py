"""Numbers as a reader wants them; whatever is no number is `unknown`."""

from __future__ import annotations

import datetime
from typing import Any

from jaxft.reports.fitting import number

UNKNOWN = "unknown"


def share(value: Any) -> str:
    """0.781 as 78.1 %."""
    return UNKNOWN if number(value) is None else f"{value * 100:.1f} %"


def change(decrease: Any) -> str:
    """A decrease of 0.23 as −23.0 %, with a minus sign."""
    return UNKNOWN if number(decrease) is None else f"{-decrease * 100:+.1f} %".replace("-", "−")


def nats(value: Any) -> str:
    """Four decimals."""
    return UNKNOWN if number(value) is None else f"{value:,.4f}"


def whole(value: Any) -> str:
    """A count with thousands separators."""
    return UNKNOWN if number(value) is None else f"{value:,}"


def brief(value: Any) -> str:
    """A setting in few characters; None is `none`."""
    if value is None or isinstance(value, (bool, str)):
        return "none" if value is None else str(value)
    return UNKNOWN if number(value) is None else str(value) if isinstance(value, int) else f"{value:g}"


def clock(seconds: Any) -> str:
    """Seconds as h:mm:ss; below a minute, as seconds with one decimal."""
    if number(seconds) is None or not 0 <= seconds < 1e12:
        return UNKNOWN
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))


def usd(amount: Any) -> str:
    """An amount of money; below a cent, in two significant digits."""
    if number(amount) is None:
        return UNKNOWN
    return f"{amount:.2g} USD" if 0 < amount < 0.01 else f"{amount:,.2f} USD"


def between(low: Any, high: Any, scale: float = 100, digits: int = 1) -> str:
    """An interval; shares in percent."""
    if number(low) is None or number(high) is None:
        return ""
    return f"{low * scale:,.{digits}f} to {high * scale:,.{digits}f}{' %' if scale == 100 else ''}"


def points(difference: Any) -> str:
    """A difference of shares in percentage points, with its sign."""
    return UNKNOWN if number(difference) is None else f"{difference * 100:+.1f} points".replace("-", "−")


def p_value(p: Any) -> str:
    """`p = 0.012`; below a ten-thousandth, so."""
    if number(p) is None:
        return ""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def signed(value: Any, digits: int = 4) -> str:
    """A number with its sign."""
    return UNKNOWN if number(value) is None else f"{value:+,.{digits}f}".replace("-", "−")


def counted(number_of: int, thing: str, plural: str | None = None) -> str:
    """`1 row`, `2 rows`."""
    return f"{number_of:,} {thing if number_of == 1 else plural or thing + 's'}"


SAMPLE_CHARACTERS = 2000


def cut(text: Any, characters: int = SAMPLE_CHARACTERS) -> str:
    """Text from data in so many characters at most, with the count of those left out."""
    text = "(none)" if text is None else str(text) or "(empty)"
    more = len(text) - characters
    return text if more <= 0 else f"{text[:characters]}\n(and {more:,} more characters)"
