#!/usr/bin/env bash
# SymPy 1.14.0: the absolute value of some secants is negative.
#
# Expected: `Abs(sec(x))` at a rational x is not negative.
# Seen:     `Abs(sec(Rational(1000000009, 17)))` simplifies to `sec(1000000009/17)`, which is about -1.076.
# Hurts:    whoever checks antiderivatives such as ln|sec x| by putting numbers in: right answers disagree at some of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "sympy==1.14.0"
"$folder/venv/bin/python" - <<'PY'
from sympy import Abs, Rational, sec

for number in (Rational(1, 3), Rational(2), Rational(1000000009, 17)):
    value = Abs(sec(number))
    print(f"Abs(sec({number})) = {value} = {value.evalf(8)}")
assert value.evalf() < 0, "changed: this finding is out of date"
PY
