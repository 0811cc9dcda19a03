"""Each benchmark line has the required keys; an unknown suite is refused with the nearest name."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from in_process import run_command

from experiments.bench import __main__ as bench
from experiments.bench import convert, cores, gpu, kernels, loader, rl, scan, schedules, verifiers
from nemocascade.errors import UserError
from nemocascade.kernels.routed_matmul import routed_mlp
from nemocascade.kernels.routed_matmul_tpu import Tile

pytestmark = pytest.mark.usefixtures("compiled_fast")

SMALL = dict(
  vocab_size=64, hidden_size=32, num_attention_heads=4, head_dim=8, mamba_num_heads=4, mamba_head_dim=8,
  ssm_state_size=8, n_groups=2, n_routed_experts=8, moe_intermediate_size=16,
  moe_shared_expert_intermediate_size=16,
)  # fmt: skip


def test_converting_is_measured_both_ways_against_copying(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(convert.cases, "__defaults__", (str(tmp_path),))
  monkeypatch.setattr(convert, "MODEL", convert.MODEL | SMALL)
  bench.run("convert")
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["case"] for line in lines] == ["hf_to_ours", "ours_to_hf"]
  for line in lines:
    assert list(line) == ["suite", "case", "ours", "peer", "peer_name", "unit", "ratio", "device"]
    assert line["ratio"] == pytest.approx(line["ours"] / line["peer"]) and line["suite"] == "convert"
  assert not list(tmp_path.iterdir())


def test_the_input_of_sft_is_measured_against_the_tokenizer_alone_and_grain(monkeypatch, capsys):
  small = dict(
    CONVERSATIONS=4, MEAN_TOKENS=100, VOCABULARY=400, REPEATS=1, PACKED=((256, 2048),), MEAN=60, PACKED_TOKENS=9000
  )
  for name, value in small.items():
    monkeypatch.setattr(loader, name, value)
  monkeypatch.setattr(loader.corpus, "__defaults__", (50_000,))
  bench.run("loader")
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["case"] for line in lines] == ["render_and_tokenize", "pack_256", "fill_256"]
  for line in lines:
    assert list(line) == ["suite", "case", "ours", "peer", "peer_name", "unit", "ratio", "device"]
    assert line["ratio"] == pytest.approx(line["ours"] / line["peer"]) and line["ours"] > 0
  assert lines[-1]["ours"] <= 1 and lines[-1]["peer"] <= 1


def test_a_completion_is_parsed_and_verified_against_decoding_it(monkeypatch, capsys):
  for name, value in dict(THOUGHT_TOKENS=200, REPEATS=1).items():
    monkeypatch.setattr(verifiers, name, value)
  monkeypatch.setattr(loader.corpus, "__defaults__", (50_000,))
  monkeypatch.setattr(loader.train, "__defaults__", (400,))
  bench.run("verifiers")
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["case"] for line in lines] == ["instruction", "math", "stem", "structured"]
  assert all(line["ours"] > 0 and line["ratio"] == pytest.approx(line["peer"] / line["ours"]) for line in lines)


def test_the_routed_matmul_is_measured_against_ragged_dot(monkeypatch, capsys):
  monkeypatch.setattr(kernels.cpu_cases, "__defaults__", (8, 8, 64))
  bench.run("kernels")
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["case"] for line in lines] == ["forward_16_experts", "forward_128_experts"]
  for line in lines:
    assert list(line) == ["suite", "case", "ours", "peer", "peer_name", "unit", "ratio", "device"]
    assert line["ratio"] == pytest.approx(line["ours"] / line["peer"])


def test_on_a_gpu_each_part_of_the_routed_mlp_is_measured_against_each_peer(monkeypatch):
  """Runs the CPU forms, which give the same lines."""
  monkeypatch.setattr(kernels, "peers", lambda: {"a peer": jax.lax.ragged_dot, "broken": None})
  monkeypatch.setattr(kernels, "LOADS", {"skewed": 1.0})
  lines = list(kernels.gpu_cases(D=16, F=8, E=4, X=2, tokens=(64,), dense=16))
  parts = ["forward", "forward", "dx", "dw", "mlp_forward", "mlp_forward_backward"]
  assert [line["case"] for line in lines] == [f"{part}_64_tokens_skewed" for part in parts]
  assert {line["peer_name"] for line in lines} == {"a peer", "a dense matmul"}
  assert all(line["ratio"] == pytest.approx(line["ours"] / line["peer"]) for line in lines)


def test_the_usual_chain_is_the_routed_mlp():
  keys = jax.random.split(jax.random.key(0), 4)
  x_TD, up, down = (jax.random.normal(k, s) for k, s in zip(keys, [(64, 16), (4, 16, 8), (4, 8, 16)], strict=False))
  expert_TX, weight_TX = kernels.choices(keys[3], 64, 4, 2, 1.0)
  args = x_TD, up, down, expert_TX, weight_TX.astype(jnp.float32)
  got = kernels.chain(jax.lax.ragged_dot, *args)
  np.testing.assert_allclose(got, routed_mlp(*args)[0], rtol=1e-4, atol=1e-3)


def test_loads_are_balanced_or_skewed():
  of = lambda exponent: np.bincount(kernels.choices(jax.random.key(0), 4096, 16, 2, exponent)[0].ravel())
  assert of(0.0).max() < 1.2 * 512 and of(1.0).max() > 3 * 512


def test_a_schedule_is_that_of_its_busiest_stretch_between_branches(tmp_path):
  """A label at bundle 3 and a branch at bundle 5 bound the loop; there are six bundles of four slots."""
  texts = ["{ a }", "{ b }", "LB: > { c }", ": > { d }", ": > { sbr.rel (%p) target = $region2 }", ": { e }"]
  lines = [f" {hex(i)} {text if ':' in text else ': ' + text}" for i, text in enumerate(texts)]
  (tmp_path / "17-routed_product.1-72-final_bundles.txt").write_text("\n".join(lines))
  use = "== CAPACITY:\nMXU, XLU\n 4 3\n== UTILIZATION:\n" + "".join(f"{n} 0\n" for n in (1, 1, 4, 2, 0, 3))
  (tmp_path / "17-routed_product.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(use)
  assert schedules.read_schedule(tmp_path) == (0.75, 2)


def test_the_rows_of_each_core_are_those_counted_by_hand(monkeypatch):
  """Tiles of 16 rows in parts of 8; experts of 20, 12 and 32 rows: the cut is at row 32, between the last two."""
  tile = Tile(rows=16, chunk=128, part=8)
  # Expert 0 has a tile and a part, expert 1 has two parts, of which one is shared, and expert 2 two tiles.
  for weights in (False, True):
    assert cores.rows_of_cores([20, 12, 32], tile, weights=weights) == (16 + 8 + 16, 32)
  assert cores.rows_of_cores([64, 0, 0], tile, weights=True) == (32, 32)
  monkeypatch.setattr(cores, "choose_tile", lambda *_: tile)
  monkeypatch.setattr(cores, "of_loads", lambda: [(36, "even", np.array([20, 12, 32]))])
  (both,), (alone,) = (list(cores.slower_core("up", 7000, number, 1e9)) for number in (2, 1))
  assert (both["ratio"], alone["ratio"]) == (36 / 40, 36 / 72) and both["case"] == "up_slower_core_36_tokens_even"


def test_the_least_bytes_of_the_scan_are_its_arrays_once():
  """A token of Nano: 64 heads of 64 channels, 8 groups of 128 numbers in b and in c, in bf16; fp32 log decays."""
  x, b_and_c, decays = 64 * 64 * 2, 2 * 8 * 128 * 2, 64 * 4
  assert scan.least_bytes(backward=False) == x + b_and_c + decays + x
  assert scan.least_bytes(backward=True) == 2 * (x + b_and_c + decays) + x
  assert scan.fused_bytes(backward=False) - scan.least_bytes(backward=False) == 64 * 64 * 128 * 4 / 128


def test_only_kernels_are_compared_without_running_them():
  with pytest.raises(UserError, match="--static with suite 'convert': must be with the suite 'kernels'"):
    bench.run("convert", static=True)


def test_an_unknown_suite_is_refused_with_the_nearest():
  with pytest.raises(UserError, match="did you mean 'convert'"):
    bench.run("converts")


def test_the_command_takes_the_suite_as_its_argument():
  done = run_command("bench", "none")
  assert done.returncode == 2 and done.stderr.startswith("error: unknown suite 'none'")


def smoke_rl():
  """The config of `bench rl` and its parts, at a size that compiles in seconds."""
  c = rl.config(**SMALL | dict(vocab_size=256, hybrid_override_pattern="M*E"))
  c.steps = 2
  c.rollout.update(prompts=2, completions=4, total_tokens=rl.PROMPT_TOKENS + 12)
  c.packing.update(rows=8, row_tokens=rl.PROMPT_TOKENS + 12)
  return c, rl.make_parts(c)


def test_our_step_of_bench_rl_samples_every_token_and_rewards_differ(tmp_path):
  c, p = smoke_rl()
  calls, start = [], rl.save(c, p.text.tokenizer, rl.endless_params(p.programs, c.seed), tmp_path / "start")
  seconds, phases = rl.run_ours(c, p, start, tmp_path / "rl", lambda: calls.append(1))
  assert len(seconds) == len(phases) == len(calls) == 2
  assert all(0 < sum(of.values()) <= s and set(of) == set(rl.PHASES) for s, of in zip(seconds, phases))
  (first, _) = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
  assert first["rollout/tokens"] == 12 and first["rollout/unfinished"] == 1
  assert first["rollout/groups_with_signal"] > 0 and first["advantage/abs"] > 0


def test_prompts_of_bench_rl_have_16_tokens_for_transformers_too(tmp_path):
  transformers = pytest.importorskip("transformers")
  c, p = smoke_rl()
  p.text.tokenizer.save(tmp_path / "tokenizer.json")
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
  texts, tokens, letters = rl.prompts(c, p)
  assert theirs(texts)["input_ids"] == tokens and {len(t) for t in tokens} == {rl.PROMPT_TOKENS}
  assert len(texts) == 2 * 2 and all(letter in rl.CONSONANTS for letter in letters)


def test_the_reward_of_bench_rl_is_a_share_of_words():
  assert rl.share("bad cab bee", "b") == pytest.approx(2 / 3) and rl.share("", "b") == 0
  words = rl.words(1000)
  assert len(set(words)) == 1000
  counts = np.unique([word[0] for word in words], return_counts=True)[1]
  assert counts.min() == counts.max() == 1000 / len(rl.CONSONANTS)


def test_without_trl_bench_rl_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "trl", None)
  monkeypatch.delitem(sys.modules, "experiments.bench.trl", raising=False)
  with pytest.raises(UserError, match=r"TRL.*pip install -e '\.\[bench\]'"):
    bench.run("rl")


def test_the_benchmark_of_a_card_runs_its_cases_at_tiny_sizes(tmp_path, monkeypatch, capsys):
  """In Pallas interpreter mode: every correctness check must pass, and the table must have every line."""
  monkeypatch.setattr(gpu, "REPEATS", 1)
  monkeypatch.setattr(gpu, "MODEL_TOLERANCES", {"bfloat16": (0.1, 0.01)})
  tiny = dataclasses.replace(gpu.TINY, unit="*E", repeats=1, kernel_shapes=gpu.TINY.kernel_shapes[1:])
  monkeypatch.setattr(gpu, "TINY", tiny)  # Compilation takes nearly all of the time.
  bench.run("gpu", table=str(tmp_path / "table.md"))
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  checks = [line for line in lines if line["peer_name"] == "tolerance"]
  assert len(checks) == 6 and all(line["ratio"] > 1 for line in checks)
  assert {line["case"] for line in lines} >= {"sft_step_0.00B", "decode_2_rows"}
  assert len((tmp_path / "table.md").read_text().splitlines()) == len(lines) + 4


def test_a_nan_anywhere_fails_the_cards_check():
  ones = np.ones(3, np.float32)
  error = gpu._relative_error((ones, ones * np.nan), (ones, ones))
  assert gpu._error_line("a case", error, 1.0)["ratio"] == 0.0


def test_a_wrong_kernel_fails_the_cards_check(monkeypatch):
  """A product that is 1% off must give a ratio below 1."""
  true = gpu.routed_matmul
  off = lambda *args, form, **how: true(*args, form=form, **how) * (1.01 if form == "gpu" else 1.0)
  monkeypatch.setattr(gpu, "routed_matmul", off)
  sizes = dataclasses.replace(gpu.TINY, kernel_shapes=(("float32", 40, 16, 24, 3),))
  products = [line for line in gpu.correct(sizes) if line["case"].startswith("product")]
  assert len(products) == 3 and all(line["ratio"] < 1 for line in products)
