"""The results as one HTML file: offline, in light and dark, for desktop and phone."""

from __future__ import annotations

from pathlib import Path

from batchnorm.charts.palette import DARK, LIGHT, css_variables
from batchnorm.experiment.results import Results
from batchnorm.files import write_text


def render(results: Results, lang: str = "en") -> str:
    """Makes one self-contained HTML page of the results of a run.

    Args:
        results: Results of a run, finished or not; numbers may be NaN.
        lang: ``en`` or ``zh``.

    Returns:
        The page. It loads nothing; the same results give the same text.

    Raises:
        ValueError: There is no such language.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from batchnorm.experiment.report import activations, channels, evaluation, training
    from batchnorm.experiment.report.edition import Edition
    from batchnorm.experiment.report.headline import headline
    from batchnorm.experiment.report.words import speak

    say = speak(lang)
    edition = Edition(results, say)
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


def write(results: Results, path: Path, lang: str = "en") -> None:
    """Writes the page to a path, whole or not at all.

    Args:
        results: As for `render`.
        path: Path of the file; one that exists is replaced.
        lang: ``en`` or ``zh``.

    Raises:
        ValueError: As for `render`; nothing has been written then.
        FileNotFoundError: The folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it.")
    write_text(path, render(results, lang))
