"""
Right demonstrations that are much longer than what the model says: does the judge of `sft_weighting` refuse them, and what does that cost?

    python benchmarks/long_demonstrations.py [--workers N] [--output_dir DIR]
    python benchmarks/long_demonstrations.py --config benchmarks/long_demonstrations_after_short.yaml
    python benchmarks/long_demonstrations.py --judges DIR

A comparison like those of `trl-bridge compare`, whose options it has; its rows are in `long_demonstrations.yaml`: SmolLM2-135M-Instruct on chains
of sums with wordy solutions, without weights, and with those of `preset="selective"` by the summed and by the mean log-likelihood. Each run also
writes down what its judge saw. The second command begins with a model that has learnt short solutions and is often paid. `--judges` reads that and prints, for three judges fitted on the same rollouts (sum, mean, sum and length
as two features), the weight that they give the demonstrations and how well they foretell the next update's rewards.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from pydantic import NonNegativeInt
from trl import SFTConfig, SFTTrainer

from trl_bridge import BridgeTrainer
from trl_bridge.cli.compare import main
from trl_bridge.comparison.tasks.specs import TASKS, ReasoningGymSpec
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.objectives.weights import fit_judge, judge_weight


LOG = "BENCHMARK_JUDGE_LOG"


class LongSpec(ReasoningGymSpec):
    """
    `chain_sum` with each line of the worked solutions put into words.

    The model may begin with SFT updates on the solutions as they are: 4 of them an update, at the rate of the comparison.
    """

    short_updates: NonNegativeInt = 0

    later_fields = ("short_updates",)

    def build(self, seed, cache=None):
        task = super().build(seed, cache)
        if self.short_updates:
            taught = task.fresh_model()
            with tempfile.TemporaryDirectory() as folder:
                args = SFTConfig(
                    folder,
                    max_steps=self.short_updates,
                    per_device_train_batch_size=4,
                    learning_rate=2e-5,
                    lr_scheduler_type="constant",
                    completion_only_loss=True,
                    seed=seed,
                    use_cpu=not torch.cuda.is_available(),
                    bf16=False,
                    report_to="none",
                    save_strategy="no",
                )
                SFTTrainer(taught, args, train_dataset=task.demonstrations, processing_class=task.tokenizer).train()
            # The weights alone: trainers put a forward of their own on a model, and its copies would share it.
            task.base.load_state_dict(taught.state_dict())
        task.demonstrations = task.demonstrations.map(wordy, load_from_cache_file=False)
        return task


def wordy(row):
    *lines, answer = row["completion"][0]["content"].split("\n")
    told = ["Let me think about this step by step and write down what I do."]
    for line in lines:
        total, sign, term, after = re.fullmatch(r"(-?\d+) ([+-]) (\d+) = (-?\d+)", line).groups()
        verb = f"add {term} to it" if sign == "+" else f"take away {term} from it"
        told.append(f"I have {total} and I {verb}, which gives me {total} {sign} {term} = {after}.")
    told.append("I have used all of the numbers now, so I can stop here and say what I found.")
    return {"completion": [{"role": "assistant", "content": "\n".join([*told, answer])}]}


class RecordingBridgeTrainer(BridgeTrainer):
    """Writes down each update's demonstrations (log-likelihood, tokens) and rollouts (the same, and reward)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._seen, self._rows = [], []
        weighting, judged, observe = self.weighting, self.weighting.judged, self.weighting.observe_rollouts

        def keep(log_likelihoods, lengths):
            values = judged(log_likelihoods, lengths)
            self._seen = list(zip(values.tolist(), log_likelihoods.tolist(), lengths.tolist(), strict=True))
            return values

        def tell(pairs):
            known = {value: (s, n) for value, s, n in self._seen}
            self._rows += [("rollout", *known[value], reward) for value, reward in pairs]
            observe(pairs)

        weighting.judged, weighting.observe_rollouts = keep, tell

    def token_weights(self, log_probs, mask, weights):
        for s, n in zip((log_probs.double() * mask).sum(1).tolist(), mask.sum(1).tolist(), strict=True):
            self._rows.append(("demonstration", s, n, None))
        return super().token_weights(log_probs, mask, weights)

    def end_of_window(self):
        super().end_of_window()
        with open(os.environ[LOG], "a", encoding="utf-8") as file:
            key = [type(self).__name__, self.args.judge_per_token, self.args.seed]
            file.write(json.dumps({"run": key, "step": self.state.global_step, "rows": self._rows}) + "\n")
        self._rows = []


class UnweightedBridgeTrainer(RecordingBridgeTrainer):
    """Its judge is fitted, and not listened to."""

    def token_weights(self, log_probs, mask, weights):
        return super().token_weights(log_probs, mask, None)


