"""Words for the tasks that are made here: some ten thousand pairs such as "amber-valley"."""

import itertools
import random

FIRST = (
    "able agile amber ancient arctic autumn azure basic blunt bold brave brief bright brisk "
    "broad bronze busy calm candid careful cheap civil clean clear clever close coastal cold "
    "common copper cosmic cozy crimson crisp curious daily dark deep dense direct distant "
    "double dry dusty eager early east easy elder empty equal exact fair famous fancy fast "
    "final fine firm fiscal flat fleet formal frank free fresh frosty full gentle giant glad "
    "global golden good grand gray great green handy happy hard hazel heavy hidden high "
    "hollow honest humble icy ideal inner ivory jolly just keen kind large late lean level "
    "light lively local lone long loud lucky lunar"
).split()
SECOND = (
    "acorn actor anchor apple arrow atlas badge baker banner barn basket beacon bench bishop "
    "blade board bottle branch bridge bucket butter button cabin camera candle canyon carpet "
    "castle cedar chapel cherry circle cliff cloud clover coffee corner cotton cradle crown "
    "curtain dancer desert diary doctor dragon drum eagle engine envelope fabric farmer "
    "feather ferry field finger flame flute forest fountain galaxy garden ginger glacier "
    "glove granite hammer harbor harvest helmet island jacket jungle kettle ladder lantern "
    "lemon library magnet maple marble market meadow mirror monkey mountain needle ocean "
    "orchard oyster palace parcel pebble pencil pepper piano pillow planet pocket prairie "
    "puzzle quarry rabbit ribbon river rocket saddle shadow silver spider statue summit "
    "temple ticket tunnel turtle valley velvet violin walnut willow window"
).split()


def random_words(rng: random.Random, count: int) -> list[str]:
    """So many different pairs.

    Raises:
        ValueError: there are not so many.
    """
    every = len(FIRST) * len(SECOND)
    if count > every:
        raise ValueError(f"words: expected at most {every}, got {count}")
    pairs = list(itertools.product(FIRST, SECOND))
    return ["-".join(pair) for pair in rng.sample(pairs, count)]
