"""The dashboards: which panels, of which metrics. docs/dashboards.md shows them."""

from __future__ import annotations

from deploy.grafana.panels import Board, Kind, Panel, Query, Unit

__all__ = ["BOARDS"]

ASKED = 'operation!~"GET /(livez|readyz|startupz|metrics)|GET /v2/health/.+"'
CLASSIFY = 'operation=~"POST /v1/classify|POST /v2/models/.+/infer"'


def panel(
    title: str,
    queries: str | dict[str, str],
    about: str,
    *,
    unit: Unit = "",
    kind: Kind = "lines",
    width: int = 12,
    limit: float | None = None,
    gpu_only: bool = False,
) -> Panel:
    """A panel of one expression, or of several by their legend."""
    named = {"": queries} if isinstance(queries, str) else queries
    asked = tuple(Query(expr, legend) for legend, expr in named.items())
    return Panel(title, asked, about, unit, kind, width, limit, gpu_only)


def number(title: str, expr: str, about: str, *, unit: Unit = "") -> Panel:
    """A small panel with the number of now."""
    return panel(title, expr, about, unit=unit, kind="number", width=4)


def quantile(q: float, metric: str, *, by: str = "", where: str = "") -> str:
    """The expression for a quantile of a histogram."""
    labels = ", ".join(part for part in (by, "le") if part)
    matchers = ", ".join(part for part in ("ME", where) if part)
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{{matchers}}}[RATE])))"


def quantiles(metric: str, *, where: str = "") -> dict[str, str]:
    """Median and tails of a histogram, by their names."""
    named = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {name: quantile(q, metric, where=where) for name, q in named.items()}


def mean(metric: str, *, by: str, where: str = "") -> str:
    """The expression for the mean of a histogram."""
    matchers = ", ".join(part for part in ("ME", where) if part)
    total, count = (
        f"sum by ({by}) (rate({metric}_{part}{{{matchers}}}[RATE]))" for part in ("sum", "count")
    )
    return f"{total} / {count}"


def rate(metric: str, *, by: str, where: str = "") -> str:
    """The expression for events a second."""
    matchers = ", ".join(part for part in ("ME", where) if part)
    return f"sum by ({by}) (rate({metric}{{{matchers}}}[RATE]))"


def spread(metric: str, *, where: str = "") -> str:
    """The expression for a histogram as a heat map."""
    matchers = ", ".join(part for part in ("ME", where) if part)
    return f"sum by (le) (increase({metric}_bucket{{{matchers}}}[RATE]))"


REQUESTS = f"sum(rate(medley_requests_total{{ME, {ASKED}}}[RATE]))"
FAILED = f'sum(rate(medley_requests_total{{ME, status=~"5..", {ASKED}}}[RATE]))'

TRAFFIC = Board(
    "medley-traffic",
    "Medley: traffic",
    "What is asked, and what becomes of it.",
    (
        number("Ready servers", "sum(medley_ready{ME})", "Servers that take traffic."),
        number("Requests", REQUESTS, "Without probes and scrapes.", unit="requests/s"),
        number("Images", "sum(rate(medley_images_total{ME}[RATE]))", "Asked for.", unit="images/s"),
        number("5xx", f"({FAILED} or vector(0)) / {REQUESTS}", "Their share.", unit="share"),
        number(
            "p99",
            quantile(0.99, "medley_request_duration_seconds", where=CLASSIFY),
            "Of classifications.",
            unit="s",
        ),
        number(
            "Alerts",
            'count(ALERTS{alertstate="firing", job=~"$job"}) or vector(0)',
            "That fire now; docs/runbook.md says what to do.",
        ),
        panel(
            "Requests by operation",
            {"{{operation}}": rate("medley_requests_total", by="operation", where=ASKED)},
            "Without probes and scrapes.",
            unit="requests/s",
        ),
        panel(
            "Answers by status",
            {"{{status}}": rate("medley_requests_total", by="status", where=ASKED)},
            "499: the client left before its answer.",
            unit="requests/s",
            kind="stacked",
        ),
        panel(
            "Images by outcome",
            {"{{outcome}}": rate("medley_images_total", by="outcome")},
            "client_error: cannot be used; rejected: too busy; deadline: too late.",
            unit="images/s",
            kind="stacked",
        ),
        panel(
            "Problems by code",
            {"{{code}}": rate("medley_problems_total", by="code")},
            "Of requests, and of single images within an answer; docs/api.md lists the codes.",
            unit="1/s",
        ),
        panel(
            "Failures, of five minutes",
            {
                "requests, 5xx": 'job:medley_requests_failed:ratio_rate5m{job=~"$job"}',
                "images without an answer": 'job:medley_images_failed:ratio_rate5m{job=~"$job"}',
                "images sent away": 'job:medley_images_rejected:ratio_rate5m{job=~"$job"}',
            },
            "What MedleyErrors, MedleyImagesFail and MedleyRejects look at.",
            unit="share",
            width=8,
        ),
        panel(
            "Requests being answered",
            {"{{instance}}": "medley_inflight_requests{ME}"},
            "One server well above the others: the balancer does not spread.",
            width=8,
        ),
        panel(
            "Refused connections",
            {"{{code}}": rate("medley_connections_refused_total", by="code")},
            "Closed by a limit, or not HTTP/1.1; not among the requests.",
            unit="1/s",
            width=8,
        ),
    ),
)

