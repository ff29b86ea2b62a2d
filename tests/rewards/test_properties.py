"""Properties of the comparison, over generated answers."""

from fractions import Fraction
from threading import Thread

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_bridge.rewards.math_rewards import math_reward, same_batch
from trl_bridge.rewards.mathematics.equality import quick


relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
fractions = st.fractions(min_value=-1000, max_value=1000, max_denominator=60)


def spellings(value: Fraction) -> st.SearchStrategy[str]:
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    forms = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{sign}{top}}}{{{bottom}}}",
             rf"{sign}\tfrac{{{3 * top}}}{{{3 * bottom}}}"]  # fmt: skip
    if bottom == 1:
        forms += [f"{sign}{top}", f"{sign}{top}.0", f"{sign}{top:,}", f"{sign}{top:,}".replace(",", "{,}")]
    elif top > bottom:
        forms += [rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"]
    if bottom in (2, 4, 5, 8, 10, 20, 25, 40, 50):
        forms += [f"{sign}{top / bottom}"]
    return st.sampled_from(forms)


surfaces = st.sampled_from(
    [
        "{}",
        "${}$",
        r"\boxed{{{}}}",
        " {} ",
        "{}.",
        r"\left({}\right)",
        r"\displaystyle {}",
        r"\({}\)",
        "**{}**",
        "{{{}}}",
    ]
)


@st.composite
def two_spellings(draw):
    value = draw(fractions)
    return tuple(draw(surfaces).format(draw(spellings(value))) for _ in range(2))


def unboxed(text: str) -> str:
    return text[len(r"\boxed{") : -1] if text.startswith(r"\boxed") else text


@relaxed
@given(two_spellings())
def test_surface_does_not_matter(pair):
    assert quick(unboxed(pair[0]), unboxed(pair[1])) is True


@relaxed
@given(fractions, fractions, st.data())
def test_another_value_is_never_paid(one, two, data):
    first, second = data.draw(spellings(one)), data.draw(spellings(two))
    assert quick(first, second) is (one == two)


@relaxed
@given(st.lists(st.integers(-30, 30), min_size=2, max_size=5), st.randoms())
def test_tuples_are_ordered_and_lists_are_not(values, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    one, two = (", ".join(map(str, v)) for v in (values, shuffled))
    assert quick(one, two) is True
    assert quick(rf"\{{{one}\}}", two) is True
    assert quick(f"({one})", f"({two})") is (values == shuffled)
    assert quick(one, f"{two}, 31") is False


@relaxed
@given(
    st.integers(-30, 30),
    st.integers(1, 30),
    st.sampled_from("[("),
    st.sampled_from(")]"),
    st.sampled_from("[("),
    st.sampled_from(")]"),
)
def test_brackets_of_intervals_matter(low, length, l1, r1, l2, r2):
    same = quick(f"{l1}{low}, {low + length}{r1}", f"{l2}{low},{low + length}{r2}")
    assert same is ((l1, r1) == (l2, r2))


@relaxed
@given(st.text(max_size=60), st.text(max_size=60))
def test_symmetry_on_any_text(first, second):
    assert quick(first, second) is quick(second, first)


pieces = st.lists(st.sampled_from(["x", "y", "2", "3", "+", "-", r"\frac{1}{2}", "(", ")", "^2", r"\sqrt{2}", ",", "=", "<", r"\pi", r"\cup", "[", "]", r"\text{cm}"]), min_size=1, max_size=7)  # fmt: skip


def test_symmetry_in_the_workers():
    pairs: list[tuple[str, str]] = []

    @settings(relaxed, max_examples=150, database=None)
    @given(pieces, pieces)
    def collect(a, b):
        pairs.append(("".join(a), "".join(b)))

    collect()
    forth, _, _ = same_batch(pairs, 5.0, 60.0, 1.0)
    back, _, _ = same_batch([(b, a) for a, b in pairs], 5.0, 60.0, 1.0)
    assert forth == back


@st.composite
def polynomials(draw):
    """Two spellings of one polynomial and one of another."""
    terms = draw(
        st.lists(st.tuples(st.integers(1, 9), st.sampled_from("xyz"), st.integers(1, 4)), min_size=2, max_size=4)
    )
    texts = [f"{c}{v}^{{{p}}}" for c, v, p in terms]
    index = draw(st.integers(0, len(terms) - 1))
    c, v, p = terms[index]
    changed = (
        texts[:index]
        + [draw(st.sampled_from([f"{c + 1}{v}^{{{p}}}", f"{c}{v}^{{{p + 1}}}", f"-{c}{v}^{{{p}}}"]))]
        + texts[index + 1 :]
    )
    return "+".join(texts), "+".join(reversed(texts)), "+".join(changed)


def test_reordered_sums_are_paid_and_changed_ones_are_not():
    triples: list[tuple[str, str, str]] = []

    @settings(relaxed, max_examples=60, database=None)
    @given(polynomials())
    def collect(triple):
        triples.append(triple)

    collect()
    same, _, _ = same_batch([(a, b) for a, b, _ in triples], 5.0, 60.0, 1.0)
    other, _, _ = same_batch([(a, c) for a, _, c in triples], 5.0, 60.0, 1.0)
    assert all(outcome is True for outcome in same)
    assert all(outcome is False for outcome in other)


def test_no_poisoning_and_any_thread():
    """Inputs that poisoned older parsers change nothing, and threads see what the main thread sees."""
    pair = [
        (r"\frac{dy}{dx}+1", r"1+\frac{dy}{dx}"),
        ("x^2+1+dx", "1+x^2+dx"),
        ("i^2x", "-x"),
        ("x=2", "x"),
        ("x+1", "3"),
    ]
    before = math_reward([rf"\boxed{{{b}}}" for _, b in pair], [a for a, _ in pair])
    same_batch([("x=5+y-y", "5+z-z"), ("dx", "d+x-0"), (r"\int x dx + 0", "q")], 5.0, 30.0, 1.0)
    results: list[list] = []
    threads = [
        Thread(target=lambda: results.append(math_reward([rf"\boxed{{{b}}}" for _, b in pair], [a for a, _ in pair])))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == [1.0, 1.0, 1.0, 0.0, 0.0] and results == [before] * 4
