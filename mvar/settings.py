"""Typed, frozen configuration: a YAML file plus dotted overrides, checked as a whole before anything is allocated.

A command declares its configuration as a `Section` and calls `load`. Unknown keys, wrong types and contradictions
become one ConfigError that names the key, what it got, and the nearest key that exists.

What a key's type calls text (names, paths) is taken as it is written, paths as `mvar.paths` reads them; everything else
is YAML. Where values are read (`load`) is the one place that expands anything.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

import pydantic
import yaml
from pydantic import Field
from pydantic.fields import FieldInfo

from mvar import shipped
from mvar.errors import ConfigError
from mvar.paths import expanded, written

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Place:
    """Marks text that is a path or a URL."""


PathOrUrl = Annotated[str, _Place()]
"""A path, in which `~` and variables are expanded, or a URL, which is left alone."""


class Section(pydantic.BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML, with the words of YAML 1.2: a bare `off` is the word, and 010 is ten. Doubled keys are an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(f"key {key.value} stands twice, on lines {lines[key.value]} and {line}. Keep one.")
            lines[key.value] = line
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "int", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)


def _parse(text: str, section: type[Section] | None = None, prefix: str = "") -> Any:
    """YAML of a value, or of the keys of `section`, with `prefix` before them. Raises ConfigError, yaml.YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        return _plain(loader, node) if section is None else _tree(loader, node, section, prefix)
    finally:
        loader.dispose()


def _plain(loader: _Loader, node: yaml.Node) -> Any:
    return loader.construct_object(node, deep=True)


def _tree(loader: _Loader, node: yaml.Node, section: type[Section], prefix: str) -> Any:
    """The values of a mapping, each as its key's type says; anything else as it is, for pydantic to refuse."""
    if not isinstance(node, yaml.MappingNode):
        return _plain(loader, node)
    loader.flatten_mapping(node)
    keys = _plain(loader, node)  # Says which keys cannot be.
    tree: dict[Any, Any] = {}
    for key_node, value in node.value:
        key = _plain(loader, key_node)
        field, dotted = section.model_fields.get(key), f"{prefix}{key}"
        if field is not None and _is_group(field.annotation):
            tree[key] = _tree(loader, value, field.annotation, f"{dotted}.")
        elif field is not None and _is_text(field) and isinstance(value, yaml.ScalarNode):
            missing = value.tag == "tag:yaml.org,2002:null"
            tree[key] = None if missing else _text(dotted, field, value.value)
        else:
            tree[key] = keys[key]
    return tree


def _arms(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) is Annotated:
        return _arms(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(arm for part in typing.get_args(annotation) for arm in _arms(part))
    return (annotation,)


def _is_text(field: FieldInfo) -> bool:
    return any(arm in (str, Path) for arm in _arms(field.annotation))


def _is_place(field: FieldInfo) -> bool:
    return Path in _arms(field.annotation) or any(isinstance(mark, _Place) for mark in field.metadata)


def _text(dotted: str, field: FieldInfo, text: str) -> str | None:
    """What is meant by text as a user wrote it. Raises ConfigError."""
    if not _is_place(field):
        return text
    try:
        return expanded(text)
    except ConfigError as error:
        raise ConfigError(f"{dotted}: {error}") from None


def load(section: type[S], path: Path | None, overrides: Sequence[str] = ()) -> S:
    """Read `path` and apply `a.b=value` overrides in order, then check the whole.

    `path` is YAML, or the name of a shipped recipe; None for an empty one.
    Values of overrides are YAML too (`x=[1,2]`, `x=null`, `x=3e-4`), and raw text where the key's type is text: nothing
    in it has a meaning but, in paths, `~` and variables. Raises ConfigError.
    """
    tree = _read_yaml(path, section) if path is not None else {}
    for override in overrides:
        _apply(tree, override, section)
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
    return yaml.safe_dump(_writable(config), sort_keys=False)


def _writable(config: Section) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            tree[name] = _writable(value)
        elif isinstance(value, str | Path) and _is_place(field):
            tree[name] = written(value)
    return tree


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


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


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


def _read_yaml(path: Path, section: type[Section]) -> dict[str, Any]:
    try:
        tree = _parse((shipped.find("recipes", path) or path).read_text(encoding="utf-8"), section)
    except OSError as error:
        names = ", ".join(shipped.names("recipes", "*.yaml"))
        raise ConfigError(
            f"configuration {path}: cannot be read ({error.strerror}). Give an existing YAML file, or a shipped recipe:"
            f" {names}."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path}: not valid YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"configuration {path}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration {path}: expected keys and values, got {type(tree).__name__}.")
    return tree


def _apply(tree: dict[str, Any], override: str, section: type[Section]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, such as optim.base_lr=2e-4.")
    *parents, leaf = key.split(".")
    known: type[Section] | None = section
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a group of keys.")
        field = known.model_fields.get(parent) if known is not None else None
        known = field.annotation if field is not None and _is_group(field.annotation) else None
    field = known.model_fields.get(leaf) if known is not None else None
    if field is not None and _is_text(field):
        unset = text in ("", "null") and type(None) in _arms(field.annotation)
        tree[leaf] = None if unset else _text(key, field, text)
        return
    group = field.annotation if field is not None and _is_group(field.annotation) else None
    try:
        tree[leaf] = _parse(text, group, f"{key}.")
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


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
