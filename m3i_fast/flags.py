"""The flags of a command that holds a run's config: read, checked and told without torch.

tyro makes the flags of a dataclass's fields and reads them. What is wrong is found here before: a
flag or choice that does not exist, with the nearest one, and everything that does not fit together
in the config, at once. A config that may be none is there once a flag of it is typed, as
`--data.local-views.count 6`, and is not with `--data.local-views none`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from m3i_fast.config.fields import all_conflicts, deferred_checks
from m3i_fast.config.train import TrainConfig
from m3i_fast.did_you_mean import nearest

T = TypeVar("T")
MISSPELT = 0.8  # a spelling as close as this is a slip of the finger, whatever else is near


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One field of a command, as it is typed."""

    name: str
    """With its dashes: --optim.lr."""
    kind: Any
    """Type of the field, without its range."""
    default: Any
    help: str
    """What stands under the field."""

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value: --compile, --no-compile."""
        return self.kind is bool

    @property
    def choices(self) -> tuple[str, ...]:
        """What may be typed, where that is a list of names; else nothing."""
        return tuple(str(value) for option in options(self.kind) for value in _literals(option))

    @property
    def value(self) -> str:
        """What a person types after the flag, in short."""
        if self.is_switch:
            return ""
        if self.choices:
            return "|".join(self.choices)
        names = {int: "N", float: "X", str: "NAME", Path: "PATH"}
        kinds = [kind for kind in options(self.kind) if kind is not NoneType]
        if not kinds:
            return "none"
        if get_origin(kinds[0]) is tuple:
            return " ".join(names.get(kind, "...") for kind in get_args(kinds[0]))
        return names.get(kinds[0], "VALUE")


def options(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _literals(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def flags_of(command: Any, prefix: str = "--") -> dict[str, Flag]:
    """Return the flags of a command's fields, and of the configs in it, by name."""
    flags: dict[str, Flag] = {}
    of: type = type(command)
    hints = get_type_hints(of, include_extras=True)
    for field in fields(command):
        value, kind = getattr(command, field.name), _plain(hints[field.name])
        name = f"{prefix}{field.name.replace('_', '-')}"
        inner = _inner(value, kind)
        if _optional(kind):
            told = help_of(of).get(field.name, "")
            shown = "none" if value is None else "as below"
            flags[name] = Flag(name=name, kind=NoneType, default=shown, help=told)
        if isinstance(value, TrainConfig):
            flags |= flags_of(value, prefix)
        elif inner or _are_configs(kind):  # of none of them there is a flag
            for key, each in inner.items():
                flags |= flags_of(each, f"{name}{key}.")
        else:
            told = help_of(of).get(field.name, "")
            flags[name] = Flag(name=name, kind=kind, default=value, help=told)
    return flags


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _inner(value: Any, kind: Any) -> dict[str, Any]:
    """Return the configs in a field; of one that may be there and is not, its defaults."""
    if isinstance(value, tuple):
        return {f".{i}": each for i, each in enumerate(value) if is_dataclass(each)}
    optional = _optional(kind)
    if value is None and optional:
        return {"": optional()}
    return {"": value} if is_dataclass(value) else {}


def _optional(kind: Any) -> type[Any] | None:
    """Return the class of a config that may be none; None for every other field."""
    kinds = options(kind)
    configs = [each for each in kinds if isinstance(each, type) and is_dataclass(each)]
    return configs[0] if configs and NoneType in kinds else None


def _are_configs(kind: Any) -> bool:
    """Return whether a field is a tuple of configs."""
    members = get_args(kind) if get_origin(kind) is tuple else ()
    return any(map(is_dataclass, members))


