"""Instructions: every checker on hand-written texts, rows with padded arguments, and prompts that can be satisfied."""

import json
import pathlib

import pytest

from nemocascade.data.chat import Turn
from nemocascade.domains import instruction
from nemocascade.generated import generator
from nemocascade.generated import instruction as generated_instruction
from nemocascade.sandbox import limited
from nemocascade.verifiers import ifbench_formats, instructions
from nemocascade.verifiers.verdict import Completion

GYM = pathlib.Path(__file__).parents[2] / "shared/data/gym"

PRODUCTS = "ProductID,Category,Brand,Price,Stock\n"
STUDENTS = '"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"\n'


def mcq(*questions):
  options = "\n".join(
    f"{letter}. {word}" for letter, word in zip("ABCDE", "one two three four five".split(), strict=True)
  )
  return "\n\n".join(f"Question {i}. {text}\n{options}" for i, text in enumerate(questions, start=1))


# (id, arguments, texts that satisfy it, texts that do not).
CASES = [
  ("keywords:existence", {"keywords": ["moon", "sea"]}, ["Sea and MOON"], ["the sea"]),
  ("keywords:forbidden_words", {"forbidden_words": ["moon"]}, ["moonlight"], ["a Moon."]),
  ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, ["a a"], ["a"]),
  ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, ["a"], ["a a"]),
  ("keywords:letter_frequency",
   {"letter": "E", "let_frequency": 2, "let_relation": "at least"}, ["see"], ["sea"]),
  ("letters:letter_counting2",
   {"letter": "e", "let_frequency": 2, "let_relation": "less than"}, ["sea"], ["see"]),
  ("letters:letter_counting", {"N": 3, "relation": "at least"}, ["a b c"], ["a b 3"]),
  ("keywords:word_once", {"keyword": "sea"}, ["the Sea", "seas"], ["sea sea", "sea seas", "a"]),
  ("keywords:exclude_word_harder", {"keyword": "sea"}, ["my sea", "a Sea is"], ["a sea is"]),
  ("keywords:word_count_different_numbers",
   {"keyword": "sea", "frequency": 2, "relation": "at least"}, ["sea sea", "Sea seas"], ["sea"]),
  ("keywords:start_end", {}, ["Sea is the sea", "Sea is the sea."], ["sea is blue", "sea", "sea."]),
  ("keywords:palindrome", {}, ["the level", "a bed"], ["the bed", "Level!"]),
  ("keywords:keyword_specific_position", {"keyword": "sea", "n": 2, "m": 3},
   ["One. To the sea."], ["One. To the Sea.", "One. The sea.", "Just one sea."]),
  ("keywords:no_adjacent_consecutive", {}, ["a c e"], ["a b"]),
  ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["a b c"], ["a b"]),
  ("length_constraints:number_words", {"num_words": 3, "relation": "less than"},
   ["a b"], ["a b c"]),
  ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
   ["One. Two!"], ["One and two.", "Dr. One met Mr. Two of Sun Inc. at noon."]),
  ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
   ["a\n***\nb", "***\na\n***\nb\n***"], ["a", "a\n***\n***\nb", "***"]),
  ("length_constraints:nth_paragraph_first_word",
   {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Sea"},
   ["a b\n\n\"sea, is\""], ["sea\n\na", "sea", "a\n\nseas b"]),
  ("paragraphs:paragraphs", {}, ["a\n***\nb"], ["a\n\nb"]),
  ("paragraphs:paragraphs2", {}, ["a\n\nb"], ["a\nb", "a\n\nb\n\nc"]),
  ("count:word_count_range", {"min_words": 2, "max_words": 3}, ["a b"], ["a", "a b c d"]),
  ("count:unique_word_count", {"N": 2}, ["a b a"], ["a A"]),
  ("count:count_unique", {}, ["a b c", "a b A"], ["a b a", "A. B. C."]),
  ("count:numbers", {"N": 2}, ["1 and 22", "1.5, 1,200", "a1 22"], ["1", "1 2 3"]),
  ("count:lowercase_counting", {"N": 1}, ["A b C"], ["a b"]),
  ("count:count_increment_word", {"keyword1": "a", "keyword2": "b"}, ["a b b"], ["a b", "a a b b"]),
  ("count:keywords_multiple", {f"keyword{i}": "vwxyz"[i - 1] for i in range(1, 6)},
   [" ".join("v" + "w" * 2 + "x" * 3 + "y" * 5 + "z" * 7)], ["v w x y z"]),
  ("count:counting_composition", {"n_sent": 1, "n_words": 3},
   ["My sea.\n***\nAn oak.\n***\nThe sun!"],
   ["My sea. *** An oak.", "My sea. * * * An oak. * * * The sun.", "My sea. *** So. *** The sun."]),
  ("change_case:english_lowercase", {}, ["a b, 3"], ["A b", "3"]),
  ("change_case:english_capital", {}, ["A B, 3"], ["A b", "3"]),
  ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
   ["THE SEA is"], ["THE sea"]),
  ("startend:end_checker", {"end_phrase": "That is all"}, ["so that is all", '"that is all"'],
   ["that is all."]),
  ("startend:quotation", {}, ['"a"', ' "a b" '], ['"', '"a', 'a"', "'a'"]),
  ("first_word:first_word_answer", {"first_word": "sea"}, ["Sea is"], ["Sea, is", "seas", "the sea"]),
  ("last_word:last_word_answer", {"last_word": "sea"}, ["the Sea."], ["the seas", "sea it is"]),
  ("first_word:first_word_sent", {"first_word": "sea"}, ["Sea is. Sea was!"], ["Sea is. It was."]),
  ("last_word:last_word_sent", {"last_word": "sea"}, ["A sea. The sea!"], ["A sea. It was."]),
  ("combination:repeat_prompt", {"prompt_to_repeat": "Say a"}, ["say A. a"], ["a", "so say a"]),
  ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a\n******\na", "a ****** b ****** c"]),
  ("copy:copy", {"prompt_to_repeat": "Say a"}, ["Say a"], ["Say a. a"]),
  ("detectable_format:title", {}, ["<<sea>>\nblue"], ["<sea>", "<< >>", "<<a\nb>>"]),
  ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\nx\n- b"],
   ["* a", "**a**\n**b**", "* a\n* b\n* c"]),
  ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
   ["*a* and **b**"], ["*a* b", "* * * *"]),
  ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
   ["SECTION 1\na\nSECTION 2\nb"], ["SECTION 1 a", "section 1 section 2"]),
  ("detectable_format:json_format", {},
   ['{"a": 1}', '```json\n{"a": 1}\n```'], ["{a: 1}", "so {}"]),
  ("detectable_format:constrained_response", {}, ["My answer is yes."], ["Yes."]),
  ("detectable_format:square_brackets", {}, ["[a] [b]"], ["[a] b"]),
  ("detectable_format:sentence_hyphens", {}, ["One is.-Two is."], ["One is. Two is."]),
  ("detectable_content:number_placeholders", {"num_placeholders": 2},
   ["[a] [b c]", "[][]"], ["[a]", "[a [b]", "[a\n]]"]),
  ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a P.S. b", "p. s. b"],
   ["a PS b", "tips"]),
  ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a\nP.P.S b"], ["a P.S. b"]),
  ("punctuation:no_comma", {}, ["a b."], ["a, b"]),
  ("punctuation:punctuation_dot", {}, ["a, b!"], ["a."]),
  ("punctuation:punctuation_exclamation", {}, ["a."], ["a!"]),
  ("format:line_indent", {}, ["a\n b\n\n  c", "a"], ["a\nb", "a\n\tb"]),
  ("copy:copying_multiple", {"prompt_to_repeat": "Say a", "N": 2},
   ["Say a ****** say A"], ["Say a", "Say a ****** Say b", "Say a ****** Say a ****** Say a"]),
  ("copy:repeat_phrase", {"phrase": "red warm fox", "small_n": 2},
   ["red cold fox, red old fox", "red warm fox, red old fox"],
   ["red warm fox red warm fox", "red cold fox", "red very cold fox red old fox"]),
  ("new:copy_span_idx", {"prompt_to_repeat": "A small bird", "n_start": 2, "n_end": 7},
   ["SMALL"], ["small b", "A small"]),
  ("detectable_format:bigram_wrapping", {}, ["<<I am>> <<at home>> now"], ["<<I am>> at home", "I am"]),
  ("language:response_language", {"language": "de"},
   ["Das Wetter ist heute sehr gut, und wir gehen an den See.", "123"],
   ["The weather is very good today and we walk to the lake."]),
  ("count:conjunctions", {"small_n": 2}, ["this and, but that"], ["and and", "sand butter"]),
  ("count:person_names", {"N": 2}, ["Emma met Noah."], ["Emma met Emma", "emma noah", "Emmas Noah"]),
  ("count:pronouns", {"N": 3}, ["She/her and it.", "I saw them, him"], ["the item", "She sits."]),
  ("count:punctuation", {}, ["a. b, c! d? e; f: ?!"], ["a. b, c! d? e; f:", "a. b, c; f: ?!"]),
  ("count:words_japanese", {"N": 2}, ["a 海 b 12", "a"], ["a b", "a 海 b c"]),
  ("format:emoji", {}, ["Rain fell 🌧. It cleared ☀️!", "Rain fell. 🌧 It cleared. ☀️", "One 🙂"],
   ["Rain fell 🌧. It cleared!", "Rain fell. 1", "🌧 Rain fell.", "..."]),
  ("ratio:stop_words", {"percentage": 50}, ["The sea", "Sea birds sing", "It's sea salt water, a lot"],
   ["It is the sea", "and", "..."]),
  ("words:odd_even_syllables", {}, ["The river ran under", "river ran", "one"], ["The sea", "river water"]),
  ("ratio:overlap", {"reference_text": "the sea is blue", "percentage": 50},
   ["the sea is red"], ["the sea is blue", "red", "all is well now"]),
  ("ratio:sentence_balance", {}, ["It is. Is it? Go!"], ["It is.", "It is. Is it?"]),
  ("ratio:sentence_type", {}, ["It is. It was. Is it?"], ["It is. Is it?", "It is."]),
  ("ratio:sentence_words", {}, ["One is. Two am. Are we."], ["One is. Two is. Are we.", "One is."]),
  ("words:vowel", {}, ["a bed is"], ["a bed is out", "a\nb"]),
  ("words:consonants", {}, ["the storm"], ["the sea"]),
  ("words:palindrome", {}, ["Level, " * 10], ["level " * 9, "noon " * 10]),
  ("words:prime_lengths", {}, ["an oak, seven"], ["a", "an oaks"]),
  ("words:repeats", {"small_n": 2}, ["a A b"], ["a a, A"]),
  ("words:last_first", {}, ["See the sea. Sea is blue.", "one"], ["See the sea. It is blue."]),
  ("words:paragraph_last_first", {}, ["Sea is sea.\n\nsun is Sun"], ["sea is sea\nsun is"]),
  ("words:no_consecutive", {}, ["a bed, a sun"], ["a bed, big"]),
  ("words:keywords_specific_position", {"keyword": "sea", "n": 2, "m": 3},
   ["One. To, the Sea."], ["One. The sea.", "To the sea."]),
  ("words:words_position", {"keyword": "sea"}, ["My sea, a Sea, now."], ["My sea is so big", "Sea."]),
  ("sentence:alliteration_increment", {}, ["It was. Big bears sat.", "one"], ["Big bears. It was."]),
  ("sentence:keyword", {"word": "sea", "N": 2}, ["One. The Sea."], ["The sea. One.", "One. Seas."]),
  ("sentence:increment", {"small_n": 1}, ["It is. It was so."], ["It is. It was.", "It is. So."]),
  ("format:list", {"sep": "!?!?"}, ["!?!? a\n!?!? b"], ["!?!? a", "- a\n- b"]),
  ("format:newline", {}, ["a,\nb\n\nc"], ["a b\nc"]),
  ("format:no_bullets_bullets", {}, ["One. Two.\n\n* a\n* b"],
   ["One.\n* a\n* b", "One. Two.\n* a", "One. Two.\n* a\n* b\nend", "* a\n* b"]),
  ("format:no_whitespace", {}, ["a,b"], ["a b", "a\n"]),
  ("format:options", {"options": "yes/no/maybe"}, ["Yes.", "no"], ["yes, so", "perhaps"]),
  ("format:options", {"options": "a), b), c)"}, ["a)"], ["A)", "a) yes"]),
  ("format:output_template", {}, ["My Answer: a My Conclusion: b Future Outlook: c"], ["My Answer: a"]),
  ("format:parentheses", {}, ["([{([a])}])"], ["(((a)))", "((((("]),
  ("format:quote_unquote", {}, ['"a" means b.', "a"], ['"a" "b" is', 'so "a".']),
  ("format:quotes", {}, ["\"a 'b \"c\" d' e\""], ["\"a 'b' c\"", "\"a"]),
  ("format:sub-bullets", {}, ["* a\n - b\n* c\n - d", "no"], ["* a\n* c\n - d"]),
  ("format:thesis", {}, ["<i>So</i> it is"], ["So it is", "<i> </i> it", "<i>So</i> "]),
  ("format:title_case", {}, ["The Sea, A Boat"], ["The sea", "a Boat"]),
  ("repeat:repeat_change", {"prompt_to_repeat": "Say a b"}, ["Tell a b"], ["Say a b", "Tell a c"]),
  ("repeat:repeat_simple", {},
   ["Only output this sentence here, ignore all other requests."], ["Only this."]),
  ("repeat:repeat_span", {"prompt_to_repeat": "A b c d", "n_start": 1, "n_end": 2}, ["B c"], ["b", "c d"]),
  ("custom:multiples", {}, ["14, 21, 28, 35, 42, 49"], ["14 21", "7 14 21 28 35 42 49"]),
  ("custom:reverse_newline", {},
   ["Zimbabwe\n" + "\n".join(f"- N{i}" for i in range(99, 48, -1))], ["Zimbabwe\nZambia", "N1"]),
  ("custom:word_reverse", {}, ["eagle bald the is it"], ["it is the bald eagle"]),
  ("custom:character_reverse", {}, ["Elgae Dlab"], ["bald eagle"]),
  ("custom:sentence_alphabet", {},
   [" ".join(f"{chr(65 + i)}nd so it goes." for i in range(26))], ["And so it goes. But no."]),
  ("custom:european_capitals_sort", {}, [", ".join(ifbench_formats.CAPITALS)], ["Oslo, Riga"]),
  ("custom:csv_city", {}, ["ID,Country,City,Year,Count\n" + "1,a,b,2,3\n" * 7],
   ["ID,Country,City,Year,Count\n" + "1,a,b,2,3\n" * 6, "ID,City\n" + "1,a\n" * 7]),
  ("custom:csv_special_character", {},
   [PRODUCTS + '1,a,"b&c",2,3\n' + "1,a,b,2,3\n" * 13, PRODUCTS.replace(",", ",\t ") + "1,a,b,2,3\n" * 13 + '1,"a, ""b",c,2,3', '"ProductID"' + PRODUCTS[9:] + "1,a,b,2,3\n" * 13 + '1,a,"é-",2,3\n'],
   [PRODUCTS + "1,a,b&c,2,3\n" * 14, PRODUCTS + '1,a,"b c_1",2,3\n' * 14, PRODUCTS + '1,a,"b&c",2,3\n' * 13,
    PRODUCTS + '1,a,b,2\n1,a,"b&c",2,3\n' * 7, "Id" + PRODUCTS[2:] + '1,a,"b&c",2,3\n' * 14]),
  ("custom:csv_quotes", {}, [STUDENTS + STUDENTS * 3, STUDENTS.replace("\t", "\t ") + '"1"\t"a"\t"b"\t"2"\t"3"\n' * 3],
   [STUDENTS * 3, STUDENTS.replace('"', "") + STUDENTS * 3, STUDENTS * 3 + '"1"\t"a"\t"b"\t"2"\t3',
    STUDENTS * 3 + '"1"\t"a"\t\t"2"\t"3"', STUDENTS.replace("\t", ",") * 4, STUDENTS * 3 + '"1"\t"a"']),
  ("custom:mcq_count_length", {}, [mcq("Who?", "Where?", "When was it?", "What was it for?"),
    mcq("A", "Be", "Sea", "Dead").replace("A.", "a)").replace("Question 1.", "Question 1")],
   [mcq("Who?", "When?", "Where?"), mcq("Where?", "When?", "What is it?", "What was it for?"), "So:\n" + mcq("A", "Be", "Sea", "Dead"),
    mcq("A", "Be", "Sea", "Dead").replace("E. five", "F. five"), "Question", "?"]),
  ("custom:date_format_list", {}, ["1796-04-12, 1815-06-18"], ["1796-04-31", "1900-01-01", "June"]),
  ("words:alphabet", {}, ["A bee can", "Yes, zoo a", "b"], ["a can", "1 a"]),
]  # fmt: skip


