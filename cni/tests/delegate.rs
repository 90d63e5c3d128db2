//! Delegation with real processes: small shell scripts on a `CNI_PATH` of their own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use cni::{Attachment, AttachmentId, Call, Environment, Error, Plugin, Success, serve};
use serde_json::json;
use std::{cell::RefCell, fs, os::unix::fs::PermissionsExt, path::Path};
use tempfile::TempDir;

/// Hands every call to the delegate named by `ipam.type` and keeps its error as a value.
#[derive(Default)]
struct Forwarder {
    error: RefCell<Option<Error>>,
}

impl Forwarder {
    fn keep<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(error) = &result {
            *self.error.borrow_mut() = Some(error.clone());
        }
        result
    }
}

impl Plugin for Forwarder {
    fn about(&self) -> String {
        "forwarder".into()
    }
    fn add(&self, call: &Call, _: &Attachment, _: &Path) -> Result<Success, Error> {
        let kind = call.conf.ipam_kind.as_deref().unwrap_or_default();
        self.keep(call.path.find(kind).and_then(|found| found.add(&call.conf.raw)))
    }
    fn del(&self, call: &Call, _: &Attachment, _: Option<&Path>) -> Result<(), Error> {
        let kind = call.conf.ipam_kind.as_deref().unwrap_or_default();
        self.keep(call.path.find(kind).and_then(|found| found.del(&call.conf.raw)))
    }
    fn check(&self, _: &Call, _: &Attachment, _: &Path) -> Result<(), Error> {
        Ok(())
    }
    fn gc(&self, _: &Call, _: Option<&[AttachmentId]>) -> Result<(), Error> {
        Ok(())
    }
    fn status(&self, _: &Call) -> Result<(), Error> {
        Ok(())
    }
}

struct Plugins {
    dir: TempDir,
}

impl Plugins {
    fn with(script: &str) -> Self {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("ipam");
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }

    fn call(&self, command: &str, raw: &str) -> (Result<serde_json::Value, Error>, Forwarder) {
        let path = format!("/nonexistent:{}", self.dir.path().display());
        let environment = Environment::from_iter([
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", "/run/netns/none"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", &path),
            ("CNI_ARGS", "K8S_POD_NAME=web-0"),
        ]);
        let plugin = Forwarder::default();
        let reply = serve(&plugin, &environment, &mut raw.as_bytes());
        let result = match (reply.success, plugin.error.borrow().clone()) {
            (true, _) => Ok(serde_json::from_str(&reply.stdout).unwrap_or_default()),
            (false, Some(error)) => Err(error),
            (false, None) => panic!("{reply:?}"),
        };
        (result, plugin)
    }
}

const RAW: &str =
    "{ \"cniVersion\":\"1.0.0\",\n\t\"name\":\"net\", \"ipam\": {\"type\": \"ipam\"}, \"odd\" : 1.50 }";

#[test]
fn the_delegate_gets_the_configuration_byte_for_byte_and_the_environment() {
    let seen = TempDir::new().unwrap();
    let at = seen.path().display();
    let path = Plugins::with(&format!(
        "cat >{at}/stdin; env | grep ^CNI_ | sort >{at}/env; echo '{{\"ips\": [{{\"address\": \"10.1.0.5/16\"}}]}}'"
    ));
    let (result, _) = path.call("ADD", RAW);
    assert_eq!(result.unwrap()["ips"], json!([{"address": "10.1.0.5/16"}]));
    assert_eq!(fs::read_to_string(seen.path().join("stdin")).unwrap(), RAW);
    let env = fs::read_to_string(seen.path().join("env")).unwrap();
    for line in ["CNI_COMMAND=ADD", "CNI_ARGS=K8S_POD_NAME=web-0", "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0"] {
        assert!(env.lines().any(|seen| seen == line), "{env}");
    }
}

#[test]
fn a_delegates_error_is_forwarded_as_it_is() {
    let path = Plugins::with(r#"echo '{"Code": 101, "msg": "taken", "details": "by web-1"}'; exit 1"#);
    let (result, _) = path.call("ADD", RAW);
    assert_eq!(result.unwrap_err(), Error { code: 101, msg: "taken".into(), details: "by web-1".into() });
}

#[test]
fn a_delegate_that_says_nothing_intelligible_is_code_999_with_what_it_said() {
    for (script, said) in
        [("echo boom >&2; exit 3", "boom"), ("echo '<html>'; exit 1", "<html>"), ("kill -KILL $$", "")]
    {
        let (result, _) = Plugins::with(script).call("DEL", RAW);
        let error = result.unwrap_err();
        assert_eq!(error.code, 999, "{error}");
        assert!(error.details.contains(said), "{error}");
    }
}

#[test]
fn a_result_that_is_none_is_code_6() {
    for script in ["true", "echo '{'", r#"echo '{"ips":[{"address":"x"}]}'"#] {
        let (result, _) = Plugins::with(script).call("ADD", RAW);
        assert_eq!(result.unwrap_err().code, 6, "{script}");
    }
}

#[test]
fn a_result_without_version_is_read_in_the_configurations() {
    let path = Plugins::with(r#"echo '{"ip4": {"ip": "10.1.0.5/16"}}'"#);
    let (result, _) = path.call("ADD", r#"{"name":"net","ipam":{"type":"ipam"}}"#);
    assert_eq!(result.unwrap()["ip4"]["ip"], "10.1.0.5/16");
}

#[test]
fn neither_side_waits_for_the_other_with_megabytes_on_both_pipes() {
    let filler = "y".repeat(1 << 20);
    let raw = json!({"name": "net", "ipam": {"type": "ipam"}, "filler": filler}).to_string();
    // Writes a megabyte before it reads anything, on both pipes.
    let script =
        "head -c 1048576 /dev/zero | tr '\\0' ' '; head -c 1048576 /dev/zero >&2; cat >/dev/null; echo '{}'";
    let (result, _) = Plugins::with(script).call("ADD", &raw);
    assert_eq!(result.unwrap()["cniVersion"], "0.1.0");
    // Exits without reading: its answer counts, not the closed pipe.
    let (result, _) = Plugins::with("echo '{}'").call("ADD", &raw);
    assert!(result.is_ok());
}

#[test]
fn what_is_not_there_or_not_a_name_is_code_7() {
    let path = Plugins::with("true");
    for kind in ["", "nothere", "../ipam", "/bin/true", "..", "."] {
        let raw = json!({"name": "net", "ipam": {"type": kind}}).to_string();
        let (result, _) = path.call("ADD", &raw);
        assert_eq!(result.unwrap_err().code, 7, "{kind}");
    }
    // Not executable is not there.
    fs::set_permissions(path.dir.path().join("ipam"), fs::Permissions::from_mode(0o644)).unwrap();
    let (result, _) = path.call("ADD", RAW);
    assert_eq!(result.unwrap_err().code, 7);
}

#[test]
fn a_plugin_whose_file_is_being_written_is_tried_again() {
    let path = Plugins::with("echo '{}'");
    let binary = path.dir.path().join("busy");
    fs::copy("/bin/true", &binary).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    let writer = fs::File::options().append(true).open(&binary).unwrap();
    let closes = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(writer);
    });
    let raw = json!({"name": "net", "ipam": {"type": "busy"}}).to_string();
    let (result, _) = path.call("DEL", &raw);
    closes.join().unwrap();
    assert!(result.is_ok(), "{result:?}");
}
