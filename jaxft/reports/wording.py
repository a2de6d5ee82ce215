"""Numbers as a reader wants them; whatever is no number is `unknown`."""

from __future__ import annotations

import datetime
from typing import Any

from jaxft.reports.folder import number

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
