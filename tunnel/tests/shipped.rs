//! Every file in conf/tunnel is what Kubernetes and edge-tunnel understand: known kinds, no key that would be ignored,
//! no flag that does not exist.
//!
//! The rig's apiserver says the same with `--dry-run=server`; this says it at every build.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test may fail loudly"
)]

use clap::Parser;
use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    core::v1::{ConfigMap, Namespace, Pod, PodSpec, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::{collections::BTreeMap, fs, path::Path};
use tunnel::{config::Cli, metrics::Metrics, refusal::Reason};

/// kube-apiserver's own type (k8s.io/apiserver/pkg/apis/apiserver/v1beta1), which it reads strictly.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct EgressSelectorConfiguration {
    api_version: String,
    kind: String,
    egress_selections: Vec<EgressSelection>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EgressSelection {
    name: String,
    connection: Connection,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Connection {
    proxy_protocol: String,
    transport: Transport,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum Transport {
    #[serde(rename_all = "camelCase")]
    Tcp { url: String, tls_config: TlsConfig },
    #[serde(rename_all = "camelCase")]
    Uds { uds_name: String },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TlsConfig {
    ca_bundle: String,
    client_cert: String,
    client_key: String,
}

/// Every document of every YAML file, with the file's name.
fn documents() -> Vec<(String, Value)> {
    documents_in("../conf/tunnel")
}

fn documents_in(folder: &str) -> Vec<(String, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut all = Vec::new();
    for file in fs::read_dir(&folder).unwrap() {
        let file = file.unwrap().path();
        if file.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(!documents.is_empty(), "{name}");
        all.extend(documents.into_iter().map(|document| (name.clone(), document)));
    }
    all
}

/// Reads a document as its type and asserts that nothing in it was ignored: what was read, written again, has it all.
fn read<T: DeserializeOwned + Serialize>(name: &str, document: &Value) -> T {
    let read: T = serde_json::from_value(document.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
    let again = serde_json::to_value(&read).unwrap();
    within(document, &again).unwrap_or_else(|path| panic!("{name}: {path} is not understood"));
    read
}

/// Whether `written` is all in `read`; the path of what is not.
fn within(written: &Value, read: &Value) -> Result<(), String> {
    match (written, read) {
        (Value::Object(written), Value::Object(read)) => written.iter().try_for_each(|(key, value)| {
            // An empty map may be left out.
            if value.as_object().is_some_and(|map| map.is_empty()) {
                return Ok(());
            }
            let inner = read.get(key).ok_or_else(|| key.clone())?;
            within(value, inner).map_err(|path| format!("{key}.{path}"))
        }),
        (Value::Array(written), Value::Array(read)) if written.len() == read.len() => {
            written.iter().zip(read).enumerate().try_for_each(|(at, (written, read))| {
                within(written, read).map_err(|path| format!("{at}.{path}"))
            })
        }
        _ if written == read => Ok(()),
        _ => Err(format!("{written} became {read}")),
    }
}

/// Asserts that the containers' arguments and variables are flags of `edge-tunnel`, and that every mount has its volume.
fn containers(name: &str, pod: &PodSpec, variables: &BTreeMap<String, String>) -> usize {
    for container in &pod.containers {
        let words = container.args.iter().flatten().cloned();
        let cli = Cli::try_parse_from(std::iter::once("edge-tunnel".to_owned()).chain(words));
        cli.unwrap_or_else(|error| panic!("{name}: {error}"));
        for mount in container.volume_mounts.iter().flatten() {
            let found = pod.volumes.iter().flatten().any(|volume| volume.name == mount.name);
            assert!(found, "{name}: no volume {}", mount.name);
        }
        let security = container.security_context.as_ref().unwrap();
        assert_eq!(security.allow_privilege_escalation, Some(false), "{name}");
        assert_eq!(security.read_only_root_filesystem, Some(true), "{name}");
        assert_eq!(
            security.capabilities.as_ref().unwrap().drop.as_deref(),
            Some(&["ALL".to_owned()][..]),
            "{name}"
        );
        assert!(pod.termination_grace_period_seconds > Some(30), "{name}: longer than the drain");
    }
    use clap::CommandFactory;
    let command = Cli::command();
    for variable in variables.keys().filter(|key| key.starts_with("EDGE_TUNNEL_")) {
        let known = command.get_subcommands().flat_map(|command| command.get_arguments());
        let known = known.filter_map(|flag| flag.get_env()).any(|known| known.to_str() == Some(variable));
        assert!(known, "{name}: {variable} is no variable of edge-tunnel");
    }
    pod.containers.len()
}

#[test]
fn every_shipped_file_is_understood() {
    let documents = documents();
    let mut variables = BTreeMap::new();
    for (_, document) in documents.iter().filter(|(_, document)| document["kind"] == "ConfigMap") {
        let map: ConfigMap = serde_json::from_value(document.clone()).unwrap();
        variables.extend(map.data.unwrap_or_default());
    }
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let mut ran = 0;
    for (name, document) in &documents {
        let kind = document["kind"].as_str().unwrap().to_owned();
        match kind.as_str() {
            "EgressSelectorConfiguration" => egress(name, &read(name, document)),
            "Namespace" => drop(read::<Namespace>(name, document)),
            "ServiceAccount" => drop(read::<ServiceAccount>(name, document)),
            "ConfigMap" => drop(read::<ConfigMap>(name, document)),
            "ClusterRole" => drop(read::<ClusterRole>(name, document)),
            "ClusterRoleBinding" => drop(read::<ClusterRoleBinding>(name, document)),
            "PodDisruptionBudget" => drop(read::<PodDisruptionBudget>(name, document)),
            "Service" => drop(read::<Service>(name, document)),
            "NetworkPolicy" => drop(read::<NetworkPolicy>(name, document)),
            "Deployment" => {
                let deployment: Deployment = read(name, document);
                ran += containers(name, &deployment.spec.template.spec.unwrap(), &variables);
            }
            "DaemonSet" => {
                let daemons: DaemonSet = read(name, document);
                ran += containers(name, &daemons.spec.template.spec.unwrap(), &variables);
            }
            "Pod" => {
                let pod: Pod = read(name, document);
                ran += containers(name, &pod.spec.unwrap(), &variables);
            }
            other => panic!("{name}: nobody checks a {other}"),
        }
        *kinds.entry(kind).or_default() += 1;
    }
    assert_eq!(ran, 3, "the server twice, the agent once: {kinds:?}");
    assert_eq!(kinds["EgressSelectorConfiguration"], 2, "{kinds:?}");
    assert!(kinds.contains_key("PodDisruptionBudget") && kinds.contains_key("ClusterRole"), "{kinds:?}");
}

/// The ports that a pod's containers name.
fn ports(pod: &PodSpec) -> BTreeMap<String, i32> {
    let all = pod.containers.iter().flat_map(|container| container.ports.iter().flatten());
    all.filter_map(|port| Some((port.name.clone()?, port.container_port))).collect()
}

/// What is patched into the server: variables that exist, mounts with volumes, and a port for every Service and policy.
#[test]
fn patches_fit_what_they_patch() {
    use clap::CommandFactory;
    let patches = documents_in("../conf/tunnel/patch");
    let server = documents().into_iter().find(|(_, document)| document["kind"] == "Deployment").unwrap().1;
    let server: Deployment = read("server.yaml", &server);
    let mut known = ports(server.spec.template.spec.as_ref().unwrap());
    let command = Cli::command();
    let server_command = command.find_subcommand("server").unwrap();
    for (name, document) in &patches {
        let patch: Deployment = read(name, document);
        assert_eq!(patch.metadata.name, server.metadata.name, "{name}");
        let pod = patch.spec.template.spec.unwrap();
        let patched = &server.spec.template.spec.as_ref().unwrap().containers[0];
        assert_eq!(pod.containers[0].name, patched.name, "{name}");
        for variable in pod.containers.iter().flat_map(|container| container.env.iter().flatten()) {
            let flag = server_command
                .get_arguments()
                .find(|flag| flag.get_env().is_some_and(|env| env.to_str() == Some(&variable.name)));
            assert!(flag.is_some(), "{name}: {} is no variable of the server", variable.name);
        }
        for mount in pod.containers.iter().flat_map(|container| container.volume_mounts.iter().flatten()) {
            assert!(pod.volumes.iter().flatten().any(|volume| volume.name == mount.name), "{name}");
        }
        for (port, number) in ports(&pod) {
            assert_eq!(known.insert(port.clone(), number), None, "{name}: {port}");
        }
    }
    assert_eq!(patches.len(), 1);
    let mut targets = 0;
    for (name, document) in documents() {
        let from = |path: &str| document.pointer(path).and_then(Value::as_array).cloned().unwrap_or_default();
        let services = from("/spec/ports").into_iter().map(|port| port["targetPort"].clone());
        let rules = from("/spec/ingress").into_iter();
        let policies = rules.flat_map(|rule| rule["ports"].as_array().cloned().unwrap_or_default());
        for target in services.chain(policies.map(|port| port["port"].clone())).filter(Value::is_string) {
            assert!(known.contains_key(target.as_str().unwrap()), "{name}: nobody listens on {target}");
            targets += 1;
        }
    }
    assert!(targets >= 8, "{targets}");
}

/// The name that CoreDNS is told to answer with is that of a Service of ours.
#[test]
fn node_names_lead_to_our_service() {
    let documents = documents();
    let config = documents.iter().find(|(name, _)| name == "coredns.yaml").unwrap();
    let block = config.1["data"]["edge-tunnel.override"].as_str().unwrap();
    let service = documents.iter().find(|(_, it)| it["metadata"]["name"] == "edge-tunnel-nodes").unwrap();
    assert_eq!(service.1["kind"], "Service");
    let namespace = service.1["metadata"]["namespace"].as_str().unwrap();
    assert!(block.contains(&format!(" edge-tunnel-nodes.{namespace}.svc.cluster.local.\n")), "{block}");
    assert!(block.contains("answer auto"), "clients drop an answer to another name than they asked for");
}

/// kube-apiserver refuses another version, a scheme that is not https (it panics, in fact) or a missing port.
fn egress(name: &str, config: &EgressSelectorConfiguration) {
    assert_eq!(config.api_version, "apiserver.k8s.io/v1beta1", "{name}");
    assert!(config.egress_selections.iter().any(|selection| selection.name == "cluster"), "{name}");
    for EgressSelection { connection, .. } in &config.egress_selections {
        assert_eq!(connection.proxy_protocol, "HTTPConnect", "{name}");
        match &connection.transport {
            Transport::Tcp { url, .. } => {
                let host = url.strip_prefix("https://").unwrap();
                assert!(host.parse::<tunnel::target::Target>().is_ok(), "{name}: {url}");
            }
            Transport::Uds { uds_name } => assert!(uds_name.starts_with('/'), "{name}"),
        }
    }
}

/// docs/tunnel.md explains every refusal, with its code, and names every metric.
#[test]
fn the_document_is_complete() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tunnel.md")).unwrap();
    for reason in Reason::ALL {
        let code = if reason == Reason::Stalled { "reset".to_owned() } else { reason.code().to_string() };
        assert!(text.contains(&format!("| {code} | {reason} |")), "{code} {reason} is not explained");
    }
    let metrics = Metrics::server().text() + &Metrics::agent().text();
    for name in metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()) {
        assert!(text.contains(name), "{name} is not named");
    }
}

#[test]
fn a_key_that_nobody_knows_is_noticed() {
    let document =
        serde_json::json!({"apiVersion": "v1", "kind": "Service", "spec": {"typ": "LoadBalancer"}});
    assert!(std::panic::catch_unwind(|| read::<Service>("x", &document)).is_err());
}
