"""Compare models that are trained alike: python scripts/compare.py configs/comparisons/COMPARISON.yaml

It prints what the comparison will cost, does the runs that have no record yet, and writes records, tables and plots to
the comparison's results_dir. Runs that fail are listed, and tried again by the next call. `accelerate launch` on
several GPUs, or `torchrun`, does several runs at once: each process does one at a time, on the GPU of its local rank.
"""

import argparse
import sys
from pathlib import Path

from shared_bert.command_line import reports_user_errors
from shared_bert.evaluation.comparison import (
    MAY_DIFFER,
    Comparison,
    ComparisonRunner,
    check_records,
    cost_report,
    findings,
    has_records,
    measure_speed,
    take_own_device,
    write_results,
)


@reports_user_errors
def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, nargs="+")
    parser.add_argument("--output_dir", help="for models; else the file's")
    parser.add_argument("--results_dir", help="for records, tables and plots; else the file's")
    parser.add_argument("--cost", action="store_true", help="print what it will cost, and stop")
    parser.add_argument(
        "--speed", action="store_true", help="measure steps of all variants in turns, on an idle machine"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="write tables and plots from the records, and train nothing"
    )
    parser.add_argument("--findings", type=Path, help="a page that is written with the claims of all comparisons")
    parser.add_argument(
        "--may_differ", nargs="+", choices=MAY_DIFFER, default=[], help="in what records may differ from the file"
    )
    parsed = parser.parse_args(arguments)
    changes = {name: getattr(parsed, name) for name in ("output_dir", "results_dir") if getattr(parsed, name)}
    failed = {}
    comparisons = [Comparison(path, **changes) for path in parsed.comparison]
    for comparison in comparisons:
        if parsed.redraw or parsed.speed:
            # Their commit is shown in the tables; who trains goes by it.
            check_records(comparison, {"commit", *parsed.may_differ})
        if parsed.speed:
            measure_speed(comparison)
        elif not parsed.redraw:
            runner = ComparisonRunner(comparison, parsed.may_differ)
            print(cost_report(comparison), flush=True)
            if parsed.cost:
                continue
            runner.run()
            failed |= {f"{comparison.path.stem}, {name}": error for name, error in runner.failed.items()}
        if has_records(comparison) or parsed.redraw:
            write_results(comparison)
            print(f"tables and plots are in {comparison.results_dir}")
    if parsed.findings:
        parsed.findings.parent.mkdir(parents=True, exist_ok=True)
        parsed.findings.write_text(findings(comparisons, parsed.findings))
    if failed:
        raise ValueError(
            f"{len(failed)} runs have no record; call again to retry them: "
            + "; ".join(f"{name}: {error}" for name, error in failed.items())
        )


if __name__ == "__main__":
    take_own_device()
    sys.exit(main(sys.argv[1:]))