TASKS["long-demonstrations"] = LongSpec
for name in ("Recording", "Unweighted"):
    METHODS[name.lower()] = METHODS["bridge"]._replace(
        name=name.lower(), trainer=f"long_demonstrations.{name}BridgeTrainer"
    )


def two_features(rollouts, demonstrations, later, penalty=1.0):
    """Weights and foretold rewards as `fit_judge` and `judge_weight` have them, from sum and length."""
    x = torch.tensor([row[:2] for row in rollouts], dtype=torch.float64)
    r = torch.tensor([row[2] for row in rollouts], dtype=torch.float64)
    low, high, mean, std = x.min(0).values, x.max(0).values, x.mean(0), x.std(0, correction=0) + 1e-6

    def design(rows):
        z = torch.tensor([row[:2] for row in rows], dtype=torch.float64).clamp(low, high)
        return torch.cat([torch.ones(len(rows), 1, dtype=torch.float64), (z - mean) / std], 1)

    ridge = torch.diag(torch.tensor([0.0, 2 * penalty, 2 * penalty], dtype=torch.float64))
    b = torch.tensor([float(torch.log((r.mean() + 0.01) / (1.01 - r.mean()))), 0.0, 0.0], dtype=torch.float64)
    for _ in range(4):
        d = design(rollouts)
        p = torch.sigmoid(d @ b)
        curvature = d.T @ (d * (p * (1 - p))[:, None]) + ridge + torch.diag(torch.tensor([1e-3, 0, 0]))
        b = b - torch.linalg.solve(curvature, d.T @ (p - r) + ridge @ b)
    paid = torch.sigmoid(design(demonstrations) @ b)
    return (((paid + 1e-3) / (r.mean() + 1e-3)).clamp(max=1) ** 4).tolist(), torch.sigmoid(design(later) @ b).tolist()


def one_feature(read, rollouts, demonstrations, later):
    fit = fit_judge([read(row) for row in rollouts], [row[2] for row in rollouts], 1.0)
    weights = judge_weight([read(row) for row in demonstrations], fit, 4.0).tolist()
    s = torch.tensor([read(row) for row in later], dtype=torch.float64).clamp(fit.low, fit.high)
    return weights, torch.sigmoid(fit.b0 + fit.b1 * (s - fit.mean) / fit.std).tolist()


JUDGES = {
    "sum": lambda *rows: one_feature(lambda row: row[0], *rows),
    "mean": lambda *rows: one_feature(lambda row: row[0] / row[1], *rows),
    "sum and length": two_features,
}


def judges(folder):
    """Print what each judge would have said in each run."""
    runs = defaultdict(list)
    for line in (Path(folder) / "judged.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        runs[tuple(entry["run"])].append(entry["rows"])
    print(
        "| run | judge | weight, updates 2-5 | 6-10 | 11-20 | Brier score of the next rewards | tokens: demonstrations, rollouts |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (kind, per_token, seed), windows in runs.items():
        rollouts = [[row[1:] for row in window if row[0] == "rollout"] for window in windows]
        shown = [[row[1:] for row in window if row[0] == "demonstration"] for window in windows]
        for name, judge in JUDGES.items():
            weights, errors = {}, []
            for k in range(1, len(windows)):
                past = [row for window in rollouts[max(0, k - 20) : k] for row in window]
                if past and rollouts[k]:
                    given, foretold = judge(past, shown[k], rollouts[k])
                    weights[k + 1] = statistics.mean(given)
                    errors += [(p - row[2]) ** 2 for p, row in zip(foretold, rollouts[k], strict=True)]
            parts = [[w for k, w in weights.items() if a <= k <= b] for a, b in ((2, 5), (6, 10), (11, 20))]
            lengths = [statistics.mean(row[1] for window in rows for row in window) for rows in (shown, rollouts)]
            listened = "none" if kind.startswith("Unweighted") else "mean" if per_token else "sum"
            print(
                f"| weighted by: {listened}, seed {seed} | {name} | "
                + " | ".join(f"{statistics.mean(part):.2f}" if part else "" for part in parts)
                + f" | {statistics.mean(errors):.3f} | {lengths[0]:.0f}, {lengths[1]:.0f} |"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judges", metavar="DIR", help="train nothing, read this folder")
    parser.add_argument("--config", default=str(Path(__file__).with_suffix(".yaml")))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/long-demonstrations"))
    options, others = parser.parse_known_args()
    if options.judges:
        judges(options.judges)
        sys.exit()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    os.environ[LOG] = str(options.output_dir.absolute() / "judged.jsonl")
    sys.exit(main(["--config", options.config, "--output_dir", str(options.output_dir), *others]))
