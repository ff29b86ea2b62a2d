#!/usr/bin/env bash
# reasoning-gym 0.1.25: the scorer of `game_of_life_halting` pays any text as if it were "True".
#
# Expected: the question asks for True or False, and a wrong one is worth 0.
# Seen:     the scorer compares bool(answer) with bool(entry["answer"]), and any text that is not empty is true, "False" too: whatever is
#           written is paid 1.0.
# Hurts:    whoever trains on it with the package's own scorer: the reward does not depend on what is written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "reasoning-gym==0.1.25"
"$folder/venv/bin/python" - <<'PY'
import reasoning_gym

task = reasoning_gym.create_dataset("game_of_life_halting", size=40, seed=1)
rows = {row["answer"]: row for row in task}
for truth, row in sorted(rows.items()):
    scores = {answer: task.score_answer(answer, row) for answer in ("True", "False", "banana")}
    print(f"the answer is {truth}: {scores}")
    assert set(scores.values()) == {1.0}, "changed: this finding is out of date"
assert len(rows) == 2
PY
