"""What the dashboards show; ``build`` makes them. ``$b`` and ``$i`` stand for the selectors of the variables."""

from dataclasses import dataclass, field
from typing import Literal

INSTANCE = 'instance=~"$instance"'
BRIDGE = f'{INSTANCE}, bridge=~"$bridge"'
WORK = 'route!~"/health/.*|/metrics"'
RATE = "[$__rate_interval]"
OF_BRIDGE = "{{bridge}} {{front}}"  # windows of outputs are of each process that answers HTTP


@dataclass(frozen=True)
class Panel:
    """One panel: queries with their legends, and the alert (with the metric in it) that its threshold is of."""

    title: str
    unit: str
    meaning: str
    queries: tuple[tuple[str, str], ...]
    alert: tuple[str, str] | None = None
    kind: Literal["lines", "stat"] = "lines"
    width: int | None = None


@dataclass(frozen=True)
class Row:
    """Panels under a title."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """A dashboard; ``name`` is that of its file, and its id in Grafana."""

    name: str
    title: str
    rows: tuple[Row, ...] = field(default_factory=tuple)


def quantiles(
    metric: str, by: str, selector: str = INSTANCE, at: tuple[float, ...] = (0.5, 0.95, 0.99)
) -> tuple[tuple[str, str], ...]:
    """Quantiles of a histogram by a label."""
    return tuple(
        (
            f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket{{{selector}}}{RATE})))",
            f"p{q * 100:g} {{{{{by}}}}}",
        )
        for q in at
    )


def rate(metric: str, by: str, selector: str = INSTANCE) -> tuple[str, str]:
    """The increase of a counter per second by some labels."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return f"sum by ({by}) (rate({metric}{{{selector}}}{RATE}))", legend


def mean(metric: str, by: str, selector: str = INSTANCE) -> tuple[str, str]:
    """The mean of a histogram by a label."""
    one, other = (f"sum by ({by}) (rate({metric}_{part}{{{selector}}}{RATE}))" for part in ("sum", "count"))
    return f"{one} / {other}", f"mean {{{{{by}}}}}"


def share(metric: str, part: str, selector: str, by: str = "") -> str:
    """The part of a counter's increase that has a label."""
    whole = f"sum {by}(rate({metric}{{{selector}}}{RATE}))"
    return f"{whole.replace(selector, f'{selector}, {part}')} / {whole}"


def score(condition: str) -> str:
    """Of the last evaluation, under a condition."""
    return f'max by (bridge, task) (latentwire_evaluation_score{{{BRIDGE}, condition="{condition}"}})'


def of_bridge(metric: str) -> tuple[tuple[str, str], ...]:
    """A gauge of each bridge."""
    return ((f"{metric}{{{BRIDGE}}}", OF_BRIDGE),)


def memory(kind: str) -> str:
    """Bytes of a kind, by device."""
    return f'max by (instance, replica, device) (latentwire_memory_bytes{{{INSTANCE}, kind="{kind}"}})'


TAKEN = f"1 - {memory('free')} / {memory('total')}"
FAILING = (
    f'sum(rate(latentwire_outcomes_total{{{INSTANCE}, outcome=~"failed|late"}}{RATE})) '
    f"/ sum(rate(latentwire_outcomes_total{{{INSTANCE}}}{RATE})) or vector(0)"
)

