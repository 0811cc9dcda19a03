"""Parses text into SymPy expressions through Python's `ast`, without eval.

SymPy's own parser calls `eval` on the text, which would run code that a model wrote.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

_INTEGER = re.compile(r"\s*\d+\s*", re.ASCII)
_DECIMAL = re.compile(r"\s*(\d+\.\d*|\.\d+)\s*", re.ASCII)
LARGEST_BITS = 1 << 16  # Largest result of a power, and largest left shift, in bits.

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
  ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
}  # fmt: skip
_SIGNS: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_OF_BITS: dict[type, Callable[[int, int], int]] = {
  ast.LShift: operator.lshift, ast.RShift: operator.rshift,
  ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
  import sympy

  names = (
    "exp log ln sqrt sin cos tan sec csc cot asin acos atan acot asec acsc sinh cosh tanh coth asinh"
    " acosh atanh erf Abs"
  )
  return {name: getattr(sympy, name) for name in names.split()} | {"abs": sympy.Abs}


def parse(text: str, local_dict: Mapping[str, Any] | None = None, **_: Any):
  """A replacement for `sympy.parse_expr` that accepts only arithmetic.

  It accepts numbers, names, the operators + - * / **, and elementary functions of one argument.

  Args:
    local_dict: values of names. E, I and pi default to the constants; any other name becomes a
      symbol.
    _: the other keyword arguments of `parse_expr`, all ignored. Numbers are always evaluated, as
      with `evaluate=True`.

  Returns:
    A SymPy expression.

  Raises:
    ValueError: the text contains anything else, or a power of more than LARGEST_BITS bits.
  """
  import sympy

  if _INTEGER.fullmatch(text):  # Python's grammar rejects leading zeros; `int` accepts them.
    return sympy.Integer(int(text))
  if _DECIMAL.fullmatch(text):  # Keeps every written digit; `ast` would round to a Python float.
    return sympy.Float(text)
  constants = {"E": sympy.E, "I": sympy.I, "pi": sympy.pi}
  return _value(_tree(text), constants | dict(local_dict or {}))


def stand_in_for_sympy() -> None:
  """Replaces SymPy's `parse_expr` by `parse` in this process, also where SymPy itself calls it."""
  import sympy
  from sympy.parsing import sympy_parser

  sympy.parse_expr = sympy.parsing.parse_expr = sympy_parser.parse_expr = parse


def whole(text: str) -> int:
  """Evaluates an integer expression with + - * and the bitwise operators.

  Raises:
    ValueError: the text contains anything else, or shifts left by more than LARGEST_BITS.
  """
  return _whole(_tree(text))


def _tree(text: str) -> ast.expr:
  try:
    return ast.parse(text.strip(), mode="eval").body
  except (SyntaxError, RecursionError, MemoryError) as error:
    raise ValueError(f"not an expression: {type(error).__name__}") from None


def _value(node: ast.expr, names: Mapping[str, Any]):
  import sympy

  match node:
    case ast.Constant(value=bool() | complex()):
      raise ValueError("not a number")
    case ast.Constant(value=int(number)):
      return sympy.Integer(number)
    case ast.Constant(value=float(number)):
      return sympy.Float(number)
    case ast.Name(id=name):
      return names[name] if name in names else sympy.Symbol(name)
    case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
      return _SIGNS[type(sign)](_value(operand, names))
    case ast.BinOp(left=left, op=sign, right=right):
      return _combined(_value(left, names), type(sign), _value(right, names))
    case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _functions():
      return _functions()[name](_value(argument, names))
  raise ValueError(f"{type(node).__name__} is no arithmetic")


def _combined(left: Any, sign: type, right: Any):
  if sign in _OPERATORS:
    return _OPERATORS[sign](left, right)
  if sign is ast.Div:
    return left / right
  if sign is ast.Pow:
    if right.is_number and left.is_number:
      bits = abs(float(right)) * math.log2(abs(complex(left)) + 2)
      if bits > LARGEST_BITS:
        raise ValueError("a power too large to work out")
    return left**right
  raise ValueError(f"{sign.__name__} is no arithmetic")


def _whole(node: ast.expr) -> int:
  match node:
    case ast.Constant(value=bool()):
      raise ValueError("not a whole number")
    case ast.Constant(value=int(number)):
      return number
    case ast.UnaryOp(op=ast.Invert(), operand=operand):
      return ~_whole(operand)
    case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
      return _SIGNS[type(sign)](_whole(operand))
    case ast.BinOp(left=left, op=sign, right=right):
      a, b = _whole(left), _whole(right)
      if type(sign) is ast.LShift and b > LARGEST_BITS:
        raise ValueError("a shift too large to work out")
      if run := (_OPERATORS | _OF_BITS).get(type(sign)):
        return run(a, b)
  raise ValueError(f"{type(node).__name__} is no whole number")
