"""The everyday stories that `wordproblems` tells, each with two ways to explain its solution.

A story's letters stand for its numbers and `r1`, `r2`, `r3` for the results of its steps. Texts
may also use {name}, {He}, {he}, {his}, {friend}, and of its things {item}, {items} and {others}.
Every equation in an explanation has two operands, each a number of the question or an earlier
result: `wordproblems` reads them back and checks them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PEOPLE = (
    *((name, "she", "her") for name in ("Anna", "Chloe", "Fatima", "Grace", "Ines", "Kavya")),
    *((name, "she", "her") for name in ("Lena", "Mei", "Nadia", "Olga", "Rosa", "Zoe")),
    *((name, "he", "his") for name in ("Ben", "Carlos", "David", "Emil", "Hassan", "Jamal")),
    *((name, "he", "his") for name in ("Kenji", "Liam", "Marco", "Noah", "Peter", "Tom")),
)
"""Name, pronoun and possessive."""


def _things(*nouns: str) -> tuple[tuple[str, str], ...]:
    """Pairs of singular and plural from `one/many`."""
    return tuple((one, many) for one, _, many in (noun.partition("/") for noun in nouns))


_TOYS = _things(
    "marble/marbles",
    "sticker/stickers",
    "postcard/postcards",
    "toy car/toy cars",
    "shell/shells",
    "coin/coins",
    "button/buttons",
)
_SWEETS = _things(
    "candy/candies",
    "cookie/cookies",
    "cherry/cherries",
    "strawberry/strawberries",
    "grape/grapes",
    "peanut/peanuts",
)
_PLANTS = _things(
    "tulip/tulips",
    "carrot/carrots",
    "cabbage/cabbages",
    "sunflower/sunflowers",
    "onion/onions",
    "rose bush/rose bushes",
)
_GOODS = _things(
    "notebook/notebooks",
    "pen/pens",
    "cap/caps",
    "mug/mugs",
    "candle/candles",
    "poster/posters",
    "scarf/scarves",
    "ball/balls",
)
_FRAGILE = _things(
    "glass/glasses",
    "plate/plates",
    "light bulb/light bulbs",
    "cup/cups",
    "vase/vases",
    "jar/jars",
    "bottle/bottles",
)
_BAKED = _things(
    "roll/rolls",
    "muffin/muffins",
    "cupcake/cupcakes",
    "pretzel/pretzels",
    "bagel/bagels",
    "tart/tarts",
)
_CROPS = _things(
    "tomato/tomatoes",
    "apple/apples",
    "pear/pears",
    "plum/plums",
    "pumpkin/pumpkins",
    "lemon/lemons",
    "peach/peaches",
)
_NOTHING = _things("/")


@dataclass(frozen=True)
class Story:
    """One kind of problem: its numbers' ranges, its steps in order, and its texts."""

    title: str
    things: tuple[tuple[str, str], ...]
    numbers: dict[str, Sequence[int]]
    steps: tuple[str, ...]
    question: str
    target: str
    reference: str


ONE_STEP = (
    Story(
        "gift",
        _TOYS,
        {"a": range(3, 61), "b": range(3, 61)},
        ("a + b",),
        "{name} has {a} {items}. {friend} gives {name} {b} more. "
        "How many {items} does {name} have now?",
        "{name} starts with {a} {items} and gets {b} more. That makes {a} + {b} = {r1} {items}.",
        "Put the new {items} together with the old ones: {b} + {a} = {r1}. "
        "So {he} owns {r1} {items} after the gift.",
    ),
    Story(
        "giving away",
        _TOYS,
        {"a": range(10, 81), "b": range(3, 61)},
        ("a - b",),
        "{name} had {a} {items} and gave {b} of them to {friend}. "
        "How many {items} does {name} have left?",
        "{name} had {a} {items} and gave away {b}. That leaves {a} - {b} = {r1} {items}.",
        "We subtract what {friend} received from the collection: {a} - {b} = {r1}. "
        "{He} still has {r1} {items}.",
    ),
    Story(
        "planting",
        _PLANTS,
        {"a": range(2, 21), "b": range(3, 26)},
        ("a * b",),
        "{name} plants {a} rows of {items}. There are {b} {items} in each row. "
        "How many {items} does {name} plant in all?",
        "There are {a} rows with {b} {items} each. That is {a} * {b} = {r1} {items}.",
        "Each row adds {b} {items}, and this happens {a} times, so we multiply: "
        "{b} * {a} = {r1}. The whole bed holds {r1} {items}.",
    ),
    Story(
        "sharing",
        _SWEETS,
        {"a": range(12, 181), "b": range(2, 16)},
        ("a / b",),
        "{name} shares {a} {items} equally among {b} children. "
        "How many {items} does each child get?",
        "{name} splits {a} {items} among {b} children. Each child gets {a} / {b} = {r1} {items}.",
        "Equal shares mean division. We divide the {items} by the number of children: "
        "{a} / {b} = {r1}. Every child receives {r1}.",
    ),
    Story(
        "reading",
        _NOTHING,
        {"a": range(40, 151), "b": range(10, 91)},
        ("a - b",),
        "{name} is reading a book with {a} pages. {He} has read {b} pages so far. "
        "How many pages does {name} still have to read?",
        "The book has {a} pages and {name} has read {b}. "
        "There are {a} - {b} = {r1} pages left to read.",
        "Take the finished part away from the whole book: {a} - {b} = {r1}. "
        "{He} must read {r1} more pages.",
    ),
    Story(
        "wages",
        _NOTHING,
        {"a": range(2, 13), "b": range(6, 41)},
        ("a * b",),
        "{name} works {a} hours and earns ${b} an hour. How many dollars does {name} earn?",
        "{name} works {a} hours at ${b} an hour. {He} earns {a} * {b} = {r1} dollars.",
        "One hour pays ${b}, so the pay is the hourly wage times the hours: {b} * {a} = {r1}. "
        "The work brings in ${r1}.",
    ),
)