OVERVIEW = Board(
    "latentwire-overview",
    "LatentWire: overview",
    (
        Row(
            "Is it well?",
            (
                Panel(
                    "Ready",
                    "bool_yes_no",
                    "Yes once every bridge has answered once.",
                    ((f"latentwire_ready{{{INSTANCE}}}", "{{instance}}"),),
                    ("LatentWireNotReady", ""),
                    "stat",
                    4,
                ),
                Panel(
                    "Requests failing",
                    "percentunit",
                    "Share of requests that fail or are late, streams that end so included.",
                    ((FAILING, "failed or late"),),
                    ("LatentWireFailing", ""),
                    "stat",
                    4,
                ),
                Panel(
                    "Stalled",
                    "bool_yes_no",
                    "There is work, and nothing moves.",
                    ((f"max by (instance) (latentwire_stalled{{{INSTANCE}}})", "{{instance}}"),),
                    ("LatentWireStalled", ""),
                    "stat",
                    4,
                ),
                Panel(
                    "Store",
                    "bool_yes_no",
                    "Whether the store answers.",
                    ((f"min by (instance) (latentwire_store_available{{{INSTANCE}}})", "{{instance}}"),),
                    ("LatentWireStoreAway", ""),
                    "stat",
                    4,
                ),
                Panel(
                    "Memory taken",
                    "percentunit",
                    "Of each device, whoever takes it.",
                    ((TAKEN, "{{device}}"),),
                    ("LatentWireMemoryFull", ""),
                    "stat",
                    4,
                ),
                Panel(
                    "Commonest output",
                    "percentunit",
                    "Share of the commonest among the latest outputs.",
                    of_bridge("latentwire_output_top_ratio"),
                    ("LatentWireBridgeCollapsed", "top_ratio"),
                    "stat",
                    4,
                ),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Outcomes",
                    "reqps",
                    "Requests for work by how they ended; a stream by its end.",
                    (rate("latentwire_outcomes_total", "outcome", BRIDGE),),
                ),
                Panel(
                    "Requests by route and status",
                    "reqps",
                    "Every request, probes included.",
                    (rate("latentwire_requests_total", "route, status"),),
                ),
                Panel(
                    "Outcomes by bridge",
                    "reqps",
                    "Where the requests go.",
                    (rate("latentwire_outcomes_total", "bridge, outcome", BRIDGE),),
                ),
                Panel(
                    "Latency",
                    "s",
                    "99th percentile, by route.",
                    quantiles("latentwire_request_seconds", "route", f"{INSTANCE}, {WORK}", (0.99,)),
                    ("LatentWireSlow", ""),
                ),
                Panel(
                    "First token",
                    "s",
                    "From the arrival of a request, 99th percentile.",
                    quantiles("latentwire_first_token_seconds", "bridge", BRIDGE, (0.99,)),
                    ("LatentWireFirstTokenSlow", ""),
                ),
                Panel(
                    "Tokens",
                    "short",
                    "Per second. Source: read by senders; soft: given to receivers; generated: written by them.",
                    (rate("latentwire_tokens_total", "kind"),),
                ),
                Panel(
                    "Refusals",
                    "reqps",
                    "Requests not taken on, by the type in their error body.",
                    (rate("latentwire_refusals_total", "reason"),),
                ),
                Panel(
                    "Rows waiting and running",
                    "short",
                    "A request is as many rows as it wants outputs. Past the limit requests get 429.",
                    (
                        (f"sum(latentwire_queue_rows{{{INSTANCE}}})", "waiting"),
                        (f"sum(latentwire_running_rows{{{INSTANCE}}})", "running"),
                        (f"sum(latentwire_admitted_rows{{{INSTANCE}}})", "admitted"),
                        (f"sum(max by (instance) (latentwire_admitted_rows_limit{{{INSTANCE}}}))", "limit"),
                    ),
                ),
                Panel(
                    "Ignored fields of /v1",
                    "short",
                    "Fields that clients of OpenAI's API sent, per second, and that were taken and not used.",
                    (rate("latentwire_ignored_fields_total", "field"),),
                ),
            ),
        ),
    ),
)

