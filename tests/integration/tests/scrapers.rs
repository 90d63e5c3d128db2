//! The real metrics-server and Prometheus scrape nodes that nobody can dial, by name, through edge-tunnel's proxy; curl goes through its
//! passthrough. Two nodes behind two NATs with one address: whatever went to the wrong one would be seen.
//!
//! Node names lead to the server by the cloud's /etc/hosts here; in a cluster CoreDNS says so (conf/tunnel/coredns.yaml).
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may fail loudly, in its helpers too")]

use integration::cluster::Cluster;
use integration::daemons::Daemon;
use integration::exec::{COMMAND_LIMIT, run, wait_for};
use integration::host::Host;
use integration::pki::{Authority, Subject, Usage};
use integration::tools;
use integration::topology::{CLOUD, Options};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

const NODES: [&str; 2] = ["node1", "node2"];

/// For how long nothing may be missing, unless SCRAPERS_SECONDS says so; the goal is 600.
const SECONDS: u64 = 40;

/// htpasswd -nbB -C 5 metrics-server by-name, and prometheus by-name-too.
const USERS: &str = r#"[
    {"name": "metrics-server", "hash": "$2b$05$EtAIXRgbTXbLjbUqT/2jw.4YY4G0A6raOf1.z39PTYvF/YNNFeuWK", "ports": [10250]},
    {"name": "prometheus", "hash": "$2b$05$Sd.gSaeWuYwaqAJoHHrTGOWwmTho2dPPJlujWWdPl7gWVWeEx541W", "ports": [10250, 9100]}
]"#;

/// A file of the cluster's certificates.
fn pki(cluster: &Cluster, name: &str) -> String {
    cluster.dir().join("pki").join(name).display().to_string()
}

/// Starts a program in the cloud.
fn in_cloud(
    cluster: &Cluster,
    name: &str,
    program: &std::path::Path,
    words: &[String],
    env: &[(&str, &str)],
) -> Daemon {
    let cloud = &cluster.network().cloud;
    let mut command = cloud.command(program).unwrap();
    command.args(words).envs(env.iter().copied());
    cloud.spawn(&mut command, &cluster.dir().join(format!("logs/{name}.log"))).unwrap()
}

/// The server, with every way in that scrapers have.
fn start_server(cluster: &Cluster) -> Daemon {
    let own = CLOUD.to_string();
    let dir = cluster.dir().join("pki");
    let subject = Subject::new("edge-tunnel", None);
    Authority::open(&dir, "ca").leaf(&dir, "scraped", subject, Usage::Server, &[&own]).unwrap();
    let users = cluster.dir().join("users.json");
    fs::write(&users, USERS).unwrap();
    let words = [
        "server".to_owned(),
        "--listen=:8443".to_owned(),
        "--proxy-plain-listen=127.0.0.1:3128".to_owned(),
        format!("--proxy-listen={own}:3129"),
        format!("--proxy-users={}", users.display()),
        format!("--passthrough-listen={own}:10250=10250,{own}:9100=9100"),
        format!("--kubeconfig={}", pki(cluster, "admin.kubeconfig")),
        format!("--agent-ca={}", pki(cluster, "ca.crt")),
        format!("--tls-cert={}", pki(cluster, "scraped.crt")),
        format!("--tls-key={}", pki(cluster, "scraped.key")),
    ];
    in_cloud(cluster, "edge-tunnel", &tools::edge_tunnel().unwrap(), &words, &[])
}

