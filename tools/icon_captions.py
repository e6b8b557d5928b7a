"""Names of icons to captions: what an icon shows, in words, without the style it is drawn in.

"arrow-circle-24-filled" -> "arrow circle". Most sets draw an icon in several weights, fillings and
sizes, and say so in its name. These are left out, for two reasons: at 64 pixels a size cannot be
seen, and a weight hardly; and each set has words of its own for the same style ("filled", "solid",
"bold", "f"), which no class name of an evaluation has. What a name says beyond its style stays as
its makers wrote it, brands and their spelling too ("nodejs").
"""

import re

# Words at the end of a name that are a style in every set. Others ("line", "bold", "light", "dark")
# are a style in one set and a thing in another: a line chart, bold text, a police car light. They
# count only where the set declares them (iconify's "prefixes" and "suffixes"), or below.
STYLES = ("fill", "filled", "outline", "outlined", "solid", "duotone", "twotone", "two-tone")

# Styles that these sets use and do not declare.
STYLES_OF = {
    "boxicons": ("alt",),
    "clarity": ("line",),
    "dinkie-icons": ("small",),
    "fontisto": ("o",),
    "garden": ("stroke",),
    "gg": ("o", "r"),
    "gis": ("o",),
    "glyphs": ("path",),
    "jam": ("f",),
    "lets-icons": ("light", "line"),
    "logos": ("icon",),
    "majesticons": ("line",),
    "material-icon-theme": ("light",),
    "nrk": ("expressive",),
    "ooui": ("ltr", "rtl"),
    "osmic": ("10", "14"),
    "pixelarticons": ("sharp",),
    "skill-icons": ("dark", "light"),
    "stash": ("light",),
    "streamline-logos": ("logo",),
    "thesvg": ("dark", "light"),
    "thesvg-color": ("dark", "light"),
    "uiw": ("o",),
    "vaadin": ("o",),
}

# Beginnings of names that say what kind of icon it is, as the whole set does, and what stays.
KINDS_OF = {
    "ei": {"sc-": ""},
    "geo": {"turf-": ""},
    "humbleicons": {"brand-": ""},
    "medical-icon": {"i-": ""},
    "tabler": {"brand-": ""},
    "vscode-icons": {
        "file-type-light-": "",
        "file-type-": "",
        "folder-type-light-": "folder-",
        "folder-type-": "folder-",
    },
}

# The end of a further drawing of the same thing, "bell-alt" or "user-2". It is left out only where
# the set has the thing without it: "uv-index-2" is not a second "uv-index".
ALTERNATIVE = re.compile(r"-(alt|variant|xs|sm|md|lg|xl)$")
NUMBER = re.compile(r"-\d+$")
# Numbers belong to the names of these: playstation-2, keycap-2.
NUMBERS_ARE_NAMES = ("Emoji", "Logos", "Programming")

# Some sets count their drawings from 1, so that no name is without a number ...
COUNTED = ("covid", "glyphs", "glyphs-poly", "hugeicons", "lineicons", "streamline", "subway")
# ... others do without a hyphen ("note3", which elsewhere is "css3"), and icon-park counts in words
# (elsewhere "repeat-one" is a button).
NUMBER_OF = {
    "raphael": re.compile(r"\d$"),
    "reicon": re.compile(r"-?\d$"),
    "temaki": re.compile(r"\d$"),
    "icon-park": re.compile(r"-(one|two|three|four|five|six|seven|eight)$"),
}


def captions_of(icon_set: dict, names: list[str]) -> dict[str, str]:
    """{name: caption} of these icons of an iconify set {prefix, info, prefixes, suffixes}."""
    prefix = icon_set["prefix"]
    stems = {}
    for name in names:
        stems[name] = without_style(without_kind(name, prefix), icon_set)
    known = set(stems.values())

    captions = {}
    for name, stem in stems.items():
        for pattern in variants(icon_set):
            shorter = pattern.sub("", stem)
            if shorter in known or pattern is NUMBER and is_in(prefix, COUNTED):
                stem = shorter
        captions[name] = " ".join(stem.replace("-", " ").replace("_", " ").split())
    return captions


def variants(icon_set: dict) -> list[re.Pattern]:
    """What may stand at the end of a further drawing of a thing in this set."""
    prefix = icon_set["prefix"]
    patterns = [pattern for family, pattern in NUMBER_OF.items() if is_in(prefix, [family])]
    is_name = icon_set["info"].get("category") in NUMBERS_ARE_NAMES
    if is_in(prefix, COUNTED) or not is_name:
        patterns.append(NUMBER)
    return [*patterns, ALTERNATIVE]


def is_in(prefix: str, families: list[str]) -> bool:
    """Whether a set, or the family that the beginning of its name tells, is among these."""
    return any(prefix == family or prefix.startswith(family + "-") for family in families)


def without_kind(name: str, prefix: str) -> str:
    """The name without the beginning that KINDS_OF lists for the set `prefix`."""
    for beginning, replacement in KINDS_OF.get(prefix, {}).items():
        if name.startswith(beginning):
            return replacement + name.removeprefix(beginning)
    return name


def without_style(name: str, icon_set: dict) -> str:
    """The name without the words at its ends that are a style in its set.

    Of a name that is nothing else ("bold", an icon of text editors) the last word stays.
    """
    beginnings = sorted(icon_set.get("prefixes", {}), key=len, reverse=True)
    declared = sorted(icon_set.get("suffixes", {}), key=len, reverse=True)
    endings = [*declared, *STYLES_OF.get(icon_set["prefix"], ()), *STYLES]

    for style in beginnings:
        if style and name.startswith(style + "-"):
            name = name.removeprefix(style + "-")
            break
    for style in endings:
        if style:
            name = name.removesuffix("-" + style)
    return name
