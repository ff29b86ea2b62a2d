#!/usr/bin/env bash
# reasoning-gym 0.1.25: some tasks give other rows in every process, whatever `seed` says.
#
# Expected: `create_dataset(name, seed=1)` is the same data set each time, which is what a seed is for.
# Seen:     `word_ladder`, `isomorphic_strings` and `ransom_note` walk over Python sets of strings, whose order changes with the process's hash
#           seed (PYTHONHASHSEED): questions or answers differ from one run to the next, and between the ranks of one run.
# Hurts:    whoever resumes a run, compares two, or makes the rows on each rank.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "reasoning-gym==0.1.25"
for task in word_ladder isomorphic_strings ransom_note; do
  digests=""
  for seed in 1 2 3; do
    digests+=$(PYTHONHASHSEED=$seed "$folder/venv/bin/python" -c "
import hashlib, reasoning_gym
rows = reasoning_gym.create_dataset('$task', size=20, seed=1)
print(hashlib.sha256(repr([(row['question'], row['answer']) for row in rows]).encode()).hexdigest()[:12])")$'\n'
  done
  different=$(printf "%s" "$digests" | sort -u | wc -l)
  echo "$task, seed=1, in three processes: $different different data sets"
  [ "$different" -gt 1 ] || { echo "changed: this finding is out of date"; exit 1; }
done
