"""conf/kubernetes matches the relay, its image, and the schemas of Kubernetes.

No cluster is run. A relay runs with the environment of each form, at other ports.
"""

import copy
import http.client
import json
import re
from dataclasses import dataclass
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from check_test import check
from compose_redis_test import warnings_of_start
from programs import kill
from redis_server import RedisServer
from service import DEADLINE, PROJECT, RecordingBackend, Service, eventually

pytestmark = [pytest.mark.gen_test(timeout=60), pytest.mark.once]

CONF = PROJECT / "conf" / "kubernetes"
OLDEST, NEWEST = "1.27", "1.36"  # versions of Kubernetes
TOKEN = "0123456789abcdef"
SECRETS = {"callback-token": TOKEN, "webhook-secret": "whsec_" + "a" * 32}
OPTION_IN_A_COMMENT = re.compile(r"^( *)# (SOCKETDOCK_\w+: )", flags=re.M)

Manifest = dict[str, Any]


def manifests(path) -> list[Manifest]:
    """Return the manifests of a file, with the options that are in comments."""
    text = OPTION_IN_A_COMMENT.sub(r"\1\2", path.read_text("utf-8"))
    return list(yaml.safe_load_all(text))


ALL = [
    (path.name, manifest)
    for path in sorted(CONF.glob("*.yaml"))
    for manifest in manifests(path)
]
FORMS = [
    pytest.param(manifest, id=manifest["kind"])
    for _, manifest in ALL
    if manifest["kind"] in ("Deployment", "StatefulSet")
    and manifest["metadata"]["name"] == "socketdock"
]
DOCKERFILE = (PROJECT / "Dockerfile").read_text("utf-8")


def of_kind(kind: str, name: str = "socketdock") -> Manifest:
    (found,) = (
        manifest
        for _, manifest in ALL
        if (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)
    )
    return found


def pod_of(form: Manifest) -> Manifest:
    return form["spec"]["template"]["spec"]


def container_of(form: Manifest) -> Manifest:
    (container,) = pod_of(form)["containers"]
    return container


def ports_of(form: Manifest) -> dict[str, int]:
    """Return the container's ports by name."""
    return {port["name"]: port["containerPort"] for port in container_of(form)["ports"]}


def environment_of(form: Manifest, *applied: str) -> dict[str, str]:
    """Return the variables of the container, as the kubelet sets them.

    Of the optional ConfigMaps those in `applied` exist. The pod's address is 127.0.0.1.
    """
    container = container_of(form)
    image = re.search(r"^ENV ((?:.*\\\n)*.*)", DOCKERFILE, flags=re.M)[1]
    environment = dict(re.findall(r"(SOCKETDOCK_\w+)=(\S+)", image))
    for source in container["envFrom"]:
        name, optional = (
            source["configMapRef"].get(key) for key in ("name", "optional")
        )
        if not optional or name in applied:
            environment |= of_kind("ConfigMap", name)["data"]
    fields = {"status.podIP": "127.0.0.1"}
    for variable in container["env"]:
        if "valueFrom" in variable:
            value = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            value = re.sub(
                r"\$\((\w+)\)", lambda m: environment[m[1]], variable["value"]
            )
        environment[variable["name"]] = value
    return environment


@dataclass
class Relay:
    """A relay that runs with the environment of a form."""

    form: Manifest
    service: Service

    def port(self, name: str) -> int:
        """Return the port that this relay has instead of the named one."""
        url = {
            "clients": self.service.ws_url,
            "callbacks": self.service.callback_url,
        }[name]
        return int(re.search(r":(\d+)", url)[1])


@pytest.fixture(scope="module")
def io_loop(module_io_loop):
    """One loop for all tests: they share the relays."""
    return module_io_loop


def mounted(form: Manifest, environment: dict[str, str], folder) -> dict[str, str]:
    """Return variables with the volumes, which have the secrets, below `folder`."""
    for mount in container_of(form)["volumeMounts"]:
        here = folder / mount["name"]
        here.mkdir()
        environment = {
            name: re.sub(rf"^{mount['mountPath']}(?=/)", str(here), value)
            for name, value in environment.items()
        }
    for name, secret in SECRETS.items():
        (folder / "secrets" / name).write_text(secret)
    return environment | {"SOCKETDOCK_CALLBACKPORT": "0"}