/// An agent, and an exporter that says which node it is on.
fn start_on_node(host: &Host, logs: &std::path::Path) -> [Daemon; 2] {
    let name = host.name();
    let mut agent = host.command(tools::edge_tunnel().unwrap()).unwrap();
    agent.arg("agent").arg(format!("--server={CLOUD}:8443")).arg("--allow=127.0.0.1:9100");
    agent.args(["--server-ca=/etc/kubernetes/pki/ca.crt", "--cert=/etc/kubernetes/pki/kubelet.crt"]);
    agent.arg("--key=/etc/kubernetes/pki/kubelet.key");
    let agent = host.spawn(&mut agent, &logs.join(format!("{name}-agent.log"))).unwrap();
    host.write("/var/lib/exporter/metrics", format!("exporter_of{{on=\"{name}\"}} 1\n")).unwrap();
    let mut exporter = host.command("busybox").unwrap();
    exporter.args(["httpd", "-f", "-p", "127.0.0.1:9100", "-h", "/var/lib/exporter"]);
    [agent, host.spawn(&mut exporter, &logs.join(format!("{name}-exporter.log"))).unwrap()]
}

/// metrics-server with HTTPS_PROXY and Hostname first, as an APIService of the cluster.
fn start_metrics_server(cluster: &Cluster) -> Daemon {
    let mut words: Vec<String> = ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"]
        .map(|flag| format!("--{flag}={}", pki(cluster, "admin.kubeconfig")))
        .into();
    words.extend(
        [
            "--secure-port=4443",
            "--kubelet-preferred-address-types=Hostname",
            "--kubelet-use-node-status-port",
            "--metric-resolution=10s",
            "--kubelet-request-timeout=5s",
        ]
        .map(str::to_owned),
    );
    words.push(format!("--cert-dir={}", cluster.dir().join("metrics-certs").display()));
    words.push(format!("--kubelet-certificate-authority={}", pki(cluster, "ca.crt")));
    let own = CLOUD.to_string();
    let proxy = [("HTTPS_PROXY", "http://metrics-server:by-name@127.0.0.1:3128"), ("NO_PROXY", own.as_str())];
    let daemon = in_cloud(cluster, "metrics-server", &tools::metrics_server().unwrap(), &words, &proxy);
    let service = json!({"namespace": "kube-system", "name": "metrics-server"});
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Service", "metadata": service, "spec": {"ports": [{"port": 443, "targetPort": 4443}]}},
        {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "ports": [{"port": 4443}],
         "metadata": {"name": "metrics-server", "namespace": "kube-system",
            "labels": {"kubernetes.io/service-name": "metrics-server"}},
         "endpoints": [{"addresses": [own]}]},
        {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": "v1beta1.metrics.k8s.io"},
         "spec": {"group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
            "insecureSkipTLSVerify": true, "service": service}}]});
    cluster.apply(&list).unwrap();
    daemon
}

/// Prometheus: kubelets over the proxy's TLS, exporters plainly, both with proxy_url; one more job with a port that is not the user's.
fn start_prometheus(cluster: &Cluster) -> Daemon {
    let targets = |port: u16| json!([{"targets": NODES.map(|node| format!("{node}:{port}"))}]);
    let plain = "http://prometheus:by-name-too@127.0.0.1:3128";
    let config = json!({
        "global": {"scrape_interval": "5s", "scrape_timeout": "5s"},
        "scrape_configs": [
            {"job_name": "kubelet", "scheme": "https", "static_configs": targets(10250),
             "proxy_url": format!("https://prometheus:by-name-too@{CLOUD}:3129"),
             "tls_config": {"ca_file": pki(cluster, "ca.crt"), "cert_file": pki(cluster, "admin.crt"), "key_file": pki(cluster, "admin.key")}},
            {"job_name": "exporter", "static_configs": targets(9100), "proxy_url": plain},
            {"job_name": "forbidden", "static_configs": targets(10255), "proxy_url": plain},
        ],
    });
    let dir = cluster.dir().join("prometheus");
    fs::create_dir_all(&dir).unwrap();
    // JSON is YAML.
    fs::write(dir.join("prometheus.yml"), config.to_string()).unwrap();
    let words = [
        format!("--config.file={}", dir.join("prometheus.yml").display()),
        format!("--storage.tsdb.path={}", dir.join("data").display()),
        "--web.listen-address=127.0.0.1:9090".to_owned(),
    ];
    in_cloud(cluster, "prometheus", &tools::prometheus().unwrap(), &words, &[])
}

