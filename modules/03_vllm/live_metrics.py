"""The running server's /metrics as numbers: what vLLM counts, and quantiles of its histograms."""

import math
import urllib.request


def scrape(address: str) -> dict[str, float]:
    """Samples by name, summed over engines and labels. Raises OSError without a server.

    Of a histogram, each of its buckets: `name_bucket{le}`.
    """
    from prometheus_client.parser import text_string_to_metric_families

    text = urllib.request.urlopen(f"{address}/metrics", timeout=5).read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name
            if name.endswith("_bucket"):
                name += f"{{{sample.labels['le']}}}"
            values[name] = values.get(name, 0.0) + sample.value
    return values


def quantile(q: float, name: str, before: dict[str, float], now: dict[str, float]) -> float:
    """The q-quantile (0..1) of what histogram `name` counted between two scrapes; NaN: nothing.

    As Prometheus' histogram_quantile: the values of a bucket are taken as spread evenly over it, so
    that the answer is as fine as the buckets are; above the last finite bound it is that bound.
    """
    prefix = f"{name}_bucket{{"
    buckets = []  # (upper bound, how many values lie at or below it)
    for key in now:
        if key.startswith(prefix):
            bound = float(key[len(prefix) : -1])
            buckets.append((bound, now[key] - before.get(key, 0.0)))
    buckets.sort()
    if not buckets or not buckets[-1][1]:
        return math.nan
    rank = q * buckets[-1][1]
    lower, below = 0.0, 0.0  # of the bucket before: its bound and its count
    for bound, count in buckets:
        if count >= rank and count > below:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = bound, count
    return lower
