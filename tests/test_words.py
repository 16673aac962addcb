"""The store of sentences: the same in both languages, spelled as agreed, filled in completely."""

import re

import pytest
from markupsafe import Markup

from batchnorm import words

SECTIONS = ("walkthrough", "report")
BRITISH = re.compile(r"[a-z]*(?:alis|eris|olour|entre\b|eighbour)[a-z]*", re.IGNORECASE)


@pytest.mark.parametrize("section", SECTIONS)
def test_both_languages_have_the_same_keys_and_placeholders(section):
    english, chinese = (words.read_texts(section, lang) for lang in words.LANGUAGES)
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert words.placeholders(text) == words.placeholders(chinese[key]), key


@pytest.mark.parametrize("section", SECTIONS)
def test_english_is_spelled_the_american_way(section):
    for key, text in words.read_texts(section, "en").items():
        assert not BRITISH.search(text), key


@pytest.mark.parametrize("section", SECTIONS)
def test_chinese_is_written_in_the_terms_of_the_book(section):
    text = "\n".join(words.read_texts(section, "zh").values())
    for term in ("批量规范化", "拉伸参数", "偏移参数", "移动平均", "小批量"):
        assert term in text
    for term in ("你", "您", "归一化", "批归一", "滑动平均", "缩放参数"):
        assert term not in text


@pytest.mark.parametrize("section", SECTIONS)
def test_chinese_punctuation_is_full_width(section):
    for key, text in words.read_texts(section, "zh").items():
        assert not re.search(r"[\u4e00-\u9fff] ?[,;:!?]|[\u4e00-\u9fff]\.(?!\w)", text), key


def test_a_sentence_is_filled_in():
    assert (
        words.speak("walkthrough", "en", str)("var.title", unit="row") == "The variance of each row"
    )
    assert words.speak("walkthrough", "zh", str)("var.title", unit="通道") == "每个通道的方差"


def test_markup_escapes_the_values_and_not_the_sentence():
    text = words.speak("report", "en", Markup)("notice.nothing", run="<i>")
    assert isinstance(text, Markup)
    assert text.startswith("<b>&lt;i&gt;</b>")


def test_a_missing_value_is_named():
    with pytest.raises(
        KeyError, match=r"walkthrough: the text 'var.text' needs a value for count\."
    ):
        words.speak("walkthrough", "en", str)("var.text", unit="row")


def test_a_missing_key_is_named():
    with pytest.raises(KeyError, match="nonsense"):
        words.speak("report", "zh", str)("nonsense")


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match=r"^report: lang is one of en, zh, got 'fr'; pick one"):
        words.speak("report", "fr", str)