@cache
def help_of(kind: type) -> dict[str, str]:
    """Return the strings that stand under a dataclass's fields, each as one line."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    help_by_field: dict[str, str] = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                help_by_field[field.target.id] = " ".join(text.value.split())
    return help_by_field


# ---- Reading -------------------------------------------------------------------------------------


def read_flags(kind: type[T], argv: Sequence[str], *, prog: str, default: T) -> T:
    """Return the command that the arguments make of `default`.

    Raises ValueError for every flag, choice or number that is wrong, or else for every conflict of
    fields, a line each; SystemExit for --help.
    """
    is_tyros = argv[:1] and argv[0].startswith("--tyro-")  # completion of a shell
    numbers = _numbers(default)
    if not is_tyros and not {"-h", "--help"} & set(argv):
        told_by_name = [_with_names(word, numbers) for word in argv]
        check_flags(told_by_name, {flag.name: flag for flag in _by_name(default)})
    default, argv = _with_optional(default, numbered(argv, default))
    with deferred_checks():
        command = tyro.cli(
            kind, prog=prog, default=default, args=argv, config=(tyro.conf.AvoidSubcommands,)
        )
    _refuse(
        f"{_with_names(flag_of(path), numbers)}: {told}" for path, told in all_conflicts(command)
    )
    return command


def read_verb(kind: type[T], verb: str, argv: Sequence[str]) -> T:
    """Return the command of a verb that takes no recipe; ValueError for a choice that is wrong."""
    flags = {flag.name: flag for flag in _choices(kind)}
    words = [part for word in argv for part in word.split("=", 1 if word[:2] == "--" else 0)]
    for word, value in zip(words, words[1:], strict=False):
        flag = flags.get(word.replace("_", "-"))
        if flag is not None and (told := _wrong_value(flag, [value])):
            raise ValueError(f"{flag.name}: {told}")
    return tyro.cli(kind, prog=f"m3i-fast {verb}", args=argv)


def _choices(kind: type[Any]) -> Iterator[Flag]:
    """Yield the flags of a command, and of the configs in it, whose values are a list of names."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        plain = _plain(hints[field.name])
        if isinstance(plain, type) and is_dataclass(plain):
            yield from _choices(plain)
        elif (flag := Flag(name=flag_of(field.name), kind=plain, default=None, help="")).choices:
            yield flag


def _with_optional(command: T, argv: list[str], prefix: str = "--") -> tuple[T, list[str]]:
    """Return a command with the optional configs that are asked for, without those that are not.

    Returns also the arguments without those that ask for none. Raises ValueError where flags of a
    config stand beside them.
    """
    changed: dict[str, Any] = {}
    hints = get_type_hints(type(command), include_extras=True)
    for field in fields(command):  # type: ignore[arg-type]
        value = asked = getattr(command, field.name)
        name = f"{prefix}{field.name.replace('_', '-')}"
        if optional := _optional(_plain(hints[field.name])):
            inner = sorted(flag for flag in typed_flags(argv) if flag.startswith(f"{name}."))
            if name in typed_flags(argv):
                _refuse(f"{flag}: expected without {name} none" for flag in inner)
                asked, argv = None, _without(argv, name)
            elif value is None and inner:
                asked = optional()
        if is_dataclass(asked):
            inside = prefix if isinstance(asked, TrainConfig) else f"{name}."
            asked, argv = _with_optional(asked, argv, inside)
        if asked is not value:
            changed[field.name] = asked
    return (replace(command, **changed) if changed else command), argv  # type: ignore[type-var]


def _without(argv: Sequence[str], name: str) -> list[str]:
    """Return the arguments without a flag and its one value."""
    left, words = list[str](), iter(argv)
    for word in words:
        typed, has_value, _ = word.partition("=")
        if typed.replace("_", "-") != name:
            left.append(word)
        elif not has_value:
            next(words, None)
    return left


def numbered(argv: Sequence[str], command: Any) -> list[str]:
    """Put numbers into the places of names: --objective.terms.category.weight, if it is term 2.

    A config in a tuple is told by its place or, where it has one, its `name`.
    """
    places = dict(_places(command))
    return [_numbered(word, places) if word.startswith("--") else word for word in argv]


def _places(command: Any, prefix: str = "--") -> Iterator[tuple[str, dict[str, int]]]:
    """Yield what the flags of named configs in a tuple begin with, and their numbers by name."""
    for field in fields(command):
        value = getattr(command, field.name)
        own = "" if isinstance(value, TrainConfig) else f"{field.name.replace('_', '-')}."
        if is_dataclass(value):
            yield from _places(value, f"{prefix}{own}")
        elif isinstance(value, tuple) and value and all(map(_has_name, value)):
            yield f"{prefix}{own}", {each.name: place for place, each in enumerate(value)}


def _has_name(config: Any) -> bool:
    return is_dataclass(config) and hasattr(config, "name")


