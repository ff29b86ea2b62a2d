"""Imported by the workers' forkserver only: fills the parser's tables once, so that every new worker starts with them."""

from .symbolic import verdict


# ANTLR builds its tables as it parses: the first expression of a kind takes a tenth of a second, later ones a hundredth.
for _first, _second in (
    ("x^2+2x+1", "(x+1)^{2}"),
    (r"\frac{1}{2}\sqrt{3}", r"\frac{\sqrt{3}}{2}+y-y"),
    (r"\sin 2x+\ln|x|", r"2\sin x\cos x+\log_3 x"),
    (r"e^{i\pi}+n!", r"\binom{n}{2}-2^{n}"),
    ("x<3", r"(-\infty, 3)"),
    ("y=2x+1", "2x-y+1=0"),
    (r"a_{1}\cdot b", r"\pi\times b/c"),
):
    verdict(["same", _first, _second])
