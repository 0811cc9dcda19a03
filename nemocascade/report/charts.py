"""Line charts as static SVG text: panels of one stage, and strips in which stages follow one another."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from nemocascade.report.markup import GREY, text

MOST_POINTS = 250  # Of a line; a longer one is drawn as means of neighbours.


@dataclasses.dataclass(frozen=True)
class Line:
  """A curve. Values that are None or not finite leave a gap."""

  steps: Sequence[float]
  values: Sequence[float | None]
  colour: str


@dataclasses.dataclass(frozen=True)
class Point:
  """A measured score with its interval."""

  step: float
  value: float
  low: float
  high: float
  colour: str


@dataclasses.dataclass(frozen=True)
class Frame:
  """The plotted area of an SVG image, and the scales of its axes."""

  width: int
  height: int
  last: float  # The largest step; the smallest is 0.
  low: float
  high: float
  log: bool = False
  left: int = 36
  right: int = 8
  top: int = 8
  bottom: int = 23

  def x(self, step: float) -> float:
    return self.left + 7 + (self.width - self.left - self.right - 7) * step / max(self.last, 1e-9)  # Points need room.

  def y(self, value: float) -> float:
    scale = (lambda v: math.log10(max(v, 1e-12))) if self.log else (lambda v: v)
    share = (scale(value) - scale(self.low)) / max(scale(self.high) - scale(self.low), 1e-12)
    return self.height - self.bottom - (self.height - self.top - self.bottom) * min(max(share, 0.0), 1.0)


def panel(
  title: str, says: str, lines: Sequence[Line], points: Sequence[Point] = (), *, low=None, high=None, log=False
):
  """A figure with the curves of one stage over its steps.

  Args:
    title: shown above it.
    says: what the picture shows, for readers who don't see it.
    low, high: the ends of the vertical axis; by default those of the values.
  """
  frame = _frame(lines, points, 210, 140, low, high, log)
  marks = [*_grid(frame), *(_curve(frame, line) for line in lines)]
  for p in points:
    x, bar = frame.x(p.step), f"M{frame.x(p.step):.1f} {frame.y(p.low):.1f}V{frame.y(p.high):.1f}"
    marks.append(f"<path d='{bar}' stroke='{p.colour}' stroke-width=2 />")
    marks.append(f"<circle cx={x:.1f} cy={frame.y(p.value):.1f} r=4 fill='{p.colour}' stroke='#fff' />")
  marks.append(_label(frame.x(0), frame.height - 6, "0", "start"))
  marks.append(_label(frame.x(frame.last), frame.height - 6, f"step {frame.last:g}", "end"))
  return _figure(title, says, frame, marks)


def strip(title: str, says: str, stages: Sequence[tuple[str, Line]]) -> str:
  """A figure in which the curves of stages follow one another on one scale.

  Args:
    stages: (label of a stage, its curve); steps of each begin at 0.
  """
  begins, parts = [0.0], []
  for _, line in stages:
    steps = [begins[-1] + step for step in line.steps]
    parts.append(dataclasses.replace(line, steps=steps))
    begins.append(begins[-1] + (max(line.steps) + 1 if line.steps else 1))
  frame = _frame(parts, (), 350, 170, 0.0, None, False)
  frame = dataclasses.replace(frame, last=begins[-1])
  marks = list(_grid(frame))
  for (label, _), begin, end in zip(stages, begins, begins[1:], strict=False):
    x = frame.x(begin)
    marks.append(
      f"<path d='M{x:.1f} {frame.top}V{frame.height - frame.bottom}' stroke='#bdbdbd' stroke-dasharray='2 3' />"
    )
    marks.append(_label((x + frame.x(end)) / 2, frame.height - 6, label, "middle"))
  marks += [_curve(frame, line) for line in parts]
  return _figure(title, says, frame, marks)


def _figure(title: str, says: str, frame: Frame, marks: Sequence[str]) -> str:
  return (
    f"<figure><figcaption>{text(title)}</figcaption><svg viewBox='0 0 {frame.width} {frame.height}' role=img"
    f" aria-label='{text(says)}'>{''.join(marks)}</svg></figure>"
  )


def _frame(lines, points, width: int, height: int, low, high, log: bool) -> Frame:
  values = [v for line in lines for v in line.values if _known(v)] + [v for p in points for v in (p.low, p.high)]
  last = max([*(s for line in lines for s in line.steps), *(p.step for p in points), 1])
  if log:
    positive = [v for v in values if v > 0] or [1.0]
    low, high = 10 ** math.floor(math.log10(min(positive))), 10 ** math.ceil(math.log10(max(positive)))
    return Frame(width, height, last, low, max(high, 10 * low), log=True)
  low = min(values, default=0.0) if low is None else low
  high = max(values, default=1.0) if high is None else high
  return Frame(width, height, last, low, _nice(high) if high > low else low + 1.0)


def _known(value: float | None) -> bool:
  return value is not None and math.isfinite(value)


def _nice(value: float) -> float:
  """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
  if value <= 0:
    return value
  power = 10.0 ** math.floor(math.log10(value))
  return next((m * power for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if m * power >= value * (1 - 1e-9)), 10 * power)


def _grid(frame: Frame) -> Iterator[str]:
  if frame.log:
    levels = [10.0**k for k in range(round(math.log10(frame.low)), round(math.log10(frame.high)) + 1)]
  else:
    levels = [frame.low + (frame.high - frame.low) * share for share in (0, 0.5, 1)]
  for level in levels:
    y = frame.y(level)
    yield f"<path d='M{frame.left} {y:.1f}H{frame.width - frame.right}' stroke='#e3e3e3' />"
    yield _label(frame.left - 5, y + 4, f"{level:.3g}", "end")


def _label(x: float, y: float, words: str, anchor: str) -> str:
  return f"<text x={x:.1f} y={y:.1f} text-anchor={anchor} font-size=12.5 fill='{GREY}'>{text(words)}</text>"


def _curve(frame: Frame, line: Line) -> str:
  """The curve as a path; a value that is alone between gaps is a dot."""
  pieces: list[list[tuple[float, float]]] = [[]]
  for step, value in _thinned(line):
    if value is None:
      pieces.append([])
    else:
      pieces[-1].append((frame.x(step), frame.y(value)))
  drawn = []
  for piece in filter(None, pieces):
    first, *rest = (f"{x:.1f} {y:.1f}" for x, y in piece)
    drawn.append(f"M{first}" + "".join(f"L{p}" for p in rest or [first]))
  return (
    f"<path d='{''.join(drawn)}' fill=none stroke='{line.colour}' stroke-width=2 stroke-linejoin=round"
    " stroke-linecap=round />"
  )


def _thinned(line: Line) -> Iterator[tuple[float, float | None]]:
  """The points of the line, at most MOST_POINTS: means of neighbours if there are more."""
  size = -(-len(line.steps) // MOST_POINTS) or 1
  for i in range(0, len(line.steps), size):
    values = [v for v in line.values[i : i + size] if v is not None and math.isfinite(v)]
    steps = line.steps[i : i + size]
    yield sum(steps) / len(steps), (sum(values) / len(values) if values else None)
