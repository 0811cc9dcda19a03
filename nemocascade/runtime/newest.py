"""`STAGE/latest` names the newest checkpoint of a stage, in flags and in config fields."""

from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.runtime.config_file import shown_path
from nemocascade.state_files import place
from nemocascade.store import hf
from nemocascade.store.checkpoint import steps_in

LATEST = "latest"
FLAGS = ("checkpoint", "judge", "source")  # Flags that name a checkpoint.


def newest(name: str, field: str = "--checkpoint") -> str:
  """The path of the checkpoint that `STAGE/latest` or `STAGE/checkpoints/latest` stands for.

  Another name is returned unchanged.

  Args:
    field: the flag or config field that has the name, for the error.

  Raises:
    UserError: the stage has no finished checkpoint.
  """
  path = place(name)
  if name.startswith(hf.PREFIX) or "/" not in name or path.name != LATEST or path.exists():
    return name
  folder = path.parent if path.parent.name == "checkpoints" else path.parent / "checkpoints"
  steps = steps_in(folder) if folder.is_dir() else []
  if not steps:
    raise UserError(
      f"{field}={shown_path(name)!r}: {shown_path(str(folder))} holds no checkpoint; give STAGE/latest of a stage that"
      " has saved one"
    )
  return str(folder / str(steps[-1]))


def name_newest(c: ConfigDict) -> None:
  """Replaces `STAGE/latest` in a config by the checkpoint's path, so that a run's record has that.

  Raises:
    UserError: as `newest`.
  """
  parts = {"": c}
  for group in ("stages", "arms"):
    parts |= {f"{group}.{name}.": section for name, section in c.get(group, {}).items()}
  for prefix, section in parts.items():
    teachers = section.get("teachers", ConfigDict())
    for holder, names, inside in ((section, ("init_from", "judge"), ""), (teachers, teachers.keys(), "teachers.")):
      for name in names:
        if isinstance(said := holder.get(name), str) and (path := newest(said, f"{prefix}{inside}{name}")) != said:
          holder[name] = path
