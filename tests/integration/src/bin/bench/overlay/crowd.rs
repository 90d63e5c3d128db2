//! Nodes that are only in the API server: as large as real ones, made and altered by the thousand.

use crate::edge::{World, numbered_peer};
use anyhow::{Context, Result, ensure};
use integration::exec::run;
use serde_json::{Value, json};
use std::{fmt::Write, fs, net::Ipv4Addr, path::PathBuf, time::Duration};

const API: &str = "https://10.10.0.2:6443/api/v1/nodes";
/// Ten thousand requests take less than a minute.
const LIMIT: Duration = Duration::from_secs(600);

/// The nodes, and how many updates each has seen.
pub struct Crowd<'a> {
    world: &'a World,
    dir: PathBuf,
    len: u16,
    update: u16,
}

impl<'a> Crowd<'a> {
    /// Nobody yet.
    pub fn new(world: &'a World) -> Result<Self> {
        let dir = world.dir.path().join("crowd");
        fs::create_dir_all(&dir)?;
        Ok(Self { world, dir, len: 0, update: 0 })
    }

    /// How many there are.
    pub fn len(&self) -> u16 {
        self.len
    }

    /// Adds nodes until there are so many.
    pub fn grow(&mut self, len: u16) -> Result<()> {
        self.send(
            "POST",
            "application/json",
            &(self.len..len).map(|n| (String::new(), node(n))).collect::<Vec<_>>(),
        )?;
        self.len = len;
        Ok(())
    }

    /// Adds one more; its subnet.
    pub fn add(&mut self) -> Result<Ipv4Addr> {
        self.grow(self.len + 1)?;
        let cidr = node(self.len - 1)["spec"]["podCIDR"].as_str().map(str::to_owned);
        cidr.as_deref().and_then(|cidr| cidr.split('/').next()?.parse().ok()).context("no podCIDR")
    }

    /// Takes the last one away.
    pub fn remove(&mut self) -> Result<()> {
        self.len -= 1;
        self.send("DELETE", "application/json", &[(path(self.len), json!({}))])
    }

    /// Nodes say that they are alive; nothing else about them changes.
    pub fn beat(&mut self, count: u16) -> Result<()> {
        // Another day each time: what alters nothing is no event.
        self.update += 1;
        let day = self.update % 28 + 1;
        let beats: Vec<_> = (0..count)
            .map(|n| {
                let time = format!("2026-02-{day:02}T{:02}:{:02}:00Z", n / 60 % 24, n % 60);
                let ready = json!({"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": time});
                let path = format!("{}/status", path(n % self.len));
                (path, json!({"status": {"conditions": [ready]}}))
            })
            .collect();
        self.send("PATCH", "application/strategic-merge-patch+json", &beats)
    }

    /// Nodes get other public addresses; the addresses that they have in the end.
    pub fn relocate(&mut self, count: u16) -> Result<Vec<Ipv4Addr>> {
        self.update += 1;
        let mut at = vec![None; usize::from(self.len)];
        let moves: Vec<_> = (0..count)
            .map(|n| {
                let [a, b] = n.to_be_bytes();
                let address =
                    Ipv4Addr::new(172, 16 + u8::try_from(self.update % 200).unwrap_or(0), a + 64, b);
                at[usize::from(n % self.len)] = Some(address);
                let annotation = json!({"flannel.alpha.coreos.com/public-ip": address});
                (path(n % self.len), json!({"metadata": {"annotations": annotation}}))
            })
            .collect();
        self.send("PATCH", "application/merge-patch+json", &moves)?;
        Ok(at.into_iter().flatten().collect())
    }

    /// One curl for all requests, a few at a time.
    fn send(&self, method: &str, kind: &str, requests: &[(String, Value)]) -> Result<()> {
        let pki = self.world.dir.path().join("pki");
        let mut config = String::new();
        for (number, (path, body)) in requests.iter().enumerate() {
            let file = self.dir.join(format!("{number}.json"));
            fs::write(&file, body.to_string())?;
            if number > 0 {
                config.push_str("next\n");
            }
            write!(
                config,
                "url = \"{API}{path}\"\nrequest = {method}\nheader = \"Content-Type: {kind}\"\ndata = \"@{}\"\n\
                 cacert = \"{pki}/ca.crt\"\ncert = \"{pki}/admin.crt\"\nkey = \"{pki}/admin.key\"\n\
                 fail\nsilent\nshow-error\noutput = /dev/null\nwrite-out = \"%{{http_code}}\\n\"\n",
                file.display(),
                pki = pki.display(),
            )?;
        }
        let file = self.dir.join("requests");
        fs::write(&file, config)?;
        // The API server takes updates of one object one after the other, so that the last one counts.
        let parallel = if method == "POST" { "8" } else { "1" };
        let mut curl = self.world.cloud.command("curl")?;
        curl.args(["--parallel", "--parallel-max", parallel, "-K"]).arg(&file);
        let output = run(&mut curl, b"", LIMIT)?.ok()?;
        let done = output.lines().filter(|code| code.starts_with('2')).count();
        ensure!(done == requests.len(), "{method}: {done} of {} requests were taken", requests.len());
        Ok(())
    }
}

fn path(n: u16) -> String {
    format!("/peer{n}")
}

/// A node of about 7 KB, as kubelets make them: most of it is the images that it has.
fn node(n: u16) -> Value {
    let image = |i: u16| {
        let name = format!("registry.example.com/edge/application-{i}");
        json!({"names": [format!("{name}@sha256:{:064x}", u32::from(n) * 100 + u32::from(i)), format!("{name}:v1.{i}.0")],
            "sizeBytes": 40_000_000 + u32::from(i)})
    };
    let mut node = numbered_peer(n);
    node["status"] = json!({
        "addresses": [{"type": "InternalIP", "address": node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"]}],
        "capacity": {"cpu": "4", "memory": "4026532Ki", "pods": "110", "ephemeral-storage": "30218Mi"},
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": "2026-01-01T00:00:00Z",
            "lastTransitionTime": "2026-01-01T00:00:00Z", "message": "kubelet is posting ready status"}],
        "images": (0..28).map(image).collect::<Vec<_>>(),
    });
    node
}
