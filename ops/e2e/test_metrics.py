"""What is seen from outside: metrics that Prometheus takes, and dashboards and rules whose every query says something."""
import json
import re

import nar
from rig import DEBNIX, OPS, Failure, check, equal, generation, request, test, wait_until

# Grafana fills these in; the rest of a dashboard's variables choose among label values.
INTERVALS = {"__rate_interval": "10s", "__interval": "5s", "__range": "60s"}


def queries(dashboard):
    """Every query of a dashboard, those of panels within rows and of variables too: (where, expression)."""
    def panels(parts):
        for panel in parts:
            yield from panels(panel.get("panels", []))
            for target in panel.get("targets", []):
                if "expr" in target:
                    yield panel["title"], target["expr"]
    yield from panels(dashboard["panels"])
    for variable in dashboard.get("templating", {}).get("list", []):
        query = variable.get("query", {})
        text = query.get("query", "") if isinstance(query, dict) else query
        label_values = re.fullmatch(r"label_values\((.*),\s*\w+\)", text)
        if variable.get("type") == "query":
            check(label_values, f"variable {variable['name']} asks {text!r}, of which nothing is known here")
            yield f"variable {variable['name']}", label_values[1]


def filled_in(expression, dashboard):
    """The expression with every variable chosen as `All`."""
    names = [variable["name"] for variable in dashboard.get("templating", {}).get("list", [])]
    for name, value in {**dict.fromkeys(names, ".*"), **INTERVALS}.items():
        expression = re.sub(rf"\$(?:{name}\b|{{{name}(?::\w+)?}})", value, expression)
    return expression


def give_it_something_to_do(rig):
    """Both daemons, after some of everything that they count."""
    server = rig.server()
    paths = nar.read_closure(DEBNIX / "gen1", generation("gen1")["perl-base"])
    for path in paths + paths[-1:]:
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    other = nar.Path("other", nar.nar(b"another build"), hash=paths[-1].hash)
    other.push(server)
    server.put("/nar/" + nar.sha256(b"") + ".nar", b"no NAR")
    for path in paths:
        server.get(f"/{nar.fields(server.get(path.narinfo_key).body)['URL']}")
    server.get(f"/{'0' * 32}.narinfo")
    mountd = rig.mountd(server)
    nix, overlay = mountd.overlay_nix("trixie")
    root = generation("gen1")["perl-base"]
    mountd.narlake("ensure", root)
    nix.run("nix-store", "--query", "--requisites", root)
    equal(nix.run(f"{root}/bin/perl", "-e", "print 42").stdout, "42", "what perl prints")
    check(not (overlay.merged / f"{'1' * 32}-missing").exists(), "a path is there that nobody pushed")
    return server, mountd


@test()
def promtool_has_no_complaint(rig):
    """Names, types and help texts are as Prometheus wants them."""
    server, mountd = give_it_something_to_do(rig)
    for name, page in (("server", server.get("/metrics")), ("mountd", request(f"http://{mountd.METRICS}", "GET", "/metrics"))):
        equal(page.status, 200, f"status of the metrics of {name}")
        text = page.body.decode()
        done = rig.run("promtool", "check", "metrics", input=text, check=False)
        equal((done.returncode, done.stdout + done.stderr), (0, ""), f"what promtool says of {name}")
        rig.note(f"{name}: {len(re.findall('^# TYPE narlake_', text, re.MULTILINE))} metrics of our own")


@test(seconds=180)
def every_query_of_a_dashboard_returns_data(rig):
    """Dashboards and alert rules ask for what is there."""
    dashboards = sorted((OPS / "grafana").glob("*.json"))
    check(dashboards, "there is no dashboard in ops/grafana")
    server, mountd = give_it_something_to_do(rig)
    prometheus = rig.prometheus({"narlake-server": server.url.removeprefix("http://"), "narlake-mountd": mountd.METRICS})
    count = 0
    for file in dashboards:
        dashboard = json.loads(file.read_text())
        for where, expression in queries(dashboard):
            asked = filled_in(expression, dashboard)
            check("$" not in asked, f"{file.name}, {where}: a variable of nobody's in {asked!r}")
            # A rate needs two scrapes.
            wait_until(f"{file.name}, {where}: data for {asked!r}", lambda: prometheus.query(asked), 20)
            count += 1
    rig.note(f"{len(dashboards)} dashboards, {count} queries")


@test()
def rules_are_rules(rig):
    """promtool takes every file of rules, and runs the tests that stand beside them."""
    files = sorted((OPS / "prometheus").glob("*.yml")) if (OPS / "prometheus").exists() else []
    for file in files:
        kind = ("test", "rules") if file.stem.endswith("test") else ("check", "rules")
        done = rig.run("promtool", *kind, file, check=False, cwd=file.parent)
        if done.returncode:
            raise Failure(f"promtool {' '.join(kind)} {file.name}: {done.stdout}{done.stderr}")
    rig.note(f"{len(files)} files")