@pytest.fixture(scope="module", params=FORMS)
def relay(io_loop, shared, request, tmp_path_factory) -> Relay:
    """A relay for each form, with its secrets and its state in other folders."""
    form = request.param
    folder = tmp_path_factory.mktemp("pod")
    environment = mounted(form, environment_of(form), folder)

    async def begin() -> Relay:
        service = await shared.enter_async_context(Service(environment=environment))
        shared.push_async_callback(kill, service.process)  # before its drain_delay
        return Relay(form, service)

    return io_loop.run_sync(begin)


# The schemas of Kubernetes.


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_manifests_are_valid(version):
    """No member is unknown; all apply to the same namespace."""
    kinds = set()
    for name, manifest in ALL:
        if manifest["kind"] != "ServiceMonitor":
            kubernetes_validate.validate(manifest, version, strict=True)
        kinds.add(manifest["kind"])
        assert "namespace" not in manifest["metadata"], name
    assert len(kinds) == 9


def test_service_monitor_is_valid():
    """It is a custom resource, whose schema is in test/servicemonitor.schema.json."""
    schema = json.loads(
        (PROJECT / "test" / "servicemonitor.schema.json").read_text("utf-8")
    )
    monitor = of_kind("ServiceMonitor")
    jsonschema.validate(monitor, schema)
    wrong = copy.deepcopy(monitor)
    wrong["spec"]["endpoints"][0]["prot"] = "callbacks"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


# The relay.


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    """Return status and body of the answer to a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_relay_starts_with_the_environment(relay):
    """Each variable is an option, its value is valid, and it has an effect."""
    assert [line for line in relay.service.log if not line.startswith("[I ")] == []


def test_probes_are_answered(relay):
    """At the path and the port of each, without a token."""
    for name in ("livenessProbe", "readinessProbe"):
        asked = container_of(relay.form)[name]["httpGet"]
        status, _ = get(relay.port(asked["port"]), asked["path"])
        assert status == 200, name


def test_prometheus_gets_the_metric_that_the_autoscaler_uses(relay):
    """With the token of the Secret, at the ServiceMonitor's path and port."""
    (endpoint,) = of_kind("ServiceMonitor")["spec"]["endpoints"]
    authorization = endpoint["authorization"]
    token = SECRETS[authorization["credentials"]["key"]]
    status, text = get(
        relay.port(endpoint["port"]),
        endpoint["path"],
        Authorization=f"{authorization['type']} {token}",
    )
    assert status == 200
    values = dict(re.findall(r"^(\w+) (\S+)$", text, flags=re.M))
    (metric,) = of_kind("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert values[metric["pods"]["metric"]["name"]] == "0.0"
    limit = float(values["socketdock_connections_limit"])
    assert float(metric["pods"]["target"]["averageValue"]) < 0.8 * limit


async def test_relay_starts_with_the_variables_of_peers(io_loop, tmp_path):
    """Those in the docs, by which any relay takes any callback."""
    docs = (PROJECT / "docs" / "deploying.md").read_text("utf-8")
    (line,) = re.findall("^.*SOCKETDOCK_PEER_ADDRESS=.*$", docs, flags=re.M)
    documented = {
        name: value.replace("$(POD_IP)", "127.0.0.1")
        for name, value in re.findall(r"`(SOCKETDOCK_\w+)=([^`]+)`", line)
        if "$(POD_IP)" not in value or "PEER" in name
    }
    assert len(documented) == 3
    form = of_kind("Deployment")
    environment = mounted(form, environment_of(form) | documented, tmp_path)
    (tmp_path / "secrets" / "peer-secret").write_text("0123456789abcdef" * 2)
    async with Service(environment=environment) as service:
        await kill(service.process)  # before its drain_delay
    assert [line for line in service.log if not line.startswith("[I ")] == []


async def test_backend_is_tested_from_a_pod(io_loop, relay):
    """By the command in the docs, with the pod's variables, beside its relay."""
    docs = (PROJECT / "docs" / "deploying.md").read_text("utf-8")
    (flags,) = re.findall(r"^    socketdock check (.*)$", docs, flags=re.M)
    callbacks = {"SOCKETDOCK_CALLBACKPORT": f"{relay.port('callbacks')}"}
    async with RecordingBackend() as backend:
        environment = {
            name: value.replace("//backend:8000/", f"//127.0.0.1:{backend.port}/")
            for name, value in relay.service.environment.items()
        }
        lines = await check(*flags.split(), status=0, env=environment | callbacks)
    assert len([line for line in lines if " answered 200 " in line]) == 3
    assert {line.partition(":")[0] for line in lines} == {"ok"}


@pytest.mark.parametrize("form", FORMS)
def test_ports_are_those_of_the_relay(form):
    """The image's port for clients; the option's for callbacks, also in their URL."""
    environment = environment_of(form)
    callbacks = int(environment["SOCKETDOCK_CALLBACKPORT"])
    exposed = int(re.search(r"^EXPOSE (\d+)$", DOCKERFILE, flags=re.M)[1])
    assert ports_of(form) == {"clients": exposed, "callbacks": callbacks}
    external = environment["SOCKETDOCK_EXTERNALHOSTANDPORT"]
    assert external == f"127.0.0.1:{callbacks}"


@pytest.mark.parametrize("form", FORMS)
def test_pod_is_killed_after_the_drain(form):
    """And it is unready before handshakes are rejected."""
    environment = environment_of(form)
    delay, spread, timeout = (
        float(environment.get(f"SOCKETDOCK_DRAIN_{part}", default))
        for part, default in [("DELAY", 0), ("SPREAD", 0), ("TIMEOUT", 25)]
    )
    drain = delay + spread + timeout
    assert pod_of(form)["terminationGracePeriodSeconds"] > drain + 1
    readiness = container_of(form)["readinessProbe"]
    failures = readiness["failureThreshold"]
    assert delay > readiness["periodSeconds"] * failures + readiness["timeoutSeconds"]


@pytest.mark.parametrize("form", FORMS)
def test_pod_runs_as_the_user_of_the_image(form):
    """It can read the secrets and write to its volume by its group."""
    user, group = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, flags=re.M).groups()
    context = pod_of(form)["securityContext"]
    assert context["runAsNonRoot"] is True
    assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))
    assert context["fsGroup"] == int(group)
    (secrets,) = (v for v in pod_of(form)["volumes"] if v["name"] == "secrets")
    assert oct(secrets["secret"]["defaultMode"]) == "0o440"
    assert container_of(form)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("form", FORMS)