LATENCY = Board(
    "medley-latency",
    "Medley: latency by stage",
    "How long answers take, and where the time goes.",
    (
        panel(
            "Classification",
            quantiles("medley_request_duration_seconds", where=CLASSIFY),
            "From the headers in to the last byte out; the line is MedleySlow's limit.",
            unit="s",
            limit=1,
        ),
        panel(
            "Classification, all of them",
            spread("medley_request_duration_seconds", where=CLASSIFY),
            "How many took how long.",
            unit="s",
            kind="heatmap",
        ),
        panel(
            "Stages, mean",
            {"{{stage}}": mean("medley_stage_duration_seconds", by="stage")},
            "fetch, decode, queue: of one image; forward: of a batch; head: of a request.",
            unit="s",
        ),
        panel(
            "Stages, p99",
            {"{{stage}}": quantile(0.99, "medley_stage_duration_seconds", by="stage")},
            "queue grows first when there is too much to do, decode when there are few threads.",
            unit="s",
        ),
        panel(
            "p99 by operation",
            {
                "{{operation}}": quantile(
                    0.99, "medley_request_duration_seconds", by="operation", where=ASKED
                )
            },
            "Registrations and fetched bundles may take their time.",
            unit="s",
        ),
        panel(
            "Oldest image that waits",
            {"{{instance}}": "medley_queue_oldest_seconds{ME}"},
            "The line is MedleyQueueLong's limit.",
            unit="s",
            width=6,
            limit=1,
        ),
        panel(
            "Images to decode",
            {"{{instance}}": "medley_decode_backlog_images{ME}"},
            "Well above MEDLEY_DECODE_THREADS: the processor limits.",
            width=6,
        ),
    ),
)

SINGLE, BATCHED = (
    f"sum(rate(medley_batch_distinct_tasks_{part}[RATE]))"
    for part in ('bucket{ME, le="1.0"}', "count{ME}")
)

