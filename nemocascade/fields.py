"""Fields of configs: type, range and choices; parsing and validation of a value."""

import ast
import dataclasses
import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from nemocascade import own_code
from nemocascade.errors import UserError, listed, nearest, short, unknown

LARGEST = 2**31 - 1  # Upper bound of every whole number, because programs count in int32.
# Programs compute in float32: beyond these magnitudes a number would be infinite or 0 there.
LARGEST_FLOAT, SMALLEST_FLOAT = float.fromhex("0x1.fffffep+127"), float.fromhex("0x1p-126")
# Logits are divided by the temperature. At the lowest one, two tokens whose logits differ by 100 are 10,000 nats apart,
# which the losses still count with; far below it the quotients are infinite.
COLDEST, HOTTEST = 0.01, 100.0
BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
  """One field of a config.

  Attributes:
    kind: int, float, bool, str, tuple or dict.
    help: one sentence on its meaning, with the unit.
    low, high: inclusive bounds. above, below: exclusive bounds.
    infinite: whether an infinite float is allowed.
    also: further allowed values outside the bounds, such as None or -1.
    choices: the allowed words, or "module:NAME" of a dict whose keys they are. The dict is given by name,
      because this module may not import modules of a higher layer.
    own: whether FILE.py:NAME, a function in a user's file, is allowed besides the choices.
    empty: whether "", () or {} is allowed.
    item: the field that each value of a tuple must satisfy.
    unique: whether the values of a tuple must differ.
    rising: whether no value of a tuple may be below the one before it.
    length: the number of values of a tuple; None allows any.
    optional: whether a config may leave the field out.
  """

  kind: type
  help: str
  low: float | None = None
  high: float | None = None
  above: float | None = None
  below: float | None = None
  infinite: bool = False
  also: tuple = ()
  choices: tuple[str, ...] | str = ()
  own: bool = False
  empty: bool = True
  item: "Field | None" = None
  unique: bool = False
  rising: bool = False
  length: int | None = None
  optional: bool = False

  def check(self, name: str, value: Any) -> None:
    """Raises UserError with the name, the value and what is allowed, if the value is not allowed."""
    if any(value is other or (type(value) is type(other) and value == other) for other in self.also):
      return
    if isinstance(value, float) and math.isnan(value):
      raise UserError(f"{name}=nan: is not a number; must be {self.allowed()}")
    if not self._has_kind(value) or not self._within(value):
      raise UserError(f"{name}={shown(value)}: must be {self.allowed(value)}")
    if self.choices and value not in (words := self.words()) and not (self.own and own_code.is_own(value)):
      if not (value == "" and self.empty and self.kind is str):
        raise unknown(name, value, [*words, *[own_code.FORM] * self.own])
    if self.kind is tuple and self.item is not None:
      for i, part in enumerate(value):
        self.item.check(f"{name}[{i}]", part)
      if self.unique and (twice := [part for i, part in enumerate(value) if part in value[:i]]):
        raise UserError(f"{name}={shown(value)}: has {twice[0]!r} twice; must be {self.allowed()}")
      if self.rising and list(value) != sorted(value):
        raise UserError(f"{name}={shown(value)}: must be {self.allowed()}")

  def parse(self, name: str, text: str) -> Any:
    """Parses a value from the command line. Raises UserError if the text is not of the field's kind."""
    if None in self.also and text in ("None", "none"):
      return None
    if self.kind is str:
      return text
    try:
      if self.kind is bool:
        return BOOLS[text.lower()]
      value = self.kind(text) if self.kind in (int, float) else ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      value = text
    if self.kind is tuple and isinstance(value, list):
      value = tuple(value)
    if not isinstance(value, self.kind):
      form = """, written as '{"NAME": ...}'""" if self.kind is dict else ""
      raise UserError(f"{name}={shown(text)}: must be {self.allowed()}{form}")
    return value

  def words(self) -> tuple[str, ...]:
    """The allowed words; imports the dict that `choices` names."""
    if isinstance(self.choices, str):
      module, name = self.choices.split(":")
      return tuple(getattr(importlib.import_module(module), name))
    return self.choices

  def allowed(self, value: Any = None) -> str:
    """The allowed values, in words. The limits of int32 and float32 are mentioned only if `value` is beyond them."""
    return " or ".join([self._allowed(value), *("None" if v is None else str(v) for v in self.also)])

  def _allowed(self, value: Any) -> str:
    if self.choices:
      return "one of " + ", ".join(self.words()) + f", or {own_code.FORM}" * self.own
    if self.kind in (int, float):
      ends = self.infinite or self.high is not None or self.below is not None
      kind = "a whole number" if self.kind is int else "a number" if ends else "a finite number"
      return kind + self._bounds(value)
    if self.kind is tuple and self.item is not None:
      many = f"a tuple of {self.length}" if self.length else "a tuple" if self.empty else "a tuple, not empty,"
      of = self.item._allowed(None)
      return f"{many} of {of}" + ", each once" * self.unique + ", in rising order" * self.rising
    words = {bool: "True or False", str: "a text", dict: "a section of fields"}[self.kind]
    return words + ("" if self.empty else ", not empty")

  def _bounds(self, value: Any) -> str:
    high = self._high()
    if self.high is None and not (isinstance(value, int) and value > high):
      high = None
    words = {"at least": self.low, "above": self.above, "below": self.below, "at most": high}
    if self.kind is float and not self._fits_float32(value):
      words |= {"at most": LARGEST_FLOAT} if abs(value) > 1 else {"at least": SMALLEST_FLOAT}
    parts = [
      f"{word} {bound}" if isinstance(bound, int) else f"{word} {bound:g}"
      for word, bound in words.items()
      if bound is not None
    ]
    return (" of " if parts[0].startswith("at ") else " ") + " and ".join(parts) if parts else ""

  def _fits_float32(self, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number or value == 0 or abs(value) == math.inf or SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT

  def _high(self) -> float:
    return self.high if self.high is not None else LARGEST if self.kind is int else math.inf

  def _has_kind(self, value: Any) -> bool:
    if self.kind is bool:
      return isinstance(value, bool)
    if self.kind is tuple:
      return isinstance(value, tuple | list)
    if self.kind is dict:
      return isinstance(value, Mapping) or hasattr(value, "to_dict")
    kinds = (int, float) if self.kind is float else self.kind
    return isinstance(value, kinds) and not isinstance(value, bool)

  def _within(self, value: Any) -> bool:
    if self.kind in (int, float):
      return (
        value <= self._high()
        and (self.low is None or value >= self.low)
        and (self.above is None or value > self.above)
        and (self.below is None or value < self.below)
        and (self.infinite or abs(value) != math.inf)
        and (self.kind is int or self._fits_float32(value))
      )
    if self.kind in (str, tuple, dict) and not self.empty and len(value) == 0:
      return False
    return self.length is None or len(value) == self.length


# Constructors with short names, so that a field fits on one line of a table.


def whole(help: str, low: int | None = 1, high: int | None = None, **more: Any) -> Field:
  """A whole number, at least 1 by default."""
  return Field(kind=int, help=help, low=low, high=high, **more)


def number(help: str, **bounds: Any) -> Field:
  return Field(kind=float, help=help, **bounds)


def flag(help: str, **more: Any) -> Field:
  return Field(kind=bool, help=help, **more)


def text(help: str, **more: Any) -> Field:
  return Field(kind=str, help=help, **more)


def word(help: str, choices: Iterable[str] | str, *, empty: bool = False, **more: Any) -> Field:
  """One of the words `choices`."""
  choices = choices if isinstance(choices, str) else tuple(choices)
  return Field(kind=str, help=help, choices=choices, empty=empty, **more)


def several(help: str, item: Field, **more: Any) -> Field:
  """A tuple whose values satisfy `item`."""
  return Field(kind=tuple, help=help, item=item, **more)


def section(help: str, **more: Any) -> Field:
  """A section whose field names the config chooses, such as domains or stages."""
  return Field(kind=dict, help=help, **more)


def shown(value: Any, most: int = 60) -> str:
  """A value as quoted in messages: one line of at most `most` characters."""
  try:
    return short(repr(value.to_dict() if hasattr(value, "to_dict") else value), most)
  except ValueError:  # Python does not write whole numbers of more than some thousand digits.
    return f"{type(value).__name__} with a number of thousands of digits"


def no_field(name: str, among: Iterable[str]) -> UserError:
  """The error for a field that does not exist; its message lists the fields of the section."""
  section_, _, last = name.rpartition(".")
  where = f"in {section_.removeprefix('--config.')} " if section_ not in ("", "--config") else ""
  among = sorted(among)
  near = nearest(last, among)
  hint = f"did you mean {near!r}? " if near else ""
  return UserError(f"{name}: no such field: {hint}{where}there are {listed(among, 90) or 'none'}")
