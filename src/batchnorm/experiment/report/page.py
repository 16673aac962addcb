"""One HTML file that tells the results: offline, in light and dark, for desktop and phone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from batchnorm.charts.palette import DARK, LIGHT, css_variables
from batchnorm.files import write_text


def render(results: Mapping, lang: str = "en") -> str:
    """Tell the results of a training comparison as one self-contained HTML page.

    Args:
        results: what the training code produced, schema 1; its numbers may be NaN or null.
        lang: "en" or "zh".

    Returns:
        The page. It loads nothing; the same results give the same text.

    Raises:
        ValueError: the results do not follow the schema, or there is no such language.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from batchnorm.experiment.report import activations, channels, evaluation, training
    from batchnorm.experiment.report.edition import Edition
    from batchnorm.experiment.report.headline import headline
    from batchnorm.experiment.report.reading import read
    from batchnorm.experiment.report.words import speak

    say = speak(lang)
    edition = Edition(read(results), say)
    sections = [
        training.curves(edition),
        evaluation.estimates(edition),
        channels.parameters(edition),
        activations.pre_activations(edition),
        channels.statistics(edition),
    ]
    environment = Environment(
        loader=PackageLoader("batchnorm.experiment.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        say=say,
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        head=headline(edition),
        sections=[section for section in sections if section.panels],
    )


def write(results: Mapping, path: Path, lang: str = "en") -> None:
    """Render the page and put it at a path, whole or not at all.

    Args:
        results: as for `render`.
        path: the file to write; one that is there is replaced.
        lang: "en" or "zh".

    Raises:
        ValueError: as for `render`; nothing has been written then.
        FileNotFoundError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it.")
    write_text(path, render(results, lang))
