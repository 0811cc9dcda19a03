"""Tests of the scheduler: requests come, wait, are stopped and cancelled, and none notices the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import PATTERNS, STOP, P, T, V, hybrid, table, toy_engine
from tiny_checkpoint import TOKENIZER

from nemocascade.errors import UserError
from nemocascade.report.metrics import CompileCounter
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.sampling import Options
from nemocascade.rollout.scheduler import Request, Scheduler

pytestmark = pytest.mark.usefixtures("compiled_fast")

ENGINE = toy_engine()
REQUESTS = [
  Request([3], 19, 1), Request([4, 5, 6], 4, 2, Options(0.0)), Request([1, 1], 9, 3, Options(top_k=3)),
  Request([9, 8], 12, 4, Options(0.5, top_p=0.9)), Request([3], 19, 5), Request([7], 3, 6, Options(2.0, min_p=0.01)),
  Request([2, 2], 17, 7, stop_ids=[4]),
]  # fmt: skip


def scheduler(slots=2, look=3, **how):
  return Scheduler(ENGINE, table(), slots=slots, look=look, **how)


@functools.cache
def expected():
  """The answers of requests that are alone."""
  answers = []
  for request in REQUESTS:
    s = scheduler()
    number = s.submit(request)
    s.run()
    answers.append(s.answer(number))
  return answers


def assert_same(answer, other):
  assert (answer.tokens, answer.finish_reason) == (other.tokens, other.finish_reason)
  np.testing.assert_allclose(answer.logprobs, other.logprobs, atol=1e-6)
  np.testing.assert_allclose(answer.drawn_logprobs, other.drawn_logprobs, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(len(REQUESTS))), st.lists(st.integers(0, 3), min_size=7, max_size=7), st.integers(1, 8))
def test_answers_do_not_depend_on_arrival_or_looks(order, pauses, look):
  s, numbers = scheduler(look=look), {}
  for i, pause in zip(order, pauses, strict=True):
    numbers[i] = s.submit(REQUESTS[i])
    for _ in range(pause):
      s.step()
  s.run()
  for i, number in numbers.items():
    assert_same(s.answer(number), expected()[i])


def test_the_answers_differ_in_what_ended_them():
  assert {answer.finish_reason for answer in expected()} == {"stop", "length"}
  for request, answer in zip(REQUESTS, expected(), strict=True):
    new, stops = answer.tokens, {STOP, 2, *request.stop_ids}
    assert 0 < len(new) <= request.max_tokens and not stops & set(new[:-1])
    assert (new[-1] in stops) == (answer.finish_reason == "stop")
  assert all(answer.drawn_logprobs[0] >= answer.logprobs[0] for answer in expected())


def test_a_cancelled_request_keeps_its_tokens_and_the_others_get_theirs():
  long = max(range(len(REQUESTS)), key=lambda i: len(expected()[i].tokens))
  order = [long, *(i for i in range(len(REQUESTS)) if i != long)]
  s, last = scheduler(), order[-1]
  numbers = {i: s.submit(REQUESTS[i]) for i in order}
  s.step()
  half = list(s.answer(numbers[long]).tokens)
  for i in (long, last):  # One is in a slot, and one waits.
    s.cancel(numbers[i])
  s.run()
  assert s.answer(numbers[long]).tokens == half == expected()[long].tokens[:3]
  assert s.answer(numbers[long]).finish_reason == s.answer(numbers[last]).finish_reason == "cancelled"
  assert not s.answer(numbers[last]).tokens
  for i in order[1:-1]:
    assert_same(s.answer(numbers[i]), expected()[i])
  number = numbers[order[1]]
  s.cancel(number)
  assert s.answer(number).finish_reason != "cancelled"
  s.forget(number)
  with pytest.raises(KeyError):
    s.answer(number)


@pytest.mark.parametrize("request_, said", [
  (Request([]), "the prompt has 0 tokens"), (Request([1] * (P + 1)), f"{P + 1} tokens: allowed are 1 to {P}"),
  (Request([1, V]), f"token {V}: the model's are 0 to {V - 1}"), (Request([-1]), "token -1"),
  (Request([1], T), f"max_tokens={T}: after 1 tokens of the prompt, allowed are 1 to {T - 1}"),
  (Request([1], 0), "max_tokens=0"), (Request([1], 1, -1), "seed=-1"), (Request([1], 1, options=Options(-1.0)), "temperature"),
  (Request([1], 1, options=Options(1e-30)), "temperature 0 and 0.01 to 100"),
  (Request([1], 1, options=Options(top_p=0.0)), "top_p above 0"), (Request([1], 1, options=Options(float("nan"))), "temperature"),
  (Request([1], 1, stop_strings=["a"]), "need a tokenizer"),
])  # fmt: skip
def test_a_request_that_cannot_be_is_refused_and_the_next_one_is_answered(request_, said):
  s = scheduler()
  with pytest.raises(UserError, match=said):
    s.submit(request_)
  assert s.open == 0


def test_as_many_requests_as_slots_or_more_are_served_and_nothing_compiles_later():
  s = scheduler(likeliest=2)
  for number in [s.submit(request) for request in REQUESTS]:
    s.run()
    answer = s.answer(number)
    assert len(answer.likeliest) == len(answer.tokens) and all(a[0][1] >= a[1][1] for a in answer.likeliest)
  with CompileCounter() as compiled:
    for request in REQUESTS:
      s.submit(request)
      s.step()
    s.run()
  assert compiled.programs == []


# Texts: a model that says a given text, whatever its prompt.

WORDS = TOKENIZER.encode("the cat sat on the mat and thinks of 12")


def say(script_T, length_B):
  return 50 * jax.nn.one_hot(script_T[jnp.minimum(length_B - 1, len(script_T) - 1)], TOKENIZER.vocab_size)


SAYING = Engine(
  lambda script_T, tokens_BP, length_B, capacity: (say(script_T, length_B), length_B),
  lambda script_T, length_B, tokens_B, active_B: (length_B + active_B, say(script_T, length_B + active_B)),
  prompt_tokens=8, total_tokens=32,
)  # fmt: skip


def said(look=3, **how):
  s = Scheduler(SAYING, np.array(WORDS, np.int32), TOKENIZER, slots=2, look=look)
  number = s.submit(Request([5], 16, options=Options(0.0), **how))
  parts = list(s.stream(number))
  return s.answer(number), parts


@pytest.mark.parametrize("look", [1, 4])
def test_a_stop_string_ends_the_answer_before_it_and_is_never_streamed(look):
  answer, parts = said(look, stop_strings=["dog", "t on th"])
  assert answer.text == "the cat sa" == "".join(parts) and answer.finish_reason == "stop"
  assert len(answer.tokens) < len(WORDS)


def test_a_stop_string_that_never_comes_ends_nothing():
  answer, parts = said(stop_strings=["dog"])
  assert answer.finish_reason == "length" and len(answer.tokens) == 16 == len(answer.logprobs)
  assert "".join(parts) == answer.text == TOKENIZER.decode(answer.tokens)
  assert answer.text.startswith("the cat sat on the mat")


def test_a_request_with_nan_ends_with_an_error_beside_others():
  engine, params, *_ = hybrid(PATTERNS[0])
  params = params | {"embedding": params["embedding"].at[V - 1].set(jnp.nan)}
  answers = []
  for others in (False, True):
    s = Scheduler(engine, params, slots=2)
    numbers = [s.submit(Request([3, 4], 6, 1))]
    if others:
      numbers += [
        s.submit(Request([3, V - 1], 6, 2)),
        s.submit(Request([5, V - 1, 4], 6, 3)),
        s.submit(Request([3, 4], 6, 1)),
      ]
    s.run()
    answers.append([s.answer(number) for number in numbers])
  (alone,), (first, *sick, last) = answers
  assert [answer.finish_reason for answer in sick] == ["error"] * 2 and not sick[0].tokens
  assert first.tokens == alone.tokens == last.tokens and first.logprobs == alone.logprobs == last.logprobs
