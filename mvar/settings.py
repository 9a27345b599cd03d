"""Typed, frozen configuration: a YAML file plus dotted overrides, checked as a whole before anything is allocated.

A command declares its configuration as a `Section` and calls `load`. Unknown keys, wrong types and contradictions
become one ConfigError that names the key, what it got, and the nearest key that exists.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

import pydantic
import yaml
from pydantic import Field

from mvar import shipped
from mvar.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(pydantic.BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which only true and false are booleans: a bare `off` is the word, as in YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def load(section: type[S], path: Path | None, overrides: Sequence[str] = ()) -> S:
    """Read `path` and apply `a.b=value` overrides in order, then check the whole.

    `path` is YAML, or the name of a shipped recipe; None for an empty one.
    Values of overrides are YAML too (`x=[1,2]`, `x=null`, `x=3e-4`). Raises ConfigError.
    """
    tree = _read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply(tree, override)
    return check(section, tree, str(path) if path is not None else "the command line")


def check(section: type[S], tree: dict[str, Any], source: str) -> S:
    """Validate a plain tree against `section`; `source` is named in the ConfigError."""
    # An absent group is an empty one, so that the message names the keys that are missing in it.
    groups: dict[str, Any] = {name: {} for name, field in section.model_fields.items() if _is_group(field.annotation)}
    try:
        return section.model_validate(groups | tree)
    except pydantic.ValidationError as error:
        lines = [_explain(section, problem) for problem in error.errors()]
        raise ConfigError(f"bad configuration in {source}:\n  " + "\n  ".join(lines)) from None


def dump(config: Section) -> str:
    """YAML that `load` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe(section: type[Section], prefix: str = "") -> str:
    """One line per key: dotted name, type, default, meaning."""
    lines = []
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{name}"
        if _is_group(field.annotation):
            lines.append(describe(field.annotation, f"{dotted}."))
            continue
        default = "required" if field.is_required() else f"default {_show(field.get_default())}"
        lines.append(f"  {dotted:36} {_type_name(field.annotation)}; {default}. {field.description or ''}".rstrip())
    return "\n".join(lines)


def _is_group(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return "none" if value is None else str(value)


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(arm) for arm in typing.get_args(annotation))
    if origin is tuple:
        return "list of " + _type_name(typing.get_args(annotation)[0])
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _parse((shipped.find("recipes", path) or path).read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(shipped.names("recipes", "*.yaml"))
        raise ConfigError(
            f"configuration {path}: cannot be read ({error.strerror}). Give an existing YAML file, or a shipped recipe:"
            f" {names}."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration {path}: expected keys and values, got {type(tree).__name__}.")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, such as optim.base_lr=2e-4.")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a group of keys.")
    tree[leaf] = value


def _explain(section: type[Section], problem: Any) -> str:
    dotted = ".".join(str(part) for part in problem["loc"]) or "(whole)"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(dotted, _all_keys(section), n=1, cutoff=0.0)
        return f"{dotted}: unknown key; the nearest that exists is {near[0]}."
    if problem["type"] == "missing":
        return f"{dotted}: required, not given. Set it in the file or add {dotted}=... to the command."
    message = problem["msg"].removeprefix("Value error, ")
    return (
        f"{dotted}: got {problem['input']!r}: {message}."
        if problem["type"] != "value_error"
        else f"{dotted}: {message}."
    )


def _all_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        if _is_group(field.annotation):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
