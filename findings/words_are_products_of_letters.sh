#!/usr/bin/env bash
# math-verify 0.9.0 reads the letters of words as factors, so prose that holds a 0 is equal to 0.
#
# Expected: an answer such as `0 \text{ to } 5`, or `0xFF`, is not the number 0.
# Seen:     it is parsed as the product 0*t*o*5 (0*x*F*F), which is 0, and verifies against a gold of 0.
# Hurts:    training on data where 0 is a frequent gold: a range that starts at 0, or a hexadecimal number, is rewarded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "math-verify==0.9.0" "latex2sympy2_extended==1.11.0"
"$folder/venv/bin/python" - <<'PY'
from math_verify import LatexExtractionConfig, parse, verify

for answer in (r"\boxed{0 \text{ to } 5}", r"\boxed{0xFF}"):
    parsed = parse(answer, extraction_config=[LatexExtractionConfig(boxed_match_priority=0)])
    verdict = verify(parse("$0$"), parsed)
    print(f"math-verify: gold 0, answer {answer}, parsed {parsed}: {verdict}")
    assert verdict is True, "changed: this finding is out of date"
PY
