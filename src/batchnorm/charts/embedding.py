"""Turns the SVG file that matplotlib writes into a small element of a page, or a file again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from batchnorm.charts.palette import DARK, LIGHT, css_variables

_NUMBER = re.compile(r"-?\d+\.\d+")
_POINT = re.compile(r"M (\S+ \S+) L \1(?= M|$)")

_PIXELS = 1.6
"""Pixels of a file for each point of a figure."""

_PADDING = 8.0
"""Room around the figure of a file, in points."""

_STYLE = (
    f"svg{{{css_variables(LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{svg{{{css_variables(DARK)}}}}}"
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans','Noto Sans CJK SC',"
    "sans-serif}"
)


def embed(svg: str, description: str, variables: Mapping[str, str]) -> str:
    """Strips a file down to one element whose colors and fonts come from the page.

    Args:
        svg: The file, as matplotlib wrote it.
        description: Text for readers who cannot see the picture.
        variables: CSS variables by the placeholder color (#rrggbb) that marks them in the file.

    Returns:
        An ``<svg>`` element of class "chart" without namespaces, fonts, metadata or any size.
    """
    root = ElementTree.fromstring(svg)
    box = root.get("viewBox", "")
    for element in root.iter():
        _simplify(element, variables)
    _prune(root)
    root.attrib.clear()
    root.attrib.update({"class": "chart", "viewBox": box, "role": "img", "aria-label": description})
    return ElementTree.tostring(root, encoding="unicode").replace("><", ">\n<")


def as_file(svg: str) -> str:
    """Makes an SVG file out of an element from `embed`, light or dark as its reader prefers."""
    root = ElementTree.fromstring(svg)
    left, top, width, height = map(float, root.get("viewBox", "0 0 0 0").split())
    left, top = left - _PADDING, top - _PADDING
    width, height = width + 2 * _PADDING, height + 2 * _PADDING
    del root.attrib["class"]
    root.attrib.update(
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"{left:g} {top:g} {width:g} {height:g}",
            "width": f"{_PIXELS * width:.0f}",
            "height": f"{_PIXELS * height:.0f}",
        }
    )
    style = Element("style")
    style.text = _STYLE
    paper = Element("rect", {"x": f"{left:g}", "y": f"{top:g}", "width": "100%", "height": "100%"})
    paper.set("style", "fill:var(--paper)")
    root[:0] = [style, paper]
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _simplify(element: Element, variables: Mapping[str, str]) -> None:
    """Removes namespaces, ids of groups, white space and needless digits."""
    element.tag = element.tag.rpartition("}")[2]
    element.text = (element.text or "").strip() or None
    element.tail = None
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        if key == "id" and element.tag == "g":
            continue
        if key == "style":
            value = _style(value, variables)
        elif key in ("d", "x", "y", "transform"):
            value = _NUMBER.sub(lambda found: f"{float(found[0]):.1f}", value)
            value = _POINT.sub(r"M \1h0", " ".join(value.split()))
        if not (key == "transform" and re.match(r"rotate\(-?0 ", value)):
            element.set(key.rpartition("}")[2], value)


def _style(style: str, variables: Mapping[str, str]) -> str:
    """Removes the font family and replaces placeholder colors with their variables."""
    declarations = []
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font" and (size := re.search(r"[\d.]+px", value)):
            declarations.append(f"font-size:{size[0]}")
        elif key != "font-family":
            declarations.append(f"{key}:{variables.get(value, value)}")
    return ";".join(declarations)


def _prune(parent: Element) -> None:
    """Removes invisible elements and groups without attributes, and shares a style in its group."""
    for child in list(parent):
        _prune(child)
        if child.tag in ("metadata", "style") or child.attrib.get("style") == "fill:none":
            parent.remove(child)
        elif not child.attrib and (child.tag == "g" or (child.tag == "defs" and not len(child))):
            at = list(parent).index(child)
            parent[at : at + 1] = list(child)
    styles = {child.get("style") for child in parent if child.tag == "use"}
    if parent.tag == "g" and len(styles) == 1 and all(child.tag == "use" for child in parent):
        for child in parent:
            parent.set("style", child.attrib.pop("style"))
