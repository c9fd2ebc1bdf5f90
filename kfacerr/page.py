"""What is measured as one HTML file that needs no network, light and dark."""

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page", "themed"]


def page(*, whole: bool, **context: Any) -> str:
    """The page of templates/report.html.

    Args:
        whole: with a head and a body; without them it is for a notebook.
        **context: title, facts (HTML), layers (dicts of name, about, notes, errors, figure or None, alt), meaning
            (a dict), reading and cost.

    Returns:
        HTML.
    """
    import jinja2

    loader = jinja2.PackageLoader("kfacerr", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(whole=whole, **context)


def themed(draw: Callable[..., "Figure"]) -> dict[str, str]:
    """A figure for a light and for a dark background, as data URIs.

    Args:
        draw: gives it; takes `dark`, True or False.

    Returns:
        "light" and "dark".
    """
    return {theme: _inline(draw(dark=theme == "dark")) for theme in ("light", "dark")}


def _inline(figure: "Figure") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
