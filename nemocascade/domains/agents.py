"""The environments of the released RL data by agent name (`agent_ref.name`), and the domains that judge their rows."""

from nemocascade.domains.registry import DOMAINS

# Agent of NeMo Gym -> the built-in domain whose verifier judges its rows.
AGENTS: dict[str, str] = {
  "instruction_following_simple_agent": "instruction",
  "ifbench_simple_agent": "instruction",
  "mcqa_simple_agent": "stem",
  "swerl_llm_judge_simple_agent": "stem",
  "structured_outputs_simple_agent": "structured",
  "structured_outputs_v3_simple_agent": "structured",
  "structured_outputs_v4_simple_agent": "structured",
  "workplace_assistant_simple_agent": "tools",
  "code_gen_simple_agent": "code",
  "math_with_judge_simple_agent": "math",
  "math_with_autograder_simple_agent": "math",
  "reasoning_gym_simple_agent": "math",
  "genrm_simple_agent": "preference",
  "genrm_compare_simple_agent": "preference",
  "swerl_gen_simple_agent": "swe",
  "swe_pivot_tool_simulation_agent": "next_action",
  **{name: name for name in DOMAINS},  # Rows of our generators name the domain itself.
}

# Agents whose rows no built-in verifier can judge -> why not.
UNSUPPORTED: dict[str, str] = {
  "equivalence_llm_judge_simple_agent": "a judge model compares the answers, and there is none here",
  "swe_agents_val": "its tests run in a container image",
  "swe_agents_train": "its tests run in a container image",
}