/// curl in the cloud.
fn curl(cluster: &Cluster, words: &[&str]) -> anyhow::Result<String> {
    let mut command = cluster.network().cloud.command("curl")?;
    command.args(["--silent", "--show-error", "--fail", "--max-time", "10"]).args(words);
    run(&mut command, b"", COMMAND_LIMIT)?.ok()
}

/// The values of a PromQL expression, by job and instance.
fn query(cluster: &Cluster, expression: &str) -> anyhow::Result<BTreeMap<(String, String), f64>> {
    let query = format!("query={expression}");
    let said = curl(cluster, &["--get", "--data-urlencode", &query, "http://127.0.0.1:9090/api/v1/query"])?;
    let said: Value = serde_json::from_str(&said)?;
    let series = said["data"]["result"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let value = |one: &Value| text(&one["value"][1]).parse().unwrap_or(f64::NAN);
    Ok(series
        .iter()
        .map(|one| ((text(&one["metric"]["job"]), text(&one["metric"]["instance"])), value(one)))
        .collect())
}

/// Both nodes are in `kubectl top nodes`.
fn assert_top(cluster: &Cluster) -> anyhow::Result<()> {
    let top = cluster.kubectl(&["top", "nodes", "--no-headers"])?;
    let has = |node: &str| top.lines().any(|line| line.starts_with(node) && !line.contains("<unknown>"));
    anyhow::ensure!(NODES.iter().all(|node| has(node)), "kubectl top nodes:\n{top}");
    Ok(())
}

#[test]
fn metrics_server_prometheus_and_curl_see_nodes_that_nobody_can_dial() {
    let (seconds, binary) = (std::env::var("SCRAPERS_SECONDS"), tools::edge_tunnel().unwrap());
    let seconds = seconds.ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS);
    tools::metrics_server().unwrap();
    let nat = NODES.map(str::to_owned).into();
    let cluster = Cluster::up(Options { nat, same_address: true, ..Options::default() }).unwrap();
    let logs = cluster.dir().join("logs");
    let server = start_server(&cluster);
    let on_nodes: Vec<_> = cluster.nodes().values().map(|node| start_on_node(&node.host, &logs)).collect();
    let metrics_server = start_metrics_server(&cluster);
    let prometheus = start_prometheus(&cluster);
    let check_alive = || {
        server.check_alive()?;
        metrics_server.check_alive()?;
        prometheus.check_alive()?;
        on_nodes.iter().flatten().try_for_each(Daemon::check_alive)
    };

    // A person sees who is connected.
    wait_for("two sessions", Duration::from_secs(60), || {
        check_alive()?;
        let table = cluster.network().cloud.run([binary.to_str().unwrap(), "sessions"])?.ok()?;
        Ok(NODES.iter().all(|node| table.lines().any(|line| line.starts_with(node))).then_some(()))
    })
    .unwrap();
    for node in cluster.nodes().values() {
        let words = ["doctor", "--server=10.10.0.2:8443", "--server-ca=/etc/kubernetes/pki/ca.crt"];
        let own = ["--cert=/etc/kubernetes/pki/kubelet.crt", "--key=/etc/kubernetes/pki/kubelet.key"];
        let said =
            node.host.run([&[binary.to_str().unwrap()][..], &words, &own].concat()).unwrap().ok().unwrap();
        assert!(said.contains(&format!("node {}, until", node.host.name())), "{said}");
    }

    passthrough(&cluster);

    wait_for("kubectl top nodes", Duration::from_secs(120), || {
        check_alive()?;
        assert_top(&cluster).map(Some)
    })
    .unwrap();
    let up = "up{job!=\"forbidden\"}";
    wait_for("Prometheus to see everything", Duration::from_secs(60), || {
        check_alive()?;
        let up = query(&cluster, up)?;
        Ok((up.len() == 4 && up.values().all(|up| *up == 1.0)).then_some(()))
    })
    .unwrap();
    // Nothing is missing from here on.
    let start = Instant::now();
    let mut looks = 0;
    while start.elapsed() < Duration::from_secs(seconds) {
        assert_top(&cluster).unwrap();
        check_alive().unwrap();
        looks += 1;
        sleep(Duration::from_secs(2));
    }
    let lowest = query(&cluster, &format!("min_over_time({up}[{seconds}s])")).unwrap();
    assert!(lowest.len() == 4 && lowest.values().all(|up| *up == 1.0), "{lowest:?}");
    let scrapes = query(&cluster, &format!("count_over_time({up}[{seconds}s])")).unwrap();
    eprintln!("{looks} looks at kubectl top nodes; scrapes: {scrapes:?}");
    assert!(scrapes.values().all(|count| *count >= 2.0), "{scrapes:?}");

    // Each series is of the node that it is said to be of.
    for node in NODES {
        for (job, port, metric) in [
            ("exporter", 9100, format!("exporter_of{{on=\"{node}\"}}")),
            ("kubelet", 10250, format!("kubelet_node_name{{node=\"{node}\"}}")),
        ] {
            let found = query(&cluster, &metric).unwrap();
            let expected = (job.to_owned(), format!("{node}:{port}"));
            assert_eq!(found.keys().collect::<Vec<_>>(), [&expected], "{metric}");
        }
    }
    let forbidden = query(&cluster, "up{job=\"forbidden\"}").unwrap();
    assert!(forbidden.len() == 2 && forbidden.values().all(|up| *up == 0.0), "{forbidden:?}");

    // Connections that are kept have their audit line at their end.
    [metrics_server, prometheus].iter_mut().for_each(|daemon| daemon.terminate().unwrap());
    let mut lines = Vec::new();
    for node in NODES {
        for (caller, port) in [("metrics-server", 10250), ("prometheus", 10250), ("prometheus", 9100)] {
            lines.push(format!("caller=proxy:{caller} node={node} target={node}:{port} "));
        }
        lines.push(format!("caller=proxy:prometheus node=- target={node}:10255 "));
        lines.push(format!("caller=passthrough node={node} target={node}:10250 "));
    }
    wait_for("the audit lines", Duration::from_secs(20), || {
        let log = fs::read_to_string(server.log())?;
        let missing = lines.iter().find(|line| !log.contains(*line));
        anyhow::ensure!(missing.is_none(), "no {missing:?} in\n{log}");
        anyhow::ensure!(!log.contains("by-name"), "a password is in the log");
        Ok(Some(()))
    })
    .unwrap();
    cluster.down().unwrap();
}

