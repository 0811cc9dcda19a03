"""The checkers of verifiable instructions, by instruction id."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemocascade.verifiers import ifbench, ifbench_formats, ifeval, sentences

MAX_CHARS = 200_000

CHECKERS: dict[str, ifeval.Checker] = {
  "change_case:capital_word_frequency": ifeval.capital_word_frequency,
  "change_case:english_capital": str.isupper,
  "change_case:english_lowercase": str.islower,
  "combination:repeat_prompt": ifeval.repeat_prompt,
  "combination:two_responses": ifeval.two_responses,
  "copy:copy": ifeval.copying,
  "copy:copying_multiple": ifeval.copying_multiple,
  "copy:copying_simple": ifeval.copying,
  "copy:repeat_phrase": ifeval.repeat_phrase,
  "count:conjunctions": ifbench.conjunctions,
  "count:count_increment_word": ifeval.count_increment_word,
  "count:count_unique": ifeval.count_unique,
  "count:counting_composition": ifeval.counting_composition,
  "count:keywords_multiple": ifbench.keywords_multiple,
  "count:lowercase_counting": ifeval.lowercase_counting,
  "count:numbers": ifbench.numbers,
  "count:person_names": ifbench.person_names,
  "count:pronouns": ifbench.pronouns,
  "count:punctuation": ifbench.punctuation,
  "count:unique_word_count": ifbench.unique_word_count,
  "count:word_count_range": ifbench.word_count_range,
  "count:words_japanese": ifbench.words_japanese,
  "custom:character_reverse": ifbench_formats.character_reverse,
  "custom:csv_city": ifbench_formats.csv_city,
  "custom:csv_quotes": ifbench_formats.csv_quotes,
  "custom:csv_special_character": ifbench_formats.csv_special_character,
  "custom:date_format_list": ifbench_formats.date_format_list,
  "custom:european_capitals_sort": ifbench_formats.european_capitals,
  "custom:mcq_count_length": ifbench_formats.mcq_count_length,
  "custom:multiples": ifbench_formats.multiples,
  "custom:reverse_newline": ifbench_formats.reverse_newline,
  "custom:sentence_alphabet": ifbench_formats.sentence_alphabet,
  "custom:word_reverse": ifbench_formats.word_reverse,
  "detectable_content:number_placeholders": ifeval.number_placeholders,
  "detectable_content:postscript": ifeval.postscript,
  "detectable_format:bigram_wrapping": ifeval.bigram_wrapping,
  "detectable_format:constrained_response": ifeval.constrained_response,
  "detectable_format:json_format": ifeval.json_format,
  "detectable_format:multiple_sections": ifeval.multiple_sections,
  "detectable_format:number_bullet_lists": ifeval.number_bullet_lists,
  "detectable_format:number_highlighted_sections": ifeval.number_highlighted_sections,
  "detectable_format:sentence_hyphens": ifeval.sentence_hyphens,
  "detectable_format:square_brackets": ifeval.square_brackets,
  "detectable_format:title": ifeval.title,
  "first_word:first_word_answer": ifeval.first_word_answer,
  "first_word:first_word_sent": ifeval.first_word_sent,
  "format:emoji": ifbench_formats.emojis,
  "format:line_indent": ifbench_formats.line_indent,
  "format:list": ifbench_formats.separated_list,
  "format:newline": ifbench_formats.newline,
  "format:no_bullets_bullets": ifbench_formats.no_bullets_bullets,
  "format:no_whitespace": ifbench_formats.no_whitespace,
  "format:options": ifbench_formats.options,
  "format:output_template": ifbench_formats.output_template,
  "format:parentheses": ifbench_formats.parentheses,
  "format:quote_unquote": ifbench_formats.quote_unquote,
  "format:quotes": ifbench_formats.quotes,
  "format:sub-bullets": ifbench_formats.sub_bullets,
  "format:thesis": ifbench_formats.thesis,
  "format:title_case": ifbench_formats.title_case,
  "keywords:exclude_word_harder": ifeval.exclude_word_harder,
  "keywords:existence": ifeval.existence,
  "keywords:forbidden_words": ifeval.forbidden_words,
  "keywords:frequency": ifeval.frequency,
  "keywords:keyword_specific_position": ifeval.keyword_specific_position,
  "keywords:letter_frequency": ifeval.letter_frequency,
  "keywords:no_adjacent_consecutive": ifeval.no_adjacent_consecutive,
  "keywords:palindrome": ifeval.palindrome,
  "keywords:start_end": ifeval.start_end,
  "keywords:word_count_different_numbers": ifeval.frequency,
  "keywords:word_once": ifeval.word_once,
  "language:response_language": ifeval.response_language,
  "last_word:last_word_answer": ifeval.last_word_answer,
  "last_word:last_word_sent": ifeval.last_word_sent,
  "length_constraints:nth_paragraph_first_word": ifeval.nth_paragraph_first_word,
  "length_constraints:number_paragraphs": ifeval.number_paragraphs,
  "length_constraints:number_sentences": ifeval.number_sentences,
  "length_constraints:number_words": ifeval.number_words,
  "letters:letter_counting": ifeval.letter_counting,
  "letters:letter_counting2": ifeval.letter_frequency,
  "new:copy_span_idx": ifeval.copy_span_idx,
  "paragraphs:paragraphs": ifeval.two_paragraphs("***"),
  "paragraphs:paragraphs2": ifeval.two_paragraphs("\n\n"),
  "punctuation:no_comma": ifeval.without(","),
  "punctuation:punctuation_dot": ifeval.without("."),
  "punctuation:punctuation_exclamation": ifeval.without("!"),
  "ratio:overlap": ifbench.overlap,
  "ratio:sentence_balance": ifbench.sentence_balance,
  "ratio:sentence_type": ifbench.sentence_type,
  "ratio:sentence_words": ifbench.sentence_words,
  "ratio:stop_words": ifbench.stop_words,
  "repeat:repeat_change": ifbench_formats.repeat_change,
  "repeat:repeat_simple": ifbench_formats.repeat_simple,
  "repeat:repeat_span": ifbench_formats.repeat_span,
  "sentence:alliteration_increment": ifbench.alliteration_increment,
  "sentence:increment": ifbench.increment,
  "sentence:keyword": ifbench.sentence_keyword,
  "startend:end_checker": ifeval.end_checker,
  "startend:quotation": ifeval.quotation,
  "words:alphabet": ifbench.alphabet,
  "words:consonants": ifbench.consonants,
  "words:keywords_specific_position": ifbench.keywords_specific_position,
  "words:last_first": ifbench.last_first,
  "words:no_consecutive": ifbench.no_consecutive,
  "words:odd_even_syllables": ifbench.odd_even_syllables,
  "words:palindrome": ifbench.palindromes,
  "words:paragraph_last_first": ifbench.paragraph_last_first,
  "words:prime_lengths": ifbench.prime_lengths,
  "words:repeats": ifbench.repeats,
  "words:vowel": ifbench.vowels,
  "words:words_position": ifbench.words_position,
}


def prepare() -> None:
  """Loads tokenizers and word lists in advance. `limited` calls this once per process, before its clock starts."""
  sentences.tokens("Ready.")
  ifbench.odd_even_syllables("Ready.")
  ifbench_formats.emojis("Ready.")


def check(text: str, names: Sequence[str], arguments: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
  """Checks the text against each instruction.

  Returns:
    {"kept": [whether the text follows each instruction]}, or {"row": reason} if the arguments do not
    fit their checker.
  """
  kept = []
  for name, given in zip(names, arguments, strict=True):
    try:
      kept.append(follows(text, name, given))
    except (TypeError, KeyError, AttributeError, IndexError) as error:
      return {"row": f"{name}: {type(error).__name__}: {error}"}
    except (ValueError, csv.Error, RecursionError):  # The text is not in the required format.
      kept.append(False)
  return {"kept": kept}


def follows(text: str, instruction_id: str, arguments: Mapping[str, Any] | None) -> bool:
  """Whether the text follows the instruction. False if it is empty or longer than MAX_CHARS.

  Arguments may be padded with nulls, and may hold integers as floats: released rows do both.
  """
  checker = CHECKERS[instruction_id]
  if not text.strip() or len(text) > MAX_CHARS:
    return False
  given = {key: value for key, value in (arguments or {}).items() if value is not None}
  return bool(checker(text, **{key: _whole(value) for key, value in given.items()}))


def _whole(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    raise TypeError(f"{value} is not a finite number")
  return int(value) if isinstance(value, float) and value.is_integer() else value