TWO_STEPS = (
    Story(
        "change",
        _GOODS,
        {"a": range(2, 10), "b": range(2, 13), "c": range(20, 101, 5)},
        ("a * b", "c - r1"),
        "{name} buys {a} {items} at ${b} each and pays with ${c}. "
        "How many dollars of change does {name} get?",
        "The {items} cost {a} * {b} = {r1} dollars. The change is {c} - {r1} = {r2} dollars.",
        "First find the price of everything: {b} * {a} = {r1}. {name} handed over ${c}, "
        "so subtract the price from it: {c} - {r1} = {r2}. {He} gets ${r2} back.",
    ),
    Story(
        "unpacking",
        _FRAGILE,
        {"a": range(3, 13), "b": range(4, 21), "c": range(2, 31)},
        ("a * b", "r1 - c"),
        "{name} unpacks {a} boxes with {b} {items} in each box. {c} of the {items} are broken. "
        "How many {items} are not broken?",
        "The boxes hold {a} * {b} = {r1} {items}. Without the broken ones there are "
        "{r1} - {c} = {r2} {items}.",
        "Multiply to count every {item} that was delivered: {b} * {a} = {r1}. "
        "Then take away the damaged ones: {r1} - {c} = {r2}. So {r2} are fine.",
    ),
    Story(
        "baking",
        _BAKED,
        {"a": range(20, 101), "b": range(2, 16), "c": range(3, 11)},
        ("a - b", "r1 / c"),
        "{name} bakes {a} {items} and keeps {b} of them. {He} packs the rest into bags of {c}. "
        "How many bags does {name} fill?",
        "{name} packs {a} - {b} = {r1} {items}. That fills {r1} / {c} = {r2} bags.",
        "Set aside what stays at home: {a} - {b} = {r1} remain for packing. Each bag takes {c}, "
        "so divide: {r1} / {c} = {r2}. The number of bags is {r2}.",
    ),
    Story(
        "ages",
        _NOTHING,
        {"a": range(5, 41), "b": range(2, 21)},
        ("a + b", "a + r1"),
        "{name} is {a} years old. {friend} is {b} years older than {name}. "
        "How old are the two of them together?",
        "{friend} is {a} + {b} = {r1} years old. Together they are {a} + {r1} = {r2} years old.",
        "We need both ages. The older one has lived {b} + {a} = {r1} years. "
        "Adding the younger one's age gives {r1} + {a} = {r2} years for the pair.",
    ),
    Story(
        "bus",
        _NOTHING,
        {"a": range(12, 46), "b": range(3, 21), "c": range(3, 19)},
        ("a - b", "r1 + c"),
        "There are {a} people on the bus with {name}. At the next stop {b} of them get off and "
        "{c} others get on. How many people are on the bus with {name} now?",
        "After {b} people get off there are {a} - {b} = {r1}. "
        "After {c} others get on there are {r1} + {c} = {r2}.",
        "Leaving passengers lower the number: {a} - {b} = {r1}. New passengers raise it again: "
        "{c} + {r1} = {r2}. So {name} now rides with {r2} people.",
    ),
    Story(
        "saving",
        _NOTHING,
        {"a": range(3, 21), "b": range(2, 13), "c": range(5, 51)},
        ("a * b", "r1 + c"),
        "{name} has ${c} in {his} money box. {He} puts in ${a} every week for {b} weeks. "
        "How many dollars are in the money box then?",
        "{name} puts in {a} * {b} = {r1} dollars. With the ${c} from before there are "
        "{r1} + {c} = {r2} dollars.",
        "Weekly savings over the whole time come to {b} * {a} = {r1}. The box was not empty, "
        "so add what it held: {c} + {r1} = {r2}. It contains ${r2}.",
    ),
)