BATCHES = Board(
    "medley-batches",
    "Medley: batches",
    "How full and how mixed forwards are, and whether the engine keeps up.",
    (
        panel(
            "Images in a batch",
            {"mean of {{instance}}": mean("medley_batch_images", by="instance")},
            "Full batches are cheap ones; MEDLEY_MAX_WAIT_MS is how long they wait for company.",
            width=8,
        ),
        panel(
            "Images in a batch, all of them",
            spread("medley_batch_images"),
            "How many forwards had how many images.",
            kind="heatmap",
            width=8,
        ),
        panel(
            "Distinct tasks in a batch",
            {"mean": mean("medley_batch_distinct_tasks", by="job")}
            | {"p95": quantile(0.95, "medley_batch_distinct_tasks")},
            "Zero-shot counts as one.",
            width=8,
        ),
        panel(
            "Batches that are mixed",
            f"1 - {SINGLE} / {BATCHED}",
            "Of more than one task: what one server for all tasks is good for.",
            unit="share",
            width=8,
        ),
        panel(
            "Batches",
            {"{{instance}}": rate("medley_batch_images_count", by="instance")},
            "Without heartbeats of an idle engine.",
            unit="1/s",
            width=8,
        ),
        panel(
            "Time in forwards",
            {
                "{{instance}}": rate(
                    "medley_stage_duration_seconds_sum", by="instance", where='stage="forward"'
                )
            },
            "Seconds a second: near 1, the engine can do no more. Two in flight on a GPU overlap.",
            width=8,
        ),
        panel(
            "Images that wait",
            {"{{instance}}": "medley_queue_depth{ME}"},
            "Scale on this one. MEDLEY_QUEUE_LIMIT is the most.",
            width=8,
        ),
        panel(
            "Batches that failed",
            {
                "failed": "sum(increase(medley_batch_failures_total{ME}[RATE]))",
                "without memory": "sum(increase(medley_out_of_memory_total{ME}[RATE]))",
            },
            "One without memory is tried again in halves.",
            width=8,
        ),
        panel(
            "Since the last forward",
            {"{{instance}}": "medley_last_forward_age_seconds{ME}"},
            "An idle engine proves itself every MEDLEY_HEARTBEAT_S; three missed: not ready.",
            unit="s",
            width=8,
        ),
    ),
)

OK = 'outcome="ok"'
MARGINS = "medley_router_margin"
MISSES, KNOWN_BEST = (
    f"sum by (task) (rate({MARGINS}_{part}[1h]))" for part in ('bucket{ME, le="0.0"}', "count{ME}")
)

ROUTING = Board(
    "medley-routing",
    "Medley: routing",
    "Who answers, how surely, and what nobody claims.",
    (
        panel(
            "Images by task",
            {"{{task}}": rate("medley_images_total", by="task", where=OK)},
            "Who answered.",
            unit="images/s",
            kind="stacked",
        ),
        panel(
            "Share of each task",
            {
                "{{task}}": f"{rate('medley_images_total', by='task', where=OK)} / ignoring (task) "
                f"group_left () sum(rate(medley_images_total{{ME, {OK}}}[RATE]))"
            },
            "zero_shot is the frozen model by itself.",
            unit="share",
            kind="stacked",
        ),
        panel(
            "How the task was chosen",
            {"{{route}}": rate("medley_images_total", by="route")},
            "auto: by DDAS; labels: by the request's labels; explicit: by its name.",
            unit="images/s",
            kind="stacked",
            width=8,
        ),
        panel(
            "Decisions of DDAS",
            {"{{decision}}": rate("medley_router_decisions_total", by="decision")},
            "unclaimed: no task that might have had the image accepts it.",
            unit="images/s",
            kind="stacked",
            width=8,
        ),
        panel(
            "Unclaimed, of an hour",
            {"{{job}}": 'job:medley_router_unclaimed:ratio_rate1h{job=~"$job"}'},
            "The line is MedleyUnclaimed's limit.",
            unit="share",
            width=8,
            limit=0.3,
        ),
        panel(
            "Margins",
            spread(MARGINS),
            "Threshold minus score, of the task that knows an image best: below 0 it refused.",
            kind="heatmap",
            width=8,
        ),
        panel(
            "Median margin",
            {"{{task}}": quantile(0.5, MARGINS, by="task")},
            "One that sinks towards 0 is drift, before anything is refused.",
            width=8,
        ),
        panel(
            "Near misses, of an hour",
            {"{{task}}": f"{MISSES} / {KNOWN_BEST}"},
            "Of the images that a task knew best, the share that it refused by its threshold.",
            unit="share",
            width=8,
        ),
        panel(
            "Candidates",
            {
                "{{task}} {{result}}": rate("medley_rollout_images_total", by="task, result"),
                "{{task}} taken out": rate("medley_rollout_stops_total", by="task"),
            },
            "Rollouts: whether the candidate's label was the live version's; who was taken out.",
            unit="images/s",
            width=6,
        ),
        panel(
            "Candidates, who accepted",
            {"{{task}} {{accepted}}": rate("medley_rollout_acceptance_total", by="task, accepted")},
            "Whose selector accepted the images of a rollout.",
            unit="images/s",
            width=6,
        ),
        panel(
            "Sample of unclaimed images",
            {"{{instance}}": "medley_unclaimed_images{ME}"},
            "Kept where MEDLEY_RESERVOIR says so.",
            width=6,
        ),
        panel(
            "Aggregated",
            {
                "images of {{instance}}": rate("medley_aggregated_images_total", by="instance"),
                "rows of {{instance}}": rate("medley_neighbour_rows_total", by="instance"),
            },
            "Unclaimed images that neighbours answered too, and the rows that these took.",
            unit="1/s",
            width=6,
        ),
    ),
)

