"""Words after a number: units, which one side may leave out, and magnitudes, which it may not."""

import re

MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

# Each line: the canonical name, then its other spellings (a plural's s is taken off before).
_SPELLINGS = """
m meter metre
cm centimeter centimetre
mm millimeter millimetre
km kilometer kilometre
in inch inche
ft foot feet
yd yard
mi mile
s sec second
min minute
h hr hour
day
week
month
year yr
g gram
kg kilogram
mg milligram
lb pound
oz ounce
ton tonne
L l liter litre
mL ml milliliter millilitre
gallon gal
quart
pint
cup
N newton
J joule
W watt
V volt
Hz hertz
Pa pascal
mph
% percent pct percentage
degree deg
rad radian
$ dollar USD
cent ¢
euro €
£
yuan
unit
u
person people
child children
man men
woman women
way
""".strip().splitlines()
_CANONICAL = {word: line.split()[0] for line in _SPELLINGS for word in line.split()}
_POWERS = {"square": "^2", "sq": "^2", "squared": "^2", "cubic": "^3", "cubed": "^3"}

# Single letters are units only inside \text{}: "2m" is a product.
ABBREVIATIONS = {
    w for w in _CANONICAL if 2 <= len(w) <= 3 and w not in ("day", "way", "cup", "man")
}

# Plurals of any other word are things that are counted ("3 apples"), but for these: they change the
# value, or may.
_NOT_COUNTED = re.compile(
    r".*(ths|rds|reds|ands|ions|zens|less|wards)|halves|quarters|scores|pairs|times|plus|minus|"
    r"loss|losses|roots|squares|cubes|powers|series|bases|digits|twos|twice|us|is|was|this|gross|"
    r"ones|tens|fives|folds|yes|ss|factorials|inverses|negatives|opposites|reciprocals|east|west"
)


def unit_of(phrase: str) -> str | None:
    """The canonical unit that a phrase names, "" for an empty one, None if it is no unit.

    >>> unit_of("square centimeters"), unit_of("cm ^2"), unit_of("hours"), unit_of("million")
    ('cm^2', 'cm^2', 'h', None)
    """
    power, names = "", []
    phrase = re.sub(r"\bper\b", "/", phrase).replace("{", "").replace("}", "")
    for word in re.findall(r"\^[23]|/|\S[^\s/^]*", phrase):
        word = word.strip(".")
        if word in _POWERS or re.fullmatch(r"\^[23]", word):
            if power:
                return None
            power = _POWERS.get(word, word)
        elif word == "/":
            names.append("/")
        elif (name := _canonical(word)) is not None:
            names.append(name)
        else:
            return None
    # "square" stands before its unit and "^2" after it; with "/" it would matter whose it is
    if names.count("/") > 1 or (power and "/" in names) or len(names) > 3 or (power and not names):
        return None
    return "".join(names) + power


def _canonical(word: str) -> str | None:
    for form in (word, word.lower(), word.lower().removesuffix("s")):
        if form in _CANONICAL:
            return _CANONICAL[form]
    if re.fullmatch(r"[a-z]{2,}s", word) and not _NOT_COUNTED.fullmatch(word):
        return word.removesuffix("s")
    return None
