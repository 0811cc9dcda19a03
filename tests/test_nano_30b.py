"""The configs of the published scale have the published numbers, typed here from the papers.

P2 is the Nemotron-Cascade 2 report (arXiv 2603.19220), P1 that of Nemotron-Cascade 1 (arXiv 2512.13607).
"""

import importlib

import pytest
from ml_collections import ConfigDict

from configs.nano_30b import cascade, meshes
from configs.nano_30b.model import get_config
from experiments import cascade as command
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.model.size import active_params, count_params
from nemocascade.runtime import course, parts
from nemocascade.store.hf_config import config_fields, model_config


@pytest.fixture(scope="module")
def nano() -> ModelConfig:
  return ModelConfig.from_fields(get_config().model.to_dict())


def test_parameters_are_31_577_940_288(nano):
  assert count_params(nano) == 31_577_940_288


def test_a_token_uses_3_580_076_352_of_them(nano):
  """Nemotron-3-Nano report (arXiv 2512.20848): 3.2B active without the embedding, 3.6B with it."""
  assert active_params(nano) == 3_580_076_352
  assert active_params(nano) - 352_321_536 == 3_227_754_816


def test_the_pattern_has_the_published_blocks(nano):
  at = {letter: [i for i, l in enumerate(nano.hybrid_override_pattern) if l == letter] for letter in "ME*"}
  assert at["*"] == [5, 12, 19, 26, 33, 42]
  assert at["M"] == [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 25, 28, 30, 32, 35, 37, 39, 41, 44, 46, 48, 50]
  assert len(at["E"]) == 23 and sum(map(len, at.values())) == 52


def test_the_config_survives_config_json(nano):
  again = model_config(config_fields(nano), "config.json")
  assert {**vars(again), "remat": "block", "sequence_parallel": True} == vars(nano)


# P2, tables 8 to 10 (appendix B). Tokens are those of a response, in units of 1,024 where the table says K.
COLUMNS = ("tokens", "prompts", "rollouts", "lr", "steps", "temperature", "top_p", "overlong_filter", "kl")
PAPER = {
  "if_rl": ("49K", 128, 16, 3e-6, 180, 1.0, 1.0, False, 0.0),
  "multi_domain_rl": ("49K", 128, 16, 3e-6, 70, 1.0, 1.0, True, 0.0),
  "mopd": ("98K", 128, 4, 3e-6, 52, 1.0, 1.0, False, None),
  "rlhf": ("16K", 128, 16, 3e-6, 25, 1.0, 1.0, True, 0.03),
  "long_context_rl": ("49K", 128, 16, 3e-6, 30, 1.0, 1.0, True, 0.0),
  "code_rl": ("118K", 128, 16, 3e-6, 22, 1.0, 0.95, True, 0.0),
  "swe_agentless_rl": ("98K", 128, 16, 3e-6, range(40, 51), 1.0, 1.0, None, None),  # P2 section 4.8.
  "swe_agentic_rl": ("256K", 16, 64, 3e-6, None, 0.8, None, None, None),
}
# (stage, column) -> (what another place of P2 says, ours). The table's value stands in PAPER.
CONFLICTS = {
  ("mopd", "lr"): (2e-6, 2e-6),  # Section 4.4, which also has its warm-up.
  ("rlhf", "steps"): (30, 25),  # Section 4.5: about 30.
  ("rlhf", "overlong_filter"): (False, True),  # Section 4.5: not applied.
  ("long_context_rl", "overlong_filter"): (False, True),  # Section 4.6: not applied.
}
# The exact integers are not published, except 98,304 of agentless SWE RL (P2 section 4.8) and 49,152 (Nano-3's recipe).
TOKENS = {"16K": 16_384, "49K": 49_152, "98K": 98_304, "118K": 118_784, "256K": 262_144}


@pytest.fixture(scope="module")
def whole() -> ConfigDict:
  return cascade.get_config()


def said(stage: ConfigDict) -> dict:
  """What a stage's config says of each column of PAPER."""
  r = stage.rollout
  return dict(
    zip(
      COLUMNS,
      (r.total_tokens, r.prompts, r.completions, stage.optimizer.peak_lr, stage.steps, r.temperature, r.top_p,
       stage.overlong == "filter", stage.kl_weight),
      strict=True,
    )
  )  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_an_rl_stage_has_the_numbers_of_its_column(whole, name):
  ours = said(whole.stages[name])
  for column, value in zip(COLUMNS, PAPER[name], strict=True):
    other, chosen = CONFLICTS.get((name, column), (value, value))
    assert chosen in (value, other)
    if column == "tokens":
      assert ours[column] == TOKENS[chosen]
    elif isinstance(chosen, range):
      assert ours[column] in chosen
    elif chosen is not None:
      assert ours[column] == chosen, column


