"""Pictures of a run for papers and pages: the heat map of stage x domain as a PNG."""

from pathlib import Path

import numpy as np

from nemocascade.report.run import Stage
from nemocascade.state_files import whole


def heat_map(path: Path, stages: list[Stage], kind: str) -> None:
  """Draws stage x domain: the score after the stage and its change since the stage's start.

  Args:
    stages: entries of cascade.json with scores.
    kind: "scores" (temperature 1) or "greedy".
  """
  import matplotlib  # Slow to import, and the page itself does without.

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  domains = list(stages[0][f"{kind}_after"])
  after = np.array([[s[f"{kind}_after"][d] for d in domains] for s in stages])
  figure, axes = plt.subplots(figsize=(1.05 * len(domains) + 2.2, 0.62 * len(stages) + 1.3), layout="constrained")
  image = axes.imshow(after, cmap="viridis", vmin=0, vmax=1, aspect="auto")
  axes.set_xticks(range(len(domains)), [d.replace("_", "\n") for d in domains])
  axes.set_yticks(range(len(stages)), [s["name"].replace("_", " ") for s in stages])
  axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
  for spine in axes.spines.values():
    spine.set_visible(False)
  for i, stage in enumerate(stages):
    before = stage.get(f"{kind}_before")
    for j, domain in enumerate(domains):
      ink = "black" if after[i, j] > 0.6 else "white"
      axes.text(j, i - 0.12, f"{after[i, j]:.2f}", ha="center", va="center", color=ink, fontsize=11)
      if before:
        change = after[i, j] - before[domain]
        axes.text(j, i + 0.26, f"{change:+.2f}", ha="center", va="center", color=ink, fontsize=7.5, alpha=0.85)
      if domain in stage["domains"]:
        box = plt.Rectangle((j - 0.47, i - 0.45), 0.94, 0.9, fill=False, ec="#ff7f0e", lw=2.2)
        axes.add_patch(box)
  figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
  figure.suptitle(
    "score, and change against the stage's start; boxes: the stage's own domains", fontsize=9, color="#555"
  )
  with whole(path) as partial:
    figure.savefig(partial, format="png", dpi=130)
  plt.close(figure)