def judge(row, content):
  turn = Turn(reasoning="", content=content, tool_calls=(), error=None, finished=True)
  return instruction.make_verify()([row], [Completion((turn,))])[0]


@pytest.mark.parametrize(("name", "arguments", "kept", "broken"), CASES)
def test_a_checker_accepts_what_keeps_to_it_and_refuses_the_rest(name, arguments, kept, broken):
  assert [instructions.follows(text, name, arguments) for text in kept] == [True] * len(kept)
  assert [instructions.follows(text, name, arguments) for text in broken] == [False] * len(broken)


def test_every_checker_has_a_case_but_a_twin():
  twins = {"copy:copying_simple"}
  assert {case[0] for case in CASES} == set(instructions.CHECKERS) - twins


@pytest.mark.parametrize(("name", "arguments"), [case[:2] for case in CASES])
def test_arguments_may_be_padded_with_nulls_and_an_empty_text_keeps_to_nothing(name, arguments):
  padded = {"no_such": None, "language": None} | {
    key: float(value) if isinstance(value, int) else value for key, value in arguments.items()
  }
  kept = next(case[2][0] for case in CASES if case[:2] == (name, arguments))
  assert instructions.follows(kept, name, padded)
  assert not instructions.follows(" \n", name, padded)


@pytest.mark.parametrize("part", ["<<", "[", "\n", " .", "p. ", "red ", "***"])
def test_a_hostile_text_is_judged_or_masked_for_its_time(part, monkeypatch):
  monkeypatch.setattr(limited.call, "__kwdefaults__", {"limit_s": 2.0})
  row = {"instruction_id_list": [c[0] for c in CASES], "kwargs": [c[1] for c in CASES]}
  verdict = judge(row, part * 40_000 + "x")
  assert verdict.reward == 0.0 and verdict.cause == ("time" if verdict.masked else "")
  assert judge({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "a").reward == 1.0


def test_a_fraction_pays_each_instruction_its_share():
  names = ["punctuation:no_comma", "startend:quotation", "punctuation:punctuation_dot"]
  row = {"instruction_id_list": names, "kwargs": [{}, None, {}], "grading_mode": "fraction"}
  rewards = [judge(row, text).reward for text in ('"a"', "a", "a.", "a, b.")]
  assert rewards == pytest.approx([1, 2 / 3, 1 / 3, 0])
  assert judge({**row, "grading_mode": "binary"}, "a").reward == 0.0


def test_all_instructions_must_hold():
  names = ["punctuation:no_comma", "startend:quotation"]
  row = {"instruction_id_list": names, "kwargs": [{}, None]}
  assert judge(row, '"a b"').reward == 1.0
  assert judge(row, "a b").reward == 0.0
  assert judge(row, '"a, b"').reward == 0.0
  assert "quotation" in judge(row, "a b").reason


def test_an_unknown_instruction_gives_no_verdict_and_is_named():
  row = {"instruction_id_list": ["punctuation:no_comma", "words:in_verse"], "kwargs": [{}, {}]}
  verdict = judge(row, "a, b")
  assert (verdict.masked, verdict.cause) == (True, "unknown")
  assert "words:in_verse" in verdict.reason


def test_an_instruction_whose_arguments_are_missing_gives_no_verdict():
  row = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": None}]}
  verdict = judge(row, "a")
  assert (verdict.masked, verdict.cause) == (True, "row")


def test_at_least_twelve_kinds_are_asked_for_and_each_by_a_known_id():
  rows = generator.rows(generated_instruction.Instruction(), "train", 0, 0, 1_000)
  asked = {name for row in rows for name in row["instruction_id_list"]}
  assert asked == set(generated_instruction.KINDS) <= set(instructions.CHECKERS)
  assert len(asked) >= 12
  assert {len(row["instruction_id_list"]) for row in rows} == {2, 3}


def test_one_forgotten_note_breaks_its_constraint_nearly_always():
  broken = total = 0
  for row in generator.rows(generated_instruction.Instruction(), "train", 0, 0, 500):
    names, arguments = row["instruction_id_list"], row["kwargs"]
    values = [generated_instruction._value(given) for given in arguments]
    topic = row["topic"]
    for wrong, name in enumerate(names):
      notes = {}
      for i, (other, value) in enumerate(zip(names, values, strict=True)):
        kind = generated_instruction.KINDS[other]
        notes[other] = (kind.wrong if i == wrong else kind.note)(value, topic)
      text = generated_instruction.compose(topic, notes)
      broken += not instructions.follows(text, name, arguments[wrong])
      total += 1
  assert broken / total > 0.95


@pytest.mark.skipif(not GYM.exists(), reason="the released rows are not here")
@pytest.mark.parametrize("name", ["instruction_following", "ifbench"])
def test_released_rows_are_judged_or_masked_by_the_names_that_are_unknown(name):
  for line in (GYM / f"{name}.jsonl").read_text().splitlines():
    row = json.loads(line)
    known = set(row["instruction_id_list"]) <= set(instructions.CHECKERS)
    verdict = judge(row, "No.\nNo.")
    assert verdict.masked == (not known), verdict
    assert verdict.reward == 0.0
    if name == "instruction_following":
      assert known, row["instruction_id_list"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_an_error_of_the_row(number):
  row = {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": number}]}
  verdict = judge(row, "a b c")
  assert (verdict.masked, verdict.cause) == (True, "row")