def test_files_of_the_options_are_mounted(form):
    """Secrets from the Secret that the commands create; the state on a volume."""
    container = container_of(form)
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    given = {volume["name"] for volume in pod_of(form)["volumes"]}
    given |= {
        claim["metadata"]["name"]
        for claim in form["spec"].get("volumeClaimTemplates", [])
    }
    assert {mount["name"] for mount in mounts.values()} == given
    paths = {
        name: value
        for name, value in environment_of(form).items()
        if value.startswith("/")
    }
    assert len(paths) == len(mounts) + 1
    for name, path in paths.items():
        folder, _, file = path.rpartition("/")
        assert folder in mounts, name
        assert (file in SECRETS) is name.endswith("_FILE"), name
        assert mounts[folder].get("readOnly", False) is name.endswith("_FILE"), name


@pytest.mark.parametrize("page", ["conf/kubernetes/common.yaml", "docs/deploying.md"])
def test_commands_create_the_secret(page):
    """With the keys that are mounted; the files that are applied exist."""
    text = (PROJECT / page).read_text("utf-8")
    created = re.search(r"kubectl create secret generic socketdock (.*\n){3}", text)[0]
    assert set(re.findall(r"--from-literal=([\w-]+)=", created)) == set(SECRETS)
    applied = re.findall(r"-f (conf/kubernetes/\S*)", text)
    assert len(applied) >= 2
    for path in applied:
        assert (PROJECT / path).is_file(), path


@pytest.mark.parametrize("form", FORMS)
def test_image_has_the_version_of_the_relay(form):
    """Otherwise the options might be those of another version."""
    source = (PROJECT / "socketdock.py").read_text("utf-8")
    version = re.search(r'^__version__ = "(.+)"', source, flags=re.M)[1]
    assert container_of(form)["image"].rpartition(":")[2] == version
    docs = (PROJECT / "docs" / "deploying.md").read_text("utf-8")
    assert f"docker build -t {container_of(form)['image']} ." in docs