def test_prompts_of_all_steps_are_those_of_the_report(whole):
  assert {name: whole.stages[name].rollout.prompts * whole.stages[name].steps for name in list(PAPER)[:6]} == {
    "if_rl": 23_040, "multi_domain_rl": 8_960, "mopd": 6_656, "rlhf": 3_200, "long_context_rl": 3_840, "code_rl": 2_816,
  }  # fmt: skip
  agentic = whole.stages.swe_agentic_rl
  assert agentic.steps == round(3_612 / agentic.rollout.prompts)  # One pass over the data card's rows.


def test_every_rl_stage_is_on_policy_with_the_published_objective(whole):
  """P2 section 4.1: one update a batch, no entropy bonus, a mean over tokens, AdamW (0.9, 0.95)."""
  for name in (*PAPER, "rlhf_teacher"):
    c = whole.stages[name]
    assert (c.updates, c.entropy_weight, c.ratio) == (1, 0.0, "none")
    assert (c.optimizer.b1, c.optimizer.b2) == (0.9, 0.95)
    if name != "mopd":
      assert (c.advantage, c.aggregation) == ("grpo", "token_mean")
    assert c.dynamic_filtering == (name not in ("mopd", "rlhf", "rlhf_teacher"))  # Section 4.2.


def test_each_stage_trains_on_the_published_domains(whole):
  shares = {name: whole.stages[name].mixture.to_dict() for name in PAPER}
  card = dict(math=1_853, instruction=1_854, tools=610, stem=927, structured=927)  # Rows for MOPD on the data card.
  assert sum(card.values()) == 6_171
  mopd = shares.pop("mopd")
  assert mopd.pop("preference") > 0  # Its number is not published.
  assert {name: round(rows / 6_171, 2) for name, rows in card.items()} == mopd
  assert shares == {
    "if_rl": {"instruction": 1.0},
    "multi_domain_rl": {"stem": 0.55, "tools": 0.30, "structured": 0.15},  # Section 4.3.
    "rlhf": {"preference": 1.0},
    "long_context_rl": {"long_context": 1.0},
    "code_rl": {"code": 1.0},
    "swe_agentless_rl": {"swe": 1.0},
    "swe_agentic_rl": {"swe_agentic": 1.0},
  }


def test_if_rl_gives_nothing_for_a_completion_without_an_end_and_mopd_keeps_it(whole):
  assert whole.stages.if_rl.overlong == "zero"  # Section 4.2.
  assert whole.stages.mopd.overlong == "keep"  # Table 8: no filter; section 4.4 has no reward to take away.


def test_mopd_is_that_of_section_4_4(whole):
  c = whole.stages.mopd
  assert (c.advantage, c.aggregation, c.correction) == ("mopd", "sequence_mean", "icepop")
  assert c.options.icepop.to_dict() == dict(low=0.5, high=2.0)
  assert (c.optimizer.peak_lr, c.optimizer.warmup_steps, c.optimizer.schedule) == (2e-6, 30, "constant")
  assert c.init_from == "previous" and course.main_line(whole, "mopd")[-1] == "multi_domain_rl"
  of = c.teachers.to_dict()
  assert of.pop("math") == "sft" and of.pop("preference") == "rlhf_teacher"
  assert set(of) == {"instruction", "stem", "structured", "tools"} and set(of.values()) == {"multi_domain_rl"}


def test_the_preference_teacher_is_rlhf_from_the_sft_checkpoint(whole):
  teacher, rlhf = (dict(whole.stages[name].to_dict()) for name in ("rlhf_teacher", "rlhf"))
  assert teacher.pop("init_from") == "sft" and rlhf.pop("init_from") == "previous"
  assert teacher.pop("steps") in (100, 160) and rlhf.pop("steps") == 25  # Section 4.4 scores steps 100 and 160.
  assert rlhf.pop("gates") and teacher == rlhf and rlhf["reward"] == "pairwise"


def test_the_late_stages_have_their_own_numbers(whole):
  assert whole.stages.long_context_rl.rollout.prompt_tokens == 32_768  # Section 4.6: inputs of at most 32K.
  agentic = whole.stages.swe_agentic_rl.optimizer  # Table 10: from 3e-6 to 0, 10 steps of warm-up.
  assert (agentic.warmup_steps, agentic.final_fraction) == (10, 0.0) and agentic.schedule != "constant"
  assert whole.domains.swe_agentic.max_turns == 200  # Section 4.8.


