"""What a class may be called, in training and in what people send in."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.ml.class_names import normalize_class_name, why_no_folder

at_least_100 = hypothesis_settings(max_examples=150, deadline=None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Paneer Tikka", "paneer_tikka"),
        ("paneer-tikka", "paneer_tikka"),
        ("  Pav   Bhaji ", "pav_bhaji"),
        ("pav\u2013bhaji", "pav_bhaji"),
        (".Dal", "dal"),
        ("=1+1", "1+1"),
        ("@dal", "dal"),
        ("cre\u0301me BRU\u0302LE\u0301E", "cr\u00e9me_br\u00fbl\u00e9e"),
        ("---", ""),
        # Any kind of space parts words.
        ("pot\u00a0au\u202ffeu", "pot_au_feu"),
        ("\u7261\u4e39\u3000\u9905", "\u7261\u4e39_\u9905"),
        ("mac\u2009and\u2003cheese", "mac_and_cheese"),
        # The joiners of Persian, Hindi and emoji are part of the word, at its ends of nothing.
        (
            "\u0642\u0631\u0645\u0647\u200c\u0633\u0628\u0632\u06cc",
            "\u0642\u0631\u0645\u0647\u200c\u0633\u0628\u0632\u06cc",
        ),
        ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937"),
        ("\U0001f468\u200d\U0001f373", "\U0001f468\u200d\U0001f373"),
        ("\u200cdal\u200d", "dal"),
        ("\u200c\u200d", ""),
        # What is not seen is dropped: soft hyphen, marks of direction, byte order mark.
        ("rat\u00ada\u00adtouille", "ratatouille"),
        ("\u202edal\u202c\u200f", "dal"),
        ("\ufeffdal", "dal"),
        ("dal\u200b\u2060", "dal"),
        ("42", "42"),
        ("CON", "con"),
        ("x" * 255, "x" * 255),
    ],
)
def test_class_names_are_normalized(name: str, expected: str) -> None:
    assert normalize_class_name(name) == expected


@at_least_100
@given(st.text())
def test_a_normalized_name_stays_as_it_is(name: str) -> None:
    once = normalize_class_name(name)
    assert normalize_class_name(once) == once
    assert once == once.strip() and not once.startswith((".", "_", "\u200c", "\u200d"))


@at_least_100
@given(st.text(), st.sampled_from(["NFC", "NFD"]))
def test_the_ways_to_write_an_accent_are_one_name(name: str, form: str) -> None:
    assert normalize_class_name(unicodedata.normalize(form, name)) == normalize_class_name(name)


# Names that become folders --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "no letter or digit") for name in ("", "...", "🍕", "&")),
        *((name, "no folder may have") for name in ("a/b", "..\\x", "c:dal", "dal\0", "a\ud800")),
        ("x" * 121, "longer than"),
        *((name, "operating systems") for name in ("con", "com1.jpg", "lost+found", "dal.")),
    ],
)
def test_a_name_that_cannot_be_a_folder_is_refused(name: str, reason: str) -> None:
    assert reason in (why_no_folder(name) or "")


@pytest.mark.parametrize("name", ["dosa", "crème_brûlée", "mac&cheese", "दाल", "7up"])
def test_dishes_of_all_scripts_are_folders(name: str) -> None:
    assert why_no_folder(normalize_class_name(name)) is None


@at_least_100
@given(st.text(st.sampled_from("ab./\\:~_- \0\u202e\u0301"), max_size=20))
def test_what_is_a_folder_is_one_step_down(name: str) -> None:
    normalized = normalize_class_name(name)
    if why_no_folder(normalized) is None:
        assert (Path("/feedback") / normalized).resolve().parent == Path("/feedback")
        assert normalize_class_name(normalized) == normalized
