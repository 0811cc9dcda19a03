"""The workplace: what its functions do, and that no arguments do harm."""

import threading

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemocascade.domains.workplace import DEFAULT_SNAPSHOT, FUNCTIONS, TABLES, Workplace

NASTY = ("'; DROP TABLE mail; --", "' OR '1'='1", "%", "_", '"', "\0", "\ud800", "é" * 2000, "")


def test_what_is_found_can_be_acted_on():
  office = Workplace()
  assert office.call("calendar_find", {"title": "standup"}) == "amber"
  assert office.call("calendar_move", {"id": "amber", "place": "roof"}) == "ok"
  assert office.call("calendar_cancel", {"id": "coral"}) == "ok"
  assert office.call("contact_find", {"name": "ann"}) == "ivory"
  assert office.call("mail_send", {"address": "ivory", "text": "bring cake"}) == "ok"
  assert office.state() == (
    ("calendar", ("amber", "standup", "roof")),
    ("contacts", ("Ann", "ivory"), ("Bob", "olive")),
    ("mail", ("ivory", "bring cake")),
  )


@pytest.mark.parametrize(
  "name, arguments, error",
  [
    ("calendar_fnid", {"title": "standup"}, "error: no function calendar_fnid"),
    ("calendar_find", {}, "error: missing title"),
    ("calendar_find", {"name": "standup"}, "error: no parameter name"),
    ("calendar_find", {"title": "standup", "x": "1"}, "error: no parameter x"),
    ("calendar_find", {"title": "  "}, "error: bad title "),
    ("calendar_find", {"title": ["standup"]}, "error: bad title ['standup']"),
    ("calendar_find", {"title": "picnic"}, "error: no event picnic"),
    ("calendar_find", None, "error: arguments are not an object"),
    ("calendar_move", {"id": "main", "place": "roof"}, "error: no event main"),
    ("calendar_move", {"id": "amber", "place": "roof 3"}, "error: bad place roof 3"),
    ("calendar_move", {"id": "amber", "place": "3"}, "error: bad place 3"),
    ("calendar_cancel", {"id": "main"}, "error: no event main"),
    ("contact_find", {"name": "Zed"}, "error: no contact Zed"),
    ("mail_send", {"address": "main", "text": "hi"}, "error: no address main"),
  ],
)
def test_a_wrong_call_is_answered_in_one_line_and_changes_nothing(name, arguments, error):
  office = Workplace()
  assert office.call(name, arguments) == error
  assert office.state() == Workplace().state()


@pytest.mark.parametrize("value", NASTY)
def test_no_value_is_read_as_sql(value):
  office = Workplace()
  for function in FUNCTIONS.values():
    result = office.call(function.name, dict.fromkeys(function.parameters, value))
    assert result.startswith("error: ") and "\n" not in result
  assert office.state() == Workplace().state()
  office.call("mail_send", {"address": "ivory", "text": "'; DROP TABLE mail; --"})
  assert office.state()[2] == ("mail", ("ivory", "'; DROP TABLE mail; --"))


@given(
  st.sampled_from([*FUNCTIONS, "other"]),
  st.dictionaries(
    st.sampled_from(["id", "title", "place", "name", "address", "text", "x"]),
    st.one_of(st.text(st.characters()), st.integers(), st.none(), st.booleans()),
  ),
)
def test_any_call_gives_one_short_line(name, arguments):
  result = Workplace().call(name, arguments)
  assert isinstance(result, str) and len(result.splitlines()) == 1 and len(result) < 80


def test_states_compare_by_content():
  one, other = Workplace(), Workplace({t: rows[::-1] for t, rows in DEFAULT_SNAPSHOT.items()})
  assert one.state() == other.state()
  for office, order in ((one, ("a", "b")), (other, ("b", "a"))):
    for text in order:
      office.call("mail_send", {"address": "ivory", "text": text})
  assert one.state() == other.state()
  one.call("mail_send", {"address": "ivory", "text": "a"})
  assert one.state() != other.state(), "a mail sent twice is another state"


def test_workplaces_share_nothing():
  one = Workplace()
  one.call("calendar_cancel", {"id": "amber"})
  assert Workplace().call("calendar_find", {"title": "standup"}) == "amber"


def test_an_empty_snapshot_is_an_empty_workplace():
  assert Workplace({}).state() == tuple((table,) for table in TABLES)


def test_another_thread_may_judge():
  office, states = Workplace(), []
  thread = threading.Thread(target=lambda: states.append(office.state()))
  thread.start()
  thread.join()
  assert states == [office.state()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_schemas_are_flat_functions_with_valid_parameters(name):
  schema = FUNCTIONS[name].schema()
  assert (schema["type"], schema["name"]) == ("function", name)
  jsonschema.Draft202012Validator.check_schema(schema["parameters"])
  assert schema["parameters"]["required"] == list(FUNCTIONS[name].parameters)