def _numbered(word: str, places: Mapping[str, Mapping[str, int]]) -> str:
    for prefix, by_name in places.items():
        if word.startswith(prefix):
            name, dot, rest = word.removeprefix(prefix).partition(".")
            place = by_name.get(name.replace("-", "_"))
            return word if place is None else f"{prefix}{place}{dot}{rest}"
    return word


def _numbers(command: Any) -> dict[str, str]:
    """Return what the flags of named configs in a tuple begin with, by number, with their names."""
    return {
        f"{prefix}{place}.": f"{prefix}{name.replace('_', '-')}."
        for prefix, places in _places(command)
        for name, place in places.items()
    }


def _with_names(word: str, numbers: Mapping[str, str]) -> str:
    """Put a name into the place of a number: `numbered` backwards."""
    for number, name in numbers.items():
        if word.startswith(number):
            return word.replace(number, name, 1)
    return word


def _by_name(command: Any) -> Iterator[Flag]:
    """Yield all flags, those of a named config in a tuple by its name."""
    numbers = _numbers(command)
    for flag in flags_of(command).values():
        yield replace(flag, name=_with_names(flag.name, numbers))


def flag_of(path: str) -> str:
    """Return the flag of a field's path from the command on: config.optim.lr is --optim.lr."""
    return "--" + path.removeprefix("config.").replace("_", "-")


def typed_flags(argv: Sequence[str]) -> frozenset[str]:
    """Return the flags among the arguments by the names that `flags_of` has: `--num-steps`.

    `--num_steps=7` is `--num-steps`, and `--no-compile` is `--compile` as well as itself.
    """
    names = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    return frozenset([*names, *map(_turned_on, names)])


def _turned_on(name: str) -> str:
    """Return the flag that one turns off: --data.augment for --data.no-augment; else itself."""
    section, dot, leaf = name.removeprefix("--").rpartition(".")
    return f"--{section}{dot}{leaf.removeprefix('no-')}"


def _turned_off(name: str) -> str:
    section, dot, leaf = name.removeprefix("--").rpartition(".")
    return f"--{section}{dot}no-{leaf}"


def check_flags(argv: Sequence[str], flags: Mapping[str, Flag]) -> None:
    """Raise ValueError for all flags that do not exist, and for values that theirs do not take."""
    _refuse(_wrong_flags(argv, flags))


def _refuse(wrong: Iterator[str]) -> None:
    lines = list(wrong)
    if len(lines) > 1:
        lines = [f"{len(lines)} settings are wrong:", *(f"  {line}" for line in lines)]
    if lines:
        raise ValueError("\n".join(lines))


def _wrong_flags(argv: Sequence[str], flags: Mapping[str, Flag]) -> Iterator[str]:
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            yield f"unexpected argument {word!r}: a value stands after its --flag"
            continue
        typed, has_value, value = word.partition("=")
        name = typed.replace("_", "-")
        flag = flags.get(name) or flags.get(_turned_on(name))
        values = [value] if has_value else []
        if flag is None or not flag.is_switch:
            while not has_value and rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
                if flag is not None and not _takes_more(flag, len(values)):
                    break
        if flag is None or (name not in flags and not flag.is_switch):
            yield f"unknown flag {typed}.{suggested(name, flags)}"
        elif told := _wrong_value(flag, values):
            yield f"{name}: {told}"


def _takes_more(flag: Flag, count: int) -> bool:
    tuples = [kind for kind in options(flag.kind) if get_origin(kind) is tuple]
    if not tuples:
        return False
    members = get_args(tuples[0])
    return members[-1] is Ellipsis or count < len(members)


def _wrong_value(flag: Flag, values: Sequence[str]) -> str:
    """Say what is wrong with the values of a flag; empty where tyro can take them."""
    if flag.is_switch:
        return ""
    if not values:
        return f"expected a value: {flag.value}"
    kinds = options(flag.kind)
    if not {value.lower() for value in values} & {"none"} and _takes_more(flag, len(values)):
        if get_args(kinds[0])[-1] is not Ellipsis:
            return f"expected {len(get_args(kinds[0]))} values, got {len(values)}"
    for value in values:
        if value.lower() == "none" and NoneType in kinds:
            continue
        if kinds == (NoneType,):
            return f"expected none, got {value!r}"
        if flag.choices and str not in kinds and value not in flag.choices:
            expected = f"expected one of {', '.join(flag.choices)}, got {value!r}."
            return expected + nearest(value, flag.choices)
        number = [kind for kind in map(_number, kinds) if kind is not None]
        if number and str not in kinds:
            try:
                number[0](value)
            except ValueError:
                told = "a whole number" if number[0] is int else "a number"
                return f"expected {told}, got {value!r}"
    return ""


