"""Expressions on named numbers, such as `surprise < 4 and tokens >= 16`: parsed, never executed.

Python's grammar is read by `ast`, and of what it can say only this is allowed: the known names,
numbers, + - * /, comparisons, `and`, `or`, `not` and parentheses.
"""

from __future__ import annotations

import ast
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.nearest import nearest

__all__ = ["Expression", "parse_expression"]

_LONGEST = 1000
_DEEPEST = 100
"""Levels of a condition; each takes two calls of Python's thousand."""
_NUMBERS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}  # fmt: skip
_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Expression:
    """A condition on named numbers."""

    text: str
    names: tuple[str, ...]
    """Those that it uses."""
    _tree: ast.expr

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Return where it holds; `values` are arrays of one length, and so is the result, bool."""
        return _value(self._tree, values)


def parse_expression(text: str, known: Sequence[str]) -> Expression:
    """Read a condition.

    Args:
        text: what the user wrote.
        known: names that it may use.

    Raises:
        ValueError: it is none, uses another name or says what is not allowed; with what is.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"found {len(text)} characters, expected at most {_LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(
            f"found {text!r}, which cannot be read; expected a condition such as "
            f"`{known[0]} >= 16 and {known[1]} < 400`"
        ) from None
    if _depth(tree) > _DEEPEST:
        raise ValueError(
            f"found a condition nested more than {_DEEPEST} deep; expected a simpler one"
        )
    named = dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    unknown = [name for name in named if name not in known]
    names: dict[str, None] = {}
    _check(tree, condition=True, names=names)
    if unknown:
        raise ValueError(_no_such(unknown, known))
    if not names:
        raise ValueError(f"found {text!r}, which names none of {', '.join(known)}")
    return Expression(text, tuple(names), tree)


def _depth(tree: ast.expr) -> int:
    """Return the depth of a tree, found without recursion."""
    depth = 0
    nodes: list[ast.AST] = [tree]
    while nodes:
        depth += 1
        nodes = [child for node in nodes for child in ast.iter_child_nodes(node)]
    return depth


def _no_such(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Say which names there are not; all of them at once."""
    near = [(name, nearest(name, known)) for name in unknown]
    meant = [f"{close} for {name}" if len(near) > 1 else close for name, close in near if close]
    return (
        f"found the name{'s' * (len(unknown) > 1)} {', '.join(unknown)}, expected one of "
        f"{', '.join(known)}" + (f"; did you mean {' and '.join(meant)}?" if meant else "")
    )


def _check(node: ast.expr, *, condition: bool, names: dict[str, None]) -> None:
    """Reject what is not allowed, and a number where a condition belongs, or the other way."""

    def inside(part: ast.expr, *, condition: bool) -> None:
        _check(part, condition=condition, names=names)

    match node:
        case ast.BoolOp() if condition:
            for part in node.values:
                inside(part, condition=True)
        case ast.UnaryOp(op=ast.Not()) if condition:
            inside(node.operand, condition=True)
        case ast.Compare() if condition and all(type(op) in _COMPARED for op in node.ops):
            for part in (node.left, *node.comparators):
                inside(part, condition=False)
        case ast.UnaryOp(op=ast.USub()) if not condition:
            inside(node.operand, condition=False)
        case ast.BinOp() if not condition and type(node.op) in _NUMBERS:
            inside(node.left, condition=False)
            inside(node.right, condition=False)
        case ast.Constant(value=int() | float() as number) if (
            not condition and type(number) is not bool and abs(number) <= sys.float_info.max
        ):
            pass
        case ast.Name() if not condition:
            names[node.id] = None
        case _:
            wanted = "a comparison" if condition else "a name, a number or + - * / of them"
            raise ValueError(f"found {ast.unparse(node)}, expected {wanted}")


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.BoolOp():
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            found = _value(node.values[0], values)
            for part in node.values[1:]:
                found = join(found, _value(part, values))
            return found
        case ast.UnaryOp():
            inner = _value(node.operand, values)
            return operator.invert(inner) if isinstance(node.op, ast.Not) else operator.neg(inner)
        case ast.Compare():
            sides = [_value(part, values) for part in (node.left, *node.comparators)]
            found = None
            for place, op in enumerate(node.ops):
                part = _COMPARED[type(op)](sides[place], sides[place + 1])
                found = part if found is None else found & part
            return found
        case ast.BinOp():
            return _NUMBERS[type(node.op)](_value(node.left, values), _value(node.right, values))
        case ast.Name():
            return values[node.id]
        case ast.Constant():
            import numpy as np  # not at the top: settings read conditions, and `--help` them

            # numpy's: `not` of Python's True is -2, and Python's division by 0 raises.
            return np.float64(node.value)  # type: ignore[arg-type]
        case _:
            raise AssertionError(f"not checked: {ast.dump(node)}")
