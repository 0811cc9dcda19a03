"""Seconds of a step on paper: compared with arithmetic done by hand from published figures."""

import itertools
import json

import pytest

from configs.nano_30b import if_rl, mopd
from configs.nano_30b.model import get_config as nano
from configs.tiny import sft
from experiments import estimate
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.runtime import step_time


def seconds(config, topology, weights="gathered", **how):
  c = config.get_config(topology)
  c.model.sampling_weights = weights
  return {p.name: p for p in step_time.step(c, topology, **({"verify": 0.0} | how))}


def test_the_sizes_of_30b_are_those_computed_by_hand():
  of = step_time.Sizes.of(ModelConfig.from_fields(nano().model.to_dict()))
  assert of.routed == 23 * 128 * 2 * 2688 * 1856
  assert of.shared == 31_577_940_288 - of.routed - 131_072 * 2688
  assert of.cache == 6 * 2 * 2 * 128 * 2  # Keys and values of 6 blocks with 2 heads of 128, bf16.
  # 23 states of 64 x 64 x 128 in fp32, and the last 3 inputs of each convolution of 6,144 channels, bf16.
  assert of.state == 23 * (64 * 64 * 128 * 4 + 3 * 6_144 * 2)
  assert of.attention == 6 * 4 * 32 * 128
  # 6.9 GFLOP a token at 8K, 19.4 for one document of 256K, on average.
  assert of.forward(1, 4_096) == pytest.approx(6.86e9, rel=0.01)
  assert of.forward(1, 131_072) == pytest.approx(19.4e9, rel=0.01)


def test_a_step_of_if_rl_on_64_chips_is_as_computed_by_hand():
  found, sharded = seconds(if_rl, "v5p:4x4x4", verify=0.5, verifiers=64), seconds(if_rl, "v5p:4x4x4", "sharded")
  ticks, rows = 49_152 - 4_096, 2_048 // 64
  weights = 2 * (1_850_810_688 + 29_374_808_064 / 8)
  held = 2 * (1_850_810_688 + 29_374_808_064) / 64
  states = rows * (2 * 49_082_368 + 6_144 * (4_096 + ticks / 2))
  sent = rows * 23 * 6 * 2 * 2_688 * 2 * 7 / 8  # Tokens to their experts on other chips, and back.
  assert found["decode"].limit == "HBM" and sharded["decode"].limit == "links"
  assert found["decode"].seconds == pytest.approx(ticks * (weights + states) / 2.765e12)
  assert found["decode"].parts["links"] == pytest.approx(ticks * sent / 600e9)
  assert found["reshard"].seconds == pytest.approx((weights - held) / 600e9)
  assert sharded["decode"].seconds == pytest.approx(ticks * (weights - held + sent) / 600e9)
  assert sharded["decode"].parts["HBM"] == pytest.approx(ticks * (2 * weights + states) / 2.765e12)
  assert "reshard" not in sharded
  assert found["verify"].seconds == pytest.approx(2_048 * 0.5 / (16 * 64))
  flops = 2_048 * 49_152 * (2 * 3_227_754_816 + 98_304 * 49_152 / 2)
  assert found["train"].seconds == pytest.approx(4 * flops / (64 * 459e12))
  # Each token goes to 6 experts of each of 23 blocks and comes back, bf16, in three passes; 7 of 8 on other chips.
  sent = 2_048 * 49_152 * 23 * 6 * 2 * 2_688 * 2 * 3 * 7 / 8
  assert found["train"].parts["links"] == pytest.approx(sent / (64 * 600e9))
  assert found["save"].seconds == pytest.approx(31_577_940_288 * 12 / 10 / (64 * 6.25e9))
  assert "score" not in found


def test_the_exchange_of_2048_completions_is_below_a_hundredth_of_the_step():
  c, verdict = if_rl.get_config(), [127, 15, 1 / 3, "x" * 200, True, "nonfinite"]
  assert len(json.dumps(verdict)) + len(json.dumps([127, 15, 49_152, 45_056, 49_152, False])) < step_time.EXCHANGED
  assert step_time.exchanged(c) == 2_048 * 320 + 32 * 49_152 * 4  # A matrix of tokens would have 403 MB.
  for config, topology in itertools.product((if_rl, mopd), ("v5p:4x4x4", "v5p:8x8x8")):
    found = seconds(config, topology)
    assert found["exchange"].limit == "process_0"
    assert found["exchange"].seconds < 0.01 * sum(p.seconds for p in found.values())


def test_eight_times_the_chips_train_in_an_eighth_and_gather_as_long():
  few, many = (seconds(mopd, topology) for topology in ("v5p:4x4x4", "v5p:8x8x8"))
  for name in ("train", "score"):
    assert few[name].seconds == pytest.approx(8 * many[name].seconds)
  assert many["reshard"].parts["links"] >= few["reshard"].parts["links"]


def test_the_command_prints_a_line_for_each_phase_and_the_cores_that_keep_up(capsys):
  estimate.run(mopd.get_config(), "v5p:4x4x4", verify_s=1.0, length=0.5)
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["phase"] for line in lines] == [
    "reshard", "decode", "verify", "exchange", "score", "train", "save", "step",
  ]  # fmt: skip
  *phases, whole = lines
  assert whole["seconds"] == pytest.approx(sum(line["seconds"] for line in phases), rel=0.01)
  assert whole["verifier_cores"] == pytest.approx(512 * 1.0 / (0.01 * whole["seconds"]), rel=0.02)


@pytest.mark.parametrize(
  "config, topology, said",
  [
    (mopd, "v5q:4x4x4", "unknown kind of chip in --topology='v5q:4x4x4' 'v5q': did you mean 'v5p'"),
    (mopd, "v5p:4,4", "give KIND:CHIPSxCHIPS"),
    (mopd, "v5p:3x1x1", "mesh.expert=8 does not divide the 3 chips"),
    (sft, "v5p:4x4x4", "kind of stage to estimate: 'sft'; must be rl"),
  ],
)
def test_what_cannot_be_estimated_is_refused(config, topology, said):
  with pytest.raises(UserError, match=said):
    estimate.run(config.get_config(), topology, 0.0)
