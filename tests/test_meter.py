"""What a step takes: times by host, tokens a second, FLOPs utilisation on known chips alone, goodput over resumptions."""

import jax
import pytest
import tiny_checkpoint

from nemocascade.config import ModelConfig
from nemocascade.model.size import matmul_params
from nemocascade.runtime import meter
from nemocascade.runtime.meter import BETWEEN, Meter
from nemocascade.runtime.outcome import Spent

MODEL = ModelConfig.from_fields(tiny_checkpoint.MODEL)


class Clock:
  """Phases and wall time that a test sets."""

  def __init__(self, now: float):
    self.now, self.seconds = now, {}

  def time(self) -> float:
    return self.now

  def pass_(self, **seconds: float) -> None:
    self.now += sum(seconds.values())
    self.seconds = seconds

  def take(self) -> dict[str, float]:
    return self.seconds


@pytest.fixture
def clock(monkeypatch):
  clock = Clock(1000.0)
  monkeypatch.setattr(meter.time, "time", clock.time)
  monkeypatch.setattr(meter, "compile_seconds", lambda: 0.0)
  return clock


def test_goodput_leaves_out_skipped_steps_lost_steps_and_the_time_between_runs(clock):
  m = Meter(MODEL, {})
  clock.pass_(update=8.0)
  assert m.step(clock, Spent(trained=1), counts=True)[0]["speed/goodput"] == 1.0
  clock.pass_(update=2.0)
  assert m.step(clock, Spent(trained=1), counts=False)[0]["speed/goodput"] == 0.8
  saved = m.record()
  clock.pass_(update=5.0)
  m.step(clock, Spent(trained=1), counts=True)  # The checkpoint does not have this step.
  clock.pass_(nothing=5.0)
  m = Meter(MODEL, saved)
  clock.pass_(**{"update": 16.0, BETWEEN: 4.0})
  assert m.step(clock, Spent(trained=1), counts=True)[0]["speed/goodput"] == (8 + 16) / 40


def test_compilations_do_not_count(clock, monkeypatch):
  m = Meter(MODEL, {})
  monkeypatch.setattr(meter, "compile_seconds", lambda: 6.0)
  clock.pass_(update=8.0)
  found, _ = m.step(clock, Spent(trained=1), counts=True)
  assert (found["time/step"], found["time/compile"], found["speed/goodput"]) == (8.0, 6.0, 0.25)
  clock.pass_(update=8.0)
  assert m.step(clock, Spent(trained=1), counts=True)[0]["time/compile"] == 0.0


def test_the_slowest_host_is_named_and_the_others_tokens_are_added(clock, monkeypatch):
  def exchange(own, what):
    others = [{"rollout": 9.0, "update": 1.0}, {"rollout": 2.0, "update": 1.0}]
    return [own] + [own | {"seconds": seconds, "tokens": {"trained": 30}} for seconds in others]

  monkeypatch.setattr(meter.hosts, "exchange", exchange)
  m = Meter(MODEL, {})
  clock.pass_(rollout=3.0, update=1.0)
  found, tokens = m.step(clock, Spent(), counts=True, mine={"trained": 40})
  assert tokens == {"trained": 100}
  assert (found["time/rollout"], found["time/slowest/rollout"], found["time/slowest_host/rollout"]) == (3.0, 9.0, 1.0)
  assert found["time/step"] == 10.0
  assert found["speed/tokens"] == pytest.approx(100 / 10 / jax.device_count())


def test_utilisation_is_known_on_known_chips_alone(clock, monkeypatch):
  clock.pass_(update=2.0)
  found, _ = Meter(MODEL, {}).step(clock, Spent(trained=100, sampled=10), counts=True)
  assert "speed/mfu" not in found  # No peak of a CPU is known.
  assert found["speed/tokens"] == 10 / 2 / jax.device_count()
  monkeypatch.setitem(meter.PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
  found, _ = Meter(MODEL, {}).step(clock, Spent(trained=100, sampled=10), counts=True)
  flops = (6 * 100 + 2 * 10) * matmul_params(MODEL)
  assert found["speed/mfu"] == pytest.approx(flops / 2 / jax.device_count() / 1e9)
