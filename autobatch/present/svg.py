"""A picture's SVG, made fit to stand in a page: no style sheet, ids of its own, and words for each part."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from xml.etree.ElementTree import Element

__all__ = ["fit_for_page"]

_SVG = "http://www.w3.org/2000/svg"
# What a page has: text is measured in DejaVu Sans, which is wider than any of these, so that none outgrows its place.
_FONTS = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def fit_for_page(
    drawn: bytes, *, prefix: str, title: str, description: str, hints: Mapping[str, str], opaque: bool
) -> bytes:
    """Make matplotlib's SVG fit to stand in a page, or on its own, where it keeps its size and ground.

    Style sheets and `style` attributes become plain attributes, ids become this picture's own, and the picture and
    what is named in it get their words.

    Args:
        drawn: what matplotlib wrote.
        prefix: what its ids begin with.
        title: names the picture.
        description: says what it shows, for who cannot see it.
        hints: by the id of a group, the words that a browser shows on hovering.
        opaque: whether it stands on its own.

    Returns:
        One `<svg>` element in UTF-8, without an XML prologue.
    """
    from xml.etree import ElementTree as ET

    # Not foreign: matplotlib wrote it just now, and escapes what the report names.
    root = ET.fromstring(drawn)  # noqa: S314
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        _plain_attributes(element, prefix)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(child)
        # Nothing is set over several lines; what stands between elements is only indentation.
        parent.tail = None
        parent.text = parent.text if parent.tag in ("text", "tspan") else None
    # matplotlib says this in a style sheet, which would hold for the whole page.
    root.attrib.update({"xmlns": _SVG, "stroke-linejoin": "round", "stroke-linecap": "butt"})
    if not opaque:
        del root.attrib["width"], root.attrib["height"]
    _name(root, prefix, (title, description), hints)
    return ET.tostring(root, encoding="unicode").encode()


def _plain_attributes(element: Element, prefix: str) -> None:
    """Turn `style` into attributes, drop the namespace of links, and make ids this picture's own."""
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name:
            element.set(name, _FONTS if name == "font-family" else value)
    for name, value in list(element.attrib.items()):
        if name == "id":
            element.set(name, prefix + value)
        elif name.endswith("}href"):
            del element.attrib[name]
            element.set("href", value.replace("#", f"#{prefix}", 1))
        else:
            element.set(name, value.replace("url(#", f"url(#{prefix}"))


def _name(root: Element, prefix: str, words: tuple[str, str], hints: Mapping[str, str]) -> None:
    """Give the picture its title and description, and what is named in it its words."""
    from xml.etree import ElementTree as ET

    for index, (tag, text) in enumerate(zip(("title", "desc"), words, strict=True)):
        element = ET.Element(tag, {"id": f"{prefix}{tag}-words"})
        element.text = _for_xml(text)
        root.insert(index, element)
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}title-words")
    root.set("aria-describedby", f"{prefix}desc-words")
    groups = {element.get("id"): element for element in root.iter("g")}
    for name, text in hints.items():
        hint = ET.Element("title")
        hint.text = _for_xml(text)
        groups[f"{prefix}{name}"].insert(0, hint)


def _for_xml(text: str) -> str:
    """Replace the characters that no XML may hold."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
