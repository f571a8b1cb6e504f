"""Writes docs/results/faults.md from the kept counts of faults.py and fuzz.py: python benchmarks/faults_report.py"""

from page import ResultPage, as_table, load_results


def tabulate() -> str:
    """What was tried, with how many, and what was lost."""
    found = load_results("faults")["faults"]
    signals, kills, flips = found["signals"], found["kills"], found["flips"]
    sent = ", ".join(f"{number} {name}" for name, number in signals.items() if name.startswith("SIG"))
    lost = {name: sum(fault.startswith(name) for fault in kills["faults"]) for name in ("train", "encode")}
    runs = f"{signals['runs']} of one process, {signals['runs_of_two']} of two"
    rows = [
        ["runs hit by signals", runs, sent, f"{len(signals['faults'])} lost"],
        [
            "training killed",
            kills["train_points"],
            f"of {kills['train_changes']} changes to the disk",
            f"{lost['train']} lost",
        ],
        ["encode killed", kills["encode_points"], f"of {kills['encode_changes']} changes", f"{lost['encode']} lost"],
        ["flipped bits of a checkpoint", flips["checkpoint_flips"], f"in {flips['checkpoint_files']} files", ""],
        ["flipped bits of a dataset", flips["dataset_flips"], f"in {flips['dataset_files']} files", ""],
    ]
    for row, what in zip(rows[-2:], ("checkpoint", "dataset"), strict=True):
        row[-1] = f"{sum(what in str(fault) for fault in flips['faults'])} undetected"
    return as_table(["Test", "Trials", "Details", "Failures"], [[str(cell) for cell in row] for row in rows])


def tabulate_fuzz() -> str:
    """Calls, how they ended, the slowest and the largest."""
    rows = []
    for name, found in load_results("faults").items():
        if name.startswith("fuzz"):
            codes = ", ".join(f"{code}: {number:,}" for code, number in (found["exit_codes"] or {}).items()) or "-"
            rows.append(
                [
                    str(found["seed"]),
                    f"{found['inputs']:,}",
                    codes,
                    f"{found['slowest_s']:.1f}",
                    f"{found['most_mb']:,}",
                ]
            )
            rows[-1].append(str(len(found["faults"])))
    return as_table(["Seed", "Inputs", "Exit codes", "Slowest, s", "Largest, MB", "Faults"], rows)


PAGE = ResultPage("faults", "benchmarks/faults_report.py", {"faults": tabulate, "fuzz": tabulate_fuzz})


if __name__ == "__main__":
    PAGE.main(__doc__)
