"""Rubrics as models write them: messy text at the parser, and how often a short one is asked for.

What is written to deceive the parser is in test_injection.py.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rubric_helpers import rubric_xml
from rubrics import ATTEMPTS, MAX_CRITERIA, parse_rubric, write_rubrics

# What a model wrote, and the criteria in it.
WRITTEN = [
    ("<rubric><criterion>A b</criterion><criterion>C</criterion></rubric>", ["A b", "C"]),
    ("<rubric>\n  <criterion>\n  A\n  b\t c </criterion>\n</rubric>", ["A b c"]),
    ("Sure! Here it is:\n<rubric><criterion>A</criterion></rubric>\nHope it helps.", ["A"]),
    ("```xml\n<rubric>\n<criterion>A</criterion>\n</rubric>\n```", ["A"]),
    ("<criterion>A</criterion> and <criterion>B</criterion> without a rubric tag", ["A", "B"]),
    ("<rubric><criterion>A<criterion>B<criterion>C</rubric>", ["A", "B", "C"]),  # no end tags
    ("<rubric><criterion>A<criterion>B</criterion> Hope it helps", ["A", "B"]),
    ("<rubric><criterion>A</criterion><criterion>B is cut o", ["A", "B is cut o"]),
    ("<rubric><criterion>A</criterion><criterion>B\n\nThat was it!", ["A", "B"]),
    ("<rubric><criterion>A</criterion><criter", ["A"]),
    ("<rubric><criterion>A</criterion><criterion", ["A"]),
    (
        "<rubric><criterion>5 < 6 > 4 & R&D <b>x</b></criterion></rubric>",
        ["5 < 6 > 4 & R&D <b>x</b>"],
    ),
    (
        "<rubric><criterion>R&amp;D &lt;b&gt; &quot;q&quot; &apos;</criterion></rubric>",
        ['R&D <b> "q" \''],
    ),
    ("<criterion>&amp;lt; stays as it was written</criterion>", ["&lt; stays as it was written"]),
    # Text: these are none of XML's five entities.
    ("<criterion>&#65; &nbsp; &eacute;</criterion>", ["&#65; &nbsp; &eacute;"]),
    (
        '<rubric n="2"><criterion id="1" weight=\'3\'>A</criterion><criterion id=2>B</criterion>',
        ["A", "B"],
    ),
    ("<RUBRIC><CRITERION>A</CRITERION><Criterion>B</cRITERION></RUBRIC>", ["A", "B"]),
    ("< rubric >< criterion >A< / criterion ><criterion\n>B</criterion\n></ rubric >x", ["A", "B"]),
    ("<criterion>1. A</criterion><criterion>2. B</criterion>", ["1. A", "2. B"]),
    (
        "<criterion>Has a dose</criterion><criterion>has A DOSE.</criterion>"
        "<criterion>B</criterion>",
        ["Has a dose", "B"],
    ),
    ("<criterion>Straße.</criterion><criterion>STRASSE</criterion>", ["Straße."]),
    (
        "<criterion></criterion><criterion> \n </criterion><criterion>...</criterion>"
        "<criterion>-</criterion>",
        [],
    ),
    ("<criterion>A\x00\x07\x1b[0m b\ufffe</criterion>", ["A[0m b"]),
    ("<criterion>Ｎａｍｅ 用药剂量 💊 — naïve</criterion>", ["Ｎａｍｅ 用药剂量 💊 — naïve"]),
    ("<criterion>أ ب</criterion>", ["أ ب"]),
    ("<criteria>A</criteria><criterions>B</criterions>", []),  # tags of other names
    ("</criterion>A</criterion><criterion>B</criterion></criterion>", ["B"]),
    ("<rubric><criterion>A</criterion></rubric><rubric><criterion>B</criterion></rubric>", ["A"]),
    ("1. Names a dose\n2. Names a drug", []),
    ("I cannot help with that.", []),
    ("", []),
    (rubric_xml(*(f"c{i}" for i in range(30))), [f"c{i}" for i in range(20)]),
    # Duplicates do not use up places.
    (rubric_xml(*(f"c{i // 2}" for i in range(50))), [f"c{i}" for i in range(20)]),
]


@pytest.mark.parametrize(("text", "criteria"), WRITTEN)
def test_criteria_are_read_from_what_models_really_write(text, criteria):
    assert parse_rubric(text) == criteria


FRAGMENTS = """<rubric> </rubric> <criterion> </criterion> <CRITERION> <criterion/>
<criterion id="1"> < / criterion > <criterion </criterion & &amp; &lt; &#0; &x; < > ]]> <![CDATA[
<!-- --> <? <!DOCTYPE <!ENTITY " ' . a A""".split()
messy = st.lists(
    st.sampled_from([*FRAGMENTS, "\n\n", " ", "\x00", "\ufffe"]) | st.text(max_size=10)
).map("".join)


@settings(max_examples=300, deadline=None)
@given(messy)
def test_no_text_breaks_the_parser(text):
    criteria = parse_rubric(text)
    assert len(criteria) <= MAX_CRITERIA
    assert all(any(map(str.isalnum, c)) and c == " ".join(c.split()) for c in criteria)
    assert len({c.casefold().rstrip(".") for c in criteria}) == len(criteria)


in_xml = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff")
criterion_texts = st.text(st.sampled_from("<>&;\n\t /") | in_xml, max_size=40).filter(
    lambda c: any(map(str.isalnum, c))
)


def without_case(criterion: str) -> str:
    return " ".join(criterion.split()).casefold().rstrip(".")


@settings(max_examples=300, deadline=None)
@given(st.lists(criterion_texts, max_size=20, unique_by=without_case))
def test_a_well_formed_rubric_comes_back_as_it_was(criteria):
    assert parse_rubric(rubric_xml(*criteria)) == [" ".join(c.split()) for c in criteria]


# ---------------------------------------------------------------------------- the anchor's attempts


def test_only_short_rubrics_are_asked_again_at_most_three_times_and_the_longest_is_kept():
    def of(*sizes):
        return [rubric_xml(*(f"criterion {n}.{i}" for i in range(n))) for n in sizes]

    attempts = {
        "good": of(5),
        "short": of(3, 4, 2),
        "late": of(1, 6),
        "shrinks": of(2, 0, 1),
        "never": ["no", "", "<rubric>"],
    }
    asked = []

    def ask(chats):
        names = [messages[0]["content"] for messages in chats]
        asked.append(names)
        return [attempts[name].pop(0) for name in names]  # an attempt too many: IndexError

    rubrics, stats = write_rubrics([[{"role": "user", "content": name}] for name in attempts], ask)
    retried = ["short", "late", "shrinks", "never"]
    assert asked == [["good", *retried], retried, ["short", "shrinks", "never"]]
    assert ATTEMPTS == 3
    assert rubrics == [parse_rubric(of(n)[0]) for n in (5, 4, 6, 2, 0)]
    assert stats == {"rubric/criteria": 17 / 5, "rubric/short": 2 / 5, "rubric/unparsable": 1 / 5}
