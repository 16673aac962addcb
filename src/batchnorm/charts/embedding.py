"""From the SVG file that matplotlib writes to a small <svg> element inside a page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

_NUMBER = re.compile(r"-?\d+\.\d+")
_POINT = re.compile(r"M (\S+ \S+) L \1(?= M|$)")


def embed(svg: str, description: str, variables: Mapping[str, str]) -> str:
    """Strip a file down to one element that takes its look from the page.

    Args:
        svg: the file, as matplotlib wrote it.
        description: what the picture shows, for those who do not see it.
        variables: CSS variables by the colours (#rrggbb) that stand for them in the file.

    Returns:
        An <svg> element of class "chart" without namespaces, fonts, metadata or any size.
    """
    root = ElementTree.fromstring(svg)
    box = root.get("viewBox", "")
    for element in root.iter():
        _plain(element, variables)
    _prune(root)
    root.attrib.clear()
    root.attrib.update({"class": "chart", "viewBox": box, "role": "img", "aria-label": description})
    return ElementTree.tostring(root, encoding="unicode").replace("><", ">\n<")


def _plain(element: Element, variables: Mapping[str, str]) -> None:
    """Drop namespaces, ids of groups, white space and needless digits."""
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
    """Keep a text's size and leave its family to the page; give colours their variables."""
    kept = []
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font" and (size := re.search(r"[\d.]+px", value)):
            kept.append(f"font-size:{size[0]}")
        elif key != "font-family":
            kept.append(f"{key}:{variables.get(value, value)}")
    return ";".join(kept)


def _prune(parent: Element) -> None:
    """Drop what draws nothing, dissolve groups that say nothing, say once what is said often."""
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
