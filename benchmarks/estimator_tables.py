"""What the benchmark of z0 prints."""

from statistics import fmean
from typing import Any

from common import print_table
from estimator_comparison import OURS, THEIRS
from estimator_statistics import Difference, standard_error


def print_estimates(name: str, steps: int, result: dict[str, Any]) -> None:
    print(
        f"\n{name}: {result['log_ratios']:,} mismatched log-ratios after {steps} steps, "
        f"mean {result['mean']:+.3f}, σ {result['sigma']:.3f}, in nats\n"
    )
    print_table(
        [
            {
                "n": str(row.size),
                "standard error": f"{row.se:.3f}",
                "σ/√n": f"{row.se_independent:.3f}",
                "clamped": f"{row.se_clamped:.3f}",
                "bias of the clamp": f"{row.bias:+.3f}",
                "error of z0 (RMS)": f"{row.rmse:.3f}",
            }
            for row in result["rows"]
        ]
    )


def print_comparison(title: str, result: dict[str, Any]) -> None:
    print(f"\n{title}\n")
    print_table(
        [
            {
                "z0, steps": f"{row['from']}–{row['to']}",
                OURS: f"{row['whole']:.3f} ± {row['whole_se']:.3f}",
                THEIRS: f"{row['micro']:.3f} ± {row['micro_se']:.3f}",
                "spread within a step": f"{row['micro_spread']:.3f}",
            }
            for row in result["z0"]
        ]
    )
    print()
    print_table(
        [
            {
                "": row["metric"],
                OURS: f"{fmean(row['ours']):.4f} ± {standard_error(row['ours']):.4f}",
                THEIRS: f"{fmean(row['theirs']):.4f} ± {standard_error(row['theirs']):.4f}",
                "difference": f"{row['difference'].mean:+.4f} ± {row['difference'].se:.4f}",
                "p": f"{row['difference'].p:.3f}",
            }
            for row in result["rows"]
        ]
    )
    margin = next(row for row in result["rows"] if row["metric"] == "held-out margin")
    print("\n" + verdict(margin["difference"], fmean(margin["ours"]), len(margin["ours"])))


def verdict(difference: Difference, ours: float, num_seeds: int) -> str:
    """What the margins say, in a sentence."""
    change = f"{difference.mean:+.4f} ± {difference.se:.4f} nats"
    if ours > 0:
        change += f", {difference.mean / ours:+.1%} of it"
    if difference.is_noise:
        return f"Held-out margin: within noise over {num_seeds} seeds ({change})."
    direction = "higher" if difference.mean > 0 else "lower"
    return (
        f"Held-out margin: {direction} with z0 over {THEIRS} ({change}), over {num_seeds} seeds; "
        "of twenty such comparisons of equals one comes out so by chance."
    )