TASKS = Board(
    "medley-tasks",
    "Medley: tasks and versions",
    "What each replica has, and how it gets there.",
    (
        panel(
            "Versions by state",
            {"{{instance}} {{state}}": "medley_versions{ME}"},
            "failed above 0 for five minutes: MedleyVersionFailed.",
        ),
        panel(
            "Where versions are",
            {"{{instance}} {{tier}}": "sum by (instance, tier) (medley_bundle_resident{ME})"},
            "On the device, or ready in memory; the others are on the disk.",
        ),
        Panel(
            "Versions",
            (Query("count by (task, version, tier) (medley_bundle_resident{ME})"),),
            "On how many replicas.",
            kind="table",
            columns=("task", "version", "tier", "replicas"),
        ),
        panel(
            "Time of the device by task",
            {"{{task}}": rate("medley_task_forward_seconds_total", by="task")},
            "Each image its part of its batch; in seconds a second.",
            kind="stacked",
        ),
        panel(
            "Loads",
            {"{{result}}": "sum by (result) (increase(medley_bundle_loads_total{ME}[RATE]))"}
            | {"self-test failed": "sum(increase(medley_self_test_failures_total{ME}[RATE]))"},
            "Versions that were brought to a device, or refused.",
            width=8,
        ),
        panel(
            "Phases of a load, mean",
            {"{{phase}}": mean("medley_bundle_load_seconds", by="phase")},
            "verify reads the file, pack and encode prepare it, admit loads it and tests it.",
            unit="s",
            width=8,
        ),
        panel(
            "Evictions",
            {"{{instance}}": "increase(medley_bundle_evictions_total{ME}[RATE])"},
            "Versions that left the device for others.",
            width=8,
        ),
        panel(
            "Age at eviction, median of an hour",
            "histogram_quantile(0.5, sum by (le) "
            "(rate(medley_bundle_age_at_eviction_seconds_bucket{ME}[1h])))",
            "How long they had not been asked for; seconds: the device is too small.",
            unit="s",
            width=8,
        ),
        panel(
            "Left late",
            {"{{instance}}": "increase(medley_unloads_late_total{ME}[RATE])"},
            "Versions that requests held for longer than MEDLEY_UNLOAD_S; the log names them.",
            width=8,
        ),
        panel(
            "Tasks without series, overlaps",
            {
                "counted as other": "max(medley_folded_tasks{ME})",
                "overlaps found": "sum(increase(medley_overlap_warnings_total{ME}[RATE]))",
            },
            "Beyond MEDLEY_TASK_SERIES; tasks that would take each other's images.",
            width=8,
        ),
    ),
)

