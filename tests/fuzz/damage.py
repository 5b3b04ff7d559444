"""Damaged files of every kind, and what a reader may make of them: a result, or one line for the user."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tt_ray.errors import UserError

DEEP = 3000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
"""YAML of half a kilobyte that means thirty thousand million words."""
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, 1e308, -1e308),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "x",
        "x" * 5000,
        "\x00",
        "\u2028\n\r",
        "\ud800",
        "../../x",
    ),
    *(
        "/dev/zero",
        "1",
        "nan",
        "os:system",
        "%s{}",
        [],
        {},
        [[]],
        [0],
        [None],
        {"": 0},
        {"x": [1]},
        [1] * 5000,
    ),
]


def count_of(some: int, many: int) -> pytest.MarkDecorator:
    """`count`, the number of examples: a few in every run of the tests, many in the slow one."""
    both = [pytest.param(some, id="some"), pytest.param(many, id="many", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("count", both)


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], count: int) -> None:
    """`check` on so many examples, always the same ones."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        check(example)

    run()


def result_or_line(read: Callable[[], Any]) -> Any:
    """What `read` returns; None where it refuses in one line. Whatever else it raises is a fault of ours."""
    try:
        return read()
    except UserError as error:
        line = str(error)
        assert line.strip()
        assert "\n" not in line, line
        assert "Traceback" not in line
        return None


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with bits flipped, a part lost, doubled, overwritten or made up."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "cut", "lose", "double", "zero", "insert", "random"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "lose":
            del data[at : at + size]
        elif kind == "double":
            data[at:at] = data[at : at + size]
        elif kind == "zero":
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        else:
            data[at : at + size] = draw(st.binary(min_size=1, max_size=16))
    return bytes(data)


@st.composite
def odd_data(draw: st.DrawFn, plain: Any) -> Any:
    """Plain data in which one to three values or keys are others, or gone."""
    data = copy.deepcopy(plain)
    for _ in range(draw(st.integers(1, 3))):
        node, depth = data, draw(st.integers(0, 5))
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from(keys))
            if depth == 0 or not isinstance(node[key], dict | list) or not node[key]:
                _change(draw, node, key)
                break
            node, depth = node[key], depth - 1
    return data


def _change(draw: st.DrawFn, node: Any, key: Any) -> None:
    kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "swap", "wrap"]))
    if kind == "replace":
        node[key] = _odd(draw)
    elif kind == "drop":
        del node[key]
    elif kind == "wrap":
        node[key] = draw(st.sampled_from([[node[key]], {"x": node[key]}, str(node[key])]))
    elif kind == "swap" and isinstance(node, dict):
        other = draw(st.sampled_from(list(node)))
        node[key], node[other] = node[other], node[key]
    elif isinstance(node, dict):
        node[draw(st.sampled_from(["", "x", "__class__", "é", "a.b"]))] = _odd(draw)
    else:
        node.append(_odd(draw))


def _odd(draw: st.DrawFn) -> Any:
    return copy.deepcopy(ODD[draw(st.integers(0, len(ODD) - 1))])


def json_texts(plain: Any) -> st.SearchStrategy[bytes]:
    """JSON files: damaged ones, sound ones that say odd things, and ones nested without end."""
    text = json.dumps(plain)
    deep = [
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        "[" * 10**6,
        '{"x": ' + "9" * 6000 + "}",
    ]
    odd = odd_data(plain).map(lambda data: json.dumps(data).encode())
    whole = [*deep, "", "null", "3", "[]", "{}", '"x"', "NaN", "\ufeff{}", text + text]
    said = one_of([content.encode() for content in whole])
    return st.one_of(damaged(text.encode()), odd, odd, said, st.binary(max_size=40))


def one_of(contents: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of these; `sampled_from` would print them all."""
    return st.integers(0, len(contents) - 1).map(lambda index: contents[index])
