#!/usr/bin/env python3
"""Prints the Grafana dashboard, deploy/grafana/tollgate.json: deploy/grafana/dashboard.py > deploy/grafana/tollgate.json.

A dashboard in Grafana's own format repeats itself a hundred times; this says each thing once. deploy/check.sh holds that the file
is what this prints, and that each series in it is one that tollgate has. tests/monitoring.rs has a real Prometheus evaluate every
expression against a running gateway."""

import json

# What a panel of Grafana is about: a title, the unit of its axis, and expressions with the name of their lines.
ROWS = [
    (
        "Traffic",
        [
            ("Requests by status", "reqps", "What clients got, by class of status. `none`: the client left before an answer.",
             [("sum by (status) (rate(tollgate_requests_total{$on}[$__rate_interval]))", "{{status}}")]),
            ("Requests by route", "reqps", "`none`: refused before a route was found.",
             [("sum by (route) (rate(tollgate_requests_total{$on}[$__rate_interval]))", "{{route}}")]),
            ("Latency", "s", "From the request head to the end of the response; long downloads and slow clients are in it.",
             [(f"histogram_quantile({q}, sum by (le) (rate(tollgate_request_duration_seconds_bucket{{$on}}[$__rate_interval])))", f"p{p}")
              for q, p in ((0.5, 50), (0.9, 90), (0.99, 99))]),
            ("Latency by route, p99", "s", "One line for each route of the configuration: the number of series is bounded by it.",
             [("histogram_quantile(0.99, sum by (le, route) (rate(tollgate_request_duration_seconds_bucket{$on}[$__rate_interval])))", "{{route}}")]),
            ("In flight", "short", "Requests in progress and open client connections.",
             [("sum(tollgate_requests_in_flight{$on})", "requests"), ("sum(tollgate_connections{$on})", "connections")]),
            ("Share of the heaviest", "percentunit", "How much of all requests the first three tokens make. GET /top names them.",
             [('max by (rank) (tollgate_heavy_hitter_share{$on, of="token", by="requests"})', "rank {{rank}}")]),
        ],
    ),
    (
        "Refusals",
        [
            ("Refused, by reason", "reqps", "docs/operations.md has each reason, and what to do about it.",
             [('sum by (reason) (rate(tollgate_auth_total{$on, result="refused"}[$__rate_interval]))', "{{reason}}")]),
            ("Nobody could tell", "reqps", "503, because the store did not answer. Never let through.",
             [('sum by (reason) (rate(tollgate_auth_total{$on, result="unavailable"}[$__rate_interval]))', "{{reason}}")]),
            ("Limits", "reqps", "429 by limit. `dry_run`: would have been refused.",
             [('sum by (limit, result) (rate(tollgate_limit_requests_total{$on, result!="allowed"}[$__rate_interval]))', "{{limit}} {{result}}")]),
            ("Guessing", "short", "Addresses that guess tokens at the moment: GET /guessing lists them.",
             [("sum(tollgate_guessing_addresses{$on})", "addresses"),
              ("sum(rate(tollgate_guessing_failures_total{$on}[$__rate_interval]))", "failed tokens a second")]),
            ("Tokens where they should not be", "reqps", "In the query, or replaced by a rotation and still in use.",
             [("sum(rate(tollgate_query_tokens_total{$on}[$__rate_interval]))", "in the query"),
              ('sum(rate(tollgate_rotated_token_requests_total{$on, generation="old"}[$__rate_interval]))', "rotated")]),
            ("Changed pages", "reqps", "page and per_page that were brought within bounds.",
             [("sum by (parameter) (rate(tollgate_pagination_clamps_total{$on}[$__rate_interval]))", "{{parameter}}")]),
        ],
    ),
    (
        "Token store",
        [
            ("Cache", "percentunit", "Requests with a token that were answered from the cache.",
             [('sum(rate(tollgate_cache_lookups_total{$on, result=~"hit|negative_hit|stale"}[$__rate_interval])) / sum(rate(tollgate_cache_lookups_total{$on}[$__rate_interval]))', "hits")]),
            ("Lookups", "s", "How long the store takes to answer.",
             [("histogram_quantile(0.5, sum by (le, store) (rate(tollgate_store_lookup_duration_seconds_bucket{$on}[$__rate_interval])))", "{{store}} p50"),
              ("histogram_quantile(0.99, sum by (le, store) (rate(tollgate_store_lookup_duration_seconds_bucket{$on}[$__rate_interval])))", "{{store}} p99")]),
            ("Failed lookups", "reqps", "By store and kind.",
             [("sum by (store, kind) (rate(tollgate_store_errors_total{$on}[$__rate_interval]))", "{{store}} {{kind}}")]),
            ("Revocations take effect after", "s", "From the change in the store to its effect here. The promise is a second.",
             [("histogram_quantile(0.99, sum by (le) (rate(tollgate_revocation_lag_seconds_bucket{$on}[$__rate_interval])))", "p99")]),
            ("Change notifications", "short", "1 while they arrive.",
             [("min by (instance, store) (tollgate_store_subscribed{$on})", "{{instance}} {{store}}")]),
            ("Tokens in the cache", "short", "",
             [("sum by (kind) (tollgate_cache_entries{$on})", "{{kind}}")]),
        ],
    ),
    (
        "Servers",
        [
            ("Up", "short", "1 while the server is well.",
             [("min by (upstream, server) (tollgate_upstream_server_up{$on})", "{{upstream}} {{server}}")]),
            ("Time to the head of a response", "s", "By upstream.",
             [("histogram_quantile(0.5, sum by (le, upstream) (rate(tollgate_upstream_duration_seconds_bucket{$on}[$__rate_interval])))", "{{upstream}} p50"),
              ("histogram_quantile(0.99, sum by (le, upstream) (rate(tollgate_upstream_duration_seconds_bucket{$on}[$__rate_interval])))", "{{upstream}} p99")]),
            ("Failed attempts", "reqps", "Also those that a retry made good.",
             [("sum by (upstream, kind) (rate(tollgate_upstream_errors_total{$on}[$__rate_interval]))", "{{upstream}} {{kind}}")]),
            ("Retries", "reqps", "",
             [("sum by (upstream) (rate(tollgate_upstream_retries_total{$on}[$__rate_interval]))", "{{upstream}}"),
              ("sum by (upstream) (rate(tollgate_upstream_retries_refused_total{$on}[$__rate_interval]))", "{{upstream}} refused")]),
            ("With the servers, and waiting", "short", "",
             [("sum by (upstream) (tollgate_upstream_server_requests_in_flight{$on})", "{{upstream}} in flight"),
              ("sum by (upstream) (tollgate_upstream_requests_waiting{$on})", "{{upstream}} waiting")]),
            ("New connections", "percentunit", "Share of requests that needed one. High: keep-alive does not work.",
             [('sum by (upstream) (rate(tollgate_upstream_connects_total{$on, connection="new"}[$__rate_interval])) / sum by (upstream) (rate(tollgate_upstream_connects_total{$on}[$__rate_interval]))', "{{upstream}}")]),
        ],
    ),
    (
        "Process",
        [
            ("CPU", "short", "Cores in use.", [("rate(process_cpu_seconds_total{$on}[$__rate_interval])", "{{instance}}")]),
            ("Memory", "bytes", "Resident.", [("process_resident_memory_bytes{$on}", "{{instance}}")]),
            ("Descriptors", "percentunit", "Open, of what may be open.",
             [("process_open_fds{$on} / process_max_fds{$on}", "{{instance}}")]),
            ("Reloads", "short", "In the last hour.",
             [("sum by (result) (increase(tollgate_config_reloads_total{$on}[1h]))", "{{result}}")]),
            ("Lost log lines", "short", "In the last hour.",
             [("sum by (log) (increase(tollgate_log_lines_dropped_total{$on}[1h]))", "{{log}}")]),
            ("Certificates", "s", "Time until each ends.",
             [("min by (listener, name) (tollgate_certificate_end_timestamp_seconds{$on}) - time()", "{{listener}} {{name}}")]),
        ],
    ),
]

