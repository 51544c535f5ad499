"""The dashboard, the alerts and docs/operations.md speak of metrics that are exported, which Prometheus understands."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from importlib import resources
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")
pytest.importorskip("prometheus_client", reason="monitoring needs prometheus-client")
pytest.importorskip("yaml", reason="the alert rules are YAML")

import yaml
from prometheus_client import CollectorRegistry, start_http_server
from transformers import DynamicCache

from lagkv_ext.serving.monitor import CacheMonitor, RolloutCollector
from lagkv_ext.vllm.metrics import Collector
from tests.cache.models import tiny_config
from tests.serving.monitor_cases import Rolled, cache, fill, values

ROOT = Path(__file__).parents[2]
FILES = resources.files("lagkv_ext.serving.monitor")
DASHBOARD = json.loads(FILES.joinpath("dashboard.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load(FILES.joinpath("alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
DOCS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [*QUERIES, *((rule["alert"], rule["expr"]) for rule in RULES)]
VLLM = Path(__file__).parent / "vllm_totals"  # files as an engine with the plugin writes them
VARIABLES = {x["name"]: x for x in DASHBOARD["templating"]["list"]}
#: As Grafana fills them in; a repeated row has one variant.
SUBSTITUTES = (("$__rate_interval", "1m"), ("$model", "m|other"), ("$instance", ".*"), ("$variant", "lagkv"))


def exported(labels):
    """A registry with everything on it, requests behind it, and one in flight."""
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry, labels)
    RolloutCollector(Rolled(), registry, labels)
    registry.register(Collector(VLLM))
    held, in_flight, full = cache(), cache(), DynamicCache(config=tiny_config("llama"))
    with monitor.request(held), monitor.request(full):
        fill(held, 60)
        fill(full, 60)
    fill(in_flight, 50)
    return registry, monitor, (in_flight, monitor.request(in_flight))


@pytest.fixture(scope="module")
def families():
    registry, _, keep = exported({"model": "m"})
    yield [x for x in registry.collect() if not x.name.endswith("_created")]
    del keep


@pytest.fixture(scope="module")
def samples(families):
    return {
        (x.name, frozenset(x.labels.items()))
        for family in families
        for x in family.samples
        if not x.name.endswith("_created")
    }


# -- names


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_expressions_name_what_is_exported(where, expression, samples):
    """Every name, and for every selector the labels that it compares with a value."""
    names = {name for name, _ in samples}
    used = set(re.findall(r"\blagkv_\w+", expression))
    assert used
    assert used <= names, where
    for name, selector in re.findall(r"\b(lagkv_\w+)\{([^}]*)\}", expression):
        wanted = set(re.findall(r'(\w+)="([^"$]+)"', selector))
        assert any(name == x and wanted <= labels for x, labels in samples), (where, name, wanted)


def test_every_metric_is_documented_with_its_type(families):
    rows = re.findall(r"^\| `(lagkv_\w+)(?:\{([\w, ]+)\})?` \| (\w+) \|", DOCS, re.MULTILINE)
    documented = {name: (kind, label) for name, label, kind in rows}
    assert len(documented) == len(rows)
    found = {}
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for x in family.samples for label in x.labels} - {"model", "le"}
        found[name] = (family.type, ", ".join(sorted(labels)))
    assert documented == found


def test_every_metric_is_on_the_dashboard(families):
    used = {name for _, expression in QUERIES for name in re.findall(r"\blagkv_\w+", expression)}
    missing = [
        family.name
        for family in families
        if not used & {family.name, *(f"{family.name}_{x}" for x in ("total", "bucket", "sum", "count"))}
    ]
    assert missing == []


def test_every_alert_is_documented():
    assert [x["alert"] for x in RULES] == re.findall(r"^\| `(LagKV\w+)` \|", DOCS, re.MULTILINE)


def test_every_alert_has_a_severity_and_says_what_happens():
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


# -- the dashboard as Grafana takes it


def test_the_dashboard_asks_for_its_data_source_and_filters_everywhere():
    assert DASHBOARD["schemaVersion"] >= 39
    assert set(VARIABLES) == {"datasource", "model", "instance", "variant"}
    assert VARIABLES["datasource"]["query"] == "prometheus"
    for panel in PANELS:
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["description"]
    for title, expression in QUERIES:
        selectors = re.findall(r"\blagkv_\w+(\{[^}]*\})?", expression)
        assert all('model=~"$model", instance=~"$instance"' in x for x in selectors), title


def test_there_is_a_row_for_each_variant():
    """The last row is repeated by Grafana, and every query of its panels is about one variant."""
    rows = [i for i, panel in enumerate(DASHBOARD["panels"]) if panel["type"] == "row"]
    assert [DASHBOARD["panels"][i].get("repeat") for i in rows] == [*[None] * (len(rows) - 1), "variant"]
    for panel in DASHBOARD["panels"][rows[-1] + 1 :]:
        for target in panel["targets"]:
            selectors = re.findall(r"\blagkv_\w+\{([^}]*)\}", target["expr"])
            assert selectors
            assert all('variant="$variant"' in x for x in selectors), panel["title"]


def test_panels_have_their_own_numbers_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({x["id"] for x in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


# -- the command


def lagkv(*arguments):
    typer_testing = pytest.importorskip("typer.testing", reason="the command lagkv needs typer")
    from lagkv_ext.commands.cli import app

    return typer_testing.CliRunner().invoke(app, ["monitor", *map(str, arguments)])


@pytest.mark.parametrize(("name", "file"), [("dashboard", "dashboard.json"), ("alerts", "alerts.yml")])
def test_the_command_gives_the_files(name, file, tmp_path):
    text = FILES.joinpath(file).read_text(encoding="utf-8")
    done = lagkv(name)
    assert (done.exit_code, done.output) == (0, text)
    assert lagkv(name, "--output", tmp_path / "here").exit_code == 0
    assert (tmp_path / "here").read_text(encoding="utf-8") == text
    refused = lagkv(name, "--output", tmp_path / "nowhere" / "here")
    assert refused.exit_code == 2
    assert (
        f"--output must be a file that can be written, got {tmp_path / 'nowhere' / 'here'}" in refused.stderr
    )


def test_the_command_needs_no_prometheus_client():
    code = (
        "import sys; sys.modules['prometheus_client'] = None; from lagkv_ext.commands.cli import main; main()"
    )
    pytest.importorskip("typer", reason="the command lagkv needs typer")
    done = subprocess.run(
        [sys.executable, "-c", code, "monitor", "alerts"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("alert: ") == len(RULES)


# -- Prometheus itself


def needs(program):
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not on the PATH")
    return path


def test_promtool_accepts_the_rules(tmp_path):
    for file in ("alerts.yml", "monitor_alerts_test.yml"):
        source = FILES if file == "alerts.yml" else Path(__file__).parent
        (tmp_path / file).write_text(source.joinpath(file).read_text(encoding="utf-8"), encoding="utf-8")
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "monitor_alerts_test.yml"]):
        done = subprocess.run(
            [needs("promtool"), *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_unit_tests_of_the_rules_make_every_alert_fire():
    text = Path(__file__).with_name("monitor_alerts_test.yml").read_text(encoding="utf-8")
    fires = set(re.findall(r'alertname="(\w+)"', text)) | {"LagKVSavedShareFell"}
    assert fires == {rule["alert"] for rule in RULES}


class Prometheus:
    """A running Prometheus that scrapes one address five times a second, with the alert rules."""

    def __init__(self, program, folder, target):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "alerts.yml").write_text(
            FILES.joinpath("alerts.yml").read_text(encoding="utf-8"), encoding="utf-8"
        )
        config = {
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [{"job_name": "s", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    program,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=log,
            )

    def ask(self, path, **parameters):
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def wait(self, what):
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if what():
                    return
            except (urllib.error.URLError, json.JSONDecodeError, ConnectionError):
                pass
            time.sleep(0.1)
        pytest.fail(f"Prometheus did not get there: {self.log.read_text(encoding='utf-8')[-3000:]}")


def test_prometheus_scrapes_and_answers_every_query(tmp_path):
    """A real exporter, a real Prometheus: every query of the dashboard gives something, every rule evaluates."""
    program = needs("prometheus")
    registry, monitor, keep = exported({"model": "m"})
    server, thread = start_http_server(0, "127.0.0.1", registry)
    stop = threading.Event()

    def serve():
        while not stop.wait(0.05):
            held = cache()
            with monitor.request(held):
                fill(held, 60)

    requests = threading.Thread(target=serve)
    prometheus = Prometheus(program, tmp_path, f"127.0.0.1:{server.server_port}")
    try:
        requests.start()
        # Several scrapes, with counters that move.
        moved = 'increase(lagkv_requests_total{outcome="completed"}[1m]) > 0'
        prometheus.wait(lambda: prometheus.ask("query", query=moved)["data"]["result"])
        for title, expression in QUERIES:
            for name, text in SUBSTITUTES:
                expression = expression.replace(name, text)
            assert "$" not in expression
            answer = prometheus.ask("query", query=expression)
            assert answer["status"] == "success", (title, answer)
            assert answer["data"]["result"], title
        for name, variable in VARIABLES.items():
            if name != "datasource":
                metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
                assert label == name
                answer = prometheus.ask(f"label/{label}/values", **{"match[]": metric})
                assert len(answer["data"]) == (2 if label == "variant" else 1), answer
        scraped = {
            x["metric"]["__name__"] for x in prometheus.ask("query", query='{job="s"}')["data"]["result"]
        }
        assert {name for name, _ in values(registry)} <= scraped

        def rules():
            return [x for group in prometheus.ask("rules")["data"]["groups"] for x in group["rules"]]

        prometheus.wait(lambda: all(x["health"] != "unknown" for x in rules()))
        assert {x["name"]: x["health"] for x in rules()} == {rule["alert"]: "ok" for rule in RULES}
    finally:
        stop.set()
        requests.join()
        prometheus.process.terminate()
        prometheus.process.wait(timeout=30)
        server.shutdown()
        server.server_close()
        thread.join()
        keep[1].finish()
