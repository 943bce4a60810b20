"""Reads /metrics in both formats with the parsers of prometheus_client, and holds that they say the same.

usage: metrics.py TEXT OPENMETRICS TEXT_AFTERWARDS

Three files, scraped one after the other: a value that is the same before and afterwards must be the same in between. Prints one JSON
object: how many series and values were compared, and the exemplars."""

import json
import sys

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text

from checks import equal


def read(parse, name):
    """Families by name, samples by series, and exemplars."""
    families, samples, exemplars = {}, {}, []
    with open(name, encoding="utf-8", newline="") as file:
        content = file.read()
    for family in parse(content):
        families[family.name] = (family.type, family.documentation)
        for sample in family.samples:
            # A bound is a number, however it is written.
            labels = {key: repr(float(value)) if key == "le" else value for key, value in sample.labels.items()}
            series = (sample.name, tuple(sorted(labels.items())))
            if series in samples:
                raise AssertionError(f"{series} is there twice")
            samples[series] = sample.value
            if sample.exemplar:
                exemplar = sample.exemplar
                exemplars.append(
                    {"name": sample.name, "series": labels, "labels": exemplar.labels, "value": exemplar.value, "at": float(exemplar.timestamp)}
                )
    return families, samples, exemplars


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    before, now, after = read(text, sys.argv[1]), read(openmetrics, sys.argv[2]), read(text, sys.argv[3])
    equal(before[0], now[0])
    equal(sorted(before[1]), sorted(now[1]))
    # Not what changes by itself: the process opens a file to read what is said of it.
    still = [
        series
        for series, value in before[1].items()
        if after[1].get(series) == value and not series[0].startswith("process_")
    ]
    for series in still:
        equal((series, before[1][series]), (series, now[1][series]))
    print(json.dumps({"families": len(now[0]), "series": len(now[1]), "values": len(still), "exemplars": now[2]}))


main()