# The numbers at the top: what is looked at first.
NUMBERS = [
    ("Requests", "reqps", "sum(rate(tollgate_requests_total{$on}[$__rate_interval]))", None),
    ("Refused", "percentunit",
     'sum(rate(tollgate_auth_total{$on, result="refused"}[$__rate_interval])) / sum(rate(tollgate_auth_total{$on}[$__rate_interval]))', None),
    ("5xx", "percentunit",
     '(sum(rate(tollgate_requests_total{$on, status="5xx"}[$__rate_interval])) or vector(0)) / sum(rate(tollgate_requests_total{$on}[$__rate_interval]))',
     [(None, "green"), (0.01, "orange"), (0.05, "red")]),
    ("p99", "s",
     "histogram_quantile(0.99, sum by (le) (rate(tollgate_request_duration_seconds_bucket{$on}[$__rate_interval])))", None),
    ("Servers down", "short", "count(tollgate_upstream_server_up{$on} == 0) or vector(0)", [(None, "green"), (1, "red")]),
    ("Stores deaf", "short", "count(tollgate_store_subscribed{$on} == 0) or vector(0)", [(None, "green"), (1, "red")]),
]

ON = 'job="$job", instance=~"$instance"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


# The series that have exemplars: points in the plot, each with the id of a request.
EXEMPLARS = "tollgate_request_duration_seconds_bucket"