THREE_STEPS = (
    Story(
        "shopping",
        _GOODS,
        {"a": range(2, 9), "b": range(2, 10), "c": range(2, 9), "d": range(2, 10)},
        ("a * b", "c * d", "r1 + r2"),
        "{name} buys {a} {items} at ${b} each and {c} {others} at ${d} each. "
        "How many dollars does {name} pay in all?",
        "The {items} cost {a} * {b} = {r1} dollars. The {others} cost {c} * {d} = {r2} dollars. "
        "Together that is {r1} + {r2} = {r3} dollars.",
        "Work out each kind alone, then add. For the first kind we have {b} * {a} = {r1}, "
        "for the second {d} * {c} = {r2}. The bill comes to {r2} + {r1} = {r3}.",
    ),
    Story(
        "eggs",
        _NOTHING,
        {"a": range(8, 25), "b": range(3, 8), "c": range(3, 21), "d": (4, 6, 8, 10, 12)},
        ("a * b", "r1 - c", "r2 / d"),
        "{name}'s hens lay {a} eggs a day. After {b} days {he} takes {c} of the eggs for {his} "
        "kitchen and sells the rest in boxes of {d}. How many boxes does {name} sell?",
        "The hens lay {a} * {b} = {r1} eggs. {name} sells {r1} - {c} = {r2} of them. "
        "That is {r2} / {d} = {r3} boxes.",
        "Count every egg first: {b} * {a} = {r1}. The kitchen uses some, so "
        "{r1} - {c} = {r2} go on sale. With {d} in a box, divide: {r2} / {d} = {r3}.",
    ),
    Story(
        "weekend job",
        _NOTHING,
        {"a": range(2, 9), "b": range(8, 21), "c": range(3, 16), "d": range(5, 31, 5)},
        ("a * b", "r1 + c", "r2 - d"),
        "{name} works {a} hours at ${b} an hour and gets ${c} in tips. Then {he} spends ${d} on "
        "dinner. How many dollars are left of the money that {name} earned?",
        "{name} earns {a} * {b} = {r1} dollars. With tips {he} has {r1} + {c} = {r2} dollars. "
        "After dinner {r2} - {d} = {r3} dollars are left.",
        "The hourly pay comes to {b} * {a} = {r1}. Adding the tips gives {c} + {r1} = {r2}. "
        "The meal costs ${d}, so {name} goes home with {r2} - {d} = {r3}.",
    ),
    Story(
        "school trip",
        _NOTHING,
        {"a": range(2, 7), "b": range(12, 29), "c": range(2, 9), "d": range(5, 13)},
        ("a * b", "r1 + c", "r2 / d"),
        "{name} plans a trip for {a} classes of {b} children, with {c} teachers coming along. "
        "Each van holds {d} people, and every van is full. How many vans are there?",
        "There are {a} * {b} = {r1} children. With the teachers there are {r1} + {c} = {r2} "
        "people. They need {r2} / {d} = {r3} vans.",
        "Multiply the class size by the classes: {b} * {a} = {r1}. Add the grown-ups: "
        "{c} + {r1} = {r2}. Filling vans of {d} means dividing: {r2} / {d} = {r3}.",
    ),
    Story(
        "reading plan",
        _NOTHING,
        {"a": range(80, 201, 4), "b": range(5, 16), "c": range(3, 8), "d": range(2, 9)},
        ("b * c", "a - r1", "r2 / d"),
        "{name} reads {b} pages a day for {c} days of a book with {a} pages. {He} wants to finish "
        "the rest in {d} days, with the same number of pages each day. "
        "How many pages is that a day?",
        "{name} has read {b} * {c} = {r1} pages. There are {a} - {r1} = {r2} pages left. "
        "That is {r2} / {d} = {r3} pages a day.",
        "Find what is done already: {c} * {b} = {r1}. Subtract it from the whole book: "
        "{a} - {r1} = {r2}. Spread this evenly over the days: {r2} / {d} = {r3}.",
    ),
    Story(
        "harvest",
        _CROPS,
        {"a": range(3, 21), "b": range(2, 7), "c": range(3, 31)},
        ("a * b", "a + r1", "r2 - c"),
        "{name} picks {a} {items} on Monday and {b} times as many on Tuesday. Then {he} gives {c} "
        "{items} to {friend}. How many {items} does {name} have left?",
        "On Tuesday {name} picks {a} * {b} = {r1} {items}. In all that is {a} + {r1} = {r2}. "
        "After the gift {he} has {r2} - {c} = {r3} {items}.",
        "The second day brings {b} * {a} = {r1}. Both days together bring {r1} + {a} = {r2}. "
        "{friend} takes {c} away, which leaves {r2} - {c} = {r3}.",
    ),
)
STORIES = tuple(
    story for each in zip(ONE_STEP, TWO_STEPS, THREE_STEPS, strict=True) for story in each
)
"""One, two and three steps in turn, so that a few problems are already of all kinds."""
