"""The running server's /metrics as numbers, for the scripts beside this file: what vLLM counts, and quantiles of its histograms."""

import math
import urllib.request


def scrape(address: str) -> dict[str, float]:
    """Samples by name, summed over engines and labels; of a histogram's buckets each, as `name_bucket{le}`. Raises OSError without a server."""
    from prometheus_client.parser import text_string_to_metric_families

    text = urllib.request.urlopen(f"{address}/metrics", timeout=5).read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = f"{sample.name}{{{sample.labels['le']}}}" if sample.name.endswith("_bucket") else sample.name
            found[name] = found.get(name, 0.0) + sample.value
    return found


def quantile(q: float, name: str, before: dict[str, float], now: dict[str, float]) -> float:
    """The q-quantile (0..1) of what histogram `name` counted between two scrapes, NaN when that is nothing.

    As Prometheus' histogram_quantile: the values of a bucket are taken as spread evenly over it, so that the answer is as fine as
    the buckets are; above the last finite bound it is that bound.
    """
    prefix = f"{name}_bucket{{"
    buckets = sorted((float(key[len(prefix) : -1]), value - before.get(key, 0.0)) for key, value in now.items() if key.startswith(prefix))
    if not buckets or not buckets[-1][1]:
        return math.nan
    rank, low, below = q * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return low