def target(expression, legend, number=0, exemplars=False):
    return {
        "datasource": SOURCE,
        "expr": expression.replace("$on", ON),
        **({"exemplar": True} if exemplars else {}),
        "legendFormat": legend,
        "refId": "ABCDEFGH"[number],
    }


def number(place, title, unit, expression, thresholds):
    steps = [{"value": value, "color": color} for value, color in thresholds or [(None, "blue")]]
    return {
        "type": "stat",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": 4 * place, "y": 0, "w": 4, "h": 4},
        "targets": [target(expression, "")],
        "options": {"colorMode": "value", "graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"]}},
        "fieldConfig": {"defaults": {"unit": unit, "thresholds": {"mode": "absolute", "steps": steps}}, "overrides": []},
    }


def plot(x, y, title, unit, about, targets):
    return {
        "type": "timeseries",
        "title": title,
        "description": about,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": 8, "h": 8},
        # They are the same for all quantiles of a series: one asks for them.
        "targets": [
            target(expression, legend, place, place == len(targets) - 1 and EXEMPLARS in expression)
            for place, (expression, legend) in enumerate(targets)
        ],
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0, "custom": {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never"}},
            "overrides": [],
        },
    }


def panels():
    made = [number(place, *what) for place, what in enumerate(NUMBERS)]
    y = 4
    for title, plots in ROWS:
        made.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        for place, what in enumerate(plots):
            made.append(plot(8 * (place % 3), y + 1 + 8 * (place // 3), *what))
        y += 1 + 8 * ((len(plots) + 2) // 3)
    return [{"id": place + 1, **panel} for place, panel in enumerate(made)]


def variable(name, label, query):
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        **({"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}} if name == "instance" else {}),
    }


def event(name, color, expression, title):
    return {"name": name, "datasource": SOURCE, "enable": True, "iconColor": color, "expr": expression.replace("$on", ON), "titleFormat": title, "step": "60s"}


DASHBOARD = {
    "title": "tollgate",
    "uid": "tollgate",
    "description": "Requests, refusals, the token store, servers and the process of one or several gateways.",
    "tags": ["tollgate"],
    "schemaVersion": 39,
    "version": 1,
    "editable": True,
    "graphTooltip": 1,
    "time": {"from": "now-3h", "to": "now"},
    "refresh": "30s",
    "links": [
        {"title": "Operations", "type": "link", "url": "https://github.com/tollgate/tollgate/blob/main/docs/operations.md", "targetBlank": True}
    ],
    "templating": {
        "list": [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
            variable("job", "Job", "label_values(tollgate_build_info, job)"),
            variable("instance", "Instance", 'label_values(tollgate_build_info{job="$job"}, instance)'),
        ]
    },
    "annotations": {
        "list": [
            event("Configuration loaded", "blue", "changes(tollgate_config_loaded_timestamp_seconds{$on}[1m]) > 0", "{{instance}}: configuration loaded"),
            event("Not ready", "orange", "tollgate_ready{$on} == 0", "{{instance}} drains"),
        ]
    },
    "panels": panels(),
}

if __name__ == "__main__":
    print(json.dumps(DASHBOARD, indent=1))
