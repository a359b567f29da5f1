"""What is counted in texts, to see how references differ from rollouts: by hand."""

from analysis.statistics import style


def test_what_is_counted_in_texts():
    one = "First, 1 + 1 = 2.\n\nThen we check: 2 = 2, indeed correct."
    counts = {
        "words": 17 / 2,
        "lines": 3 / 2,
        "equations": 2 / 2,
        "step words": 2 / 2,
        "verification words": 4 / 2,
    }
    assert style([[one], ["We VERIFY it"]]) == counts
    # Whole words alone.
    assert list(style([["unchecked thence = firsts"]]).values()) == [4, 1, 1, 0, 0]