LATENCY = Board(
    "latentwire-latency",
    "LatentWire: latency and load",
    (
        Row(
            "What callers wait for",
            (
                Panel(
                    "Latency by route",
                    "s",
                    "Request to answer, or to the end of a stream.",
                    quantiles("latentwire_request_seconds", "route", f"{INSTANCE}, {WORK}"),
                    ("LatentWireSlow", ""),
                ),
                Panel(
                    "First token",
                    "s",
                    "From the arrival of a request to the first token of each output.",
                    quantiles("latentwire_first_token_seconds", "bridge", BRIDGE),
                    ("LatentWireFirstTokenSlow", ""),
                ),
                Panel(
                    "Between tokens",
                    "s",
                    "Mean over an output.",
                    quantiles("latentwire_inter_token_seconds", "bridge", BRIDGE),
                ),
                Panel(
                    "Encoding",
                    "s",
                    "Until all latents of a request are there, from the cache or the sender.",
                    quantiles("latentwire_encode_seconds", "bridge", BRIDGE),
                ),
                Panel(
                    "In the queue",
                    "s",
                    "Until the first batch, or step, that holds the row.",
                    quantiles("latentwire_queue_seconds", "half", at=(0.5, 0.99)),
                ),
                Panel(
                    "One batch",
                    "s",
                    "On the device, loading its model included.",
                    quantiles("latentwire_device_seconds", "half", at=(0.5, 0.95)),
                ),
            ),
        ),
        Row(
            "What the device does",
            (
                Panel(
                    "Rows per batch",
                    "short",
                    "Near 1 under load: requests do not meet; near LW_MAX_BATCH: they wait for room.",
                    (mean("latentwire_batch_rows", "half"), *quantiles("latentwire_batch_rows", "half", at=(0.95,))),
                ),
                Panel(
                    "Tokens per batch",
                    "short",
                    "Of a receiver: of a step, those it reads included.",
                    (
                        mean("latentwire_batch_tokens", "half"),
                        *quantiles("latentwire_batch_tokens", "half", at=(0.95,)),
                    ),
                ),
                Panel(
                    "Busy",
                    "percentunit",
                    "Seconds of work in each second.",
                    (rate("latentwire_device_seconds_sum", "half"),),
                ),
                Panel(
                    "Key/value cache in use",
                    "percentunit",
                    "Share that running requests hold. At 1 requests wait, or begin again: LW_KV_TOKENS.",
                    ((f"latentwire_kv_usage_ratio{{{INSTANCE}}}", "{{model}}"),),
                ),
                Panel(
                    "Preemptions",
                    "short",
                    "Outputs per second that gave up their place in a full cache, and were read again.",
                    ((f"sum by (instance) (rate(latentwire_preemptions_total{{{INSTANCE}}}{RATE}))", "{{instance}}"),),
                ),
                Panel(
                    "Device utilisation",
                    "percentunit",
                    "As the driver says; absent without a GPU or nvidia-ml-py.",
                    ((f"latentwire_device_utilization_ratio{{{INSTANCE}}}", "{{device}}"),),
                ),
                Panel(
                    "Device power",
                    "watt",
                    "As the driver says; absent without a GPU or nvidia-ml-py.",
                    ((f"latentwire_device_power_watts{{{INSTANCE}}}", "{{device}}"),),
                ),
            ),
        ),
        Row(
            "What need not be made again",
            (
                Panel(
                    "Texts encoded before",
                    "percentunit",
                    "Share of texts whose encoding was still there, so that no sender ran.",
                    (
                        (
                            share("latentwire_encode_cache_total", 'result="hit"', INSTANCE),
                            "hits",
                        ),
                    ),
                ),
                Panel(
                    "Latents by id",
                    "reqps",
                    "Requests that name latents, by whether all were there.",
                    (rate("latentwire_latent_lookups_total", "result"),),
                ),
                Panel(
                    "Store failures",
                    "short",
                    "Calls per second that the store did not answer.",
                    (
                        (
                            f"sum by (instance) (rate(latentwire_store_failures_total{{{INSTANCE}}}{RATE}))",
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    "Size of a latent",
                    "bytes",
                    "Messages as they cross the wire.",
                    (
                        mean("latentwire_latent_bytes", "bridge", BRIDGE),
                        *quantiles("latentwire_latent_bytes", "bridge", BRIDGE, (0.99,)),
                    ),
                ),
            ),
        ),
    ),
)

MEMORY = Board(
    "latentwire-memory",
    "LatentWire: memory and models",
    (
        Row(
            "Devices",
            (
                Panel(
                    "Taken",
                    "percentunit",
                    "Of each device, whoever takes it.",
                    ((TAKEN, "{{instance}} {{device}}"),),
                    ("LatentWireMemoryFull", ""),
                ),
                Panel(
                    "By kind",
                    "bytes",
                    "total and free are the device's, the rest this service's.",
                    ((f"latentwire_memory_bytes{{{INSTANCE}}}", "{{device}} {{kind}}"),),
                ),
                Panel(
                    "Process that answers HTTP",
                    "bytes",
                    "Resident; the models' process is device cpu, kind resident.",
                    ((f"sum by (instance) (latentwire_http_resident_bytes{{{INSTANCE}}})", "{{instance}}"),),
                ),
                Panel(
                    "Reserved and not allocated",
                    "percentunit",
                    "Of the device: what the allocator holds in pieces that fit nothing.",
                    ((f"({memory('reserved')} - {memory('allocated')}) / {memory('total')}", "{{device}}"),),
                    ("LatentWireMemoryFragmenting", ""),
                ),
                Panel(
                    "Allocator retries",
                    "short",
                    "Times per second that memory had to be given back to get more.",
                    (
                        (
                            f"sum by (instance, device) (rate(latentwire_allocator_retries_total{{{INSTANCE}}}{RATE}))",
                            "{{device}}",
                        ),
                    ),
                ),
                Panel(
                    "Out of memory",
                    "short",
                    "Batches in 15 minutes that memory was too small for: they are halved.",
                    ((f"sum by (half) (increase(latentwire_out_of_memory_total{{{INSTANCE}}}[15m]))", "{{half}}"),),
                    ("LatentWireOutOfMemory", ""),
                ),
            ),
        ),
        Row(
            "Models",
            (
                Panel(
                    "Weights in memory",
                    "bytes",
                    "Models that take turns within the budget come and go here.",
                    ((f"latentwire_model_bytes{{{INSTANCE}}}", "{{model}}"),),
                ),
                Panel(
                    "Memory budget",
                    "bytes",
                    "Of all devices together; 0: no limit.",
                    ((f"latentwire_memory_budget_bytes{{{INSTANCE}}}", "{{instance}}"),),
                ),
                Panel(
                    "Loads and unloads",
                    "short",
                    "Since the start.",
                    (
                        (f"latentwire_model_loads_total{{{INSTANCE}}}", "{{model}} loaded"),
                        (f"latentwire_model_unloads_total{{{INSTANCE}}}", "{{model}} dropped"),
                    ),
                ),
                Panel(
                    "Seconds of a load",
                    "s",
                    "Mean since the start.",
                    (
                        (
                            f"latentwire_model_load_seconds_total{{{INSTANCE}}}"
                            f" / (latentwire_model_loads_total{{{INSTANCE}}} > 0)",
                            "{{model}}",
                        ),
                    ),
                ),
                Panel(
                    "Key/value caches",
                    "short",
                    "In tokens; fewer than LW_KV_TOKENS where memory was too small for it.",
                    ((f"latentwire_kv_tokens{{{INSTANCE}}}", "{{model}} {{kind}}"),),
                ),
                Panel(
                    "Key/value blocks",
                    "short",
                    "Of 16 tokens each.",
                    ((f"latentwire_kv_blocks{{{INSTANCE}}}", "{{model}} {{kind}}"),),
                ),
            ),
        ),
    ),
)

QUALITY = Board(
    "latentwire-quality",
    "LatentWire: bridge quality",
    (
        Row(
            "Collapse: does a bridge still say different things?",
            (
                Panel(
                    "Share of the commonest output",
                    "percentunit",
                    "Among the latest 256 outputs of a bridge. Red: most requests get the same answer.",
                    of_bridge("latentwire_output_top_ratio"),
                    ("LatentWireBridgeCollapsed", "top_ratio"),
                ),
                Panel(
                    "Different outputs",
                    "percentunit",
                    "Among the latest 256. Red: nearly all are the same few, unless the task has only a few answers.",
                    of_bridge("latentwire_output_distinct_ratio"),
                    ("LatentWireBridgeCollapsed", "distinct_ratio"),
                ),
                Panel(
                    "Entropy of words",
                    "short",
                    "Nats, over the words of the latest outputs. A high value alone does not rule a collapse out.",
                    of_bridge("latentwire_output_entropy_nats"),
                    ("LatentWireFewWords", "entropy_nats"),
                ),
                Panel(
                    "Entropy of tokens",
                    "short",
                    "Nats, of what the receiver chose from, mean over the latest outputs. A rise: it no longer knows "
                    "what to say. Near 0 it is sure of each token, as of labels; so is one that always says the same.",
                    of_bridge("latentwire_output_token_entropy_nats"),
                ),
                Panel(
                    "Share of the commonest word",
                    "percentunit",
                    "Of all words of the latest outputs.",
                    of_bridge("latentwire_output_top_word_ratio"),
                    ("LatentWireFewWords", "top_word_ratio"),
                ),
                Panel(
                    "Similarity of latents",
                    "short",
                    "Mean cosine between texts' mean slots. Red: the text makes no difference.",
                    of_bridge("latentwire_latent_similarity"),
                    ("LatentWireLatentsAlike", "latent_similarity"),
                ),
                Panel(
                    "Drift of latents",
                    "short",
                    "From those of training texts, in standard deviations of one. Red: texts are of another kind.",
                    of_bridge("latentwire_latent_drift"),
                    ("LatentWireLatentsDrift", ""),
                ),
                Panel(
                    "Windows",
                    "short",
                    "Outputs and latents that these numbers are of; few say little.",
                    (
                        (f"latentwire_output_window{{{BRIDGE}}}", f"{OF_BRIDGE} outputs"),
                        (f"latentwire_latent_window{{{BRIDGE}}}", f"{OF_BRIDGE} latents"),
                    ),
                ),
            ),
        ),
        Row(
            "Diversity",
            (
                Panel(
                    "Different words",
                    "percentunit",
                    "Over all words of the latest outputs (distinct-1).",
                    of_bridge("latentwire_output_distinct_1"),
                ),
                Panel(
                    "Different word pairs",
                    "percentunit",
                    "Over all pairs of the latest outputs (distinct-2).",
                    of_bridge("latentwire_output_distinct_2"),
                ),
                Panel(
                    "Repetition",
                    "percentunit",
                    "Share of an output's runs of four words that it has said before.",
                    of_bridge("latentwire_output_repetition_ratio"),
                ),
                Panel(
                    "Empty outputs",
                    "percentunit",
                    "Share of the latest that say nothing.",
                    of_bridge("latentwire_output_empty_ratio"),
                ),
                Panel(
                    "Truncated outputs",
                    "percentunit",
                    "Share of the latest that their limit of tokens cut.",
                    of_bridge("latentwire_output_truncated_ratio"),
                ),
            ),
        ),
        Row(
            "The gate",
            (
                Panel(
                    "Answers with a fallback",
                    "short",
                    "Per second, by where they come from: the latent where the gate trusts it, else the text.",
                    (rate("latentwire_gated_answers_total", "bridge, answered_from", BRIDGE),),
                ),
                Panel(
                    "Answered from the latent",
                    "percentunit",
                    "Share of the answers with a fallback.",
                    (
                        (
                            share("latentwire_gated_answers_total", 'answered_from="latent"', BRIDGE, "by (bridge) "),
                            "{{bridge}}",
                        ),
                    ),
                ),
                Panel(
                    "Trust in latents",
                    "percentunit",
                    "Of the gate in answers from latents.",
                    quantiles("latentwire_trust", "bridge", BRIDGE, (0.1, 0.5)),
                ),
            ),
        ),
    ),
)

EVALUATIONS = Board(
    "latentwire-evaluations",
    "LatentWire: evaluations",
    (
        Row(
            "Jobs",
            (
                Panel(
                    "Queued and running",
                    "short",
                    "One runs at a time, in the gaps between requests.",
                    ((f"latentwire_evaluations{{{INSTANCE}}}", "{{state}}"),),
                ),
                Panel(
                    "Finished",
                    "short",
                    "Since the start, by how they ended.",
                    ((f"latentwire_evaluations_finished_total{{{INSTANCE}}}", "{{state}}"),),
                ),
            ),
        ),
        Row(
            "Scores",
            (
                Panel(
                    "Score by condition",
                    "percentunit",
                    "Of the last evaluation of each bridge and task here: a bridge's score is a comparison.",
                    ((f"latentwire_evaluation_score{{{BRIDGE}}}", "{{bridge}} {{task}} {{condition}}"),),
                    width=16,
                ),
                Panel(
                    "Bridge over text",
                    "percentunit",
                    "Score of the bridge over that of the receiver which reads the text.",
                    (
                        (
                            f"{score('bridge')} / {score('direct')}",
                            "{{bridge}} {{task}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, LATENCY, MEMORY, QUALITY, EVALUATIONS)
