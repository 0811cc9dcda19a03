"""Tests of packing: every document appears once, no row is too long, and there are few rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemocascade.data.documents import Document
from nemocascade.data.packing import fill, pack
from nemocascade.errors import UserError


def document(*tokens, learned_from=1):
  return Document(np.array(tokens, np.int32), np.arange(len(tokens)) >= learned_from)


lengths_of = st.lists(st.integers(1, 12), max_size=60)


@settings(max_examples=200, deadline=None)
@given(lengths_of, st.integers(12, 30), st.integers(1, 70))
def test_every_document_is_in_one_row_and_every_row_fits(lengths, capacity, window):
  rows = pack(lengths, capacity=capacity, window=window)
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)


@settings(max_examples=200, deadline=None)
@given(lengths_of, st.integers(12, 30))
def test_no_two_rows_would_fit_into_one(lengths, capacity):
  sizes = [sum(lengths[i] for i in row) for row in pack(lengths, capacity=capacity)]
  smallest = sorted(sizes)[:2]
  assert len(sizes) < 2 or sum(smallest) > capacity


def by_definition(lengths, capacity):
  """Best-fit decreasing by a search over all rows."""
  rows = []
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    left = [capacity - sum(lengths[j] for j in row) for row in rows]
    fitting = [r for r in range(len(rows)) if left[r] >= lengths[i]]
    if fitting:
      rows[min(fitting, key=lambda r: left[r])].append(i)
    else:
      rows.append([i])
  return rows


@settings(max_examples=200, deadline=None)
@given(lengths_of, st.integers(12, 30))
def test_best_fit_is_best_fit(lengths, capacity):
  assert pack(lengths, capacity=capacity) == by_definition(lengths, capacity)


def test_by_hand():
  assert pack([3, 9, 4, 6, 1, 7], capacity=10) == [[1, 4], [5, 0], [3, 2]]


def test_random_lengths_leave_little_empty():
  lengths = np.random.default_rng(0).integers(20, 120, 2000)
  rows = pack(lengths, capacity=256)
  assert lengths.sum() / (256 * len(rows)) > 0.98


def test_a_document_longer_than_a_row_is_refused_by_name():
  with pytest.raises(UserError, match="document 1 has 11 tokens, a row holds 10"):
    pack([3, 11], capacity=10)


def test_an_empty_document_is_refused():
  with pytest.raises(UserError, match="document 2 is empty"):
    pack([3, 1, 0], capacity=10)


def test_filled_rows_hold_documents_left_to_right():
  batch = fill([[document(8, 9), document(5, 6, 7)], [document(4)]], T=6)
  np.testing.assert_array_equal(batch.tokens_BT, [[8, 9, 5, 6, 7, 0], [4, 0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch.segment_ids_BT, [[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch.loss_mask_BT, np.array([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool))
  assert [a.dtype for a in (batch.tokens_BT, batch.segment_ids_BT, batch.loss_mask_BT)] == [
    np.int32,
    np.int32,
    np.bool_,
  ]


def test_a_row_that_does_not_fit_is_refused():
  with pytest.raises(UserError, match="T=4"):
    fill([[document(5, 6, 7), document(8, 9)]], T=4)