DEVICE = Board(
    "medley-device",
    "Medley: device, slots and memory",
    "What there is, and how much of it is taken.",
    (
        panel(
            "Expert slots",
            {
                "{{instance}} {{state}}": "medley_bundle_slots{ME}",
                "{{instance}} {{kind}} {{state}}": "medley_fused_slots{ME}",
            },
            "Of the fullest block, and of fused versions; with none free, versions leave.",
            width=8,
        ),
        panel(
            "Bytes of versions",
            {"{{instance}} {{tier}}": "medley_bundle_bytes{ME}"},
            "On the device, in memory (at most MEDLEY_HOST_BYTES), on disk.",
            unit="bytes",
            width=8,
        ),
        panel(
            "Bytes of requests",
            {"{{instance}}": "medley_inflight_bytes{ME}"},
            "Bodies and fetched images; at most MEDLEY_MAX_INFLIGHT_BYTES.",
            unit="bytes",
            width=8,
        ),
        panel(
            "Memory of the process",
            {"{{instance}}": "process_resident_memory_bytes{ME}"},
            "One that grows without end at a steady load is a bug.",
            unit="bytes",
            width=8,
        ),
        panel(
            "Share of the memory that it may take",
            {"{{instance}}": "instance:medley_memory:ratio{ME}"},
            "Of the machine or the container; the line is MedleyMemory's limit.",
            unit="share",
            width=8,
            limit=0.9,
        ),
        panel(
            "Processor",
            {"{{instance}}": "rate(process_cpu_seconds_total{ME}[RATE])"},
            "All threads together.",
            unit="cores",
            width=8,
        ),
        panel(
            "Images held",
            {"{{instance}}": "medley_inflight_images{ME}"},
            "Taken in and not yet answered; at most MEDLEY_MAX_INFLIGHT_IMAGES.",
        ),
        panel(
            "File descriptors",
            {"{{instance}}": "process_open_fds{ME} / process_max_fds{ME}"},
            "Of those that it may have; a connection takes one.",
            unit="share",
        ),
        panel(
            "Device memory",
            {"{{instance}} {{kind}}": "medley_device_memory_bytes{ME}"},
            "Of a GPU: all of it, what is free, what torch reserves and uses.",
            unit="bytes",
            gpu_only=True,
        ),
        panel(
            "Device memory that is free",
            {"{{instance}}": "instance:medley_device_memory_free:ratio{ME}"},
            "The line is MedleyDeviceMemory's limit.",
            unit="share",
            limit=0.03,
            gpu_only=True,
        ),
    ),
)

REGISTRY = Board(
    "medley-registry",
    "Medley: registry and replicas",
    "Whether all replicas serve the same, and what they share is there.",
    (
        panel(
            "Generation that is served",
            {"{{instance}}": 'medley_registry_generation{ME, kind="observed"}'},
            "One line where all serve the same.",
        ),
        panel(
            "Generations behind the newest",
            {
                "{{instance}}": "clamp_min(job:medley_registry_generation:max - on (job) "
                'group_right () medley_registry_generation{ME, kind="observed"}, 0)'
            },
            "Of another replica, or of the registry; for a minute: MedleyReplicasDisagree.",
        ),
        panel(
            "Lag",
            {"{{instance}}": "medley_registry_lag_seconds{ME}"},
            "How long a replica has known of a change that it does not serve yet.",
            unit="s",
            width=8,
            limit=30,
        ),
        panel(
            "Registry can be used",
            {"{{instance}}": "medley_registry_up{ME}"},
            "At 0 answers go on and changes do not.",
            width=8,
        ),
        panel(
            "Store can be used",
            {"{{instance}}": "medley_store_up{ME}"},
            "At 0 registrations fail, and what is loaded is served on.",
            width=8,
        ),
        panel(
            "Replicas that each one sees",
            {"{{instance}}": "medley_replicas{ME}"},
            "Those that the board has heard of lately.",
            width=8,
        ),
        panel(
            "Changes taken up",
            {"{{result}}": "sum by (result) (increase(medley_follows_total{ME}[RATE]))"},
            "unavailable: something that is shared is away, and it is tried again.",
            width=8,
        ),
        panel(
            "Time to take up a change",
            quantiles("medley_follow_seconds"),
            "With the loads that it takes.",
            unit="s",
            width=8,
        ),
        panel(
            "Recoveries and the copy in the store",
            {
                "recoveries by {{instance}}": "medley_registry_recoveries_total{ME}",
                "changes that the copy lacks": "clamp_min(max(medley_registry_generation{ME}) - "
                "max(medley_registry_backup_generation{ME}), 0)",
            },
            "A recovery: Redis was restarted or emptied, and a replica restored it.",
            width=8,
        ),
        panel(
            "Bundles in the store",
            {"{{state}}": "max by (state) (medley_store_bundles{ME})"},
            "unused ones go after a while; lost: served, and not there. Counted every few minutes.",
            width=8,
        ),
        panel(
            "Bundles collected",
            "sum(medley_store_collected_total{ME})",
            "Removed since the replicas started.",
            width=8,
        ),
    ),
)

BOARDS = (TRAFFIC, LATENCY, BATCHES, ROUTING, TASKS, DEVICE, REGISTRY)
