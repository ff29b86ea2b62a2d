#!/usr/bin/env bash
# latex2sympy2_extended 1.11.0 (and math-verify 0.9.0, which parses with it) adds two numbers that stand side by side.
#
# Expected: `2(3)` is the product 6, as `2(x+1)` is 2*(x+1); `12\ 13` is no number.
# Seen:     `2(3)` is 5, `2(3)(5)` is 10, `3(4)+1` is 8, `12\ 13` is 25. It looks like the rule for mixed numbers (3 1/2), applied
#           whatever stands on the right. So a verifier refuses `2(3)` for 6, and pays it for 5, and pays `12\ 13` for 25.
# Hurts:    whoever rewards or evaluates mathematics with math-verify, TRL's `accuracy_reward` included.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "math-verify==0.9.0" "latex2sympy2_extended==1.11.0"
"$folder/venv/bin/python" - <<'PY'
from latex2sympy2_extended import latex2sympy
from math_verify import parse, verify

for text, seen in ((r"2(3)", 5), (r"2(3)(5)", 10), (r"12\ 13", 25), (r"3(4)+1", 8)):
    value = latex2sympy(text).doit()
    print(f"latex2sympy({text!r}) = {value}")
    assert value == seen, "changed: this finding is out of date"
print("latex2sympy('2(x+1)') =", latex2sympy("2(x+1)"), "(a product, as one would expect)")
for gold, answer, seen in (("$6$", "$2(3)$", False), ("$5$", "$2(3)$", True), ("$25$", r"$12\ 13$", True)):
    verdict = verify(parse(gold), parse(answer))
    print(f"math-verify: gold {gold}, answer {answer}: {verdict}")
    assert verdict is seen, "changed: this finding is out of date"
PY
