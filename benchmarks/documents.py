"""Documents of results: what a run found, laid over what earlier runs did.

A document is the JSON of one table: `results`, each with its `case` and the `run` that it is of, `refused` (case ->
why), `skipped` (cases that no time was left for), and of the latest run `environment`, `ceilings` and `order`, the
table's cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Document = Mapping[str, Any]


def merged(before: Document, after: Document) -> dict[str, Any]:
    """The document of both runs: a case is what the later one made of it, and what it was where that one has no word.

    Args:
        before: of earlier runs, or empty.
        after: of the later run.

    Returns:
        Results in the order of the table, those of cases that it does not know behind them.
    """
    refused = dict(after["refused"])
    now = {_case(result): result for result in after["results"]}
    # what was refused now is not what it was measured before
    known = {_case(result): result for result in before.get("results", ()) if _case(result) not in refused} | now
    places = {case: place for place, case in enumerate(after.get("order", ()))}
    results = sorted(known.values(), key=lambda result: places.get(_case(result), len(places)))
    earlier = {case: why for case, why in before.get("refused", {}).items() if case not in now}
    skipped = dict.fromkeys([*before.get("skipped", ()), *after["skipped"]])
    return {
        **after,
        "results": results,
        "refused": earlier | refused,
        "skipped": [case for case in skipped if case not in known and case not in refused],
    }


def ceilings(document: Document) -> Iterator[Mapping[str, float]]:
    """Those of each run that a result is of."""
    for result in document["results"]:
        yield result["run"]["ceilings"] if "run" in result else document["ceilings"]


def _case(result: Mapping[str, Any]) -> str:
    return result.get("case", result["name"])