/// With names only: what answers a node's name leads to the server, nothing is configured at curl, and it verifies the kubelet's own
/// certificate.
fn passthrough(cluster: &Cluster) {
    for node in NODES {
        cluster.network().cloud.sh(&format!("echo '{CLOUD} {node}' >>/etc/hosts")).unwrap();
        let [ca, cert, key] = ["ca.crt", "admin.crt", "admin.key"].map(|file| pki(cluster, file));
        let words = ["--cacert", &ca, "--cert", &cert, "--key", &key];
        let url = format!("https://{node}:10250/metrics");
        let said = wait_for("the kubelet's metrics", Duration::from_secs(30), || {
            curl(cluster, &[&words[..], &[&url]].concat()).map(Some)
        });
        assert!(said.unwrap().contains(&format!("kubelet_node_name{{node=\"{node}\"}} 1")), "{node}");
        let said = curl(cluster, &[&format!("http://{node}:9100/metrics")]).unwrap();
        assert_eq!(said, format!("exporter_of{{on=\"{node}\"}} 1\n"));
        // The kubelet asks who comes; we do not.
        let unknown = curl(cluster, &["--cacert", &ca, &url]).unwrap_err().to_string();
        assert!(unknown.contains("401"), "{unknown}");
    }
    let address =
        curl(cluster, &["--insecure", &format!("https://{CLOUD}:10250/metrics")]).unwrap_err().to_string();
    assert!(address.contains("unrecognized name") || address.contains("alert"), "{address}");
}