# The manifests among each other.


def is_monitored(service: Manifest) -> bool:
    """Whether the ServiceMonitor selects a Service."""
    selector = of_kind("ServiceMonitor")["spec"]["selector"]["matchLabels"]
    return selector.items() <= service["metadata"]["labels"].items()


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_selected(form):
    """By the form itself, the Services, the budget and the network policy."""
    labels = form["spec"]["template"]["metadata"]["labels"]
    clients, callbacks = (
        of_kind("Service", name) for name in ("socketdock", "socketdock-callbacks")
    )
    for selector in (
        form["spec"]["selector"]["matchLabels"],
        clients["spec"]["selector"],
        callbacks["spec"]["selector"],
        of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        of_kind("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        pod_of(form)["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert is_monitored(callbacks)
    assert not is_monitored(clients)


@pytest.mark.parametrize("form", FORMS)
def test_services_and_policy_name_ports_of_the_pod(form):
    """By name; a Service's own port has the number that the pod has."""
    ports = ports_of(form)
    for name in ("socketdock", "socketdock-callbacks"):
        for port in of_kind("Service", name)["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    monitored = of_kind("ServiceMonitor")["spec"]["endpoints"][0]["port"]
    callbacks = of_kind("Service", "socketdock-callbacks")["spec"]["ports"]
    assert monitored in {port["name"] for port in callbacks}
    allowed = {
        port["port"]
        for rule in of_kind("NetworkPolicy")["spec"]["ingress"]
        for port in rule["ports"]
    }
    assert allowed == set(ports)


@pytest.mark.parametrize("form", FORMS)
def test_policy_lets_relays_forward_callbacks(form):
    """To each other, at the callbacks' port."""
    (rule,) = (
        rule
        for rule in of_kind("NetworkPolicy")["spec"]["egress"]
        if rule["ports"] == [{"port": "callbacks"}]
    )
    (peer,) = rule["to"]
    labels = form["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()
    incoming = of_kind("NetworkPolicy")["spec"]["ingress"]
    assert any(
        peer in rule["from"] and {"port": "callbacks"} in rule["ports"]
        for rule in incoming
    )


def test_ingress_forwards_only_clients(relay):
    """To a port of the Service, at a path of the relay."""
    (rule,) = of_kind("Ingress")["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["pathType"] == "Exact"
    assert relay.service.ws_url.endswith(path["path"])
    service = path["backend"]["service"]
    ports = of_kind("Service", service["name"])["spec"]["ports"]
    assert [port["name"] for port in ports] == [service["port"]["name"]] == ["clients"]


def test_policy_lets_the_relay_reach_its_backend():
    """The ports of the URLs of events, beside DNS."""
    urls = [
        value
        for value in of_kind("ConfigMap")["data"].values()
        if value.startswith("http://")
    ]
    assert len(urls) == 3
    dns, backend, _ = of_kind("NetworkPolicy")["spec"]["egress"]
    assert {port["port"] for port in dns["ports"]} == {53}
    allowed = {port["port"] for port in backend["ports"]}
    assert {int(re.search(r":(\d+)/", url)[1]) for url in urls} == allowed


def test_autoscaler_scales_one_of_the_forms():
    """And its least number is that of the form."""
    spec = of_kind("HorizontalPodAutoscaler")["spec"]
    form = of_kind(spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
    assert form["apiVersion"] == spec["scaleTargetRef"]["apiVersion"]
    assert form["spec"]["replicas"] == spec["minReplicas"]


def test_update_keeps_all_relays():
    """A new relay is ready before an old one stops, where the form allows it."""
    strategy = of_kind("Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy["maxUnavailable"] == 0
    headless = of_kind("Service", of_kind("StatefulSet")["spec"]["serviceName"])
    assert headless["spec"]["clusterIP"] == "None"
    # While a pod drains, Prometheus goes on to scrape it.
    assert headless["spec"]["publishNotReadyAddresses"] is True


# Redis: leases.yaml and queue.yaml.


WORKER = "socketdock-worker"


@pytest.fixture(scope="module")
def redis(io_loop, shared, tmp_path_factory) -> RedisServer:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    return io_loop.run_sync(lambda: shared.enter_async_context(server))


@pytest.mark.parametrize("form", FORMS)
async def test_relay_and_worker_start_with_redis(io_loop, form, redis, tmp_path):
    """Leases alone, then with the queue; the URL is in the Secret."""
    worker = of_kind("Deployment", WORKER)
    pods = [
        (form, environment_of(form, "socketdock-leases")),
        (form, environment_of(form, "socketdock-leases", "socketdock-queue")),
        (worker, environment_of(worker)),
    ]
    lease = "holds its lease in Redis"
    expected = [("backend http", lease), ("backend redis", lease), ("is read",)]
    for number, (manifest, variables) in enumerate(pods):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = mounted(manifest, variables, folder)
        (folder / "secrets" / "redis-url").write_text(redis.url)
        service = Service(environment=environment)
        service.flags[:0] = container_of(manifest).get("args", [])
        async with service:
            pod = Relay(manifest, service)
            for name in ("livenessProbe", "readinessProbe"):
                asked = container_of(manifest)[name]["httpGet"]
                path, port = asked["path"], pod.port(asked["port"])
                await eventually(lambda path=path, port=port: get(port, path)[0] == 200)
            for text in expected[number]:
                await eventually(lambda text=text, log=service.log: text in str(log))
            await kill(service.process)  # before its drain_delay
        assert warnings_of_start(service) == []


def test_worker_is_a_pod_as_the_relay_is():
    """Its user, its secrets, its image and its ports are those of the relay."""
    worker, relay = of_kind("Deployment", WORKER), of_kind("Deployment")
    for key in ("securityContext", "volumes"):
        assert pod_of(worker)[key] == pod_of(relay)[key]
    for key in ("image", "ports", "securityContext", "volumeMounts", "livenessProbe"):
        assert container_of(worker)[key] == container_of(relay)[key], key
    assert pod_of(worker)["terminationGracePeriodSeconds"] > 25 + 1
    labels = worker["spec"]["template"]["metadata"]["labels"]
    for selector in (
        worker["spec"]["selector"]["matchLabels"],
        of_kind("NetworkPolicy", WORKER)["spec"]["podSelector"]["matchLabels"],
        pod_of(worker)["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ):
        assert selector == labels
    clients = of_kind("Service")["spec"]["selector"]
    assert not clients.items() <= labels.items()  # no client is sent to it


def test_prometheus_finds_each_worker():
    """At the port and the path where it finds the relays, also during a drain."""
    service = of_kind("Service", WORKER)
    labels = of_kind("Deployment", WORKER)["spec"]["template"]["metadata"]["labels"]
    relays = of_kind("Service", "socketdock-callbacks")["spec"]
    assert service["spec"] == {**relays, "selector": labels}
    assert is_monitored(service)


def test_policies_let_both_reach_redis_and_the_worker_its_backend():
    """Relays and workers by leases.yaml; the rest as common.yaml has it."""
    policy = of_kind("NetworkPolicy", "socketdock-redis")["spec"]
    (expression,) = policy["podSelector"]["matchExpressions"]
    for name in ("socketdock", WORKER):
        labels = of_kind("Deployment", name)["spec"]["template"]["metadata"]["labels"]
        assert labels[expression["key"]] in expression["values"]
    (rule,) = policy["egress"]
    text = (CONF / "leases.yaml").read_text("utf-8")
    (port,) = re.findall(r"redis://\S+:(\d+)\"", text)
    assert rule["ports"] == [{"port": int(port)}]
    egress = of_kind("NetworkPolicy", WORKER)["spec"]["egress"]
    assert egress == of_kind("NetworkPolicy")["spec"]["egress"][:2]


def test_secret_has_the_file_that_the_options_name():
    """The key that the command adds is what both ConfigMaps name."""
    (patch,) = re.findall(
        r"--patch='(.*\n.*)'", (CONF / "leases.yaml").read_text("utf-8")
    )
    (key,) = json.loads(patch.replace("\n#", "\n"))["stringData"]
    (mount,) = container_of(of_kind("Deployment"))["volumeMounts"]
    for name, option in [
        ("leases", "SOCKETDOCK_CLUSTER_FILE"), ("queue", "SOCKETDOCK_REDIS_URL_FILE")
    ]:
        data = of_kind("ConfigMap", f"socketdock-{name}")["data"]
        assert data[option] == f"{mount['mountPath']}/{key}"
