"""conf/prometheus.yml, conf/alerts.yml and conf/grafana-dashboard.json.

By promtool, which parses what Prometheus would and runs the alerts over series;
and against what a relay exports.
"""

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator

import pytest
import yaml
from authorization_test import ask
from programs import program
from prometheus_client.parser import text_string_to_metric_families
from service import PROJECT, Service

CONF = PROJECT / "conf"

SELECTOR = re.compile(r"\b((?:socketdock|process|python)_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
PROMETHEUS_LABELS = {"instance", "job", "le"}  # that Prometheus adds, or buckets have


def promtool(*words: object) -> str:
    """Run promtool, which must succeed; return what it prints."""
    ended = subprocess.run(
        [program("prometheus", "promtool"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def rules():
    (group,) = yaml.safe_load((CONF / "alerts.yml").read_text("utf-8"))["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


@pytest.fixture(scope="module")
def dashboard():
    return json.loads((CONF / "grafana-dashboard.json").read_text("utf-8"))


def panels(dashboard) -> list[dict]:
    """All panels except headings."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard) -> Iterator[str]:
    """Each query, as Grafana would send it."""
    asked = [target["expr"] for panel in panels(dashboard)
             for target in panel["targets"]]
    asked += [note["expr"] for note in dashboard["annotations"]["list"]]
    for expression in asked:
        yield expression.replace("$__rate_interval", "1m").replace("$instance", ".*")


@pytest.fixture(scope="module")
def exported():
    """The names of a relay's metrics, each with the labels of its samples."""

    async def scrape() -> str:
        async with Service("--cluster=redis://127.0.0.1:1") as service:
            return (await ask(service, "GET", "/metrics")).body.decode()

    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(asyncio.run(scrape())):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


def assert_exported(expression: str, exported) -> None:
    """Each selector of an expression finds a series."""
    selectors = SELECTOR.findall(expression)
    for name, matchers in selectors:
        assert name in exported, f"{name} in {expression}"
        wanted = MATCHER.findall(matchers)
        assert len(wanted) == len(list(filter(None, matchers.split(",")))), matchers
        assert any(
            all(
                label in PROMETHEUS_LABELS or is_match(labels.get(label), how, value)
                for label, how, value in wanted
            )
            for labels in exported[name]
        ), f"{name}{{{matchers}}}"
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        for label in labels.split(", "):
            assert label in PROMETHEUS_LABELS or any(
                label in series for name, _ in selectors for series in exported[name]
            ), f"{label} in {expression}"


def is_match(value: str | None, how: str, wanted: str) -> bool:
    if value is None:
        return False
    matched = bool(re.fullmatch(wanted, value)) if "~" in how else value == wanted
    return matched is not how.startswith("!")


# Prometheus.


def test_prometheus_takes_its_file(tmp_path):
    """With another path for the token's file, which must exist."""
    text = (CONF / "prometheus.yml").read_text("utf-8")
    token = tmp_path / "token"
    token.write_text("x")
    (tmp_path / "prometheus.yml").write_text(
        text.replace("/run/secrets/callback_token", str(token))
    )
    (tmp_path / "alerts.yml").write_text((CONF / "alerts.yml").read_text("utf-8"))
    assert "14 rules" in promtool("check", "config", tmp_path / "prometheus.yml")


@pytest.mark.gen_test
async def test_promtool_accepts_the_exported_metrics(io_loop):
    """Names, units and help texts follow Prometheus' guidelines."""
    async with Service() as service:
        answer = await ask(service, "GET", "/metrics")
    checked = subprocess.run(
        [program("prometheus", "promtool"), "check", "metrics"],
        input=answer.body,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (checked.returncode, checked.stderr, checked.stdout) == (0, b"", b"")


# Alerts.

ONE = 'instance="relay-1:8766",job="socketdock"'
TWO = 'instance="relay-2:8766",job="socketdock"'


# Samples a minute apart, over an hour: of relay 1, which raise an alert; when it has
# not been raised yet, and when it has been; and of relay 2, which do not.
CASES = {
    "SocketDockDown": (
        [("up", "", "1x9 0x50")], "10m", "11m",
        [("up", "", "1x9 0 1x50")],
    ),
    "SocketDockBackendAway": (
        [("socketdock_breaker_open", "", "0x9 1x50")], "10m", "11m",
        [("socketdock_breaker_open", "", "0x9 1 0x50")],
    ),
    "SocketDockLeaseNotHeld": (
        [("socketdock_cluster_lease", "", "1x9 0x50")], "11m", "12m",
        [("socketdock_cluster_lease", "", "1x9 0 0 1x50")],
    ),
    "SocketDockEventsLate": (
        [("socketdock_oldest_pending_seconds", "", "0x9 31+60x50")], "10m", "11m",
        [("socketdock_oldest_pending_seconds", "", "0x9 29x50")],
    ),
    "SocketDockEventsLost": (
        [("socketdock_events_total", 'event="message",outcome="failed"', "0x9 1x50")],
        "8m", "11m",
        [
            ("socketdock_events_total", 'event="message",outcome="failed"', "7x60"),
            ("socketdock_events_total", 'event="connect",outcome="failed"', "0+5x60"),
            (
                "socketdock_events_total",
                'event="message",outcome="abandoned"',
                "0+5x60",
            ),
        ],
    ),
    "SocketDockEventsRefused": (
        [("socketdock_events_total", 'event="message",outcome="refused"', "0+1x60")],
        "4m", "10m",
        [
            ("socketdock_events_total", 'event="message",outcome="refused"', "0 1x60"),
            ("socketdock_events_total", 'event="connect",outcome="refused"', "0+5x60"),
        ],
    ),
    "SocketDockReadingStops": (
        [
            ("socketdock_events_pending", "", "10x9 95x50"),
            ("socketdock_events_pending_limit", "", "100x60"),
        ],
        "10m", "11m",
        [
            ("socketdock_events_pending", "", "85x60"),
            ("socketdock_events_pending_limit", "", "100x60"),
        ],
    ),
    "SocketDockNoDecision": (
        [("socketdock_connections_total", 'outcome="no_decision"', "0+1x60")],
        "4m", "10m",
        [("socketdock_connections_total", 'outcome="refused"', "0+9x60")],
    ),
    "SocketDockHandshakesTurnedAway": (
        [
            ("socketdock_connections_total", 'outcome="rejected"', "0+3x60"),
            ("socketdock_connections_total", 'outcome="opened"', "0+7x60"),
        ],
        "9m", "15m",
        [
            ("socketdock_connections_total", 'outcome="rejected"', "0+1x60"),
            ("socketdock_connections_total", 'outcome="opened"', "0+9x60"),
        ],
    ),
    "SocketDockCallbacksUnauthorized": (
        [("socketdock_sends_total", 'status="401"', "0+1x60")],
        "4m", "10m",
        [("socketdock_sends_total", 'status="410"', "0+9x60")],
    ),
    "SocketDockConnectionsNearLimit": (
        [
            ("socketdock_connections_open", "", "10x9 95x50"),
            ("socketdock_connections_limit", "", "100x60"),
        ],
        "14m", "15m",
        [
            ("socketdock_connections_open", "", "85x60"),
            ("socketdock_connections_limit", "", "100x60"),
        ],
    ),
    "SocketDockDescriptorsNearLimit": (
        [
            ("process_open_fds", "", "10x9 95x50"),
            ("process_max_fds", "", "100x60"),
        ],
        "14m", "15m",
        [("process_open_fds", "", "85x60"), ("process_max_fds", "", "100x60")],
    ),
    "SocketDockLoopLate": (
        [("socketdock_loop_lag_seconds", "", "0.01x9 0.6x50")], "14m", "15m",
        [("socketdock_loop_lag_seconds", "", "0.4x60")],
    ),
    "SocketDockRestarts": (
        [("process_start_time_seconds", "", "0+300x60")], "3m", "10m",
        [("process_start_time_seconds", "", "1000x29 2000x30")],
    ),
}


def test_each_alert_is_raised_in_time_and_only_then(rules, tmp_path):
    """With synthetic series of one relay, while the other one is fine."""
    assert set(CASES) == set(rules)
    tests = []
    for alert, (bad, before, after, good) in CASES.items():
        series = [
            {"series": f"{name}{{{','.join(filter(None, (relay, labels)))}}}",
             "values": values}
            for relay, of_relay in ((ONE, bad), (TWO, good))
            for name, labels, values in of_relay
        ]
        firing = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
        labels = {"instance": "relay-1:8766", "severity":
                  rules[alert]["labels"]["severity"]}
        alerts_firing = f"count by (instance, severity) ({firing})"
        wanted = "{" + ", ".join(f'{k}="{v}"' for k, v in labels.items()) + "}"
        tests.append(
            {
                "interval": "1m",
                "name": alert,
                "input_series": series,
                "promql_expr_test": [
                    {"expr": alerts_firing, "eval_time": before, "exp_samples": []},
                    {"expr": alerts_firing, "eval_time": after,
                     "exp_samples": [{"labels": wanted, "value": 1}]},
                ],
            }
        )
    path = tmp_path / "tests.yml"
    path.write_text(
        yaml.safe_dump(
            {
                "rule_files": [str(CONF / "alerts.yml")],
                "evaluation_interval": "1m",
                "tests": tests,
            }
        )
    )
    assert "SUCCESS" in promtool("test", "rules", path)


def test_alerts_use_exported_metrics(rules, exported):
    """The names of metrics and the values of labels exist."""
    exported = {**exported, "up": [{}]}
    for rule in rules.values():
        assert_exported(rule["expr"], exported)


def test_alerts_have_severity_relay_and_runbook(rules):
    """The severity, the relay, and the page to read."""
    for name, rule in rules.items():
        assert name.startswith("SocketDock")
        assert rule["labels"]["severity"] in ("critical", "warning")
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook"}
        assert "{{ $labels.instance }}" in notes["summary"]
        path, _, heading = notes["runbook"].partition("#")
        page = (PROJECT / path).read_text("utf-8")
        headings = {
            re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
            for title in re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
        }
        assert heading in headings, f"{name}: {notes['runbook']}"


# The dashboard.


def test_dashboard_uses_exported_metrics(dashboard, exported):
    """Otherwise a panel would stay empty."""
    asked = list(expressions(dashboard))
    assert len(asked) > 30
    for expression in asked:
        assert_exported(expression, exported)


def test_dashboard_shows_every_metric(dashboard, exported):
    """Every metric of the relay."""
    shown = {name for text in expressions(dashboard) for name, _ in
             SELECTOR.findall(text)}
    ours = {
        name for name in exported
        if name.startswith("socketdock_") and not name.endswith(("_count", "_sum"))
    }
    assert ours - shown == {"socketdock_events_pending_limit"}


def test_promtool_parses_each_query(dashboard, tmp_path):
    """As a rule of its own."""
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, expression in enumerate(expressions(dashboard))
    ]
    path = tmp_path / "queries.yml"
    path.write_text(
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]})
    )
    assert f"{len(rules)} rules" in promtool("check", "rules", path)


def test_panels_are_complete(dashboard):
    """Each has a query, a title and a position."""
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels(dashboard):
        assert panel["title"] and panel["description"]
        assert panel["targets"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert "$instance" in target["expr"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    assert len(panels(dashboard)) > 20


def test_dashboard_has_the_source_that_it_names(dashboard):
    """Its variables, and the Prometheus of compose.yaml."""
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", "instance"}
    (source,) = yaml.safe_load(
        (CONF / "grafana-datasource.yml").read_text("utf-8")
    )["datasources"]
    assert source["type"] == "prometheus"
