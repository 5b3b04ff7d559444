"""YAML that says what JSON can say, with the line of every key, so that errors can point at it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from tt_ray.errors import UserError

KeyPath = tuple[str | int, ...]
_JSON_TAGS = [f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")]
_EXPONENT_FLOAT = re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Text keys, none of them twice; no dates, no binary, no aliases; and 1e-4 is a number."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # an alias inside its own anchor would make endless data
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"write the value out in place of *{event.anchor}", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError):  # `!!int five`, or a number of ten thousand digits
            raise yaml.constructor.ConstructorError(
                None, None, f"this is no {node.tag.rpartition(':')[2]}", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                fault = "is given twice" if isinstance(key, str) else "is not text"
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} {fault}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes every text that `_Loader` would take for something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML leaves U+0085 and its like as line breaks inside single quotes, and then reads back spaces.
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in [*_JSON_TAGS, None]}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def parse(text: str, place: Callable[[int], str]) -> tuple[Any, dict[KeyPath, int]]:
    """The one document in `text` as plain data, and the line (from 1) of each key and list item.

    Lines go two levels deep; the empty path has the one where the document begins. An empty text is None.

    Raises:
        UserError: starts with `place(line)`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        return loader.construct_document(node), dict(_lines(node))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{place(line)}: not valid YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{place(line)}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{place(1)}: not valid YAML: it is nested too deeply") from None


def dump(data: Any) -> str:
    """Plain data as YAML, keys in their order; `parse` reads it back as equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _lines(node: yaml.Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if not path:
        yield (), node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, item, item) for index, item in enumerate(node.value)]
    else:
        return
    for name, at, child in children:
        yield (*path, name), at.start_mark.line + 1
        if not path:
            yield from _lines(child, (name,))
