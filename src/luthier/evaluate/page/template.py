"""How a page is made of a template: everything from data, models and recipes is escaped."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Template


def template(name: str) -> Template:
    """A template of this package, such as `report.html.jinja`. A name that it is not given is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("luthier.evaluate", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def ours(name: str) -> Markup:
    """A style or a script of this package, without user text, to be put into a page as it is."""
    return Markup((files("luthier.evaluate") / name).read_text(encoding="utf-8"))
