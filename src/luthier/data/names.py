"""Names of people, by an installed spaCy pipeline: `data.clean.names: luthier.data.names:en_core_web_sm`.

Any pipeline package with a named-entity recogniser works by its own name (`de_core_news_sm`, `xx_ent_wiki_sm` …). How
much it finds depends on the pipeline and the text: read what `luthier data` counts, and look at rows.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from luthier.data.personal import Recogniser, Span
from luthier.errors import RecipeError

_PEOPLE = ("PERSON", "PER")  # the label in English pipelines, and in most others


def __getattr__(pipeline: str) -> Recogniser:
    if pipeline.startswith("_"):
        raise AttributeError(pipeline)
    try:
        package = import_module(pipeline)
    except ImportError as error:
        raise RecipeError(
            f"data.clean.names: the spaCy pipeline '{pipeline}' is not installed",
            fix=f"pip install 'luthier[names]' && python -m spacy download {pipeline}",
        ) from error
    return people(package.load())


def people(pipeline: Any) -> Recogniser:
    """The recogniser of a loaded spaCy pipeline: the places of its entities that are people."""

    def recogniser(text: str) -> list[Span]:
        return [(e.start_char, e.end_char) for e in pipeline(text).ents if e.label_ in _PEOPLE]

    return recogniser
