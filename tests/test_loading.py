"""What a folder that is no checkpoint is told: the form, or the nearest right path."""

import pytest

from nemocascade.errors import UserError
from nemocascade.runtime.loading import model_files


@pytest.mark.parametrize("given", ["run", "run/sft", "run/sft/checkpoints"])
def test_a_folder_above_checkpoints_names_the_newest(tmp_path, given):
  for step in (5, 10):
    (tmp_path / f"run/sft/checkpoints/{step}/params").mkdir(parents=True)
  with pytest.raises(UserError, match=f"init_from=.*; it holds some, such as {tmp_path}/run/sft/checkpoints/10$"):
    model_files(str(tmp_path / given), "init_from")


def test_a_hugging_face_folder_without_its_prefix_is_told_the_prefix(tmp_path):
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_text("{}")
  with pytest.raises(UserError, match=f"give hf:{tmp_path} for a Hugging Face folder"):
    model_files(str(tmp_path))


@pytest.mark.parametrize("given, why", [("nowhere", "there is no such folder"), ("", "not a checkpoint of ours")])
def test_what_is_no_checkpoint_is_told_the_form(tmp_path, given, why):
  with pytest.raises(
    UserError, match=f"{why}; give STAGE/checkpoints/STEP of a work directory, a converted one, or hf:"
  ):
    model_files(str(tmp_path / given))