def test_sft_has_the_numbers_of_table_7(whole):
  c = whole.stages.sft
  assert c.optimizer.peak_lr == 5e-5 and c.optimizer.final_fraction * c.optimizer.peak_lr == pytest.approx(5e-6)
  assert (c.optimizer.schedule, c.optimizer.warmup_steps, c.steps) == ("cosine", 200, 40_000)
  assert (c.optimizer.b1, c.optimizer.b2, c.optimizer.weight_decay) == (0.9, 0.98, 0.1)
  assert c.rows == 64
  # Section 3.2, in thousands. Of the two counts of proofs the text's 410 + 400 (in all 816), of chat without thoughts
  # the text's 372 (its parts: 300 + 330).
  blend = dict(
    math_tool=1800, math=1900, math_genselect=676, proof_generation=410, proof_verification=400, code_python=1900,
    code_cpp=1000, code_tool=1300, scientific_code=1100, science=1400, science_nano3=1300, long_context=160,
    long_context_chatqa2=74, chat=4900, chat_non_thinking=372, multi_turn_chat=700, chat_nano3=4600, instruction=230,
    instruction_non_thinking=64, instruction_nano3=497, safety=4, conversational_agent=822, swe_agentic=125,
    swe_agentless=389, terminal_agent=490,
  )  # fmt: skip
  assert {name: source.count for name, source in c.sources.items()} == {n: k * 1000 for n, k in blend.items()}


def test_the_judge_has_the_batch_rate_and_epoch_of_cascade_1(whole):
  c = whole.stages.reward_model  # P1 section 4: 82K pairs.
  assert (c.pairs, c.optimizer.peak_lr, c.steps) == (256, 2e-6, round(82_000 / 256))


def test_the_stages_come_in_the_order_of_the_report(whole):
  main = [name for name in whole.order if name not in whole.side_line]
  assert main == [
    "sft", "if_rl", "multi_domain_rl", "mopd", "rlhf", "long_context_rl", "code_rl", "swe_agentless_rl", "swe_agentic_rl",
  ]  # fmt: skip
  assert set(whole.order) - set(main) == {"reward_model", "rlhf_teacher"}


def test_each_stage_warns_if_it_loses_what_an_earlier_one_has_trained(whole):
  of = {name: set(whole.stages[name].get("gates", {})) for name in whole.order}
  assert not of["sft"] and not of["if_rl"] and not of["rlhf_teacher"]
  assert of["multi_domain_rl"] == {"instruction"} and not of["mopd"]
  assert of["rlhf"] == {"instruction", "math", "stem", "structured", "tools"}
  assert of["swe_agentic_rl"] == of["rlhf"] | {"preference", "long_context", "code", "swe"}
  assert {gate.action for name in of for gate in whole.stages[name].get("gates", {}).values()} == {"warn"}


# Fields in which a `:smoke` form differs: sizes, counts, places, and what SFT of six steps needs to learn anything.
SIZES = {
  "model", "domains", "tokenizer", "sources", "source", "evaluation", "sandbox", "mesh", "prompts", "completions", "prompt_tokens",
  "total_tokens", "packing", "pieces", "rows", "row_tokens", "pairs", "heldout_pairs", "steps", "save_every", "samples",
  "samples_every", "refill_rounds", "look_ahead", "streams", "data_workers",
}  # fmt: skip
OF_SFT = {"init_from", "peak_lr", "warmup_steps"}


def differing(a, b, name: str = "") -> set[str]:
  """The names of the fields in which two configs differ; a name of SIZES stands for all that is in it."""
  if name not in SIZES and isinstance(a, dict) and isinstance(b, dict):
    return set().union(*(differing(a.get(key), b.get(key), key) for key in a.keys() | b.keys()))
  return {name} if a != b else set()


@pytest.mark.parametrize("slice_", meshes.SLICES)
def test_every_stage_is_a_file_whose_smoke_form_differs_in_sizes_alone(slice_):
  c, small = cascade.get_config(slice_), cascade.get_config(f"smoke,{slice_}")
  for config in (c, small):
    command.check(config)
  for name in c.order:
    file = importlib.import_module(f"configs.nano_30b.{name}")
    alone, alone_small = file.get_config(slice_), file.get_config(f"{slice_},smoke")
    command.KINDS[alone.kind].check(alone)
    for one, cascade_ in ((alone, c), (alone_small, small)):
      inside = {field: value for field, value in course.flat(cascade_, name).to_dict().items() if field != "gates"}
      assert one.to_dict() == inside
    of = differing(alone.to_dict(), alone_small.to_dict())
    assert of <= SIZES | (OF_SFT if name == "sft" else set()), name


def test_every_stage_of_the_smoke_form_has_prompts_and_rows_that_fit(tmp_path):
  small = cascade.get_config("smoke")
  command.check_programs(small, parts.build(small, tmp_path))


def test_a_misspelt_argument_is_answered_with_what_is_allowed():
  with pytest.raises(UserError, match="'v6p:4x4'.*smoke, .*v5p:8x8x8, v6e:16x16"):
    cascade.get_config("v6p:4x4")


def test_every_nucleus_has_a_correction(whole):
  for name in PAPER:
    c = whole.stages[name]
    assert c.rollout.top_p == 1 or c.correction in ("tis", "icepop", "sequence_mask")
