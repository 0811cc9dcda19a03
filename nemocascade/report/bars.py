"""Draws named numbers as horizontal bars."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nemocascade.state_files import whole


def draw_shares(shares: Mapping[str, float], path: Path, label: str) -> None:
  """Writes a PNG with a bar for each number, its value beside it, and a line at 1."""
  figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(shares)), layout="constrained")
  bars = axes.barh(list(shares), list(shares.values()), color="#1f5fa8")
  axes.bar_label(bars, fmt="%.2g", padding=3)
  axes.axvline(1, color="#4a4a4a", linewidth=1)
  axes.invert_yaxis()
  axes.set_xlabel(label)
  with whole(path) as partial:
    figure.savefig(partial, format="png", dpi=150)
  plt.close(figure)
