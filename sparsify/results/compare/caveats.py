"""Says why the costs of some rows cannot be compared fairly."""

from collections.abc import Sequence

from sparsify.common.values import first_few
from sparsify.results.compare.rows import COSTS, Row

# If the times of one row's seeds differ by more than this factor, and by more than this many
# seconds, other processes may have used the machine too.
UNEVEN, UNEVEN_SECONDS = 1.2, 1.0
# If any of these differ, times were measured on different machines.
MACHINE = {
    "device": "devices",
    "cpu": "CPUs",
    "processes": "numbers of processes",
    "threads": "numbers of threads",
}


def cost_caveats(rows: Sequence[Row]) -> tuple[dict[str, str], set[str]]:
    """Why costs cannot be compared fairly, and for which costs no winner is named."""
    machines = {key: _values(rows, key) for key in MACHINE}
    torches = {str(v) for row in rows for run in row.runs if (v := _torch(run.result))}
    said: dict[str, list[str]] = {cost: [] for cost in COSTS}
    refused = set()
    different = [f"{what} ({machines[key]})" for key, what in MACHINE.items() if machines[key]]
    if different:
        refused.add("seconds")
        said["seconds"].append(
            f"No winner by time: the runs used different {', different '.join(different)}."
        )
    if machines["device"]:
        refused.add("memory")
        said["memory"].append(
            f"No winner by memory: the runs used different devices ({machines['device']})."
        )
    if machines["processes"]:
        said["memory"].append(
            "Peak memory is that of one process, and the runs used different numbers of them "
            f"({machines['processes']})."
        )
    if len(torches) > 1:
        refused.add("seconds")
        reason = f"the runs used different versions of torch ({', '.join(sorted(torches))})"
        said["seconds"].append(f"No winner by time: {reason}.")
        said["memory"].append(f"Memory with a grain of salt: {reason}.")
    for cost in COSTS:
        unknown = [row.label for row in rows if row.cost(cost) is None]
        if unknown and cost not in refused:
            said[cost].append(f"Not known, and so not compared by {cost}: {'; '.join(unknown)}.")
    uneven = [row.label for row in rows if _is_uneven(row.costs("seconds"))]
    if uneven and "seconds" not in refused:
        said["seconds"].append(
            f"Seconds differ by more than {UNEVEN - 1:.0%} between seeds of {first_few(uneven)}: "
            "the machine may have done other work, and times are rough."
        )
    return {cost: " ".join(texts) for cost, texts in said.items() if texts}, refused


def _values(rows: Sequence[Row], key: str) -> str:
    """The values in the records if they differ; older records do not have all of them."""
    found = {value for row in rows for run in row.runs if (value := run.record.get(key))}
    return ", ".join(map(str, sorted(found))) if len(found) > 1 else ""


def _torch(result: dict[str, dict[str, str]]) -> str | None:
    return result.get("versions", {}).get("torch")


def _is_uneven(seconds: Sequence[float]) -> bool:
    if not seconds:
        return False
    least, most = min(seconds), max(seconds)
    return most > UNEVEN * least and most - least >= UNEVEN_SECONDS