def _number(kind: Any) -> type[int] | type[float] | None:
    """Return the type of the numbers in a field, None where it holds none."""
    member = get_args(kind)[0] if get_origin(kind) is tuple else kind
    member = _plain(member)
    return member if member in (int, float) else None


def suggested(name: str, flags: Mapping[str, Flag]) -> str:
    """Return a hint at the flag that a wrong one was probably meant to be; empty when none is near.

    One that is spelt almost so; else one whose last word is the same, or whose help says the word,
    in the same section if there is one and of the shortest name.
    """
    section, _, leaf = name.removeprefix("--").rpartition(".")
    close = nearest(name, flags, cutoff=MISSPELT)
    if close:
        return close
    word = leaf.replace("-", " ")
    same = [flag for flag in flags if flag.removeprefix("--").rpartition(".")[2] == leaf]
    told = [flag.name for flag in flags.values() if word in flag.help.lower()] if word else []

    def distance(flag: str) -> tuple[bool, int]:
        return flag.removeprefix("--").rpartition(".")[0] != section, len(flag)

    best = min(same or told, key=distance, default=None)
    return f" Did you mean {best}?" if best else nearest(name, flags)


# ---- Telling -------------------------------------------------------------------------------------


def own_help(verb: str, recipe: str, command: Any) -> str:
    """Return the help of a verb of a recipe: its own flags, and where the recipe's are told."""
    return (
        f"usage: m3i-fast {verb} RECIPE [--flag value ...]\n\n"
        f"{help_text(command, {'flags': _own(command)})}\n\n"
        f"Beside these, all of the recipe's: m3i-fast train {recipe} --help-all"
    )


def whole_help(verb: str, recipe: str, command: Any) -> str:
    """Return the help of a verb of a recipe with all flags, the verb's first, and all of each."""
    own = {flag_of(name) for name in _own(command)}
    sections: dict[str, list[Flag]] = {verb: []}
    for flag in _by_name(command):
        section = flag.name.removeprefix("--").rpartition(".")[0] or "run"
        sections.setdefault(verb if flag.name in own else section, []).append(flag)
    lines = [f"usage: m3i-fast {verb} {recipe} [--flag value ...]"]
    for title, flags in sections.items():
        lines += ["", f"{title}:"]
        for flag in flags:
            lines += _told(flag, flag.help)
    return "\n".join(lines)


def _own(command: Any) -> list[str]:
    """Return the fields that are a verb's alone: with a help of their own, and no config."""
    of: type = type(command)
    told = help_of(of)
    names = [field.name for field in fields(command)]
    return [name for name in names if name in told and name not in ("config", "recipe")]


def help_text(command: Any, groups: Mapping[str, Sequence[str]]) -> str:
    """Return the lines that tell a group of flags each: how it is typed, its default, its help.

    groups: title and names of the fields by their path, "optim.lr".
    """
    flags = flags_of(command)
    lines: list[str] = []
    for title, paths in groups.items():
        lines += ["", f"{title}:"]
        for path in paths:
            flag = flags[flag_of(path)]
            lines += _told(flag, _first_sentence(flag.help))
    return "\n".join(lines[1:])


def _told(flag: Flag, text: str) -> list[str]:
    """Return the lines of a flag: how it is typed, its default, and below it the text."""
    name = f"{flag.name}, {_turned_off(flag.name)}" if flag.default is True else flag.name
    typed = f"  {name} {flag.value}".rstrip() + f"  (default {_shown(flag)})"
    return [typed, *textwrap.wrap(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _shown(flag: Flag) -> str:
    value = flag.default
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(each if isinstance(each, str) else f"{each:g}" for each in value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if value is None else str(value) or "none"


def _first_sentence(text: str) -> str:
    """Up to a full stop that ends a sentence: not that of "e.g. this", nor of 1.5."""
    for end, mark in enumerate(text):
        if mark == "." and text[end + 1 : end + 2] in ("", " ") and not text[:end].endswith("e.g"):
            return text[: end + 1]
    return text
